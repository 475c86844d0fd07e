"""Rate-penalized: a uniform grid that is trained with a price on the bits of its codes.

w = scale * round(x / scale)    the weight of the model; straight-through gradients to x (Bengio 2013), and to
                                log(scale) as in LSQ (Esser 2020), so scales change by factors
loss + price * bits(x / scale)  mean bits over rounding noise (Oktay 2019), under a density that is fitted
                                to the present codes: maths/density.py

Only the gradient of the second term is computed, and added to that of the first in the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tersor.forms import Affine, Dense, Form
from tersor.forms.form import from_rows, to_rows
from tersor.maths.density import Density, bits, fit, flat, slopes
from tersor.maths.uniform_grid import limits
from tersor.maths.units import TINY
from tersor.model.trainable_parts import RoundedPart

SWEEPS = 8  # of the first fit of the density; later fits need one, because codes have hardly changed


class Priced(Function):
    """scale * round(x / scale) for rows x [O, I], log of the scale [1, 1] or [O, 1]; backward gives the
    gradient of loss + price * bits."""

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
        slope = slopes(Density(*density), exact).mul_(price)  # d(price * bits) / d(exact)
        to_scale = grads[0] * (codes - exact) * scale - slope * exact
        return (
            grads[0] + slope / scale,
            to_scale.sum_to_size(scale.shape),
            None,
            None,
            *(None for _ in density),
        )


class RatePenalizedPart(RoundedPart):
    """The trainable part of a symmetric Affine form without groups, with the price of a bit."""

    price: Tensor  # of a bit, in units of the loss
    over: Tensor  # coded bytes minus predicted bytes, for the whole model
    began: Tensor  # coded bytes of the whole model before training
    was: Tensor  # log of the bytes at an earlier step

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
        """The codes, rounded, as floats [O, I]."""
        return (self.rows() / self.log_scale.exp()).round_().clamp_(-self.top, self.top)

    def value(self) -> Tensor:
        rounded = Priced.apply(self.rows(), self.log_scale, self.top, self.price, *self.density)
        return from_rows(rounded, tuple(self.w.shape), self.form.axis)

    @torch.no_grad()
    def learn(self, sweeps: int = 1) -> None:
        """Fit the density to the present codes."""
        for name, value in fit(self.density, self.codes(), sweeps)._asdict().items():
            cast(Tensor, getattr(self, name)).copy_(value)

    @property
    def nbytes(self) -> float:
        """The predicted bytes of the codes, by the density."""
        return float(bits(self.density, self.codes())) / 8

    def fold(self) -> Form:
        codes = from_rows(self.codes(), tuple(self.w.shape), self.form.axis)
        scale = self.log_scale.detach().exp().cpu().clone()
        return self.form.replace(codes=Dense(codes.to(torch.int8).cpu().contiguous()), scale=Dense(scale))
