"""Block calls: what a block reads, in the float network and in the rounded one, and what it should give.

    chunk    up to ROWS samples: (arguments in the rounded network, arguments in the float one, float output)
Held in memory: HELD bytes at most, for one block at a time; of more batches the first are taken.
A block counts only if it computes the same again when it runs alone, which is tried in the float network.
Cost: both models run over the calibration batches up to the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tersor.model.batches import MISFIT, device_of, evaluating, move, steady
from tersor.model.blocks import Block
from tersor.model.layer_moments import Passed
from tersor.model.logits import is_encoder_decoder, unpadded
from tersor.model.outputs import tensors_of
from tersor.model.part import Call, cloned, nbytes
from tersor.model.task import Task

HELD = 512 << 20  # bytes of inputs and outputs of a block
ROWS = 32  # samples of a chunk
APART = 1e-3  # of the largest output: float rounding of other batch sizes
PLAIN = (Tensor, bool, int, float, str, type(None))  # what arguments may be made of


class Chunk(NamedTuple):
    """One call of a block."""

    rounded: Call
    floats: Call
    target: Tensor
    counts: Tensor | None  # which tokens are not padding, bool [B, T]; None if all count


class BlockCalls(NamedTuple):
    chunks: list[Chunk]
    left_out: int  # calibration batches for which there was no room


def block_calls(block: Block, before: nn.Module, after: nn.Module, nets: Any, task: Task) -> BlockCalls | str:
    """The calls of a block, or why it cannot run alone. `before`, `after`: the float and the rounded model as
    they are called, private copies; `nets` the two modules that have the block."""
    chunks: list[Chunk] = []
    room, left_out = HELD, 0
    alone = block.of(nets[0])
    with evaluating(before), evaluating(after), steady(task.calibrate):
        for batch in task.batches("calibrate"):
            if room <= 0:
                left_out += 1
                continue
            here = move(batch, device_of(nets[0]))
            floats, output = call_of(block, before, nets[0], task, here)
            rounded, _ = call_of(block, after, nets[1], task, here, output=False)
            if floats is None or rounded is None:
                return "a calibration batch does not reach it"
            found = [x for x in tensors_of(output) if x.is_floating_point()]
            if len(found) != 1:
                return f"it gives {len(found)} tensors"
            odd = [x for x in tree_leaves((floats, rounded)) if not isinstance(x, PLAIN)]
            if odd:
                return f"it reads a {type(odd[0]).__name__}"
            if shapes(floats) != shapes(rounded):
                return "the rounded model calls it in another way"
            counts = counted(found[0], here)
            whole = Chunk(rounded, floats, found[0], counts)
            parts = [*split(whole)]
            if not all(same(alone, each) for each in parts):
                parts = [whole]
                if not same(alone, whole):
                    return "it does not give the same when it runs alone"
            chunks += parts
            room -= nbytes(whole[:3])
    return BlockCalls(chunks, left_out)


def call_of(
    block: Block, model: nn.Module, net: nn.Module, task: Task, batch: Any, *, output: bool = True
) -> tuple[Call | None, Any]:
    """(the arguments of the block, its output) for a batch. The model runs no further than needed."""
    found: list[Any] = []

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        if not found:
            found.append(tree_map(cloned, (args, kwargs)))
            if not output:
                raise Passed

    def leave(_: Any, args: Any, out: Any) -> None:
        found.append(tree_map(cloned, out))
        raise Passed

    first, last = (net.get_submodule(block.modules[at]) for at in (0, -1))
    handles = [first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)]
    if output:
        handles.append(last.register_forward_hook(leave))
    try:
        with suppress(Passed):
            task.answer(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return (found[0] if found else None), found[-1] if len(found) > 1 else None


def shapes(call: Call) -> list[Any]:
    return [tuple(x.shape) if isinstance(x, Tensor) else x for x in tree_leaves(call)]


def counted(output: Tensor, batch: Any) -> Tensor | None:
    """Which tokens of an output [B, T, C] are not padding; None if all count."""
    if output.ndim != 3 or is_encoder_decoder(None, batch):
        return None
    return unpadded(batch, tuple(output.shape[:2]), output.device, decoder=False)


def split(whole: Chunk) -> Iterator[Chunk]:
    """The chunk in parts of ROWS samples at most, about equally many each."""
    samples = whole.target.shape[0] if whole.target.ndim else 1
    count = -(-samples // ROWS)
    if count < 2:
        yield whole
        return
    leaves, spec = tree_flatten(tuple(whole))
    for at in range(count):
        rows = slice(at * samples // count, (at + 1) * samples // count)
        some = [x[rows] if isinstance(x, Tensor) and x.ndim and len(x) == samples else x for x in leaves]
        yield Chunk(*tree_unflatten(some, spec))


def same(alone: nn.Module, chunk: Chunk) -> bool:
    """Whether the float block gives its output again when it runs alone. No gradients."""
    try:
        found = answer(alone, chunk.floats)
    except MISFIT:
        return False
    if found.shape != chunk.target.shape:
        return False
    gap = (found.float() - chunk.target.float()).abs()
    return not gap.numel() or bool(gap.max() <= APART * chunk.target.float().abs().max() + 1e-30)


def answer(alone: Callable[..., Any], call: Call) -> Tensor:
    """A block's output. The block may write to what it reads, so it gets a copy."""
    args, kwargs = tree_map(cloned, call)
    return next(x for x in tensors_of(alone(*args, **kwargs)) if x.is_floating_point())


def mixed(chunk: Chunk, drop: float, generator: torch.Generator) -> Call:
    """The arguments in the rounded network, each number with probability `drop` that in the float one."""

    def draw(x: Any, y: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.where(torch.rand(x.shape, generator=generator).to(x.device) < drop, y, x)

    return tree_map(draw, chunk.rounded, chunk.floats)
