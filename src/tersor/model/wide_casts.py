"""Wide casts: while a model is compared in float64, its own code may not cast to fewer bits.

Norms and rotary positions of language models compute in float32 by name: `x.to(torch.float32)`. In a float64
copy of the model that leaves rounding of float32 in the outputs, which then differ from those of a reference
by more than a comparison in float64 allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

NARROW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class WideCasts(TorchFunctionMode):
    """Casts to 32 and 16 bits, and constants of the code, become float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {key: widened(value) for key, value in (kwargs or {}).items()}
        if func in CASTS:
            return Tensor.double(args[0])
        found = func(*map(widened, args), **given)
        made = isinstance(found, Tensor) and found.dtype in NARROW
        if made and not any(isinstance(item, Tensor) for item in tree_leaves((args, given))):
            return found.double()
        return found


def widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
