"""Prune's correction: outputs nearer, masks as without it, zeros exact, and what is left alone named."""

from typing import Any

import pytest
import torch
from test_compensated import LAYERS, draw, error, notes, seeded, task_of
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.run import run
from tersor.core.state import State
from tersor.forms import Masked
from tersor.model.task import Task
from tersor.steps import Cluster, Entropy, Factorize, Prune, Quantize, refit_kept


def masks(result: State) -> dict[str, Tensor]:
    return {n: f.keep.decode() for n, f in result.forms.items() if isinstance(f, Masked)}


def energy(result: State, net: nn.Module, x: Tensor) -> float:
    return float(error(result, net, x).square().mean())


@pytest.mark.parametrize("settings", [{"keep": 0.4}, {"pattern": "2:4"}, {"threshold": 0.1}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_nearer_with_the_same_mask(name: str, settings: dict[str, Any]) -> None:
    make, shape = LAYERS[name]
    net, x = nn.Sequential(seeded(make, 3)), draw(*shape, seed=3)
    plain, corrected = (run(net, Prune(**settings, correct=c), task_of(x)) for c in (False, True))
    mask = masks(plain)["0.weight"]
    assert torch.equal(masks(corrected)["0.weight"], mask)
    assert not corrected.state_dict()["0.weight"][~mask].any()
    assert torch.equal(plain.state_dict()["0.weight"][mask], net[0].weight[mask])
    assert mask.all() or energy(corrected, net, x) < energy(plain, net, x)


def test_it_is_the_least_squares_of_the_samples() -> None:
    """The weights and the bias of a row, against PyTorch's own least squares on the inputs that are kept."""
    net, x = nn.Sequential(seeded(lambda: nn.Linear(7, 5), 1)), draw(4000, 7)
    result = run(net, Prune(keep=0.5), task_of(x, batch=400))
    mask, w = masks(result)["0.weight"], result.state_dict()["0.weight"]
    y = net(x).detach()
    for o in range(5):
        inputs = torch.cat([x[:, mask[o]], torch.ones(len(x), 1)], 1)
        best = torch.linalg.lstsq(inputs, y[:, o]).solution
        least = (inputs @ best - y[:, o]).square().mean()
        found = (x @ w[o] + result.state_dict()["0.bias"][o] - y[:, o]).square().mean()
        assert found <= 1.02 * least + 1e-9


class Deep(nn.Sequential):
    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Linear(16, 16), nn.ReLU()]
        super().__init__(*layers, nn.Linear(16, 4))


def test_a_layer_takes_over_what_the_layers_before_it_lost() -> None:
    """On inputs that it has not seen, by far nearer than the mask alone."""
    net = seeded(Deep, 0)
    x, new = draw(600, 16), draw(600, 16, seed=1)
    plain, corrected = (run(net, Prune(keep=0.6, correct=c), task_of(x, 100)) for c in (False, True))
    assert energy(corrected, net, new) < 0.5 * energy(plain, net, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_that_cuts_nothing_changes_nothing(dtype: torch.dtype) -> None:
    net, x = seeded(Deep, 0).to(dtype), draw(300, 16).to(dtype)
    result = run(net, Prune(keep=1.0), task_of(x))
    assert all(torch.equal(result.state_dict()[n], value) for n, value in net.state_dict().items())


def test_layers_of_which_nothing_was_cut_stay_bit_for_bit() -> None:
    """In float64 no rounding to fewer digits hides that a layer was solved for again."""
    net, x = seeded(Deep, 0).double(), draw(300, 16).double()
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight.sign())  # above the threshold
    result = run(net, Prune(threshold=0.1), task_of(x))
    assert notes(result, "corrected")[0].data["layers"] == 5
    for name, value in net.state_dict().items():
        assert torch.equal(result.state_dict()[name], value) == name.startswith("0.")


def test_without_calibration_batches_only_the_masks_are_set_and_it_is_said() -> None:
    net, x = seeded(Deep, 0), draw(40, 16)
    task = Task("t", evaluate=[(x, torch.zeros(40, dtype=torch.int64))])
    result, plain = run(net, Prune(keep=0.4), task), run(net, Prune(keep=0.4))
    assert result.digest == plain.digest
    (said,) = notes(result, "corrected")
    assert said.text.startswith("kept weights stay as they are: the task has no calibration batches")
    assert not notes(plain, "corrected")


def test_correct_false_is_the_mask_alone() -> None:
    net, x = seeded(Deep, 0), draw(300, 16)
    assert run(net, Prune(keep=0.4, correct=False), task_of(x)).digest == run(net, Prune(keep=0.4)).digest


class Odd(nn.Module):
    """A shared weight, a parameter of its own, a layer that no batch reaches, and one to refit."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.own = nn.Parameter(torch.randn(6, 6))
        self.never = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x).relu()).relu() @ self.own)


def test_what_is_left_alone_keeps_its_values_and_is_named() -> None:
    net, x = seeded(Odd, 0), draw(200, 6)
    result = run(net, Prune(keep=0.5), task_of(x))
    (said,) = notes(result, "corrected")
    assert said.data["layers"] == 1
    assert said.data["left"] == {
        "one.weight": "several layers share it",
        "own": "the inputs of Odd are not observed",
        "never.weight": "its module is not called on calibration batches",
    }
    for name in said.data["left"]:
        mask = masks(result)[name]
        assert torch.equal(result.state_dict()[name], torch.where(mask, net.state_dict()[name], 0.0))


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (Quantize(bits=4), "its weights are on a grid"),
        (Cluster(entries=4), "its weights are on a grid"),
        (Factorize(rank=2), "it is stored as a product or a sum"),
    ],
    ids=["grid", "shared values", "product"],
)
def test_grids_tables_and_products_stay(first: Any, why: str) -> None:
    net, x = nn.Sequential(seeded(lambda: nn.Linear(8, 8), 0)), draw(100, 8)
    before = run(net, first, task_of(x))
    result, plain = (run(before, Prune(keep=0.5, correct=c), task_of(x)) for c in (True, False))
    assert result.digest == plain.digest
    assert notes(result, "corrected")[0].data["left"] == {"0.weight": why}


def test_coded_and_pruned_weights_are_refitted_as_plain_ones() -> None:
    net, x = seeded(Deep, 0), draw(300, 16)
    task = task_of(x)
    plain, coded = (run(net, [*first, Prune(keep=0.4)], task) for first in ([], [Entropy()]))
    assert all(torch.equal(plain.state_dict()[n], value) for n, value in coded.state_dict().items())
    twice = run(run(net, Prune(keep=0.6), task), Prune(keep=0.3), task)
    for name, mask in masks(twice).items():
        assert int(mask.sum()) <= mask.numel()
        assert not twice.state_dict()[name][~mask].any()
    assert not notes(twice, "corrected")[-1].data["left"]


def test_frozen_biases_stay() -> None:
    net, x = seeded(Deep, 0), draw(300, 16)
    net[0].bias.requires_grad_(False)
    result = run(net, Prune(keep=0.4), task_of(x))
    assert torch.equal(result.state_dict()["0.bias"], net[0].bias)
    assert not torch.equal(result.state_dict()["2.bias"], net[2].bias)


def test_inputs_that_are_not_finite_leave_a_layer_as_it_is() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)) / 0.0).nan_to_num()

    net, x = seeded(Infinite, 0), draw(200, 6)
    result = run(net, Prune(keep=0.5), task_of(x))
    assert list(notes(result, "corrected")[0].data["left"]) == ["b.weight"]
    mask = masks(result)["b.weight"]
    assert torch.equal(result.state_dict()["b.weight"], torch.where(mask, net.b.weight, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    net, x = seeded(Deep, 0).to(dtype), draw(300, 16).to(dtype)
    plain, corrected = (run(net, Prune(keep=0.5, correct=c), task_of(x)) for c in (False, True))
    assert {value.dtype for value in corrected.state_dict().values()} == {dtype}
    assert energy(corrected, net, x) < energy(plain, net, x)


def test_two_runs_are_equal_and_the_given_model_stays_as_it_was() -> None:
    net, x = seeded(Deep, 0), draw(300, 16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    one, two = (run(net, Prune(keep=0.4), task_of(x)) for _ in range(2))
    assert one.digest == two.digest
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_few_samples_are_said() -> None:
    net, x = seeded(Deep, 0), draw(20, 16)
    (said,) = notes(run(net, Prune(keep=0.5), task_of(x)), "corrected")
    assert said.data["few"]["0.weight"] == "20 for 16 inputs"
    assert "give more calibration batches" in said.text


def test_a_refit_that_brings_outputs_no_nearer_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = seeded(Deep, 0), draw(300, 16)
    right = refit_kept.kept_weights
    monkeypatch.setattr(refit_kept, "kept_weights", lambda *args: -3 * right(*args))
    result = run(net, Prune(keep=0.6), task_of(x))
    assert result.digest == run(net, Prune(keep=0.6)).digest
    (said,) = notes(result, "corrected")
    assert said.text.startswith("kept weights stay as they are: refitted, they bring the outputs no nearer")
    assert said.data == {"layers": 0}


class Detects(nn.Module):
    """Its number of outputs depends on its weights, so outputs cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(self.body(x).relu())
        return found[found[:, 0] > 0]


def test_layers_of_a_model_with_outputs_of_any_size_are_refitted() -> None:
    net, x = seeded(Detects, 0), draw(300, 16)
    result = run(net, Prune(keep=0.5), task_of(x))
    assert notes(result, "corrected")[0].data["layers"] == 2
    assert not torch.equal(result.state_dict()["head.bias"], net.head.bias)
