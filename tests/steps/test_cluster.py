"""Cluster: the optimal shared values, trained by the summed gradients of the weights that share each."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch.nn.functional import cross_entropy

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import SettingError
from tersor.forms import Codebook, LowRank, Masked
from tersor.model.task import Task
from tersor.steps import Cluster, Factorize, Finetune, Prune, Quantize


def weights_of(result: State) -> list[str]:
    return [name for name, site in result.sites.items() if site.is_weight]


@pytest.mark.parametrize("start", ["exact", "linear", "density", "kmeans++"])
@pytest.mark.parametrize("entries", [1, 2, 7, 256, 300])
def test_a_tensor_has_at_most_so_many_values(start: str, entries: int) -> None:
    t = tiny("conv")
    result = run(t.model, Cluster(entries=entries, init=start))
    for name in weights_of(result):
        form, w = result.forms[name], t.model.state_dict()[name]
        assert isinstance(form, Codebook)
        book = form.book.decode()
        assert len(book) <= entries
        assert len(form.decode().unique()) <= entries
        assert form.index.decode().dtype is (torch.uint8 if len(book) <= 256 else torch.int16)
        gap = (w.flatten()[:, None] - book).abs()
        assert torch.equal(gap.argmin(1), form.index.decode().flatten().long()), "each has its nearest"


def best_split(w: np.ndarray, entries: int) -> float:
    """The least squared error over all splits of the sorted values into this number of runs."""
    x = np.sort(w.astype(np.float64).ravel())
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), entries - 1):
        parts = np.split(x, cuts)
        best = min(best, sum(float(((p - p.mean()) ** 2).sum()) for p in parts))
    return best


@pytest.mark.parametrize("entries", [2, 3, 4])
def test_exact_is_optimal(entries: int) -> None:
    t = tiny("mlp")
    result = run(t.model, Cluster(entries=entries, where="layers.0.weight"))
    w = t.model.state_dict()["layers.0.weight"]
    found = float((result.forms["layers.0.weight"].decode().double() - w).square().sum())
    assert found == pytest.approx(best_split(w.numpy(), entries), rel=1e-4)


def test_as_many_entries_as_values_lose_nothing() -> None:
    t = tiny("mlp")
    result = run(t.model, Cluster(entries=64))
    for name in weights_of(result):
        assert torch.equal(result.state_dict()[name], t.model.state_dict()[name])


@pytest.mark.parametrize("model", ["conv", "mixed"])
def test_rows_have_tables_of_their_own(model: str) -> None:
    t = tiny(model)
    result = run(t.model, Cluster(entries=3, per="channel"))
    for name in weights_of(result):
        axis = 1 if name in ("up.weight", "back.weight") else 0
        form, w = result.forms[name], t.model.state_dict()[name].movedim(axis, 0).flatten(1)
        assert form.axis == axis
        assert form.book.shape[0] == w.shape[0]
        for row, seen in zip(w, form.decode().movedim(axis, 0).flatten(1), strict=True):
            assert len(seen.unique()) <= 3
            if len(row) <= 9:
                error = float((seen.double() - row).square().sum())
                assert error == pytest.approx(best_split(row.numpy(), min(3, len(row))), rel=1e-3, abs=1e-9)


def test_masked_weights_are_ignored() -> None:
    t = tiny("conv")
    cut = run(t.model, Prune(keep=0.3))
    result = run(cut, Cluster(entries=4))
    for name in weights_of(result):
        form = result.forms[name]
        assert isinstance(form, Masked)
        mask, w = form.keep.decode(), t.model.state_dict()[name]
        book = form.body.book.decode()
        for k, value in enumerate(book):
            mine = w[mask & (form.body.index.decode() == k)]
            assert float(value) == pytest.approx(float(mine.mean()), rel=1e-4)
        assert not form.decode()[~mask].any()
        assert next(e.how for e in result.ledger.edits(-1) if e.site == name) == "refine"


def test_a_mask_that_hides_all_of_a_row() -> None:
    model = tiny("mlp").model
    with torch.no_grad():
        model.layers[0].weight[2:] *= 1e-3
    result = run(model, [Prune(keep=0.2), Cluster(entries=4, per="channel")])
    assert result.model().layers[0].weight[6].abs().sum() == 0


def test_factors_are_clustered_each() -> None:
    result = run(tiny("conv").model, [Factorize(keep=0.5), Cluster(entries=4)])
    form = result.forms["block.weight"]
    assert isinstance(form, LowRank)
    assert len(form.left.decode().unique()) <= 4
    assert len(form.right.decode().unique()) <= 4


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_step_of_training_sums_the_gradients(per: str, masked: bool) -> None:
    """Han, Mao, Dally 2016, section 3.3: dL/dC_k = sum over i, j of dL/dW_ij where I_ij = k. One step of SGD
    with Nesterov momentum 0.9 moves by 1.9 times the gradient."""
    t, lr = tiny("mlp"), 0.1
    x, y = next(iter(t.task.batches("calibrate")))
    task = Task(evaluate=[(x, y)], train=[(x, y)])
    given = run(t.model, Prune(keep=0.6)) if masked else t.model
    plain = run(given, Cluster(entries=4, per=per), task)
    settings: dict[str, Any] = {"epochs": 1, "lr": lr, "schedule": "constant", "optimizer": "sgd"}
    trained = run(given, Cluster(entries=4, per=per, **settings), task)

    model = plain.model()
    cross_entropy(model(x), y).backward()
    for name in weights_of(plain):
        before, after = plain.forms[name], trained.forms[name]
        grad = model.get_parameter(name).grad
        if masked:
            grad = grad * before.keep.decode()
            before, after = before.body, after.body
        index = before.index.decode().long()
        assert torch.equal(after.index.decode().long(), index)
        book = before.book.decode().clone()
        if per == "tensor":
            want = book.index_add(0, index.flatten(), -1.9 * lr * grad.flatten())
        else:
            want = torch.stack(
                [b.index_add(0, i, -1.9 * lr * g) for b, i, g in zip(book, index, grad, strict=True)]
            )
        torch.testing.assert_close(after.book.decode(), want, rtol=1e-4, atol=1e-6)
    for name in ("layers.0.bias", "layers.6.bias"):
        want = model.get_parameter(name) - 1.9 * lr * model.get_parameter(name).grad
        torch.testing.assert_close(trained.state_dict()[name], want.detach(), rtol=1e-4, atol=1e-6)


def test_finetuning_keeps_the_index() -> None:
    t = tiny("conv")
    stored = run(t.model, Cluster(entries=5), t.task)
    tuned = run(stored, Finetune(epochs=2, lr=0.01), t.task)
    for name in weights_of(stored):
        assert torch.equal(stored.forms[name].index.decode(), tuned.forms[name].index.decode())
        assert not torch.equal(stored.forms[name].book.decode(), tuned.forms[name].book.decode())


def test_the_note_counts_values() -> None:
    result = run(tiny("mlp").model, Cluster(entries=4))
    for entry in result.ledger.notes("done", -1):
        count = len(result.forms[entry.site].book.decode())
        assert (entry.text, entry.data) == (f"{count} shared values", {"entries": count})


def test_a_table_absorbs_a_grid() -> None:
    result = run(tiny("mlp").model, [Quantize(bits=4), Cluster(entries=4)])
    assert {e.how for e in result.ledger.edits() if e.step == 1} == {"absorb"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"entries": 0}, "entries=0, but a table has 1 to 32768 entries"),
    ({"entries": 40000}, "entries=40000"),
    ({"per": "group"}, "per='group'"),
    ({"init": "exakt"}, "did you mean 'exact'?"),
    ({"iterations": 0}, "iterations=0"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=str)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        Cluster(**settings)
    assert says in str(caught.value)
