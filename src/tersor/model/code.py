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
from typing import Any

import torch
from torch import nn

from tersor.model.task import Task

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
    for name, part in sorted(parts, key=lambda item: item[0]):
        sha.update(name.encode())
        for piece in pieces(part):
            if piece is None:
                unseen.append(name)
            else:
                sha.update(piece)
    return sha.hexdigest()[:16], sorted(set(unseen))


def fingerprints(model: nn.Module | None, task: Task | None) -> tuple[dict[str, Any], list[str]]:
    """What a resumed run must find as it was, besides weights and recipe; what code cannot be compared."""
    code, unseen = code_of(model, task)
    # Sums over batches come out otherwise with another number of threads; of weights alone they do not.
    threads = 0 if task is None else torch.get_num_threads()
    data = "none" if task is None else task.digest()
    return {"data": data, "code": code, "number of threads": threads}, unseen


def pieces(part: Any) -> Iterator[bytes | None]:
    """The code of a class, a function or a callable, piece by piece; None for what cannot be looked at."""
    if part is None or isinstance(part, str):
        yield repr(part).encode()
    elif isinstance(part, functools.partial):
        yield repr((part.args, part.keywords)).encode()
        yield from pieces(part.func)
    elif isinstance(part, types.MethodType):
        yield from pieces(part.__func__)
    elif isinstance(part, types.FunctionType):
        if library(part):
            yield f"{part.__module__}.{part.__qualname__}".encode()
            return
        yield from compiled(part.__code__)
        yield repr([plain(value) for value in part.__defaults__ or ()]).encode()
        yield repr({key: plain(value) for key, value in (part.__kwdefaults__ or {}).items()}).encode()
        for cell in part.__closure__ or ():  # what a closure counts or collects is no code
            if isinstance(cell.cell_contents, types.FunctionType):
                yield from pieces(cell.cell_contents)
    elif inspect.isclass(part):
        known = False
        for kind in part.__mro__[:-1]:  # but object
            yield kind.__qualname__.encode()
            functions = sorted(functions_of(kind), key=lambda item: item[0])
            known = known or bool(functions)
            for _, function in functions if not library(kind) else ():
                yield from pieces(function)
        if not known:
            yield None
    elif isinstance(part, nn.Module) or callable(part) and not library(type(part)):
        yield from pieces(type(part))  # an object that is called: its class; what it holds is not seen
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
    """A value that prints the same in every process, else its kind: sets are sorted, objects named."""
    if isinstance(value, (frozenset, set)):
        return sorted(map(repr, value))
    simple = (str, bytes, int, float, bool, complex, type(None), tuple, list, dict)
    return value if isinstance(value, simple) else type(value).__name__
