"""Faults on the command line: each error has one line, the right exit code, and a traceback that helps."""

import sys
from pathlib import Path

import pytest
from command_line import Command

from tersor.report import check_lines
from tersor.steps import quantize

BROKEN = """
import torch
from torch import nn
from mine import data, net, task
import tersor

class Mine(Exception):
    pass

def helper(output):
    raise Mine("no such\\nclass")

def loss(output, target):
    return helper(output)

def broken():
    x, y = data(64)
    return tersor.Task("broken", evaluate=[(x, y)], train=[(x, y)], loss=loss)

def late():
    calls = []
    def loss(output, target):
        calls.append(1)
        return helper(output) if len(calls) > 2 else nn.functional.cross_entropy(output, target)
    x, y = data(64)
    return tersor.Task("late", evaluate=[(x, y)], train=[(x, y)] * 4, loss=loss)

def full():
    def loss(output, target):
        raise MemoryError("all of it")
    x, y = data(64)
    return tersor.Task("full", evaluate=[(x, y)], train=[(x, y)], loss=loss)

def misfit():
    def loss(output, target):
        raise TypeError("wrong")
    x, y = data(64)
    return tersor.Task("misfit", evaluate=[(x, y)], train=[(x, y)], loss=loss)

def gives_up():
    raise Mine("here")
"""


@pytest.fixture
def broken(tersor: Command) -> Command:
    Path("broken.py").write_text(BROKEN)
    return tersor


@pytest.mark.parametrize("task", ["broken", "late"])
def test_an_error_of_the_users_loss_has_its_traceback(broken: Command, task: str) -> None:
    done = broken(f"run mine.py:net --task broken.py:{task} --out out -q finetune epochs=1")
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):\n  File ")
    first = done.err.splitlines()[1]
    assert 'broken.py", line ' in first, "the traceback begins in the user's code"
    assert "in loss" in first
    assert "in helper" in done.err
    said = done.err.splitlines()[-1]
    assert said.startswith("error: Mine: no such (tersor run: your code raised it (broken.py, line 11)")
    assert ("while step 1 finetune ran it" in said) is (task == "late")
    found = broken(f"run mine.py:net --task broken.py:{task} --out out --json finetune epochs=1")
    assert found.json["kind"] == "Mine"
    assert "Traceback" in found.err


def test_an_error_of_the_users_file_when_it_is_imported(broken: Command) -> None:
    done = broken("run broken.py:gives_up --out out -q entropy")
    assert done.code == 1
    assert "in gives_up" in done.err
    assert done.err.splitlines()[-1].startswith("error: Mine: here")


def test_a_misfit_in_the_users_loss_has_its_traceback(broken: Command) -> None:
    done = broken("run mine.py:net --task broken.py:misfit --out out -q finetune epochs=1")
    assert done.code == 1
    first, second, *_, last = done.err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert 'broken.py", line ' in second
    assert "the loss does not fit" in last
    assert "TypeError: wrong" in last


def test_no_memory(broken: Command) -> None:
    done = broken("run mine.py:net --task broken.py:full --out out -q finetune epochs=1")
    assert (done.code, done.err) == (1, "error: not enough memory: all of it\n")


def test_a_fault_of_ours(broken: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "uniform_grid", None)
    done = broken("run mine.py:net --out out -q quantize bits=4")
    assert done.code == 3
    assert done.err.startswith("Traceback (most recent call last):\n")
    said = done.err.splitlines()[-1]
    assert said.startswith("error: tersor run: step 1 quantize, at 0.weight: TypeError: 'NoneType'")
    assert "Please report it" in said
    assert said.endswith("; recipe: quantize bits=4")
    assert broken("run mine.py:net --out out --json quantize bits=4").json["kind"] == "InternalError"


# Each command, with the function beneath it that is taken away.
COMMANDS = [
    ("run mine.py:net --out o -q entropy", "tersor.pipeline", "run"),
    ("check r.yaml --model mine.py:net", "tersor.check", "stand_in_for"),
    ("zoo", "tersor.report.zoo_table", "facts_of"),
    ("steps", "tersor.report.steps_table", "own_first"),
    ("show out/model.tersor", "tersor.report.show", "facts_of"),
    ("show mine.py:net --groups --task mine.py:task", "tersor.report.unit_groups", "units_of"),
    ("pack w.safetensors -q -o p.tersor entropy", "tersor.io.pack", "is_finite"),
    ("unpack out/model.tersor -q -o u.safetensors", "tersor.io.unpack", "TersorFile"),
    ("diff out/model.tersor out/model.tersor -q -o d.patch", "tersor.io.patch.diff", "output"),
    ("patch out/model.tersor d.patch -q -o n.tersor", "tersor.io.patch.patch", "output"),
    ("verify out/model.tersor", "tersor.io.verify", "TersorFile"),
    (
        "export out/model.tersor --model mine.py:net --task mine.py:task -q",
        "tersor.candidates.export",
        "Export",
    ),
    ("eval base --model mine.py:net --task mine.py:task -q", "tersor.candidates.evaluate", "estimated"),
    ("compare base base --model mine.py:net --task mine.py:task -q", "tersor.candidates.compare", "compared"),
    (
        "compress mine.py:net --task mine.py:task --budget drop<=25 --out c -q",
        "tersor.search.compress",
        "walked",
    ),
    ("demo -q --out demo", "tersor.demo", "trained"),
]


@pytest.mark.parametrize(("line", "module", "name"), COMMANDS, ids=lambda word: str(word).split()[0])
def test_a_fault_in_any_command(
    broken: Command, monkeypatch: pytest.MonkeyPatch, line: str, module: str, name: str
) -> None:
    Path("r.yaml").write_text("tersor: 1\nsteps: [entropy]\n")
    assert broken("run mine.py:net --out out -q entropy").code == 0
    assert broken("unpack out/model.tersor -q -o w.safetensors").code == 0
    assert broken("diff out/model.tersor out/model.tersor -q -o d.patch").code == 0
    __import__(module)
    monkeypatch.setattr(sys.modules[module], name, None)
    done = broken(line)
    assert done.code == 3, done.err
    said = done.err.splitlines()[-1]
    assert said.startswith(f"error: tersor {line.split(maxsplit=1)[0]}: ")
    assert "TypeError" in said
    assert "Please report it" in said


def test_a_fault_in_a_table(broken: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are made after the command has ended."""
    Path("r.yaml").write_text("tersor: 1\nsteps: [{quantize: {bits: 4}}]\n")
    monkeypatch.setattr(check_lines, "settings", None)
    done = broken("check r.yaml")
    assert done.code == 3
    assert "error: tersor check: TypeError" in done.err


def test_every_command_has_a_case(broken: Command) -> None:
    from tersor.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names == {line.split()[0] for line, *_ in COMMANDS}
