"""Layer MACs: multiply-accumulates of each module in a forward of the first batch, by torch's counter."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tersor.model.output_comparison import once
from tersor.model.task import Task


@torch.no_grad()
def layer_macs(model: nn.Module, task: Task) -> dict[str, int]:
    """{path of a module: its multiply-accumulates}, those of all its calls and of the modules in it. Modules
    without any are left out. `model` is a private copy."""
    with FlopCounterMode(display=False) as counter:
        once(task, model.eval(), task.shown)
    root = type(model).__name__
    return {
        path.removeprefix(root).removeprefix("."): sum(counts.values()) // 2
        for path, counts in counter.get_flop_counts().items()
        if path != "Global" and sum(counts.values())
    }
