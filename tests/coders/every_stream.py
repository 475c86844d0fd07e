"""Print the digests of streams by every coder, after decoding each one: python tests/coders/every_stream.py

`make test-cpus` compares the output of processes for different processors. Every compiled loop of the coders
must run here, so a new loop needs a case here.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import coder_cases
import matrix_cases
import numpy as np

from tersor.coders import decode, encode
from tersor.coders.arrays import decode_array, encode_array
from tersor.coders.rans import cpu_loops
from tersor.compiled import Compiled, loop_modules
from tersor.errors import SettingError

INNER = {"add_moments", "eliminate"}  # loops that only other loops call
LENGTHS = (1, 2, 257, 9001, 50000, 150001)  # from 1 to 32 states, from one piece to several
SHAPES = ((24, 40), (200, 21), (129, 64), (300, 40), (70, 260), (2, 3000), (1000, 7))
SHARES = (None, 0.1, 0.6)  # fraction of the elements that the mask keeps


def streams() -> Iterator[tuple[str, bytes]]:
    """(name, stream) of all cases."""
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
    """One stream, or none if the coder cannot code the symbols."""
    try:
        stream = encode(symbols, coder, width=width, keep=keep)
    except SettingError:
        return
    expect(name, decode(stream, len(symbols), width=width, keep=keep), symbols)
    yield name, stream


def floats(itemsize: int, count: int, coder: str) -> bytes:
    """The streams of normal floats. Floats of 2 bytes are the upper halves of float32."""
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
        sys.exit(f"{name}: the decoded symbols differ")


def watched() -> dict[str, int]:
    """Count the calls of each compiled loop from now on."""
    calls: dict[str, int] = {}

    def counted(name: str, loop: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return loop(*args)

        return call

    names = [name for name in loop_modules() if name.startswith("tersor.coders.")]
    for module in [importlib.import_module(name) for name in names]:  # import all before patching any
        for name, loop in list(vars(module).items()):
            if isinstance(loop, Compiled) and loop.module == module.__name__:
                calls[name] = 0
                setattr(module, name, counted(name, loop))
    return calls


if __name__ == "__main__":
    calls = watched()
    digests = {name: hashlib.sha256(stream).hexdigest() for name, stream in streams()}
    if idle := {name for name, count in calls.items() if not count} - INNER:
        sys.exit(f"no stream here uses {', '.join(sorted(idle))}: add one to streams()")
    print(json.dumps({"variant": cpu_loops.VARIANT, "digests": digests}))
