"""ggml's CPU graph of a MoE feed-forward network, for comparison: jax_moe itself never runs it."""

import ctypes
import functools

import numpy as np

from jax_moe import _libggml

_I32 = 26  # GGML_TYPE_I32
_THREADPOOL_PARAMS_BYTES = 1024  # struct ggml_threadpool_params has 512 of CPU mask and 20 more


class _Plan(ctypes.Structure):
    """struct ggml_cplan."""

    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    ]


@functools.cache
def _libraries() -> _libggml.Libraries:
    """ggml's libraries with the signatures that a graph needs."""
    base, cpu = _libggml.load()
    pointer, int64, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int
    signatures = {
        "ggml_new_tensor_2d": (pointer, pointer, number, int64, int64),
        "ggml_new_tensor_3d": (pointer, pointer, number, int64, int64, int64),
        "ggml_backend_cpu_buffer_from_ptr": (pointer, pointer, size),
        "ggml_backend_buffer_free": (None, pointer),
        "ggml_backend_tensor_alloc": (number, pointer, pointer, pointer),
        "ggml_mul_mat_id": (pointer, pointer, pointer, pointer, pointer),
        "ggml_swiglu_split": (pointer, pointer, pointer, pointer),
        "ggml_new_graph": (pointer, pointer),
        "ggml_build_forward_expand": (None, pointer, pointer),
        "ggml_get_data": (pointer, pointer),
        "ggml_threadpool_params_init": (None, pointer, number),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_graph_plan.restype = _Plan
    cpu.ggml_graph_plan.argtypes = [pointer, number, pointer]
    cpu.ggml_graph_compute.argtypes = [pointer, ctypes.POINTER(_Plan)]
    cpu.ggml_threadpool_new.restype = pointer
    cpu.ggml_threadpool_new.argtypes = [pointer]
    for name in ("ggml_threadpool_pause", "ggml_threadpool_resume"):
        getattr(cpu, name).restype = None
        getattr(cpu, name).argtypes = [pointer]
    cpu.ggml_threadpool_free.restype = None
    cpu.ggml_threadpool_free.argtypes = [pointer]
    cpu.ggml_cpu_init()
    return _libggml.Libraries(base, cpu)


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An uninitialised array at an address that ggml and XLA take without a copy."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


class GgmlFfn:
    """mul_mat_id(gate), mul_mat_id(up), swiglu, mul_mat_id(down) on ggml's CPU backend.

    Attributes:
      expert_ids: int32 [T, k]; write to it before `run`.
      x: float32 [T, H]; write to it before `run`.
      result: float32 [T, k, H], a row for every slot, before the routing weights.
    """

    def __init__(
        self,
        ggml_type: int,
        gate: np.ndarray,
        up: np.ndarray,
        down: np.ndarray,
        d_expert: int,
        tokens: int,
        top_k: int,
        threads: int,
    ) -> None:
        """Builds the graph.

        Args:
          ggml_type: of the three weights.
          gate, up, down: packed uint8 [E, N, row_bytes], 64-byte aligned; used where they lie.
          d_expert: F.
          tokens, top_k: T and k.
          threads: how many threads a run uses.
        """
        base, cpu = _libraries()
        num_experts, d_model = down.shape[:2]
        self.x = aligned((tokens, d_model), np.float32)
        self.expert_ids = aligned((tokens, top_k), np.int32)
        self._weights = (gate, up, down)  # keeps them alive
        self._buffers: list[int] = []
        init = base.ggml_init
        self._inputs = init(_libggml._InitParams(1 << 20, None, True))
        results = tokens * top_k * (3 * d_expert + d_model) * 4
        self._context = init(_libggml._InitParams(results + (8 << 20), None, False))

        def tensor(data: np.ndarray, kind: int, *extents: int) -> int:
            new = base.ggml_new_tensor_2d if len(extents) == 2 else base.ggml_new_tensor_3d
            made = new(self._inputs, kind, *extents)
            buffer = base.ggml_backend_cpu_buffer_from_ptr(data.ctypes.data, data.nbytes)
            base.ggml_backend_tensor_alloc(buffer, made, data.ctypes.data)
            self._buffers.append(buffer)
            return made

        ids = tensor(self.expert_ids, _I32, top_k, tokens)
        x = tensor(self.x, 0, d_model, 1, tokens)
        multiply = functools.partial(base.ggml_mul_mat_id, self._context)
        g = multiply(tensor(gate, ggml_type, d_model, d_expert, num_experts), x, ids)
        u = multiply(tensor(up, ggml_type, d_model, d_expert, num_experts), x, ids)
        h = base.ggml_swiglu_split(self._context, g, u)
        y = multiply(tensor(down, ggml_type, d_expert, d_model, num_experts), h, ids)
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand(self._graph, y)
        data = ctypes.cast(base.ggml_get_data(y), ctypes.POINTER(ctypes.c_float))
        self.result = np.ctypeslib.as_array(data, (tokens, top_k, d_model))

        params = ctypes.create_string_buffer(_THREADPOOL_PARAMS_BYTES)
        base.ggml_threadpool_params_init(params, threads)
        self._pool = cpu.ggml_threadpool_new(params)
        self._plan = cpu.ggml_graph_plan(self._graph, threads, self._pool)
        self._work = aligned((self._plan.work_size + 64,), np.uint8)
        self._plan.work_data = self._work.ctypes.data

    def run(self) -> None:
        """Computes `result` from `x` and `expert_ids`."""
        status = _libraries().cpu.ggml_graph_compute(self._graph, ctypes.byref(self._plan))
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute returned {status}")

    def pause(self) -> None:
        """Puts ggml's threads to sleep: between runs they poll, and would take others' time."""
        _libraries().cpu.ggml_threadpool_pause(self._pool)

    def resume(self) -> None:
        """Wakes ggml's threads, so that the next run finds them polling."""
        _libraries().cpu.ggml_threadpool_resume(self._pool)

    def close(self) -> None:
        """Frees what ggml holds; `result` is gone."""
        base, cpu = _libraries()
        cpu.ggml_threadpool_free(self._pool)
        for buffer in self._buffers:
            base.ggml_backend_buffer_free(buffer)
        base.ggml_free(self._context)
        base.ggml_free(self._inputs)
