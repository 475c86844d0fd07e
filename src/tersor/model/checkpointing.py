"""Checkpointing: parts of a forward that are run again in backward, for the memory that it saves.

What runs again reads the tensors that the modules hold then, and no run of watch.py is there. So:
weights   the hidden net's own tensors show the values of the last forward, in the same memory: what is run
          again computes with them. Without reentry its gradients go to the first forward's graph, exact
reentry   (use_reentrant=True) would leave gradients at the net's own tensors, where nobody looks: refused
grids     need the run: a module that holds its checkpoint function, as Hugging Face's do, gets one that
          enters it again, and without reentry; others are refused (watch.py)
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
    """In the place of a module's own checkpoint function: the same without reentry, and what it runs again
    is in the run that it was first in. A class, so that it can be pickled."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        run: Any = active()
        resume = getattr(getattr(run, "simulated", None), "resume", None)
        more = {} if resume is None else {"context_fn": resume}
        return checkpoint(function, *args, **self.settings, **more, use_reentrant=False, **kwargs)


def rerun(net: nn.Module) -> nn.Module:
    """The same module, which must be a private copy, whose modules' own checkpoint functions are Reruns."""
    for module in net.modules():
        for name, value in list(vars(module).items()):
            given = value.keywords if isinstance(value, functools.partial) and not value.args else {}
            bare = value is checkpoint or (isinstance(value, functools.partial) and value.func is checkpoint)
            if bare and not {"context_fn", "debug"} & given.keys():
                settings = {key: setting for key, setting in given.items() if key != "use_reentrant"}
                vars(module)[name] = Rerun(settings)
    return net


def show(own: Tensor, value: Tensor) -> None:
    """Let a tensor of a hidden net hold this value, in its memory and on its device. Nothing is run again on
    the meta device, whose tensors no others can become."""
    if value.is_meta and not own.is_meta:
        return
    own.data = value.detach()
    if isinstance(own, nn.Parameter) and own.is_floating_point():
        own.requires_grad_(value.requires_grad)
        if own.requires_grad and not own._post_accumulate_grad_hooks:
            own.register_post_accumulate_grad_hook(lost)


def lost(own: Tensor) -> None:
    """A gradient came to a hidden net's own tensor: what ran again in backward was no part of the graph."""
    own.grad = None
    raise RefusedError(
        f"gradient checkpointing with use_reentrant=True gives the gradient of a weight {list(own.shape)} to "
        f"a copy of it, and it would be lost. Give torch.utils.checkpoint use_reentrant=False"
    )


def refuse_reentry() -> None:
    """Refuse a grid in a part that runs without gradients now, and with them, but without the grid, in
    backward."""
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
    """Inside torch.func's grad, vmap and the like."""
    return torch._C._functorch.peek_interpreter_stack() is not None
