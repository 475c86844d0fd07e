"""Import object: import "file.py:name" or "package.module:name" from the command line as a Python object.

The user's file runs once per process, like an import, and may import files next to it. An exception that it
raises is reported as an error of that file. Nothing is unpickled, and no other place is searched.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tersor.errors import TersorError, did_you_mean

# The built-in errors, which the user's code may raise. Exceptions of other classes are not converted.
THEIRS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def import_object(text: str, noun: str, error: type[TersorError], wanted: type) -> Any:
    """The object that `text` names, of class `wanted`, or what the function that it names returns without
    arguments.

    `noun` ("task", "model") and `error` are for messages, which name the file and what was found in it.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise error(f"{noun}: {text!r} is not file.py:name or package.module:name")
    path = Path(where)
    from_file = path.suffix == ".py" or os.path.isfile(path) or len(path.parts) > 1
    with _importable(path.resolve().parent if from_file else Path.cwd()):
        module = _from_file(path, noun, error) if from_file else _from_module(where, noun, error)
        if not hasattr(module, name):
            public = [word for word in vars(module) if not word.startswith("_")]
            raise error(f"{noun}: {where} has no {name!r}; {did_you_mean(name, public)}")
        found = getattr(module, name)
        if isinstance(found, wanted):
            return found
        if not callable(found):
            raise error(f"{noun}: {text} is a {type(found).__name__}, not a {wanted.__name__} or a function.")
        made = _run(found, text, noun, error)
    if not isinstance(made, wanted):
        raise error(
            f"{noun}: {text}() returned a {type(made).__name__}, but it has to return a {wanted.__name__}."
        )
    return made


def _from_file(path: Path, noun: str, error: type[TersorError]) -> ModuleType:
    if not os.path.isfile(path):
        near = [item.name for item in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = f"; {did_you_mean(path.name, near)}" if near else ""
        raise error(f"{noun}: there is no file {path}{hint}")
    if path.suffix != ".py":
        raise error(f"{noun}: {path} is not a Python file (.py)")
    # One module name per path: a file that gives both the model and the task runs once.
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise error(f"{noun}: {path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module here
    loader = spec.loader
    done = False
    try:
        _run(lambda: loader.exec_module(module), str(path), noun, error)
        done = True
    finally:
        if not done:  # otherwise the next call would find a partly initialized module
            del sys.modules[name]
    return module


def _from_module(name: str, noun: str, error: type[TersorError]) -> ModuleType:
    return _run(lambda: importlib.import_module(name), name, noun, error)


def _run(call: Callable[[], Any], what: str, noun: str, error: type[TersorError]) -> Any:
    try:
        return call()
    except THEIRS as problem:
        frames = traceback.extract_tb(problem.__traceback__)[1:]
        # Frames in files that start with "<" belong to the import system.
        theirs = [frame for frame in frames if not frame.filename.startswith("<")]
        line = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
        raise error(f"{noun}: {what} failed with {type(problem).__name__}: {problem}{line}") from problem


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put the folder first in sys.path, as for a script in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
