"""Dials are searched by halving; which trials are run, and which of them is the best."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.search.budget import Budget, read_budget
from tersor.search.plan import BITS, KEEPS, TRAINED, WAYS, Plan, first, halves, last, onward
from tersor.search.trials import Trial, Trials


@given(st.integers(0, 40), st.integers(0, 40))
def test_halving_finds_what_a_loop_finds(count: int, edge: int) -> None:
    values, tried = list(range(count)), list[int]()

    def holds(value: int) -> bool:
        tried.append(value)
        return value < edge

    assert last(values, holds) == max((v for v in values if v < edge), default=None)
    assert len(tried) <= count.bit_length()
    assert len(set(tried)) == len(tried)
    assert first(values, lambda v: v >= edge) == min((v for v in values if v >= edge), default=None)
    tried.clear()
    assert onward(values, holds) == last(values, lambda v: v < edge)
    assert len(tried) <= edge + 1


class Model(Trials):
    """Trials of a model whose losses are known: a point for each halving of units below `units`, and one
    for each halving of bits below `bits`. Training allows a sixteenth of the bits. `ways`: how many times as
    fast as slim a way is at the same keep; those that are missing are refused. Above
    `coarse` nothing is removed. `diverge`: shapes of which the training fails. `floor`: bits that a training
    is too short to go below. `least`: keeps below it remove as much as it does."""

    def __init__(
        self, budget: Budget, *, units: float, bits: float, runtime: str = "", integers: float = 2.0,
        ways: dict[str, float] | None = None, coarse: float = 1.0, diverge: tuple[str, ...] = (),
        floor: float = 0.0, least: float = 0.0,
    ):  # fmt: skip
        self.budget, self.runtime, self.given_nbytes = budget, runtime, 1000
        self.found, self.shapes, self.ran = {}, {}, list[tuple[float, float]]()
        self.easy = SimpleNamespace(units=units, bits=bits, integers=integers)
        self.coarse, self.diverge, self.floor, self.least = coarse, diverge, floor, least
        self.ways, self.asked = {"slim": 1.0} if ways is None else ways, list[list[str]]()

    def shape(self, trial: Trial) -> Trial:
        why = "" if trial.name.split(maxsplit=1)[0] in self.ways else "no"
        trained = trial.after is not None
        trial = trial.after or trial
        if trained and trial.name in self.diverge:
            trial = replace(trial, name=f"{trial.name} trained", after=trial)
            return self.shapes.setdefault(trial.name, replace(trial, why="it diverged"))
        if trial.steps[0].keep > self.coarse:
            return replace(trial, nothing=True)
        return self.shapes.setdefault(trial.name, replace(trial, why=why))

    def weights_of(self, shape: Trial) -> str:
        way, keep = shape.name.split()[:2]
        return "" if shape.why else f"{way} {max(float(keep), self.least)}"

    def judged(self, trial: Trial) -> Trial:
        if trial.name not in self.found:
            self.found[trial.name] = self.made(trial)
        return self.found[trial.name]

    def run_ahead(self, trials: Sequence[Trial]) -> None:
        self.asked.append([trial.name for trial in trials])

    def made(self, trial: Trial) -> Trial:
        name, after = trial.name, trial.after
        if after and after.why:
            return replace(trial, why=after.why)
        keep = max(after.steps[0].keep, self.least) if after else 1.0
        bits = float(name.split(" bits", maxsplit=1)[0].rsplit(maxsplit=1)[-1])
        self.ran.append((keep, bits))
        reached = max(bits, self.floor) if name.endswith("trained") else None
        bits = reached or bits
        easy = self.easy.bits / (16 if name.endswith("trained") else 1)
        drop = max(0.0, self.easy.units / keep - 1) + max(0.0, easy / bits - 1)
        speed = (self.easy.integers if "int8" in name else 1.0) / keep**0.5
        speed *= self.ways[name.split(maxsplit=1)[0]] if after else 1.0
        latency = {"ratio": [speed, speed, speed], "after": [1 / speed] * 3} if self.runtime else None
        nbytes = int(1000 * keep * bits / 32)
        return replace(trial, drop=(drop,) * 3, nbytes=nbytes, latency=latency, reached=reached)


def walked(budget: str, aim: str, epochs: float = 0.0, **model: Any) -> tuple[Plan, Model]:
    trials = Model(read_budget(budget), **model)
    plan = Plan(cast(Trials, trials), aim, epochs)
    plan.walk()
    return plan, trials


@pytest.mark.wide
@given(st.floats(0.02, 1), st.floats(0.5, 8))
def test_the_smallest_within_a_drop_is_found_along_both_dials(units: float, bits: float) -> None:
    plan, trials = walked("drop<=0.5", "size", units=units, bits=bits)
    whole = {b for b in BITS if max(0.0, units - 1) + max(0.0, bits / b - 1) <= 0.5}
    if not whole:
        assert not plan.ranked()
        return
    best = plan.ranked()[0]
    assert best.drop[2] <= 0.5
    keeps = [k for k in KEEPS if max(0.0, units / k - 1) + max(0.0, bits / 8 - 1) <= 0.5]
    least = min(keeps, default=1.0)
    at_least = [b for b in BITS if max(0.0, units / least - 1) + max(0.0, bits / b - 1) <= 0.5]
    known = [int(1000 * min(whole) / 32), int(1000 * least * min(at_least) / 32)]
    assert best.nbytes <= min(known)
    assert len(trials.ran) <= 4 + 4 + 4 * len(KEEPS)


def test_without_a_drop_the_mildest_small_and_fast_one_is_best() -> None:
    plan, _ = walked("size<=5%", "accuracy", units=0.5, bits=4.0)
    best = plan.ranked()[0]
    assert best.nbytes <= 50
    brute = {
        (k, b): max(0.0, 0.5 / k - 1) + max(0.0, 4 / b - 1)
        for k in (1.0, *KEEPS) for b in BITS if int(1000 * k * b / 32) <= 50
    }  # fmt: skip
    assert best.drop[0] == min(brute.values())


@pytest.mark.parametrize(("faster", "used"), [(2.0, True), (0.8, False)])
def test_integers_are_used_where_they_are_faster(faster: float, used: bool) -> None:
    plan, trials = walked(
        "drop<=0.5,latency<=30%", "latency", units=0.1, bits=1.0, runtime="onnxruntime", integers=faster
    )
    assert plan.integers == used
    best = plan.ranked()[0]
    assert ("int8" in best.name) == used
    assert not trials.over(best)


def test_a_refused_trial_is_no_candidate_and_its_shape_is_not_asked_again() -> None:
    trials = Model(read_budget("drop<=9"), units=0.1, bits=1.0)
    trials.found["1.3 bits"] = Trial("1.3 bits", (), why="no")
    plan = Plan(cast(Trials, trials), "size")
    plan.walk()
    assert all(trial.name != "1.3 bits" for trial in plan.ranked())


@pytest.mark.parametrize("aim", ["size", "accuracy"])
def test_training_under_a_price_gives_the_smallest_file(aim: str) -> None:
    budget = "drop<=0.5" if aim == "size" else "size<=1%"
    plan, _ = walked(budget, aim, epochs=1.0, units=0.9, bits=4.0)
    best = plan.ranked()[0]
    assert "trained" in best.name
    losses = {bits: max(0.0, 4.0 / 16 / bits - 1) for bits in TRAINED}
    if aim == "size":
        assert best.nbytes <= int(1000 * min(b for b, drop in losses.items() if drop <= 0.5) / 32)
    else:
        assert best.drop[0] <= min(drop for b, drop in losses.items() if int(1000 * b / 32) <= 10)


def test_bits_are_not_trained_where_only_time_is_bounded() -> None:
    plan, trials = walked(
        "drop<=0.5,latency<=50%", "latency", epochs=1.0, runtime="onnxruntime", units=0.1, bits=1.0
    )
    assert plan.ranked()
    assert not any("trained" in name for name in trials.found)


def test_the_fastest_way_to_remove_parts_is_found_where_time_counts() -> None:
    ways = {"slim": 1.0, "shorten": 1.5, "factorize": 0.7}
    model = {"units": 0.1, "bits": 1.0, "runtime": "onnxruntime", "ways": ways}
    plan, trials = walked("drop<=0.5,latency<=50%", "latency", **model)
    assert plan.ranked()[0].name.startswith("shorten")
    assert sum(name.startswith("factorize") for name in trials.shapes) <= 3
    plan, _ = walked("latency<=30%", "accuracy", **{**model, "units": 0.5})
    assert plan.ranked()[0].name.startswith("shorten")


def test_a_way_that_is_refused_is_asked_once_and_the_next_one_stands_in() -> None:
    plan, trials = walked("drop<=0.5", "size", units=0.3, bits=4.0, ways={"factorize": 1.0})
    assert [name.split()[0] for name in trials.shapes][:3] == list(WAYS)
    assert plan.refused == {"slim", "shorten"}
    assert plan.ranked()[0].name.startswith("factorize")
    _, trials = walked("drop<=0.5", "size", units=0.3, bits=4.0)
    assert {name.split()[0] for name in trials.shapes} == {"slim"}


@given(st.integers(0, 40), st.integers(0, 40))
def test_what_is_asked_next_was_said_ahead(count: int, edge: int) -> None:
    values, ahead, tried = list(range(count)), list[list[int]](), list[int]()

    def holds(value: int) -> bool:
        tried.append(value)
        return value < edge

    last(values, holds, ahead.append)
    assert [said[0] for said in ahead] == tried
    for now, later in zip(ahead, ahead[1:], strict=False):
        assert later[0] in now[1:3]  # of two middles, one is asked
    assert sorted(halves(0, count)) == values
    ahead.clear(), tried.clear()
    onward(values, holds, ahead.append)
    assert [said[0] for said in ahead] == tried


def test_the_next_trial_of_every_dial_is_said_ahead() -> None:
    _, trials = walked("drop<=0.5", "size", epochs=1.0, units=0.3, bits=4.0)
    said = {names[0] for names in trials.asked}
    assert {*trials.found} <= {name for names in trials.asked for name in names}
    assert sum(name in said for name in trials.found) >= 0.9 * len(trials.found)


def test_a_step_that_removes_nothing_at_first_is_asked_for_more() -> None:
    ways = {"slim": 1.0, "shorten": 2.0}
    model = {"units": 0.1, "bits": 1.0, "runtime": "onnxruntime", "ways": ways}
    plan, trials = walked("drop<=0.5,latency<=50%", "latency", coarse=0.3, **model)
    assert not plan.refused - {"factorize"}
    assert plan.ranked()[0].name.startswith("shorten")
    assert not any(
        name.startswith(f"{way} 0.{n}") for way in ways for n in (8, 65, 5, 4) for name in trials.found
    )
    plan, trials = walked("drop<=0.5", "size", units=0.1, bits=4.0, coarse=0.0)
    assert {name.split()[-1] for name in trials.found} == {"bits"}
    assert not any("slim" in name for name in trials.found)


def test_a_training_that_fails_at_one_keep_does_not_end_its_way() -> None:
    plan, _ = walked("drop<=0.5", "size", epochs=1.0, units=0.3, bits=1.0, diverge=("slim 0.32",))
    assert not plan.refused
    assert any(name.startswith("slim 0.65") for name in plan.trials.found)


@pytest.mark.parametrize("aim", ["size", "accuracy"])
@pytest.mark.parametrize("floor", [0.06, 0.3, 3.0])
def test_a_size_that_a_training_is_too_short_for_is_asked_for_once(aim: str, floor: float) -> None:
    budget = "drop<=0.5" if aim == "size" else "size<=1%"
    plan, trials = walked(budget, aim, epochs=1.0, units=0.9, bits=4.0, floor=floor)
    asked = {float(name.split()[-3]): name for name in trials.found if name.endswith("trained")}
    by_shape: dict[str, list[float]] = {}
    for name in trials.found:
        if name.endswith("trained"):
            by_shape.setdefault(name.rpartition(",")[0], []).append(float(name.split()[-3]))
    assert asked
    for bits in by_shape.values():
        assert sum(b < floor / 1.25 for b in bits) <= 1  # a second one would end where the first did
    # Nothing better was left out: all that the floor allows, tried one by one.
    best, limit = plan.ranked(), max(floor, 0.0)
    if aim == "size":
        losses = {max(b, limit): max(0.0, 4.0 / 16 / max(b, limit) - 1) for b in TRAINED}
        assert best[0].nbytes <= int(1000 * min(b for b, drop in losses.items() if drop <= 0.5) / 32)


@pytest.mark.parametrize("runtime", ["", "onnxruntime"])
def test_keeps_that_give_the_same_weights_are_one_shape(runtime: str) -> None:
    """The ranks of small layers, and multiples of 8 channels, are the same for the hardest keeps."""
    budget = "drop<=0.5" + (",latency<=50%" if runtime else "")
    model = {"epochs": 1.0, "units": 0.1, "bits": 1.0, "runtime": runtime}
    plan, trials = walked(budget, "latency" if runtime else "size", least=0.3, **model)
    below = {name.split()[1].rstrip(",") for name in trials.found if name.startswith("slim")}
    assert sum(float(keep) <= 0.3 for keep in below) == 1
    same, _ = walked(budget, "latency" if runtime else "size", **model | {"units": 0.1})
    assert plan.ranked()[0].drop[2] <= 0.5
    assert same.ranked()[0].nbytes <= plan.ranked()[0].nbytes
