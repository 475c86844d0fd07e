"""Sound: what must hold of a compressed network in its own tensors, whatever the network is.

A fault is a sentence. They are looked for in the parameters and buffers of a model that was loaded from the
file, and against the tensors of the model as it was given:
    zeros       where a step pruned: the smallest weights as given, and no fewer than it was told
    grids       where a step quantized: each row is whole multiples, up to the highest code, of one step
    untouched   what no step edited has its bits as given; what is frozen was not trained
    accounted   each weight has an edit or a note in each step, or a reason is missing
    answers     loaded and compressed model agree to the bit, are finite, and say something
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.core.state import State
from tersor.model.batches import evaluating
from tersor.model.task import Task

Tensors = Mapping[str, Tensor]
TURNED = ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")  # outputs on the second axis


class Asked(NamedTuple):
    """What the steps were told."""

    keep: float  # share of each weight that is kept
    bits: int


class Given(NamedTuple):
    """A model as it was before any step."""

    raw: Tensors
    tensors: Tensors  # the same, but that weights which layers compute are plain
    weights: tuple[str, ...]  # parameters of floats with two axes or more, each under its first name
    frozen: tuple[str, ...]
    axes: Mapping[str, int | None]  # of outputs, as the layer's class says; None where it says nothing


def own(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names, as the modules hold them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def given(model: nn.Module) -> Given:
    """Weights that layers compute from other parameters (weight norm) go by their own name, as plain ones."""
    computed = {
        f"{path}.{name}" if path else name: getattr(module, name)
        for path, module in model.named_modules()
        for name in getattr(module, "parametrizations", ())
    }
    listed = {n: p for n, p in model.named_parameters() if not behind(n)} | computed
    weights = [name for name, p in listed.items() if p.is_floating_point() and p.ndim > 1 and p.numel()]
    frozen = [name for name, p in listed.items() if not p.requires_grad]
    axes: dict[str, int | None] = {}
    for name in weights:
        layer = type(model.get_submodule(name.rpartition(".")[0]))
        if name in computed:
            layer = layer.__mro__[1]  # the class made for the layer stands before its own
        stock = layer.__module__.startswith("torch.nn.modules") or layer.__name__ in TURNED
        axes[name] = (1 if layer.__name__ in TURNED else 0) if stock else None
    raw = copied(own(model))
    tensors = {name: tensor for name, tensor in raw.items() if not behind(name)}
    return Given(raw, tensors | copied(computed), tuple(weights), tuple(frozen), axes)


def behind(name: str) -> bool:
    """Whether a tensor is one that a weight is computed from."""
    return "parametrizations" in name.split(".")


def copied(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def faults(was: Given, result: State, loaded: nn.Module, asked: Asked) -> Iterator[str]:
    """All that is wrong with the tensors of a loaded model."""
    now, done = own(loaded), edited(result)
    names = {name: result.aliases.get(name, name) for name in now}  # -> site
    if odd := sorted(was.tensors.keys() ^ now.keys()):
        yield f"{odd[0]}: only one of the given and the loaded model has it"
        return
    for name, tensor in now.items():
        first, steps = was.tensors[name], done.get(names[name], set())
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            yield f"{name}: {tensor.dtype} {list(tensor.shape)}, given {first.dtype} {list(first.shape)}"
            continue
        if not steps and not same(tensor, first):
            yield f"{name}: changed, and no step says so"
        if "prune" in steps and (wrong := unpruned(first, tensor, asked.keep)):
            yield f"{name}: {wrong}"
        if "quantize" in steps and (wrong := off_grid(was, name, result, tensor, asked.bits)):
            yield f"{name}: {wrong}"
        if "distill" in steps and name in was.frozen:
            yield f"{name}: frozen, and trained all the same"
    yield from unaccounted(was, result)


def edited(result: State) -> dict[str, set[str]]:
    """Site -> the steps that gave it other values."""
    found: dict[str, set[str]] = {}
    for entry in result.ledger.edits():
        if entry.how != "lossless":
            found.setdefault(entry.site, set()).add(entry.name)
    return found


def unaccounted(was: Given, result: State) -> Iterator[str]:
    """Weights on which a step says nothing, done or not: by itself, or in a note about the whole model."""
    entries = result.ledger.entries
    told = {(entry.step, entry.site) for entry in entries}
    for step, name in enumerate(result.ledger.step_names()):
        whole = [e for e in entries if not e.site and (e.step == step or e.name == "start")]
        words = {word.strip(",;:()") for entry in whole for word in entry.text.split()}
        still = was.frozen if any(entry.kind == "frozen" for entry in whole) else ()
        for weight in was.weights:
            site = result.aliases.get(weight, weight)
            if (step, site) not in told and site not in words and weight not in still:
                yield f"{weight}: {name} says nothing of it"


def unpruned(first: Tensor, now: Tensor, keep: float) -> str:
    """What is wrong with the zeros of one weight, of which the smallest were to go."""
    kept = max(1, math.floor(keep * first.numel() + 0.5))
    sizes = first.detach().abs().flatten()
    edge = sizes.kthvalue(len(sizes) - kept + 1).values
    left = int((now.detach().flatten()[sizes < edge] != 0).sum())
    if left:
        return f"{left} of the pruned weights are not zero"
    count = int(now.count_nonzero())
    return f"{count} weights are not zero, and {kept} were kept" if count > kept else ""


def off_grid(was: Given, name: str, result: State, now: Tensor, bits: int) -> str:
    """What is wrong with the grids of one weight, one a row."""
    site = result.aliases.get(name, name)
    axis = was.axes.get(name, None)
    axis = result.sites[site].axis if axis is None else axis
    rows = now.detach().movedim(axis, 0).flatten(1)
    if bad := int((~on_grid(rows, bits)).sum()):
        return f"{bad} of {len(rows)} rows are on no grid of {bits} bits"
    return ""


def on_grid(rows: Tensor, bits: int) -> Tensor:
    """Whether each row [O, I] is whole multiples of one step, of at most the highest code of `bits`. [O]"""
    top = 2 ** (bits - 1) - 1
    near = 4 * top * torch.finfo(rows.dtype).eps
    rows = rows.double()
    largest = rows.abs().amax(1, keepdim=True)
    fits = largest[:, 0] == 0
    for code in range(1, top + 1):  # of the largest weight: what learned need not use the ends
        steps = rows / largest.clamp_min(torch.finfo(torch.float64).tiny) * code
        fits |= (steps - steps.round()).abs().amax(1) < near
    return fits


def differing(task: Task, one: nn.Module, other: nn.Module) -> str:
    """What is wrong with the answers of two models that must be the same, on the evaluation batches."""
    batches = list(task.batches("evaluate"))
    with evaluating(one), evaluating(other):
        for batch in batches:
            mine, theirs = (tensors_of(task.run(model, batch)) for model in (one, other))
            floats = [t for t in mine if t.is_floating_point() and t.numel()]
            if not any(bool((t != t.flatten()[0]).any()) for t in floats):
                return "the answers are all one number: they show nothing"
            if not all(bool(t.isfinite().all()) for t in floats):
                return "the answers are not finite"
            if len(mine) != len(theirs) or not all(map(same, mine, theirs)):
                return "the loaded model answers otherwise"
    return ""


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an answer, whatever it is wrapped in."""
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    items = output.values() if isinstance(output, Mapping) else output
    return (
        [t for item in items for t in tensors_of(item)] if isinstance(output, Mapping | tuple | list) else []
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*bits)


def untouched(was: Given, model: nn.Module) -> str:
    """Whether the given model is still what it was."""
    now = own(model)
    moved = [name for name, tensor in was.raw.items() if not same(tensor, now[name])]
    return f"{moved[0]}: the given model was changed" if moved else ""
