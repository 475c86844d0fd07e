"""Boundary: what a public call raises is an error of Tersor, or the user's own.

error of errors.py                            as it is
KeyboardInterrupt, SystemExit, no memory      as it is
raised in the user's code (loss, model)       as it is, with a note: PEP 678; the command line wraps it
OSError                                       StorageError, with the original as its __cause__
any other                                     InternalError, likewise: the step, the site, how to report it
Whose an error is, and where it was, is read from its traceback, so calls that succeed pay nothing for it.
"""

from __future__ import annotations

import functools
import inspect
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from tersor.errors import InternalError, SettingError, StorageError, TersorError, UserCodeError, first_line

OURS = "tersor"
# Packages that our code calls. All other code that runs after ours is the user's: their files, their models.
LIBRARIES = sys.stdlib_module_names | {
    "accelerate", "google", "jinja2", "llvmlite", "markupsafe", "numba", "numpy", "onnx", "onnx_ir",
    "onnxruntime", "onnxscript", "openvino", "rich", "safetensors", "scipy", "sklearn", "sympy", "torch",
    "typer", "yaml",
}  # fmt: skip
# In torch, the places that call the user's code or stand for it: the forward pass of a module, a data set.
THEIRS = (("torch.nn.modules.module", "_call_impl"), ("torch.utils.data", ""))
NO_MEMORY = ("OutOfMemoryError", "can't allocate memory", "out of memory")
SITE_WORDS = ("site", "edge", "event", "name")  # variables that hold a site, or its name, in our code

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)
A_FILE = "the path of a file, such as 'model.tersor'"
A_STATE = "a state, as run(...) and load(...) return"
A_WHOLE, A_NUMBER = "a whole number", "a number"
A_JOURNAL = "the folder of a journal, or a list of them"
AN_OBSERVER = "an Observer, as tersor.Observer()"
A_MODULE = "a torch.nn.Module"
# Annotation of a parameter -> what it has (a value needs one of them), and what it is.
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "State": (("forms",), A_STATE),
    "str | os.PathLike[str]": (("__fspath__", "isprintable"), A_FILE),
    "str | Path": (("__fspath__", "isprintable"), A_FILE),
    # An ExportedProgram, which has a graph_signature, is taken as a module: model/program.py.
    "nn.Module": (("named_modules", "graph_signature"), A_MODULE),
    "nn.Module | None": (("named_modules", "graph_signature"), A_MODULE),
    "Task | None": (("evaluate",), "a tersor.Task"),
    "Task": (("evaluate",), "a tersor.Task"),
    "Ledger": (("entries",), "a ledger, such as state.ledger"),
    "Observer | None": (("progress",), AN_OBSERVER),
    "int": (("__index__",), A_WHOLE),
    "int | None": (("__index__",), A_WHOLE),
    "float": (("__float__", "__index__"), A_NUMBER),
    "float | None": (("__float__", "__index__"), A_NUMBER),
    "str | Path | None": (("__fspath__", "isprintable"), "the path of a folder, such as 'journal'"),
    "str | None": (("isprintable",), "a text"),
    "str | Sequence[str]": (("isprintable", "__iter__"), "a text, or a list of them"),
    "Journals": (("__fspath__", "__iter__"), A_JOURNAL),
    "Callable[[nn.Module], Any] | None": (
        ("__call__",),
        "a function of the model, such as lambda net: net(x)",
    ),
}


def entrance(call: Callable[P, R], who: str = "") -> Callable[P, R]:
    """A public function that checks the kinds of its arguments and raises as this file says."""
    signature, who = inspect.signature(call), who or call.__name__

    @functools.wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:  # Python's own words for a wrong call follow
            return call(*args, **kwargs)
        with bounded(who):
            check_kinds(who, signature, given.arguments)
            return call(*args, **kwargs)

    return guarded


def entrances(*names: str) -> Callable[[Class], Class]:
    """A class decorator: makes these methods entrances."""

    def guard(kind: Class) -> Class:
        for name in names:
            setattr(kind, name, entrance(vars(kind)[name], f"{kind.__name__}.{name}"))
        return kind

    return guard


def check_kinds(who: str, signature: inspect.Signature, given: dict[str, Any]) -> None:
    """SettingError for an argument of another kind than its annotation; only those in KINDS are checked."""
    for name, value in given.items():
        annotation = signature.parameters[name].annotation
        if annotation not in KINDS or (value is None and "None" in annotation):
            continue
        has, what = KINDS[annotation]
        if isinstance(value, type) or not any(hasattr(value, word) for word in has):
            raise SettingError(
                f"{who}: {name} is {described(value)}, but it is {what}{hint(who, value, what)}"
            )


def described(value: Any) -> str:
    if value is None or isinstance(value, (str, int, float, os.PathLike)):
        return repr(value) if not isinstance(value, os.PathLike) else repr(os.fspath(value))
    return f"a {type(value).__name__}"


def hint(who: str, value: Any, what: str) -> str:
    """For a model in another's place, the calls that are meant."""
    if not hasattr(value, "state_dict"):
        return ""
    if what == A_FILE:
        return ". For a model in memory: save(run(model, Entropy()), 'model.tersor')"
    more = ", 'model.tersor'" if who == "save" else ""
    return f". For a model: {who}(run(model, steps){more})" if what == A_STATE else ""


@contextmanager
def bounded(who: str, *, passes: tuple[type[BaseException], ...] = (), wrap: bool = False) -> Iterator[None]:
    """Errors of the block are raised as this file says; those of `passes` as they are. `wrap`: an error of
    the user's code too becomes one of ours, UserCodeError."""
    as_it_is: tuple[type[BaseException], ...] = (TersorError, BrokenPipeError, *passes)
    try:
        yield
    except as_it_is:
        raise
    except Exception as error:
        tb = error.__traceback__
        if no_memory(error) and wrap:
            raise MemoryError(first_line(error)) from error
        if tb is None or no_memory(error):
            raise
        frames = frames_of(tb)
        step, site = place(frames)
        if is_theirs(frames):
            said = f"{who}: your code raised it{line_of(error)}{f' while {step} ran it' if step else ''}"
            if wrap:
                raise UserCodeError(f"{type(error).__name__}: {first_line(error)} ({said})") from error
            error.add_note(said)
            raise
        at = ", ".join(filter(None, (step, f"at {site}" if site else "")))
        what = f"{who}: {f'{at}: ' if at else ''}{type(error).__name__}: {first_line(error)}"
        if isinstance(error, OSError):
            raise StorageError(what) from error
        raise InternalError(
            f"{what}. This is a fault in Tersor, not in what you gave. Please report it, with the traceback "
            f"and this line: {versions()}{recipe_of(frames)}"
        ) from error


def no_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, torch's of a device, and torch's of the CPU, which has no class."""
    said = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(word in said for word in NO_MEMORY)


def frames_of(tb: TracebackType | None) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(tb)]


def package(frame: FrameType) -> str:
    """The package that a frame's code is in; "" for code that torch generated."""
    return str(frame.f_globals.get("__name__") or "").split(".")[0]


def is_ours(frame: FrameType) -> bool:
    """Whether a frame runs our code. Not where torch only passes through it, on the way from the user's model
    to an operator, and not a layer of ours that stands in the user's model."""
    name = frame.f_code.co_name
    layer = name == "forward" and hasattr(frame.f_locals.get("self"), "register_forward_hook")
    passes = layer or name in ("__torch_function__", "__torch_dispatch__")
    return package(frame) == OURS and frame.f_globals.get("__name__") != __name__ and not passes


def is_theirs(frames: list[FrameType]) -> bool:
    """Whether the user's code ran after ours: in this block we were called, so the first frames are not
    asked."""
    last = max((n for n, frame in enumerate(frames) if is_ours(frame)), default=len(frames))
    return any(stands_for_theirs(frame) for frame in frames[last + 1 :])


def stands_for_theirs(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__") or "")
    named = any(module.startswith(name) and word in ("", frame.f_code.co_name) for name, word in THEIRS)
    return named or package(frame) not in (LIBRARIES | {"", OURS})


def line_of(error: BaseException) -> str:
    """' (mine.py, line 12)': the last line of the user's code in a traceback; "" if there is none."""
    tb = error.__traceback__
    lines = [(f, n) for f, n in traceback.walk_tb(tb) if package(f) not in (LIBRARIES | {"", OURS})]
    return f" ({os.path.basename(lines[-1][0].f_code.co_filename)}, line {lines[-1][1]})" if lines else ""


def place(frames: list[FrameType]) -> tuple[str, str]:
    """(the step that ran, in words; the site that it was at), as the variables of our code have them."""
    step, named, site = "", "", ""
    known: set[str] = set()
    for frame in filter(is_ours, frames):
        values = frame.f_locals
        found = values.get("step")
        if found is not None and hasattr(found, "where") and isinstance(getattr(found, "name", None), str):
            number, named = values.get("number"), found.name
            step = f"step {number + 1} {named}" if isinstance(number, int) else f"step {named}"
        for value in values.values():
            sites = vars(value).get("sites") if hasattr(value, "__dict__") else None
            known |= set(map(str, sites)) if isinstance(sites, dict) else set()
        for word in SITE_WORDS:
            name = values.get(word)
            name = name if isinstance(name, str) else getattr(name, "site", getattr(name, "name", None))
            if isinstance(name, str) and name not in ("", named) and (not known or name in known):
                site = name
                break
    return step, site


def recipe_of(frames: list[FrameType]) -> str:
    """'; recipe: prune keep=0.1, entropy' of the run that was interrupted."""
    for frame in filter(is_ours, frames):
        steps = getattr(frame.f_locals.get("recipe"), "steps", None)
        if steps:
            return f"; recipe: {', '.join(map(words_of, steps))}"
    return ""


def words_of(step: Any) -> str:
    """A step with the settings that are not at their defaults."""
    own = {f.name: getattr(step, f.name) for f in fields(step) if getattr(step, f.name) != f.default}
    return " ".join([step.name, *(f"{key}={value}" for key, value in own.items())])


def versions() -> str:
    """The versions that a report of a fault needs."""
    found = {name: sys.modules.get(name) for name in (OURS, "torch", "numpy")}
    parts = [f"{name} {getattr(module, '__version__', '?')}" for name, module in found.items() if module]
    return ", ".join([*parts, f"Python {platform.python_version()}, {platform.system()}"])


def theirs_first(error: BaseException) -> BaseException:
    """The error with a traceback that begins in the user's code, for the command line."""
    tb = error.__traceback__
    last: TracebackType | None = None
    while tb is not None:
        if is_ours(tb.tb_frame):
            last = None
        elif last is None and stands_for_theirs(tb.tb_frame):
            last = tb
        tb = tb.tb_next
    return error.with_traceback(cast(Any, last or error.__traceback__))
