"""View: statistics and seeds belong to the visible state, and trials are separate runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import tiny
from torch import Tensor

from tersor.core import view as view_module
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State, start
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.forms import Dense
from tersor.model.stats import grams
from tersor.model.training_loop import fit
from tersor.record.events import Edit, Group, Note
from tersor.steps import STEPS, Cluster, Finetune, Prune, Quantize


@dataclass(frozen=True)
class Looks:
    """A step that calls a function with its view, and yields the result."""

    does: Callable[[View], Any]
    name: ClassVar[str] = "looks"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.WHOLE

    def run(self, view: View) -> Iterator[Group]:
        for number, events in enumerate(self.does(view) or ()):
            yield Group(str(number), events)


def test_statistics_are_those_of_the_state_before_the_step() -> None:
    t, seen, site = tiny("conv"), [], "block.weight"

    def look(view: View) -> None:
        seen.append(view.gram(view.sites[site]))

    def smaller(view: View) -> Any:
        look(view)
        form = view.form("stem.weight")
        yield [Edit("stem.weight", form, Dense(form.decode() / 4), "absorb")]
        look(view)

    result = run(t.model, [Looks(smaller), Looks(look)], t.task)
    sites = [start(t.model).sites[site]]
    before, after = (
        grams(model, t.task, sites)[site].moment for model in (tiny("conv").model, result.model())
    )
    assert not torch.allclose(before, after, rtol=0.1)
    for gram, want in zip(seen, (before, before, after), strict=True):
        torch.testing.assert_close(gram, want)


def test_a_trial_looks_at_the_data_once_more_only_where_it_has_changed_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t, passes, seen = tiny("conv"), [], []

    def counted(model: Any, task: Any, sites: list[Any]) -> dict[str, Tensor]:
        passes.append(1)
        return grams(model, task, sites)

    monkeypatch.setattr(view_module, "grams", counted)

    def look(view: View) -> None:
        seen.append(view.gram(view.sites["block.weight"]))

    def tries(view: View) -> None:
        look(view)
        view.trial([Looks(look), Looks(look)])
        assert len(passes) == 1
        view.trial([Prune(keep=0.2), Looks(look)])
        assert len(passes) == 2
        look(view)

    run(t.model, Looks(tries), t.task)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[3])
    assert torch.equal(seen[0], seen[4])


def test_facts_of_a_trial_are_its_own() -> None:
    t, facts = tiny("mlp"), []

    def tries(view: View) -> None:
        facts.append(view.trial([Prune(keep=0.5)])[0])
        facts.append(view.trial([Prune(keep=0.1), STEPS["measure"]()])[0])

    run(t.model, [STEPS["measure"](), Looks(tries)], t.task)
    assert facts[0].keys() == {"nbytes", "corrected"}
    scores = t.task.scores(run(t.model, Prune(keep=0.1)).model())
    assert facts[1]["accuracy"]["after"][0] == pytest.approx(float(scores.mean()))


def test_every_step_site_and_trial_has_its_own_random_numbers() -> None:
    model, seeds = tiny("mlp").model, []

    def look(view: View) -> None:
        seeds.extend(view.seed_for(name) for name in ("", "layers.0.weight", "layers.2.weight"))

    def tries(view: View) -> None:
        look(view)
        for _ in range(2):
            view.trial([Looks(look), Looks(look)])

    def drawn(recipe: Any, given: Any = model, seed: int = 0) -> tuple[State, list[int]]:
        seeds.clear()
        return run(given, recipe, seed=seed), list(seeds)

    both = [Looks(tries), Looks(tries)]
    result, whole = drawn(both)
    assert len(set(whole)) == len(whole) == 3 * 10
    assert not set(whole) & set(drawn(both, seed=1)[1])
    # Two runs of one step draw what one run of two steps does, each with its seed.
    once, first = drawn(both[:1], seed=4)
    second = drawn(both[1:], once, seed=9)[1]
    assert drawn(Recipe(tuple(both), (4, 9)))[1] == first + second
    assert drawn([*both, Prune()])[1] == whole, "what comes later changes nothing"
    assert result.digest == result.ledger.base


def test_a_trial_continues_from_the_steps_before_it() -> None:
    """Its ledger is that of a run of these steps, independent of later steps of the recipe."""
    t, found = tiny("mlp"), []

    def tries(view: View) -> None:
        found.append(view.trial([Prune(keep=0.2)])[1])

    run(t.model, [Prune(keep=0.5), Looks(tries), Quantize()])
    want = run(t.model, [Prune(keep=0.5), Prune(keep=0.2)])
    (trial,) = found
    assert trial.digest == want.digest
    assert trial.ledger.step_names() == ["prune", "prune"]
    assert trial.ledger.digest == want.ledger.digest


@pytest.mark.parametrize("chained", [False, True])
def test_the_teacher_is_the_model_as_it_was_first_given(
    chained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, answers = tiny("mlp"), []

    def watched(tuned: Any, task: Any, plan: Any, *, teacher: Any, **more: Any) -> Any:
        answers.append(t.out(teacher))
        return fit(tuned, task, plan, teacher=teacher, **more)

    monkeypatch.setattr(view_module, "fit", watched)
    for last in (Finetune(epochs=1, teacher_weight=1.0), STEPS["distill"](epochs=1)):
        if chained:
            run(run(t.model, Prune(keep=0.2)), last, t.task)
        else:
            run(t.model, [Prune(keep=0.2), last], t.task)
    assert len(answers) == 2
    assert all(torch.equal(answer, t.out()) for answer in answers)


TRIALS = {
    "other recipes": [[Prune(keep=0.5), Cluster(entries=4)], [Prune(keep=0.2)]],
    "the same, drawn anew": [[Cluster(init="kmeans++", iterations=1, entries=4)]] * 3,
    "trained": [[Finetune(epochs=2, lr=0.01)], [Prune(keep=0.5, epochs=2, rounds=2, lr=0.01)]],
}


@pytest.mark.parametrize("what", TRIALS)
def test_trials_have_journals_of_their_own(what: str, tmp_path: Path) -> None:
    """The trials are the same with and without a journal, interrupted between two trials or not."""
    t = tiny("conv")

    def tried(stop: int, found: list[str]) -> Any:
        @dataclass(frozen=True)
        class Tries(Looks):
            does: None = None  # type: ignore[assignment]  # what a journal can tell apart

            def run(self, view: View) -> Iterator[Group]:
                for steps in TRIALS[what]:
                    if len(found) == stop:
                        raise KeyboardInterrupt
                    found.append(view.trial(steps)[1].digest)
                yield Group("all", [Note("", "tried", str(len(found)))])

        return Tries()

    want: list[str] = []
    run(t.model, tried(-1, want), t.task)
    assert len(set(want)) == len(want)
    with pytest.raises(KeyboardInterrupt):
        run(t.model, tried(1, []), t.task, journal=tmp_path)
    found: list[str] = []
    run(t.model, tried(-1, found), t.task, journal=tmp_path, resume=True)
    assert found == want
