"""Wrapped: the model inside the wrappers of torch.compile and data parallelism, or of an exported program.

Wrappers rename every tensor ("_orig_mod.fc.weight"); sites have the names of the model inside.
"""

from __future__ import annotations

from typing import Any

from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tersor.errors import RefusedError
from tersor.model.program_builder import is_program, program_of


def inside(module: Any) -> Any:
    """The module without its wrappers, and a Program for what torch.export made (program.py). RefusedError
    for a TorchScript module."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", ()):  # torch.compile's: its class is slow to import
            module = module._orig_mod
        else:
            break
    if isinstance(module, ScriptModule):
        raise RefusedError(
            f"the model is a TorchScript {type(module).__name__}, which can be neither copied nor "
            f"traced; give the nn.Module that it was made from"
        )
    return program_of(module) if is_program(module) else module
