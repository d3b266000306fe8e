# make demo [FILE=model.gguf]   inspect a GGUF file and run its MoE layers (makes a small one by itself)
# make test                     the tests
# make test-gpu                 the tests that need an NVIDIA GPU (JAX_MOE_CUDA=ON builds for it)
# make lint                     formatting, lint and types
# make sanitize                 the C++ side under AddressSanitizer and UndefinedBehaviorSanitizer
# make cuda                     see that the CUDA kernels compile, quickly, so that most are not optimised
# make bench                    CPU speed against ggml
# make test-llamacpp            blocks and whole models against llama.cpp (builds llama-cpp-python once)

PYTHON ?= python3
VENV ?= .venv
LLAMACPP ?= .venv-llamacpp
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find ffi -type f 2>/dev/null)
# Compilers take what the machine has; two at a time fit into the memory of small machines.
export CMAKE_BUILD_PARALLEL_LEVEL ?= 2

.PHONY: demo test test-gpu test-llamacpp lint format sanitize cuda bench clean

demo: $(VENV)/installed
	$(BIN)/python -m jax_moe demo $(FILE)

test: $(VENV)/installed
	$(BIN)/pytest -n auto $(ARGS)

# Several processes share the GPU, so none may take its memory ahead, and the cores, so that each
# multiplies on one: with threads of theirs the tests take several times as long.
test-gpu: $(VENV)/installed
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/pytest -m gpu -n 8 $(ARGS)

test-llamacpp: $(VENV)/installed $(LLAMACPP)/installed
	JAX_MOE_LLAMACPP_PYTHON=$(abspath $(LLAMACPP))/bin/python $(BIN)/pytest tests/llamacpp $(ARGS)

$(LLAMACPP)/installed:
	$(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/pip install -q numpy llama-cpp-python==0.3.36
	@touch $@

bench: $(VENV)/installed
	$(BIN)/python -m jax_moe bench $(ARGS)

lint: $(VENV)/linted
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/linted
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/pip
	$(BIN)/pip install -q -e '.[test]'
	@touch $@

$(VENV)/linted: pyproject.toml $(VENV)/installed
	$(BIN)/pip install -q -e '.[test,lint]'
	@touch $@

# A build of its own beside the sources' tests: Python loads the sanitised module through a copy of the package.
sanitize: $(VENV)/installed
	tools/sanitize.sh $(BIN)

cuda: $(VENV)/installed
	tools/compile_cuda.sh $(BIN)

clean:
	rm -rf $(VENV) $(LLAMACPP) build dist
