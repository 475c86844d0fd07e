"""Code: digests of the code and settings that a run depends on, so that a resumed run notices changes.

code      the compiled methods of the classes of the model and of the user's own steps, and the task's loss,
          metric, logits, feed and target, with constants, defaults, inner functions, and the functions of the
          user's own modules that they call. Comments and layout do not count; installed packages are not
          followed
settings  for each module its path, class and attributes (a stride, a slope, eps), and its non-persistent
          buffers
Objects without Python code are listed by name, because a change of them would not be noticed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tersor.forms.form import DIGEST
from tersor.model.batches import hash_batch
from tersor.model.frozen import frozen_in
from tersor.model.metric import Metric, is_torchmetric
from tersor.model.task import Task

SIMPLE = (str, bytes, int, float, bool, complex, type(None), torch.dtype)
LIBRARIES = ("torch.", "torchvision.", "tersor.", "builtins")  # identified by their version
PATHS = ("stdlib", "platstdlib", "purelib", "platlib")
INSTALLED = tuple({f"{sysconfig.get_path(name)}/" for name in PATHS})
# Attributes of every module: its tables of tensors, layers and hooks.
INNER = {*vars(nn.Module()), "training"}


def code_of(model: nn.Module | None, task: Task | None, steps: Iterable[Any] = ()) -> tuple[str, list[str]]:
    """(digest, names of the parts without Python code)."""
    sha = hashlib.sha256(torch.__version__.encode())
    unseen: list[str] = []
    classes = {type(module) for module in model.modules()} if model is not None else set()
    classes |= {type(step) for step in steps if not in_library(type(step))}
    parts: list[tuple[str, Any]] = [(c.__qualname__, c) for c in classes]
    if task is not None:
        words = {"loss": task.loss, "logits": task.logits, "feed": task.feed, "target": task.target}
        words |= {"part": repr(task.parts)} if task.parts else {}
        parts += [(f"task: {word}", part) for word, part in (words | metric_parts(task)).items()]
    found: list[list[bytes]] = []
    for name, part in parts:
        known = list(pieces(part, set()))
        unseen += [name] * (None in known)
        found.append([name.encode(), *filter(None, known)])
    for part_pieces in sorted(found):  # by content too, because two classes may have the same name
        for piece in part_pieces:
            sha.update(piece)
    return sha.hexdigest()[:DIGEST], sorted(set(unseen))


def metric_parts(task: Task) -> dict[str, Any]:
    """The parts of a metric that determine its value: name, functions, settings."""
    metric = task.metric
    if isinstance(metric, Metric):
        fields = (metric.name, metric.better, metric.percent, metric.kind, metric.resamples)
        return {"metric": repr(fields), "statistics": metric.statistics, "value": metric.value}
    if is_torchmetric(metric):  # torchmetrics: a library class, so only its name and settings count
        return {"metric": f"{type(metric).__module__}.{type(metric).__qualname__} {settings_of(metric)}"}
    return {"metric": metric}


def settings_of(model: nn.Module | None) -> str:
    """A digest of the settings and hooks of each module, in order, and of what is frozen. Call it before the
    model runs, so that attributes that a forward sets are not included."""
    sha = hashlib.sha256()
    if still := frozen_names(model):
        sha.update(repr(still).encode())
    for path, module in model.named_modules() if model is not None else ():
        attributes = {key: value for key, value in vars(module).items() if key not in INNER}
        sha.update(repr((path, type(module).__qualname__, plain(attributes))).encode())
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            sha.update(b"".join(filter(None, pieces(hook, set()))))
        loose = {key: module._buffers[key] for key in sorted(module._non_persistent_buffers_set)}
        for key, value in {**attributes, **loose}.items():
            if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
                hash_batch(sha, {key: value})
            elif isinstance(value, types.FunctionType):
                sha.update(b"".join(filter(None, pieces(value, set()))))
    return sha.hexdigest()[:DIGEST]


def frozen_names(model: nn.Module | None) -> list[str]:
    """The parameters that are not trained, and the modules in eval mode beside others in training mode."""
    if model is None:
        return []
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, tensor in named if not tensor.requires_grad] + [*frozen_in(model, {}).modules]


def fingerprints(
    model: nn.Module | None, task: Task | None, steps: Iterable[Any] = ()
) -> tuple[dict[str, Any], list[str]]:
    """(digests that must be equal when a run is resumed, besides weights and recipe; names of the parts whose
    code cannot be compared)."""
    code, unseen = code_of(model, task, steps)
    # Sums over batches depend on the number of threads; computations on weights alone do not.
    threads = 0 if task is None else torch.get_num_threads()
    data = "none" if task is None else task.digest()
    digests = {"data": data, "code": code, "settings of the model": settings_of(model)}
    return {**digests, "number of threads": threads}, unseen


def pieces(part: Any, seen: set[int]) -> Iterator[bytes | None]:
    """The code of a class, a function or a callable, piece by piece; None for a part without Python code.
    Functions in `seen` are skipped, because a function may refer to itself."""
    if part is None or isinstance(part, str):
        yield repr(part).encode()
    elif isinstance(part, functools.partial):
        given = [part.args, part.keywords]
        yield repr(plain(given)).encode()
        if not is_kept_whole(given):
            yield None
        yield from pieces(part.func, seen)
    elif isinstance(part, types.MethodType):
        yield from pieces(part.__func__, seen)
    elif isinstance(part, types.FunctionType):
        if in_library(part):
            yield f"{part.__module__}.{part.__qualname__}".encode()
            return
        if id(part) in seen:
            return
        seen.add(id(part))
        yield from compiled(part.__code__)
        yield repr(plain(part.__defaults__ or ())).encode()
        yield repr(plain(part.__kwdefaults__ or {})).encode()
        for name in sorted(set(names_in(part.__code__))) if is_own(part) else ():
            if name in part.__globals__:
                yield from called(name, part.__globals__[name], seen)
        for cell in part.__closure__ or ():  # only functions: counters and caches in a closure are not code
            with suppress(ValueError):  # the cell is still empty
                if isinstance(cell.cell_contents, types.FunctionType):
                    yield from pieces(cell.cell_contents, seen)
    elif inspect.isclass(part):
        if id(part) in seen:
            return
        seen.add(id(part))
        known = False
        for kind in part.__mro__[:-1]:  # without object
            yield kind.__qualname__.encode()
            functions = sorted(functions_of(kind), key=lambda item: item[0])
            known = known or bool(functions)
            for name, function in functions if not in_library(kind) else ():
                yield name.encode()
                yield from pieces(function, seen)
        if not known:
            yield None
    elif isinstance(part, nn.Module) or callable(part) and not in_library(type(part)):
        yield from pieces(type(part), seen)  # a callable object: only the code of its class
    else:
        yield None


def called(name: str, value: Any, seen: set[int]) -> Iterator[bytes | None]:
    """The pieces for a global name that the user's own code reads: a constant, or more of their own code."""
    if isinstance(value, SIMPLE):
        yield repr((name, value)).encode()
    elif (isinstance(value, types.FunctionType) or inspect.isclass(value)) and is_own(value):
        yield from (piece for piece in pieces(value, seen) if piece is not None)


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names that code and the functions inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def is_own(part: Any) -> bool:
    """Whether it belongs to the user's own modules: not to an installed package or the standard library."""
    module = sys.modules.get(part.__module__)
    return not in_library(part) and not (getattr(module, "__file__", None) or "").startswith(INSTALLED)


def functions_of(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods that a class itself defines, by name, including static and class methods and properties."""
    for name, value in vars(kind).items():
        inside = [getattr(value, word, None) for word in ("__func__", "fget", "fset", "func")]
        for function in (value, *inside):
            if isinstance(function, types.FunctionType):
                yield name, function


def in_library(part: Any) -> bool:
    return f"{getattr(part, '__module__', '')}.".startswith(LIBRARIES)


def compiled(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from compiled(constant)
        else:
            yield repr(plain(constant)).encode()


def plain(value: Any) -> Any:
    """A value whose repr is the same in every process: sets are sorted, objects become their class name."""
    if isinstance(value, (frozenset, set)):
        return sorted(repr(plain(each)) for each in value)
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return [(plain(key), plain(each)) for key, each in value.items()]
    return value if isinstance(value, SIMPLE) else type(value).__name__


def is_kept_whole(value: Any) -> bool:
    """Whether `plain` keeps all of a value."""
    if isinstance(value, (frozenset, set, tuple, list)):
        return all(map(is_kept_whole, value))
    if isinstance(value, dict):
        return all(is_kept_whole(each) for pair in value.items() for each in pair)
    return isinstance(value, SIMPLE)
