"""Kept weights: the least squares of each row, against a solution row by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.maths.kept_weights import cost, kept_weights


def row_by_row(w: Tensor, h: Tensor, pull: float, keep: Tensor) -> Tensor:
    """The normal equations of the kept weights of each row, solved directly."""
    h = h + pull * torch.eye(len(h), dtype=h.dtype)
    q = torch.zeros_like(w)
    for o, mask in enumerate(keep):
        at = mask.nonzero()[:, 0]
        if len(at):
            q[o, at] = torch.linalg.solve(h[at][:, at], (w[o] @ h)[at])
    return q


def drawn(outs: int, ins: int, samples: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, ins, generator=random, dtype=torch.float64)
    x = x + 0.7 * x.roll(1, 1) + 0.4
    keep = torch.rand(outs, ins, generator=random) < share
    return torch.randn(outs, ins, generator=random, dtype=torch.float64), x.T @ x / samples, keep


@settings(max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 24), st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([1e-2, 1.0]), st.integers(0, 999),
)  # fmt: skip
def test_it_is_the_least_squares_of_each_row(  # noqa: PLR0917  hypothesis fills them
    outs: int, ins: int, samples: int, share: float, pull: float, seed: int
) -> None:
    w, h, keep = drawn(outs, ins, samples, share, seed)
    q = kept_weights(w[None], h[None], torch.tensor([pull], dtype=w.dtype), keep[None])[0]
    assert not q[~keep].any()
    best = row_by_row(w, h, pull, keep)
    ridge = h + pull * torch.eye(ins, dtype=h.dtype)
    least, found, begin = (cost(x, w, ridge)[:, 0] for x in (best, q, torch.where(keep, w, 0.0)))
    assert (found <= least + 1e-5 * (begin - least) + 1e-12).all()


def test_groups_are_solved_each_by_its_own_moments() -> None:
    parts = [drawn(3, 8, 30, 0.5, seed) for seed in (1, 2)]
    w, h, keep = (torch.stack(x) for x in zip(*parts, strict=True))
    pull = torch.tensor([0.01, 0.1], dtype=w.dtype)
    q = kept_weights(w, h, pull, keep)
    for number, (one, moment, mask) in enumerate(parts):
        best = row_by_row(one, moment, float(pull[number]), mask)
        torch.testing.assert_close(q[number], best, rtol=1e-2, atol=1e-2)


def test_rows_without_a_solution_are_the_weights_that_are_kept() -> None:
    """Inputs that are always 0, and moments that overflow."""
    w, h, keep = drawn(4, 6, 30, 0.5, 3)
    pull = torch.zeros(1, dtype=w.dtype)
    for moment in (torch.zeros_like(h), 1e308 * h.abs()):
        q = kept_weights(w[None], moment[None], pull, keep[None])[0]
        assert torch.equal(q, torch.where(keep, w, 0.0))
