"""The examples: whole models against float64, generation, sampling and the tokenizer."""

import copy
import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whole_models

import jax_moe

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]

import generate  # noqa: E402
import make_random_gguf  # noqa: E402
import measure  # noqa: E402
from decoding import Generator, Sampling  # noqa: E402
from transformer import forward, logits  # noqa: E402
from weights import load_transformer  # noqa: E402

PROMPT = np.random.default_rng(1).integers(0, whole_models.VOCABULARY, 20)


@pytest.fixture(scope="module", params=["qwen3moe", "gpt-oss"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    written = whole_models.write_model(path, request.param)
    return written, load_transformer(jax_moe.GGUFFile(path))


@jax.jit
def run(model, tokens, caches, start):
    x, caches = forward(model, tokens, caches, start)
    return logits(model, x), caches


def relative_error(y, expected):
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


def test_logits_agree_with_float64(model):
    written, loaded = model
    y, _ = run(loaded, PROMPT, loaded.new_cache(32), 0)
    assert relative_error(y, whole_models.logits(written, PROMPT)) < 1e-5


def test_pieces_and_single_tokens_give_what_the_whole_prompt_gives(model):
    _, loaded = model
    whole, _ = run(loaded, PROMPT, loaded.new_cache(32), 0)
    caches, rows, start = loaded.new_cache(32), [], 0
    for length in (10, *[1] * 10):
        y, caches = run(loaded, PROMPT[start : start + length], caches, start)
        rows.append(y)
        start += length
    assert relative_error(np.concatenate(rows), np.asarray(whole)) < 1e-5


def test_what_a_cache_holds_beyond_the_sequence_does_not_matter(model):
    _, loaded = model
    fresh, _ = run(loaded, PROMPT, loaded.new_cache(32), 0)
    used = jax.tree.map(lambda x: x + 1e3, loaded.new_cache(32))
    again, _ = run(loaded, PROMPT, used, 0)
    np.testing.assert_array_equal(fresh, again)


@pytest.fixture(scope="module")
def greedy(model):
    return make_generator(model[1], Sampling())


def make_generator(loaded, sampling):
    return Generator(
        loaded,
        sampling,
        prompt_length=len(PROMPT),
        max_tokens=12,
        stop_tokens=[-1],
        piece=10,
        stream=4,
    )


def generate_tokens(generator, seed=0, **changes):
    """The tokens after PROMPT, with changes of the generator's attributes."""
    generator = copy.copy(generator)
    for name, value in changes.items():
        setattr(generator, name, value)
    return np.concatenate(list(generator.tokens(generator.start(PROMPT, seed)))).tolist()


def test_greedy_tokens_are_the_likeliest_by_float64(model, greedy):
    tokens = generate_tokens(greedy)
    assert len(tokens) == 12 and tokens == generate_tokens(greedy)
    scores = whole_models.logits(model[0], np.array([*PROMPT, *tokens[:-1]]))
    assert tokens == scores[len(PROMPT) - 1 :].argmax(1).tolist()


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(greedy):
    tokens = generate_tokens(greedy)
    for token in tokens:
        stopped = generate_tokens(greedy, stop_tokens=np.array([token], np.int32))
        assert stopped == tokens[: tokens.index(token)]


def test_the_number_of_tokens_is_exact(greedy):
    tokens = generate_tokens(greedy)
    for count in range(1, 12):
        assert generate_tokens(greedy, max_tokens=count) == tokens[:count]


@pytest.mark.parametrize("model", ["qwen3moe"], indirect=True)
def test_seeds_make_sampled_texts(model):
    generator = make_generator(model[1], Sampling(temperature=1.0, top_k=50, top_p=0.95))
    first, again, other = (generate_tokens(generator, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_sampling_follows_the_distribution():
    probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    scores = jnp.log(jnp.array(probabilities, jnp.float32))[jnp.array([2, 0, 4, 1, 3])]
    keys = jax.random.split(jax.random.key(0), 4000)

    def frequencies(sampling):
        tokens = jax.vmap(lambda key: sampling.choose(scores, key))(keys)
        return np.bincount(tokens, minlength=5)[[1, 3, 0, 4, 2]] / len(keys)

    kept = {
        Sampling(1.0): probabilities,
        Sampling(0.5): probabilities**2,
        Sampling(1.0, top_k=2): probabilities * [1, 1, 0, 0, 0],
        Sampling(1.0, top_p=0.75): probabilities * [1, 1, 1, 0, 0],
        Sampling(1.0, top_k=4, top_p=0.3): probabilities * [1, 0, 0, 0, 0],
    }
    for sampling, expected in kept.items():
        np.testing.assert_allclose(frequencies(sampling), expected / expected.sum(), atol=0.03)
        assert not frequencies(sampling)[expected == 0].any()


CHAT_TEMPLATE = """\
{% for message in messages %}
{{ bos_token }}{{ message.role }}: {{ message.content }}
{% endfor %}
"""


def byte_level_vocabulary():
    """The 256 bytes as GPT-2 writes them, with the merges of a few words, and control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = [characters[byte] for byte in range(256)]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ hello", "1 2"]
    tokens += [merge.replace(" ", "") for merge in merges]
    kinds = [1] * len(tokens) + [3, 3]
    tokens += ["<|end|>", "<|start|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 263,
        "tokenizer.ggml.bos_token_id": 264,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


TEXTS = ["hello hello", "Ünïcödé 漢字 🙂!", " a\n\n b\t12 123", "don't", ""]


@pytest.fixture
def tokenizer_class():
    pytest.importorskip("tokenizers")
    from tokenizer import Tokenizer

    return Tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "gpt-4o"])
def test_tokenizer_round_trip(tokenizer_class, pre):
    tokenizer = tokenizer_class(byte_level_vocabulary() | {"tokenizer.ggml.pre": pre})
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode_stream(ids)) == text
    cut = tokenizer.encode("é漢")[:-1]
    assert "".join(tokenizer.decode_stream(cut)) == tokenizer.decode(cut) == "é\ufffd"


def test_tokenizer_merges_within_words(tokenizer_class):
    metadata = byte_level_vocabulary()
    tokenizer, tokens = tokenizer_class(metadata), metadata["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer.encode("hello hello")] == ["hello", "Ġhello"]
    # Qwen's digits are words of their own; GPT-2's stay together.
    assert [tokens[i] for i in tokenizer.encode("12")] == ["1", "2"]
    gpt2 = tokenizer_class(metadata | {"tokenizer.ggml.pre": "gpt-2"})
    assert [tokens[i] for i in gpt2.encode("12")] == ["12"]


def test_tokenizer_knows_control_tokens(tokenizer_class):
    metadata = byte_level_vocabulary()
    tokenizer = tokenizer_class(metadata)
    assert tokenizer.stop_tokens == [263]
    assert tokenizer.encode("hello<|end|>") == [259, 263]
    assert tokenizer.decode([264, 259, 263]) == "hello"
    first = tokenizer_class(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert first.encode("hello") == [264, 259] == first.encode("<|start|>hello")


def test_chat_template(tokenizer_class):
    pytest.importorskip("jinja2")
    assert tokenizer_class(byte_level_vocabulary()).chat("hello") == "<|start|>user: hello\n"


def test_unknown_vocabularies_are_named(tokenizer_class):
    metadata = byte_level_vocabulary()
    for key, value in (("model", "bert"), ("pre", "klingon")):
        with pytest.raises(ValueError, match=value):
            tokenizer_class(metadata | {f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize(
    ("name", "experts"), [("qwen3-tiny", {"Q4_K", "Q6_K"}), ("gpt-oss-tiny", {"MXFP4"})]
)
def test_generate_runs_a_packed_model(tmp_path, capsys, name, experts):
    path = tmp_path / "random.gguf"
    shape = dataclasses.replace(make_random_gguf.MODELS[name], layers=3)
    make_random_gguf.write_model(path, shape)
    file = jax_moe.GGUFFile(path)
    assert {
        tensor.format for layer in file.layers for tensor in layer.projections.values()
    } == experts
    generate.main([str(path), "--tokens", "5,6,7", "--max-tokens", "9"])
    output = capsys.readouterr()
    tokens = [int(token) for token in output.out.split()]
    assert len(tokens) == 9
    assert "prefill 3 tokens" in output.err and "decode 9 tokens" in output.err

    generate.main([str(path), "--tokens", "5,6,7", "--max-tokens", "9", "--prepack"])
    assert [int(token) for token in capsys.readouterr().out.split()] == tokens

    with pytest.raises(SystemExit, match="Token ids are from 0 to 511"):
        generate.main([str(path), "--tokens", "5,512"])

    # Nothing but the weights is rounded, so dense weights must give the same tokens.
    loaded = load_transformer(file)
    dense = jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, jax_moe.PackedExperts) else x,
        loaded,
        is_leaf=lambda x: isinstance(x, jax_moe.PackedExperts),
    )
    scores, _ = run(dense, np.array([5, 6, 7, *tokens[:-1]]), dense.new_cache(12), 0)
    np.testing.assert_array_equal(tokens, np.asarray(scores)[2:].argmax(1))


def test_measure(tmp_path, capsys):
    path = tmp_path / "random.gguf"
    shape = dataclasses.replace(make_random_gguf.MODELS["qwen3-tiny"], layers=2)
    make_random_gguf.write_model(path, shape)
    small = ["--prompt-tokens", "9", "--max-tokens", "5", "--repeats", "1"]
    for flag, layout in (("--prepack", "tiled"), ("--no-prepack", "GGUF's layout")):
        measure.main([str(path), *small, flag])
        lines = capsys.readouterr().out.splitlines()
        assert layout in lines[0] and "GB/s" in lines[1] and "compile" in lines[2]
        assert [line.split()[0] for line in lines[3:]] == ["prefill", "decode"]
        assert all("tokens/s" in line and line.endswith("%") for line in lines[3:])


def test_what_is_prepacked(tmp_path):
    path = tmp_path / "random.gguf"
    shape = dataclasses.replace(make_random_gguf.MODELS["qwen3-tiny"], layers=1)
    make_random_gguf.write_model(path, shape)
    model = load_transformer(jax_moe.GGUFFile(path), prepack=True)
    (layer,) = model.layers
    assert model.embedding.weight.layout is None
    for linear in (*layer.qkv, layer.o, model.output):
        assert linear.weight.layout == "tiled"
    assert layer.moe.experts.gate.layout == layer.moe.experts.down.layout == "tiled"


def test_queries_keys_and_values_of_one_format_are_one_matrix(tmp_path):
    path = tmp_path / "random.gguf"
    make_random_gguf.write_model(path, make_random_gguf.MODELS["qwen3-tiny"])
    file = jax_moe.GGUFFile(path)
    kinds = set()
    for prepack in (False, True):
        for i, layer in enumerate(load_transformer(file, prepack=prepack).layers):
            parts = [file.load_tensor(f"blk.{i}.attn_{which}.weight") for which in "qkv"]
            formats = [part.format for part in parts]
            assert [linear.weight.format for linear in layer.qkv] == list(dict.fromkeys(formats))
            rows = [np.asarray(linear.weight.dequantize()[0]) for linear in layer.qkv]
            expected = [np.asarray(part.dequantize()[0]) for part in parts]
            np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(expected))
            kinds.add(len(rows))
    assert kinds == {1, 2}


def test_generate_prints_a_text(tmp_path, capsys, tokenizer_class):
    vocabulary = byte_level_vocabulary()
    path = tmp_path / "text.gguf"
    written = whole_models.write_model(path, "qwen3moe", vocabulary=vocabulary)
    tokenizer = tokenizer_class(vocabulary)
    ids = prompt = tokenizer.encode("hello 12")
    for _ in range(6):
        ids = [*ids, int(whole_models.logits(written, np.array(ids))[-1].argmax())]
    generate.main([str(path), "--prompt", "hello 12", "--max-tokens", "6"])
    continued = tokenizer.decode(ids[len(prompt) :])
    assert capsys.readouterr().out == f"hello 12{continued}\n"


@pytest.mark.parametrize(("kind", "tolerance"), [("Q4_K", 0.05), ("Q6_K", 0.05), ("MXFP4", 0.5)])
def test_random_weights_have_their_deviation(kind, tolerance):
    """MXFP4's scales are powers of two, so the deviation is right to a factor of sqrt(2)."""
    tensor = make_random_gguf.Tensor("a", (64, 1024), make_random_gguf.Type[kind], 0.25)
    packed = np.concatenate(list(make_random_gguf.Source(0).pieces(tensor, 0))).reshape(64, -1)
    weights = np.asarray(jax_moe.PackedExperts(jnp.asarray(packed), kind).dequantize())
    assert abs(weights.std() / 0.25 - 1) < tolerance
    assert abs(weights.mean()) / 0.25 < 0.05


def test_random_files_do_not_depend_on_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(make_random_gguf.Source, "BLOCKS", 1009)  # tensors go around their sheet
    shape = dataclasses.replace(make_random_gguf.MODELS["qwen3-tiny"], layers=2)
    paths = [tmp_path / f"{threads}.gguf" for threads in (1, 5)]
    for path, threads in zip(paths, (1, 5), strict=True):
        make_random_gguf.write_model(path, shape, threads=threads)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    import gguf

    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(paths[0]).tensors}
    experts = tensors["blk.0.ffn_gate_exps.weight"]
    assert len(np.unique(experts.reshape(len(experts), -1), axis=0)) == len(experts)
    assert tensors["output.weight"].shape == (512, 210)
    assert (tensors["output_norm.weight"] == 1).all()


def test_another_architecture_is_named(tmp_path):
    from make_gguf import write_gguf

    path = write_gguf(tmp_path / "x.gguf", "llama", {}, {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="'llama' is not one of qwen3moe, gpt-oss"):
        load_transformer(jax_moe.GGUFFile(path))


def test_load_tensor(tmp_path):
    from make_gguf import Weights, write_gguf

    weights = Weights()(4, 64)
    tensors = {"dense": weights, "packed": (weights, "Q8_0"), "whole": np.arange(3)}
    file = jax_moe.GGUFFile(write_gguf(tmp_path / "x.gguf", "any", {}, tensors))
    assert list(file.tensors) == list(tensors)
    np.testing.assert_array_equal(file.load_tensor("dense"), weights)
    packed = file.load_tensor("packed")
    assert packed.shape == (1, 4, 64) and packed.format.name == "Q8_0"
    assert relative_error(np.asarray(packed.dequantize()[0]), weights) < 0.01
    with pytest.raises(ValueError, match="'absent' is missing"):
        file.load_tensor("absent")
    with pytest.raises(ValueError, match="'whole' has type I64"):
        file.load_tensor("whole")
