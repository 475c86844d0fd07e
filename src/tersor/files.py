"""Files: written whole or not at all.

A file has no name while it is written, where the system knows such files (O_TMPFILE of Linux), else it is
.NAME.PID.part beside its place; it is moved there when it is complete. So a full disk, a kill or an error
leaves what was there before, and what a killed process left besides the next one that writes NAME removes.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from tersor.errors import JournalError, StorageError

try:
    import fcntl
except ImportError:  # Windows has no such locks, and nothing is removed there
    fcntl = None  # type: ignore[assignment]

FDS = "/proc/self/fd"  # where an open file without a name can be named


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends well. StorageError where it cannot be
    written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        file, named = create(temporary)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not named:
                give_name(file, temporary)
            os.replace(temporary, path)
    except OSError as error:
        kept = "; the earlier file is as it was" if path.exists() else ""
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder that appears at `path`, with all that was put into it, when the block ends well.
    StorageError where it cannot be written, or where something is there: no system swaps folders at once."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise StorageError(f"{path}: is there already. Name a folder that is not there yet, or an empty one")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary.mkdir()
        held = os.open(temporary, os.O_RDONLY)
        try:
            lock(held)
            yield temporary
            os.replace(temporary, path)
        finally:
            os.close(held)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def create(temporary: Path) -> tuple[BinaryIO, bool]:
    """(a new file, whether it has the temporary name already). It is locked for as long as it is open."""
    file, named = None, False
    if hasattr(os, "O_TMPFILE") and os.path.isdir(FDS):
        with suppress(OSError):  # a file system that has no such files
            file = open(temporary.parent, "w+b", opener=nameless)  # noqa: SIM115  closed by atomic()
    if file is None:
        file, named = open(temporary, "w+b"), True  # noqa: SIM115
    lock(file)
    return file, named


def nameless(folder: str, _: int) -> int:
    return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)  # as open() has it: the umask takes away


def give_name(file: BinaryIO, name: Path) -> None:
    """Name a file that has none."""
    with suppress(FileNotFoundError):
        name.unlink()
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        # With folders given Python calls linkat, which alone can follow the link to the open file.
        os.link(f"{FDS}/{file.fileno()}", name.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:  # such files can be made there, but not named: what is in it may be the work of hours
        file.seek(0)
        with open(name, "w+b") as copy:
            shutil.copyfileobj(file, copy, 1 << 22)
            copy.flush()
            os.fsync(copy.fileno())
    finally:
        os.close(folder)


def lock(file: IO[bytes] | int) -> bool:
    """Whether no other process has the file locked; from then on this one has, until the file is closed."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sweep(path: Path) -> None:
    """Remove what processes that are gone left of this file: no such process, and no lock on the file, for a
    process of another machine or container is not seen here."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        number = left.name.removeprefix(f".{path.name}.").removesuffix(".part")
        if number.isascii() and number.isdigit() and not lives(int(number)):
            with suppress(OSError):
                remove(left)


def remove(left: Path) -> None:
    """Remove a file or folder, unless somebody has it locked."""
    file = os.open(left, os.O_RDONLY)
    try:
        if lock(file):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    finally:
        os.close(file)


def lives(process: int) -> bool:
    """Whether there is a process of this number. Yes, where that cannot be told."""
    if os.name != "posix":
        return True  # os.kill would end it there
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def claim(path: str | os.PathLike[str]) -> IO[bytes]:
    """An open lock file: whoever holds it has the folder for itself. JournalError where somebody else does.
    StorageError where it cannot be made."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115  the holder closes it
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    if fcntl is not None and not lock(file):
        file.close()
        raise JournalError(f"{path.parent}: another run is writing here; wait for it, or name another folder")
    return file
