"""select_kernel and the FFI layer's promises about versions."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_moe
from jax_moe import Experts, MoEVariant, PackedExperts, Routing, _ffi
from jax_moe._activations import ACTIVATIONS
from jax_moe._formats import FORMATS
from jax_moe._operands import TILED_FORMAT


def gemm_shapes(dtype=jnp.float32):
    weight = oracle.packed("Q4_K", 3, 10, 256)[0]
    return (
        jax.ShapeDtypeStruct((6, 256), dtype),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weight),
        jax.ShapeDtypeStruct((12,), jnp.int32),
        jax.ShapeDtypeStruct((12,), jnp.int32),
    )


def test_gemm_on_the_cpu():
    info = jax_moe.select_kernel("moe_gemm", *gemm_shapes(), top_k=2, platform="cpu")
    assert info.variant is None and info.platform == "cpu" and info.kernel
    assert info.accumulator == "float32" and info.deterministic
    assert info.error_bound == 1e-5
    assert info.workspace_bytes > 0
    rounded = jax_moe.select_kernel(
        "moe_gemm", *gemm_shapes(), top_k=2, variant=MoEVariant.SCALAR_GGUF, platform="cpu"
    )
    assert rounded.kernel != info.kernel and rounded.error_bound == 1.2e-2
    half = jax_moe.select_kernel(
        "moe_gemm",
        *gemm_shapes(jnp.bfloat16),
        top_k=2,
        variant=MoEVariant.WMMA_GGUF,
        platform="cpu",
    )
    assert half.error_bound == 2e-3


@pytest.mark.parametrize("x64", [False, True])
def test_reference(x64):
    with jax.enable_x64(x64):
        dtypes = {"float32": 1e-5, "bfloat16": 2e-3} | ({"float64": 1e-12} if x64 else {})
        for dtype, bound in dtypes.items():
            x, weight, pairs, ids = gemm_shapes(dtype)
            call = {"top_k": 2, "implementation": "reference"}
            info = jax_moe.select_kernel("moe_gemm", x, weight, pairs, ids, **call)
            assert info.kernel == "reference" and info.workspace_bytes == 0
            assert info.accumulator == ("float64" if x64 else "float32")
            assert info.error_bound == bound
        rounded = {"variant": MoEVariant.SCALAR_GGUF, "implementation": "reference"}
        info = jax_moe.select_kernel("moe_gemm", *gemm_shapes(), top_k=2, **rounded)
        assert info.error_bound == 1.2e-2
        info = jax_moe.select_kernel("moe_ffn", *tiled_ffn(6, jnp.float32), **rounded)
        assert info.kernel == "reference" and info.error_bound == 2.4e-2


def test_bound_of_the_reference_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        packed, exact = oracle.packed("Q4_K", 3, 10, 256)
        x = jnp.asarray(rng.standard_normal((6, 256)))
        arguments = x, packed, jnp.arange(6, dtype=jnp.int32), jnp.zeros(6, jnp.int32)
        call = {"top_k": 1, "implementation": "reference"}
        y = jax_moe.moe_gemm(*arguments, **call)
        bound = jax_moe.select_kernel("moe_gemm", *arguments, **call).error_bound
        assert oracle.relative_error(y, np.asarray(x) @ exact[0].T) <= bound


def test_workspace_is_what_the_program_allocates():
    x, weight, pairs, ids = gemm_shapes()
    info = jax_moe.select_kernel("moe_gemm", x, weight, pairs, ids, top_k=2, platform="cpu")
    text = jax.jit(lambda *a: jax_moe.moe_gemm(*a, top_k=2)).lower(x, weight, pairs, ids).as_text()
    assert f"tensor<{info.workspace_bytes}xui8>" in text


def test_ffn():
    weight = oracle.packed("Q4_K", 3, 256, 256)[0]
    arguments = (
        jnp.ones((6, 256)),
        Routing(jnp.zeros((6, 2), jnp.int32), jnp.ones((6, 2))),
        Experts(gate=weight, up=weight, down=weight),
    )
    info = jax_moe.select_kernel("moe_ffn", *arguments, platform="cpu")
    assert info.deterministic and info.workspace_bytes > 0
    text = jax.jit(jax_moe.moe_ffn).lower(*arguments).as_text()
    assert f"tensor<{info.workspace_bytes}xui8>" in text


def tiled_ffn(tokens: int, dtype=jnp.float16, experts: int = 64):
    weight = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((experts, *leaf.shape[1:]), leaf.dtype),
        oracle.packed("Q4_K", 1, 256, 256)[0].prepack(),
    )
    ids = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    return (
        jax.ShapeDtypeStruct((tokens, 256), dtype),
        Routing(ids, jax.ShapeDtypeStruct((tokens, 2), jnp.float32)),
        Experts(gate=weight, up=weight, down=weight),
    )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="asks about a Hopper GPU")
@pytest.mark.parametrize(
    ("tokens", "experts", "kernel", "tile"),
    [
        (1, 64, "cuda_tiled_layer", (16, 1)),
        (4, 64, "cuda_tiled_layer", (16, 2)),
        (4, 4, "cuda_tiled_layer", (16, 2)),
        (8, 64, "cuda_tiled_layer", (16, 2)),
        (9, 64, "cuda_tiled_mma", (16, 8)),
        # More than a pair an expert.
        (8, 16, "cuda_tiled_layer", (16, 2)),
        (8, 15, "cuda_tiled_mma", (16, 8)),
        (192, 64, "cuda_tiled_mma", (16, 8)),
        (320, 64, "cuda_tiled_wgmma", (128, 32)),
        (1280, 64, "cuda_tiled_wgmma", (128, 64)),
        (3072, 96, "cuda_tiled_wgmma", (256, 96)),
        (8000, 64, "cuda_tiled_wgmma", (256, 128)),
        # Blocks of larger tiles would be few.
        (500, 4, "cuda_tiled_wgmma", (128, 32)),
        (1300, 4, "cuda_tiled_wgmma", (128, 64)),
        (2048, 64, "cuda_tiled_wgmma", (128, 64)),
        (12000, 4, "cuda_tiled_wgmma", (256, 128)),
    ],
)
def test_tiled_weights_on_cuda(tokens, experts, kernel, tile):
    info = jax_moe.select_kernel("moe_ffn", *tiled_ffn(tokens, experts=experts), platform="cuda")
    assert (info.kernel, info.tile, info.architecture) == (kernel, tile, "sm_90a")
    assert info.error_bound == 1e-3 and info.deterministic


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="asks about a Hopper GPU")
@pytest.mark.parametrize(
    ("tokens", "experts", "rows", "variant", "kernel", "tile"),
    [
        (1, 1, 256, None, "cuda_tiled_few", (16, 2)),
        (2, 1, 256, None, "cuda_tiled_few", (16, 2)),
        (4, 1, 256, None, "cuda_tiled_few", (16, 2)),
        (5, 1, 256, None, "cuda_tiled_mma", (16, 8)),
        (32, 64, 256, None, "cuda_tiled_few", (16, 2)),
        (33, 64, 256, None, "cuda_tiled_mma", (16, 8)),
        (2, 1, 196608, None, "cuda_tiled_few", (16, 2)),
        (2, 1, 196624, None, "cuda_tiled_mma", (16, 8)),
        (3, 1, 49152, None, "cuda_tiled_few", (16, 2)),
        (3, 1, 49168, None, "cuda_tiled_mma", (16, 8)),
        (1, 1, 256, MoEVariant.SCALAR_GGUF, "cuda_tiled_mma", (16, 8)),
    ],
)
def test_few_tokens_with_tiled_weights(tokens, experts, rows, variant, kernel, tile):
    weight = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((experts, rows, *leaf.shape[2:]), leaf.dtype),
        oracle.packed("Q4_K", 1, 256, 256)[0].prepack(),
    )
    pairs = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    x = jax.ShapeDtypeStruct((tokens, 256), jnp.float32)
    info = jax_moe.select_kernel(
        "moe_gemm", x, weight, pairs, pairs, top_k=1, variant=variant, platform="cuda"
    )
    assert (info.kernel, info.tile) == (kernel, tile)


@pytest.mark.parametrize(
    ("capability", "dtype", "tokens", "k", "kernel", "tile"),
    [
        (90, jnp.bfloat16, 100, 264, "cuda_wgmma_dense", (256, 144)),
        (90, jnp.float16, 25, 264, "cuda_wgmma_dense", (256, 144)),
        (90, jnp.float16, 24, 264, "cuda_mma_dense", (16, 64)),
        (90, jnp.bfloat16, 10, 264, "cuda_mma_dense", (16, 8)),
        (90, jnp.bfloat16, 100, 260, "cuda_mma_dense", (16, 64)),
        (90, jnp.float32, 100, 264, "cuda_mma_dense", (16, 64)),
        (80, jnp.bfloat16, 100, 264, "cuda_mma_dense", (16, 64)),
    ],
)
def test_dense_weights_on_cuda(monkeypatch, capability, dtype, tokens, k, kernel, tile):
    monkeypatch.setattr("jax_moe._select._compute_capability", lambda: capability)
    weight = jax.ShapeDtypeStruct((4, 10, k), dtype)
    pairs = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    x = jax.ShapeDtypeStruct((tokens, k), dtype)
    info = jax_moe.select_kernel("moe_gemm", x, weight, pairs, pairs, top_k=1, platform="cuda")
    assert (info.kernel, info.tile) == (kernel, tile)
    assert info.architecture == ("sm_90a" if capability == 90 else "sm_80")
    down = jax.ShapeDtypeStruct((4, 10, k), dtype)
    up = jax.ShapeDtypeStruct((4, k, 10), dtype)
    routing = Routing(
        jax.ShapeDtypeStruct((tokens, 1), jnp.int32), jax.ShapeDtypeStruct((tokens, 1), jnp.float32)
    )
    x = jax.ShapeDtypeStruct((tokens, 10), dtype)
    experts = Experts(gate=up, up=up, down=down)
    info = jax_moe.select_kernel("moe_ffn", x, routing, experts, platform="cuda")
    assert (info.kernel, info.tile) == (kernel, tile)
    bounds = {jnp.float32: 1e-3, jnp.float16: 5e-4, jnp.bfloat16: 2e-3}
    rounds_h = dtype == jnp.bfloat16 and kernel == "cuda_wgmma_dense"
    assert info.error_bound == (4e-3 if rounds_h else bounds[dtype])


def test_tiled_weights_have_no_wgmma_before_hopper(monkeypatch):
    monkeypatch.setattr("jax_moe._select._compute_capability", lambda: 80)
    info = jax_moe.select_kernel("moe_ffn", *tiled_ffn(500), platform="cuda")
    assert (info.kernel, info.tile, info.architecture) == ("cuda_tiled_mma", (16, 8), "sm_80")


@pytest.mark.parametrize(
    ("capability", "format_name", "tile"),
    [
        (90, "Q4_K", (128, 128)),
        (80, "Q4_K", (128, 128)),
        (86, "Q4_K", (128, 32)),
        (89, "Q8_0", (128, 128)),
        (86, "IQ2_XXS", (128, 128)),
    ],
)
def test_tiles_that_fit_the_device(monkeypatch, capability, format_name, tile):
    """Wide tiles need more shared memory than some devices have."""
    monkeypatch.setattr("jax_moe._select._compute_capability", lambda: capability)
    pairs = jax.ShapeDtypeStruct((500,), jnp.int32)
    weight = oracle.packed(format_name, 2, 10, 256)[0]
    x = jax.ShapeDtypeStruct((500, 256), jnp.bfloat16)
    info = jax_moe.select_kernel("moe_gemm", x, weight, pairs, pairs, top_k=1, platform="cuda")
    assert info.tile == tile
    assert info.architecture == ("sm_90a" if capability == 90 else "sm_80")


def abstract_weight(format_name: str, shape: tuple[int, int, int], tiled: bool) -> PackedExperts:
    format = FORMATS[format_name]
    *leading, k = shape
    row_bytes = k // format.block_size * format.block_bytes
    data = jax.ShapeDtypeStruct((*leading, row_bytes), jnp.uint8)
    if not tiled:
        return PackedExperts(data, format)
    return PackedExperts(data, format, "tiled", jax.ShapeDtypeStruct((*leading, 2), jnp.float32))


def abstract_ffn(tokens, experts, top_k, d_model, d_expert, *, formats=("Q4_K",) * 3, tiled=True):
    """Arguments of moe_ffn without arrays; `formats` of gate (None: none), up and down."""
    rows_and_columns = ((d_expert, d_model), (d_expert, d_model), (d_model, d_expert))
    weights = {
        name: abstract_weight(format, (experts, *shape), tiled)
        for name, format, shape in zip(
            ("gate", "up", "down"), formats, rows_and_columns, strict=True
        )
        if format is not None
    }
    routing = Routing(
        jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
    )
    return jax.ShapeDtypeStruct((tokens, d_model), jnp.float32), routing, Experts(**weights)


def ffn_workspace(arguments, platform="cuda", **options) -> int:
    return jax_moe.select_kernel(
        "moe_ffn", *arguments, platform=platform, **options
    ).workspace_bytes


def fixed_bytes(experts: int) -> int:
    """Offsets, a tile an expert, the number of tiles, and the rounding of seven areas to 256."""
    return 4 * (experts + 1) + 16 * experts + 4 + 7 * 256


def test_workspace_of_tiled_weights_on_cuda():
    """Qwen3-30B-A3B: x and h in f16, each row with a scale and a norm, down in f32, lists."""
    tokens, experts, top_k, d_model, d_expert = shape = (512, 128, 8, 2048, 768)
    a_pair = 2 * d_expert + 8 + 4 * d_model + 2 * 4
    expected = fixed_bytes(experts) + tokens * (top_k * a_pair + 2 * d_model + 8)
    tiled, gguf = abstract_ffn(*shape), abstract_ffn(*shape, tiled=False)
    assert ffn_workspace(tiled) == expected == 42_017_032
    # On the CPU the weights are unpacked. There rows of x and h are f32 with their sums, padded to
    # 512 columns, and one program for GGUF's layout has to do for the CPU and for CUDA.
    assert ffn_workspace(gguf) == ffn_workspace(gguf, "cpu") == ffn_workspace(tiled, "cpu")
    assert ffn_workspace(gguf) - expected == 15_185_920


@pytest.mark.parametrize("platform", ("cpu", "cuda"))
def test_each_platform_allocates_its_workspace(platform):
    """A program with tiled weights asks for what its platform takes, and select_kernel tells it."""
    arguments = abstract_ffn(40, 4, 2, 256, 512)
    lowered = jax.jit(jax_moe.moe_ffn).trace(*arguments).lower(lowering_platforms=(platform,))
    assert f"tensor<{ffn_workspace(arguments, platform)}xui8>" in lowered.as_text()
    x, _, experts = arguments
    ids = jax.ShapeDtypeStruct((40,), jnp.int32)
    gemm = (x, experts.up, ids, ids)
    info = jax_moe.select_kernel("moe_gemm", *gemm, top_k=1, platform=platform)
    traced = jax.jit(lambda *a: jax_moe.moe_gemm(*a, top_k=1)).trace(*gemm)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert f"tensor<{info.workspace_bytes}xui8>" in text


@pytest.mark.parametrize(
    ("gate", "bias", "options", "columns"),
    [
        ("Q4_K", None, {}, 256),
        ("Q6_K", None, {}, 1024),
        ("Q4_K", "up_bias", {}, 1024),
        ("Q4_K", "gate_bias", {"activation": "swiglu_oai", "activation_limit": 0.7}, 256),
        ("Q4_K", None, {"variant": MoEVariant.SCALAR_GGUF}, 1024),
        (None, None, {"activation": "silu"}, 256),
        (None, "up_bias", {"activation": "silu"}, 512),
    ],
)
def test_gate_and_up_have_memory_where_they_are_stored(gate, bias, options, columns):
    """In float32, before down; most calls make h of x in one launch and store neither."""
    x, routing, experts = abstract_ffn(40, 4, 2, 256, 512, formats=(gate, "Q4_K", "Q4_K"))
    if bias is not None:
        extra = {bias: jax.ShapeDtypeStruct((4, 512), jnp.float32)}
        experts = dataclasses.replace(experts, **extra)
    arguments = (x, routing, experts)
    a_pair = 2 * 512 + 8 + 4 * columns + 2 * 4
    expected = fixed_bytes(4) + 40 * (2 * a_pair + 2 * 256 + 8)
    assert ffn_workspace(arguments, **options) == expected
    call = jax.jit(lambda *a: jax_moe.moe_ffn(*a, **options))
    text = call.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<{expected}xui8>" in text


def random_problems(rng):
    """Native problems of either op, in every mix of layouts."""
    native, q4_k, q6_k = _ffi.native(), FORMATS["Q4_K"].ggml_type, FORMATS["Q6_K"].ggml_type
    formats = (0, 1, 30, q4_k, q4_k | TILED_FORMAT, q6_k | TILED_FORMAT)
    for _ in range(400):
        top_k, experts = int(rng.integers(1, 11)), int(rng.choice([1, 3, 8, 128, 500]))
        widths = rng.integers(1, 120, 2) * rng.choice([1, 16, 128], 2)
        gate, up, down = (int(format) for format in rng.choice(formats, 3))
        given = [(gate, up), (gate, gate), (gate, -1), (-1, up)][rng.integers(4)]
        yield native.FfnProblem(
            top_k=top_k,
            experts=experts,
            d_model=int(widths[0]),
            d_expert=int(widths[1]),
            gate_format=given[0],
            up_format=given[1],
            down_format=down,
            variant=int(rng.integers(4)),
            activation=int(rng.integers(len(ACTIVATIONS))),
            limit=float(rng.choice([0.0, 0.7, np.inf])),
            biased=bool(rng.integers(2)),
        )
        yield native.GemmProblem(
            top_k=top_k,
            experts=experts,
            n=int(widths[0]),
            k=int(widths[1]),
            rows_are_pairs=bool(rng.integers(2)),
            format=down,
        )


def test_cuda_keeps_within_the_workspace():
    """For any number of tokens: the bound is linear in them, so that they may be symbolic."""
    native = _ffi.native()
    for problem in random_problems(np.random.default_rng(0)):
        for tokens in (0, 1, 2, 3, 17, 64, 511, 4096, 100_000):
            used = native.cuda_workspace_used(problem, tokens)
            assert used <= _ffi.workspace_bytes(problem, tokens)


def test_workspace_of_tiled_weights_is_not_above_what_cuda_uses():
    native, tiled = _ffi.native(), FORMATS["Q4_K"].ggml_type | TILED_FORMAT
    dims = {"top_k": 8, "experts": 128}
    ffn = native.FfnProblem(
        **dims,
        d_model=2048,
        d_expert=768,
        gate_format=tiled,
        up_format=tiled,
        down_format=tiled,
        variant=0,
        activation=0,
        limit=0.0,
        biased=False,
    )
    gemm = native.GemmProblem(**dims, n=768, k=2048, rows_are_pairs=False, format=tiled)
    for problem in (ffn, gemm):
        for tokens in (1, 16, 512, 4096):
            spare = _ffi.workspace_bytes(problem, tokens) - native.cuda_workspace_used(
                problem, tokens
            )
            assert 0 <= spare <= 7 * 256 + 16 * 128


def test_platform_is_checked():
    with pytest.raises(ValueError, match="platform is 'cpu' or 'cuda'"):
        jax_moe.select_kernel("moe_gemm", *gemm_shapes(), top_k=2, platform="tpu")


def test_build_info():
    info = _ffi.build_info()
    assert info["version"] == jax_moe.__version__
    major, minor = _ffi.native().ffi_api_version()
    assert (major, minor) <= _ffi.runtime_api_version()


def test_versions_that_jaxlib_accepts_and_refuses():
    major, minor = _ffi.runtime_api_version()
    assert _ffi._refusal((major, minor)) is None
    newer = _ffi._refusal((major, minor + 1))
    assert newer and f"{major}.{minor + 1}" in newer and f"{major}.{minor}" in newer
    assert jax.lib.__version__ in newer


def test_a_refused_library_still_imports():
    """A binary that is too new: import, info, reference and JAX work, and an op raises."""
    program = """
        import json, pathlib, re, tempfile, jax
        real = pathlib.Path(jax.ffi.include_dir())
        fake = pathlib.Path(tempfile.mkdtemp())
        header = fake / "xla" / "ffi" / "api" / "c_api.h"
        header.parent.mkdir(parents=True)
        text = (real / "xla" / "ffi" / "api" / "c_api.h").read_text()
        header.write_text(re.sub("(XLA_FFI_API_MINOR) [0-9]+", r"\\1 0", text))
        jax.ffi.include_dir = lambda: str(fake)
        import jax.numpy as jnp, jax_moe
        from jax_moe.__main__ import main
        reference = jax_moe.route(jnp.ones((1, 4)), 2, implementation="reference")
        try:
            jax_moe.route(jnp.ones((1, 4)), 2)
        except ImportError as error:
            message = str(error)
        main(["info"])
        print(json.dumps([message, float(jnp.ones(3).sum()), reference.expert_ids.tolist()]))
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    message, total, ids = json.loads(done.stdout.splitlines()[-1])
    built = ".".join(map(str, _ffi.native().ffi_api_version()))
    assert built in message and "0.0" in message and jax.lib.__version__ in message
    assert total == 3 and ids == [[0, 1]]
