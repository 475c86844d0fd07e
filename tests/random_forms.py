"""Random forms for property tests, and what they stand for by slow loops in numpy.

BUILDERS and SLOW hold one function for each form in the table. A new form fails test_forms.py until both are
there: BUILDERS says how an instance of a given shape is drawn, SLOW decodes it element by element, from the
form's paragraph in docs/format.md and without torch's arithmetic.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tersor.coders import decode as decode_stream
from tersor.encode import coded
from tersor.forms import FORMS, Affine, Codebook, Coded, Dense, Form, LogGrid, LowRank, Masked, Sum

Shape = tuple[int, ...]
SHAPES: tuple[Shape, ...] = (
    (1, 1), (7, 1), (1, 7), (5, 3, 3, 3), (2, 6, 5), (4, 10), (5,), (1,), (), (0, 3), (3, 0), (0,), (2, 0, 3),
)  # fmt: skip
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEPTH = 2  # deeper than this, only forms whose children are leaves


@dataclass
class Draw:
    """Hypothesis picks the structure; a generator that it seeds fills the arrays: they need no shrinking."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    generator: torch.Generator

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def whole(self, low: int, high: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).to(dtype)

    def mask(self, shape: Shape) -> Tensor:
        share = self.pick(0.0, 0.1, 0.5, 1.0)
        return torch.rand(shape, generator=self.generator) < share

    def leaf(self, array: Tensor, keep: Tensor | None = None) -> Form:
        """Plain, or coded: with a mask above also without what it hides."""
        how = self.pick("dense", "dense", "coded", "kept")
        if how == "dense":
            return Dense(array)
        return coded(array, keep if how == "kept" else None, self.coder())

    def scale(self, shape: Shape) -> Form:
        """Of a grid: a table, or one row of steps times one column of them."""
        if self.pick(True, True, False):
            return self.leaf(self.normal(*shape).abs())
        left, right = self.normal(shape[0], 1).abs(), self.normal(1, shape[1]).abs()
        return LowRank(self.leaf(left), self.leaf(right))

    def coder(self) -> str:
        """Mostly the one that costs no time: coders have tests of their own."""
        return str(self.pick("raw", "raw", "raw", "huffman", "rans", "mixing"))

    def weights(self, shape: Shape, depth: int, keep: Tensor | None = None) -> Form:
        """Any form of floats with this shape; `keep` is the mask above it."""
        names = [name for name in FORMS if name in BUILDERS and (len(shape) >= 2 or name != "lowrank")]
        flat = ("dense", "coded", "affine", "codebook", "loggrid")
        name = self.draw(st.sampled_from([n for n in names if depth < DEPTH or n in flat]))
        return BUILDERS[name](self, shape, depth, keep)


def rows_of(shape: Shape, axis: int) -> tuple[int, int]:
    """(O, I) of the matrix whose rows share a grid."""
    if len(shape) <= 1:
        return 1, math.prod(shape)
    return shape[axis], math.prod(shape[:axis] + shape[axis + 1 :])


class Lines(NamedTuple):
    """What shares a grid: all, a row, or a group of columns, even, ragged or scattered."""

    axis: int
    scales: Shape
    group: int = 0
    runs: tuple[int, ...] = ()
    member: Tensor | None = None


def grid(d: Draw, shape: Shape) -> Lines:
    axis = d.pick(*range(len(shape))) if len(shape) >= 2 else 0
    rows, columns = rows_of(shape, axis)
    per = d.pick("tensor", "channel", "group", "runs", "member")
    if per in ("tensor", "channel"):
        return Lines(axis, (1, 1) if per == "tensor" else (rows, 1))
    if per == "member":
        count = d.pick(1, 2, 5)
        dtype = d.pick(torch.uint8, torch.int16, torch.int32)
        scales = (rows, count) if count > 1 else d.pick((1, 1), (rows, 1))
        return Lines(axis, scales, member=d.whole(0, count - 1, (columns,), dtype))
    if per == "runs" and columns:
        edges = torch.rand(columns - 1, generator=d.generator) < d.pick(0.1, 0.5, 1.0)
        ends = [*(edges.nonzero().flatten() + 1).tolist(), columns]
        runs = tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))
        return Lines(axis, d.pick((rows, len(runs)), (rows, len(runs)), (rows, 1), (1, 1)), runs=runs)
    group = d.pick(1, 2, 3, 64)
    return Lines(axis, (rows, -(-columns // group)), group)


def dense(d: Draw, shape: Shape, depth: int = 0, keep: Tensor | None = None) -> Dense:
    return Dense(d.normal(*shape))


def coded_floats(d: Draw, shape: Shape, depth: int = 0, keep: Tensor | None = None) -> Coded:
    array = d.normal(*shape) if d.pick(True, False) else d.whole(-1, 1, shape, torch.float32)
    return coded(array, keep if d.pick(True, False) else None, d.coder())


def masked(d: Draw, shape: Shape, depth: int = 0, keep: Tensor | None = None) -> Masked:
    mine = d.mask(shape)
    within = mine if keep is None else mine & keep
    return Masked(d.leaf(mine), d.weights(shape, depth + 1, within))


def affine(d: Draw, shape: Shape, depth: int = 0, keep: Tensor | None = None) -> Affine:
    bits = d.pick(1, 2, 3, 8, 9, 16)
    axis, scales, group, runs, member = grid(d, shape)
    half = 2 ** (bits - 1)
    codes = d.whole(-half, half - 1, shape, torch.int8 if bits <= 8 else torch.int16)
    wide = torch.int16 if bits <= 8 else torch.int32
    zero = d.leaf(d.whole(-half, half - 1, scales, wide)) if d.pick(True, False) else None
    groups = None if member is None else d.leaf(member)
    return Affine(d.leaf(codes, keep), d.scale(scales), zero, bits, group, axis, runs, groups)


def codebook(d: Draw, shape: Shape, depth: int = 0, keep: Tensor | None = None) -> Codebook:
    axis, scales, *_ = grid(d, shape)
    entries = d.pick(1, 2, 3, 16, 256, 300)
    rows, _ = rows_of(shape, axis)
    index = d.whole(0, entries - 1, shape, torch.uint8 if entries <= 256 else torch.int16)
    book = d.normal(*((entries,) if d.pick(True, False) else (rows, entries)))
    scale = d.leaf(d.normal(*(scales if scales[1] == 1 else (rows, 1)))) if d.pick(True, False) else None
    return Codebook(d.leaf(index, keep), d.leaf(book), scale, axis)


def loggrid(d: Draw, shape: Shape, depth: int = 0, keep: Tensor | None = None) -> LogGrid:
    bits, terms = d.pick(2, 3, 4, 5, 8), d.pick(1, 2)
    axis, scales, group, runs, member = grid(d, shape)
    groups = None if member is None else d.leaf(member)
    top = 2 ** (bits - 1) - 1
    codes = d.leaf(d.whole(-top, top, shape, torch.int8), keep)
    return LogGrid(codes, d.scale(scales), bits, terms, group, axis, runs, groups)


def lowrank(d: Draw, shape: Shape, depth: int = 0, keep: Tensor | None = None) -> LowRank:
    rank = d.pick(1, 2, 5)
    return LowRank(d.weights((shape[0], rank), depth + 1), d.weights((rank, *shape[1:]), depth + 1))


def total(d: Draw, shape: Shape, depth: int = 0, keep: Tensor | None = None) -> Sum:
    return Sum(d.weights(shape, depth + 1, keep), d.weights(shape, depth + 1, keep))


BUILDERS: dict[str, Callable[..., Form]] = {
    "dense": dense, "coded": coded_floats, "masked": masked, "affine": affine, "codebook": codebook,
    "loggrid": loggrid, "lowrank": lowrank, "sum": total,
}  # fmt: skip


@st.composite
def forms(draw: Any, name: str | None = None, shapes: tuple[Shape, ...] = SHAPES) -> Form:
    """A random form: of one kind at the top where `name` is given, of any kind below."""
    fitting = [shape for shape in shapes if len(shape) >= 2 or name != "lowrank"]
    shape = draw(st.sampled_from(fitting))
    d = Draw(draw, torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    return d.weights(shape, 0) if name is None else BUILDERS[name](d, shape, 0, None)


# --- what forms stand for, element by element ---

Hidden = np.ndarray | None  # bool, of the form's shape: what a mask above keeps


def slow(form: Form, keep: Hidden = None) -> np.ndarray:
    """decode() by loops. Where `keep` is False the value means nothing."""
    return SLOW[form.name](form, keep)


def places(shape: Shape) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def place_in_grid(at: tuple[int, ...], shape: Shape, axis: int) -> tuple[int, int]:
    """(row, column) of an element; a vector is one row."""
    if len(shape) <= 1:
        return 0, at[0] if at else 0
    row, column = at[axis], 0
    for a in range(len(shape)):
        if a != axis:
            column = column * shape[a] + at[a]
    return row, column


def shared(table: np.ndarray, row: int, column: int, form: Any) -> Any:
    """The entry of a [1, 1], [O, 1] or [O, G] table that counts for one element."""
    return table[row if table.shape[0] > 1 else 0, group_of(form, column) if table.shape[1] > 1 else 0]


def group_of(form: Any, column: int) -> int:
    if form.member is not None:
        return int(slow(form.member)[column])
    for number, length in enumerate(form.runs):
        if column < length:
            return number
        column -= length
    return column // form.group


def slow_dense(form: Dense, keep: Hidden) -> np.ndarray:
    return form.array.numpy()


def element(pieces: list[int], turned: bool) -> bytes:
    """The bytes of one element, the lowest first; if it was turned, its lowest bit goes back to the top."""
    number, bits = sum(int(piece) << 8 * k for k, piece in enumerate(pieces)), 8 * len(pieces)
    if turned:
        number = number >> 1 | (number & 1) << bits - 1
    return number.to_bytes(len(pieces), "little")


def slow_coded(form: Coded, keep: Hidden) -> np.ndarray:
    dtype = np.dtype(form.dtype)
    count = math.prod(form.size)
    elements = int(keep.sum()) if form.kept and keep is not None else count
    start, planes = 0, []
    columns = math.prod(form.size[1:]) if len(form.size) > 1 and not form.pack else 0
    mask = keep.reshape(-1) if form.kept and keep is not None and not form.pack else None
    for length in form.planes:
        symbols = -(-elements // 8) if form.pack else elements
        stream = form.data.numpy()[start : start + length]
        planes.append(decode_stream(stream, symbols, width=columns, keep=mask))
        start += length
    if form.pack:
        bits = [planes[0][k // 8] >> (7 - k % 8) & 1 for k in range(elements)]
        values = np.array(bits, dtype=np.uint8).view(bool)
    else:
        raw = b"".join(element([plane[k] for plane in planes], form.turned) for k in range(elements))
        values = np.frombuffer(raw, dtype)
    whole, source = np.zeros(form.size, dtype), iter(values)
    for at in places(form.size):
        if not form.kept or keep is None or keep[at]:
            whole[at] = next(source)
    return whole


def slow_masked(form: Masked, keep: Hidden) -> np.ndarray:
    mine = slow(form.keep)
    within = mine if keep is None else mine & keep
    body = slow(form.body, within).copy()
    for at in places(body.shape):
        if not mine[at]:
            body[at] = 0
    return body


def slow_affine(form: Affine, keep: Hidden) -> np.ndarray:
    codes, scale = slow(form.codes, keep), slow(form.scale)
    zero = None if form.zero is None else slow(form.zero)
    w = np.zeros(codes.shape, np.float32)
    for at in places(codes.shape):
        row, column = place_in_grid(at, codes.shape, form.axis)
        shift = 0 if zero is None else int(shared(zero, row, column, form))
        w[at] = np.float32(int(codes[at]) - shift) * shared(scale, row, column, form)
    return w


def slow_codebook(form: Codebook, keep: Hidden) -> np.ndarray:
    index, book = slow(form.index, keep), slow(form.book)
    scale = None if form.scale is None else slow(form.scale)
    w = np.zeros(index.shape, np.float32)
    for at in places(index.shape):
        row, column = place_in_grid(at, index.shape, form.axis)
        value = book[int(index[at])] if book.ndim == 1 else book[row, int(index[at])]
        w[at] = value if scale is None else value * shared(scale, row, column, form)
    return w


def slow_loggrid(form: LogGrid, keep: Hidden) -> np.ndarray:
    codes, scale = slow(form.codes, keep), slow(form.scale)
    levels = log_levels(form.bits, form.terms)
    w = np.zeros(codes.shape, np.float32)
    for at in places(codes.shape):
        row, column = place_in_grid(at, codes.shape, form.axis)
        code = int(codes[at])
        w[at] = np.float32(math.copysign(levels[abs(code)], code)) * shared(scale, row, column, form)
    return w


def log_levels(bits: int, terms: int) -> list[float]:
    """0 and powers of two, or the sums of two that draw their exponents in turns."""
    count = 2 ** (bits - 1)
    if terms == 1:
        return [0.0, *(0.5**e for e in reversed(range(count - 1)))]
    if (bits - 1) % 2 == 0:
        each = math.isqrt(count) - 1
        first, second = [2 * e for e in range(each)], [2 * e + 1 for e in range(each)]
    else:
        few = math.isqrt(count // 2) - 1
        many = 2 * few + 1
        exponents = range(many + few)
        first = [e for e in exponents if e % 3 != 2]
        second = [e for e in exponents if e % 3 == 2]
    sums = sorted(p + q for p in (0, *(0.5**e for e in first)) for q in (0, *(0.5**e for e in second)))
    return [s / sums[-1] for s in sums]


def slow_lowrank(form: LowRank, keep: Hidden) -> np.ndarray:
    left, right = slow(form.left), slow(form.right)
    w = np.zeros((left.shape[0], *right.shape[1:]), np.float64)
    for at in places(w.shape):
        w[at] = sum(float(left[at[0], r]) * float(right[(r, *at[1:])]) for r in range(left.shape[1]))
    return w


def slow_sum(form: Sum, keep: Hidden) -> np.ndarray:
    a, b = slow(form.a, keep), slow(form.b, keep)
    w = np.zeros(a.shape, np.result_type(a, b))
    for at in places(a.shape):
        w[at] = a[at] + b[at]
    return w


def close(got: Tensor, want: np.ndarray, form: Form) -> bool:
    """Exact, except below products of factors: their float sums come in another order."""
    if tuple(got.shape) != want.shape:
        return False
    sums = [node for _, node in form.walk() if isinstance(node, LowRank)]
    if not sums:
        return np.array_equal(got.numpy(), want)
    size = max(
        [
            1.0,
            *(
                float(part.decode().abs().max())
                for n in sums
                for part in (n.left, n.right)
                if part.decode().numel()
            ),
        ]
    )
    return bool(np.allclose(got.double().numpy(), want, rtol=1e-5, atol=1e-5 * size**2))


SLOW: dict[str, Callable[[Any, Hidden], np.ndarray]] = {
    "dense": slow_dense, "coded": slow_coded, "masked": slow_masked, "affine": slow_affine,
    "codebook": slow_codebook, "loggrid": slow_loggrid, "lowrank": slow_lowrank, "sum": slow_sum,
}  # fmt: skip
