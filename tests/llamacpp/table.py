"""The table of errors against llama.cpp in docs/architectures.md."""

import re
from collections.abc import Mapping
from pathlib import Path

from architecture_models import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_PLACE = re.compile(r"(<!-- compared with llama.cpp -->\n).*?(<!-- end -->)", re.DOTALL)


def write_table(errors: Mapping[tuple[str, str], float]) -> None:
    """Writes relative errors, by (name of a model or "", format), to the page.

    Those of an architecture's models in one format are on one line: the largest.
    """
    architectures: dict[str, dict[str, float]] = {}
    formats: dict[str, float] = {}
    for (name, form), error in errors.items():
        if name:
            row = architectures.setdefault(MODELS[name].architecture, {})
            row[form] = max(error, row.get(form, 0.0))
        else:
            formats[form] = error
    text = _markdown(
        ["architecture", "models", "error, F32", "error, Q8_0"],
        [
            [f"`{name}`", str(_models(name, errors)), _number(row["F32"]), _number(row["Q8_0"])]
            for name, row in architectures.items()
        ],
    )
    text += "\n" + _markdown(
        ["format of `qwen3moe`'s experts", "error"],
        [[f"`{form}`", _number(error)] for form, error in formats.items()],
    )
    page = PAGE.read_text()
    PAGE.write_text(_PLACE.sub(lambda match: match[1] + text + match[2], page))


def _models(architecture: str, errors: Mapping[tuple[str, str], float]) -> int:
    return len({name for name, _ in errors if name and MODELS[name].architecture == architecture})


def _number(error: float) -> str:
    return f"{error:.1e}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
