"""Trainable parts: for each form a module with parameters and a value that is differentiable in them.

Dense     the array itself
Masked    value(body) * keep: pruned weights stay zero
Affine    a float weight w rounded to its grid, straight-through (Bengio 2013); scale as in LSQ (Esser 2020)
LogGrid   w rounded to a fixed logarithmic grid, straight-through
Codebook  fixed index, trained table: an entry gets the sum of its weights' gradients (Han 2016, section 3.2)
          binary, ternary: w rounded by its rule (XNOR-Net, TWN)
LowRank   the product of the parts of its factors
Sum       the sum of its parts
A new form gets an entry in the table PARTS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from tersor.forms import Affine, At, Codebook, Dense, Form, LogGrid, LowRank, Masked, Sum
from tersor.forms.form import from_rows, to_rows
from tersor.maths.levels import from_levels, to_levels
from tersor.maths.signs import BINARY, TERNARY, binary, ternary
from tersor.maths.uniform_grid import expand, limits
from tersor.maths.units import TINY


class Part(nn.Module):
    """The trainable part of one form. A Structure is constructed from the form and its inner parts, other
    parts from the form and the mask above it."""

    axis: int  # of its form's rows

    def value(self) -> Tensor:
        """The weight that the model uses, with gradients to this part's parameters."""
        raise TypeError(f"{type(self).__name__} has no value")

    def fold(self) -> Form:
        """The form that decodes to the present `value`."""
        raise TypeError(f"{type(self).__name__} has no fold")

    def begin(self, form: Form) -> None:
        """Start training from the weights of `form`, which this part's form approximates. Parts that round
        then start between their levels and not on them; other parts ignore it."""


class Structure(Part):
    """The parts of the inner forms, and the function that joins their values to one."""

    def __init__(self, form: Form, *inner: Part):
        super().__init__()
        self.kind = type(form)
        for name, child in zip(form.inner, inner, strict=True):
            self.add_module(name, child)

    def parts(self) -> Iterable[tuple[str, Part]]:
        return cast(Iterable[tuple[str, Part]], self.named_children())

    def join(self, *values: Tensor) -> Tensor:
        """The weight, from the values of the inner parts."""
        raise TypeError(f"{type(self).__name__} has no join")

    def value(self) -> Tensor:
        return self.join(*(child.value() for _, child in self.parts()))

    def fold(self) -> Form:
        return self.kind(**{name: child.fold() for name, child in self.parts()})

    def begin(self, form: Form) -> None:
        if isinstance(form, self.kind):
            for name, child in self.parts():
                child.begin(form.children()[name])


class DensePart(Part):
    def __init__(self, form: Dense, keep: Tensor | None = None):
        super().__init__()
        self.dtype = form.array.dtype  # trained in float32 (or float64), stored in its own dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.w = nn.Parameter(form.array.detach().to(wide, copy=True))

    def value(self) -> Tensor:
        return self.w

    def fold(self) -> Form:
        return Dense(self.w.detach().cpu().to(self.dtype, copy=True))


class MaskedPart(Structure):
    """`keep` is a buffer, which gradual pruning narrows in training."""

    keep: Tensor
    body: Part

    def __init__(self, form: Masked, body: Part):
        super().__init__(form, body)
        self.register_buffer("keep", form.keep.decode().clone())

    def join(self, *values: Tensor) -> Tensor:
        return values[0] * self.keep

    def fold(self) -> Form:
        body = self.body.fold()
        if isinstance(body, Dense):  # zeros under the mask, so that equal weights give equal forms
            body = Dense(torch.where(self.keep.cpu(), body.array, torch.zeros_like(body.array)))
        return Masked(Dense(self.keep.detach().cpu().clone()), body)

    def begin(self, form: Form) -> None:
        self.body.begin(form.body if isinstance(form, Masked) else form)


class RoundedPart(Part):
    """The base of parts that round a float weight `w`."""

    w: nn.Parameter

    def begin(self, form: Form) -> None:
        with torch.no_grad():
            self.w.copy_(form.decode())


class StepsPart(Part):
    """Step sizes, trained as factors of those at first. Adam moves a number by about the learning rate,
    whatever its size: a scale of 16 bits, trained as it is, would grow a thousandfold. A factor gets the
    gradient of its step, so that it counts in the norm of all gradients as the step would."""

    start: Tensor

    def __init__(self, form: Form):
        super().__init__()
        self.register_buffer("start", form.decode().detach().float().clone())
        self.factor = nn.Parameter(torch.ones_like(self.start))

    def value(self) -> Tensor:
        return self.start * self.factor.detach() + (self.factor - self.factor.detach())

    def fold(self) -> Form:
        return Dense((self.start * self.factor).detach().cpu())


def steps_part(scale: Form) -> Part:
    """The part of a grid's scales: an array, or a column of scales times a row of scales."""
    if isinstance(scale, LowRank):
        return LowRankPart(scale, StepsPart(scale.left), StepsPart(scale.right))
    return StepsPart(scale)


class AffinePart(RoundedPart):
    def __init__(self, form: Affine, keep: Tensor | None = None):
        super().__init__()
        self.form = form
        self.w = nn.Parameter(form.decode().detach().float().clone())
        self.steps = steps_part(form.scale)
        zero = torch.zeros_like(self.scale) if form.zero is None else form.zero.decode().float()
        self.register_buffer("zero", zero.clone())
        self.low, self.high = limits(form.bits, form.zero is None)
        # LSQ's gradient scale: without it a scale, which sums the gradients of its weights, learns too fast.
        count = sum(p.numel() for p in self.steps.parameters())
        self.ease = (self.w.numel() / count * max(self.high, 1)) ** -0.5

    @property
    def scale(self) -> Tensor:
        return self.steps.value().float()

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes before rounding [O, I], scale and zero expanded to columns)."""
        rows = to_rows(self.w.detach(), self.form.axis)
        scale = expand(self.scale.detach().abs().clamp_min(TINY), self.form.grouping, rows.shape[1])
        zero = expand(cast(Tensor, self.zero), self.form.grouping, rows.shape[1])
        return rows / scale + zero, scale, zero

    def value(self) -> Tensor:
        """The gradients are explicit: autograd of the division gives 0 * inf near a scale of 0."""
        exact, scale, zero = self.codes()
        codes = exact.clamp(self.low, self.high).round()
        # Values that round to the first or last code count as inside, as in torch's fake quantization:
        # otherwise weights stored at these codes would get no gradient.
        inside = (exact >= self.low - 0.5) & (exact <= self.high + 0.5)
        rows = to_rows(self.w, self.form.axis)
        learned = expand(self.scale.abs() * self.ease, self.form.grouping, rows.shape[1])
        seen = (codes - zero) * scale
        seen = seen + torch.where(inside, rows - rows.detach(), 0)
        seen = seen + torch.where(inside, codes - exact, codes - zero) * (learned - learned.detach())
        return from_rows(seen, tuple(self.w.shape), self.form.axis)

    def fold(self) -> Form:
        codes = from_rows(
            self.codes()[0].clamp(self.low, self.high).round(), tuple(self.w.shape), self.form.axis
        )
        dtype = torch.int8 if self.form.bits <= 8 else torch.int16
        return self.form.replace(
            codes=Dense(codes.to(dtype).cpu().contiguous()), scale=positive(self.steps.fold())
        )


def positive(steps: Form) -> Form:
    """The absolute values of trained scales; for a product of a column and a row, of each factor."""
    if isinstance(steps, LowRank) and steps.left.shape[1] == 1:
        return LowRank(positive(steps.left), positive(steps.right))
    return Dense(steps.decode().float().abs().clamp_min(TINY))


class LogPart(RoundedPart):
    def __init__(self, form: LogGrid, keep: Tensor | None = None):
        super().__init__()
        self.form = form
        self.w = nn.Parameter(form.decode().detach().float().clone())
        self.register_buffer("scale", form.scale.decode().clone())

    def codes(self) -> Tensor:
        form, rows = self.form, to_rows(self.w.detach(), self.form.axis)
        return to_levels(rows, cast(Tensor, self.scale), form.bits, form.terms, form.grouping)

    def value(self) -> Tensor:
        form = self.form
        rows = from_levels(self.codes(), cast(Tensor, self.scale), form.bits, form.terms, form.grouping)
        seen = from_rows(rows, tuple(self.w.shape), form.axis)
        return self.w + (seen - self.w).detach()

    def fold(self) -> Form:
        codes = from_rows(self.codes(), tuple(self.w.shape), self.form.axis)
        return self.form.replace(codes=Dense(codes.cpu().contiguous()))


class SignPart(RoundedPart):
    """Binary and ternary weights: index and scale are computed from a float weight by the original rule."""

    keep: Tensor | None

    def __init__(self, form: Codebook, keep: Tensor | None = None):
        super().__init__()
        self.form = form
        self.register_buffer("keep", None if keep is None else to_rows(keep, form.axis).clone())
        self.w = nn.Parameter(form.decode(keep).detach().float().clone())
        self.levels = len(form.book.decode())
        self.per, self.rule = "tensor" if cast(Form, form.scale).shape[0] == 1 else "channel", "twn"

    def begin(self, form: Form) -> None:
        """The rule of a ternary weight is not stored: take the rule that gives the stored index."""
        super().begin(form)
        for self.rule in ("twn", "exact"):
            if torch.equal(self.signs()[0].cpu(), to_rows(self.form.index.decode(), self.form.axis)):
                break

    def signs(self) -> tuple[Tensor, Tensor]:
        rows = to_rows(self.w.detach(), self.form.axis)
        if self.levels == 2:
            return binary(rows, self.per, keep=self.keep)
        return ternary(rows, self.per, keep=self.keep, rule=self.rule)

    def value(self) -> Tensor:
        index, scale = self.signs()
        book = self.form.book.decode().to(self.w.device)
        seen = from_rows(book[index.long()] * scale, tuple(self.w.shape), self.form.axis)
        return self.w + (seen - self.w).detach()

    def fold(self) -> Form:
        index, scale = self.signs()
        index = from_rows(index, tuple(self.w.shape), self.form.axis)
        return self.form.replace(index=Dense(index.cpu().contiguous()), scale=Dense(scale.cpu()))


class BookPart(Part):
    index: Tensor
    scale: Tensor | None

    def __init__(self, form: Codebook, keep: Tensor | None = None):
        super().__init__()
        self.form = form
        self.book = nn.Parameter(form.book.decode().detach().float().clone())
        self.register_buffer("index", to_rows(form.index.decode().long(), form.axis).contiguous())
        self.register_buffer("scale", None if form.scale is None else form.scale.decode().clone())

    def value(self) -> Tensor:
        rows = self.book[self.index] if self.book.ndim == 1 else self.book.gather(1, self.index)
        if self.scale is not None:
            rows = rows * self.scale
        return from_rows(rows, self.form.shape, self.form.axis)

    def fold(self) -> Form:
        return self.form.replace(book=Dense(self.book.detach().cpu().clone()))


class LowRankPart(Structure):
    def join(self, *values: Tensor) -> Tensor:
        left, right = values
        return torch.tensordot(left, right, dims=1)


class SumPart(Structure):
    def join(self, *values: Tensor) -> Tensor:
        return values[0] + values[1]


def book_part(form: Codebook, keep: Tensor | None = None) -> Part:
    signs = form.scale is not None and tuple(form.book.decode().flatten().tolist()) in (BINARY, TERNARY)
    return SignPart(form, keep) if signs else BookPart(form)


PARTS: dict[type[Form], Callable[..., Part]] = {
    Dense: DensePart, Masked: MaskedPart, Affine: AffinePart, LogGrid: LogPart, Codebook: book_part,
    LowRank: LowRankPart, Sum: SumPart,
}  # fmt: skip


MakePart = Callable[[Affine], Part]  # makes the part of a uniform grid in place of AffinePart


def part(form: Form | At, make: MakePart | None = None) -> Part:
    """The trainable part of a form with plain leaves, at its place in the tree."""
    at = form if isinstance(form, At) else At(form)
    node, inner = at.node, [part(child, make) for _, child in at.below() if child.weights]
    if isinstance(node, Affine) and make is not None:
        made = make(node)
    else:
        made = PARTS[type(node)](node, *inner) if inner else PARTS[type(node)](node, at.keep)
    made.axis = at.axis
    return made
