"""Prune: exact counts, the largest weights stay, N of every M, schedules and rounds as published."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State, start
from tersor.core.view import View
from tersor.errors import SettingError
from tersor.forms import Dense, Form, LowRank, Masked, Sum
from tersor.model.task import Task
from tersor.model.trainable_forms import TrainableForms
from tersor.model.trainable_parts import MaskedPart
from tersor.steps import Cluster, Entropy, Factorize, Finetune, Prune, Quantize
from tersor.steps.prune import EVERY, mask_all


def weights_of(result: State) -> list[str]:
    return [name for name, site in result.sites.items() if site.is_weight]


def kept(form: Form) -> Tensor:
    assert isinstance(form, Masked)
    return form.keep.decode()


def rows(w: Tensor, axis: int = 0) -> Tensor:
    return w.movedim(axis, 0).flatten(1)


def up(share: float, count: int) -> int:
    """round(share * count), halves up."""
    return math.floor(share * count + 0.5)


KEEPS = [1.0, 0.9, 0.5, 0.31, 0.1, 0.001]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("model", ["mlp", "mixed", "attention"])
def test_per_tensor_keeps_the_largest_of_each(model: str, keep: float) -> None:
    t = tiny(model)
    result = run(t.model, Prune(keep=keep, per="tensor"))
    for name in weights_of(result):
        mask, w = kept(result.forms[name]), t.model.state_dict()[name]
        count = max(1, up(keep, w.numel()))
        assert int(mask.sum()) == count
        order = np.argsort(-np.abs(w.numpy().ravel()), kind="stable")
        assert set(np.flatnonzero(mask.numpy().ravel())) == set(order[:count])
        assert torch.equal(result.state_dict()[name], torch.where(mask, w, 0.0))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("model", ["mlp", "mixed"])
def test_per_row_keeps_the_largest_of_each_output(model: str, keep: float) -> None:
    t = tiny(model)
    result = run(t.model, Prune(keep=keep, per="channel"))
    for name in weights_of(result):
        axis = 1 if name in ("up.weight", "back.weight") else 0
        mask, w = (rows(x, axis) for x in (kept(result.forms[name]), t.model.state_dict()[name]))
        each = up(keep, w.shape[1])
        if each == 0:
            assert int(mask.sum()) == 1  # a tensor is never emptied
            continue
        for m, row in zip(mask, w.abs(), strict=True):
            assert int(m.sum()) == each
            assert row[m].min() >= row[~m].max() if each < len(row) else True


@pytest.mark.parametrize("group", [1, 4, 5, 64])
def test_per_group_keeps_the_largest_of_each_group(group: int) -> None:
    t = tiny("conv")
    result = run(t.model, Prune(keep=0.5, per="group", group=group))
    for name in weights_of(result):
        mask, w = rows(kept(result.forms[name])), rows(t.model.state_dict()[name]).abs()
        for first in range(0, w.shape[1], group):
            m, part = mask[:, first : first + group], w[:, first : first + group]
            assert (m.sum(1) == up(0.5, part.shape[1])).all()
            for a, b in zip(m, part, strict=True):
                assert a.all() or not a.any() or b[a].min() >= b[~a].max()


@pytest.mark.parametrize("keep", KEEPS)
def test_global_keeps_the_largest_of_all(keep: float) -> None:
    t = tiny("attention")
    result = run(t.model, Prune(keep=keep, per="global"))
    names = weights_of(result)
    masks = torch.cat([kept(result.forms[name]).flatten() for name in names])
    sizes = torch.cat([t.model.state_dict()[name].abs().flatten() for name in names])
    assert int(masks.sum()) == max(1, up(keep, len(sizes)))
    if keep < 1:
        assert sizes[masks].min() >= sizes[~masks].max()


def slow_lamp(w: np.ndarray) -> np.ndarray:
    """w^2 over the sum of the squares of all that are not smaller, in float64 (no two are equal here)."""
    flat = np.abs(w.astype(np.float64)).ravel()
    return np.array([x * x / np.sum(flat[flat >= x] ** 2) for x in flat])


def slow_spread(w: np.ndarray) -> np.ndarray:
    return np.abs(w.astype(np.float64)).ravel() / np.sqrt(np.mean(w.astype(np.float64) ** 2))


@pytest.mark.parametrize(("per", "slow"), [("lamp", slow_lamp), ("spread", slow_spread)])
@pytest.mark.parametrize("keep", [0.7, 0.25])
def test_scores_that_compare_layers(per: str, slow: Callable[[np.ndarray], np.ndarray], keep: float) -> None:
    t = tiny("mixed")
    result = run(t.model, Prune(keep=keep, per=per))
    names = weights_of(result)
    masks = np.concatenate([kept(result.forms[name]).numpy().ravel() for name in names])
    scores = np.concatenate([slow(t.model.state_dict()[name].numpy()) for name in names])
    assert masks.sum() == up(keep, len(scores))
    assert scores[masks].min() >= scores[~masks].max() * (1 - 1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8), (4, 4), (5, 7)])
@pytest.mark.parametrize("model", ["mlp", "conv", "mixed"])
def test_n_of_every_m_inputs_stay(model: str, n: int, m: int) -> None:
    t = tiny(model)
    result = run(t.model, Prune(pattern=f"{n}:{m}"))
    for name in weights_of(result):
        # [..., I]: inputs last, which a transposed convolution has first, in groups.
        turned, groups = name in ("up.weight", "back.weight"), 2 if name == "up.weight" else 1
        mask, w = (
            x.movedim(0 if turned else 1, -1)
            for x in (kept(result.forms[name]), t.model.state_dict()[name].abs())
        )
        mask, w = (x.reshape(-1, x.shape[-1] // groups) for x in (mask, w))
        for first in range(0, w.shape[1], m):
            block, values = mask[:, first : first + m], w[:, first : first + m]
            assert (block.sum(1) == math.ceil(n * block.shape[1] / m)).all()
            for a, b in zip(block, values, strict=True):
                assert a.all() or b[a].min() >= b[~a].max()


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2, 10.0])
def test_a_threshold_cuts_what_is_below_it(threshold: float) -> None:
    t = tiny("conv")
    result = run(t.model, Prune(threshold=threshold))
    for name in weights_of(result):
        assert torch.equal(kept(result.forms[name]), t.model.state_dict()[name].abs() >= threshold)


def test_the_note_counts() -> None:
    result = run(tiny("mlp").model, Prune(keep=0.3))
    for entry in result.ledger.notes("done", -1):
        count = int(kept(result.forms[entry.site]).sum())
        total = result.forms[entry.site].keep.decode().numel()
        assert entry.data == {"kept": count}
        assert entry.text == f"kept {count} of {total} weights ({count / total:.1%})"


# --- on compressed weights ---


def test_a_mask_only_narrows() -> None:
    t = tiny("conv")
    once = run(t.model, Prune(keep=0.5, per="tensor"))
    for keep, want in ((0.2, 0.2), (0.8, 0.5)):
        twice = run(once, Prune(keep=keep, per="tensor"))
        for name in weights_of(twice):
            mask, before = kept(twice.forms[name]), kept(once.forms[name])
            assert not (mask & ~before).any()
            assert int(mask.sum()) == max(1, up(want, mask.numel()))
            assert twice.forms[name].body is once.forms[name].body
        assert {entry.how for entry in twice.ledger.edits(-1)} <= {"refine"}


def test_grids_and_tables_stay_under_the_mask() -> None:
    for step in (Quantize(bits=4), Quantize(scheme="log"), Cluster(entries=8)):
        before = run(tiny("conv").model, step)
        after = run(before, Prune(keep=0.25))
        for name in weights_of(after):
            assert after.forms[name].body.digest == before.forms[name].digest
        assert {entry.how for entry in after.ledger.edits(-1)} == {"wrap"}


def test_factors_are_pruned_each() -> None:
    before = run(tiny("conv").model, Factorize(keep=0.5))
    after = run(before, Prune(keep=0.25, per="tensor"))
    assert isinstance(before.forms["block.weight"], LowRank)
    form = after.forms["block.weight"]
    assert isinstance(form, LowRank)
    for part in (form.left, form.right):
        assert int(kept(part).sum()) == max(1, up(0.25, kept(part).numel()))


def test_coded_weights_are_pruned_as_plain_ones() -> None:
    model = tiny("conv").model
    plain, coded = (run(model, [*first, Prune(keep=0.4)]) for first in ([], [Entropy(coder="huffman")]))
    for name in weights_of(plain):
        assert torch.equal(plain.state_dict()[name], coded.state_dict()[name])


def test_where_leaves_the_others() -> None:
    result = run(tiny("conv").model, Prune(keep=0.5, where="*,!head*"))
    assert result.forms["head.weight"].name == "dense"
    assert result.forms["stem.weight"].name == "masked"
    vectors = run(tiny("conv").model, Prune(keep=0.5, per="tensor", where="*.bias"))
    assert int(kept(vectors.forms["block.bias"]).sum()) == 4


def test_masks_below_a_sum_have_the_rows_of_the_layer() -> None:
    """A transposed convolution has its outputs along axis 1, in each term of a sum too; factors have rows of
    their own. At once and while training, a row keeps half of its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ConvTranspose2d(4, 6, 3, bias=False)
    w, factors = model.weight.detach(), LowRank(Dense(torch.randn(4, 2)), Dense(torch.randn(2, 6, 3, 3)))
    given = start(model)
    (site,) = given.sites.values()
    forms = {"weight": mask_all(Sum(Sum(Dense(w), Dense(w / 2)), factors))}
    step = Prune(per="channel", keep=0.5, ramp=1.0, epochs=1)
    tuned = TrainableForms(model, forms, given.sites, ["weight"])
    step.narrowing([site], 1.0, 0.5)(tuned, 1, 2)
    for after in (step.narrowed([site], forms, 0.5)["weight"], tuned.fold()["weight"]):
        nodes = dict(after.walk())
        for path, axis, half in (("a.a", 1, 18), ("a.b", 1, 18), ("b.left", 0, 1), ("b.right", 0, 27)):
            assert rows(nodes[path].keep.decode(), axis).sum(1).unique().tolist() == [half], path


# --- while training ---


class Spied:
    """Masks and values after each narrowing, by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.masks: list[dict[str, Tensor]] = []
        narrowing = Prune.narrowing

        def spy(step: Prune, *args: Any) -> Callable[[TrainableForms, int, int], None]:
            hook = narrowing(step, *args)

            def on_step(tuned: TrainableForms, at: int, total: int) -> None:
                hook(tuned, at, total)
                parts = {n: tuned.part_of(n) for n in tuned.sites if n in tuned._site_names}
                self.masks.append({n: p.keep.clone() for n, p in parts.items() if isinstance(p, MaskedPart)})

            return on_step

        monkeypatch.setattr(Prune, "narrowing", spy)

    def counts(self) -> list[int]:
        return [sum(int(mask.sum()) for mask in masks.values()) for masks in self.masks]


@pytest.mark.sampled
@pytest.mark.parametrize("per", ["tensor", "channel", "global", "lamp"])
@pytest.mark.parametrize("ramp", [0.5, 0.1, 1.0])
def test_gradual_pruning_follows_the_cubic_and_ends_at_keep(
    per: str, ramp: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, spied, keep, epochs = tiny("mlp"), Spied(monkeypatch), 0.3, 45
    result = run(t.model, Prune(keep=keep, per=per, ramp=ramp, epochs=epochs, lr=0.01), t.task)
    total, counts = 2 * epochs, spied.counts()
    names = weights_of(result)
    weights = sum(result.forms[name].keep.decode().numel() for name in names)
    assert len(counts) == total
    assert counts == sorted(counts, reverse=True)
    for before, after in zip(spied.masks, spied.masks[1:], strict=False):
        assert all(not (after[name] & ~before[name]).any() for name in names)
    end = min(round(ramp * total), total - 1)
    assert len(set(counts[end:])) == 1, "the mask stands still after the ramp"
    assert counts[0] == weights
    for step in range(0, end, EVERY):
        share = keep + (1 - keep) * (1 - step / end) ** 3
        if per in ("global", "lamp"):
            assert counts[step] == up(share, weights)
        assert counts[step] == pytest.approx(share * weights, abs=0.5 * len(names) * 8)
    if per in ("global", "lamp"):
        assert counts[-1] == up(keep, weights)
    if per == "tensor":
        assert [int(kept(result.forms[n]).sum()) for n in names] == [
            max(1, up(keep, kept(result.forms[n]).numel())) for n in names
        ]
    for name in names:
        assert torch.equal(kept(result.forms[name]), spied.masks[-1][name])
        assert not result.state_dict()[name][~kept(result.forms[name])].any()


@pytest.mark.parametrize("ramp", [0.0, 0.5])
def test_rows_are_outputs_while_training_too(ramp: float) -> None:
    """Outputs of transposed convolutions are on axis 1, and each keeps its share of weights."""
    t = tiny("mixed")
    result = run(t.model, Prune(keep=0.3, per="channel", ramp=ramp, epochs=2, lr=1e-3), t.task)
    assert {result.sites[name].axis for name in weights_of(result)} == {0, 1}
    for name in weights_of(result):
        mask = rows(kept(result.forms[name]), result.sites[name].axis)
        assert mask.sum(1).tolist() == [max(1, up(0.3, mask.shape[1]))] * len(mask), name


@pytest.mark.parametrize("epochs", [0.5, 1, 1.5])
@pytest.mark.parametrize("ramp", [0.01, 0.5, 1.0])
def test_short_trainings_end_at_keep_too(epochs: float, ramp: float) -> None:
    t = tiny("mlp")
    result = run(t.model, Prune(keep=0.3, per="global", ramp=ramp, epochs=epochs), t.task)
    masks = [kept(result.forms[name]) for name in weights_of(result)]
    assert sum(int(mask.sum()) for mask in masks) == up(0.3, sum(mask.numel() for mask in masks))


def test_pruned_at_once_and_then_trained() -> None:
    t = tiny("conv")
    cut = run(t.model, Prune(keep=0.3))
    trained = run(t.model, Prune(keep=0.3, epochs=2, lr=0.01), t.task)
    for name in weights_of(cut):
        assert torch.equal(kept(cut.forms[name]), kept(trained.forms[name]))
        mask = kept(cut.forms[name])
        assert not torch.equal(cut.state_dict()[name][mask], trained.state_dict()[name][mask])
        assert not trained.state_dict()[name][~mask].any()


class Trainings:
    """The arguments and the result of each training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.given: list[Mapping[str, Form]] = []
        self.moved: list[Mapping[str, Form]] = []
        self.plans: list[Any] = []
        train = View.train

        def spy(view: View, plan: Any, **kwargs: Any) -> Any:
            self.given.append({**view.forms, **kwargs["forms"]})
            self.plans.append(plan)
            moved, facts = train(view, plan, **kwargs)
            self.moved.append(moved)
            return moved, facts

        monkeypatch.setattr(View, "train", spy)


@pytest.mark.parametrize("rewind", ["none", "weights"])
def test_rounds_cut_on_the_way_to_keep(rewind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t, seen = tiny("conv"), Trainings(monkeypatch)
    step = Prune(keep=0.2, per="global", rounds=3, epochs=1, lr=0.01, rewind=rewind)
    result = run(t.model, step, t.task)
    names = weights_of(result)
    total = sum(kept(result.forms[name]).numel() for name in names)
    assert len(seen.given) == 3
    assert len({id(plan) for plan in seen.plans}) == 3
    assert len({str(plan) for plan in seen.plans}) == 1, "each round has the whole schedule"
    for number, forms in enumerate(seen.given, 1):
        count = sum(int(kept(forms[name]).sum()) for name in names)
        assert count == up(0.2 ** (number / 3), total)
    start = t.model.state_dict()
    for earlier, (forms, moved) in enumerate(zip(seen.given[1:], seen.moved, strict=False)):
        for name in names:
            mask, before = kept(forms[name]), kept(seen.given[earlier][name])
            assert not (mask & ~before).any()
            source = start[name] if rewind == "weights" else moved[name].decode()
            assert torch.equal(forms[name].decode(), torch.where(mask, source, 0.0))
        bias = forms["head.bias"].decode()
        assert torch.equal(bias, start["head.bias"] if rewind == "weights" else moved["head.bias"].decode())


def test_a_rewound_round_keeps_what_training_made_large() -> None:
    """The second mask is chosen from the weights after the first training, not from the rewound ones."""
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]]))
    x, y = torch.eye(4)[1:].repeat(4, 1), torch.tensor([0, 1, 1]).repeat(4)  # the first input is always 0
    step = Prune(keep=0.25, rounds=2, epochs=100, lr=0.1, rewind="weights", optimizer="sgd", per="channel")
    result = run(model, step, Task(evaluate=[(x, y)], train=[(x, y)]))
    assert kept(result.forms["weight"]).tolist() == [[False, True, False, False]] * 2


def test_training_moves_biases_and_statistics_too() -> None:
    t = tiny("conv")
    result = run(t.model, Prune(keep=0.5, epochs=1, lr=0.01), t.task)
    edited = {entry.site for entry in result.ledger.edits()}
    assert {"head.bias", "norm0.weight", "norm0.running_mean", "norm0.num_batches_tracked"} <= edited


def test_finetuning_keeps_the_mask() -> None:
    t = tiny("conv")
    cut = run(t.model, Prune(keep=0.3), t.task)
    tuned = run(cut, Finetune(epochs=2, lr=0.01), t.task)
    for name in weights_of(cut):
        assert torch.equal(kept(cut.forms[name]), kept(tuned.forms[name]))


# --- settings ---

BAD: list[tuple[dict[str, Any], str]] = [
    ({"keep": 0}, "keep=0, but it is the share kept: 0 < keep <= 1"),
    ({"keep": 1.01}, "keep=1.01"),
    ({"per": "layer"}, "per='layer'"),
    ({"per": "lampp"}, "did you mean 'lamp'?"),
    ({"group": 0}, "group=0"),
    ({"threshold": -0.1}, "threshold=-0.1"),
    ({"pattern": "4"}, "pattern='4', but it is N:M with 0 < N <= M, such as 2:4"),
    ({"pattern": "5:4"}, "pattern='5:4'"),
    ({"pattern": "0:4"}, "pattern='0:4'"),
    ({"pattern": "2:4x"}, "pattern='2:4x'"),
    ({"ramp": 1.5, "epochs": 1}, "ramp=1.5"),
    ({"ramp": 0.5}, "It needs epochs above 0"),
    ({"rounds": 2}, "It needs epochs above 0"),
    ({"rounds": 0}, "rounds=0"),
    ({"rewind": "start"}, "rewind='start'"),
    ({"ramp": 0.5, "epochs": 1, "pattern": "2:4"}, "It needs no pattern"),
    ({"ramp": 0.5, "epochs": 1, "threshold": 0.1}, "It needs no threshold"),
    ({"lr": 0}, "lr=0"),
    ({"schedule": "cosin"}, "did you mean 'cosine'?"),
    ({"where": ""}, "where=''"),
    ({"where": ()}, "where=()"),
]


@pytest.mark.parametrize(("settings", "says"), BAD, ids=str)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        Prune(**settings)
    assert str(caught.value).startswith("prune: ")
    assert says in str(caught.value)


def test_a_weight_without_elements_is_passed_over() -> None:
    class Hollow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full, self.hollow = nn.Linear(3, 2), nn.Parameter(torch.zeros(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.full(x)

    for step in (Prune(), Quantize(), Cluster(), Factorize(), Entropy()):
        result = run(Hollow(), step)
        assert result.forms["hollow"].shape == (0, 3)
        assert isinstance(result.forms["hollow"], Dense)
