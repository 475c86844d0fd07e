"""Group penalty: a step follows the gradient of the formula as written, and the steps sum to the penalty."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.maths.group_penalty import shrink, strength, units_mask


@given(st.integers(1, 50), st.floats(0, 50))
def test_the_strengths_grow_and_sum_to_the_penalty(total: int, penalty: float) -> None:
    every = [strength(step, total, penalty) for step in range(total)]
    assert every == sorted(every)
    assert sum(every) == pytest.approx(penalty)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_the_mask_has_what_no_axis_keeps(shape: list[int], data: st.DataObject) -> None:
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    kept = {axis: sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1)))) for axis in axes}
    mask = units_mask(shape, kept)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist():
        assert bool(mask[tuple(place)]) == any(place[axis] not in kept[axis] for axis in axes)


def coupled() -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[Tensor]]]:
    """Two layers of 4 hidden units with a norm between them; units 1 and 3 go. Their slices, by hand."""
    random = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "norm.weight": (4,), "norm.bias": (4,), "b.weight": (2, 4)}
    w = {n: torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}
    kept = {n: {1 if n == "b.weight" else 0: [0, 2]} for n in shapes}
    masks = {n: units_mask(shapes[n], kept[n]) for n in shapes}
    units = [
        [w["a.weight"][u], w["a.bias"][u], w["norm.weight"][u], w["norm.bias"][u], w["b.weight"][:, u]]
        for u in (1, 3)
    ]
    return w, masks, units


def test_a_step_follows_the_gradient_of_the_formula() -> None:
    """P = lambda / 2 * the sum over units of the squares of all of their slices, by autograd."""
    w, masks, units = coupled()
    lambda_ = 1e-7
    written = lambda_ / 2 * sum((part.square().sum() for unit in units for part in unit), torch.zeros(()))
    gradients = torch.autograd.grad(written, list(w.values()))
    for (name, tensor), gradient in zip(w.items(), gradients, strict=True):
        before = tensor.detach().clone()
        shrink(tensor, masks[name], lambda_)
        torch.testing.assert_close(
            (before - tensor.detach()) / lambda_, gradient / lambda_, rtol=1e-5, atol=1e-7
        )


def test_all_steps_together_shrink_the_units_by_the_penalty() -> None:
    w, masks, _ = coupled()
    before = {name: tensor.detach().clone() for name, tensor in w.items()}
    for step in range(17):
        for name, tensor in w.items():
            shrink(tensor, masks[name], strength(step, 17, 3.0))
    for name, tensor in w.items():
        gone = masks[name]
        torch.testing.assert_close(tensor.detach()[gone], before[name][gone] * math.exp(-3))
        assert torch.equal(tensor.detach()[~gone], before[name][~gone])
