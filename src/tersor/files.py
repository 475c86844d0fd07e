"""Files: written whole or not at all.

While it is written, a file has no name (O_TMPFILE of Linux), or is .NAME.PID.part in the same folder on
systems without such files. It is moved into place when it is complete. A full disk, a kill or an error
therefore leaves the earlier file as it was. The next process that writes NAME removes the parts of killed
processes. A link is followed to its target, and a file that is overwritten keeps its permissions and owner.
"""

from __future__ import annotations

import glob
import os
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from tersor.errors import JournalError, SettingError, StorageError

try:
    import fcntl
except ImportError:  # Windows has no such locks, so nothing is removed there
    fcntl = None  # type: ignore[assignment]

FDS = "/proc/self/fd"  # has a path for an open file without a name
LONGEST = 200  # bytes of a name that its temporary file's name contains; file systems allow 255

Paths = Iterable[str | os.PathLike[str]]


def output(path: str | os.PathLike[str], inputs: Paths = ()) -> Path:
    """The file to write for `path`, with links followed.

    SettingError if it is one of the `inputs`, also under another name. StorageError if no file can be written
    there: a folder, a device, an invalid name.
    """
    found = status(path)
    path = Path(path)
    if found is None:
        if path.name in ("", ".."):
            raise StorageError(f"{path}: is not a file name. Give the file to write")
        return followed(path)
    if stat.S_ISDIR(found.st_mode):
        raise StorageError(f"{path}: is a folder. Name a file in it, such as {path / 'NAME'}")
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(
            f"{path}: is a device or a pipe. Complete files are moved into place, so name a file"
        )
    for given in inputs:
        if same(found, given):
            raise SettingError(f"{path}: is also the input {os.fspath(given)}. Name another file to write")
    if not os.access(path, os.W_OK):
        raise StorageError(f"{path}: cannot be written: it is read-only; the earlier file is as it was")
    return followed(path)


def status(path: str | os.PathLike[str]) -> os.stat_result | None:
    """The status of a path's target, or None if nothing exists there. StorageError if nothing can exist
    there."""
    if "\0" in os.fspath(path):
        raise StorageError(f"{os.fspath(path)!r}: is not a file name: it has a zero byte")
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def same(found: os.stat_result, path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to the file with this status."""
    try:
        return os.path.samestat(found, os.stat(path))
    except (OSError, ValueError):  # an input that cannot be read is reported when it is read
        return False


def followed(path: Path) -> Path:
    """The target of a link, which need not exist yet. Any other path is returned as it was given."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def part_of(path: Path) -> str:
    """The beginning of the names of a file's temporary files."""
    raw = os.fsencode(path.name)
    return f".{path.name if len(raw) <= LONGEST else f'{zlib.crc32(raw):08x}'}."


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends without an error. StorageError if it cannot be
    written."""
    target = output(path)
    temporary = target.with_name(f"{part_of(target)}{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        file, named = create(temporary)
        with file:
            keep_owner(file.fileno(), target)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not named:
                give_name(file, temporary)
            os.replace(temporary, target)
    except OSError as error:
        kept = "; the earlier file is as it was" if target.exists() else ""
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder that appears at `path`, with its content, when the block ends without an error.
    StorageError if it cannot be written or if `path` exists: no system replaces a folder atomically."""
    found, target = status(path), followed(Path(path))
    if target.name in ("", ".."):
        raise StorageError(f"{path}: is not the name of a new folder. Name a folder that does not exist yet")
    if found is not None and not (stat.S_ISDIR(found.st_mode) and is_empty(target)):
        raise StorageError(f"{path}: exists already. Name a folder that does not exist yet, or an empty one")
    temporary = target.with_name(f"{part_of(target)}{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        temporary.mkdir()
        held = os.open(temporary, os.O_RDONLY)
        try:
            lock(held)
            keep_owner(held, target)
            yield temporary
            os.replace(temporary, target)
        finally:
            os.close(held)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """Whether a folder is empty. False if it cannot be read."""
    try:
        return not any(folder.iterdir())
    except OSError:
        return False


def keep_owner(descriptor: int, earlier: Path) -> None:
    """Give an open file or folder the permissions of the one that it replaces, and the owner where that is
    allowed. A private file is then never readable by others, not even while it is written."""
    if not hasattr(os, "fchmod"):  # Windows has neither
        return
    with suppress(FileNotFoundError):
        found = os.stat(earlier)
        with suppress(PermissionError):
            os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & 0o777)


def create(temporary: Path) -> tuple[BinaryIO, bool]:
    """(a new file, whether it has the temporary name already). It is locked while it is open."""
    file, named = None, False
    if hasattr(os, "O_TMPFILE") and os.path.isdir(FDS):
        with suppress(OSError):  # a file system without such files
            file = open(temporary.parent, "w+b", opener=nameless)  # noqa: SIM115  closed by atomic()
    if file is None:
        file, named = open(temporary, "w+b"), True  # noqa: SIM115
    lock(file)
    return file, named


def nameless(folder: str, _: int) -> int:
    return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)  # as in open(), the umask removes bits


def give_name(file: BinaryIO, name: Path) -> None:
    """Name a file that has none."""
    with suppress(FileNotFoundError):
        name.unlink()
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        # Given a folder, Python calls linkat. Only linkat can follow the link to the open file.
        os.link(f"{FDS}/{file.fileno()}", name.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:  # the file system makes such files but cannot name them: copy, to lose no results
        file.seek(0)
        with open(name, "w+b") as copy:
            os.fchmod(copy.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
            shutil.copyfileobj(file, copy, 1 << 22)
            copy.flush()
            os.fsync(copy.fileno())
    finally:
        os.close(folder)


def lock(file: IO[bytes] | int) -> bool:
    """Lock a file until it is closed. False if another process has it locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sweep(path: Path) -> None:
    """Remove the temporary files that ended processes left of this file. The process must not exist and the
    file must not be locked: a process of another machine or container cannot be seen here."""
    begin = part_of(path)
    for left in path.parent.glob(f"{glob.escape(begin)}*.part"):
        number = left.name.removeprefix(begin).removesuffix(".part")
        if number.isascii() and number.isdigit() and not lives(int(number)):
            with suppress(OSError):
                remove(left)


def remove(left: Path) -> None:
    """Remove a file or folder, unless it is locked."""
    file = os.open(left, os.O_RDONLY)
    try:
        if lock(file):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    finally:
        os.close(file)


def lives(process: int) -> bool:
    """Whether a process of this number exists. True if that cannot be determined."""
    if os.name != "posix":
        return True  # os.kill would end the process there
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


LOCKED = "lock"  # in a folder that one process at a time writes: what it claims


def claim(path: str | os.PathLike[str]) -> IO[bytes]:
    """An open lock file, which reserves its folder for this process. JournalError if another process has
    reserved it. StorageError if the file cannot be made."""
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
