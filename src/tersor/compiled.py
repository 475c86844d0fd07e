"""Compiled: loops that numba compiles, each at its first call, and where their code is kept.

folder   the first that can be written: NUMBA_CACHE_DIR, __pycache__ here, the user's cache folder, a private
         folder for temporary files. In it loops-HASH, the hash of all sources that loops are made of: after a
         change of any of them everything is compiled anew, and no old code can run
beside   `begin` compiles a module's loops in a process in the background
Cost: some 12 s of one core for all loops, once; then 0.1 s a process. The logger "tersor" says when it waits
for it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# What compiled code depends on, in this package.
SOURCES = ("coders/**/*.py", "maths/*_loop.py", "compiled.py")
UNUSED = 30 * 24 * 3600.0  # seconds after which a folder of other sources is removed
WAITING = "tersor: compiling loops for this processor. This happens once and takes some seconds"
# What loading damaged code raises, and OSError where it cannot be written.
DAMAGED = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError,
    pickle.UnpicklingError,
)  # fmt: skip
LOCK = threading.RLock()
beside: dict[str, subprocess.Popen[bytes]] = {}  # by module: the process that compiles its loops


class Compiled:
    """A loop that is compiled at its first call, for one signature or a few.

    `dispatcher` is what other loops call: numba compiles it into theirs.
    """

    def __init__(self, loop: Callable[..., Any], signatures: list[Any], options: dict[str, Any]) -> None:
        from numba import njit

        functools.update_wrapper(self, loop)
        self.module, self.name = loop.__module__, loop.__name__
        self.signatures, self.dispatcher = signatures, njit(**options)(loop)
        self.ready: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        return (self.ready or self.compile())(*args)

    def compile(self) -> Callable[..., Any]:
        """Compile the loop, or load its code from disk."""
        with LOCK:
            if self.ready is None:
                wait_for(self.module)
                path = folder()
                if path is None or not self.is_kept(path):
                    announce()
                if path is not None:
                    keep_in(path, self.dispatcher)
                for signature in self.signatures:
                    self.build(signature, path)
                if path is not None and not self.mark(path).exists():
                    self.write_mark(path)
                self.dispatcher.disable_compile()
                self.ready = self.dispatcher
            return self.ready

    def build(self, signature: Any, path: Path | None) -> None:
        """Compile for one signature, or load the code. Damaged code on disk is removed first. Code that
        cannot be written serves this process alone: numba has compiled it by then."""
        try:
            self.dispatcher.compile(signature)
        except DAMAGED:
            if path is None:
                raise
            self.remove(path)
            with suppress(OSError):
                self.dispatcher.compile(signature)
            self.dispatcher.compile(signature)

    def files(self, path: Path) -> list[Path]:
        """The files that hold the loop's code: numba names them by folder, module, function and line."""
        *_, parent, module = self.module.split(".")
        return sorted(path.glob(f"{parent}_*/{module}.{self.name}-*.nb[ic]"))

    def hash_of(self, path: Path) -> str:
        found = hashlib.sha256()
        for file in self.files(path):
            found.update(file.name.encode() + file.read_bytes())
        return found.hexdigest()

    def mark(self, path: Path) -> Path:
        return path / f"{self.module}.{self.name}"

    def write_mark(self, path: Path) -> None:
        """Note the hash of the loop's code, if there is any: a full disk may have kept the index alone."""
        with suppress(OSError):
            if any(file.suffix == ".nbc" for file in self.files(path)):
                self.mark(path).write_text(self.hash_of(path))

    def is_kept(self, path: Path) -> bool:
        """Whether the code is on disk. Code that has changed since it was written is removed."""
        try:
            if self.mark(path).read_text() == self.hash_of(path):
                return True
        except (OSError, ValueError):
            return False  # without a mark, of a process that was stopped or is at work
        self.remove(path)
        return False

    def remove(self, path: Path) -> None:
        for file in (self.mark(path), *self.files(path)):
            with suppress(OSError):
                file.unlink()


def compiled(
    signature: Any, *, brief: bool = False, **options: Any
) -> Callable[[Callable[..., Any]], Compiled]:
    """Make a Compiled of a loop. `signature`: numba's, one or a list. `options`: numba's. `brief`: keep the
    GIL, since getting it back from another thread can take longer than a short loop."""
    signatures = signature if isinstance(signature, list) else [signature]
    return lambda loop: Compiled(loop, signatures, {"nogil": not brief, **options})


def loop_modules() -> list[str]:
    """The modules of this package that have loops, the slowest to compile last."""
    paths = [path for glob in ("coders/**/*_loops.py", "maths/*_loop.py") for path in HERE.glob(glob)]
    names = [".".join((HERE.name, *path.relative_to(HERE).with_suffix("").parts)) for path in paths]
    return sorted(names, key=lambda name: ("mixing_loops" in name, name))


def loops_of(module: str) -> Iterator[Compiled]:
    """The loops that a module defines."""
    for loop in vars(import_module(module)).values():
        if isinstance(loop, Compiled) and loop.module == module:
            yield loop


def compile_module(module: str) -> None:
    """Compile all loops of a module, and leave a mark that they are on disk."""
    for loop in loops_of(module):
        loop.compile()
    if (path := folder()) is not None:
        touch(path / module)


def begin(modules: Iterable[str]) -> None:
    """Start to compile the loops of modules in a process beside this one, where there is a second core."""
    path = folder()
    alone = (os.cpu_count() or 1) < 2 or getattr(sys, "frozen", False) or not sys.executable
    if path is None or alone:
        return
    with LOCK:
        wanted = [name for name in modules if name not in beside and not (path / name).exists()]
        if wanted:
            # Without the current folder, whose files the parent need not import either.
            flags = ["-I"] if sys.flags.isolated else ["-P"]
            code = (
                f"import sys; sys.path.append({str(HERE.parent)!r}); "
                f"from tersor.compiled import compile_module; [compile_module(name) for name in {wanted!r}]"
            )
            null = subprocess.DEVNULL
            with suppress(OSError):  # it only saves time
                words = [sys.executable, *flags, "-c", code]
                child = subprocess.Popen(words, stdin=null, stdout=null, stderr=null)
                beside.update(dict.fromkeys(wanted, child))


def wait_for(module: str) -> None:
    """Wait until the process that compiles a module has finished. If it failed, this one compiles again."""
    path, child = folder(), beside.get(module)
    if path is None or child is None:
        return
    while child.poll() is None and not (path / module).exists():
        announce()
        time.sleep(0.01)
    del beside[module]


@functools.cache
def announce() -> None:
    """Log, once in a process, that it waits."""
    logging.getLogger("tersor").warning(WAITING)


def keep_in(path: Path, dispatcher: Any) -> None:
    """Let numba keep a loop's code in a folder. Its setting is global, so it is put back at once."""
    from numba import config

    settings: Any = config
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(path)
    try:
        dispatcher.enable_caching()
    except RuntimeError:  # the folder cannot be written after all: compile for this process alone
        return
    finally:
        settings.CACHE_DIR = before


@functools.cache
def folder() -> Path | None:
    """Where compiled code is kept; None where nothing can be written."""
    try:
        name = f"loops-{digest()}"
    except OSError:  # the sources are no files, as in a zip
        return None
    for base, private in bases():
        path = base / name
        if usable(path, private):
            tidy(path)
            return path
    return None


def digest() -> str:
    """The hash of the sources of compiled code and of the compiler's version. OSError in a zip."""
    import llvmlite
    import numba

    found = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    paths = sorted(path for glob in SOURCES for path in HERE.glob(glob))
    if not paths:
        raise FileNotFoundError(HERE)
    for path in paths:
        found.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def bases() -> Iterator[tuple[Path, bool]]:
    """Folders to try, and whether others could write there: loading compiled code is to run it."""
    from numba import config

    settings: Any = config
    if settings.CACHE_DIR:
        yield Path(settings.CACHE_DIR), False
    else:
        yield HERE / "__pycache__", False
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        yield Path(home) / "tersor", False
        yield Path(tempfile.gettempdir()) / f"tersor-{getattr(os, 'getuid', str)()}", True


def usable(path: Path, private: bool) -> bool:
    """Whether a folder is there, or can be made, and can be written; if `private`, by this user alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if private and not ours(path.parent):
            return False
        path.mkdir(exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def ours(path: Path) -> bool:
    """Whether a folder, which is no link, belongs to this user and nobody else may write to it."""
    found = path.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and not path.is_symlink() and not found.st_mode & 0o022


def tidy(path: Path) -> None:
    """Note that a folder is used, and remove those of other sources that have not been for long."""
    touch(path / "used")
    for other in path.parent.glob("loops-*"):
        if other != path and not last_use(other) > time.time() - UNUSED:
            shutil.rmtree(other, ignore_errors=True)


def last_use(path: Path) -> float:
    try:
        return (path / "used").stat().st_mtime
    except OSError:
        return time.time()  # another process is making or removing it


def touch(path: Path) -> None:
    with suppress(OSError):  # a mark saves time and nothing else
        path.touch()
