"""Wrapped: the model inside what torch.compile and data parallelism put around it.

Their wrappers rename every tensor ("_orig_mod.fc.weight"); what is stored has the names of the model inside.
"""

from __future__ import annotations

from typing import Any

from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tersor.errors import RefusedError


def inside(module: Any) -> Any:
    """The module itself where nothing is around it. RefusedError for one of TorchScript."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", ()):  # torch.compile's: its class is slow to import
            module = module._orig_mod
        else:
            break
    if isinstance(module, ScriptModule):
        raise RefusedError(
            f"the model is a {type(module).__name__} of TorchScript, whose code can be neither copied nor "
            f"traced; give the nn.Module that it was made of"
        )
    return module
