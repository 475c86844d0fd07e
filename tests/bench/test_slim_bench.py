"""bench/slim*.py: intervals over images, times of the right files, checks that see a wrong cut."""

import math

import numpy as np
import pytest
import torch
from torch import nn


def test_the_gain_is_the_mean_over_seeds_and_its_interval_is_over_images(bench):
    drawn = np.random.default_rng(0)
    ours = [(drawn.random(400) < 0.9).astype(float) for _ in range(3)]
    theirs = [(drawn.random(400) < 0.8).astype(float) for _ in range(3)]
    mean, low, high = bench("slim").gain(ours, theirs)
    each = [sum(o[n] - t[n] for o, t in zip(ours, theirs, strict=True)) / 3 for n in range(400)]
    middle = sum(each) / 400
    error = math.sqrt(sum((x - middle) ** 2 for x in each) / 399 / 400)
    assert mean == pytest.approx(100 * middle)
    assert (low, high) == (
        pytest.approx(100 * (middle - 1.9659 * error), abs=1e-3),  # t of 399 degrees of freedom
        pytest.approx(100 * (middle + 1.9659 * error), abs=1e-3),
    )


def test_seeds_that_agree_do_not_make_the_interval_narrower(bench):
    drawn = np.random.default_rng(1)
    ours, theirs = ((drawn.random(500) < share).astype(float) for share in (0.9, 0.85))
    one, three = (bench("slim").gain([ours] * n, [theirs] * n) for n in (1, 3))
    assert three[2] - three[1] == pytest.approx(one[2] - one[1], rel=0.02)


def test_a_ratio_is_the_median_of_the_ratios_of_rounds(bench):
    assert bench("slim_latency").ratio([1.0, 2.0, 10.0], [2.0, 8.0, 10.0]) == 2.0


def test_every_file_is_timed_in_every_round_forwards_and_backwards(bench, monkeypatch):
    latency, order = bench("slim_latency"), []
    monkeypatch.setitem(latency.BURSTS, 1, 0.0)
    calls = {name: (lambda x, name=name: order.append(name)) for name in "abc"}
    times = latency.timed(calls, np.zeros((1, 2)), rounds=2)
    assert {name: len(some) for name, some in times.items()} == {"a": 2, "b": 2, "c": 2}
    assert "".join(order[-6:]) == "abccba"


def test_two_runtimes_that_differ_are_an_error(bench):
    latency, x = bench("slim_latency"), np.array([1.0, -2.0])
    latency.same("net", x * (1 + 1e-5), x)
    with pytest.raises(ValueError, match=r"net: two runtimes differ by 0\.5"):
        latency.same("net", x + [0, 1], x)
    with pytest.raises(ValueError, match="differ by nan"):
        latency.same("net", x * math.nan, x)


def test_macs_are_those_of_the_formula(bench):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.Flatten(),
        nn.Linear(4 * 14 * 14, 10),
    )  # fmt: skip
    assert bench("slim_peer").macs(net.train()) == 28 * 28 * 4 * 9 + 14 * 14 * 4 * 2 * 9 + 784 * 10
    assert net.training


def test_the_peer_and_ours_follow_one_schedule(bench):
    from tersor.model.training_loop import rate

    for step in range(101):
        assert bench("slim_peer").rate(step / 100) == pytest.approx(rate(step, 100, "onecycle"), abs=1e-9)


def test_the_zoo_has_78_models_with_different_names(bench):
    families = [case.family for case in bench("slim_zoo").CASES.values()]
    assert len(families) == 78
    counts = {
        "torchvision": 24,
        "segmentation": 3,
        "detection": 2,
        "timm": 40,
        "transformers": 6,
        "recurrent": 3,
    }
    assert {family: families.count(family) for family in families} == counts


@pytest.fixture
def cut():
    """A model, the indices that stay, and the right result: the hidden units 0, 2 and 3 of five."""
    drawn = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    result = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    stays, kept = (
        [0, 2, 3],
        {"0.weight": {0: [0, 2, 3]}, "0.bias": {0: [0, 2, 3]}, "2.weight": {1: [0, 2, 3]}},
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=drawn))
        result[0].weight.copy_(model[0].weight[stays])
        result[0].bias.copy_(model[0].bias[stays])
        result[2].weight.copy_(model[2].weight[:, stays])
        result[2].bias.copy_(model[2].bias)
    return model, kept, result, torch.randn(6, 4, generator=drawn)


def test_a_right_cut_passes_all_checks(bench, cut):
    coverage, (model, kept, result, x) = bench("slim_coverage"), cut
    assert coverage.changed_values(coverage.tensors(model), result, kept) == ""
    apart, fault = coverage.differing(coverage.zeroed(model, kept), model, result, x)
    assert (apart < 1e-12, fault) == (True, "")


def test_units_that_are_paired_wrongly_are_seen(bench, cut):
    coverage, (model, kept, result, x) = bench("slim_coverage"), cut
    with torch.no_grad():
        result[2].weight.copy_(model[2].weight[:, [0, 1, 3]])
    said = coverage.changed_values(coverage.tensors(model), result, kept)
    assert said == "2.weight has other values than those that stay"
    assert "outputs differ" in coverage.differing(coverage.zeroed(model, kept), model, result, x)[1]


def test_a_cut_of_units_that_do_nothing_is_no_test(bench, cut):
    coverage, (model, kept, _, x) = bench("slim_coverage"), cut
    with torch.no_grad():
        model[2].weight[:, [1, 4]] = 0
    masked = coverage.zeroed(model, kept)
    assert "change nothing" in coverage.differing(masked, model, masked, x)[1]


def test_zeros_are_put_only_where_slices_were_removed(bench, cut):
    model, kept, _, _ = cut
    masked = bench("slim_coverage").zeroed(model, kept)
    assert (masked[0].weight[[1, 4]] == 0).all()
    assert torch.equal(masked[0].weight[[0, 2, 3]], model[0].weight[[0, 2, 3]])
    assert (masked[2].weight[:, [1, 4]] == 0).all()
    assert torch.equal(masked[2].bias, model[2].bias)
    assert not (model[0].weight == 0).any()
