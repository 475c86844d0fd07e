"""Rdoq: budgets and drops are met, data helps, structure is kept, and wrong settings are refused."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import nn

from tersor.core.run import run
from tersor.core.state import State, start
from tersor.errors import RefusedError, SettingError, TaskError
from tersor.forms import Affine, LowRank, Masked, Sum, uncoded
from tersor.io.container_writer import save
from tersor.model.task import Task
from tersor.steps import Entropy, Factorize, Prune, Quantize, Rdoq
from tersor.steps.price_search import largest, least

MODELS = ("mlp", "conv", "attention", "lstm", "mixed")


class Wide(nn.Module):
    """A model large enough for its bits to matter, with inputs of different size that are correlated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 128), nn.Linear(128, 96), nn.Linear(96, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x).relu()).relu())


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, Task]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wide().eval()
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(-1.5, 0.5, 64)[:, None]
    x = torch.randn(800, 64, generator=generator) @ mix
    with torch.no_grad():
        y = model(x)
    batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 800, 50)]
    return model, Task(
        "wide", evaluate=batches[12:], calibrate=batches[:12], loss=nn.functional.mse_loss,
        metric=lambda out, target: -(out - target).square().sum(1) / target.square().sum(1),
    )  # fmt: skip


def loss(result: State, task: Task) -> float:
    return -float(task.scores(result.model()).mean())


def expected_bits(result: State) -> float:
    return sum(e.data["bits"] for e in result.ledger.entries if e.kind == "done" and "bits" in e.data)


@pytest.mark.parametrize("bits", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("weigh", ["output", "inputs", "none"])
def test_bits_are_what_was_asked_for(wide: tuple[nn.Module, Task], bits: float, weigh: str) -> None:
    model, task = wide
    result = run(model, Rdoq(bits=bits, weigh=weigh, vectors=False), task)
    count = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert 0.97 * bits < expected_bits(result) / count <= bits


def test_data_lowers_the_loss_at_equal_bits(wide: tuple[nn.Module, Task]) -> None:
    model, task = wide
    lost = {
        w: loss(run(model, Rdoq(bits=3, weigh=w, vectors=False), task), task)
        for w in ("output", "inputs", "none")
    }
    assert lost["output"] < 0.7 * lost["inputs"] < 0.7 * lost["none"]


def test_it_beats_plain_rounding_at_the_same_size(wide: tuple[nn.Module, Task]) -> None:
    model, task = wide
    plain = run(model, [Quantize(bits=4), Entropy()], task)
    mine = run(model, [Rdoq(nbytes=plain.nbytes, weigh="none"), Entropy()], task)
    assert mine.nbytes <= plain.nbytes
    assert loss(mine, task) < 0.9 * loss(plain, task)


@pytest.mark.parametrize("nbytes", [6000, 12000])
def test_a_file_is_no_larger_than_the_budget(wide: tuple[nn.Module, Task], nbytes: int, tmp_path) -> None:
    model, task = wide
    result = run(model, [Rdoq(nbytes=nbytes), Entropy()], task)
    assert 0.85 * nbytes < result.nbytes <= nbytes
    assert save(result, tmp_path / "model.tersor") < nbytes + 2500, "the header holds the ledger"


@pytest.mark.parametrize("most", [0.005, 0.05])  # in the metric's own unit
def test_the_metric_drops_by_no_more_than_allowed(wide: tuple[nn.Module, Task], most: float) -> None:
    model, task = wide
    metric = task.metric
    shifted = replace(task, metric=lambda *given: metric(*given) - 0.5)  # scores of 0 and 1 are answers
    result = run(model, Rdoq(max_drop=most), shifted)
    (note,) = result.ledger.notes("decided")
    found, judged = note.data["found"], note.data["judged"]
    assert (found["n"], judged["n"]) == (300, 200), "half of the calibration samples; the evaluation set"
    assert 0.7 * most < found["drop"][0] <= most
    assert found["drop"][2] < 1.15 * most, "the interval ends at the limit, up to the noise of one rounding"
    assert judged["drop"][0] == pytest.approx(loss(result, task), rel=1e-3)
    assert judged["drop"][1] < most


def test_the_evaluation_set_decides_nothing(wide: tuple[nn.Module, Task]) -> None:
    """Other evaluation batches give the same codes, and the batches that decide are not those that weigh."""
    model, task = wide
    metric = lambda *given: task.metric(*given) - 0.5  # noqa: E731
    shuffled = [(x, y.flip(0)) for x, y in task.evaluate]
    forms = [
        run(model, Rdoq(max_drop=0.02), replace(task, metric=metric, evaluate=batches)).digest
        for batches in (task.evaluate, shuffled)
    ]
    assert forms[0] == forms[1]
    swapped = [
        batch for pair in zip(task.calibrate[1::2], task.calibrate[::2], strict=True) for batch in pair
    ]
    other = run(model, Rdoq(max_drop=0.02), replace(task, metric=metric, calibrate=swapped))
    assert other.digest != forms[0]


def answers(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    return [(x[i : i + 100], x[i : i + 100, :4].argmax(1)) for i in range(0, count, 100)]


def test_which_set_decides(wide: tuple[nn.Module, Task]) -> None:
    """Calibration batches with targets if they can show the drop, else training batches, else a refusal."""
    model, _ = wide
    sets = {"evaluate": answers(300, 0), "calibrate": answers(400, 1)}
    for limit, train, says in (
        (15.0, None, "decided by 200 calibration samples"),
        (15.0, answers(1000, 2), "decided by 200 calibration samples"),
        (5.0, answers(1000, 2), "decided by 1000 training samples"),
    ):
        task = Task("answers", **sets, train=train)
        (note,) = run(model, Rdoq(max_drop=limit), task).ledger.notes("decided")
        assert says in note.text
    with pytest.raises(RefusedError, match="200 calibration samples cannot show a drop within max_drop=0.5"):
        run(model, Rdoq(max_drop=0.5), Task("answers", **sets))
    bare = [(x,) for x, _ in sets["calibrate"]]
    for calibrate in (None, bare, sets["calibrate"][:1]):
        only = Task("answers", evaluate=sets["evaluate"], calibrate=calibrate)
        with pytest.raises(RefusedError, match=r"and task 'answers' has no others\. Give Task\(calibrate="):
            run(model, Rdoq(max_drop=5.0), only)


@pytest.mark.parametrize("name", MODELS)
def test_structure_is_kept_above_leaves(name: str) -> None:
    t = tiny(name)
    pruned = run(t.model, [Prune(keep=0.5), Rdoq(bits=3)], t.task)
    for site, form in pruned.forms.items():
        if pruned.sites[site].is_weight:
            assert isinstance(form, Masked)
            assert isinstance(form.body, Affine)
            assert not form.decode()[~form.keep.decode()].any()
    product = run(t.model, [Factorize(keep=0.9), Rdoq(bits=5)], t.task)
    factors = [form for form in product.forms.values() if isinstance(form, LowRank)]
    assert all(isinstance(form.left, Affine) for form in factors)
    assert name != "mixed" or factors


def test_factors_are_weighed_by_each_other(wide: tuple[nn.Module, Task]) -> None:
    model, task = wide
    result = run(model, [Factorize(rank=60), Rdoq(bits=4, vectors=False)], task)
    given = run(model, [Factorize(rank=60)], task)
    plain = run(given, Rdoq(bits=4, weigh="none", vectors=False), task)
    base = loss(given, task)
    assert loss(result, task) - base < 0.7 * (loss(plain, task) - base)


@pytest.mark.parametrize("per", ["tensor", "channel", "input", "both"])
def test_each_way_to_share_steps_is_stored(wide: tuple[nn.Module, Task], per: str, tmp_path) -> None:
    model, task = wide
    result = run(model, [Rdoq(bits=3, per=per), Entropy()], task)
    form = uncoded(result.forms["two.weight"])
    assert isinstance(form, Affine)
    shape = {"tensor": (1, 1), "channel": (96, 1), "input": (96, 128), "both": (96, 128)}[per]
    assert form.scale.shape == shape
    assert loss(result, task) < 0.2


def test_vectors_are_rounded_finely_and_on_request() -> None:
    t = tiny("conv")
    for weigh in ("output", "none"):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.LayerNorm(20), nn.Linear(20, 3))
            model[2].weight.uniform_(0.5, 1.5)
        given = start(model)
        result = run(given, Rdoq(bits=3, weigh=weigh), t.task)
        assert isinstance(result.forms["2.weight"], Affine)
        error = (result.forms["2.weight"].decode() - given.forms["2.weight"].decode()).abs().max()
        assert error < 0.1
        left = run(given, Rdoq(bits=3, weigh=weigh, vectors=False), t.task)
        assert left.forms["2.weight"].digest == given.forms["2.weight"].digest


def test_wrong_settings_are_refused() -> None:
    for settings, says in (
        ({"bits": 3.0, "nbytes": 100}, "bits and nbytes given"),
        ({"lam": 0.0}, "lam=0.0"),
        ({"bits": 17.0}, "above 0, to 16"),
        ({"weigh": "output?"}, "did you mean 'output'"),
        ({"per": "chanels"}, "did you mean 'channel'"),
        ({"damp": 0.0}, "damp"),
        ({"where": ""}, "glob"),
    ):
        with pytest.raises(SettingError, match=says.replace("?", r"\?")):
            Rdoq(**settings)


def test_missing_inputs_are_named(wide: tuple[nn.Module, Task]) -> None:
    model, task = wide
    with pytest.raises(RefusedError, match="needs a task"):
        run(model, Rdoq(max_drop=1.0))
    with pytest.raises(TaskError, match="calibrate"):
        run(model, Rdoq(weigh="output"), replace(task, calibrate=None))
    with pytest.raises(RefusedError, match="nbytes=10 is too small"):
        run(model, Rdoq(nbytes=10), task)


def test_the_least_price_within_a_budget() -> None:
    found = least(
        lambda price: 1000 - 50 * torch.tensor(price).log2().item(), 700, 1.0, slope=80, near=0.01, who="x"
    )
    assert 63 < found < 70
    with pytest.raises(RefusedError, match="fewest found"):
        least(lambda price: 1000.0, 700, 1.0, slope=80, near=0.01, who="x")


def exact(loss: Callable[[float], float]) -> Callable[[float], tuple[float, float]]:
    """A loss without an interval."""
    return lambda price: (loss(price), loss(price))


def test_the_largest_price_within_a_limit() -> None:
    for start_at in (1e-6, 1.0, 1e6):
        found = largest(exact(lambda price: price / 3), 3.0, start_at, who="x")
        assert found == pytest.approx(9, rel=0.02)
        # loss + half = price + 2 * price^0.5 = 3 at a price of 1
        found = largest(lambda price: (price, price + 2 * price**0.5), 3.0, start_at, who="x")
        assert found == pytest.approx(1, rel=0.02)
    step = largest(exact(lambda price: 0.0 if price < 7 else 4.0), 3.0, 1.0, who="x")
    assert 6 < step < 7, "no power law: by bisection"
    with pytest.raises(RefusedError, match="max_drop=3 is not met"):
        largest(exact(lambda price: 4.0), 3.0, 1.0, who="x")


def test_noise_of_a_loss_moves_the_price_little() -> None:
    """The drop counts 40 answers at the limit, with a noise of their square root: the price found varies much
    less than the largest of the tries within the limit would."""
    random = np.random.default_rng(0)

    def noisy(price: float) -> tuple[float, float]:
        changed = 40 * price
        loss = changed + 0.7 * changed**0.5 * random.standard_normal()
        return loss, loss + 1.96 * changed**0.5

    limit = 40 + 1.96 * 40**0.5
    found = np.log2([largest(noisy, limit, 1.0, who="x") for _ in range(40)])
    luckiest = np.log2(
        [max(p for p in 2 ** np.linspace(-1, 1, 12) if noisy(p)[1] <= limit) for _ in range(40)]
    )
    assert abs(found.mean()) < 0.05
    assert found.std() < 0.12
    assert found.std() < 0.7 * luckiest.std()


def test_a_few_codes_beyond_a_byte_are_stored_apart(tmp_path) -> None:
    """One huge weight does not make all codes two bytes wide, and is not clipped."""
    layer = nn.Linear(100, 80, bias=False)
    with torch.no_grad():
        layer.weight[3, 7] = 500.0
    result = run(layer, [Rdoq(lam=1e-3, per="tensor"), Entropy()])
    form = uncoded(result.forms["weight"])
    assert isinstance(form, Sum)
    assert form.a.codes.decode().dtype is torch.int8
    assert float((form.decode() - layer.weight.detach()).abs().max()) < 0.2 * 500
    assert abs(float(form.decode()[3, 7]) - 500) < float(form.a.scale.decode()[0, 0])
    nbytes = save(result, tmp_path / "m.tersor")
    assert nbytes > 0


def test_a_search_beyond_the_range_of_floats_ends_in_a_message() -> None:
    for start_at in (1e-290, 1e290):
        with pytest.raises(RefusedError, match="fewest found"):
            least(lambda price: 1000.0, 1, start_at, slope=1e-9, near=0.01, who="x")
        with pytest.raises(RefusedError, match="is not met"):
            largest(exact(lambda price: 4.0), 3.0, start_at, who="x")
        assert 0 < largest(exact(lambda price: 2.0), 3.0, start_at, who="x") < float("inf")
