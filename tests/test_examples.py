"""Examples: they run unchanged, and one recipe in Python, YAML and words gives the same ledger."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of examples/ to run the scripts in."""
    here = tmp_path_factory.mktemp("user") / "examples"
    shutil.copytree(ROOT / "examples", here, ignore=shutil.ignore_patterns("out", "__pycache__"))
    return here


def call(folder: Path, *words: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.wide
def test_python_yaml_and_words_give_the_same_ledger(folder: Path) -> None:
    python = call(folder, sys.executable, "python.py")
    shell = call(folder, "sh", "cli.sh")
    words, file = (
        json.loads((folder / f"out/{source}/report.json").read_text()) for source in ("words", "yaml")
    )
    assert f"ledger {words['ledger']}" in python.splitlines()
    assert words["ledger"] == file["ledger"]
    assert f"ledger {words['ledger']}" in shell

    # The file is small and intact, and the accuracy is kept.
    assert "0 warnings" in shell
    assert "6 parts, sound" in shell
    assert words["files"]["given"]["nbytes"] > 6 * words["files"]["result"]["nbytes"]
    assert words["accuracy"]["after"][0] > words["accuracy"]["before"][0] - 0.02


def test_the_python_example_has_ten_lines(folder: Path) -> None:
    body = [line for line in (folder / "python.py").read_text().splitlines()[1:] if line.strip()]
    assert len(body) <= 10


@pytest.mark.wide
def test_the_life_of_a_model(folder: Path) -> None:
    """Every stage keeps the accuracy, and patches are smaller than the files that they make."""
    lines = call(folder, sys.executable, "lifecycle.py").splitlines()
    rows = [re.fullmatch(r"(.+?) +([0-9,]+) bytes +([0-9.]+) %(.*)", line) for line in lines]
    assert len(rows) == 7
    found = {row[1]: (int(row[2].replace(",", "")), float(row[3]), row[4]) for row in rows if row}
    given = found.pop("given")
    for nbytes, accuracy, _ in found.values():
        assert nbytes < given[0] / 4
        assert accuracy > given[1] - 2
    patches = [row for row in found.values() if "a patch" in row[2]]
    assert len(patches) == 2
    for nbytes, _, note in patches:
        assert nbytes < 0.8 * int(re.sub(r"\D", "", note))
