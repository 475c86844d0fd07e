"""Shared by the tests of coders: symbols of many distributions, and the second decoder."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "reference"))

import predictive  # noqa: E402
import static  # noqa: E402
import streams  # noqa: E402

reference, predictive_reference, static_reference = streams, predictive, static
LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 100, 255, 256, 257, 1000, 4097, 9001)
Draw = Callable[[np.random.Generator, int], np.ndarray]


def as_bytes(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.int64) % 256).astype(np.uint8)


def normal(deviation: float, center: float) -> Draw:
    return lambda rng, n: as_bytes(np.rint(rng.normal(center, deviation, n)))


def coin(share: float) -> Draw:
    return lambda rng, n: (rng.random(n) < share).astype(np.uint8)


def pruned(rng: np.random.Generator, n: int) -> np.ndarray:
    """Codes of mostly zero weights: int8 as bytes."""
    return as_bytes(np.where(rng.random(n) < 0.8, 0, np.rint(rng.normal(0, 30, n)).clip(-127, 127)))


def sparse(rng: np.random.Generator, n: int) -> np.ndarray:
    """Few distant symbols of very unequal frequencies."""
    symbols = rng.choice(256, rng.integers(2, 12), replace=False).astype(np.uint8)
    share = rng.dirichlet(np.full(len(symbols), 0.3))
    return rng.choice(symbols, n, p=share)


KINDS: dict[str, Draw] = {
    "any": lambda rng, n: rng.integers(0, 256, n).astype(np.uint8),
    "4 bits": lambda rng, n: rng.integers(0, 16, n).astype(np.uint8),
    "one symbol": lambda rng, n: np.full(n, rng.integers(0, 256), dtype=np.uint8),
    "coin 0.5": coin(0.5),
    "coin 0.05": coin(0.05),
    "coin 0.001": coin(0.001),
    "ternary": lambda rng, n: rng.choice(np.array([0, 1, 2], dtype=np.uint8), n, p=[0.2, 0.65, 0.15]),
    "normal 30": normal(30, 128),
    "normal 30, signed": normal(30, 0),
    "normal 2": normal(2, 7.5),
    "Laplace": lambda rng, n: as_bytes(np.rint(rng.laplace(0, 20, n)).clip(-127, 127)),
    "geometric": lambda rng, n: as_bytes(rng.geometric(0.3, n).clip(1, 200)),
    "pruned": pruned,
    "sparse": sparse,
}


def make(kind: str, length: int, seed: int = 0) -> np.ndarray:
    return KINDS[kind](np.random.default_rng(seed), length)


@st.composite
def symbol_streams(draw: st.DrawFn) -> np.ndarray:
    """Short streams of arbitrary bytes, and longer ones by kind, length and seed."""
    if draw(st.booleans()):
        return np.frombuffer(draw(st.binary(max_size=40)), dtype=np.uint8)
    kind = draw(st.sampled_from(sorted(KINDS)))
    return make(kind, draw(st.sampled_from(LENGTHS)), draw(st.integers(0, 2**32 - 1)))
