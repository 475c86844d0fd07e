"""Mixed bits: damage as in a slow formula, the choice as good as brute force, the drop within the limit."""

import itertools

import pytest
import torch
from torch import nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError
from tersor.forms import Affine
from tersor.model.task import Task
from tersor.steps import Prune, Quantize
from tersor.steps.mixed_bits import weighed


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return [(x[i : i + 100], x[i : i + 100, :4].argmax(1)) for i in range(0, count, 100)]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Task]:
    """A classifier of the largest of four inputs, whose layers differ in size and in what an error costs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(6):
            for x, y in batches(3000, 3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    return model.eval(), Task(
        "largest", evaluate=batches(1000, 1), calibrate=batches(4000, 2), train=batches(3000, 3)
    )


def bits_of(result: State) -> dict[str, int]:
    (note,) = result.ledger.notes("allocated")
    return dict(note.data["bits"])


def apart(model: nn.Module, result: State) -> float:
    """Mean squared change of the probabilities."""
    x = torch.cat([x for x, _ in batches(4000, 2)])
    with torch.no_grad():
        return float((model(x).softmax(1) - result.model()(x).softmax(1)).square().sum(1).mean())


def test_the_choice_is_near_the_best_of_all_assignments(trained: tuple[nn.Module, Task]) -> None:
    """Brute force runs each assignment of 2, 3 and 6 bits that fits and measures the outputs' change."""
    model, task = trained
    result = run(model, Quantize(allowed="2, 3,6", mean_bits=3.2, per="tensor"), task)
    chosen = bits_of(result)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    assert list(chosen) == list(sizes)
    for name, bits in chosen.items():
        form = result.forms[name]
        assert isinstance(form, Affine)
        assert form.bits == bits
    found = {}
    for each in itertools.product((2, 3, 6), repeat=3):
        if sum(n * b for n, b in zip(sizes.values(), each, strict=True)) <= 3.2 * sum(sizes.values()):
            steps = [Quantize(bits=b, where=name, per="tensor") for name, b in zip(sizes, each, strict=True)]
            found[each] = apart(model, run(model, steps, task))
    assert tuple(chosen.values()) in found
    assert apart(model, result) <= 1.15 * min(found.values())
    assert apart(model, result) < 0.7 * apart(model, run(model, Quantize(bits=3, per="tensor"), task))


def test_the_damage_is_that_of_the_slow_formula() -> None:
    g = torch.Generator().manual_seed(0)
    e, f, h = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((3, 5), (3, 3), (5, 5)))
    f, h = f @ f.T, h @ h.T  # second moments
    assert weighed(e, f, h) == pytest.approx(float((f @ e @ h @ e.T).trace()))
    diagonal = float((f.diagonal().diag() @ e @ h.diagonal().diag() @ e.T).trace())
    assert weighed(e, f.diagonal(), h.diagonal()) == pytest.approx(diagonal)
    assert weighed(e, None, None) == pytest.approx(float(e.square().sum()))


def test_a_drop_is_met_and_layers_that_lose_too_much_stay(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    means = []
    for limit in (0.6, 1.5, 6.0):
        result = run(model, Quantize(allowed="2,4", max_drop=limit), task)
        (decided,) = result.ledger.notes("decided")
        assert decided.data["found"]["drop"][2] <= limit, "the end of the interval"
        (note,) = result.ledger.notes("allocated")
        means.append(note.data["mean"])
        for name, bits in bits_of(result).items():
            assert (bits == 32) == (not isinstance(result.forms[name], Affine))
            skipped = [e for e in result.ledger.entries if e.site == name and e.kind == "skipped"]
            assert bool(skipped) == (bits == 32)
    assert means[0] >= means[1] >= means[2]
    assert means[0] > means[2]


def test_without_data_the_relative_error_decides(trained: tuple[nn.Module, Task]) -> None:
    model, _ = trained
    result = run(model, Quantize(allowed="4,8"))
    assert set(bits_of(result).values()) <= {4, 8}
    (note,) = result.ledger.notes("allocated")
    assert 4 <= note.data["mean"] <= 6
    with pytest.raises(RefusedError, match="needs a task"):
        run(model, Quantize(allowed="4,8", max_drop=1.0))


def test_structure_is_kept_and_training_goes_on(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    result = run(model, [Prune(keep=0.5), Quantize(allowed="3,6", mean_bits=4, epochs=1)], task)
    for name in bits_of(result):
        assert not result.forms[name].decode()[~result.forms[name].keep.decode()].any()
    assert result.ledger.notes("trained")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mean_bits": 5.0}, "It needs allowed"),
        ({"max_drop": 1.0}, "It needs allowed"),
        ({"allowed": "8"}, "two or more numbers of bits"),
        ({"allowed": "8,x"}, "two or more numbers of bits"),
        ({"allowed": "1,8"}, "2 to 16"),
        ({"allowed": "4,8", "bits": 3}, "has no effect"),
        ({"allowed": "4,8", "mean_bits": 3.0}, "gives 4 to 8 bits"),
        ({"allowed": "4,8", "mean_bits": 5.0, "max_drop": 1.0}, "leave out one of the two"),
        ({"allowed": "4,8", "activations": 8}, "activations=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        Quantize(**settings)
