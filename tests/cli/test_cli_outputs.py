"""Outputs that are inputs, or not files: every command refuses at once and keeps earlier files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
import safetensors.torch
from command_line import MINE, Command

import tersor
from tersor.core.recipe import Recipe
from tersor.resolve import resolve_files, resolve_model
from tersor.steps import Entropy

Make = Callable[[str], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.tersor, b.tersor, a patch between them, their weights, a sharded checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.py").write_text(MINE)
    model = resolve_model(f"{folder / 'mine.py'}:net")
    for name, more in (("a", 0.0), ("b", 0.25)):
        weights = {key: value + more for key, value in model.state_dict().items()}
        safetensors.torch.save_file(weights, folder / f"{name}.safetensors")
        tersor.pack(folder / f"{name}.safetensors", folder / f"{name}.tersor", Recipe((Entropy(),)))
    tersor.diff(folder / "a.tersor", folder / "b.tersor", folder / "p.patch")
    tersor.unpack(folder / "a.tersor", folder / "shards", shard="1kB")
    return folder


@pytest.fixture
def files(tersor: Command, made: Path) -> Command:
    shutil.copytree(made, ".", dirs_exist_ok=True)
    return tersor


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


SHARD, INDEX = "shards/model-00001-of-00003.safetensors", "shards/model.safetensors.index.json"
ROUND = "--max-drop 3 --model mine.py:net --task mine.py:task"
# The command with {} for the output, and the inputs that the output must not be.
VERBS = [
    ("pack a.safetensors quantize bits=2 -q -o {}", ["a.safetensors"]),
    ("pack a.safetensors -q -o {}", ["a.safetensors"]),
    ("pack shards -q -o {}", [INDEX, SHARD]),
    (f"pack a.safetensors {ROUND} -q -o {{}}", ["a.safetensors", "mine.py"]),
    (f"pack shards {ROUND} -q -o {{}}", [SHARD]),
    ("unpack a.tersor -q -o {}", ["a.safetensors"]),
    ("diff a.tersor b.tersor -q -o {}", ["a.tersor", "b.tersor"]),
    ("diff shards b.safetensors -q -o {}", [SHARD, "b.safetensors"]),
    ("patch a.tersor p.patch -q -o {}", ["a.tersor", "p.patch"]),
    ("show a.tersor --html {}", ["a.tersor"]),
]


def link_twice(given: str) -> None:
    os.symlink(os.path.abspath(given), "one")
    os.symlink("one", "other")


NAMES: dict[str, Make] = {
    "itself": lambda given: None,
    "another spelling": lambda given: None,
    "a symbolic link": lambda given: os.symlink(os.path.abspath(given), "other"),
    "a link to a link": lambda given: (os.symlink(os.path.abspath(given), "one"), os.symlink("one", "other"))[
        0
    ],
    "a hard link": lambda given: os.link(given, "other"),
}


@pytest.mark.parametrize(
    ("line", "given", "how"),
    [
        (line, given, how)
        for line, inputs in VERBS for given in inputs for how in NAMES
        if how in ("itself", "a symbolic link") or line in (VERBS[0][0], VERBS[6][0])
    ],
    ids=str,
)  # fmt: skip
def test_an_input_is_never_written(files: Command, line: str, given: str, how: str) -> None:
    if line.startswith("unpack"):  # it refuses the suffix first
        shutil.copy("a.tersor", "a.safetensors")
        line = line.replace("a.tersor", "a.safetensors")
    NAMES[how](given)
    name = {"itself": given, "another spelling": f"./shards/../{given}"}.get(how, "other")
    if line.startswith("unpack") and name == "other":
        Path("other").rename(name := "other.safetensors")
    before = contents()
    done = files(line.format(name))
    assert done.code == 2, done.err
    assert f"error: {Path(name)}: is also the input" in done.err
    assert contents() == before


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("run mine.py:net --weights o/model.tersor --out o entropy", "o/model.tersor"),
        ("run o/model.tersor --arch mine.py:net --out o entropy", "o/model.tersor"),
        ("run mine.py:net --recipe o/recipe.lock.yaml --out o", "o/recipe.lock.yaml"),
        ("run mine.py:net --weights w.safetensors --out o entropy", "o/report.json"),
        ("run mine.py:net --weights w.safetensors --out o entropy", "o/journal/000001.group"),
    ],
)
def test_a_run_does_not_write_what_it_read(files: Command, line: str, given: str) -> None:
    assert files("run mine.py:net --out o -q entropy").code == 0
    if "--weights" in line:
        Path(given).parent.mkdir(exist_ok=True)
        shutil.copy("a.safetensors", given)
        os.symlink(given, "w.safetensors")
    before = contents()
    done = files(f"{line} -q")
    assert done.code == 2, done.err
    assert f"{given}: is also the input" in done.err
    assert contents() == before


def test_a_lock_file_runs_into_another_folder(files: Command) -> None:
    assert files("run mine.py:net --out o -q entropy").code == 0
    assert files("run mine.py:net --out again --recipe o/recipe.lock.yaml -q").code == 0


@pytest.mark.parametrize("line", [line for line, _ in VERBS if ROUND not in line and "unpack" not in line])
def test_a_file_beside_the_inputs_is_written_again(files: Command, line: str) -> None:
    """An earlier result may be in the folder of a checkpoint."""
    for _ in range(2):
        done = files(line.format("shards/out.tersor"))
        assert done.code == 0, done.err


def pipe() -> None:
    os.mkfifo("pipe")


# The output, the function that makes it, the exit code (0: it is written), the message.
Odd = tuple[str, Callable[[], object], int, str]
ODD: list[Odd] = [
    ("", lambda: None, 1, "folder"),
    (".", lambda: None, 1, "folder"),
    ("..", lambda: None, 1, "folder"),
    ("/", lambda: None, 1, "folder"),
    ("shards", lambda: None, 1, "folder"),
    ("shards/", lambda: None, 1, "folder"),
    ("new/", lambda: None, 0, ""),
    ("new/deep/file", lambda: None, 0, ""),
    ("missing/..", lambda: None, 1, "is not a file name"),
    ("/dev/null", lambda: None, 1, "is a device or a pipe"),
    ("pipe", pipe, 1, "is a device or a pipe"),
    ("n" * 256, lambda: None, 1, "File name too long"),
    ("n" * 255, lambda: None, 0, ""),
    ("é" * 120, lambda: None, 0, ""),
    ("new\nline", lambda: None, 0, ""),
    ("zero\0byte", lambda: None, 2, "null byte"),
    ("a.safetensors/out", lambda: None, 1, "Not a directory"),
    ("loop", lambda: (os.symlink("loop", "pool"), os.symlink("pool", "loop")), 1, "Too many levels"),
    ("dangling", lambda: os.symlink("target", "dangling"), 0, ""),
]


WRITERS = [
    "pack a.safetensors -q -o", "unpack a.tersor -q -o", "diff a.tersor b.tersor -q -o",
    "patch a.tersor p.patch -q -o", f"pack a.safetensors {ROUND} -q -o", "show a.tersor --html",
]  # fmt: skip


FEW = (".", "/dev/null", "loop", "dangling")  # for each verb; all of them for two


@pytest.mark.parametrize(
    ("words", "odd"),
    [(words, odd) for words in WRITERS for odd in ODD if words in WRITERS[:2] or odd[0] in FEW],
    ids=lambda value: repr(value if isinstance(value, str) else value[0])[:20],
)
def test_odd_outputs(files: Command, words: str, odd: Odd) -> None:
    name, make, code, says = odd
    if "\0" in name and words.startswith("unpack"):
        code, says = 1, "zero byte"  # the name may be a folder's, so it is looked at later
    if ROUND in words and not code:
        pytest.skip("it takes long to round, and the file is written as by the others")
    make()
    before, null = contents(), os.stat("/dev/null").st_rdev
    done = files(*words.split(), name)
    assert done.code == code, done.err
    assert says in done.err
    assert "Traceback" not in done.err
    assert os.stat("/dev/null").st_rdev == null
    after = contents()
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) or not code
    if name == "dangling":
        assert os.readlink("dangling") == "target", "the file that it means is written"
        assert Path("target").is_file()


FOLDERS = ["", ".", "..", "a.tersor", "shards", "loop", "a.tersor/x", "n" * 256]


@pytest.mark.parametrize("name", FOLDERS)
def test_odd_folders_of_shards(files: Command, name: str) -> None:
    os.symlink("loop", "loop")
    before = contents()
    done = files("unpack", "a.tersor", "-q", "--shard", "1kB", "-o", name)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert contents() == before


def test_a_link_to_an_empty_folder_of_shards(files: Command) -> None:
    Path("empty").mkdir(mode=0o700)
    os.symlink("empty", "link")
    assert files("unpack a.tersor -q --shard 1kB -o link").code == 0
    assert Path("link").is_symlink()
    assert Path("empty").stat().st_mode & 0o777 == 0o700
    assert any(Path("empty").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["a.tersor", "a.tersor/o", "n" * 256])
def test_odd_folders_of_results(files: Command, name: str) -> None:
    before = contents()
    for words in (["demo"], ["run", "mine.py:net", "entropy"]):
        done = files(*words, "-q", "--out", name)
        assert done.code == 1
        assert "error: " in done.err
    assert contents() == before


def test_a_link_is_written_through(files: Command) -> None:
    Path("there").mkdir()
    Path("there/out.tersor").write_bytes(b"earlier")
    os.symlink("there/out.tersor", "out.tersor")
    assert files("pack a.safetensors -q -o out.tersor").code == 0
    assert os.readlink("out.tersor") == "there/out.tersor"
    assert Path("there/out.tersor").read_bytes() == Path("a.tersor").read_bytes()
    assert [path.name for path in Path("there").iterdir()] == ["out.tersor"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_an_earlier_file_keeps_its_permissions(files: Command, mode: int) -> None:
    out = Path("out.tersor")
    out.write_bytes(b"earlier")
    out.chmod(mode)
    assert files("pack a.safetensors -q -o out.tersor").code == 0
    assert out.stat().st_mode & 0o777 == mode
    assert out.read_bytes() == Path("a.tersor").read_bytes()


def test_a_new_file_has_those_of_the_umask(files: Command) -> None:
    before = os.umask(0o027)
    try:
        assert files("pack a.safetensors -q -o out.tersor").code == 0
    finally:
        os.umask(before)
    assert Path("out.tersor").stat().st_mode & 0o777 == 0o640


def test_in_json_too(files: Command) -> None:
    done = files("pack a.safetensors -o a.safetensors --json")
    assert done.code == 2
    assert json.loads(done.out)["kind"] == "SettingError"


def test_the_last_of_two_outputs_is_written(files: Command) -> None:
    assert files("pack a.safetensors -q -o one.tersor -o two.tersor").code == 0
    assert not Path("one.tersor").exists()
    assert Path("two.tersor").read_bytes() == Path("a.tersor").read_bytes()


def test_an_input_with_a_name_that_is_none(files: Command) -> None:
    name = "n" * 256
    for line in (f"pack {name} -o x.tersor", f"diff {name} a.tersor -o x.patch", f"patch {name} p.patch -o x",
                 f"unpack {name} -o x", f"run mine.py:net --weights {name} --out o entropy",
                 f"run {name}:net --out o entropy"):  # fmt: skip
        done = files(line)
        assert done.code in (1, 2)
        assert "error: " in done.err
        assert not Path("x.tersor").exists()


@pytest.mark.parametrize(
    "line",
    [
        "show a.tersor --json",
        "show a.tersor",
        "verify a.tersor",
        "show none.tersor --json",
        "pack --help",
        "",
    ],
)
def test_a_reader_that_goes_away_is_no_error(files: Command, line: str) -> None:
    """tersor show --json FILE | head used to end in a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = forks.run(["-m", "tersor", *line.split()], stdout=writing)
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode == 141


def test_talk_without_a_listener_is_no_error(files: Command) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = ["-m", "tersor", "pack", "a.safetensors", "-o", "c.tersor"]
    assert forks.run(words, stdout=writing, stderr=writing).returncode == 141
    os.close(writing)


def test_a_folder_with_the_name_of_a_task_is_not_read(files: Command) -> None:
    Path("digits").mkdir()
    Path("digits/x.index.json").write_text("[]")
    done = files("pack a.safetensors --max-drop 3 --model mine.py:net --task mine.py:task -q -o n.tersor")
    assert done.code == 0
    assert resolve_files("digits") == [Path("digits")]


def test_workers_are_refused_if_there_are_none(files: Command) -> None:
    done = files(f"pack a.safetensors {ROUND} --workers 2 -q -o n.tersor")
    assert done.code == 2
    assert "--workers" in done.err
