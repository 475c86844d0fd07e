"""tersor pack --max-drop, and rdoq in a recipe of words."""

from pathlib import Path

import pytest
import safetensors.torch
from command_line import Command

import tersor as package
from tersor.io.container import load
from tersor.model.builtin_tasks import task_from
from tersor.resolve import resolve_model


@pytest.fixture
def weights(tersor: Command) -> Command:
    safetensors.torch.save_file(resolve_model("mine.py:net").state_dict(), "w.safetensors")
    return tersor


def test_a_file_within_a_drop(weights: Command) -> None:
    line = "pack w.safetensors -o m.tersor --max-drop 3 --model mine.py:net --task mine.py:task"
    facts = weights(f"{line} -q --json").json
    assert facts["to"] == {"name": "m.tersor", "nbytes": Path("m.tersor").stat().st_size}
    model, task = resolve_model("mine.py:net").model(), task_from("mine.py:task")
    rounded = load("m.tersor").model(model)
    drop = 100 * float(task.scores(model).mean() - task.scores(rounded).mean())
    assert drop <= 3
    assert facts["accuracy"]["drop"][0] == pytest.approx(drop, abs=1e-3)
    assert isinstance(package.load("m.tersor").ledger.recipe["steps"][0]["rdoq"]["max_drop"], float)
    tiny = weights(f"{line} --tiny -q")
    assert tiny.code == 0
    assert "3 allowed" in tiny.out
    assert Path("m.tersor").stat().st_size < facts["to"]["nbytes"]


def test_pack_rounds_without_a_model(weights: Command) -> None:
    assert weights("pack w.safetensors -o m.tersor -q rdoq bits=3 entropy").code == 0
    assert weights("run mine.py:net --out o -q rdoq bits=3 entropy").code == 0
    assert load("m.tersor").digest == load("o/model.tersor").digest


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("pack w.safetensors -o m.tersor --max-drop 1", "--model file.py:factory --task TASK"),
        ("pack w.safetensors -o m.tersor --task mine.py:task", "are for --max-drop"),
        (
            "pack w.safetensors -o m.tersor --max-drop 1 --model mine.py:net --task mine.py:task entropy",
            "includes rounding and coding",
        ),
        ("pack w.safetensors -o m.tersor --max-drop -1 --model mine.py:net --task mine.py:task", "above 0"),
        ("pack w.safetensors -o m.tersor rdoq nbytes=100", "needs the whole model"),
    ],
)
def test_wrong_options_are_refused(weights: Command, line: str, says: str) -> None:
    done = weights(line)
    assert done.code in (1, 2)
    assert says in done.err
    assert not Path("m.tersor").exists()
