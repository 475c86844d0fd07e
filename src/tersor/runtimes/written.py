"""Written: the files of an export, all of them complete and in place, or none.

They are written to a temporary folder beside the target, checked there, and moved into place with os.replace:
a reader sees the old file or the new one, never a part of one. Cost: one more read, for the hash.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tersor.errors import StorageError
from tersor.files import lock, part_of, sweep

CHUNK = 1 << 20


@dataclass(frozen=True)
class Written:
    """The written files: the main file, and bytes and hash including the files that it needs beside it."""

    path: Path
    nbytes: int  # of all files together
    sha256: str  # hex, of the files' bytes in the order of their names
    files: tuple[str, ...]  # names in the folder of `path`
    left_out: tuple[str, ...] = ()  # outputs of the model that the file does not have, with their types
    # Weights stored in few bits -> why they are floats in the runtime; "" for those that stay packed there.
    floats: Mapping[str, str] = field(default_factory=dict)
    # Weights stored as 16-bit floats -> why the files hold them in 32 bits; "" for those in 16.
    halves: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def workshop(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` that is removed afterwards. StorageError if nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)  # what a killed process left
        folder = path.with_name(f"{part_of(path)}{os.getpid()}.part")
        folder.mkdir()
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        held = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
        try:
            if held is not None:
                lock(held)
            yield folder
        finally:
            if held is not None:
                os.close(held)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def into_place(folder: Path, path: Path) -> Written:
    """Move every file of the folder to the folder of `path`; `path` itself is last, since it may need the
    others."""
    names = sorted(item.name for item in folder.iterdir())
    digest, nbytes = hashlib.sha256(), 0
    for name in names:
        with (folder / name).open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
                nbytes += len(block)
    for name in sorted(names, key=lambda name: name == path.name):
        os.replace(folder / name, path.parent / name)
    return Written(path, nbytes, digest.hexdigest(), tuple(names))
