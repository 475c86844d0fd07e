"""Code: a digest of the Python code that a run depends on, so that a resumed run is told when it changed.

What is hashed: the compiled code of the methods of the model's own classes, and of the task's loss, metric,
feed and target, with their constants, defaults and inner functions. Comments and layout do not count. What
these call are not followed; what has no Python code is named, for a change of it would not be seen.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from tersor.forms.form import DIGEST
from tersor.model.task import Task

SIMPLE = (str, bytes, int, float, bool, complex, type(None))
LIBRARIES = ("torch.", "torchvision.", "builtins")  # known by their version


def code_of(model: nn.Module | None, task: Task | None) -> tuple[str, list[str]]:
    """(digest, what has no code to look at)."""
    sha = hashlib.sha256(torch.__version__.encode())
    unseen: list[str] = []
    classes = {type(module) for module in model.modules()} if model is not None else set()
    parts: list[tuple[str, Any]] = [(c.__qualname__, c) for c in classes]
    if task is not None:
        words = {"loss": task.loss, "metric": task.metric, "feed": task.feed, "target": task.target}
        parts += [(f"task: {word}", part) for word, part in words.items()]
    found: list[list[bytes]] = []
    for name, part in parts:
        known = list(pieces(part, set()))
        unseen += [name] * (None in known)
        found.append([name.encode(), *filter(None, known)])
    for whole in sorted(found):  # by what is in them too: two classes may have one name
        for piece in whole:
            sha.update(piece)
    return sha.hexdigest()[:DIGEST], sorted(set(unseen))


def fingerprints(model: nn.Module | None, task: Task | None) -> tuple[dict[str, Any], list[str]]:
    """What a resumed run must find as it was, besides weights and recipe; what code cannot be compared."""
    code, unseen = code_of(model, task)
    # Sums over batches come out otherwise with another number of threads; of weights alone they do not.
    threads = 0 if task is None else torch.get_num_threads()
    data = "none" if task is None else task.digest()
    return {"data": data, "code": code, "number of threads": threads}, unseen


def pieces(part: Any, seen: set[int]) -> Iterator[bytes | None]:
    """The code of a class, a function or a callable, piece by piece; None for what cannot be looked at. A
    function that was `seen` is passed over: one may hold itself."""
    if part is None or isinstance(part, str):
        yield repr(part).encode()
    elif isinstance(part, functools.partial):
        for value in (part.args, part.keywords):
            yield repr(plain(value)).encode()
            if not shown(value):
                yield None
        yield from pieces(part.func, seen)
    elif isinstance(part, types.MethodType):
        yield from pieces(part.__func__, seen)
    elif isinstance(part, types.FunctionType):
        if library(part):
            yield f"{part.__module__}.{part.__qualname__}".encode()
            return
        if id(part) in seen:
            return
        seen.add(id(part))
        yield from compiled(part.__code__)
        yield repr(plain(part.__defaults__ or ())).encode()
        yield repr(plain(part.__kwdefaults__ or {})).encode()
        for cell in part.__closure__ or ():  # what a closure counts or collects is no code
            with suppress(ValueError):  # it is empty still
                if isinstance(cell.cell_contents, types.FunctionType):
                    yield from pieces(cell.cell_contents, seen)
    elif inspect.isclass(part):
        known = False
        for kind in part.__mro__[:-1]:  # but object
            yield kind.__qualname__.encode()
            functions = sorted(functions_of(kind), key=lambda item: item[0])
            known = known or bool(functions)
            for name, function in functions if not library(kind) else ():
                yield name.encode()
                yield from pieces(function, seen)
        if not known:
            yield None
    elif isinstance(part, nn.Module) or callable(part) and not library(type(part)):
        yield from pieces(type(part), seen)  # an object that is called: its class; what it holds is not seen
    else:
        yield None


def functions_of(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods of a class itself by name, static and class methods and those of properties too."""
    for name, value in vars(kind).items():
        inside = [getattr(value, word, None) for word in ("__func__", "fget", "fset", "func")]
        for function in (value, *inside):
            if isinstance(function, types.FunctionType):
                yield name, function


def library(part: Any) -> bool:
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
    """A value that prints the same in every process: sets are sorted, objects are their kind."""
    if isinstance(value, (frozenset, set)):
        return sorted(repr(plain(each)) for each in value)
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return [(plain(key), plain(each)) for key, each in value.items()]
    return value if isinstance(value, SIMPLE) else type(value).__name__


def shown(value: Any) -> bool:
    """Whether `plain` shows all of a value."""
    if isinstance(value, (frozenset, set, tuple, list)):
        return all(map(shown, value))
    if isinstance(value, dict):
        return all(shown(each) for pair in value.items() for each in pair)
    return isinstance(value, SIMPLE)
