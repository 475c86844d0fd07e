"""Run, undo, replay, lock: the executor refuses untrue edits, and does not change its inputs."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import tiny
from torch import nn

from tersor.core.history import replay, undo
from tersor.core.recipe import Recipe
from tersor.core.run import Executor, run
from tersor.core.state import State, start
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.encode import coded
from tersor.errors import JournalError, RefusedError, SettingError, TaskError, TersorError
from tersor.forms import Affine, Codebook, Coded, Dense, Form, LowRank, Masked
from tersor.io.container_writer import save
from tersor.io.verify import verify
from tersor.model.task import Task
from tersor.record.events import Edit, Event, Group, Note
from tersor.record.observer import Observer
from tersor.steps import STEPS, Cluster, Entropy, Prune, Quantize
from tersor.steps.recipe_text import dump, from_yaml, lock

W = "layers.0.weight"


@dataclass(frozen=True)
class Fake:
    """A step that yields given groups."""

    name: ClassVar[str] = "fake"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.WHOLE
    groups: Callable[[View], Iterable[Sequence[Event]]] = lambda view: ()

    def run(self, view: View) -> Iterator[Group]:
        for number, events in enumerate(self.groups(view)):
            yield Group(str(number), tuple(events))


def edit(view: View, after: Form, how: str = "refine", site: str = W, before: Form | None = None) -> Edit:
    return Edit(site, view.form(site) if before is None else before, after, how)


def half(view: View) -> Form:
    return Dense(view.form(W).decode() / 2)


def test_no_step_no_change() -> None:
    t = tiny("mlp")
    result = run(t.model, [Fake()])
    assert torch.equal(t.out(result.model()), t.out())
    assert result.digest == result.ledger.base == start(t.model).digest
    assert result.ledger.entries == []
    assert result.ledger.seconds.keys() == {0}


def test_an_edit_is_applied_and_recorded() -> None:
    t = tiny("mlp")
    result = run(t.model, [Fake(lambda view: [(edit(view, half(view)), Note(W, "done", "halved"))])])
    assert torch.equal(result.model().get_parameter(W), t.model.get_parameter(W) / 2)
    assert torch.equal(result.state_dict()[W], t.model.get_parameter(W).detach() / 2)
    entry = next(result.ledger.edits())
    assert (entry.step, entry.name, entry.site, entry.how) == (0, "fake", W, "refine")
    assert entry.after == result.forms[W].digest


def bits(view: View) -> torch.Tensor:
    return view.form(W).decode().clone()


def changed(view: View, value: float) -> Form:
    w = bits(view)
    w[0, 0] = value
    return Dense(w)


BAD: dict[str, tuple[Callable[[View], Edit], str]] = {
    "wrong shape": (lambda v: edit(v, Dense(torch.zeros(5, 7))), "shape [7, 5] became [5, 7]"),
    "NaN": (lambda v: edit(v, changed(v, torch.nan)), "decodes to NaN or infinity"),
    "infinity": (lambda v: edit(v, changed(v, -torch.inf), "absorb"), "decodes to NaN or infinity"),
    "stale before": (lambda v: edit(v, half(v), before=half(v)), "starts from another form"),
    "no such site": (lambda v: edit(v, half(v), site="nowhere", before=half(v)), "starts from another form"),
    "unknown relation": (lambda v: edit(v, half(v), "replace"), "an edit is one of wrap, refine"),
    "false wrap": (
        lambda v: edit(v, Masked(Dense(bits(v) > 0), half(v)), "wrap"),
        "must contain the old form",
    ),
    "false lossless": (lambda v: edit(v, half(v), "lossless"), "must decode to the same bits"),
    "lossless in another dtype": (lambda v: edit(v, Dense(bits(v).double()), "lossless"), "the same bits"),
    "lossless but for one bit": (
        lambda v: edit(v, changed(v, float(bits(v)[0, 0]) * (1 + 2e-7)), "lossless"),
        "must decode to the same bits",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_edit_is_refused(what: str) -> None:
    make, says = BAD[what]
    with pytest.raises(RefusedError) as caught:
        run(tiny("mlp").model, [Fake(lambda view: [(make(view),)])])
    assert says in str(caught.value)
    assert str(caught.value).startswith("fake: ")
    assert "nowhere" in str(caught.value) or W in str(caught.value)


def test_the_sign_of_zero_is_a_bit() -> None:
    model = tiny("mlp").model
    with torch.no_grad():
        model.get_parameter(W)[0, 0] = 0.0
    with pytest.raises(RefusedError, match="same bits"):
        run(model, [Fake(lambda view: [(edit(view, changed(view, -0.0), "lossless"),)])])


@pytest.mark.parametrize(("how", "value"), [("lossless", 0.5), ("refine", torch.nan)])
def test_the_last_slice_is_checked_too(how: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.forms.form.SLICE", 4)

    def last(view: View) -> Form:
        w = bits(view)  # [7, 5]
        w[-1, -1] = value
        return Dense(w)

    with pytest.raises(RefusedError, match="same bits|NaN"):
        run(tiny("mlp").model, [Fake(lambda view: [(edit(view, last(view), how),)])])


def test_overflow_in_the_models_dtype_is_refused() -> None:
    model = nn.Linear(2, 2).half()
    with pytest.raises(RefusedError, match="infinity"):
        run(model, [Fake(lambda v: [(edit(v, Dense(torch.full((2, 2), 1e5)), site="weight"),)])])


def test_a_group_is_applied_whole_or_not_at_all() -> None:
    t = tiny("mlp")
    seen: dict[str, str] = {}

    def groups(view: View) -> Iterator[Group]:
        yield (edit(view, half(view)),)
        good = Dense(view.form("layers.2.weight").decode() * 2)
        try:
            yield (edit(view, good, site="layers.2.weight"), edit(view, half(view)))
        finally:
            seen["ran"] = "yes"

    given = start(t.model)
    forms = dict(given.forms)
    with pytest.raises(RefusedError, match="starts from another form"):
        run(given, [Fake(groups)])
    assert seen == {"ran": "yes"}
    assert given.forms == forms
    assert given.ledger.entries == []


def test_a_step_sees_the_state_at_its_beginning() -> None:
    seen = []

    def groups(view: View) -> Iterator[Group]:
        seen.append(view.form(W).digest)
        yield (edit(view, half(view)),)
        seen.append(view.form(W).digest)

    result = run(tiny("mlp").model, [Fake(groups), Fake(groups)])
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert result.forms[W].digest not in seen


def state_of(model: nn.Module) -> list[Any]:
    """Everything that a run might change in a module."""
    state: list[Any] = []
    for name, module in model.named_modules():
        state.append((name, module.training, sorted(vars(module))))
        state.append((len(module._forward_hooks), len(module._forward_pre_hooks)))
        for key, p in module._parameters.items():
            if p is not None:
                state.append((key, id(p), p.requires_grad, p.grad, p._version, p.tolist()))
        for key, b in module._buffers.items():
            if b is not None:
                state.append((key, id(b), b._version, b.tolist()))
    return state


@pytest.mark.parametrize("name", ["conv", "attention", "lstm"])
def test_the_given_model_is_not_touched(name: str) -> None:
    t = tiny(name)
    t.model.train()
    next(t.model.parameters()).requires_grad_(False)
    before = state_of(t.model)
    run(t.model, [Prune(epochs=1), Quantize(), Entropy(coder="huffman")], t.task)
    assert str(state_of(t.model)) == str(before)


def test_the_result_is_independent_of_the_given_model() -> None:
    t = tiny("mlp")
    result = run(t.model, [Quantize()])
    before = t.out(result.model())
    with torch.no_grad():
        for parameter in t.model.parameters():
            parameter.zero_()
    assert torch.equal(t.out(result.model()), before)


# --- undo and replay ---

STEPS_HERE = [Prune(keep=0.5), Cluster(entries=4), Entropy()]


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "journal"


@pytest.fixture(scope="module")
def whole(journal: Path) -> tuple[Any, State]:
    t = tiny("mlp")
    return t, run(t.model, STEPS_HERE, t.task, journal=journal)


def test_undo_step_by_step_is_the_run_step_by_step(whole: tuple[Any, State], journal: Path) -> None:
    t, result = whole
    for count in range(1, len(STEPS_HERE) + 1):
        back = undo(result, count, journal=journal)
        want = run(t.model, STEPS_HERE[:-count], t.task) if count < len(STEPS_HERE) else start(t.model)
        assert back.digest == want.digest
        assert {name: form.digest for name, form in back.forms.items()} == {
            name: form.digest for name, form in want.forms.items()
        }
        assert back.ledger.step_names() == [step.name for step in STEPS_HERE[:-count]]
        if count < len(STEPS_HERE):
            assert back.ledger.digest == want.ledger.digest
    assert undo(result).digest == result.ledger.base
    assert undo(result, 0).digest == result.digest
    for key, value in undo(result).state_dict().items():
        assert torch.equal(value, t.model.state_dict()[key])


def test_an_undone_state_can_be_run_again(whole: tuple[Any, State]) -> None:
    t, result = whole
    again = run(undo(result, 1), [Entropy()], t.task)
    assert again.digest == result.digest


@pytest.mark.parametrize("steps", [4, -1])
def test_undo_of_more_than_there_is(whole: tuple[Any, State], steps: int) -> None:
    with pytest.raises(SettingError, match=f"undo: steps={steps}, but the ledger has 3 steps"):
        undo(whole[1], steps)


def test_replay_repeats(whole: tuple[Any, State], journal: Path) -> None:
    t, result = whole
    again = replay(t.model, result.ledger, journal)
    assert again.digest == result.digest
    assert replay(t.model, undo(result, 1).ledger, journal).digest == undo(result, 1).digest
    assert torch.equal(t.out(again.model()), t.out(result.model()))


def test_replay_on_another_model_is_refused(whole: tuple[Any, State], journal: Path) -> None:
    with pytest.raises(RefusedError, match="replay: the ledger begins with model"):
        replay(tiny("mlp", seed=5).model, whole[1].ledger, journal)


def test_lossless_steps_are_undone_without_a_journal_and_others_are_not(
    whole: tuple[Any, State], journal: Path
) -> None:
    _, result = whole
    assert undo(result, 1).digest == undo(result, 1, journal=journal).digest
    with pytest.raises(RefusedError, match=r"undo: steps=2 .* only a journal keeps.*journal=FOLDER"):
        undo(result, 2)
    assert undo(result, 3).digest == result.ledger.base


def test_continued_runs_are_undone_with_their_journals_in_order(
    whole: tuple[Any, State], tmp_path: Path
) -> None:
    t, result = whole
    first = run(t.model, STEPS_HERE[:2], t.task, journal=tmp_path / "a")
    both = run(first, STEPS_HERE[2:], t.task, journal=tmp_path / "b")
    assert both.digest == result.digest
    folders = [tmp_path / "a", tmp_path / "b"]
    for count, wanted in ((1, first), (2, run(t.model, STEPS_HERE[:1], t.task))):
        assert undo(both, count, journal=folders).digest == wanted.digest
    assert replay(t.model, both.ledger, folders).digest == both.digest
    with pytest.raises(JournalError, match="hold 2 finished steps, and 3 are needed"):
        replay(t.model, both.ledger, folders[:1])


def test_undo_of_several_codings_gives_the_first_plain_form() -> None:
    plain = run(wide(), Quantize(bits=4))
    twice = run(plain, [Entropy(coder="huffman"), Entropy(coder="max")])
    assert [entry.how for entry in twice.ledger.edits() if entry.site == "weight"][1:] == ["lossless"] * 2
    assert undo(twice, 2).digest == plain.digest
    assert undo(twice, 2).ledger.digest == plain.ledger.digest
    with pytest.raises(
        RefusedError, match=r"undo: weight: the earlier form was coded in another way.*journal=FOLDER"
    ):
        undo(twice, 1)


def test_coding_that_leaves_out_what_a_mask_hides_is_undone_to_the_same_weights(tmp_path: Path) -> None:
    model, recipe = wide(), [Prune(keep=0.5), Entropy()]
    result, pruned = run(model, recipe, journal=tmp_path / "j"), run(model, recipe[:1])
    back = undo(result, 1)
    assert not [node for _, node in back.forms["weight"].walk() if isinstance(node, Coded)]
    for key, value in pruned.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
    save(back, tmp_path / "m.tersor")
    assert all(check.sound for check in verify(tmp_path / "m.tersor"))
    assert undo(result, 1, journal=tmp_path / "j").digest == pruned.digest


def wide() -> nn.Module:
    """A layer that coders shorten, the later coder more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(64, 96)


def test_a_journal_of_another_run_does_not_undo(whole: tuple[Any, State], tmp_path: Path) -> None:
    t, result = whole
    run(t.model, [Prune(keep=0.25), Cluster(entries=4)], t.task, journal=tmp_path)
    with pytest.raises(JournalError, match="this journal belongs to another run"):
        undo(result, 2, journal=tmp_path)


# --- runs chain ---


def test_two_runs_of_one_step_are_one_run_of_two(whole: tuple[Any, State]) -> None:
    t, result = whole
    chained: Any = t.model
    for step in STEPS_HERE:
        chained = run(chained, step, t.task)
    assert chained.digest == result.digest
    assert chained.ledger.digest == result.ledger.digest
    assert chained.ledger.recipe == result.ledger.recipe
    assert lock(chained) == lock(result)


def test_what_a_later_run_measures_is_compared_with_the_first_weights() -> None:
    t = tiny("conv")
    pruned = run(t.model, Prune(keep=0.02), t.task)
    chained = run(pruned, STEPS["measure"](), t.task)
    whole = run(t.model, [Prune(keep=0.02), STEPS["measure"]()], t.task)
    kinds = ("accuracy", "nbytes")
    found, wanted = (
        {e.kind: dict(e.data) for e in state.ledger.notes() if e.kind in kinds} for state in (chained, whole)
    )
    assert found == wanted
    before = t.task.scores(t.model).mean()
    assert found["accuracy"]["before"][0] == pytest.approx(float(before))
    assert found["nbytes"]["before"] == sum(v.nbytes for v in t.model.state_dict().values())


def test_seeds_stay_with_their_steps() -> None:
    model, step = tiny("conv").model, Cluster(init="kmeans++", iterations=1)
    chained = run(run(model, step, seed=4), step, seed=9)
    assert chained.ledger.recipe["seed"] == [4, 9]
    again = run(model, from_yaml(dump(lock(chained)), STEPS))
    assert again.digest == chained.digest
    assert again.ledger.digest == chained.ledger.digest


def test_two_groups_with_one_key_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice(Fake):
        def run(self, view: View) -> Iterator[Group]:
            yield Group("a", (Note("", "one", "1"),))
            yield Group("a", (Note("", "two", "2"),))

    with pytest.raises(RefusedError, match="the key 'a' is taken"):
        run(tiny("mlp").model, Twice())


@pytest.mark.parametrize("key", ["coded again", "left as they are", ""])
def test_the_keys_of_the_executor_are_its_own(key: str) -> None:
    @dataclass(frozen=True)
    class Taking(Fake):
        def run(self, view: View) -> Iterator[Group]:
            yield Group(key, (Note("", "one", "1"),))

    with pytest.raises(RefusedError, match=f"the key '{key}' is taken"):
        run(tiny("mlp").model, Taking())


def test_a_trial_changes_nothing_and_returns_its_result() -> None:
    t, found = tiny("mlp"), {}

    def groups(view: View) -> Iterator[Any]:
        before = view.state.digest
        facts, state = view.trial([Prune(keep=0.2), STEPS["measure"]()])
        found["facts"], found["trial"] = facts, state.digest
        assert view.state.digest == before
        yield [Note("", "tried", "once")]

    result = run(t.model, [Fake(groups)], t.task)
    assert result.digest == result.ledger.base != found["trial"]
    assert found["trial"] == run(t.model, Prune(keep=0.2), t.task).digest
    assert found["facts"]["nbytes"] == run(t.model, Prune(keep=0.2)).nbytes
    assert {"accuracy", "nbytes"} <= found["facts"].keys()
    assert [entry.kind for entry in result.ledger.entries] == ["tried"]


# --- the lock file ---


def locked(result: State) -> Recipe:
    return from_yaml(dump(lock(result)), STEPS)


def test_a_lock_runs_again_to_the_same_result(whole: tuple[Any, State]) -> None:
    t, result = whole
    recipe = locked(result)
    assert recipe.steps == tuple(STEPS_HERE)
    assert recipe.base == result.ledger.base
    assert dict(recipe.result).keys() == {entry.site for entry in result.ledger.edits()}
    again = run(t.model, recipe, t.task)
    assert again.digest == result.digest
    assert again.ledger.digest == result.ledger.digest


def test_a_lock_refuses_another_model(whole: tuple[Any, State]) -> None:
    with pytest.raises(RefusedError, match="recipe: the lock is for base"):
        run(tiny("mlp", seed=5).model, locked(whole[1]))


def test_a_lock_refuses_another_result(whole: tuple[Any, State]) -> None:
    t, result = whole
    document = copy.deepcopy(lock(result))
    document["steps"][0]["prune"]["keep"] = 0.25
    with pytest.raises(RefusedError, match=r"lock: the result for layers\.0\.weight is .*, the lock says"):
        run(t.model, from_yaml(dump(document), STEPS), t.task)
    document = lock(result)
    document["result"]["layers.9.weight"] = "0" * 16
    with pytest.raises(RefusedError, match=r"lock: the result for layers\.9\.weight is no such site"):
        run(t.model, from_yaml(dump(document), STEPS), t.task)


# --- what a run is given ---


def test_nan_weights_are_refused_by_name_and_count() -> None:
    model = tiny("mlp").model
    with torch.no_grad():
        model.get_parameter(W)[0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(RefusedError, match=r"layers\.0\.weight: 2 of 35 values are NaN or infinite"):
        run(model, [Prune()])


def test_nan_in_buffers_is_refused_and_infinity_is_not() -> None:
    model = tiny("attention").model
    assert model.get_buffer("mask").isinf().any()
    result = run(model, [Entropy(), Quantize()])
    assert torch.equal(result.model().get_buffer("mask"), model.get_buffer("mask"))
    model.get_buffer("mask")[0, 0] = torch.nan
    with pytest.raises(RefusedError, match="mask: 1 of 36 values"):
        run(model, [Prune()])


@pytest.mark.parametrize("model", [None, {"w": torch.ones(2)}, nn.Linear, lambda x: x])
def test_a_model_is_a_module(model: Any) -> None:
    with pytest.raises(SettingError, match=r"must be a torch\.nn\.Module"):
        run(model, [Prune()])


def test_a_task_that_does_not_fit_is_refused_before_anything_runs() -> None:
    ran = []
    with pytest.raises(TaskError, match="do not fit the model"):
        run(tiny("mlp").model, [Fake(lambda view: ran.append(1) or ())], tiny("conv").task)
    assert not ran


@pytest.mark.parametrize("step", ["finetune", "distill", "export"])
def test_a_step_that_needs_a_task_says_so(step: str) -> None:
    with pytest.raises(TersorError, match=f"{step}: needs a task"):
        run(tiny("mlp").model, [STEPS[step]()])


def test_weights_alone_can_be_compressed_but_not_trained() -> None:
    t = tiny("mlp")
    given = start(t.model)
    bare = State(given.sites, given.forms, given.aliases, given.ledger)
    result = run(bare, [Prune(), Quantize(), Entropy()])
    assert result.digest == run(t.model, [Prune(), Quantize(), Entropy()]).digest
    assert torch.equal(t.out(result.model(t.model)), t.out(run(t.model, [Prune(), Quantize()]).model()))
    with pytest.raises(SettingError, match=r"a file holds weights, not code: give the model"):
        result.model()
    with pytest.raises(RefusedError, match="finetune: needs the model, and"):
        run(bare, [STEPS["finetune"]()], t.task)


def test_tied_tensors_stay_tied() -> None:
    t = tiny("attention")
    result = run(t.model, [Quantize(bits=4)])
    assert result.aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in result.forms
    state = result.state_dict()
    assert state.keys() == t.model.state_dict().keys()
    assert torch.equal(state["head.weight"], state["embed.weight"])
    model = result.model()
    assert model.head.weight is model.embed.weight


def test_the_observer_is_called() -> None:
    calls: list[Any] = []

    class Teller(Observer):
        def step(self, number: int, total: int, name: str) -> None:
            calls.append((number, total, name))

        def progress(self, done: int, total: int, text: str = "") -> None:
            calls.append((done, total))

    t = tiny("mlp")
    run(t.model, [Quantize(), STEPS["finetune"](epochs=3)], t.task, observer=Teller())
    assert calls == [
        (1, 2, "quantize"), (1, 4), (2, 4), (3, 4), (4, 4), (2, 2, "finetune"), (6, 6),
    ]  # fmt: skip


def test_the_seed_changes_random_steps() -> None:
    model, step = tiny("conv").model, Cluster(init="kmeans++", iterations=1)
    digests = [run(model, [step], seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_sizes_are_those_of_the_arrays() -> None:
    result = run(tiny("mlp").model, [Quantize(bits=8, per="channel")])
    weights = 7 * 5 + 7 + 7 + 3 * 7
    rows, biases = 7 + 1 + 7 + 3, 7 + 1 + 7 + 3
    assert result.nbytes == weights + 4 * rows + 4 * biases


def test_forms_are_shared_not_copied_when_they_stay() -> None:
    given = start(tiny("mlp").model)
    result = run(given, [Prune(where=W)])
    assert all(result.forms[name] is given.forms[name] for name in given.forms if name != W)


def test_forms_of_a_codebook_and_a_product_pass_the_check() -> None:
    """Edits are checked through methods of forms, not by their kind."""
    book = Codebook(Dense(torch.zeros(7, 5, dtype=torch.uint8)), Dense(torch.ones(1)))
    thin = LowRank(Dense(torch.ones(7, 1)), Dense(torch.ones(1, 5)))
    grid = Affine(Dense(torch.ones(7, 5, dtype=torch.int8)), coded(torch.ones(7, 1)))
    for form in (book, thin, grid):
        assert (
            run(tiny("mlp").model, [Fake(lambda v, f=form: [(edit(v, f, "absorb"),)])]).state_dict()[W] == 1
        ).all()


def test_steps_that_use_only_weights_ignore_the_task() -> None:
    t = tiny("conv")
    steps = [Prune(keep=0.3), Quantize(bits=4), Entropy()]
    assert run(t.model, steps).digest == run(t.model, steps, Task(evaluate=t.task.evaluate)).digest


@pytest.mark.sampled(word="finetune")
@pytest.mark.parametrize("word", ["prune", "entropy", "measure", "finetune"])
def test_a_run_leaves_nothing_that_waits_for_the_garbage_collector(word: str) -> None:
    """pack runs an executor for each tensor: a reference cycle would keep past forms in memory until the
    garbage collector runs."""
    t = tiny("mlp")
    gc.collect()
    gc.disable()
    try:
        executor = Executor(start(t.model), Recipe((STEPS[word](),)), t.task)
        seen = weakref.ref(executor)
        executor.run()
        del executor
        assert seen() is None
    finally:
        gc.enable()
