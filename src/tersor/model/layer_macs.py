"""Layer MACs: multiply-accumulates of each module in a forward of the first batch, by torch's counter.

Also how many positions convolutions read for each that they give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.model.output_comparison import once
from tersor.model.product import CONVOLUTIONS
from tersor.model.task import Task


class Reads(NamedTuple):
    """Positions of a batch that a convolution's inputs have, and outputs with the inputs' last axis, for each
    position of its outputs. Both are 1 where stride 1 and padding keep the size."""

    inputs: float = 1.0
    rows: float = 1.0


class Work(NamedTuple):
    macs: int  # of all calls of a module, and of the modules in it
    reads: Reads = Reads()


@torch.no_grad()
def layer_macs(model: nn.Module, task: Task) -> dict[str, Work]:
    """{path of a module: its work}. Modules without any are left out. `model` is a private copy."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    sizes = dict[str, list[tuple[int, int, int]]]()
    for path, module in model.named_modules():
        if type(module) in CONVOLUTIONS:
            module.register_forward_hook(watch(sizes.setdefault(path, [])))
    counter = FlopCounterMode(display=False)
    # The inputs of a part are made by the whole model: that is not counted.
    once(task, model.eval(), task.shown, counter)
    root = type(model).__name__
    macs: dict[str, int] = {
        path.removeprefix(root).removeprefix("."): sum(counts.values()) // 2
        for path, counts in counter.get_flop_counts().items()
        if path != "Global" and any(counts.values())
    }
    return {path: Work(count, reads(sizes.get(path, ()))) for path, count in macs.items()}


def watch(sizes: list[tuple[int, int, int]]) -> Callable[..., None]:
    """A hook that notes the positions of each call: of its inputs, of outputs with the inputs' last axis, of
    its outputs."""

    def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            return
        axes = len(layer.kernel_size)
        before, after = inputs[0].shape[-axes:], output.shape[-axes:]
        batch = math.prod(inputs[0].shape[: -axes - 1])
        rows = math.prod((*after[:-1], before[-1]))
        sizes.append((batch * math.prod(before), batch * rows, batch * math.prod(after)))

    return hook


def reads(sizes: Sequence[tuple[int, int, int]]) -> Reads:
    inputs, rows, outputs = map(sum, zip(*sizes, strict=True)) if sizes else (1, 1, 1)
    return Reads(inputs / outputs, rows / outputs) if outputs else Reads()
