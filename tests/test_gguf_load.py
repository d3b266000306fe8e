"""From a file to MoEParams and MoEConfig: one small model of every kind of block."""

import dataclasses
import gc
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from make_gguf import (
    Weights,
    dense_tensors,
    expert_tensors,
    model_keys,
    shared_tensors,
    write_gguf,
    write_qwen3moe,
)

from jax_moe import GGUFFile, MoEConfig, PackedExperts, load_gguf, moe_block
from jax_moe import _demo_reference as reference
from jax_moe._ffi import unusable
from jax_moe._gguf import GGUFError
from jax_moe._gguf.architectures import ARCHITECTURES

IMPLEMENTATIONS = [
    "reference",
    pytest.param(None, marks=pytest.mark.skipif(unusable() is not None, reason=str(unusable()))),
]

DEEPSEEK = {
    "expert_shared_count": 2,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
}


def model(architecture, keys, *tensors, experts=4, top_k=2, shared=False, **options):
    """Architecture, keys and tensors of a model whose layer 1 is a MoE layer."""
    weights = Weights()
    own = dense_tensors(weights, 0) | expert_tensors(weights, 1, experts=experts, **options)
    if shared:
        own |= shared_tensors(weights, 1)
    for more in tensors:
        own |= more
    own_keys = {"leading_dense_block_count": 1} if ARCHITECTURES[architecture].leading_dense else {}
    return architecture, model_keys(experts=experts, top_k=top_k) | own_keys | keys, own


def vector(name, *shape, seed=7):
    return {f"blk.1.{name}": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def without(made, *names):
    architecture, keys, tensors = made
    return (
        architecture,
        keys,
        {k: v for k, v in tensors.items() if k.removeprefix("blk.1.") not in names},
    )


def without_keys(made, *names):
    architecture, keys, tensors = made
    return architecture, {k: v for k, v in keys.items() if k not in names}, tensors


def merged(made):
    """gate and up as one tensor, gate rows first."""
    architecture, keys, tensors = made
    gate, up = (tensors.pop(f"blk.1.ffn_{name}_exps.weight")[0] for name in ("gate", "up"))
    both = np.concatenate([gate, up], axis=1)
    return architecture, keys, tensors | {"blk.1.ffn_gate_up_exps.weight": (both, "Q8_0")}


GPT_OSS = model(
    "gpt-oss",
    {},
    vector("ffn_gate_inp.bias", 4),
    vector("ffn_gate_exps.bias", 4, 32, seed=1),
    vector("ffn_up_exps.bias", 4, 32, seed=2),
    vector("ffn_down_exps.bias", 4, 64, seed=3),
    formats=("MXFP4", "MXFP4", "MXFP4"),
)
SHARED_GATE = vector("ffn_gate_inp_shexp.weight", 64)
BIAS = vector("exp_probs_b.bias", 4)

# name: the model, and what its configuration says beyond MoEConfig(top_k=2).
MODELS = {
    "llama": (model("llama", {}), {}),
    "qwen3moe": (model("qwen3moe", {}), {}),
    "qwen3moe, F16 and BF16": (model("qwen3moe", {}, formats=("F16", "F16", "BF16")), {}),
    "olmoe": (model("olmoe", {}), {"normalize": False}),
    "qwen2moe": (model("qwen2moe", {}, SHARED_GATE, shared=True), {"normalize": False}),
    "gpt-oss": (
        GPT_OSS,
        {
            "gating": "softmax_after_topk",
            "normalize": False,
            "activation": "swiglu_oai",
            "activation_limit": 7.0,
        },
    ),
    "deepseek2 as V2": (
        model("deepseek2", {"expert_shared_count": 2, "expert_weights_scale": 16.0}, shared=True),
        {"normalize": False, "scale": 16.0},
    ),
    "deepseek2 as V3": (
        model(
            "deepseek2",
            DEEPSEEK
            | {"expert_gating_func": 2, "expert_group_count": 4, "expert_group_used_count": 2},
            vector("exp_probs_b.bias", 16),
            experts=16,
            top_k=4,
            shared=True,
        ),
        {
            "top_k": 4,
            "gating": "sigmoid",
            "scale": 2.5,
            "num_groups": 4,
            "num_groups_used": 2,
        },
    ),
    "deepseek2, merged": (
        merged(model("deepseek2", DEEPSEEK, shared=True)),
        {"scale": 2.5},
    ),
    "deepseek2, scale 0": (
        model("deepseek2", {"expert_weights_scale": 0.0}),
        {"normalize": False},
    ),
    "deepseek2 as GLM-4.7-Flash": (
        model(
            "deepseek2",
            {"vocab_size": 154880, "block_count": 47},
            {f"blk.{i}.attn_norm.weight": np.ones(64, np.float32) for i in range(47)},
        ),
        {"gating": "sigmoid", "normalize": False},
    ),
    "glm4moe": (
        model("glm4moe", DEEPSEEK, BIAS, shared=True),
        {"gating": "sigmoid", "scale": 2.5},
    ),
    "llama4": (
        model("llama4", {"interleave_moe_layer_step": 2}, shared=True),
        {"gating": "sigmoid", "normalize": False, "weights_before": True},
    ),
    "step35": (
        model(
            "step35",
            {"swiglu_clamp_exp": [0.0, 0.25], "swiglu_clamp_shexp": [0.0, 0.0]},
            shared=True,
        ),
        {
            "gating": "sigmoid",
            "normalize": False,
            "activation": "swiglu_clamp_after",
            "activation_limit": 0.25,
        },
    ),
    "cohere2moe": (
        model("cohere2moe", {"expert_shared_count": 1}, shared=True),
        {"gating": "sigmoid", "normalize": False, "sum_scale": 0.5},
    ),
    "nemotron_h_moe": (
        without(
            model(
                "nemotron_h_moe",
                {"expert_used_count": [1, 2], "embedding_length": 96},
                BIAS,
                {
                    "blk.1.ffn_gate_inp.weight": Weights(4)(4, 96),
                    "blk.1.ffn_latent_down.weight": (Weights(5)(64, 96), "Q8_0"),
                    "blk.1.ffn_latent_up.weight": (Weights(6)(96, 64), "Q5_0"),
                    "blk.1.ffn_up_shexp.weight": Weights(8)(32, 96),
                    "blk.1.ffn_down_shexp.weight": Weights(9)(96, 32),
                },
            ),
            "ffn_gate_exps.weight",
        ),
        {"gating": "sigmoid", "normalize": False, "activation": "relu2"},
    ),
    "kimi-k3": (
        model(
            "kimi-k3",
            {
                "expert_gating_func": 2,
                "expert_shared_count": 1,
                "embedding_length": 96,
                "activation.situ_beta": 4.0,
                "activation.situ_linear_beta": 25.0,
            },
            BIAS,
            {
                "blk.1.ffn_gate_inp.weight": Weights(4)(4, 96),
                "blk.1.ffn_routed_down.weight": (Weights(5)(64, 96), "Q8_0"),
                "blk.1.ffn_routed_up.weight": (Weights(6)(96, 64), "Q5_0"),
                "blk.1.ffn_routed_norm.weight": Weights(7)(64),
            },
            shared_tensors(Weights(8), 1, d_model=96),
        ),
        {
            "gating": "sigmoid",
            "normalize": False,
            "activation": "situ",
            "activation_betas": (4.0, 25.0),
        },
    ),
    "granite_swa": (
        merged(
            model(
                "granite_swa",
                {"expert_shared_feed_forward_length": 32},
                {
                    "blk.1.ffn_up_shexp.weight": (Weights(5)(64, 64), "Q8_0"),
                    "blk.1.ffn_down_shexp.weight": (Weights(6)(64, 32), "Q8_0"),
                },
            )
        ),
        {},
    ),
    "nomic-bert-moe": (
        without(model("nomic-bert-moe", {}), "ffn_gate_exps.weight"),
        {"normalize": False, "activation": "gelu"},
    ),
    "scales": (
        model(
            "qwen3moe",
            {},
            vector("ffn_gate_exps.scale", 4, seed=1),
            vector("ffn_up_exps.scale", 4, seed=2),
            vector("ffn_down_exps.scale", 4, seed=3),
        ),
        {},
    ),
}


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    made, expected = MODELS[request.param]
    path = write_gguf(tmp_path / "model.gguf", *made)
    return GGUFFile(path), MoEConfig(**{"top_k": 2} | expected)


def layer_1(file):
    (layer,) = [layer for layer in file.layers if layer.index == 1]
    return layer


def test_configuration(case):
    file, expected = case
    assert layer_1(file).problem is None
    config = file.load(1)[1]
    assert config == layer_1(file).config
    # What concerns shared experts is checked by their results, below.
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(MoEConfig)
        if field.name not in ("norm_eps", "shared_activation", "shared_activation_limit")
    }
    assert MoEConfig(**fields) == expected


def test_leaves_hold_the_bytes_of_the_file(case):
    file, _ = case
    params, _ = file.load(1)
    judge = {tensor.name: tensor for tensor in gguf.GGUFReader(file.path).tensors}
    seen = set()
    for leaf, entry in layer_1(file).entries.items():
        value = params
        for attribute in leaf.split("."):
            value = getattr(value, attribute)
        tensor = judge[entry.tensor.name]
        seen.add(entry.tensor.name)
        if isinstance(value, PackedExperts):
            assert value.format.name == tensor.tensor_type.name
            np.testing.assert_array_equal(np.ravel(value.data), np.ravel(tensor.data))
            value = value.data
        else:
            assert value.dtype in (
                (jnp.float32, jnp.float16, jnp.bfloat16) if entry.weight else ("float32",)
            )
            assert np.asarray(value).tobytes() == tensor.data.tobytes()
        if entry.weight:
            assert value.shape[:-1] == entry.shape[:-1]
    expected = {name for name in judge if name.startswith("blk.1.ffn") or "exp_probs_b" in name}
    assert seen == expected
    assert len(jax.tree.leaves(params)) == len(seen)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_result(case, implementation):
    file, _ = case
    params, config = file.load(1)
    x = np.random.default_rng(1).standard_normal((9, layer_1(file).d_model)).astype(np.float32)
    forward = jax.jit(lambda params, x: moe_block(params, x, config, implementation=implementation))
    y = forward(params, x)
    expected = reference.block(layer_1(file), x.astype(np.float64))
    assert np.linalg.norm(y - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            model("smallthinker", {"expert_gating_func": 1}),
            "softmax, top 2 of 4, normalized, reads router_input (layer_input)",
        ),
        (
            model("deepseek4", {"expert_gating_func": 4} | {"swiglu_clamp_exp": 1.0}, BIAS),
            None,
        ),
        (
            model(
                "deepseek2",
                DEEPSEEK | {"expert_group_count": 2, "expert_group_used_count": 1},
                BIAS,
                shared=True,
            ),
            "softmax, top 2 of 4, selection bias, groups 1/2, normalized, x2.5",
        ),
    ],
)
def test_a_router_in_words(made, words, tmp_path):
    layer = layer_1(GGUFFile(write_gguf(tmp_path / "model.gguf", *made)))
    assert layer.router == (words or "")
    assert (layer.problem is None) == (words is not None)


def test_load_gguf_is_load(tmp_path):
    path = write_qwen3moe(tmp_path / "model.gguf")
    params, config = load_gguf(path, 1)
    expected, expected_config = GGUFFile(path).load(1)
    assert config == expected_config
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_leading_dense_layers(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", *MODELS["deepseek2 as V3"][0])
    file = GGUFFile(path)
    assert [layer.index for layer in file.layers] == [1]
    with pytest.raises(GGUFError, match="layer 0 is not a MoE layer; its MoE layers are 1"):
        file.load(0)
    with pytest.raises(GGUFError, match="layer 2 is not a MoE layer"):
        file.load(2)


def test_dense_layers_for_prediction_are_not_moe_layers(tmp_path):
    architecture, keys, tensors = MODELS["glm4moe"][0]
    keys |= {"block_count": 3, "nextn_predict_layers": 1}
    path = write_gguf(tmp_path / "model.gguf", architecture, keys, tensors)
    assert [layer.index for layer in GGUFFile(path).layers] == [1]


def test_a_device_can_be_given(tmp_path):
    device = jax.devices()[-1]
    params, _ = GGUFFile(write_qwen3moe(tmp_path / "model.gguf")).load(0, device)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_a_sharding_is_for_the_routed_experts(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", *MODELS["qwen2moe"][0])
    mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
    params, _ = GGUFFile(path).load(1, NamedSharding(mesh, P("expert")))
    up = params.experts.up.data
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, *up.shape[1:])}
    replicated = [params.router, params.shared_gate, params.shared.up.data]
    assert all(leaf.sharding.is_fully_replicated for leaf in replicated)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize(
    ("name", "spec", "prepack", "shard"),
    [
        ("blk.1.ffn_up_exps.weight", P("e"), False, (2, 32, 68)),
        ("blk.1.ffn_up_exps.weight", P(None, "e"), True, (4, 16, 68)),
        ("output.weight", P(None, "e"), False, (1, 16, 68)),
        ("output.weight", P(None, "e"), True, (1, 16, 68)),
        ("blk.1.ffn_gate_inp.weight", P("e"), False, (2, 64)),
        ("blk.1.ffn_gate_inp.weight", P(None, "e"), False, (4, 32)),
    ],
)
def test_a_sharding_of_a_tensor_is_followed(tmp_path, name, spec, prepack, shard):
    own = {"output.weight": (Weights()(32, 64), "Q8_0"), "output_norm.weight": Weights()(64)}
    made = model("qwen3moe", {}, own, formats=("Q8_0",) * 3)
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", *made))
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("e",)), spec)
    tensor = file.load_tensor(name, sharding, prepack=prepack)
    data = tensor.data if isinstance(tensor, PackedExperts) else tensor
    assert {part.data.shape for part in data.addressable_shards} == {shard}
    whole = file.load_tensor(name, prepack=prepack)
    jax.tree.map(np.testing.assert_array_equal, tensor, whole)
    with pytest.raises(ValueError, match="rank"):
        file.load_tensor("output_norm.weight", NamedSharding(sharding.mesh, P(None, "e")))


@pytest.mark.parametrize("prepack", [False, True])
def test_a_load_under_a_trace(tmp_path, prepack):
    """Abstract arrays of `jax.eval_shape`, and constants of a jitted program."""
    file = GGUFFile(write_qwen3moe(tmp_path / "model.gguf"))
    params, config = file.load(0, prepack=prepack)
    abstract, same = jax.eval_shape(lambda: file.load(0, prepack=prepack))
    assert same == config
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    for leaf, expected in zip(jax.tree.leaves(abstract), jax.tree.leaves(params), strict=True):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    traced, _ = jax.jit(lambda: file.load(0, prepack=prepack))()
    jax.tree.map(np.testing.assert_array_equal, traced, params)


@pytest.mark.parametrize("index", ["0", 0.0, None, True])
def test_a_layer_is_an_int(tmp_path, index):
    file = GGUFFile(write_qwen3moe(tmp_path / "model.gguf"))
    with pytest.raises(TypeError, match=f"layer is an int, not {index!r}"):
        file.load(index)
    assert file.load(np.int64(0))[1] == file.load(0)[1]


def test_a_closed_file(tmp_path):
    """What was loaded stays, nothing more can be, and the memory map goes."""
    path = write_qwen3moe(tmp_path / "model.gguf", keys={"x:general.alignment": 64})
    with GGUFFile(path) as file:
        expected = load_gguf(path, 0)[0]
        params, _ = file.load(0)  # views of the file, on a CPU
        assert file.layers
    file.close()
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    for use in (
        lambda: file.load(0),
        lambda: file.load_tensor("token_embd.weight"),
        lambda: file.metadata,
        lambda: file.architecture,
    ):
        with pytest.raises(GGUFError, match="the file has been closed"):
            use()
    del params, expected, file
    gc.collect()
    with GGUFFile(path) as file:
        assert str(path) in Path("/proc/self/maps").read_text()
    assert str(path) not in Path("/proc/self/maps").read_text()


def tensors_of(params):
    """The packed weights of a block."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PackedExperts))
    return [leaf for leaf in leaves if isinstance(leaf, PackedExperts)]


@pytest.mark.skipif(unusable() is not None, reason=str(unusable()))
@pytest.mark.parametrize("devices", [1, 2])
def test_prepack(devices, tmp_path):
    made = model("deepseek", DEEPSEEK, shared=True)
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", *made))
    target = None
    if devices > 1:
        target = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("expert",)), P("expert"))
    params, config = file.load(1, target)
    tiled, same = file.load(1, target, prepack=True)
    assert config == same
    assert len(tensors_of(tiled)) == 6
    for weight, expected in zip(tensors_of(tiled), tensors_of(params), strict=True):
        assert weight.layout == "tiled"
        assert weight.data.sharding.is_equivalent_to(expected.data.sharding, 3)
        np.testing.assert_array_equal(weight.unpack().data, expected.data)
    name = "blk.1.ffn_up_exps.weight"
    assert file.load_tensor(name).layout is None
    assert file.load_tensor(name, prepack=True).layout == "tiled"
    assert file.load_tensor("blk.1.ffn_gate_inp.weight", prepack=True).shape == (4, 64)


def mapped_bytes(path):
    """How much of a file's memory maps is in memory."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("needs /proc")
    total, here = 0, False
    for line in smaps.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            here = bool(rest) and line.endswith(str(path))
        elif here and first == "Rss:":
            total += 1024 * int(rest[0])
    return total


def test_no_more_than_a_layer_is_held(tmp_path):
    """What went to the device is let go of; what is a view of the file on a CPU stays."""
    sizes = {"experts": 4, "d_model": 1024, "d_expert": 512}
    weights, keys = Weights(), model_keys(layers=4, **sizes)
    tensors = {"token_embd.weight": weights(16, 64)}
    for layer in range(4):
        tensors |= expert_tensors(weights, layer, **sizes)
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", "qwen3moe", keys, tensors))
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("expert",)), P("expert"))
    before, kept = mapped_bytes(file.path), []
    for layer in file.layers:
        kept.append(file.load(layer.index, sharding, prepack=True))
        after = mapped_bytes(file.path)
        assert after - before <= layer.nbytes
    np.testing.assert_array_equal(
        kept[2][0].experts.up.unpack().data, file.load(2)[0].experts.up.data
    )


def test_a_file_on_the_cpu_is_not_copied_where_it_need_not_be(tmp_path):
    """Weights that XLA can use in place, at 64 bytes, stay in the memory map."""
    if jax.default_backend() != "cpu":
        pytest.skip("the arrays are on another device")
    path = write_qwen3moe(tmp_path / "model.gguf", keys={"x:general.alignment": 64})
    file = GGUFFile(path)
    up = file.load(0)[0].experts.up.data
    assert up.unsafe_buffer_pointer() == file.layers[0].projections["up"].bytes().ctypes.data


DEEPSEEK4 = {"expert_gating_func": 4, "swiglu_clamp_exp": 10.0}
TABLE = {"blk.1.ffn_gate_tid2eid.weight": np.arange(18, dtype=np.int32).reshape(9, 2) % 4}
CHUNKS = {
    f"blk.1.ffn_{name}_chexps.weight": Weights()(2, *shape)
    for name, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32)))
}

ERRORS = {
    "gating": (
        model("deepseek2", {"expert_gating_func": 9}),
        r"key 'deepseek2\.expert_gating_func' is 9",
    ),
    "no gating": (
        model("dots1", {}, BIAS),
        r"key 'dots1\.expert_gating_func' is missing",
    ),
    "gating's type": (
        model("deepseek2", {"expert_gating_func": "sigmoid"}),
        r"key 'deepseek2\.expert_gating_func' holds text",
    ),
    "top_k": (
        model("qwen3moe", {"expert_used_count": 5}),
        r"key 'qwen3moe\.expert_used_count' is 5, not from 1 to the number of experts, 4",
    ),
    "top_k of 0": (model("qwen3moe", {"expert_used_count": 0}), "expert_used_count' is 0"),
    "top_k too short": (
        model("qwen3moe", {"expert_used_count": [2]}),
        r"'qwen3moe\.expert_used_count' is an array of 1, without a value for layer 1",
    ),
    "too many experts": (model("qwen3moe", {"expert_count": 1025}), "expert_count' is 1025"),
    "experts": (
        model("qwen3moe", {"expert_count": 8}),
        r"'blk\.1\.ffn_gate_inp\.weight' has shape \[4, 64\], expected \[8, 64\]",
    ),
    "d_model": (model("qwen3moe", {"embedding_length": 32}), r"'blk\.1\.ffn_gate_inp\.weight'"),
    "groups": (
        model("deepseek2", {"expert_group_count": 3, "expert_group_used_count": 1}),
        "expert_group_count' is 3, not a proper divisor",
    ),
    "groups used": (
        model("deepseek2", {"expert_group_count": 2, "expert_group_used_count": 2}),
        "expert_group_used_count' is 2",
    ),
    "groups too small": (
        model(
            "deepseek2",
            {"expert_group_count": 4, "expert_group_used_count": 2},
            experts=8,
            top_k=5,
        ),
        "expert_used_count' is 5",
    ),
    "scale": (
        model("deepseek2", {"expert_weights_scale": float("nan")}),
        "expert_weights_scale' is nan",
    ),
    "a shape among the projections": (
        model("qwen3moe", {}, {"blk.1.ffn_up_exps.weight": Weights()(4, 48, 64)}),
        r"'blk\.1\.ffn_up_exps\.weight' has shape \[4, 48, 64\], expected \[4, 32, 64\]",
    ),
    "rank": (
        model("qwen3moe", {}, {"blk.1.ffn_up_exps.weight": Weights()(32, 64)}),
        r"'blk\.1\.ffn_up_exps\.weight' has shape \[32, 64\]",
    ),
    "quantised router": (
        model("qwen3moe", {}, {"blk.1.ffn_gate_inp.weight": (Weights()(4, 64), "Q8_0")}),
        r"'blk\.1\.ffn_gate_inp\.weight' has type Q8_0",
    ),
    "no shared expert": (
        model("qwen2moe", {}, SHARED_GATE),
        r"tensor 'blk\.1\.ffn_down_shexp\.weight' is missing",
    ),
    "no shared expert, by count": (
        model("deepseek2", {"expert_shared_count": 1}),
        r"tensor 'blk\.1\.ffn_down_shexp\.weight' is missing",
    ),
    "no bias": (
        without(GPT_OSS, "ffn_up_exps.bias"),
        r"tensor 'blk\.1\.ffn_up_exps\.bias' is missing",
    ),
    "no selection bias": (
        model("minimax-m2", {"expert_gating_func": 2}),
        r"tensor 'blk\.1\.exp_probs_b\.bias' is missing",
    ),
    "a tensor too many": (
        model("qwen3moe", {}, BIAS),
        r"tensor 'blk\.1\.exp_probs_b\.bias' has no known meaning",
    ),
    "a gating that the architecture does not know": (
        model("deepseek4", DEEPSEEK4 | {"expert_gating_func": 2}, BIAS, shared=True),
        r"key 'deepseek4\.expert_gating_func' is 2 \(sigmoid\), and .* only sqrt_softplus",
    ),
    "groups where there are none": (
        model("llama4", {"expert_group_count": 2, "expert_group_used_count": 1}, shared=True),
        r"key 'llama4\.expert_group_count' is 2, and this architecture's experts have no groups",
    ),
    "no limit": (
        without_keys(model("deepseek4", DEEPSEEK4, BIAS, shared=True), "swiglu_clamp_exp"),
        r"key 'deepseek4\.swiglu_clamp_exp' is missing",
    ),
    "a limit for other layers": (
        model("deepseek4", DEEPSEEK4 | {"swiglu_clamp_exp": [1.0]}, BIAS, shared=True),
        r"'deepseek4\.swiglu_clamp_exp' is an array of 1, without a value for layer 1",
    ),
    "no table of experts": (
        model("deepseek4", DEEPSEEK4 | {"hash_layer_count": 2}, shared=True),
        r"tensor 'blk\.1\.ffn_gate_tid2eid\.weight' is missing",
    ),
    "a table of another type": (
        model(
            "deepseek4",
            DEEPSEEK4 | {"hash_layer_count": 2},
            vector("ffn_gate_tid2eid.weight", 9, 2),
            shared=True,
        ),
        r"'blk\.1\.ffn_gate_tid2eid\.weight' has type F32, which cannot be used",
    ),
    "a table of another width": (
        model("deepseek4", DEEPSEEK4 | {"hash_layer_count": 2}, TABLE, top_k=3, shared=True),
        r"'blk\.1\.ffn_gate_tid2eid\.weight' has shape \[9, 2\], expected \[any, 3\]",
    ),
    "a table where none is used": (
        model("deepseek4", DEEPSEEK4, BIAS, TABLE, shared=True),
        r"tensor 'blk\.1\.ffn_gate_tid2eid\.weight' has no known meaning",
    ),
    "no chunk experts": (
        model("grovemoe", {"experts_per_group": 2, "expert_group_scale": 0.05}),
        r"tensor 'blk\.1\.ffn_down_chexps\.weight' is missing",
    ),
    "experts a group": (
        model("grovemoe", {"experts_per_group": 3, "expert_group_scale": 0.05}),
        r"key 'grovemoe\.experts_per_group' is 3, not a divisor of the 4 experts",
    ),
    "no scale of chunk experts": (
        model("grovemoe", {"experts_per_group": 2}, CHUNKS),
        r"key 'grovemoe\.expert_group_scale' is missing",
    ),
    "no norm inside the block": (
        model("gemma4", {}, vector("ffn_gate_inp.scale", 64), vector("ffn_norm.weight", 64)),
        r"tensor 'blk\.1\.post_ffw_norm_2\.weight' is missing",
    ),
    "half of a dense network": (
        model("grok", {}, vector("ffn_up.weight", 32, 64)),
        r"tensor 'blk\.1\.ffn_down\.weight' is missing",
    ),
    "no latent projection": (
        model(
            "kimi-k3",
            {"expert_gating_func": 2, "expert_latent_length": 32},
            BIAS,
        ),
        r"tensor 'blk\.1\.ffn_routed_down\.weight' is missing",
    ),
    "no merged projections of the shared expert": (
        model(
            "granite_swa",
            {"expert_shared_feed_forward_length": 32},
            vector("ffn_down_shexp.weight", 64, 32),
        ),
        r"tensor 'blk\.1\.ffn_up_shexp\.weight' is missing",
    ),
    "a router without experts": (
        ("qwen3next", model_keys(), vector("ffn_gate_inp.weight", 4, 64)),
        r"tensor 'blk\.1\.ffn_down_exps\.weight' is missing",
    ),
    "an unknown architecture": (
        ("newmoe", *model("qwen3moe", {})[1:]),
        "architecture 'newmoe' is not known",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_is_wrong_is_named(error, tmp_path):
    made, message = ERRORS[error]
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", *made))
    assert layer_1(file).config is None
    with pytest.raises(GGUFError, match=message):
        file.load(1)


@pytest.mark.parametrize("expert", [-1, 4])
def test_a_table_names_existing_experts(expert, tmp_path):
    table = TABLE["blk.1.ffn_gate_tid2eid.weight"].copy()
    table[7, 1] = expert
    made = model(
        "deepseek4",
        DEEPSEEK4 | {"hash_layer_count": 2},
        {"blk.1.ffn_gate_tid2eid.weight": table},
        shared=True,
    )
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", *made))
    with pytest.raises(GGUFError, match=r"ffn_gate_tid2eid\.weight' holds numbers .* from 0 to 3"):
        file.load(1)


@pytest.mark.parametrize(
    ("key", "value"), [("block_count", 1 << 31), ("leading_dense_block_count", "two")]
)
def test_keys_that_say_which_layers_there_are(key, value, tmp_path):
    architecture, keys, tensors = MODELS["deepseek2 as V2"][0]
    path = write_gguf(tmp_path / "model.gguf", architecture, keys | {key: value}, tensors)
    with pytest.raises(GGUFError, match=key):
        _ = GGUFFile(path).layers


def test_rows_are_usable():
    """Every row names gatings and activations that exist."""
    from jax_moe._activations import ACTIVATIONS
    from jax_moe._gguf.schema import GATINGS, Key

    for name, row in ARCHITECTURES.items():
        assert row.activation in ACTIVATIONS, name
        gatings = [gating for _, gating in row.gating_by_size]
        gatings.append(row.gating if isinstance(row.gating, str) else row.gating.default)
        assert all(gating in GATINGS.values() or not isinstance(gating, str) for gating in gatings)
        assert isinstance(row.shared, Key) or row.shared in ("absent", "optional", "required")
