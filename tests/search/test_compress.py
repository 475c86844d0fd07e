"""A budget in, a model out: on a small network that was trained on real data."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tersor import Finetune, Task, digits, load, run
from tersor.core.recipe import Recipe
from tersor.core.state import State, start
from tersor.errors import BudgetError, JournalError, RefusedError, SettingError, TaskError
from tersor.files import LOCKED, claim
from tersor.measure.accuracy import compared
from tersor.pipeline import run_pipeline
from tersor.report import search_table
from tersor.search import compress as module
from tersor.search import plan, trials
from tersor.search.compress import compress, search_task
from tersor.search.hold_out import hold_out
from tersor.steps import recipe_from_words
from tests.search.told import Told


@pytest.fixture(scope="module")
def task() -> Task:
    return digits()


@pytest.fixture(scope="module")
def net(task: Task) -> State:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
    )
    return start(run(net, Finetune(epochs=20, lr=0.01), task).model())


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few points on each dial."""
    monkeypatch.setattr(plan, "BITS", (8.0, 3.0, 2.0))
    monkeypatch.setattr(plan, "KEEPS", (0.5, 0.25))
    monkeypatch.setattr(plan, "TRAINED", (1.0,))


def accuracy(task: Task, state: State) -> float:
    return float(task.scores(state.model()).mean())


@pytest.mark.wide
def test_the_smallest_within_a_drop(net: State, task: Task, tmp_path: Path) -> None:
    result, facts = compress(net, task, "drop<=2", tmp_path / "out", epochs=10, lr=0.01)
    search = facts["search"]
    file = tmp_path / "out" / "model.tersor"
    again = load(file).on(net.plain())
    assert again.digest == result.digest
    assert 100 * (accuracy(task, net) - accuracy(task, again)) <= 2 + 1e-6
    assert file.stat().st_size == facts["files"]["result"]["nbytes"] < 0.15 * search["given_nbytes"]
    within = [row for row in search["trials"] if not row["why"] and row["drop"][2] <= 2]
    taken = {item["name"] for item in search["beyond"]}
    assert min(row["nbytes"] for row in within if row["name"] not in taken) == file.stat().st_size
    assert any(row["name"].startswith("slim") for row in within)  # units were removed
    assert not (tmp_path / "out" / "trials").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["search"] == search


def test_the_recipe_in_the_report_gives_the_same_model(net: State, task: Task, tmp_path: Path) -> None:
    """Without training all data are those of the trial, so the words alone repeat it."""
    calibrated = Task(
        "digits", evaluate=task.evaluate, calibrate=list(task.batches("train")), fingerprint="digits"
    )
    result, facts = compress(net, calibrated, "drop<=3", tmp_path / "a", epochs=0)
    rest = calibrated.__class__(
        "digits", evaluate=task.evaluate, calibrate=list(calibrated.batches("calibrate"))[::2]
    )
    same = run(net, recipe_from_words(facts["search"]["recipe"].split()), rest)
    assert {n: f.digest for n, f in same.forms.items()} == {n: f.digest for n, f in result.forms.items()}


def test_a_share_of_the_size_with_the_least_drop(net: State, task: Task, tmp_path: Path) -> None:
    _, facts = compress(net, task, "size<=12%", tmp_path / "out", epochs=5, lr=0.01)
    search = facts["search"]
    assert search["aim"] == "accuracy"
    assert facts["files"]["result"]["nbytes"] <= 0.12 * search["given_nbytes"]
    within = [
        row for row in search["trials"] if not row["why"] and row["nbytes"] <= 0.12 * search["given_nbytes"]
    ]
    assert search["drop"][0] == min(row["drop"][0] for row in within)


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial is exported and timed."""
    monkeypatch.setattr(plan, "BITS", (8.0, 3.0))
    monkeypatch.setattr(plan, "KEEPS", (0.5,))


@pytest.mark.usefixtures("fewer")
def test_a_bound_on_latency_is_measured_in_the_runtime(
    net: State, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "BITS", (8.0,))
    result, facts = compress(net, task, "latency<=1000%", tmp_path / "out", epochs=0, batch=4)
    search = facts["search"]
    assert all(row["latency"]["runtime"] == "onnxruntime" for row in search["trials"] if not row["why"])
    assert facts["latency"]["batch"] == 4
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    x = next(iter(task.batches("evaluate")))[0]
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = result.model()(x)
    # A step of an activation's grid may fall to the other side of a half in the runtime.
    assert (torch.from_numpy(got).argmax(1) == want.argmax(1)).float().mean() > 0.99


def test_a_search_that_was_killed_goes_on(net: State, task: Task, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "lr": 0.01}
    whole, want = compress(net, task, "drop<=3", tmp_path / "whole", **settings)
    second = want["search"]["trials"][1]["name"]
    with pytest.raises(KeyboardInterrupt):
        compress(net, task, "drop<=3", tmp_path / "out", **settings, observer=Told(second))
    with pytest.raises(RefusedError, match="--resume"):
        compress(net, task, "drop<=3", tmp_path / "out", **settings)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "trials").rglob("*.group")}
    assert kept
    told = Told(want["search"]["trials"][2]["name"])
    with pytest.raises(KeyboardInterrupt):
        compress(net, task, "drop<=3", tmp_path / "out", **settings, resume=True, observer=told)
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())  # nothing was done twice
    got, facts = compress(net, task, "drop<=3", tmp_path / "out", **settings, resume=True)
    assert got.digest == whole.digest
    assert [(row["name"], row["drop"], row["nbytes"]) for row in facts["search"]["trials"]] == [
        (row["name"], row["drop"], row["nbytes"]) for row in want["search"]["trials"]
    ]


def test_a_budget_that_nothing_meets_names_the_nearest_and_another_is_taken_from_there(
    net: State, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"none of \d+ trials is within .*Nearest: .*over the budget: size"):
        compress(net, task, "drop<=2,size<=1%", tmp_path / "out", epochs=0)
    assert not (tmp_path / "out" / "model.tersor").exists()
    told = Told()
    compress(net, task, "drop<=2,size<=60%", tmp_path / "out", epochs=0, resume=True, observer=told)
    assert (tmp_path / "out" / "model.tersor").exists()


def test_a_drop_that_the_evaluation_set_contradicts_is_not_taken(
    net: State, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, facts = compress(net, task, "drop<=3", tmp_path / "a", epochs=0)
    best = facts["search"]["best"]
    seen: list[int] = []

    def worse(*args: Any) -> dict[str, Any]:
        found = compared(*args)
        seen.append(1)
        return {**found, "drop": [50.0, 40.0, 60.0]} if len(seen) == 1 else found

    monkeypatch.setattr(module, "compared", worse)
    _, facts = compress(net, task, "drop<=3", tmp_path / "b", epochs=0)
    assert [item["name"] for item in facts["search"]["beyond"]] == [best]
    assert facts["search"]["best"] != best
    monkeypatch.setattr(module, "compared", lambda *args: {**compared(*args), "drop": [50.0, 40.0, 60.0]})
    with pytest.raises(BudgetError, match="the evaluation set shows drops above 3: "):
        compress(net, task, "drop<=3", tmp_path / "c", epochs=0)
    assert not (tmp_path / "c" / "model.tersor").exists()


def whole(task: Task, word: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All batches of a set as one."""
    x, y = zip(*task.batches(word), strict=True)
    return torch.cat(x), torch.cat(y)


class Seen(nn.Module):
    """Keeps the first number of every sample that it is trained on."""

    seen: ClassVar[set[float]] = set()

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not torch.compiler.is_exporting():
            self.seen.update(x[:, 0].tolist())
        out: torch.Tensor = self.inner(x)
        return out


def test_what_decides_is_never_trained_on(net: State, task: Task, tmp_path: Path) -> None:
    x, y = torch.randn(100, 64), torch.arange(100) % 10
    x[:, 0] = torch.arange(100.0)
    train = [(a, b) for a, b in zip(x.split(10), y.split(10), strict=True)]
    own = Task(evaluate=[(x, y)], train=train)  # a single batch has no halves
    compress(start(Seen(net.plain())), own, "size<=50%", tmp_path, epochs=1)
    assert Seen.seen == set(range(100)) - {*range(40, 50), *range(90, 100)}


def test_no_more_trials_begin_when_the_time_is_up(net: State, task: Task, tmp_path: Path) -> None:
    told = Told()
    with pytest.raises(BudgetError, match="more minutes, with --resume|all were refused"):
        compress(net, task, "drop<=3", tmp_path, epochs=0, minutes=1e-9, observer=told)
    assert not told.messages


def test_training_batches_that_cannot_be_parted_train_nothing_and_that_is_said(
    net: State, task: Task, tmp_path: Path
) -> None:
    x, y = whole(task, "train")

    def shuffled() -> Any:
        for rows in torch.randperm(len(x)).split(64):
            yield x[rows], y[rows]

    told = Told()
    own = Task(evaluate=[whole(task, "evaluate")], train=shuffled, fingerprint="digits")
    _, facts = compress(net, own, "drop<=3", tmp_path, observer=told)
    assert "nothing is trained: its training batches cannot be parted" in told.messages[0]
    assert all(
        "distill" not in row["recipe"] and "penalize" not in row["recipe"]
        for row in facts["search"]["trials"]
    )


def test_a_drop_that_allows_any_model_is_refused(net: State, task: Task, tmp_path: Path) -> None:
    def right(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.argmax(1) == target).float()

    own = Task(evaluate=task.evaluate, train=task.train, metric=right)
    with pytest.raises(RefusedError, match=r"drop=1 is in the metric's own unit.* percent=True"):
        compress(net, own, "drop<=1", tmp_path)
    with pytest.raises(
        RefusedError, match=r"drop=100 is in points, of which the given model has \d\d.*any model"
    ):
        compress(net, task, "drop<=100", tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget": "size<=10%", "aim": "size"}, "aim=size needs a bound on the drop"),
        ({"aim": "speed"}, "aim='speed'"),
        ({"epochs": -1}, "epochs=-1"),
        ({"lr": 0}, "lr=0"),
        ({"seed": -1}, "seed"),
        ({"minutes": 0}, "minutes=0"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"batch": 0}, "batch=0"),
        ({"threads": 10**6}, "threads=1000000"),
        ({"budget": "drop<0.5"}, "is no bound"),
    ],
)
def test_wrong_settings(net: State, task: Task, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        compress(net, task, **{"budget": "drop<=1", "out": tmp_path, **settings})
    assert not list(tmp_path.iterdir())


def test_a_task_with_an_evaluation_set_alone_is_refused(net: State, task: Task, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="has no others"):
        compress(net, Task(evaluate=task.evaluate), "drop<=1", tmp_path)


def test_a_task_of_another_model_is_refused(net: State, tmp_path: Path) -> None:
    wrong = [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(TaskError):
        compress(net, Task(evaluate=wrong, train=wrong * 9), "drop<=1", tmp_path)


def test_a_finished_run_is_not_overwritten(net: State, task: Task, tmp_path: Path) -> None:
    run_pipeline(net, Recipe(tuple(recipe_from_words(["quantize"]).steps)), task, tmp_path)
    before = (tmp_path / "model.tersor").read_bytes()
    with pytest.raises(RefusedError, match="holds a finished run"):
        compress(net, task, "drop<=1", tmp_path)
    assert (tmp_path / "model.tersor").read_bytes() == before


@pytest.mark.wide
def test_a_search_whose_time_was_up_goes_on_from_its_best(
    net: State, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(begun: plan.Plan, workers: int) -> bool:
        begun.point(plan.Setting())
        return True

    with monkeypatch.context() as patch:
        patch.setattr(module, "walked", begun)
        _, part = compress(net, task, "drop<=3,latency<=1000%", tmp_path, epochs=0)
    assert part["search"]["stopped"]
    assert (tmp_path / "trials").exists()
    assert (tmp_path / "model.onnx").exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "trials").rglob("*.group")}
    assert done
    told = Told("slim")
    with pytest.raises(KeyboardInterrupt):
        compress(net, task, "drop<=3", tmp_path, epochs=0, resume=True, observer=told)
    assert all(p.stat().st_mtime_ns == then for p, then in done.items())  # nothing was done twice
    _, facts = compress(net, task, "drop<=3", tmp_path, epochs=0, resume=True)
    assert not facts["search"]["stopped"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.tersor",
        "recipe.lock.yaml",
        "report.json",
        "search.html",
    }


@pytest.mark.wide
def test_the_nearest_is_the_one_that_misses_the_bound_by_least(
    net: State, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"Nearest: slim 0\.25, 2 bits: .*Allow more of size$"):
        compress(net, task, "size<=1%", tmp_path, epochs=1)


def test_a_frozen_model_is_slimmed_without_training_and_that_is_said(
    net: State, task: Task, tmp_path: Path
) -> None:
    told = Told()
    frozen = net.model().requires_grad_(False)
    _, facts = compress(start(frozen), task, "drop<=4", tmp_path, observer=told)
    search = facts["search"]
    assert "requires_grad=False" in search["untrained"]
    assert search["untrained"] in told.messages[0]
    slim = [row for row in search["trials"] if row["name"].startswith("slim")]
    assert slim
    assert all(not row["why"] and "distill" not in row["recipe"] for row in slim)


def test_a_reason_of_many_refused_trials_is_printed_once() -> None:
    row = {"name": "a", "why": "the same long reason", "seconds": 0.0}
    search = {"trials": [row, {**row, "name": "b"}], "unit": "", "best": None}
    assert search_table.reasons(search) == ["the same long reason"]
    column = list(search_table.trials(search).columns[-1].cells)  # type: ignore[union-attr]
    assert column == ["refused (1)", "refused (1)"]


@pytest.mark.wide
@pytest.mark.usefixtures("fewer")
def test_a_trial_that_is_too_slow_when_it_is_timed_again_is_not_taken(
    net: State, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = trials.Trials.timed_again
    slow: list[str] = []

    def slower(self: trials.Trials, trial: trials.Trial) -> trials.Trial:
        found = again(self, trial)
        assert found.latency is not None
        if not slow:
            slow.append(trial.name)
            return dataclasses.replace(found, latency={**found.latency, "ratio": [0.01, 0.01, 0.01]})
        return found

    monkeypatch.setattr(trials.Trials, "timed_again", slower)
    _, facts = compress(net, task, "drop<=3,latency<=1000%", tmp_path / "a", epochs=0)
    assert [item["name"] for item in facts["search"]["beyond"]] == slow
    assert facts["search"]["best"] not in slow
    assert 1 / facts["latency"]["ratio"][0] <= 10


@pytest.mark.wide
def test_the_recipe_on_the_data_of_the_search_gives_the_same_model(
    net: State, task: Task, tmp_path: Path
) -> None:
    """Of a task with training data alone: some of them decide, some calibrate."""
    own = Task("digits", evaluate=[whole(task, "evaluate")], train=task.train)
    result, facts = compress(net, own, "drop<=6", tmp_path, epochs=2)
    assert any("distill" in row["recipe"] for row in facts["search"]["trials"])
    same = run(
        net, recipe_from_words(facts["search"]["recipe"].split()), search_task(net.plain(), own, "drop<=6")
    )
    assert {n: f.digest for n, f in same.forms.items()} == {n: f.digest for n, f in result.forms.items()}


@pytest.mark.wide
def test_one_half_of_the_evaluation_set_decides_and_the_other_judges(
    net: State, task: Task, tmp_path: Path
) -> None:
    own = Task("digits", evaluate=task.evaluate, train=task.train)
    result, facts = compress(net, own, "drop<=4", tmp_path, epochs=5, lr=0.01)
    search, judged = facts["search"], facts["accuracy"]
    assert "evaluation" in search["decided_by"]
    rest, held = (Task(evaluate=half) for half in hold_out(own, "evaluate") or ())
    assert search["decided_by"].split()[0] == str(len(held.scores(net.model())))
    for part, drop in ((held, search["drop"]), (rest, judged["drop"])):
        scores = [part.scores(state.model()).float() for state in (net, result)]
        assert 100 * (scores[0].mean() - scores[1].mean()) == pytest.approx(drop[0], abs=1e-4)


@pytest.mark.wide
@pytest.mark.usefixtures("fewer")
def test_a_step_that_removes_nothing_is_no_trial_and_nothing_is_trained_for_it(
    task: Task, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # no hidden units, no branches
    plain = run(plain, Finetune(epochs=5, lr=0.01), task)
    told = Told()
    _, facts = compress(plain, task, "drop<=5,latency<=1000%", tmp_path, epochs=1, observer=told)
    assert {row["name"].split()[0] for row in facts["search"]["trials"]} <= {"int8,", "8", "3", "factorize"}
    assert "slim 0.5: there is nothing to remove" in told.messages
    assert "shorten 0.5: there is nothing to remove" in told.messages
    assert told.steps
    assert not any("slim" in step and "distill" in step for step in told.steps)


def test_outputs_without_a_soft_loss_are_trained_by_the_tasks_own(
    net: State, task: Task, tmp_path: Path
) -> None:
    def wanted(x: torch.Tensor) -> torch.Tensor:
        return x[:, :10]  # numbers, of which the kind is unknown

    own = Task(
        "numbers",
        evaluate=[(x, wanted(x.flatten(1))) for x, _ in task.batches("evaluate")],
        train=[(x, wanted(x.flatten(1))) for x, _ in task.batches("train")],
        metric=lambda output, target: -((output - target) ** 2).mean(1),
        loss=lambda output, target: ((output - target) ** 2).mean(),
    )
    told = Told()
    _, facts = compress(net, own, "size<=20%", tmp_path, epochs=1, observer=told)
    assert any("without the given model" in text for text in told.messages)
    rows = facts["search"]["trials"]
    assert any("penalize" in row["recipe"] and "teacher_weight=0" in row["recipe"] for row in rows)
    assert not any(row["why"] for row in rows)


def test_only_what_a_search_wrote_is_removed(net: State, task: Task, tmp_path: Path) -> None:
    mine = tmp_path / "trials" / "mine.csv"
    mine.parent.mkdir()
    mine.write_text("x")
    compress(net, task, "size<=50%", tmp_path, epochs=0)
    assert [path.name for path in mine.parent.iterdir()] == ["mine.csv"]


def test_a_refusal_before_any_trial_is_no_search(net: State, task: Task, tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "lock").write_text("")
    _, facts = compress(net, task, "size<=50%", tmp_path, epochs=0)
    assert facts["search"]["best"]
    assert not (tmp_path / "trials").exists()


@pytest.mark.sampled(text='{"of":')
@pytest.mark.parametrize("text", ["", '{"of":', "{}", "[]", "null", '{"of": 1, "facts": {}}'])
def test_a_damaged_measurement_is_made_again(net: State, task: Task, tmp_path: Path, text: str) -> None:
    with pytest.raises(BudgetError):
        compress(net, task, "size<=0.01%", tmp_path, epochs=0)
    before = {path: path.read_text() for path in (tmp_path / "trials").rglob("trial.json")}
    for path in before:
        path.write_text(text)
    with pytest.raises(BudgetError):
        compress(net, task, "size<=0.01%", tmp_path, epochs=0, resume=True)
    for path, old in before.items():
        new = json.loads(path.read_text())
        assert new["of"] == json.loads(old)["of"]
        assert new["facts"]["drop"] == json.loads(old)["facts"]["drop"]


def test_a_measurement_with_another_number_in_it_is_made_again(
    net: State, task: Task, tmp_path: Path
) -> None:
    """The smallest file would else be the one whose number of bytes was changed."""
    with pytest.raises(BudgetError):
        compress(net, task, "size<=0.01%", tmp_path, epochs=0)
    path = min((tmp_path / "trials").rglob("trial.json"))
    kept = json.loads(path.read_text())
    kept["facts"]["nbytes"] = 5
    path.write_text(json.dumps(kept))
    with pytest.raises(BudgetError):
        compress(net, task, "size<=0.01%", tmp_path, epochs=0, resume=True)
    assert json.loads(path.read_text())["facts"]["nbytes"] == (path.parent / "model.tersor").stat().st_size


def test_a_measurement_on_other_samples_of_the_same_number_is_made_again(
    net: State, task: Task, tmp_path: Path
) -> None:
    x, y = whole(task, "train")

    def decided(amount: float, *, resume: bool) -> float:
        """The drop in 2 bits, on noisy samples of which the fingerprint says nothing."""
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        some = list(zip((x + amount * noise).split(100), y.split(100), strict=True))
        own = Task("digits", evaluate=task.evaluate, calibrate=some, fingerprint="digits")
        with pytest.raises(BudgetError):
            compress(net, own, "size<=0.01%", tmp_path, epochs=0, resume=resume)
        (path,) = (tmp_path / "trials").glob("2-bits-*/trial.json")
        drop: float = json.loads(path.read_text())["facts"]["drop"][0]
        wanted = Task(evaluate=some[1::2])
        scores = [
            wanted.scores(s.model()).mean()
            for s in (net, load(path.with_name("model.tersor")).on(net.plain()))
        ]
        assert drop == pytest.approx(100 * float(scores[0] - scores[1]), abs=1e-3)
        return drop

    assert decided(0.3, resume=False) != decided(0.8, resume=True)


@pytest.mark.wide
def test_a_resumed_search_takes_other_settings_of_training(net: State, task: Task, tmp_path: Path) -> None:
    fresh: dict[str, Any] = {"epochs": 3, "lr": 0.005, "seed": 1}
    want, facts = compress(net, task, "drop<=3", tmp_path / "whole", **fresh)
    second = facts["search"]["trials"][-1]["name"]
    with pytest.raises(KeyboardInterrupt):
        compress(net, task, "drop<=3", tmp_path / "out", epochs=2, lr=0.01, observer=Told(second))
    got, found = compress(net, task, "drop<=3", tmp_path / "out", **fresh, resume=True)
    assert got.digest == want.digest
    rows = [[(r["name"], r["drop"], r["nbytes"]) for r in f["search"]["trials"]] for f in (facts, found)]
    assert rows[0] == rows[1]


def test_what_is_rounded_is_not_done_again_where_training_takes_longer(
    net: State, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError):
        compress(net, task, "drop<=3,size<=0.01%", tmp_path, epochs=1)
    paths = [*(tmp_path / "trials").glob("[238]-bits-*/journal/*.group")]
    kept = {path: path.stat().st_mtime_ns for path in paths if "trained" not in str(path)}
    assert kept
    with pytest.raises(BudgetError):
        compress(net, task, "drop<=3,size<=0.01%", tmp_path, epochs=2, resume=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_search_that_runs_now_is_to_be_waited_for_and_not_removed(
    net: State, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError):
        compress(net, task, "size<=0.01%", tmp_path, epochs=0)
    with (
        claim(tmp_path / "trials" / LOCKED),
        pytest.raises(JournalError, match="another run is writing here; wait for it"),
    ):
        compress(net, task, "size<=0.01%", tmp_path, epochs=0)


def test_a_training_that_is_too_short_for_its_size_is_said(
    net: State, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TRAINED", (1.0, 0.5, 0.05))
    told = Told()
    _, facts = compress(net, task, "drop<=5", tmp_path, epochs=0.5, observer=told)
    short = [row for row in facts["search"]["trials"] if row.get("short")]
    assert short
    for row in short:
        arrays = 8 * (row["nbytes"] - 4000) / 5930  # 64 * 48 + 48 * 48 + 48 * 10 weights, and biases
        assert row["short"] > max(1.25 * float(row["name"].split()[-3]), arrays)
    assert any("its training was too short: it reached" in text for text in told.messages)
    printed = [text for text in search_table.tables(facts) if isinstance(text, str)]
    assert any(text.startswith("trained too short") and "--epochs" in text for text in printed)


@pytest.mark.wide
def test_training_data_without_a_length_train_nothing_and_that_is_said(
    net: State, task: Task, tmp_path: Path
) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            x, y = whole(task, "train")
            yield from zip(x, y, strict=True)

    told = Told()
    own = Task("stream", evaluate=[whole(task, "evaluate")], train=DataLoader(Stream(), batch_size=32))
    _, facts = compress(net, own, "drop<=9", tmp_path, observer=told)
    assert "cannot be parted" in told.messages[0]
    assert facts["search"]["best"]


class Recorded:
    """Workers that run nothing, and keep what was asked of them."""

    def __init__(self, count: int, **given: Any) -> None:
        self.calls = [f"{count} workers"]
        made.append(self)

    def ask(self, chains: list[list[trials.Trial]]) -> None:
        self.calls.append("ask")

    def take(self, trial: trials.Trial) -> None:
        self.calls.append(f"take {trial.name}")

    def settle(self) -> None:
        self.calls.append("settle")

    def close(self) -> None:
        self.calls.append("close")


made: list[Recorded] = []


@pytest.mark.wide
@pytest.mark.usefixtures("fewer")
def test_nothing_runs_ahead_while_a_trial_is_timed(
    net: State, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trials.timed

    def timed(before: Any, after: Any, *args: Any, **words: Any) -> Any:
        if "close" not in made[-1].calls:
            assert made[-1].calls[-1] == "settle"
        return real(before, after, *args, **words)

    monkeypatch.setattr(trials, "timed", timed)
    monkeypatch.setattr(module, "RayWorkers", Recorded)
    _, facts = compress(net, task, "drop<=3,latency<=1000%", tmp_path, epochs=0, workers=3)
    calls = made[-1].calls
    assert calls[0] == "3 workers"
    assert calls.index("ask") < calls.index("close") == len(calls) - 1
    done = [row["name"] for row in facts["search"]["trials"] if not row["why"]]
    assert {f"take {name}" for name in done} <= {*calls}
