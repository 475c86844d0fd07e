"""Edge values: ranges by every method, and what must not set one: masks, padding, empty batches, NaN."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from tersor.errors import RefusedError, SettingError, SiteError
from tersor.maths.activation_ranges import entropy_ends, mse_ends, percentile_ends
from tersor.maths.value_histogram import ValueHistogram
from tersor.model.edge_values import RANGES, EdgeValues
from tersor.model.observe import grid_of, observed, ranges_of, values_of
from tersor.model.simulate import gridded
from tersor.model.task import Task

EDGE = "/add:0"
HISTOGRAM = [word for word, needed in RANGES.items() if needed == "histogram"]


class Add(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x + 0.0


def task_of(*batches: Any) -> Task:
    return Task(evaluate=[(torch.zeros(1), torch.zeros(1))], calibrate=list(batches))


def found(*batches: Any, name: str = EDGE, **settings: Any) -> tuple[float, float]:
    low, high = ranges_of(Add(), task_of(*batches), [name], **settings)[name]
    assert low.dtype == high.dtype == torch.float64
    assert low.shape == high.shape == (1,)
    return float(low), float(high)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- methods ---


def test_the_average_is_that_of_a_loop() -> None:
    batches = [normal(50, seed=seed) * (seed + 1) for seed in range(6)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low, high = 0.9 * low + 0.1 * float(batch.min()), 0.9 * high + 0.1 * float(batch.max())
    assert found(*batches, range="average") == pytest.approx((low, high), rel=1e-12)
    images = [batch.reshape(5, 2, 5) for batch in batches]
    ends = ranges_of(Add(), task_of(*images), [EDGE], axis=1, range="average")[EDGE]
    tops = [image.amax((0, 2)).double() for image in images]
    want = tops[0]
    for top in tops[1:]:
        want = 0.9 * want + 0.1 * top
    assert torch.allclose(ends[1], want, rtol=1e-12)


@pytest.mark.parametrize("range", HISTOGRAM)
def test_ranges_are_those_of_all_values_at_once(range: str) -> None:
    batches = [normal(40, 300, seed=seed) ** 3 * (seed + 1) for seed in (2, 0, 1)]
    histogram = ValueHistogram()
    histogram.add(torch.cat(batches))
    methods: dict[str, Callable[[], Any]] = {
        "percentile": lambda: percentile_ends(histogram, 99.5),
        "mse": lambda: mse_ends(histogram, 4),
        "entropy": lambda: entropy_ends(histogram, 4),
    }
    got = found(*batches, range=range, bits=4, percentile=99.5)
    assert got == tuple(map(float, methods[range]()))
    full = found(*batches)
    assert full[0] < got[0] < 0 < got[1] < full[1]


@pytest.mark.parametrize("range", RANGES)
def test_grids_of_every_method_simulate(range: str) -> None:
    t = tiny("conv")
    grids = observed(t.model, t.task, ["/input:x", "/add:0"], range=range, percentile=99.0)
    x = next(iter(t.task.batches("calibrate")))
    x = x[0] if isinstance(x, (tuple, list)) else x
    with torch.no_grad():
        want, got = t.model.eval()(x), gridded(t.model, grids)(x)
    assert not torch.equal(got, want)
    assert (got - want).abs().max() < 0.1 * want.abs().max()


def test_one_pass_serves_several_methods() -> None:
    x = normal(20_000) ** 3
    values = values_of(Add(), task_of(x), [EDGE], range="mse")[EDGE]
    for range in RANGES:
        assert values.range(range, bits=4) == ranges_of(Add(), task_of(x), [EDGE], range=range, bits=4)[EDGE]
    with pytest.raises(SettingError, match="'entropy' needs a histogram, and 'minmax' keeps none"):
        values_of(Add(), task_of(x), [EDGE])[EDGE].range("entropy")


def test_settings_are_refused() -> None:
    for settings, says in (
        ({"range": "mxe"}, "range='mxe'; did you mean 'mse'"),
        (
            {"range": "mse", "axis": 1},
            "axis=1 asks for one range for each channel. Use range=minmax or average",
        ),
        (
            {"range": "percentile", "percentile": 0.999},
            "calibration: percentile=0.999, but it must be in percent",
        ),
        ({"range": "mse", "bits": 17}, "calibration: bits=17, but 1 to 16"),
    ):
        with pytest.raises(SettingError, match=says):
            found(normal(4, 5), **settings)


@pytest.mark.parametrize("range", HISTOGRAM)
def test_memory_does_not_grow_with_the_batches(range: str) -> None:
    values, sizes = EdgeValues(EDGE, range=range), set()
    for seed in (3, 1, 7, 0, 5):
        values.add(normal(500, seed=seed) * 3.0**seed)
        held = [*vars(values).values(), *vars(values.histogram).values()]
        tensors = [t for item in held for t in (item if isinstance(item, tuple) else [item])]
        sizes.add(sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)))
    assert len(sizes) == 1
    assert values.count == 2500


# --- what sets no range ---

LOWEST = torch.finfo(torch.float32).min
MASKS = [
    (torch.float32, LOWEST), (torch.float32, LOWEST / 2), (torch.float32, -1e30), (torch.float32, 1e30),
    (torch.float64, LOWEST), (torch.float64, torch.finfo(torch.float64).min),
    (torch.bfloat16, torch.finfo(torch.bfloat16).min), (torch.bfloat16, -2e30),
    (torch.float16, -65504.0), (torch.float16, -32752.0),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), MASKS)
@pytest.mark.parametrize("range", RANGES)
def test_an_attention_mask_sets_no_range(dtype: torch.dtype, value: float, range: str) -> None:
    scores = normal(2, 3, 40, 40).to(dtype)
    mask = torch.zeros(40, 40, dtype=dtype)
    mask[torch.ones(40, 40, dtype=torch.bool).triu(1)] = value
    masked = mask != 0
    values = values_of(Add(), task_of(scores + mask), [EDGE], range=range)[EDGE]
    want = EdgeValues(EDGE, range=range)
    want.add(scores[:, :, ~masked])
    assert values.range() == want.range()
    assert values.masked == 6 * int(masked.sum())
    assert values.count == 6 * int((~masked).sum())


def test_large_values_that_are_no_mask_count() -> None:
    assert found(torch.tensor([[-9e29, 2e5]])) == (float(torch.tensor(-9e29)), 2e5)
    assert found(torch.tensor([[-20_000.0, 60_000.0]], dtype=torch.float16)) == (-20_000, 60_000)


def test_a_mask_sets_no_channels_range_and_a_mask_alone_gives_zero() -> None:
    x = normal(4, 3, 5)
    x[0, 1, 2] = LOWEST
    low, high = ranges_of(Add(), task_of(x), [EDGE], axis=1)[EDGE]
    assert torch.equal(low, x.masked_fill(x == LOWEST, 0).amin((0, 2)).double().clamp_max(0))
    assert torch.equal(high, x.amax((0, 2)).double())
    assert found(torch.full((3, 4), LOWEST)) == (0, 0)
    grid = grid_of(tuple(torch.tensor([0.0]).double() for _ in "ab"))
    assert float(grid.scale.decode()) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"range": "mse"}, {"axis": 1}])
def test_values_that_no_grid_holds_are_refused(bad: float, settings: dict[str, Any]) -> None:
    x = normal(4, 3)
    x[1, 2] = bad
    with pytest.raises(RefusedError, match="/add:0: the edge holds infinite or NaN values"):
        found(normal(4, 3), x, **settings)


@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, -1e-30, 7e8])
def test_a_constant_edge_gets_a_usable_grid(range: str, value: float) -> None:
    task = task_of(torch.full((3, 4), value))
    grid = observed(Add(), task, [EDGE], range=range)[EDGE]
    assert bool(grid.scale.decode() > 0)
    out = gridded(Add(), {EDGE: grid})(torch.full((3, 4), value))
    assert torch.allclose(out, torch.full((3, 4), value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("range", RANGES)
def test_padding_tokens_do_not_count(range: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    states = normal(3, 5, 64)
    loud = states + 50.0 * (1 - mask)[:, :, None]
    want = EdgeValues(EDGE, range=range)
    want.add(states[mask == 1])
    for x in (loud, loud.reshape(3, 5, 8, 8)):
        batch = {"x": x, "attention_mask": mask}
        values = values_of(Add(), task_of(batch), [EDGE], range=range)[EDGE]
        assert values.range() == want.range()
        assert (values.count, values.padded) == (9 * 64, 6 * 64)


def test_padding_by_channels_and_where_no_token_axis_fits() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = normal(2, 3, 4)
    x[mask == 0] = 9.0
    low, high = ranges_of(Add(), task_of({"x": x, "attention_mask": mask}), [EDGE], axis=2)[EDGE]
    assert torch.equal(low, x[mask == 1].amin(0).double().clamp_max(0))
    assert torch.equal(high, x[mask == 1].amax(0).double().clamp_min(0))
    tokens = ranges_of(Add(), task_of({"x": x, "attention_mask": mask}), [EDGE], axis=1)[EDGE]
    assert float(tokens[1][2]) == 9.0  # a channel for each token
    for other in (x[:, :, 0], x.transpose(1, 2), x[:1]):  # [B, C], [B, C, T], another batch
        assert found({"x": other, "attention_mask": mask})[1] == 9.0
    assert found({"x": x, "attention_mask": mask[:, None, None]})[1] == 9.0
    everything = {"x": x, "attention_mask": torch.ones(2, 3)}
    assert found(everything)[1] == 9.0


class Pair(nn.Module):
    """An encoder-decoder by its configuration: it computes the decoder's inputs itself."""

    class Config:
        is_encoder_decoder = True

    config = Config()

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Add(), Add()

    def forward(self, x: Tensor, attention_mask: Tensor, decoder_attention_mask: Any = None) -> Tensor:
        return self.decoder(self.encoder(x))


def test_a_decoders_tokens_have_their_own_mask() -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    mask = {"attention_mask": torch.tensor([[1, 1, 0]])}
    names = ["encoder/add:0", "decoder/add:0"]
    for given, want in (({}, 3.0), ({"decoder_attention_mask": torch.tensor([[1, 0, 0]])}, 1.0)):
        ranges = ranges_of(Pair(), task_of({"x": x, **mask, **given}), names)
        assert [float(ranges[name][1]) for name in names] == [2.0, want]


@pytest.mark.parametrize("range", RANGES)
def test_empty_batches_are_passed_over(range: str) -> None:
    some = normal(6, 4)
    assert found(torch.zeros(0, 4), some, torch.zeros(0, 4), range=range) == found(some, range=range)
    with pytest.raises(SiteError, match="'/add:0' has no values: it is empty in every batch"):
        found(torch.zeros(0, 4), range=range)
    with pytest.raises(SiteError, match="has no values: all its tokens are padding"):
        found({"x": normal(2, 3, 4), "attention_mask": torch.zeros(2, 3)}, range=range)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("range", RANGES)
def test_other_precisions(dtype: torch.dtype, range: str) -> None:
    x = normal(500, 8).to(dtype)
    wide = x.double() if dtype == torch.float64 else x.float()
    assert found(x, range=range) == found(wide, range=range)
    if range == "minmax":
        assert found(x, range=range) == (float(x.min()), float(x.max()))


def test_a_changed_number_of_channels_is_refused() -> None:
    with pytest.raises(RefusedError, match="/add:0: axis 1 has 5 channels, and had 3 in an earlier batch"):
        ranges_of(Add(), task_of(normal(2, 3), normal(2, 5)), [EDGE], axis=1)


@pytest.mark.parametrize("signed", [False, True])
def test_sixteen_bits(signed: bool) -> None:
    x = normal(1000)
    grid = observed(Add(), task_of(x), [EDGE], bits=16, signed=signed)[EDGE]
    out = gridded(Add(), {EDGE: grid})(x)
    span = float(x.max() - x.min())
    assert (out - x).abs().max() <= span / 65535 * 0.51
    assert (out - x).abs().max() > 0


# --- halves ---


@pytest.mark.parametrize("batches", [1, 2, 3, 40])
def test_halves_are_of_earlier_and_later_samples(batches: int) -> None:
    values = EdgeValues(EDGE, axis=1)
    given = [normal(4, 3, 2, seed=k) for k in range(batches)]
    for x in given:
        values.add(x)
    assert len(values.parts) <= 16
    assert values.halves is not None
    x = torch.cat(given).double()

    def ends(part: Tensor) -> Tensor:
        return torch.stack([part.amin((0, 2)).clamp_max(0), part.amax((0, 2)).clamp_min(0)])

    halves = [torch.stack(half) for half in values.halves]
    fitting = [
        at for at in range(1, len(x))
        if torch.equal(halves[0], ends(x[:at])) and torch.equal(halves[1], ends(x[at:]))
    ]  # fmt: skip
    assert any(0.4 * len(x) <= at <= 0.6 * len(x) for at in fitting)


def test_a_single_sample_has_no_halves() -> None:
    values = EdgeValues(EDGE, axis=1)
    values.add(normal(1, 3, 5))
    assert values.halves is None
    assert values.ends is not None
