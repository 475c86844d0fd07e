"""The journal: a run cut off anywhere goes on to the same ledger and the same bits, or is refused."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import killed
import pytest
import safetensors.torch
import torch
from tiny import Tiny, tiny

from tersor.core.events import Edit, Group, Note
from tersor.core.observer import Observer
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State
from tersor.core.view import View
from tersor.errors import JournalError, StorageError
from tersor.forms import Dense, Sum
from tersor.model.sites import Site
from tersor.steps import STEPS, Cluster, Entropy, Factorize, Finetune, Measure, Prune, Quantize

RECIPE = Recipe(
    (
        Factorize(keep=0.4), Prune(keep=0.6, per="global"), Finetune(epochs=2, lr=0.01), Cluster(entries=5),
        Measure(), Entropy(coder="huffman"),
    ),
    seed=3,
)  # fmt: skip


def lines(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"))


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
    facts = []
    for path in lines(folder):
        with safetensors.safe_open(path, "pt") as file:
            facts.append(json.loads(file.metadata()["journal"]))
    assert sum(len(fact["events"]) for fact in facts) == len(result.ledger.entries)
    assert [fact["step"] for fact in facts if fact["end"]] == list(range(len(RECIPE.steps)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["head.json", *(f"{n:06d}.safetensors" for n in range(1, len(facts) + 1))]
    )


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
    """Progress that is cut off after so many reports, as by Ctrl-C."""

    def __init__(self, after: int):
        self.left = after

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_interrupted_at_any_report_of_progress(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, result, _ = whole
    cut = 0
    for after in range(0, 40, 4):
        try:
            run(t.model, RECIPE, t.task, journal=tmp_path / str(after), watch=Stop(after))
        except KeyboardInterrupt:
            cut += 1
        same(run(t.model, RECIPE, t.task, journal=tmp_path / str(after), resume=True), result)
    assert cut > 5


def test_what_is_in_the_journal_is_not_done_again(
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


def test_resume_with_nothing_there_begins(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, result, _ = whole
    same(run(t.model, RECIPE, t.task, journal=tmp_path / "new", resume=True), result)
    assert (tmp_path / "new" / "head.json").exists()


# --- refused ---


def test_a_journal_in_the_way_is_not_overwritten(whole: tuple[Tiny, State, Path]) -> None:
    t, _, folder = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(JournalError, match=r"holds the journal of an earlier run.*resume=True"):
        run(t.model, RECIPE, t.task, journal=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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
def test_another_run_is_refused_by_what_changed(what: str, whole: tuple[Tiny, State, Path]) -> None:
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
    head = json.loads((folder / "head.json").read_text()) | {"tersor journal": 2}
    copy = damaged(folder, tmp_path / "copy", "head.json", json.dumps(head).encode())
    with pytest.raises(JournalError, match="journal format 2, this version reads 1"):
        run(t.model, RECIPE, t.task, journal=copy, resume=True)


def bad_line(**changes: Any) -> bytes:
    line = {"step": 0, "end": False, "events": []} | changes
    return safetensors.torch.save({"0": torch.ones(2)}, {"journal": json.dumps(line)})


TREE = {"form": "masked", "keep": {"form": "dense"}, "body": {"form": "dense"}}
LINES = {
    "empty": b"",
    "no safetensors": b"x" * 100,
    "no line": safetensors.torch.save({"0": torch.ones(2)}),
    "no JSON": safetensors.torch.save({"0": torch.ones(2)}, {"journal": "{"}),
    "an unknown form": bad_line(events=[{"site": "stem.weight", "how": "refine", "tree": {"form": "x"}}]),
    "a missing array": bad_line(events=[{"site": "stem.weight", "how": "refine", "tree": TREE}]),
    "no events": safetensors.torch.save({}, {"journal": '{"step": 0, "end": true}'}),
    "no object": safetensors.torch.save({}, {"journal": "[0]"}),
}  # fmt: skip


@pytest.mark.parametrize("what", LINES)
def test_a_damaged_file_is_refused(what: str, whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, _, folder = whole
    copy = damaged(folder, tmp_path / "copy", "000001.safetensors", LINES[what])
    with pytest.raises(JournalError, match=r"damaged"):
        run(t.model, RECIPE, t.task, journal=copy, resume=True)


def test_a_lost_file_is_refused(whole: tuple[Tiny, State, Path], tmp_path: Path) -> None:
    t, _, folder = whole
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "000002.safetensors").unlink()
    with pytest.raises(JournalError, match=r"000002\.safetensors is missing"):
        run(t.model, RECIPE, t.task, journal=tmp_path / "copy", resume=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        run(tiny("mlp").model, [Prune()], journal=tmp_path / "file" / "run")


@dataclass(frozen=True)
class Halves:
    """A step whose form holds one tensor twice."""

    name: ClassVar[str] = "halves"

    def run(self, view: View) -> Iterator[Group]:
        for site in view.each():
            half = Dense(view.form(site).decode() / 2)
            note = Note(site.name, "done", "twice a half", {"parts": [0.5, 0.5], "why": None})
            yield (Edit(site.name, view.form(site), Sum(half, half), "refine"), note)


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    model, recipe = tiny("mlp").model, Recipe((Halves(), Entropy(coder="huffman")))
    result = run(model, recipe, journal=tmp_path)
    for path in lines(tmp_path)[2:]:
        path.unlink()
    same(run(model, recipe, journal=tmp_path, resume=True), result)


# --- killed in the middle of a training step ---


@pytest.fixture(scope="module")
def unkilled() -> tuple[Tiny, State]:
    t = killed.dying(tiny("conv"), at=-1)
    return t, run(t.model, killed.RECIPE, t.task)


# In the first training before and after its first checkpoint, in its last step, in the second training.
@pytest.mark.parametrize("at", [2, 5, 8, 14])
def test_killed_in_training(at: int, unkilled: tuple[Tiny, State], tmp_path: Path) -> None:
    """kill -9 after an epoch's checkpoint; the resumed run trains only what was not finished, and ends with
    the bits of the run that was never cut: weights, masks, running statistics, optimizer, random state."""
    folder = tmp_path / "run"
    command = [sys.executable, killed.__file__, str(folder), str(at), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = [path.name for path in folder.glob("training-*")]
    finished = (at - 1) // killed.BATCHES  # epochs in both trainings
    in_second = finished >= killed.EPOCHS
    assert checkpoints == ([f"training-{1 + in_second}-1.safetensors"] if finished % killed.EPOCHS else [])
    t, whole = unkilled
    steps = 0

    def feed(model: Any, batch: Any) -> torch.Tensor:
        nonlocal steps
        steps += model.training
        return killed.noisy(model, batch)

    resumed = run(t.model, killed.RECIPE, replace(t.task, feed=feed), journal=folder, resume=True)
    same(resumed, whole)
    assert steps == 2 * killed.EPOCHS * killed.BATCHES - finished * killed.BATCHES
    assert not list(folder.glob("training-*"))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_a_loader_with_a_generator_of_its_own_resumes_too(tmp_path: Path) -> None:
    """The order of its batches follows from its generator, whose state is part of the training."""
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
        if steps == 10:
            raise KeyboardInterrupt
        return model(batch[0])

    with pytest.raises(KeyboardInterrupt):
        run(t.model, recipe, replace(task(), feed=feed), journal=tmp_path)
    same(run(t.model, recipe, task(), journal=tmp_path, resume=True), want)
    same(run(t.model, recipe, task()), want)


@pytest.mark.parametrize("word", STEPS)
def test_every_step_can_be_journaled(word: str, tmp_path: Path) -> None:
    t = tiny("mlp")
    recipe = Recipe((STEPS[word](),))
    result = run(t.model, recipe, t.task, journal=tmp_path / "journal", out=tmp_path)
    same(run(t.model, recipe, t.task, journal=tmp_path / "journal", resume=True, out=tmp_path), result)
