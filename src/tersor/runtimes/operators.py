"""Operators: what a runtime executes for a file, whether in integers, and for how long.

A runtime fuses, splits and renames the file's operators. Each one that it runs gets the name that the file
has for it, where one can be told. Times are medians over some runs under the runtime's own profiler, which
adds a microsecond or so to each: good for shares, not for totals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

RUNS = 5  # profiled, after one that is not counted

QUANTIZES = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
SUFFIX = re.compile(r"[_/.][^_/.]*$")
BACK = 4  # operators before it that one may have been fused with


@dataclass(frozen=True)
class Operator:
    """One operator as the runtime executes it."""

    name: str  # that the file has for it, or the runtime's own
    op: str  # the runtime's word for what it is: "QLinearConv", "Convolution"
    integer: bool  # computed in integers
    ms: float  # a run
    converts: bool = False  # computes nothing: changes type or layout, or reads a shape


def left_integers(operators: Iterable[Operator]) -> list[Operator]:
    """The operators that compute in float, the slowest first."""
    found = [item for item in operators if not item.integer and not item.converts]
    return sorted(found, key=lambda item: -item.ms)


class Names:
    """The names that a file has for its operators: of the node, or where it has none, of its first output."""

    def __init__(self, path: Path):
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
        self.op: dict[str, str] = {}
        self.before: dict[str, list[str]] = {}  # the operators whose outputs one reads
        self.made: dict[str, str] = {}  # output -> operator
        for node in graph.node:
            name = node.name or (node.output[0] if node.output else "")
            self.op[name] = node.op_type
            self.before[name] = [self.made[item] for item in node.input if item in self.made]
            self.made.update({item: name for item in node.output if item})

    def find(self, theirs: str, op: str) -> str | None:
        """The file's name for an operator that the runtime calls `theirs`. Runtimes name a fused operator
        after one part of it and add suffixes: conv1_token_3, relu_nchwc, conv1/WithoutBiases. `op` is what it
        mostly is: of the fused parts, the one that is called alike is taken."""
        while theirs not in self.op and theirs not in self.made:
            shorter = SUFFIX.sub("", theirs)
            if shorter in ("", theirs):
                return None
            theirs = shorter
        name = first = theirs if theirs in self.op else self.made[theirs]
        for _ in range(BACK):
            if alike(self.op[name], op) or not self.before[name]:
                break
            name = self.before[name][0]
        return name if alike(self.op[name], op) else first


def alike(ours: str, theirs: str) -> bool:
    """Whether the file's operator is the main part of the runtime's: Conv of QLinearConv or Convolution."""
    return ours.lower() in theirs.lower()


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each operator's times over the runs, in the order of the first one."""
    keys = dict.fromkeys(key for run in runs for key in run)
    return {key: median(run.get(key, 0.0) for run in runs) for key in keys}
