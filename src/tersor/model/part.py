"""Part: modules of a model that run alone, on the inputs that a task's batches give them in the whole model.

whole    batch -> resized images -> backbone -> head -> selected boxes      lists, control flow: no graph
part                                backbone                                tensors: a graph
A task names what can be traced, Task(part="backbone"). Its graph is that of a model whose forward runs these
modules alone: all names stay those of the whole model. Nothing outside of a part changes, so a part keeps the
shapes of its inputs and outputs, and what holds for its outputs holds for the model's.
Cost: a forward of the whole model for each batch, once; up to KEPT bytes of inputs are kept for later passes.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tersor.errors import RefusedError, TaskError, few, near_few
from tersor.model.batches import MISFIT, device_of, evaluating, move, steady
from tersor.model.example import example_inputs
from tersor.model.graph import Inputs, UntraceableError, traced
from tersor.model.outputs import tensors_of
from tersor.model.outside import Outside
from tersor.model.task import Task, within

KEPT = 256 << 20  # bytes of inputs that are kept for the next pass
MOST = 5  # modules that a message names
TRIES = 16  # modules that are traced to name those that could be parts
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one call


class Alone:
    """A forward that runs parts of a model alone. The arguments are those of the part; for several parts the
    (args, kwargs) of each, and the output is a tuple of theirs."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model, self.names = model, tuple(names)

    @property
    def __signature__(self) -> inspect.Signature:
        if len(self.names) == 1:
            return inspect.signature(self.model.get_submodule(self.names[0]).forward)
        return inspect.signature(lambda *calls: None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.names) == 1:
            return self.model.get_submodule(self.names[0])(*args, **kwargs)
        pairs = zip(self.names, args, strict=True)
        return tuple(self.model.get_submodule(name)(*given, **named) for name, (given, named) in pairs)


def alone(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A module with all of the model's tensors and names, whose forward runs these parts alone. It shares
    everything with `model`, which is not changed."""
    twin = copy.copy(model)
    twin._forward_pre_hooks, twin._forward_hooks = OrderedDict(), OrderedDict()  # of the whole forward
    object.__setattr__(twin, "forward", Alone(twin, names))
    return twin


@dataclass(frozen=True, eq=False, repr=False)
class PartTask(Task):
    """The task of parts alone."""

    alone: tuple[str, ...] = ()

    def in_part(self, name: str) -> bool:
        return within(self.alone, name)


def part_task(task: Task, model: nn.Module, names: Sequence[str]) -> PartTask:
    """The task of `alone(model, names)`. Its batches are the arguments that the parts get in `model`, the
    whole one; it scores nothing."""
    shown = PartBatches(task, task.shown, model, names)
    return PartTask(
        f"{task.name}, {in_words(names)}",
        evaluate=shown if task.calibrate is None else PartBatches(task, "evaluate", model, names),
        calibrate=None if task.calibrate is None else shown,
        metric=unscored,
        logits=together,
        feed=run_alone,
        target=no_target,
        example=None if task.example is None else example_of(task, model, names),
        alone=tuple(names),
    )


def part_of(given: nn.Module, task: Task, whole: Callable[[], nn.Module]) -> tuple[nn.Module, Task]:
    """(the module whose forward runs the task's parts alone, their task). Both are those given if the task
    names none. `whole` builds the present model, which gives the parts their inputs."""
    if not task.parts:
        return given, task
    return alone(given, task.parts), part_task(task, whole(), task.parts)


def in_words(names: Sequence[str]) -> str:
    return f"the part {names[0]}" if len(names) == 1 else f"the parts {', '.join(names)}"


def unscored(output: Any, target: Any) -> Tensor:
    raise TaskError("a part of a model has no metric: the whole model is scored")


def no_target(batch: Any) -> None:
    return None


def together(output: Any) -> Tensor:
    """All floats of a part's output as one tensor, [B, N], or [1, N] if they differ in B."""
    floats = [x for x in tensors_of(output) if x.is_floating_point() and x.ndim]
    batch = floats[0].shape[0] if len({x.shape[0] for x in floats}) == 1 else 1
    return torch.cat([x.reshape(batch, -1) for x in floats], 1)


def run_alone(model: nn.Module, batch: Call) -> Any:
    args, kwargs = tree_map(cloned, batch)  # the part may write to what it reads
    return model(*args, **kwargs)


def cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class PartBatches:
    """The arguments of the parts for each batch of a set of the whole model's task: (args, kwargs)."""

    def __init__(self, task: Task, word: str, model: nn.Module, names: Sequence[str]):
        self.task, self.word, self.model, self.names = task, word, model, tuple(names)
        source = getattr(task, word)  # whose random draws batches.steady repeats
        self.generator, self.sampler = (getattr(source, key, None) for key in ("generator", "sampler"))
        self.kept: list[Call] | None = None

    def __iter__(self) -> Iterator[Call]:
        if self.kept is not None:
            yield from self.kept
            return
        seen: list[Call] = []
        room = KEPT
        for batch in self.task.batches(self.word):
            here = move(batch, device_of(self.model))
            calls = calls_of(self.model, self.names, partial(self.task.answer, self.model, here))
            found = as_batches(calls, self.task)
            room -= nbytes(found)
            seen = [*seen, *found] if room >= 0 else []
            yield from found
        self.kept = seen if room >= 0 else None


def nbytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def calls_of(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> dict[str, list[Call]]:
    """The arguments of each call of each part while `run` runs the whole model, in eval mode."""
    found: dict[str, list[Call]] = {name: [] for name in names}
    handles = []
    for name in names:

        def see(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            found[name].append(tree_map(cloned, (args, kwargs)))

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(see, prepend=True, with_kwargs=True))
    try:
        with evaluating(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def as_batches(calls: Mapping[str, list[Call]], task: Task) -> list[Call]:
    """Batches of calls: each call of one part; of several parts one batch, since each is called once."""
    if len(calls) == 1:
        (found,) = calls.values()
        return found
    for name, found in calls.items():
        if len(found) != 1:
            raise TaskError(
                f"task {task.name!r}: the model calls {name} {len(found)} times for a batch. Of several "
                f"parts each must be called once: name {name} alone, or a module around these calls"
            )
    return [(tuple(found[0] for found in calls.values()), {})]


def example_of(task: Task, model: nn.Module, names: Sequence[str]) -> Inputs:
    """The parts' inputs for the task's own example."""
    given = move(example_inputs(task, model), device_of(model))
    run = (lambda: model(**given)) if isinstance(given, dict) else (lambda: model(*given))
    calls = calls_of(model, names, run)
    for name, found in calls.items():
        if not found:
            raise TaskError(
                f"task {task.name!r}: the model does not call its part {name} for example=. Give one that "
                "takes the way of a batch, or leave it out: then a batch of the task is the example"
            )
    return bound(alone(model, names), *as_batches(calls, task)[0])


def bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The arguments of a call as inputs: in order, or all by name."""
    if not kwargs:
        return args
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments) if args else kwargs


def check_parts(model: nn.Module, task: Task) -> None:
    """TaskError for parts that the model lacks, that contain each other, that a batch does not reach, or of
    which the model reads tensors elsewhere too, own or computed ones: a change would not stay inside."""
    if not (names := task.parts):
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in model.named_modules()}
    for name in names:
        if name not in modules or not name:
            raise TaskError(
                f"task {task.name!r}: part={name!r}, but the model has no such module; "
                f"{near_few(name, [path for path in modules if path], 'there are')}"
            )
        if (known := first[id(modules[name])]) != name:  # its tensors have that name
            raise TaskError(f"task {task.name!r}: part={name!r} is another name of {known!r}; give that")
        if not any(True for _ in modules[name].parameters()):
            raise TaskError(f"task {task.name!r}: part={name!r} has no parameters; name a module around it")
    for name in names:
        if around := next((other for other in names if name.startswith(f"{other}.")), None):
            raise TaskError(f"task {task.name!r}: the part {name} is inside of the part {around}; name one")
    with steady(getattr(task, task.shown)):
        batch = move(next(iter(task.batches(task.shown))), device_of(model))
        with Outside(model, names) as outside:
            calls = calls_of(model, names, lambda: task.answer(model, batch))
    for name, found in calls.items():
        if not found:
            raise TaskError(f"task {task.name!r}: the model does not call its part {name} for a batch")
    as_batches(calls, task)
    for tensor, function in outside.found.items():
        raise TaskError(
            f"task {task.name!r}: {tensor} is in {in_words(names)}, and {function} reads it outside of it "
            f"too, so it cannot change there alone. Name a part that has all that reads it, or returns it"
        )


@contextmanager
def naming_parts(model: Callable[[], nn.Module], task: Task | None) -> Iterator[None]:
    """Adds to an error of a model that cannot be traced which of its modules can, if the task names none."""
    try:
        yield
    except RefusedError as error:
        if task is None or task.parts or not untraceable(error):
            raise
        try:
            found = possible_parts(model(), task)
        except (RefusedError, TaskError, *MISFIT):
            found = {}
        if not found:
            raise
        first = next(iter(found))
        shares = few((f"{name!r} ({share:.0%} of the parameters)" for name, share in found.items()), MOST)
        raise RefusedError(
            f"{error}. These modules of it can be traced: {shares}. Name one in the task, or several: "
            f"Task(..., part={first!r})"
        ) from error


def untraceable(error: BaseException | None) -> bool:
    """Whether torch.export's refusal is the cause of an error."""
    while error is not None and not isinstance(error, UntraceableError):
        error = error.__cause__
    return error is not None


def possible_parts(model: nn.Module, task: Task) -> dict[str, float]:
    """The outermost modules that can be traced with the inputs that a batch gives them, and their shares of
    the parameters, the largest first."""
    with steady(getattr(task, task.shown)):
        batch = move(next(iter(task.batches(task.shown))), device_of(model))
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in model.named_modules()}
    found, tries = dict[str, float](), TRIES
    level = [name for name, _ in model.named_children()]
    while level and tries:
        calls = calls_of(model, level, lambda: task.answer(model, batch))
        below = []
        level.sort(key=lambda name: -sizes.get(name, 0))
        for name in [name for name in level if sizes.get(name)][:tries]:
            tries -= 1
            try:
                (args, kwargs), *_ = calls[name] or [((), {})]
                if calls[name]:
                    part = alone(model, (name,))
                    traced(part, bound(part, args, kwargs))
                    found[name] = sizes[name] / max(sizes[""], 1)
                    continue
            except (RefusedError, TypeError):
                pass
            below += [f"{name}.{key}" for key, _ in model.get_submodule(name).named_children()]
        level = below
    return dict(sorted(found.items(), key=lambda item: -item[1]))
