"""Rate-penalized grids: values, gradients against differences, and folded forms."""

import pytest
import torch

from tersor.forms import Affine, Dense
from tersor.maths.density import expected
from tersor.model.rate_penalized import RatePenalizedPart


def rated(shape: tuple[int, ...], per: str = "tensor", axis: int = 0) -> RatePenalizedPart:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=g)
    rows = shape[axis] if per == "channel" and len(shape) > 1 else 1
    scale = torch.rand(rows, 1, generator=g) * 0.2 + 0.2
    form = Affine(Dense(torch.zeros(shape, dtype=torch.int8)), Dense(scale), None, 8, 0, axis)
    part = RatePenalizedPart(form)
    part.begin(Dense(w))
    return part


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 7), 0), ((4, 3, 2, 2), 1), ((6,), 0)])
def test_the_value_is_what_the_folded_form_decodes_to(shape, axis, per):
    part = rated(shape, per, axis)
    form = part.fold()
    assert form.shape == shape
    assert torch.allclose(form.decode(), part.value(), atol=1e-6)
    size = form.scale.decode().max() / 2
    assert float((form.decode() - part.w.detach()).abs().max()) <= float(size) * (1 + 1e-5)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_gradients_of_the_price_by_differences(per):
    part = rated((5, 7), per)
    part.price.fill_(0.25)
    part.value().sum().mul(0.0).backward()  # only the price of the bits
    density = part.density

    def cost() -> float:
        with torch.no_grad():
            return float(0.25 * expected(density, part.rows().double() / part.log_scale.double().exp()))

    for parameter in (part.w, part.log_scale):
        for place in range(parameter.numel()):
            at, step = parameter.data.view(-1), 1e-4
            was = float(at[place])
            at[place] = was + step
            up = cost()
            at[place] = was - step
            down = cost()
            at[place] = was
            assert float(parameter.grad.view(-1)[place]) == pytest.approx(
                (up - down) / 2e-4, rel=2e-2, abs=2e-2
            )


def test_gradients_of_the_loss_are_straight_through():
    part = rated((5, 7))
    wanted = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    (part.value() * wanted).sum().backward()
    assert torch.equal(part.w.grad, wanted)
    scale = part.log_scale.detach().exp()
    exact = part.w.detach() / scale
    by_hand = float(
        (wanted * (exact.round() - exact) * scale).sum()
    )  # the gradient of LSQ, times the scale: the parameter is its logarithm
    assert float(part.log_scale.grad) == pytest.approx(by_hand, rel=1e-4)


def test_codes_stay_in_eight_bits():
    part = rated((3, 4))
    with torch.no_grad():
        part.w.mul_(1e6)
    assert part.fold().codes.decode().abs().max() == 127
    assert torch.isfinite(part.value()).all()
