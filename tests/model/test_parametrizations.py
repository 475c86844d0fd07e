"""Effective: weights that layers compute become plain, for steps, files and fresh models."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from tersor.core.run import run
from tersor.core.state import start
from tersor.errors import RefusedError
from tersor.forms import Masked
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.parametrizations import computed
from tersor.model.task import Task
from tersor.steps import Finetune, Prune, Quantize

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def own(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def twice(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)
    return prune.l1_unstructured(layer, "weight", 0.3)


def plain(layer: nn.Module) -> nn.Module:
    return layer


MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of old": weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm of old": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": own,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": twice,
}
each_way = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def net(make: Callable[[nn.Module], nn.Module], seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(make(nn.Linear(6, 8)), nn.ReLU(), make(nn.Linear(8, 4)))


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
TASK = Task("line", evaluate=[(X, X.sum(1).long() % 4)], calibrate=[(X,)], train=[(X, X.sum(1).long() % 4)])


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


@each_way
def test_what_a_run_gives_loads_its_own_state_dict(make: Callable[[nn.Module], nn.Module]) -> None:
    """PyTorch's remove_spectral_norm leaves a hook that asks for the tensors it removed."""
    small = run(net(make), Prune(keep=0.5)).model()
    small.load_state_dict({name: value * 2 for name, value in small.state_dict().items()})
    int8 = run(net(make), Quantize(activations=8), TASK)
    assert (out(int8.model()) - out(net(make))).abs().max() < 0.05 * out(net(make)).abs().max()


@each_way
@pytest.mark.parametrize("training", [True, False])
def test_a_state_has_the_outputs_of_the_model_and_does_not_change_it(
    make: Callable[[nn.Module], nn.Module], training: bool
) -> None:
    model = net(make).train(training)
    before, kinds = copy.deepcopy(model.state_dict()), [type(layer) for layer in model]
    state = start(model, TASK)
    assert {"0.weight", "2.weight", "0.bias", "2.bias"} == set(state.sites)
    assert all(state.sites[f"{n}.weight"].is_weight for n in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [type(layer) for layer in model] == kinds
    assert len(computed(model)) >= 2
    assert all(parameter.requires_grad for parameter in state.model().parameters())
    assert len(list(state.model().parameters())) == 4
    assert model.training == training
    torch.testing.assert_close(out(state.model()), out(model), rtol=1e-5, atol=1e-6)
    (note,) = state.ledger.notes("effective")
    assert "0.weight (" in note.text
    assert "2.weight (" in note.text


@each_way
def test_pruning_acts_on_the_weight_that_runs(make: Callable[[nn.Module], nn.Module]) -> None:
    """Pruning whole rows of a direction would give 0 / 0."""
    model = net(make)
    out(model)  # the older norms compute their weight in the forward
    result = run(model, Prune(keep=0.05, per="tensor", correct=False), TASK)
    small = result.model()
    answers = out(small)
    assert answers.isfinite().all()
    weights = [small[0].weight, small[2].weight]
    for n, weight in zip((0, 2), weights, strict=True):
        want = model[n].weight.detach()
        kept = weight != 0
        assert int(kept.sum()) <= round(0.05 * want.numel()) + 1
        torch.testing.assert_close(weight[kept], want[kept])
    assert type(small[0]) is nn.Linear


@each_way
def test_a_file_loads_into_models_with_and_without_parametrization(
    make: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    result = run(net(make), Quantize(bits=6), TASK)
    save(result, tmp_path / "small.tersor")
    loaded = load(tmp_path / "small.tersor")
    want = out(result.model())
    for given in (net(make, seed=3), net(plain, seed=4)):
        # Weights may have another memory layout, and sums another order.
        torch.testing.assert_close(out(loaded.model(given)), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out(loaded.on(given).model()), want, rtol=1e-5, atol=1e-6)


def test_a_pruned_model_has_masks_and_keeps_them_in_training() -> None:
    model = net(MAKERS["pruned"])
    state = start(model, TASK)
    assert all(isinstance(state.forms[f"{n}.weight"], Masked) for n in (0, 2))
    result = run(model, Finetune(epochs=2, lr=0.1), TASK)
    for n in (0, 2):
        mask = model[n].weight_mask.bool()
        after = result.forms[f"{n}.weight"].decode()
        assert not after[~mask].any()
        assert not torch.equal(after, model[n].weight)


def test_tied_sources_are_refused() -> None:
    model = net(MAKERS["spectral_norm"])
    model.append(nn.Linear(8, 4))
    model[3].weight = model[2].parametrizations.weight.original
    with pytest.raises(RefusedError, match="another layer uses too.*Untie the layers first") as caught:
        start(model)
    assert "2.weight" in str(caught.value)


def test_a_pruned_direction_becomes_the_weight_that_runs() -> None:
    model = net(lambda layer: prune.l1_unstructured(weight_norm(layer), "weight_v", 0.5))
    state = start(model, TASK)
    torch.testing.assert_close(out(state.plain()), out(model))
    assert {"0.weight", "2.weight"} <= set(state.sites)


class Adapter(nn.Module):
    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(1, columns)), nn.Parameter(torch.randn(rows, 1))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.b @ self.a


def test_a_weight_is_trained_if_its_adapter_is() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    for layer in model:
        layer.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", Adapter(*layer.weight.shape))
    model[1].parametrizations.weight[0].requires_grad_(False)
    state = start(model)
    assert [layer.weight.requires_grad for layer in state.plain()] == [True, False]
    (note,) = state.ledger.notes("effective")
    assert "0.weight (Adapter, a part was frozen, now all of it is trained), 1.weight (Adapter)" in note.text


class Noisy(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + torch.randn_like(w)


def test_a_random_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    parametrize.register_parametrization(model[0], "weight", Noisy())
    with pytest.raises(RefusedError, match=r"0\.weight: Noisy computes a different weight each time"):
        start(model)
