"""Weights table: the tensors of a checkpoint, and what `tersor pack` would do with it.

tensor       shape       dtype    bytes   steps would
fc.weight    300 x 784   float32  940,800 change it
fc.scale     300         float32    1,200 leave it: scale
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.errors import few
from tersor.report.console import whole
from tersor.report.file_sizes import SHOWN, left_out
from tersor.report.show import shape
from tersor.report.table import grid

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]


def tables(facts: Facts) -> Iterator[RenderableType]:
    """The facts of described.weights() for a terminal."""
    file, every = facts["file"], facts["sum"]
    yield f"{file['name']}: {whole(file['nbytes'])} bytes, {whole(every['tensors'])} tensors"
    several = len({found["file"] for found in facts["tensors"].values()}) > 1
    table = grid("tensor", "shape", "dtype", ">bytes", "steps would", *(["file"] if several else []))
    for name, found in facts["tensors"].items():
        last = [found["file"]] if several else []
        table.add_row(
            name, shape(found["shape"]), found["dtype"], whole(found["nbytes"]), found["steps"], *last
        )
    table.add_section()
    table.add_row("all of these", "", "", whole(every["nbytes"]), "", *([""] if several else []))
    yield table
    for name, metadata in facts["metadata"].items():
        words = (f"{key}={value[:60]}" for key, value in sorted(metadata.items()))
        yield f"metadata of {name}: {few(words, SHOWN)}"
    if facts["aliases"]:
        yield f"the same tensor: {few((f'{a} = {b}' for a, b in facts['aliases'].items()), SHOWN)}"
    if facts["key"]:
        yield f"of the checkpoint: {facts['key']}"
    if facts["attached"]:
        total = whole(sum(facts["attached"].values()))
        yield f"pack attaches: {few(facts['attached'], SHOWN)} ({total} bytes)"
    yield from left_out(facts["ignored"], facts["reasons"])
    yield "these are weights as they were saved; to compress them: tersor pack WEIGHTS -o FILE.tersor"
