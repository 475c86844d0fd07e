"""Bad input from users: the message names what and where, the exit code is right, and earlier files stay as
they were. Misspelt words and settings are in test_cli_words.py."""

import pickle
import resource
import shutil
from pathlib import Path

import forks
import pytest
import safetensors.torch
import torch
from command_line import Command

from tersor.resolve import resolve_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RUN = "run {model} --task {task} -q --out o prune keep=0.5 entropy"

USERS = """
import torch
from torch import nn
from mine import data, net
import tersor

def sick():
    model = net()
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
        model[2].bias[0] = torch.inf
    return model

def number():
    return 7

def fails():
    return {}["weights"]

def wide():
    return tersor.Task("wide", evaluate=[(torch.randn(4, 9), torch.zeros(4, dtype=torch.int64))])

def many():
    return tersor.Task("many", evaluate=[(torch.randn(4, 6), torch.tensor([0, 1, 2, 8]))])

def nothing():
    return tersor.Task("nothing", evaluate=[])

def uncalibrated():
    return tersor.Task("uncalibrated", evaluate=[data(20)], calibrate=[])

def untrained():
    return tersor.Task("untrained", evaluate=[data(20)])

def spent():
    return tersor.Task("spent", evaluate=(batch for batch in [data(20)]))
"""


@pytest.mark.parametrize(
    ("model", "task", "code", "says"),
    [
        ("theirs.py:sick", "mine.py:task", 1, "0.weight: 1 of 288 values are NaN or infinite"),
        (
            "theirs.py:number",
            "mine.py:task",
            2,
            "theirs.py:number() returned a int, but it has to return a Module",
        ),
        ("theirs.py:fails", "mine.py:task", 2, "failed with KeyError: 'weights' (theirs.py, line"),
        ("theirs.py", "mine.py:task", 2, "is not file.py:name"),
        ("mine.py:net", "theirs.py:number", 2, "returned a int, but it has to return a Task"),
        (
            "mine.py:net",
            "theirs.py:wide",
            1,
            "task 'wide': batches do not fit the model Sequential: a batch is",
        ),
        ("mine.py:net", "theirs.py:many", 1, "task 'many'"),
        ("mine.py:net", "theirs.py:nothing", 1, "task 'nothing': the evaluate set is empty"),
        ("mine.py:net", "theirs.py:spent", 1, "can be iterated only once"),
        ("mine.py:net", "fashion-mnist:nowhere", 1, "nowhere"),
    ],
)
def test_models_and_tasks(tersor: Command, model: str, task: str, code: int, says: str) -> None:
    Path("theirs.py").write_text(USERS)
    Path("o").mkdir()
    Path("o/model.tersor").write_bytes(b"earlier")
    done = tersor(RUN.format(model=model, task=task))
    assert says in done.err
    assert done.code == code
    assert "Traceback" not in done.err
    assert Path("o/model.tersor").read_bytes() == b"earlier"


@pytest.mark.parametrize(
    ("task", "words", "says"),
    [
        ("uncalibrated", "factorize keep=0.4", "the calibrate set is empty"),
        ("untrained", "finetune", "this needs train batches, and the task has none"),
    ],
)
def test_sets_that_a_step_needs(tersor: Command, task: str, words: str, says: str) -> None:
    Path("theirs.py").write_text(USERS)
    done = tersor(f"run mine.py:net --task theirs.py:{task} -q --out o {words}")
    assert done.code == 1
    assert f"task '{task}': {says}" in done.err


REFUSED = sorted(path.name for path in (GOLDEN / "refused").iterdir())


@pytest.mark.sampled
@pytest.mark.parametrize("name", [*REFUSED[::8], "newer.tersor"])
@pytest.mark.parametrize("command", ["show {}", "unpack {} -o out.safetensors", "verify {}"])
def test_files_that_are_refused(tersor: Command, name: str, command: str) -> None:
    shutil.copy(GOLDEN / "refused" / name, name)
    Path("out.safetensors").write_bytes(b"earlier")
    done = tersor(command.format(name))
    assert done.code == 1
    assert name in done.err + done.out
    assert Path("out.safetensors").read_bytes() == b"earlier"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_pickles_are_refused_and_not_run(tersor: Command) -> None:
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"weight": Evil()}, "evil.pth")
    for path in ("evil.pt", "evil.pth"):
        for line in (f"pack {path} -o x.tersor -q", f"run mine.py:net --weights {path} --out o entropy",
                     f"show {path}", f"verify {path}"):  # fmt: skip
            done = tersor(line)
            assert done.code == 1, line
            assert path in done.err + done.out
    assert not Path("executed").exists()
    assert not Path("x.tersor").exists()


def test_nan_weights_are_not_packed(tersor: Command) -> None:
    safetensors.torch.save_file({"w": torch.tensor([1.0, torch.nan])}, "w.safetensors")
    done = tersor("pack w.safetensors -o x.tersor -q")
    assert done.code == 1
    assert "w: 1 of 2 values are NaN or infinite" in done.err


FULL = """
import resource, sys
from tersor.cli import main
sys.argv = ["tersor", *sys.argv[2:]]
import tersor.resolve, tersor.io, tersor.pipeline, tersor.model.builtin_tasks
import tersor.report.file_sizes, tersor.report.table
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()), resource.RLIM_INFINITY))
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("pack w.safetensors -o kept.tersor", "kept.tersor"),
        ("unpack m.tersor -o kept.safetensors", "kept.safetensors"),
        ("run mine.py:net -q --out kept entropy", "kept/model.tersor"),
    ],
)
def test_a_full_disk_leaves_the_earlier_file(tersor: Command, line: str, kept: str) -> None:
    """A system limit on file size gives a program the same error as a full disk."""
    weights = {**resolve_model("mine.py:net").state_dict(), "more": torch.randn(9000)}
    safetensors.torch.save_file(weights, "w.safetensors")
    assert tersor("pack w.safetensors -o m.tersor -q").code == 0
    Path("kept").mkdir()
    Path(kept).write_bytes(b"earlier")
    names = sorted(Path().rglob("*"))
    done = forks.run(["-c", FULL, "", *line.split(), "1000"])
    assert done.returncode == 1, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert Path(kept).read_bytes() == b"earlier"
    left = set(Path().rglob("*")) - set(names)
    assert not [path for path in left if path.suffix in (".part", ".tersor", ".safetensors")]


def test_a_folder_that_cannot_be(tersor: Command) -> None:
    Path("file").write_text("no folder")
    for line in ("run mine.py:net -q --out file/o entropy", "unpack m.tersor -o file/x.safetensors"):
        shutil.copy(GOLDEN / "dense.tersor", "m.tersor")
        done = tersor(line)
        assert done.code == 1
        assert "file/" in done.err
        assert "Traceback" not in done.err
    assert Path("file").read_text() == "no folder"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)  # unchanged here: limits are set in other processes only


def test_files_that_are_not_recipes(tersor: Command) -> None:
    cases = {
        "steps: [": "is not YAML", "[]": "expected a mapping", "tersor: 2\nsteps: [entropy]": "has format 2",
        "steps: [prun]": "did you mean 'prune'?", "steps: [prune: {keep: 3}]": "0 < keep <= 1",
        "steps: []": "no steps",
    }  # fmt: skip
    for text, says in cases.items():
        Path("r.yaml").write_text(text)
        for line in ("check r.yaml", "run mine.py:net --out o --recipe r.yaml"):
            done = tersor(line)
            assert done.code == 2
            assert says in done.err
    assert tersor("check nothing.yaml").code == 1
    assert not Path("o").exists()
