"""Sound: checks of the tensors of any compressed network.

A fault is a sentence. The checks compare the parameters and buffers of a model loaded from the file with the
tensors of the given model:
    zeros       after pruning: the smallest given weights are zero, and no fewer than the setting says
    grids       after quantizing: each row is integer multiples of one step, up to the highest code
    untouched   tensors that no step edited have their given bits; frozen ones were not trained
    accounted   each weight has an edit or a note in each step
    answers     outputs of loaded and compressed model agree bit for bit, are finite, and are not constant
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
    """The settings of the steps."""

    keep: float  # share of each weight that is kept
    bits: int


class Given(NamedTuple):
    """A model as it was before any step."""

    raw: Tensors
    tensors: Tensors  # the same, but with computed weights as plain ones
    weights: tuple[str, ...]  # float parameters with two axes or more, each under its first name
    frozen: tuple[str, ...]
    axes: Mapping[str, int | None]  # of outputs, from the layer's class; None if that is unknown


def own(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names in the modules."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def given(model: nn.Module) -> Given:
    """The tensors with computed weights (weight norm) as plain ones, under their own names."""
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
            layer = layer.__mro__[1]  # a parametrized layer has a generated class before its own
        stock = layer.__module__.startswith("torch.nn.modules") or layer.__name__ in TURNED
        axes[name] = (1 if layer.__name__ in TURNED else 0) if stock else None
    raw = copied(own(model))
    tensors = {name: tensor for name, tensor in raw.items() if not behind(name)}
    return Given(raw, tensors | copied(computed), tuple(weights), tuple(frozen), axes)


def behind(name: str) -> bool:
    """Whether a weight is computed from this tensor."""
    return "parametrizations" in name.split(".")


def copied(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def faults(was: Given, result: State, loaded: nn.Module, asked: Asked) -> Iterator[str]:
    """All faults in the tensors of a loaded model."""
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
    """Site -> the steps that changed its values."""
    found: dict[str, set[str]] = {}
    for entry in result.ledger.edits():
        if entry.how != "lossless":
            found.setdefault(entry.site, set()).add(entry.name)
    return found


def unaccounted(was: Given, result: State) -> Iterator[str]:
    """Weights without an edit or a note in a step. A note about the whole model may name them."""
    entries = result.ledger.entries
    noted = {(entry.step, entry.site) for entry in entries}
    for step, name in enumerate(result.ledger.step_names()):
        whole = [e for e in entries if not e.site and (e.step == step or e.name == "start")]
        words = {word.strip(",;:()") for entry in whole for word in entry.text.split()}
        still = was.frozen if any(entry.kind == "frozen" for entry in whole) else ()
        for weight in was.weights:
            site = result.aliases.get(weight, weight)
            if (step, site) not in noted and site not in words and weight not in still:
                yield f"{weight}: {name} has no note on it"


def unpruned(first: Tensor, now: Tensor, keep: float) -> str:
    """Faults in the zeros of one weight, whose smallest elements were to be pruned."""
    kept = max(1, math.floor(keep * first.numel() + 0.5))
    sizes = first.detach().abs().flatten()
    edge = sizes.kthvalue(len(sizes) - kept + 1).values
    left = int((now.detach().flatten()[sizes < edge] != 0).sum())
    if left:
        return f"{left} of the pruned weights are not zero"
    count = int(now.count_nonzero())
    return f"{count} weights are not zero, and {kept} were kept" if count > kept else ""


def off_grid(was: Given, name: str, result: State, now: Tensor, bits: int) -> str:
    """Faults in the grids of one weight, one grid a row."""
    site = result.aliases.get(name, name)
    axis = was.axes.get(name, None)
    axis = result.sites[site].axis if axis is None else axis
    rows = now.detach().movedim(axis, 0).flatten(1)
    if bad := int((~on_grid(rows, bits)).sum()):
        return f"{bad} of {len(rows)} rows are on no grid of {bits} bits"
    return ""


def on_grid(rows: Tensor, bits: int) -> Tensor:
    """Whether each row [O, I] is integer multiples of one step, up to the highest code of `bits`. [O]"""
    top = 2 ** (bits - 1) - 1
    near = 4 * top * torch.finfo(rows.dtype).eps
    rows = rows.double()
    largest = rows.abs().amax(1, keepdim=True)
    fits = largest[:, 0] == 0
    for code in range(1, top + 1):  # the code of the largest weight: trained weights need not reach the ends
        steps = rows / largest.clamp_min(torch.finfo(torch.float64).tiny) * code
        fits |= (steps - steps.round()).abs().amax(1) < near
    return fits


def differing(task: Task, one: nn.Module, other: nn.Module) -> str:
    """Faults in the outputs of two models that must agree, on the evaluation batches."""
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
    """The tensors of an output in any container."""
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
    """Whether the given model is unchanged."""
    now = own(model)
    moved = [name for name, tensor in was.raw.items() if not same(tensor, now[name])]
    return f"{moved[0]}: the given model was changed" if moved else ""
