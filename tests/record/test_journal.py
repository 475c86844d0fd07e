"""Journal: an interrupted run resumes to the same ledger and the same bits, or is refused."""

import hashlib
import json
import operator
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import forks
import killed
import pytest
import safetensors.torch
import torch
from tiny import Tiny, tiny

from tersor.core.history import replay, undo
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import JournalError, StorageError
from tersor.files import claim
from tersor.forms import Dense, Sum
from tersor.model.sites import Site
from tersor.model.training_loop import TrainingPlan
from tersor.record.events import Edit, Group, Note, site_group
from tersor.record.journal import lines_of
from tersor.record.observer import Observer
from tersor.steps import STEPS, Cluster, Entropy, Factorize, Finetune, Measure, Prune, Quantize

RECIPE = Recipe(
    (
        Factorize(keep=0.4), Prune(keep=0.6, per="global"), Finetune(epochs=2, lr=0.01), Cluster(entries=5),
        Measure(), Entropy(coder="huffman"),
    ),
    seed=3,
)  # fmt: skip


def lines(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.group"))


def same(a: State, b: State) -> None:
    assert {n: f.digest for n, f in a.forms.items()} == {n: f.digest for n, f in b.forms.items()}
    assert a.ledger.digest == b.ledger.digest
    assert a.digest == b.digest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, State, Path]:
    t, folder = tiny("conv"), tmp_path_factory.mktemp("journal") / "run"
    return t, run(t.model, RECIPE, t.task, journal=folder), folder


def test_a_journal_changes_nothing(whole: tuple[Tiny, State, Path]) -> None:
    t, result, _ = whole
    same(run(t.model, RECIPE, t.task), result)


def test_every_group_is_one_file(whole: tuple[Tiny, State, Path]) -> None:
    _, result, folder = whole
    found = lines_of(folder)
    assert sum(len(line.events) for line in found) == len(result.ledger.entries)
    assert [line.step for line in found if line.seconds is not None] == list(range(len(RECIPE.steps)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["head.json", "lock", *(f"{n:06d}.group" for n in range(1, len(found) + 1))]
    )


@pytest.mark.wide
def test_resumed_after_any_number_of_groups(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, result, folder = whole
    files = lines(folder)
    assert len(files) > 20
    for count in range(len(files) + 1):
        copy = tmp_path / str(count)
        copy.mkdir()
        for path in [folder / "head.json", *files[:count]]:
            shutil.copy(path, copy)
        again = run(t.model, RECIPE, t.task, journal=copy, resume=True)
        same(again, result)
        assert again.ledger.entries[-1].text == result.ledger.entries[-1].text
        assert len(lines(copy)) == len(files), f"cut after {count} of {len(files)} files"


class Stop(Observer):
    """An observer that interrupts after a number of progress reports, like Ctrl-C."""

    def __init__(self, after: int):
        self.left = after

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.wide
def test_interrupted_at_any_report_of_progress(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, result, _ = whole
    cut = 0
    for after in range(0, 40, 4):
        try:
            run(t.model, RECIPE, t.task, journal=tmp_path / str(after), observer=Stop(after))
        except KeyboardInterrupt:
            cut += 1
        same(run(t.model, RECIPE, t.task, journal=tmp_path / str(after), resume=True), result)
    assert cut > 5


def test_journaled_groups_are_not_done_again(
    whole: tuple[Tiny, State, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, result, folder = whole
    shutil.copytree(folder, tmp_path / "copy")

    def fail(*args: Any) -> None:
        raise AssertionError("a finished step ran again")

    for step in RECIPE.steps:
        monkeypatch.setattr(type(step), "run", fail)
    same(run(t.model, RECIPE, t.task, journal=tmp_path / "copy", resume=True), result)


def test_sites_in_the_journal_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t, recipe, done = tiny("mlp"), Recipe((Quantize(),)), []
    result = run(t.model, recipe, journal=tmp_path)
    for path in lines(tmp_path)[2:]:
        path.unlink()
    edit = Quantize.edit

    def counted(self: Quantize, view: View, site: Site) -> Edit:
        done.append(site.name)
        return edit(self, view, site)

    monkeypatch.setattr(Quantize, "edit", counted)
    same(run(t.model, recipe, journal=tmp_path, resume=True), result)
    assert done == ["layers.4.weight", "layers.6.weight"]


def test_resume_in_an_empty_folder_starts(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, result, _ = whole
    same(run(t.model, RECIPE, t.task, journal=tmp_path / "new", resume=True), result)
    assert (tmp_path / "new" / "head.json").exists()


# --- refused ---


def test_an_existing_journal_is_not_overwritten(whole: tuple[Tiny, State, Path]) -> None:
    t, _, folder = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "lock" in before
    with pytest.raises(JournalError, match=r"holds the journal of an earlier run.*resume=True"):
        run(t.model, RECIPE, t.task, journal=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_journal_without_its_head_is_not_said_to_be_resumable(
    whole: tuple[Tiny, State, Path], tmp_path: Path
) -> None:
    t, _, first = whole
    folder = Path(shutil.copytree(first, tmp_path / "copy"))
    (folder / "head.json").unlink()
    with pytest.raises(JournalError, match=r"head\.json is missing\. Remove .* to start again") as caught:
        run(t.model, RECIPE, t.task, journal=folder, resume=True)
    assert str(folder) in str(caught.value).split("Remove")[1]
    assert "--resume" not in str(caught.value)


def other_data(t: Tiny) -> Tiny:
    batches: Any = [(x.clone(), y) for x, y in t.task.batches("calibrate")]
    batches[0][0][0, 0, 0, 0] += 1
    return replace(t, task=replace(t.task, calibrate=batches))


def other_model(t: Tiny) -> Tiny:
    model = tiny("conv").model
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    return replace(t, model=model)


# what changed -> (task and model, recipe)
CHANGED: dict[str, tuple[Any, Recipe]] = {
    "the model changed": (other_model, RECIPE),
    "the data changed": (other_data, RECIPE),
    "the data changed ": (lambda t: replace(t, task=None), RECIPE),
    "the recipe changed": (lambda t: t, replace(RECIPE, seed=4)),
    "the recipe changed ": (lambda t: t, replace(RECIPE, steps=RECIPE.steps[:-1])),
    "the recipe changed  ": (lambda t: t, replace(RECIPE, steps=(Factorize(keep=0.5), *RECIPE.steps[1:]))),
}


@pytest.mark.parametrize("what", CHANGED)
def test_another_run_is_refused_with_the_name_of_the_change(
    what: str, whole: tuple[Tiny, State, Path]
) -> None:
    t, _, folder = whole
    change, recipe = CHANGED[what]
    other = change(t)
    with pytest.raises(JournalError, match=rf"--resume: {what.strip()} since the run in .* began"):
        run(other.model, recipe, other.task, journal=folder, resume=True)


def damaged(folder: Path, copy: Path, name: str, content: bytes) -> Path:
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)
    return copy


HEADS = {"cut off": b'{"tersor journal": 1, "mo', "no object": b"[1]", "no text": b"\xff\xfe", "empty": b""}


@pytest.mark.parametrize("what", HEADS)
def test_a_damaged_head_is_refused(what: str, whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, _, folder = whole
    copy = damaged(folder, tmp_path / "copy", "head.json", HEADS[what])
    with pytest.raises(JournalError, match=r"head\.json is damaged"):
        run(t.model, RECIPE, t.task, journal=copy, resume=True)


def test_a_newer_journal_is_refused(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, _, folder = whole
    head = json.loads((folder / "head.json").read_text()) | {"tersor journal": 3}
    copy = damaged(folder, tmp_path / "copy", "head.json", json.dumps(head).encode())
    with pytest.raises(JournalError, match="journal format 3, this version reads 2"):
        run(t.model, RECIPE, t.task, journal=copy, resume=True)


def bad_line(folder: Path, **changes: Any) -> bytes:
    """A file with a valid hash and invalid contents."""
    line = {"step": 0, "key": "k", "proof": "", "seconds": None, "events": []} | changes
    line = {key: value for key, value in line.items() if value != "missing"}
    return behind_head(folder, safetensors.torch.save({"0": torch.ones(2)}, {"journal": json.dumps(line)}))


def behind_head(folder: Path, data: bytes) -> bytes:
    head = hashlib.sha256((folder / "head.json").read_bytes()).digest()
    return hashlib.sha256(head + data).digest() + data


TREE = {"form": "masked", "keep": {"form": "dense"}, "body": {"form": "dense"}}
LINES: dict[str, Any] = {
    "empty": lambda folder: b"",
    "no safetensors": lambda folder: b"x" * 100,
    "no safetensors behind a hash": lambda folder: behind_head(folder, b"x" * 100),
    "no line": lambda folder: behind_head(folder, safetensors.torch.save({"0": torch.ones(2)})),
    "no JSON": lambda folder: behind_head(folder, safetensors.torch.save({}, {"journal": "{"})),
    "an unknown form": lambda folder: bad_line(folder, events=[edit_line({"form": "x"})]),
    "a missing array": lambda folder: bad_line(folder, events=[edit_line(TREE)]),
    "an unknown event": lambda folder: bad_line(folder, events=[{"jump": {}}]),
    "no events": lambda folder: bad_line(folder, events="missing"),
    "no object": lambda folder: behind_head(folder, safetensors.torch.save({}, {"journal": "[0]"})),
}


def edit_line(tree: Any) -> Any:
    return {"edit": {"site": "stem.weight", "how": "refine", "tree": tree}}


@pytest.mark.parametrize("what", LINES)
def test_a_damaged_file_is_refused(what: str, whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, _, folder = whole
    copy = damaged(folder, tmp_path / "copy", "000001.group", LINES[what](folder))
    with pytest.raises(JournalError, match=r"damaged"):
        run(t.model, RECIPE, t.task, journal=copy, resume=True)


def test_a_missing_file_is_refused(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, _, folder = whole
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "000002.group").unlink()
    with pytest.raises(JournalError, match=r"000002\.group is missing"):
        run(t.model, RECIPE, t.task, journal=tmp_path / "copy", resume=True)


def test_any_changed_bit_is_detected(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    """One bit of each file, a different one in each: in the hash, the names, the numbers, the tensors."""
    t, _, folder = whole
    for number, path in enumerate([folder / "head.json", *lines(folder)]):
        raw = bytearray(path.read_bytes())
        at = (number * 7919 + len(raw) // 2) % len(raw)
        raw[at] ^= 1 << number % 8
        copy = damaged(folder, tmp_path / path.name, path.name, bytes(raw))
        with pytest.raises(JournalError, match="damaged|changed since|journal format"):
            run(t.model, RECIPE, t.task, journal=copy, resume=True)


def test_files_in_another_order_are_refused(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, _, folder = whole
    shutil.copytree(folder, tmp_path / "copy")
    first, second = (tmp_path / "copy" / f"00000{n}.group" for n in (2, 3))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(JournalError, match=r"000002\.group is damaged"):
        run(t.model, RECIPE, t.task, journal=tmp_path / "copy", resume=True)


def test_a_folder_where_another_run_writes_is_refused(whole: tuple[Tiny, State, Path]) -> None:
    t, _, folder = whole
    with claim(folder / "lock"), pytest.raises(JournalError, match="another run is writing here"):
        run(t.model, RECIPE, t.task, journal=folder, resume=True)


def other_code(t: Tiny) -> Tiny:
    def feed(model: Any, batch: Any) -> torch.Tensor:
        return model(batch[0]) * 1.0

    return replace(t, task=replace(t.task, feed=feed))


def test_other_code_is_refused_and_unseen_code_is_named(tmp_path: Path) -> None:
    t, said = tiny("mlp"), []

    class Hears(Observer):
        def message(self, text: str) -> None:
            said.append(text)

    run(t.model, [Quantize()], t.task, journal=tmp_path / "a", observer=Hears())
    with pytest.raises(JournalError, match="the code changed"):
        run(t.model, [Quantize()], other_code(t).task, journal=tmp_path / "a", resume=True)
    assert not said
    builtin = replace(t.task, target=operator.itemgetter(1))
    run(t.model, [Quantize()], builtin, journal=tmp_path / "b", observer=Hears())
    assert said == ["journal: a change of this code would not be noticed: task: target"]


def test_the_same_weights_with_another_past_are_refused(tmp_path: Path) -> None:
    model = tiny("mlp").model
    once = run(model, Measure())
    twice = run(once, Measure())
    assert once.digest == twice.digest
    run(once, [Quantize()], journal=tmp_path)
    with pytest.raises(JournalError, match="the model changed"):
        run(twice, [Quantize()], journal=tmp_path, resume=True)


def test_another_number_of_threads_is_refused_where_sums_would_differ(tmp_path: Path) -> None:
    t, before = tiny("mlp"), torch.get_num_threads()
    run(t.model, [Quantize()], t.task, journal=tmp_path / "task")
    run(t.model, [Quantize()], journal=tmp_path / "alone")
    try:
        torch.set_num_threads(before + 1)
        run(t.model, [Quantize()], journal=tmp_path / "alone", resume=True)
        with pytest.raises(JournalError, match="the number of threads changed"):
            run(t.model, [Quantize()], t.task, journal=tmp_path / "task", resume=True)
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class TwoOfAll:
    """Two groups without a site."""

    name: ClassVar[str] = "two"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.WHOLE

    def run(self, view: View) -> Iterator[Group]:
        yield Group("first", [Note("", "one", "1")])
        yield Group("second", [Note("", "two", "2")])


def test_groups_without_a_site_are_all_resumed(tmp_path: Path) -> None:
    model, recipe = tiny("mlp").model, Recipe((TwoOfAll(),))
    result = run(model, recipe, journal=tmp_path)
    for path in lines(tmp_path)[1:]:
        path.unlink()
    again = run(model, recipe, journal=tmp_path, resume=True)
    assert [entry.kind for entry in again.ledger.entries] == ["one", "two"]
    same(again, result)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        run(tiny("mlp").model, [Prune()], journal=tmp_path / "file" / "run")


@dataclass(frozen=True)
class Halves:
    """A step whose form holds the same tensor twice."""

    name: ClassVar[str] = "halves"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.NOTHING

    def run(self, view: View) -> Iterator[Group]:
        for site in view.each():
            half = Dense(view.form(site).decode() / 2)
            note = Note(site.name, "done", "twice a half", {"parts": [0.5, 0.5], "why": None})
            yield site_group(site.name, Edit(site.name, view.form(site), Sum(half, half), "refine"), note)


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    model, recipe = tiny("mlp").model, Recipe((Halves(), Entropy(coder="huffman")))
    result = run(model, recipe, journal=tmp_path)
    for path in lines(tmp_path)[2:]:
        path.unlink()
    same(run(model, recipe, journal=tmp_path, resume=True), result)


# --- killed during a training step ---


@pytest.fixture(scope="module")
def unkilled() -> tuple[Tiny, State]:
    t = killed.dying(tiny("conv"), at=-1)
    return t, run(t.model, killed.RECIPE, t.task)


# In the first training before and after its first checkpoint and in its last step; in the second training.
@pytest.mark.sampled(at=5)
@pytest.mark.parametrize("at", [2, 5, 8, 14])
def test_killed_in_training(at: int, unkilled: tuple[Tiny, State], tmp_path: Path) -> None:
    """kill -9 after an epoch's checkpoint. The resumed run trains only the unfinished epochs, and ends with
    the bits of an uninterrupted run: weights, masks, running statistics, optimizer, random state."""
    folder = tmp_path / "run"
    done = forks.run([killed.__file__, folder, at, torch.get_num_threads()])
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = [path.name for path in folder.glob("training-*")]
    finished = (at - 1) // killed.BATCHES  # epochs in both trainings
    in_second = finished >= killed.EPOCHS
    assert checkpoints == ([f"training-{1 + in_second}-1.group"] if finished % killed.EPOCHS else [])
    _, whole = unkilled
    t = killed.dying(tiny("conv"), at=-1)
    resumed = run(t.model, killed.RECIPE, t.task, journal=folder, resume=True)
    same(resumed, whole)
    looks = 3 - in_second  # one call checks the task, one precedes each training
    assert t.task.feed.seen == looks + 2 * killed.EPOCHS * killed.BATCHES - finished * killed.BATCHES
    assert not list(folder.glob("training-*"))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_a_step_that_trains_twice_has_two_checkpoints(tmp_path: Path) -> None:
    """The second training has other batches and its own checkpoint; interrupted there, it resumes there."""
    t, recipe = tiny("conv"), Recipe((Prune(keep=0.4, epochs=2, rounds=2, lr=0.01),))
    drawn: list[float] = []

    def feed(model: Any, batch: Any) -> torch.Tensor:
        if model.training:
            drawn.append(float(batch[0].sum()))
            if len(drawn) == stop:
                raise KeyboardInterrupt
        return model(batch[0])

    task, stop = replace(t.task, feed=feed), -1
    whole = run(t.model, recipe, task)
    first, second = drawn[2:6], drawn[7:]  # one call checks the task, one precedes each training
    assert len(second) == 4
    assert first != second
    same(run(t.model, recipe, task, journal=tmp_path / "whole"), whole)
    for stop in (6, 11):
        folder = tmp_path / str(stop)
        drawn.clear()
        with pytest.raises(KeyboardInterrupt):
            run(t.model, recipe, task, journal=folder)
        same(run(t.model, recipe, task, journal=folder, resume=True), whole)


def test_a_loader_with_a_generator_of_its_own_resumes_too(tmp_path: Path) -> None:
    """The order of batches depends on the loader's generator, whose state is part of the checkpoint."""
    t = tiny("mlp")
    data = torch.utils.data.TensorDataset(*next(iter(t.task.batches("evaluate"))))

    def task() -> Any:
        loader = torch.utils.data.DataLoader(
            data, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(1)
        )
        return replace(t.task, train=loader)

    recipe = Recipe((Finetune(epochs=4, lr=0.01),))
    want = run(t.model, recipe, task())
    steps = 0

    def feed(model: Any, batch: Any) -> torch.Tensor:
        nonlocal steps
        steps += model.training
        if model.training and steps == 10:
            raise KeyboardInterrupt
        return model(batch[0])

    with pytest.raises(KeyboardInterrupt):
        run(t.model, recipe, replace(task(), feed=feed), journal=tmp_path)
    same(run(t.model, recipe, replace(task(), feed=feed), journal=tmp_path, resume=True), want)
    same(run(t.model, recipe, task()), want)


@pytest.mark.parametrize("word", STEPS)
def test_every_step_can_be_journaled(word: str, tmp_path: Path) -> None:
    t = tiny("mlp")
    settings = {"unmet": "nearest"} if word == "shorten" else {}  # there are no branches
    recipe = Recipe((STEPS[word](**settings),))
    result = run(t.model, recipe, t.task, journal=tmp_path / "journal", out=tmp_path)
    same(run(t.model, recipe, t.task, journal=tmp_path / "journal", resume=True, out=tmp_path), result)


# --- journals and trials of another run ---


def test_replay_and_undo_refuse_the_journal_of_another_run(tmp_path: Path) -> None:
    """The same model and recipe with another seed: all its groups would fit."""
    t, recipe = tiny("mlp"), [Finetune(epochs=1, lr=0.01), Prune(keep=0.5), Entropy()]
    results = [run(t.model, recipe, t.task, seed=seed, journal=tmp_path / f"{seed}") for seed in (1, 2)]
    assert results[0].digest != results[1].digest
    for one, other in ((0, 1), (1, 0)):
        assert replay(t.model, results[one].ledger, tmp_path / f"{one + 1}").digest == results[one].digest
        with pytest.raises(JournalError, match="another run"):
            replay(t.model, results[one].ledger, tmp_path / f"{other + 1}")
        with pytest.raises(JournalError, match="another run"):
            undo(results[one], 1, journal=tmp_path / f"{other + 1}")


@dataclass(frozen=True)
class TrainsAndTells:
    """A step that yields a group after each of two trainings, and runs a trial recipe between them."""

    name: ClassVar[str] = "trains and tells"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.TASK

    def run(self, view: View) -> Iterator[Group]:
        for part in ("first", "second"):
            if part in view.done:
                continue
            plan = TrainingPlan(epochs=1, lr=0.01)
            moved, _ = view.train(plan, key=part)
            facts, _ = view.trial([Prune(keep=0.5)], key=part)
            note = Note("", "tried", f"{facts['nbytes']} bytes")
            mine = [name for name in moved if name.startswith("layers.0" if part == "first" else "layers.2")]
            yield Group(part, (*view.edits({name: moved[name] for name in mine}, "absorb"), note))


class Dies(Observer):
    """An observer that raises after a number of groups."""

    def __init__(self, after: int):
        self.left = after

    def applied(self, group: Group) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_step_that_yields_between_trainings_resumes(after: int, tmp_path: Path) -> None:
    t, recipe = tiny("mlp"), [TrainsAndTells(), Entropy()]
    whole = run(t.model, recipe, t.task, journal=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(t.model, recipe, t.task, journal=tmp_path / "j", observer=Dies(after))
    same(run(t.model, recipe, t.task, journal=tmp_path / "j", resume=True), whole)
    assert not list((tmp_path / "j").glob("trial-*"))


def test_trials_of_another_run_are_not_used(tmp_path: Path) -> None:
    """Folders of trials from an earlier run are not used by a new run."""
    t = tiny("mlp")
    with pytest.raises(KeyboardInterrupt):
        run(t.model, [TrainsAndTells()], t.task, journal=tmp_path / "j", observer=Dies(0))
    assert list((tmp_path / "j").glob("trial-*"))
    (tmp_path / "j" / "head.json").unlink()
    with pytest.raises(JournalError):
        run(t.model, [TrainsAndTells()], t.task, journal=tmp_path / "j")
