"""Checkpointing: gradient checkpointing, which runs parts of a forward again in backward to save memory.

The second run reads the tensors that the modules hold at that time, outside any run of watch.py. Therefore:
weights   the private net's own tensors share memory with the values of the last forward, so the second run
          computes with them; without reentry the gradients go to the first forward's graph and are exact
reentry   use_reentrant=True is refused: its gradients would end at the net's own tensors and be lost
grids     need the run of watch.py: a module that stores its checkpoint function, as those of Hugging Face do,
          gets one that enters the run again, without reentry; other modules are refused (watch.py)
Chen 2016 (training with sublinear memory).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from tersor.errors import RefusedError
from tersor.model.watch import active


class Rerun:
    """Replaces a module's own checkpoint function: no reentry, and the second forward enters the same run of
    watch.py as the first. A class, so that it can be pickled."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        run: Any = active()
        resume = getattr(getattr(run, "simulated", None), "resume", None)
        more = {} if resume is None else {"context_fn": resume}
        return checkpoint(function, *args, **self.settings, **more, use_reentrant=False, **kwargs)


def rerun(net: nn.Module) -> nn.Module:
    """Replace the checkpoint functions that modules of `net` store by Reruns, and return `net`, which must be
    a private copy."""
    for module in net.modules():
        for name, value in list(vars(module).items()):
            given = value.keywords if isinstance(value, functools.partial) and not value.args else {}
            bare = value is checkpoint or (isinstance(value, functools.partial) and value.func is checkpoint)
            if bare and not {"context_fn", "debug"} & given.keys():
                settings = {key: setting for key, setting in given.items() if key != "use_reentrant"}
                vars(module)[name] = Rerun(settings)
    return net


def show(own: Tensor, value: Tensor) -> None:
    """Make a tensor of the private net share this value's memory and device. Meta tensors are left out: a
    tensor cannot become one, and nothing is computed again on the meta device."""
    if value.is_meta and not own.is_meta:
        return
    own.data = value.detach()
    if isinstance(own, nn.Parameter) and own.is_floating_point():
        own.requires_grad_(value.requires_grad)
        if own.requires_grad and not own._post_accumulate_grad_hooks:
            own.register_post_accumulate_grad_hook(refuse_lost_gradient)


def refuse_lost_gradient(own: Tensor) -> None:
    """Refuse a gradient that arrives at the private net's own tensor: the part that ran again in backward was
    outside the graph."""
    own.grad = None
    raise RefusedError(
        f"gradient checkpointing with use_reentrant=True sends the gradient of a weight {list(own.shape)} to "
        f"a copy, where it would be lost. Call torch.utils.checkpoint with use_reentrant=False"
    )


def refuse_reentry() -> None:
    """Refuse a grid inside a reentrant checkpoint: its first forward runs without gradients, and its second
    forward, in backward, runs without the grid."""
    if torch.is_grad_enabled() or not getattr(active(), "learns", False):
        return
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise RefusedError(
                "gradient checkpointing with use_reentrant=True runs a part again without the grids on its "
                "edges. Train without checkpointing"
            )
        frame = frame.f_back


def transformed() -> bool:
    """Whether the caller runs inside torch.func.grad, vmap or another transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None
