"""select_kernel and the FFI layer's promises about versions."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import oracle
import pytest

import jax_moe
from jax_moe import Experts, MoEVariant, Routing, _ffi


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


def tiled_ffn(tokens: int, dtype=jnp.float16):
    weight = oracle.packed("Q4_K", 4, 256, 256)[0].prepack()
    ids = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    return (
        jax.ShapeDtypeStruct((tokens, 256), dtype),
        Routing(ids, jax.ShapeDtypeStruct((tokens, 2), jnp.float32)),
        Experts(gate=weight, up=weight, down=weight),
    )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="asks about a Hopper GPU")
@pytest.mark.parametrize(
    ("tokens", "kernel", "tile"),
    [
        (1, "cuda_tiled_mma", (16, 8)),
        (12, "cuda_tiled_mma", (16, 8)),
        (20, "cuda_tiled_wgmma", (128, 32)),
        (80, "cuda_tiled_wgmma", (128, 64)),
        (500, "cuda_tiled_wgmma", (256, 128)),
    ],
)
def test_tiled_weights_on_cuda(tokens, kernel, tile):
    info = jax_moe.select_kernel("moe_ffn", *tiled_ffn(tokens), platform="cuda")
    assert (info.kernel, info.tile, info.architecture) == (kernel, tile, "sm_90a")
    assert info.error_bound == 1e-3 and info.deterministic


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
