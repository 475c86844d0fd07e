"""Zeros in the given weights stay zero through every step of STEPS, alone and in pairs, in the files too.

The models: one that is 90 % zero because its pruning was made permanent, and one whose padding row is zero.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from tiny import SMALL, TRAINED, Tiny, tiny
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from tersor.check import check
from tersor.core.history import replay, undo
from tersor.core.recipe import Recipe
from tersor.core.run import CAME, run
from tersor.core.step import Needs
from tersor.errors import RefusedError, SettingError, SiteError
from tersor.forms import Dense, Masked
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.pack import pack
from tersor.model.given_masks import keep_mask
from tersor.model.task import Task
from tersor.record.events import Group, Note
from tersor.record.journal import Journal
from tersor.steps import STEPS, Cluster, Factorize, Finetune, Prune, Quantize
from tersor.steps.recipe_text import dump, from_yaml, lock

LOSES = "factorize"  # a product keeps no zeros, and its note says so
# Settings that move zeros most. Hidden units are not reordered, since zeros are compared by position.
HARD: dict[str, dict[str, Any]] = {
    "quantize": {"symmetric": False, "bits": 3}, "cluster": {"entries": 3}, "penalize": {"arrange": False},
    "finetune": {"lr": 0.1}, "prune": {"keep": 0.9, "per": "tensor"},
}  # fmt: skip
GONE = "shorten"  # removes whole weights, and zeros with them: tests/steps/test_shorten.py
ALONE = [(name, False) for name in STEPS if name != GONE] + [(name, True) for name in TRAINED if name != GONE]
# Lossless steps are not in pairs: other tests run them alone, and before and after other steps.
CHANGING = [
    name for name, kind in STEPS.items()
    if name not in (LOSES, GONE) and not getattr(kind, "lossless", False)
]  # fmt: skip
PAIRS = list(itertools.product(CHANGING, repeat=2))


def sparse() -> Tiny:
    """Torch's own pruning keeps a tenth of each matrix and is made permanent: plain tensors with zeros."""
    t = tiny("conv")
    for layer in (t.model.stem, t.model.block, t.model.head):
        torch_prune.l1_unstructured(layer, "weight", amount=0.7)
        torch_prune.remove(layer, "weight")
    return t


def padded() -> Tiny:
    t = tiny("attention")
    with torch.no_grad():
        t.model.embed.weight[0] = 0
    t.model.embed.padding_idx = 0
    return t


MODELS: dict[str, Callable[[], Tiny]] = {"sparse": sparse, "padded": padded}


def step(name: str, trained: bool = False) -> Any:
    return STEPS[name](**((TRAINED[name] if trained else SMALL.get(name, {})) | HARD.get(name, {})))


def zeros(t: Tiny) -> dict[str, Tensor]:
    return {
        n: w == 0 for n, w in t.model.state_dict().items() if w.ndim > 1 and 1 < (w == 0).sum() < w.numel()
    }


def loaded(t: Tiny, steps: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the module loaded from the file that these steps give, and the given zeros in them."""
    result = run(t.model, steps, t.task, out=folder)
    save(result, folder / "a.tersor")
    found = zeros(t)
    for site, axes in result.kept.items():
        for axis, kept in axes.items():
            if site in found:
                found[site] = found[site].index_select(axis, torch.tensor(kept))
    return load(folder / "a.tersor").model(copy.deepcopy(t.model)).state_dict(), found


@pytest.mark.sampled(("name", "trained"), "model")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "trained"), [one for one in ALONE if one[0] != LOSES])
def test_zeros_stay(name: str, trained: bool, model: str, tmp_path: Path) -> None:
    if name == "export" and model == "padded":
        pytest.skip("seconds each: on one model")
    t = MODELS[model]()
    after, there = loaded(t, [step(name, trained)], tmp_path)
    for site, where in there.items():
        assert not after[site][where].any(), site
        assert after[site].any(), site


@pytest.mark.sampled
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_zeros_stay_through_two_steps(names: tuple[str, str], tmp_path: Path) -> None:
    t = sparse()
    after, there = loaded(t, [step(name, trained=name in TRAINED) for name in names], tmp_path)
    assert all(not after[site][where].any() for site, where in there.items())


def test_the_padding_row_answers_as_before() -> None:
    """With three shared values, only a mask keeps zeros."""
    t = padded()
    assert run(t.model, Cluster(entries=3), t.task).model().embed.weight[0].count_nonzero() == 0
    assert run(t.model, Recipe((Cluster(entries=3),), zeros="none")).model().embed.weight[0].all()


def test_a_product_notes_lost_zeros() -> None:
    t = sparse()
    count = int(zeros(t)["head.weight"].sum())
    note = next(e for e in run(t.model, Factorize(rank=1)).ledger.notes("done") if e.site == "head.weight")
    assert f"{count} zeros of its mask are lost" in note.text
    note = next(e for e in run(tiny("conv").model, Factorize(rank=1)).ledger.notes("done"))
    assert "lost" not in note.text


@dataclasses.dataclass(frozen=True)
class Own:
    """A user's own step, without `run`."""

    name: ClassVar[str] = "own"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.NOTHING


# --- events, undo, resume ---


def test_the_mask_is_an_event_of_the_step() -> None:
    t = sparse()
    result = run(t.model, [STEPS["measure"](), Quantize(where="head.weight"), Finetune(epochs=1)], t.task)
    edits = [(e.step, e.site, e.how) for e in result.ledger.edits() if e.how == "wrap"]
    assert edits == [(1, "head.weight", "wrap"), (2, "stem.weight", "wrap"), (2, "block.weight", "wrap")]
    assert [e.site for e in result.ledger.notes("masked")] == ["head.weight", "stem.weight", "block.weight"]
    assert torch.equal(result.forms["stem.weight"].keep.decode(), t.model.stem.weight != 0)


def test_undo_replay_and_two_runs(tmp_path: Path) -> None:
    t, steps = sparse(), [Quantize(), Finetune(epochs=1)]
    result = run(t.model, steps, t.task, journal=tmp_path / "j")
    assert all(torch.equal(v, t.model.state_dict()[n]) for n, v in undo(result).state_dict().items())
    assert undo(result, 1, journal=tmp_path / "j").digest == run(t.model, steps[:1], t.task).digest
    assert replay(t.model, result.ledger, tmp_path / "j").digest == result.digest
    chained = run(run(t.model, steps[:1], t.task), steps[1:], t.task)
    assert (chained.digest, chained.ledger.digest) == (result.digest, result.ledger.digest)


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_killed_run_resumes_to_the_same_end(lines: int, tmp_path: Path) -> None:
    """Killed after the masks, and in the middle of the step that needed them."""

    class Killed(Exception):
        pass

    def dies(self: Journal, *args: Any, **kwargs: Any) -> None:
        if self.count == lines:
            raise Killed
        append(self, *args, **kwargs)

    t, steps = sparse(), [Quantize(symmetric=False), Finetune(epochs=1)]
    whole = run(t.model, steps, t.task)
    append = Journal.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", dies)
        with pytest.raises(Killed):
            run(t.model, steps, t.task, journal=tmp_path / "j")
    again = run(t.model, steps, t.task, journal=tmp_path / "j", resume=True)
    assert (again.digest, again.ledger.digest) == (whole.digest, whole.ledger.digest)


def test_the_first_step_after_a_coded_weight() -> None:
    t = sparse()
    with torch.no_grad():
        t.model.block.weight.mul_(1)
    result = run(t.model, [STEPS["entropy"](), Finetune(epochs=1, lr=0.1)], t.task)
    assert isinstance(result.forms["block.weight"], Masked)


# --- the way out ---


def test_zeros_may_change_if_the_recipe_allows_it() -> None:
    t = sparse()
    free = run(t.model, Recipe((Finetune(epochs=1, lr=0.1),), zeros="none"), t.task).state_dict()
    assert all(free[site][where].all() for site, where in zeros(t).items())
    some = run(t.model, Recipe((Finetune(epochs=1, lr=0.1),), zeros="*,!head*"), t.task).state_dict()
    assert not some["block.weight"][zeros(t)["block.weight"]].any()
    assert some["head.weight"][zeros(t)["head.weight"]].all()


def test_the_setting_is_checked() -> None:
    t = sparse()
    for bad in (3, "", ("*", "none")):
        with pytest.raises(SettingError, match=r"recipe: zeros=.*a glob such as '\*', or 'none'"):
            Recipe((Prune(),), zeros=bad)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"zeros: where='head.weigth' matches no weight; did you mean 'head"):
        run(t.model, Recipe((Prune(),), zeros="head.weigth"))


def test_a_dry_run_knows_the_globs() -> None:
    recipe = Recipe((Prune(where="conv*"),), zeros="*,!lora.*")
    assert [facts["step"] for facts in check(recipe)] == ["prune"]
    with pytest.raises(SiteError, match="zeros: where='!lora.*' excludes nothing"):
        check(recipe, tiny("mlp").model)


def test_trials_do_as_their_step_does() -> None:
    class Tries(Own):
        where: ClassVar[str] = "head.weight"

        def run(self, view: Any) -> Any:
            found.append(view.trial([Quantize()])[1].forms["block.weight"])
            yield Group("all", (Note("", "tried", "once"),))

    t, found = sparse(), []
    for zeros_kept in ("*", "none"):
        run(t.model, Recipe((Tries(),), zeros=zeros_kept))
    assert [isinstance(form, Masked) for form in found] == [True, False]


def test_it_survives_yaml_and_chains() -> None:
    t = sparse()
    recipe = Recipe((Prune(), Quantize()), zeros="none")
    assert from_yaml(dump(recipe.to_json()), STEPS) == recipe
    assert "zeros" not in Recipe((Prune(),)).to_json()
    first = run(t.model, Recipe((Quantize(where="head*"),), zeros="none"))
    second = run(first, Quantize(where="stem*"))
    assert second.ledger.recipe["zeros"] == ["none", "*"]
    reread = from_yaml(dump(lock(second)), STEPS)
    assert run(t.model, reread).digest == second.digest
    assert undo(first).ledger.recipe.get("zeros") is None


def test_a_file_keeps_the_setting(tmp_path: Path) -> None:
    t = sparse()
    result = run(run(t.model, Recipe((Prune(),), zeros="none")), Quantize())
    save(result, tmp_path / "a.tersor")
    again = load(tmp_path / "a.tersor").ledger
    assert (again.recipe, again.digest) == (result.ledger.recipe, result.ledger.digest)


# --- accidental zeros ---


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_zeros(w: Tensor, count: int) -> Tensor:
    w.view(-1)[torch.randperm(w.numel(), generator=torch.Generator().manual_seed(1))[:count]] = 0
    return w


def rows(w: Tensor, *index: int) -> Tensor:
    w[list(index)] = 0
    return w


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (random(100, 100), "no zeros"),
        (with_zeros(random(100, 100), 1), "one zero"),
        (with_zeros(random(100, 100), 9), "fewer than one in 1000"),
        (torch.zeros(100, 100), "LoRA's second matrix, a layer that begins at zero"),
        (torch.eye(50), "an identity"),
        (torch.randint(-1, 2, (50, 50)).float(), "three values"),
        ((random(200, 200) * 1e-7).half(), "rounded to zero by its dtype"),
        ((random(200, 200) * 1e-39), "rounded or flushed"),
        (torch.zeros(0, 4), "empty"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_accidental_zeros(weight: Tensor, why: str) -> None:
    assert keep_mask(Dense(weight)) is None, why


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (with_zeros(random(100, 100), 11), "more than one in 1000"),
        (with_zeros(random(100, 100), 9000).bfloat16(), "bfloat16"),
        (with_zeros(random(100, 100) * 0.02, 9000).half(), "float16"),
        (rows(random(2000, 8), 0), "a padding row, one in 2000"),
        (rows(random(2000, 8), 0).T.contiguous(), "a column"),
        (rows(random(3, 3, 40, 40), 1).movedim(0, 2), "a tap of a kernel"),
        (torch.block_diag(random(5, 5), random(5, 5)), "blocks"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_deliberate_zeros(weight: Tensor, why: str) -> None:
    keep = keep_mask(Dense(weight))
    assert keep is not None, why
    assert torch.equal(keep, weight != 0)


def test_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = rows(random(2000, 8), 0)
    whole = keep_mask(Dense(weight))
    monkeypatch.setattr("tersor.forms.form.SLICE", 7)
    assert torch.equal(keep_mask(Dense(weight)), whole)


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)[:, :4] + self.b(self.a(x))


def test_a_matrix_of_zeros_learns() -> None:
    x = random(40, 8)
    batches = [(x, x[:, :4].argmax(1))]
    task = Task("four", evaluate=batches, train=batches)
    assert run(LoRA(), Finetune(epochs=3, lr=0.01), task).model().b.weight.all()


# --- without the model ---


@pytest.mark.sampled(name=("quantize", "cluster", "factorize", "prune"))
@pytest.mark.parametrize("name", ["quantize", "cluster", "rdoq", "factorize", "prune"])
def test_packed_weights(name: str, tmp_path: Path) -> None:
    """Packing tensor by tensor from a file gives the same as a run on the whole model."""
    t = sparse()
    weights = {name: value.clone() for name, value in t.model.state_dict().items()}
    weights["large.weight"] = with_zeros(random(1200, 1000), 10**6)  # it stays in its file
    weights["pad.weight"] = rows(random(40, 6), 3)
    save_file(weights, tmp_path / "w.safetensors")
    made = step(name) if name != "factorize" else Factorize(rank=1, where="pad*")
    pack(tmp_path / "w.safetensors", tmp_path / "a.tersor", Recipe((made,)))
    result = load(tmp_path / "a.tersor")
    after = result.state_dict()
    for site in ("large.weight", "pad.weight", "block.weight", "head.weight"):
        if name != "factorize":
            assert not after[site][weights[site] == 0].any(), site
    assert torch.equal(Holder(weights).forms()["pad.weight"], weights["pad.weight"])
    whole = run(Holder(weights), made)
    for site in ("large.weight", "pad.weight"):
        assert whole.forms[site].digest == result.forms[site].digest
    free = pack(tmp_path / "w.safetensors", tmp_path / "b.tersor", Recipe((made,), zeros="none"))
    assert not list(free.ledger.notes("masked"))


class Holder(nn.Module):
    """Weights by their names."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            path, _, last = name.rpartition(".")
            if not hasattr(self, path):
                self.add_module(path, nn.Module())
            owner = self.get_submodule(path)
            if value.is_floating_point() and "running" not in name:
                owner.register_parameter(last, nn.Parameter(value))
            else:
                owner.register_buffer(last, value)

    def forms(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


def test_a_pack_and_a_run_give_the_same_notes(tmp_path: Path) -> None:
    weights = {f"{n}.weight": with_zeros(random(20, 20, seed=n), 200) for n in range(3)}
    save_file(weights, tmp_path / "w.safetensors")
    recipe = Recipe((Quantize(symmetric=False), Cluster(where="1*")))
    packed = pack(tmp_path / "w.safetensors", tmp_path / "a.tersor", recipe)
    model = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in weights))
    model.load_state_dict(weights)
    assert packed.ledger.digest == run(model, recipe).ledger.digest


def test_a_misspelt_glob_is_refused_by_pack(tmp_path: Path) -> None:
    save_file({"a.weight": random(4, 4)}, tmp_path / "w.safetensors")
    with pytest.raises(SiteError, match="zeros: where='b'"):
        pack(tmp_path / "w.safetensors", tmp_path / "a.tersor", Recipe((Quantize(),), zeros="b"))


def test_own_groups_have_names_of_their_own() -> None:
    class Takes(Own):
        def run(self, view: Any) -> Any:
            yield Group(CAME, (Note("", "done", "mine"),))

    with pytest.raises(RefusedError, match="the key 'zeros that came' is taken"):
        run(tiny("mlp").model, Takes())
