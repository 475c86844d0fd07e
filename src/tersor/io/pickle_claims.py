"""Pickle claims: the memory that a file of torch.save asks for, found out before it is loaded.

torch.load(weights_only=True) runs no code, but it allocates what the pickle says: bytearray(3_000_000_000),
torch.Tensor(10**9), a storage of 10^9 elements that the file does not hold. The pickle is read once with
stubs in place of all objects. Cost: one pass over the pickle, without the tensors' bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tersor.errors import FormatError
from tersor.io.torch_records import DAMAGED

FREE, RATIO = 1 << 24, 32  # bytes that any file may ask for, and those per byte of the file
# Pickles at the start of a file that is no zip: magic number, version, system, objects, keys of storages.
LEGACY = 5
SIZES = {"Double": 8, "Long": 8, "ComplexDouble": 16, "ComplexFloat": 8, "Float": 4, "Int": 4, "Half": 2,
         "BFloat16": 2, "Short": 2}  # bytes of an element of FloatStorage and so on; of others 1  # fmt: skip
ALLOCATES = re.compile(r"bytearray|Tensor|\w*Storage|_rebuild_qtensor|_rebuild_sparse\w*|_rebuild_nested\w*")
UNREADABLE = (pickle.UnpicklingError, OSError, *DAMAGED)  # raised for what is no pickle, or is damaged


class Stub(dict[Any, Any]):
    """Stands for any object of a pickle."""

    word, room = "", 0

    def __new__(cls, *args: Any, **named: Any) -> Stub:
        if ALLOCATES.fullmatch(cls.word) and math.prod(integers(args)) > cls.room:
            raise TooMuch(cls.word)
        return super().__new__(cls)

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class TooMuch(Exception):
    """Raised with the name of what asks for too much."""


class Dry(pickle.Unpickler):
    """Reads a pickle without making its objects."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        super().__init__(file)
        self.room, self.storages = room, dict[str, int]()

    def find_class(self, module: str, name: str) -> Any:
        return type("Stub", (Stub,), {"word": name, "room": self.room})

    def persistent_load(self, found: Any) -> Any:
        """A storage: ("storage", type, key, place, elements, ...)."""
        if isinstance(found, tuple) and len(found) >= 5 and type(found[4]) is int:
            word = getattr(found[1], "word", "").removesuffix("Storage")
            self.storages[str(found[2])[:200]] = found[4] * SIZES.get(word, 1)
            if sum(self.storages.values()) > self.room:
                raise TooMuch("a storage")
        return Stub()


def integers(values: Any) -> Iterator[int]:
    """The whole numbers above 0 in arguments and in lists and tuples among them."""
    for value in values:
        if type(value) is int and value > 0:
            yield value
        elif type(value) in (tuple, list):
            yield from (item for item in value if type(item) is int and item > 0)


def check_claims(path: Path) -> None:
    """FormatError if loading a file of torch.save would take more memory than its size justifies."""
    nbytes = path.stat().st_size
    room = FREE + RATIO * nbytes
    try:
        for file in pickles(path, room):
            with suppress(*UNREADABLE):  # the next one is looked at, too: torch may read no other
                Dry(file, room).load()
    except TooMuch as error:
        refuse(path, nbytes, f"{error.args[0]} in it asks for more memory")
    except MemoryError:  # a number that an object has in it: the reader keeps a table of these
        refuse(path, nbytes, "a number of an object in it asks for more memory")
    except UNREADABLE:  # torch.load says why
        return


def pickles(path: Path, room: int) -> Iterator[BinaryIO]:
    """The pickles of a file. Those of a zip are inflated here, at most `room` bytes of all its records."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            for _ in range(LEGACY):
                yield file
        return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > room:
            raise TooMuch("a record")
        for name in archive.namelist():
            if name.endswith((".pkl", "/data.pkl")):
                with suppress(*UNREADABLE):
                    yield io.BytesIO(archive.read(name))


def refuse(path: Path, nbytes: int, why: str) -> NoReturn:
    raise FormatError(
        f"{path}: {why} than a file of {nbytes:,} bytes justifies ({FREE + RATIO * nbytes:,} bytes). It is "
        f"damaged, or made to fill the memory of whoever loads it"
    )
