"""Matrices of codes, masks, and all options of the matrix coders."""

from dataclasses import dataclass

import numpy as np
from coder_cases import as_bytes
from hypothesis import strategies as st

from tersor.coders.mixing import mixing
from tersor.coders.predictive import predictive

SHAPES = ((1, 1), (1, 2), (2, 1), (1, 90), (90, 1), (3, 5), (7, 31), (31, 7), (66, 9), (9, 66), (24, 40))
LONG = ((66, 2), (130, 12), (200, 21), (129, 64))  # more than one block, more than one update of L
TALL = ((300, 2), (3, 290))  # more rows than the history of the row predictor, plain or transposed
WIDE = ((70, 260), (2, 515))  # more than one band of columns


def drawn(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """A matrix [R, C] uint8."""
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.normal(0, 1, shape[0]))[:, None] * np.exp2(rng.normal(0, 1, shape[1]))
    kinds = {
        "constant": lambda: np.full(shape, seed % 256),
        "any": lambda: rng.integers(0, 256, shape),
        "extreme": lambda: rng.choice((-128, 127), shape),
        "extreme and zero": lambda: rng.choice((-128, 0, 127), shape, p=(0.1, 0.8, 0.1)),
        "normal": lambda: np.rint(rng.normal(0, 6, shape) * scale).clip(-128, 127),
        "small": lambda: np.rint(rng.normal(8, 2, shape)).clip(0, 15),
        "sparse": lambda: np.where(
            rng.random(shape) < 0.8, 0, np.rint(rng.normal(0, 9, shape)).clip(-128, 127)
        ),
        "mask": lambda: rng.random(shape) < 0.1,
        "skewed": lambda: np.minimum(rng.integers(0, 190, shape), rng.integers(0, 190, shape)),
        "linear": lambda: np.rint(linear(rng, shape)).clip(-128, 127),
    }
    return as_bytes(np.asarray(kinds[kind]()))


def linear(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Columns that can be predicted from other columns."""
    return 20 * rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1])) + rng.normal(size=shape)


KINDS = (
    "constant", "any", "extreme", "extreme and zero", "normal", "small", "sparse", "mask", "skewed", "linear",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The arguments of encode, and the name of the case."""

    symbols: np.ndarray
    width: int
    keep: np.ndarray | None
    name: str

    def __repr__(self) -> str:
        return self.name


@st.composite
def cases(draw: st.DrawFn, shapes: tuple[tuple[int, int], ...] = SHAPES, masked: bool = True) -> Case:
    kind, shape = draw(st.sampled_from(KINDS)), draw(st.sampled_from(shapes))
    seed = draw(st.integers(0, 2**32 - 1))
    share = draw(st.sampled_from((None, None, 0.0, 0.1, 0.6, 1.0))) if masked else None
    matrix = drawn(kind, shape, seed)
    keep = None if share is None else np.random.default_rng(seed + 1).random(shape) < share
    symbols = matrix.ravel() if keep is None else matrix[keep]
    return Case(symbols, shape[1], keep, f"{kind} {shape} seed {seed} keep {share}")


@st.composite
def mixing_streams(draw: st.DrawFn, shapes: tuple[tuple[int, int], ...] = SHAPES) -> tuple[Case, bytes]:
    """A stream with any settings, not only with those that the encoder would choose."""
    case = draw(cases(shapes).filter(lambda case: len(case.symbols) > 0))
    lags = draw(st.tuples(st.integers(0, 255), st.integers(0, 9)))
    options = mixing.Options(draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 3)), lags)
    signs = mixing.signs_of(case.symbols)
    return case, mixing.write(signs.values(case.symbols), case.width, case.keep, options, signs)


@st.composite
def predictive_streams(draw: st.DrawFn, shapes: tuple[tuple[int, int], ...] = LONG) -> tuple[Case, bytes]:
    """The same, sometimes with levels that do not fit the codes, so that sums and means wrap."""
    case = draw(cases(shapes, masked=False))
    options = predictive.Options(draw(st.booleans()), draw(st.integers(0, 4)))
    center = draw(st.integers(0, 255))
    codes = (case.symbols - np.uint8(center)).view(np.int8).reshape(-1, case.width)
    codes = np.ascontiguousarray(codes.T if options.transposed else codes)
    if draw(st.booleans()):
        return case, predictive.write(predictive.fit(codes, options), center)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    low, high = draw(st.sampled_from(((0, 128), (0, 3), (120, 128))))
    rows, columns = (rng.integers(low, high, n).astype(np.uint8) for n in codes.shape)
    return case, predictive.write(predictive.fit_with(codes, options, rows, columns), center)
