"""A model's tensors and metadata, from one GGUF file or from all parts of a split one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jax_moe._gguf.header import GGUFError, Header, TensorInfo
from jax_moe._gguf.metadata import Metadata

_PART = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class Model:
    """The union of the parts' tensor tables, with the first part's metadata.

    Args:
      path: a GGUF file; of a split model any part, "PREFIX-00002-of-00003.gguf".

    Raises:
      GGUFError: if a part is missing, damaged or of another model.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.parts = _open_parts(self.path)
        self.metadata: Metadata = self.parts[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for part in self.parts:
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise part.error(f"tensor {name!r} is in another part of the model too")
                self.tensors[name] = tensor
        expected = _integer(self.parts[0], "split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise self.error(
                f"key 'split.tensors.count' is {expected}, "
                f"but the parts hold {len(self.tensors)} tensors"
            )

    def error(self, message: str) -> GGUFError:
        return GGUFError.at(self.path, message)


def _integer(part: Header, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise part.error(f"key {key!r} is not an integer")
    return value


def _open_parts(path: Path) -> list[Header]:
    opened = Header(path)
    count = _integer(opened, "split.count", 1)
    if count <= 1:
        return [opened]
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise opened.error(
            f"one of {count} parts of a model, but its name does not end in "
            f"-NNNNN-of-{count:05}.gguf, so the other parts cannot be found"
        )
    parts = []
    for i in range(count):
        sibling = path.with_name(f"{match['prefix']}-{i + 1:05}-of-{count:05}.gguf")
        if not sibling.exists():
            raise GGUFError(f"{sibling}: part {i + 1} of {count} of the model is missing")
        part = opened if sibling == path else Header(sibling)
        if _integer(part, "split.count", 1) != count or _integer(part, "split.no", -1) != i:
            raise part.error(
                f"keys 'split.no' and 'split.count' do not say part {i + 1} of {count}"
            )
        parts.append(part)
    return parts
