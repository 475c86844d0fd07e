"""Factorize: the best product of its rank, by plain or whitened error; layers that would not shrink stay."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import SettingError
from tersor.forms import LowRank
from tersor.model import curvature
from tersor.model.sites import Site
from tersor.model.task import Task
from tersor.steps import Entropy, Factorize, Finetune, Prune, Quantize

MODELS = ("mlp", "conv", "attention", "lstm", "mixed")


def factored(result: State) -> list[str]:
    return [name for name, form in result.forms.items() if isinstance(form, LowRank)]


def singular(w: Tensor) -> np.ndarray:
    return np.linalg.svd(w.flatten(1).numpy().astype(np.float64), compute_uv=False)


def lost(before: Tensor, after: Tensor) -> float:
    return float((before.double() - after.double()).square().sum())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_the_share_kept_is_a_budget(model: str, keep: float) -> None:
    """Of each weight the largest rank within the budget, at least 1, or no cut at all."""
    t = tiny(model)
    result = run(t.model, Factorize(keep=keep, per="tensor"))
    noted = {entry.site: entry for entry in result.ledger.entries if entry.kind in ("done", "skipped")}
    for name, site in result.sites.items():
        if not site.is_weight:
            continue
        w = t.model.state_dict()[name]
        outs, ins = w.flatten(1).shape
        rank = max(1, int(keep * outs * ins / (outs + ins) + 1e-9))
        if rank * (outs + ins) >= outs * ins:
            assert result.forms[name].name == "dense"
            assert noted[name].text == (
                f"rank {rank} stores {rank * (outs + ins)} numbers, the weight {outs * ins}"
            )
            continue
        form = result.forms[name]
        assert isinstance(form, LowRank)
        assert form.left.shape == (outs, rank)
        assert form.right.shape == (rank, *w.shape[1:])
        assert form.nbytes == 4 * rank * (outs + ins)
        assert noted[name].data["rank"] == rank


def numbers(form: Any) -> int:
    whole = not isinstance(form, LowRank)
    return form.decode().numel() if whole else form.left.decode().numel() + form.right.decode().numel()


def products(w: Tensor, x: Tensor | None) -> list[tuple[int, float]]:
    """(numbers, relative error of the outputs) of a weight [O, I], for each rank that saves numbers and for
    all of it, by numpy. `x`: the inputs [N, I], None for none."""
    w64 = w.double().numpy()
    root = np.eye(w.shape[1]) if x is None else np.linalg.svd(x.double().numpy(), full_matrices=False)[1:]
    root = root if x is None else root[1].T * root[0]
    energy = np.linalg.svd(w64 @ root, compute_uv=False) ** 2
    found = [
        (rank * sum(w.shape), float(energy[rank:].sum() / energy.sum()))
        for rank in range(1, len(energy) + 1)
        if rank * sum(w.shape) < w.numel()
    ]
    return [*found, (w.numel(), 0.0)]


def chain() -> tuple[nn.Sequential, Tensor]:
    """Three layers whose singular values fall at different rates, and a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6))
        with torch.no_grad():
            for layer, power in zip(net[::2], (1.0, 0.3, 2.0), strict=True):
                u, d, v = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_((u * d.mul(torch.arange(1.0, len(d) + 1) ** -power)) @ v)
        return net, torch.randn(200, 10)


def sensitivity(net: nn.Sequential, name: str, batch: Tensor) -> float:
    """E|g|^2 E|w x|^2 / O, where E|g|^2 = E|dy/dw|^2 / E|x|^2: gradients of each output, sample by sample."""
    w, x = net.get_parameter(name), net[: int(name[0])](batch).detach()
    total = 0.0
    for sample in batch:
        for y in net(sample[None])[0]:
            (gradient,) = torch.autograd.grad(y, w, retain_graph=True)
            total += float(gradient.square().sum()) / len(batch)
    energy = float((x @ w.detach().T).square().sum(1).mean())
    return total / float(x.square().sum(1).mean()) * energy / len(w)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("whiten", [True, False])
def test_layers_share_a_budget_at_the_least_error(keep: float, whiten: bool) -> None:
    """About as good as the best of all ranks of all layers within the budget, by errors that numpy finds. The
    gradients of the step are an estimate from random signs."""
    net, batch = chain()
    on = Task(evaluate=[(batch, batch)], calibrate=[(batch,)], metric=nn.functional.mse_loss)  # not logits
    result = run(net, Factorize(keep=keep, whiten=whiten), on)
    weights = {name: w for name, w in net.state_dict().items() if w.ndim == 2}
    inputs = {name: net[: int(name[0])](batch).detach() for name in weights}
    factors = {name: sensitivity(net, name, batch) if whiten else 1.0 for name in weights}
    ways = [
        [(count, factors[name] * error) for count, error in products(w, inputs[name] if whiten else None)]
        for name, w in weights.items()
    ]
    whole = sum(w.numel() for w in weights.values())
    stored = [numbers(result.forms[name]) for name in weights]
    assert sum(stored) <= keep * whole
    mine = sum(dict(each)[count] for each, count in zip(ways, stored, strict=True))
    fits = [c for c in itertools.product(*ways) if sum(count for count, _ in c) <= keep * whole]
    best = min(sum(error for _, error in c) for c in fits)
    assert mine <= (1.1 if whiten else 1.001) * best + 1e-6
    (note,) = result.ledger.notes("ranks")
    assert (note.data["kept"], note.data["of"]) == (sum(stored), whole)
    for name in weights:
        if not isinstance(result.forms[name], LowRank):
            assert any(entry.site == name for entry in result.ledger.notes("skipped"))


def test_a_layer_that_matters_more_to_the_outputs_keeps_more() -> None:
    """The same weights twice, side by side; what one gives is multiplied by ten."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.quiet.load_state_dict(self.loud.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return 10 * self.loud(x) + self.quiet(x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, batch = Twins(), torch.randn(100, 16)
    on = Task(evaluate=[(batch, None)], calibrate=[(batch, None)])
    forms = run(net, Factorize(keep=0.6), on).forms
    assert numbers(forms["loud.weight"]) > numbers(forms["quiet.weight"])


def test_a_model_whose_code_allows_no_gradients_is_factorized_and_named() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).sigmoid()
            y = self.second(hidden)
            hidden.zero_()  # what the gradient of the second weight needs
            return y

    batch = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    on = Task(evaluate=[(batch, None)], calibrate=[(batch, None)])
    (note,) = run(Overwrites(), Factorize(keep=0.5), on).ledger.notes("ranks")
    assert note.data["kept"] <= 0.5 * note.data["of"]
    assert note.text.endswith("of 2 weights the effect on the model's outputs is not known")


def test_weighing_takes_traces_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole factors of a wide layer would take a hundred times its memory, and more time than its ranks."""
    given: list[int] = []
    whole = curvature.Sums.__init__

    def watched(self: curvature.Sums, site: Site, widest: int) -> None:
        whole(self, site, widest)
        given.append(self.rows.numel() + self.columns.numel())

    monkeypatch.setattr(curvature.Sums, "__init__", watched)
    net, batch = chain()
    run(net, Factorize(keep=0.5), Task(evaluate=[(batch, batch)], calibrate=[(batch, batch)]))
    assert given == [10 + 16, 16 + 12, 12 + 6]


def test_a_share_that_no_rank_reaches_is_said() -> None:
    result = run(tiny("mlp").model, Factorize(keep=0.01))
    (note,) = result.ledger.notes("ranks")
    assert "the least possible: 1 % were asked for" in note.text
    assert all(form.left.shape[1] == 1 for form in map(result.forms.get, factored(result)))


def test_one_weight_gets_the_largest_rank_within_its_budget() -> None:
    for keep in (0.23, 0.4, 0.77):
        alone = [
            run(tiny("attention").model, Factorize(keep=keep, per=per, where="qkv.weight"))
            for per in ("global", "tensor")
        ]
        assert alone[0].forms["qkv.weight"].digest == alone[1].forms["qkv.weight"].digest


@pytest.mark.parametrize("model", MODELS)
def test_plain_is_the_best_product(model: str) -> None:
    """Eckart, Young 1936: the error is that of the singular values left out."""
    t = tiny(model)
    result = run(t.model, Factorize(keep=0.5, per="tensor"), t.task)
    plain = run(t.model, Factorize(keep=0.5, per="tensor", whiten=False), t.task)
    assert factored(plain)
    for name in factored(plain):
        w = t.model.state_dict()[name]
        rank = plain.forms[name].left.shape[1]
        want = float((singular(w)[rank:] ** 2).sum())
        assert lost(w, plain.forms[name].decode()) == pytest.approx(want, rel=1e-3, abs=1e-9)
        assert lost(w, result.forms[name].decode()) >= want * (1 - 1e-4)


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.9])
def test_energy_is_the_least_rank_that_keeps_it(energy: float) -> None:
    t = tiny("attention")
    result = run(t.model, Factorize(energy=energy, whiten=False))
    for name in factored(result):
        values = singular(t.model.state_dict()[name]) ** 2
        rank = result.forms[name].left.shape[1]
        assert values[:rank].sum() >= energy * values.sum() * (1 - 1e-9)
        assert values[: rank - 1].sum() < energy * values.sum()
    assert factored(result) or energy == 0.9


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_rank_is_a_rank(rank: int) -> None:
    t = tiny("conv")
    result = run(t.model, Factorize(rank=rank, whiten=False))
    for name in factored(result):
        assert np.linalg.matrix_rank(result.forms[name].decode().flatten(1).numpy(), tol=1e-5) == rank
    assert "block.weight" in factored(result)


def inputs_of(t: Any, layer: str) -> Tensor:
    """The inputs of a layer, [N, I], recorded by a hook."""
    seen: list[Tensor] = []
    hook = t.model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in t.task.batches("calibrate"):
            t.model(x)
    hook.remove()
    x = torch.cat(seen)
    module = t.model.get_submodule(layer)
    if x.ndim == 4:
        x = torch.nn.functional.unfold(x, module.kernel_size, padding=1).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize(("model", "layer"), [("conv", "block"), ("attention", "qkv"), ("mixed", "point")])
def test_whitened_loses_least_on_the_layers_own_inputs(model: str, layer: str) -> None:
    t = tiny(model)
    x = inputs_of(t, layer)
    errors = []
    for whiten in (False, True):
        result = run(t.model, Factorize(rank=2, whiten=whiten, where=f"{layer}.weight"), t.task)
        note = next(result.ledger.notes("done"))
        assert note.data["whitened"] is whiten
        gap = (result.forms[f"{layer}.weight"].decode() - t.model.state_dict()[f"{layer}.weight"]).flatten(1)
        errors.append(lost(x @ gap.T, torch.zeros(1)))
    assert errors[1] < errors[0]


def test_without_calibration_it_is_plain_and_noted() -> None:
    t = tiny("conv")
    with_task = run(t.model, Factorize(), Task(evaluate=t.task.evaluate))
    without = run(t.model, Factorize())
    assert with_task.digest == without.digest
    assert all("plain SVD" in entry.text for entry in without.ledger.notes("done"))


def test_layers_whose_inputs_are_not_seen_are_plain() -> None:
    t = tiny("lstm")
    result = run(t.model, Factorize(), t.task)
    noted = {entry.site: entry.data["whitened"] for entry in result.ledger.notes("done")}
    assert noted["cell.weight_ih_l0"] is False
    assert all(noted[name] is False for name in noted if name.startswith("cell"))


def test_training_starts_from_the_product_and_keeps_its_rank() -> None:
    t = tiny("conv")
    result = run(t.model, Factorize(rank=2, epochs=3, lr=0.01), t.task)
    cut = run(t.model, Factorize(rank=2), t.task)
    for name in factored(cut):
        after = result.forms[name]
        assert isinstance(after, LowRank)
        assert after.left.shape == cut.forms[name].left.shape
        assert np.linalg.matrix_rank(after.decode().flatten(1).numpy(), tol=1e-5) <= 2
        assert not torch.equal(after.decode(), cut.forms[name].decode())
    tuned = run(result, Finetune(epochs=1, lr=0.01), t.task)
    assert factored(tuned) == factored(result)


def test_earlier_forms_are_absorbed_and_noted() -> None:
    t = tiny("conv")
    for first, how in ((Prune(), "absorb"), (Quantize(), "absorb"), (Entropy(coder="huffman"), "refine")):
        result = run(t.model, [first, Factorize(rank=1)])
        assert {e.how for e in result.ledger.edits() if e.step == 1} == {how}


def test_vectors_are_skipped_and_noted() -> None:
    result = run(tiny("conv").model, Factorize(where="*.bias"))
    assert all(e.text == f"shape {list(result.sites[e.site].shape)} cannot be factorized as a matrix"
               for e in result.ledger.notes("skipped"))  # fmt: skip
    assert len(list(result.ledger.notes("skipped"))) == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"keep": 0.5, "rank": 2}, "factorize: keep and rank given, but only one of keep, rank, energy can set"),
    ({"keep": 1}, "keep=1"),
    ({"rank": 0}, "rank=0"),
    ({"energy": 0}, "energy=0"),
    ({"energy": 1.1}, "energy=1.1"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=str)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        Factorize(**settings)
    assert says in str(caught.value)
