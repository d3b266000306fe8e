"""Metadata values of a model's architecture, with their types checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jax_moe._gguf.schema import REQUIRED, Key
from jax_moe._gguf.split import Model


def architecture_name(model: Model) -> str:
    """The key `general.architecture`."""
    if "general.architecture" not in model.metadata:
        raise model.error("key 'general.architecture' is missing")
    name = model.metadata["general.architecture"]
    if not isinstance(name, str):
        raise model.error("key 'general.architecture' is not a string")
    return name


class Keys:
    """Evaluates the rules of an architecture's row: a constant, or a Key of the file.

    Args:
      model: whose metadata is read.
      layer: whose value is meant where a key holds an array; None if no layer is.
    """

    def __init__(self, model: Model, layer: int | None = None):
        self.model = model
        self.layer = layer
        self._prefix = architecture_name(model)

    def name(self, rule: Any) -> str:
        """A Key's name in the file, as in a message; a constant by itself."""
        return f"key '{self._prefix}.{rule.name}'" if isinstance(rule, Key) else repr(rule)

    def value(self, rule: Any) -> Any:
        if not isinstance(rule, Key):
            return rule
        key = f"{self._prefix}.{rule.name}"
        if key not in self.model.metadata:
            if rule.default is REQUIRED:
                raise self.model.error(f"key {key!r} is missing")
            return self.value(rule.default)
        value = self.model.metadata[key]
        if isinstance(value, list | str):
            raise self.model.error(f"key {key!r} holds text, not a number")
        if not isinstance(value, np.ndarray):
            return value
        if self.layer is None or self.layer >= len(value):
            wanted = "the whole model" if self.layer is None else f"layer {self.layer}"
            raise self.model.error(
                f"key {key!r} is an array of {len(value)}, without a value for {wanted}"
            )
        return value[self.layer].item()

    def integer(self, rule: Any) -> int:
        value = self.value(rule)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.model.error(f"{self.name(rule)} is {value!r}, not a count")
        return value

    def number(self, rule: Any) -> float:
        value = self.value(rule)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise self.model.error(f"{self.name(rule)} is {value!r}, not a finite number")
        return float(value)

    def flag(self, rule: Any) -> bool:
        value = self.value(rule)
        if value not in (0, 1):
            raise self.model.error(f"{self.name(rule)} is {value!r}, not a boolean")
        return bool(value)
