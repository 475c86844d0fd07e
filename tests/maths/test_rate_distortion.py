"""Rate-distortion optimized quantization: against a slow loop, against GPTQ, and the effect of the price."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.errors import RefusedError, SettingError
from tersor.maths.rate_distortion import Factor, coarse, factor, rdoq, steps


def moment(count: int, seed: int) -> Tensor:
    """A second moment with unequal eigenvalues."""
    x = torch.randn(3 * count, count, generator=torch.Generator().manual_seed(seed))
    x = (x + 0.7 * x.roll(1, 1)) * torch.linspace(0.2, 2, count)
    return x.T @ x / len(x)


def weights(outs: int, ins: int, seed: int = 0) -> Tensor:
    return torch.randn(outs, ins, generator=torch.Generator().manual_seed(seed))


def weighed(e: Tensor, rows: Tensor, columns: Tensor) -> float:
    e = e.double()
    return float(torch.trace(rows.double() @ e @ columns.double() @ e.T))


SHAPES = [(1, 1), (1, 9), (7, 1), (5, 130), (70, 65), (3, 64)]


@pytest.mark.parametrize(("outs", "ins"), SHAPES)
def test_nearly_free_bits_give_the_codes_of_a_slow_gptq(outs: int, ins: int) -> None:
    """With both sides, an error is compensated in all later columns and rows, by the inverses."""
    w, f, h = weights(outs, ins), moment(outs, 1), moment(ins, 2)
    rows, columns = factor(f, outs, damp=1e-6), factor(h, ins, damp=1e-6)
    step = torch.full((1, 1), 0.5)
    made = rdoq(w, rows, columns, 1e-12, row=step, column=torch.ones(1, 1))

    target, codes = w.double().numpy().copy(), np.zeros((outs, ins))
    f_, h_ = (m.double().numpy() + 1e-6 * np.mean(np.diag(m)) * np.eye(len(m)) for m in (f, h))
    for j in range(ins):
        ahead = np.linalg.inv(h_[j:, j:])  # of the remaining columns
        column = target[:, j].copy()
        for i in range(outs):
            codes[i, j] = np.round(column[i] / 0.5)
            down = np.linalg.inv(f_[i:, i:])
            column[i + 1 :] -= (column[i] - 0.5 * codes[i, j]) * down[0, 1:] / down[0, 0]
        rest = target[:, j] - 0.5 * codes[:, j]
        target[:, j + 1 :] -= np.outer(rest, ahead[0, 1:] / ahead[0, 0])
    same = (made.codes.numpy() == codes).mean()
    assert same > 0.98, "a tie in float32 may round the other way, and move a few behind it"
    assert made.error == pytest.approx(weighed(w - made.decode(), f, h), rel=1e-3)


def test_without_curvature_and_price_it_rounds_to_the_nearest() -> None:
    w = weights(40, 50)
    made = rdoq(
        w, factor(None, 40), factor(None, 50), 1e-12, row=torch.full((1, 1), 0.3), column=torch.ones(1, 1)
    )
    assert torch.equal(made.codes, (w / 0.3).round().to(torch.int16))
    assert made.error == pytest.approx(float((w - made.decode()).square().sum()), rel=1e-4)


@pytest.mark.parametrize("per", ["tensor", "channel", "input", "both"])
def test_the_reported_error_is_the_weighted_error(per: str) -> None:
    w, f, h = weights(33, 129), moment(33, 1), moment(129, 2)
    rows, columns = factor(f, 33, damp=1e-6), factor(h, 129, damp=1e-6)
    row, column = steps(rows, columns, 0.01, per)
    made = rdoq(w, rows, columns, 0.01, row=row, column=column)
    assert made.error == pytest.approx(weighed(w - made.decode(), f, h), rel=1e-3)
    assert row.shape == ((33, 1) if per in ("channel", "both") else (1, 1))
    assert column.shape == ((1, 129) if per in ("input", "both") else (1, 1))


def test_compensation_lowers_the_weighted_error() -> None:
    w, f, h = weights(64, 96), moment(64, 1), moment(96, 2)
    step = {"row": torch.full((1, 1), 0.5), "column": torch.ones(1, 1)}
    errors = []
    for rows, columns in ((None, None), (None, h), (f, h)):
        made = rdoq(w, factor(rows, 64, damp=1e-6), factor(columns, 96, damp=1e-6), 1e-12, **step)
        errors.append(weighed(w - made.decode(), f, h))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]


@pytest.mark.parametrize("per", ["tensor", "both"])
def test_a_higher_price_gives_fewer_bits_and_more_error(per: str) -> None:
    w, rows, columns = weights(64, 200), factor(moment(64, 1), 64), factor(moment(200, 2), 200)
    made = []
    for price in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        row, column = steps(rows, columns, price, per)
        made.append(rdoq(w, rows, columns, price, row=row, column=column))
    assert all(a.bits > b.bits for a, b in zip(made, made[1:], strict=False))
    assert all(a.error < b.error for a, b in zip(made, made[1:], strict=False))


def test_codes_for_a_price_are_best_at_that_price() -> None:
    """On one grid, codes chosen for a price have the lower error + price * bits at that price."""
    w, rows, columns = weights(64, 200), factor(moment(64, 1), 64), factor(moment(200, 2), 200)
    row, column = steps(rows, columns, 0.05, "both")
    paid, free = (rdoq(w, rows, columns, price, row=row, column=column) for price in (0.05, 1e-12))
    assert paid.bits < 0.97 * free.bits
    assert paid.error + 0.05 * paid.bits < free.error + 0.05 * free.bits


def test_steps_of_rows_and_columns_beat_one_step_where_weights_differ() -> None:
    w = weights(128, 256)
    rows = Factor(torch.logspace(-2, 2, 128))
    columns = Factor(torch.logspace(-2, 2, 256))
    cost = {}
    for per in ("tensor", "channel", "input", "both"):
        row, column = steps(rows, columns, 1e-2, per)
        made = rdoq(w, rows, columns, 1e-2, row=row, column=column)
        cost[per] = made.error + 1e-2 * made.bits
    assert cost["both"] < min(cost["channel"], cost["input"])
    assert max(cost["channel"], cost["input"]) < cost["tensor"]


def test_bits_are_near_the_entropy_of_the_codes() -> None:
    """The adaptive model is within 3 % of the histogram's entropy, and below it if rows differ in scale."""
    even, spread = weights(300, 300), weights(300, 300) * torch.logspace(-1, 1, 300)[:, None]
    for w, low, high in ((even, 0.97, 1.03), (spread, 0.3, 0.9)):
        made = rdoq(
            w,
            factor(None, 300),
            factor(None, 300),
            1e-9,
            row=torch.full((1, 1), 0.4),
            column=torch.ones(1, 1),
        )
        counts = torch.unique(made.codes, return_counts=True)[1].double()
        entropy = float((counts * (counts.sum() / counts).log2()).sum())
        assert low * entropy < made.bits < high * entropy


def test_a_mask_is_kept_and_compensated() -> None:
    w, h = weights(40, 60), moment(60, 2)
    keep = torch.rand(40, 60, generator=torch.Generator().manual_seed(3)) < 0.5
    step = {"row": torch.full((1, 1), 0.01), "column": torch.ones(1, 1)}
    made = rdoq(w, factor(None, 40), factor(h, 60), 1e-12, keep=keep, **step)
    assert not made.codes[~keep].any()
    plain = (w * keep / 0.01).round() * 0.01
    assert weighed(w - made.decode(), torch.eye(40), h) < 0.9 * weighed(w - plain, torch.eye(40), h)


def test_codes_stay_within_the_limit() -> None:
    w = weights(8, 8) * 1e4
    made = rdoq(
        w, factor(None, 8), factor(None, 8), 1e-9, row=torch.ones(1, 1), column=torch.ones(1, 1), limit=127
    )
    assert int(made.codes.abs().max()) == 127


def test_dead_columns_and_zero_weights() -> None:
    h = moment(20, 2)
    h[3], h[:, 3] = 0, 0
    for columns in (h, torch.zeros(20, 20), torch.zeros(20)):
        for w in (weights(6, 20), torch.zeros(6, 20)):
            rows, ins = factor(None, 6), factor(columns, 20)
            row, column = steps(rows, ins, 1e-3, "both")
            made = rdoq(w, rows, ins, 1e-3, row=row, column=column)
            assert torch.isfinite(made.decode()).all()
            assert np.isfinite(made.error)


def test_coarse_steps_have_few_mantissas() -> None:
    x = torch.logspace(-20, 20, 1000)
    assert ((coarse(x) / x).log2().abs() < 0.18).all()
    assert len(torch.frexp(coarse(x))[0].unique()) <= 5


@pytest.mark.parametrize("power", [-110, -30, 100, 118])
def test_codes_do_not_depend_on_the_scale_of_weights(power: int) -> None:
    """Weights, steps and price scaled together by powers of two give the same codes."""
    w, f, h = weights(33, 70), moment(33, 1), moment(70, 2)
    made = []
    for unit in (1.0, 2.0**power):
        rows, columns = factor(f, 33), factor(h, 70)
        row, column = steps(rows, columns, 1e-2 * unit**2, "both")
        made.append(rdoq(w * unit, rows, columns, 1e-2 * unit**2, row=row, column=column))
    assert torch.equal(made[0].codes, made[1].codes)
    assert torch.equal(made[0].decode() * 2.0**power, made[1].decode())
    assert made[1].error == pytest.approx(made[0].error * 4.0**power, rel=1e-9)


@pytest.mark.parametrize("power", [-200, -60, 60, 200])
def test_codes_do_not_depend_on_the_scale_of_the_curvature(power: int) -> None:
    w, f, h = weights(20, 30), moment(20, 1), moment(30, 2)
    made = []
    for unit in (1.0, 2.0**power):
        rows, columns = factor(f, 20), factor(h.double() * unit, 30)
        row, column = steps(rows, columns, 1e-2 * unit, "both")
        made.append(rdoq(w, rows, columns, 1e-2 * unit, row=row, column=column))
    assert torch.equal(made[0].codes, made[1].codes)


def test_steps_grow_if_codes_would_be_too_large() -> None:
    """With a price that is negligible for such large weights, codes use all 16 bits."""
    w = weights(64, 64) * 5e37
    for price in (0.1, 1e-30, 1e-280):
        row, column = steps(factor(None, 64), factor(None, 64), price, "both")
        made = rdoq(w, factor(None, 64), factor(None, 64), price, row=row, column=column)
        assert int(made.codes.abs().max()) == 32767
        worst = (w.double() - made.decode().double()).abs().max()
        assert float(worst) <= 0.501 * float(w.abs().max()) / 32767


def test_no_decoded_weight_overflows_the_dtype() -> None:
    top = torch.finfo(torch.float16).max
    w = torch.full((4, 6), top)
    made = rdoq(
        w, factor(None, 4), factor(None, 6), 1e-9, row=torch.full((1, 1), 11000.0), column=torch.ones(1, 1),
        top=top,
    )  # fmt: skip
    assert (made.codes == 5).all(), "6 steps are 66000"


def test_masked_weights_do_not_affect_the_others() -> None:
    w, keep = weights(8, 30), torch.ones(8, 30, dtype=torch.bool)
    step = {"row": torch.full((1, 1), 0.1), "column": torch.ones(1, 1)}
    keep[2, 3] = False
    plain = rdoq(w, factor(None, 8), factor(None, 30), 1e-3, keep=keep, **step)
    w[2, 3] = 3e38
    made = rdoq(w, factor(None, 8), factor(None, 30), 1e-3, keep=keep, **step)
    assert torch.equal(made.codes, plain.codes)


def test_wrong_shapes_never_reach_the_loop() -> None:
    w, row, column = weights(6, 20), torch.ones(1, 1), torch.ones(1, 1)
    for change, says in (
        ({"rows": factor(None, 5)}, r"rows has shape \[5\]"),
        ({"columns": Factor(torch.ones(20), torch.eye(19))}, "push of columns"),
        ({"rows": Factor(torch.ones(6), torch.eye(7))}, "push of rows"),
        ({"row": torch.ones(5, 1)}, "row has shape"),
        ({"column": torch.ones(1, 21)}, "column has shape"),
        ({"keep": torch.ones(6, 19, dtype=torch.bool)}, "keep has shape"),
        ({"keep": torch.ones(6, 20)}, "bool mask"),
        ({"limit": 1 << 15}, "limit=32768"),
        ({"w": w.clone().fill_(torch.nan)}, "NaN"),
    ):
        given = {"w": w, "rows": factor(None, 6), "columns": factor(None, 20), "row": row, "column": column}
        given |= change
        with pytest.raises(SettingError, match=says):
            rdoq(given.pop("w"), given.pop("rows"), given.pop("columns"), 1.0, **given)
    empty = rdoq(torch.zeros(0, 20), factor(None, 0), factor(None, 20), 1.0, row=row, column=column)
    assert empty.codes.shape == (0, 20)


def test_singular_and_infinite_moments_are_refused() -> None:
    for bad in (torch.tensor([1.0, torch.nan]), torch.full((2, 2), torch.inf)):
        with pytest.raises(RefusedError, match="some site: the weights of its error are NaN or infinite"):
            factor(bad, 2, who="some site")
    with pytest.raises(RefusedError, match="have no inverse with damp=1e-30"):
        factor(torch.ones(3, 3), 3, damp=1e-30)
