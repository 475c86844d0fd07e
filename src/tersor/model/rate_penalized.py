"""Rated: a grid that is trained under the price of its codes.

w = scale * round(x / scale)    seen by the model; gradients to x straight through (Bengio 2013), to the log
                                of the scale as in LSQ (Esser 2020): small and large steps move by shares
loss + price * bits(x / scale)  mean bits over rounding noise (Oktay 2019), under a density that is fitted
                                to the codes as they stand: maths/density.py

Only the gradient of the second term is ever needed: it joins that of the first on the way back.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tersor.forms import Affine, Dense, Form
from tersor.forms.form import from_rows, to_rows
from tersor.maths.density import Density, bits, fit, flat, slopes
from tersor.maths.even_grid import limits
from tersor.maths.units import TINY
from tersor.model.trainable_parts import RoundedPart

SWEEPS = 8  # of the first fit; later ones follow codes that have hardly moved


class Priced(Function):
    """scale * round(x / scale) for rows x [O, I], log of the scale [1, 1] or [O, 1]; back comes the gradient
    of loss + price * bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, top: int, price: Tensor, *density: Tensor) -> Tensor:
        scale = log_scale.exp()
        exact = x / scale
        codes = exact.round().clamp_(-top, top)
        ctx.save_for_backward(exact, codes, scale, price, *density)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exact, codes, scale, price, *density = ctx.saved_tensors
        slope = slopes(Density(*density), exact).mul_(price)  # of the price, in each code before rounding
        to_scale = grads[0] * (codes - exact) * scale - slope * exact
        return (
            grads[0] + slope / scale,
            to_scale.sum_to_size(scale.shape),
            None,
            None,
            *(None for _ in density),
        )


class RatePenalizedPart(RoundedPart):
    """The trainable side of a symmetric Affine form without groups, with the price of its bits."""

    price: Tensor  # of a bit, in units of the loss
    over: Tensor  # bytes that a coder needed more than was predicted; of the whole model, as the next one
    began: Tensor  # bytes that a coder needed before any training
    was: Tensor  # log of the bytes needed a while ago

    def __init__(self, form: Affine):
        super().__init__()
        self.form = form
        self.top = limits(form.bits, True)[1]
        self.w = nn.Parameter(form.decode().detach().float().clone())
        self.log_scale = nn.Parameter(form.scale.decode().detach().float().clamp_min(TINY).log())
        for name, value in flat(self.rows())._asdict().items():
            self.register_buffer(name, value)
        for name in ("price", "over", "began", "was"):
            self.register_buffer(name, torch.zeros(()))
        self.learn(SWEEPS)

    def begin(self, form: Form) -> None:
        super().begin(form)
        self.learn(SWEEPS)

    def rows(self) -> Tensor:
        return to_rows(self.w, self.form.axis)

    @property
    def density(self) -> Density:
        return Density(*(cast(Tensor, getattr(self, name)) for name in Density._fields))

    @torch.no_grad()
    def codes(self) -> Tensor:
        """[O, I], rounded, as floats."""
        return (self.rows() / self.log_scale.exp()).round_().clamp_(-self.top, self.top)

    def value(self) -> Tensor:
        seen = Priced.apply(self.rows(), self.log_scale, self.top, self.price, *self.density)
        return from_rows(seen, tuple(self.w.shape), self.form.axis)

    @torch.no_grad()
    def learn(self, sweeps: int = 1) -> None:
        """Fit the density to the codes as they stand."""
        for name, value in fit(self.density, self.codes(), sweeps)._asdict().items():
            cast(Tensor, getattr(self, name)).copy_(value)

    @property
    def nbytes(self) -> float:
        """What the codes will need, by the density."""
        return float(bits(self.density, self.codes())) / 8

    def fold(self) -> Form:
        codes = from_rows(self.codes(), tuple(self.w.shape), self.form.axis)
        scale = self.log_scale.detach().exp().cpu().clone()
        return self.form.replace(codes=Dense(codes.to(torch.int8).cpu().contiguous()), scale=Dense(scale))
