"""Files: written whole or not at all.

A file is written under a temporary name beside its place and moved there when it is complete, so that a
full disk, a kill or an error leaves what was there before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tersor.errors import StorageError


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends well. StorageError where it cannot be
    written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the earlier file is as it was" if path.exists() else ""
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())
