"""The examples run unchanged, and a recipe in Python, YAML and words gives the same ledger."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of examples/ in which the scripts have run."""
    here = tmp_path_factory.mktemp("user") / "examples"
    shutil.copytree(ROOT / "examples", here, ignore=shutil.ignore_patterns("out", "__pycache__"))
    return here


def call(folder: Path, *words: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_yaml_and_words_leave_one_ledger(folder: Path) -> None:
    python = call(folder, sys.executable, "python.py")
    shell = call(folder, "sh", "cli.sh")
    words, file = (json.loads((folder / f"out/{skin}/report.json").read_text()) for skin in ("words", "yaml"))
    assert f"ledger {words['ledger']}" in python.splitlines()
    assert words["ledger"] == file["ledger"]
    assert f"ledger {words['ledger']}" in shell

    # Small, sound, and still accurate.
    assert "0 warnings" in shell
    assert "6 parts, sound" in shell
    assert words["files"]["given"]["nbytes"] > 6 * words["files"]["result"]["nbytes"]
    assert words["accuracy"]["after"][0] > words["accuracy"]["before"][0] - 0.02


def test_ten_lines_of_python(folder: Path) -> None:
    body = [line for line in (folder / "python.py").read_text().splitlines()[1:] if line.strip()]
    assert len(body) <= 10
