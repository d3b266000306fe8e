"""Reading MoE layers from GGUF files.

From the bottom: `cursor`, `metadata` and `header` read one file's header, bounded by its size;
`split` joins the parts of a model. `architectures` says as data, in the words of `schema`, what
each architecture means; `keys`, `rules` and `entries` apply it to a layer's metadata and tensors,
`layers` to all layers.
`progress` reads weights from disk, and `file` is the public GGUFFile.
"""

from jax_moe._gguf.file import GGUFFile, load_gguf
from jax_moe._gguf.header import GGUFError
from jax_moe._gguf.layers import GGUFLayer

__all__ = ["GGUFError", "GGUFFile", "GGUFLayer", "load_gguf"]
