"""The digests of streams by every coder, each of which is read again: python tests/coders/every_stream.py

For `make test-cpus`, which compares what processes for different processors print. Every compiled loop of the
coders must run, so a new one asks for a case here.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import coder_cases
import matrix_cases
import numpy as np

import tersor.coders
from tersor.coders import decode, encode
from tersor.coders.arrays import decode_array, encode_array
from tersor.coders.rans import cpu_loops
from tersor.compiled import Compiled
from tersor.errors import SettingError

INNER = {"add_moments", "eliminate"}  # which only other loops call
LENGTHS = (1, 2, 257, 9001, 50000, 150001)  # from one state to 32, from one piece to several
SHAPES = ((24, 40), (200, 21), (129, 64), (300, 40), (70, 260), (2, 3000), (1000, 7))
SHARES = (None, 0.1, 0.6)  # of the elements that a mask keeps


def streams() -> Iterator[tuple[str, bytes]]:
    """(name, stream) of everything that can be written."""
    for kind, length, coder in product(coder_cases.KINDS, LENGTHS, ("raw", "huffman", "rans", "fast")):
        yield from written(f"{coder}: {length} x {kind}", coder, coder_cases.make(kind, length))
    for kind, shape, share in product(matrix_cases.KINDS, SHAPES, SHARES):
        matrix = matrix_cases.drawn(kind, shape, seed=0)
        keep = None if share is None else np.random.default_rng(1).random(shape) < share
        symbols = matrix.ravel() if keep is None else matrix[keep]
        for coder in ("predictive", "mixing", "max"):
            yield from written(f"{coder}: {shape} {kind} {share}", coder, symbols, shape[1], keep)
    for itemsize, count, coder in product((2, 4, 8), (1, 5000, 300001, (1 << 20) + 3), ("fast", "max")):
        yield f"{coder}: {count} floats of {itemsize} bytes", floats(itemsize, count, coder)


def written(
    name: str, coder: str, symbols: np.ndarray, width: int = 0, keep: np.ndarray | None = None
) -> Iterator[tuple[str, bytes]]:
    """One stream, or none where this coder cannot hold the symbols."""
    try:
        stream = encode(symbols, coder, width=width, keep=keep)
    except SettingError:
        return
    expect(name, decode(stream, len(symbols), width=width, keep=keep), symbols)
    yield name, stream


def floats(itemsize: int, count: int, coder: str) -> bytes:
    """The streams of normal floats, of 2 bytes the upper half of 4."""
    values = np.random.default_rng(0).normal(0, 0.1, count)
    whole = values if itemsize == 8 else values.astype(np.float32)
    data = np.ascontiguousarray(whole.view(np.uint8).reshape(count, -1)[:, -itemsize:]).ravel()
    found, lengths = encode_array(
        lambda a, b: data[a * itemsize : b * itemsize], count, itemsize, turned=True, coder=coder, width=1
    )
    expect(f"{count} floats", decode_array(found, lengths, itemsize, count, turned=True, width=1), data)
    return found.tobytes()


def expect(name: str, found: np.ndarray, given: np.ndarray) -> None:
    if not np.array_equal(found, given):
        sys.exit(f"{name}: it is not read as it was written")


def watched() -> dict[str, int]:
    """Calls of each compiled loop, counted from here on."""
    calls: dict[str, int] = {}

    def counted(name: str, loop: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls[name] += 1
            return loop(*given)

        return call

    folder = Path(tersor.coders.__path__[0])
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*_loops.py")]
    names = [".".join(("tersor.coders", *path.parts)) for path in paths]
    for module in [importlib.import_module(name) for name in names]:  # all of them first
        for name, loop in list(vars(module).items()):
            if isinstance(loop, Compiled) and loop.module == module.__name__:
                calls[name] = 0
                setattr(module, name, counted(name, loop))
    return calls


if __name__ == "__main__":
    calls = watched()
    digests = {name: hashlib.sha256(stream).hexdigest() for name, stream in streams()}
    if idle := {name for name, count in calls.items() if not count} - INNER:
        sys.exit(f"no stream here needs {', '.join(sorted(idle))}: add one to streams()")
    print(json.dumps({"way": cpu_loops.HERE, "digests": digests}))
