"""Coders: bytes compared with the order-0 bound, and speed compared with a plain copy and zstandard.

python bench/coders.py [--symbols 4000000] [--rounds 7] [--record]
Speed is in millions of symbols a second of one core's time, the best of several rounds, taken in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from table import Row, record

from tersor.coders import decode, encode, order0_bits

HEAD = f"{'stream':24} {'coder':8} {'bytes':>9} {'over bound':>10} {'encode':>8} {'decode':>8} {'of copy':>8}"
LONG = 100_000  # symbols; for longer streams, the target is 1 % over the bound
SHORT = 2000
TIMED = "int8 normal"  # the stream with a target for speed


class Contestant(NamedTuple):
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, int], np.ndarray]


def streams(symbols: int) -> dict[str, np.ndarray]:
    """Streams like those of quantized, pruned and clustered weights."""
    rng = np.random.default_rng(0)

    def signed(values: np.ndarray) -> np.ndarray:
        return np.rint(values).clip(-127, 127).astype(np.int8).view(np.uint8)

    def kinds(n: int) -> dict[str, np.ndarray]:
        normal = rng.normal(0, 30, n)
        return {
            "int8 normal": signed(normal),
            "int8 Laplace": signed(rng.laplace(0, 20, n)),
            "int8, 80 % pruned": signed(np.where(rng.random(n) < 0.8, 0, normal)),
            "16 clusters": np.rint(rng.normal(7.5, 2.5, n)).clip(0, 15).astype(np.uint8),
            "ternary": rng.choice(np.array([0, 1, 2], dtype=np.uint8), n, p=[0.2, 0.65, 0.15]),
            "mask, 5 % kept": (rng.random(n) < 0.05).astype(np.uint8),
            "mask, 0.1 % kept": (rng.random(n) < 0.001).astype(np.uint8),
        }

    return kinds(symbols) | {f"{name}, short": stream for name, stream in kinds(SHORT).items()}


def contestants() -> dict[str, Contestant]:
    table = {
        name: Contestant(lambda s, name=name: encode(s, name), decode) for name in ("fast", "rans", "huffman")
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        packer, unpacker = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
        table["zstd -3"] = Contestant(
            lambda s: packer.compress(s.tobytes()),
            lambda data, count: np.frombuffer(unpacker.decompress(data), dtype=np.uint8),
        )
    return table


class Result(NamedTuple):
    nbytes: int
    encode_seconds: float
    decode_seconds: float


def seconds(call: Callable[[], object]) -> float:
    """CPU time of this thread: waiting for a core that others use does not count."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measure(stream: np.ndarray, rounds: int) -> tuple[float, dict[str, Result]]:
    """Seconds of a copy, and the best of each coder."""
    target = np.empty_like(stream)
    copy = float("inf")
    results: dict[str, Result] = {}
    for _ in range(rounds):
        copy = min(copy, seconds(lambda: np.copyto(target, stream)))
        for name, contestant in contestants().items():
            data = contestant.encode(stream)
            if (contestant.decode(data, len(stream)) != stream).any():
                raise ValueError(f"{name} does not return what it was given")
            took = Result(
                len(data),
                seconds(lambda contestant=contestant: contestant.encode(stream)),
                seconds(lambda contestant=contestant, data=data: contestant.decode(data, len(stream))),
            )
            before = results.get(name, took)
            results[name] = Result(*(min(pair) for pair in zip(took, before, strict=True)))
    return copy, results


def rows_for(name: str, stream: np.ndarray, copy: float, results: dict[str, Result]) -> list[Row]:
    bound = order0_bits(stream) / 8
    note = f"{len(stream)} symbols, bound {bound:.0f} B"
    rows = [
        Row("coders", name, f"bytes, {coder}", took.nbytes, "B", note=note) for coder, took in results.items()
    ]
    if len(stream) >= LONG:
        over = 100 * (results["fast"].nbytes / bound - 1)
        rows.append(Row("coders", name, "over the order-0 bound", over, "%", "<= 1"))
    if name == TIMED and len(stream) >= LONG:
        for coder, encode_target, decode_target in (("rans", ">= 50", ">= 150"), ("huffman", "", "")):
            took = results[coder]
            for what, pace, target in (
                ("encode", mps(stream, took.encode_seconds), encode_target),
                ("decode", mps(stream, took.decode_seconds), decode_target),
            ):
                row = Row(
                    "coders", name, f"{what}, {coder}", pace, "MB/s", target, note="one core's CPU time"
                )
                rows.append(row)
            share = 100 * copy / took.decode_seconds
            rows.append(
                Row("coders", name, f"decode, {coder}, share of a copy's speed", round(share, 1), "%")
            )
    return rows


def mps(stream: np.ndarray, took: float) -> float:
    return round(len(stream) / took / 1e6)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--symbols", type=int, default=4_000_000, help="length of the long streams")
    parser.add_argument("--rounds", type=int, default=7, help="the best round counts")
    parser.add_argument("--record", action="store_true", help="put the numbers into bench/results.csv")
    options = parser.parse_args(argv)
    print(HEAD)
    rows: list[Row] = []
    for name, stream in streams(options.symbols).items():
        copy, results = measure(stream, options.rounds)
        bound = order0_bits(stream) / 8
        print(f"{name:24} {'bound':8} {bound:9.0f} {'':10} {'':8} {mps(stream, copy):8.0f} {'copy':>8}")
        for coder, took in results.items():
            over = 100 * (took.nbytes / bound - 1)
            speeds = f"{mps(stream, took.encode_seconds):8.0f} {mps(stream, took.decode_seconds):8.0f}"
            print(
                f"{'':24} {coder:8} {took.nbytes:9} {over:9.2f}% {speeds} {copy / took.decode_seconds:8.3f}"
            )
        rows += rows_for(name, stream, copy, results)
    if options.record:
        record(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
