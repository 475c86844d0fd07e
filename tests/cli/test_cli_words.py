"""Words and options, exit codes, stdout and stderr."""

import json
import os
import pty
import subprocess
import sys

import forks
import pytest
from command_line import Command

import tersor as package
from tersor import errors
from tersor.steps import STEPS

COMMANDS = (
    "demo", "run", "check", "show", "pack", "unpack", "verify", "export", "eval", "compare"
)  # fmt: skip


def test_help_names_every_command(tersor: Command) -> None:
    done = tersor("--help")
    assert done.code == 0
    assert all(f"\n  {word} " in done.out for word in COMMANDS)
    assert tersor().out == done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(tersor: Command, command: str) -> None:
    done = tersor(command, "--help")
    assert done.code == 0
    assert "--json" in done.out
    assert "..." not in done.out.split("\n\n")[1]  # the summary is not cut off


def test_version(tersor: Command) -> None:
    assert tersor("--version").out == f"tersor {package.__version__}\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("rum", "No such command 'rum'. Did you mean 'run'?"),
        ("run", "Missing argument 'MODEL'"),
        ("run mine.py:net prune", "Missing option '--out'"),
        ("run mine.py:net prune --out o --tusk t", "No such option: --tusk"),
        ("--quiet run mine.py:net prune --out o", "--quiet. Options go after the command: tersor COMMAND"),
        ("run mine.py:net prune --out o --seed x", "Invalid value for '--seed'"),
        ("show", "Missing argument 'FILE'"),
        ("pack w.safetensors", "Missing option '--out'"),
        ("run mine.py:net --out o", "none is given"),
        ("run mine.py:net --out o --recipe r.yaml prune", "give one of them"),
        ("run mine.py:net --out o prun", "did you mean 'prune'?"),
        ("run mine.py:net --out o prune keap=0.5", "no setting 'keap'; did you mean 'keep'?"),
        ("run mine.py:net --out o prune keep=2", "0 < keep <= 1"),
        ("run mine.py:net --out o keep=0.5 prune", "comes before any step"),
        ("run mine.py:net --out o prune where=*.wight", "matches no weight; did you mean"),
        ("run mine.py:nut --out o prune", "did you mean 'net'?"),
        ("run mini.py:net --out o prune", "did you mean 'mine.py'?"),
        ("run mine.py:net --arch mine.py:net --out o prune", "--arch goes with a .tersor file"),
        ("run m.tersor --out o prune", "--arch file.py:factory"),
        ("run mine.py:net --out o --seed -1 prune", "0 or more"),
    ],
)
def test_a_wrong_call_exits_with_2(tersor: Command, line: str, says: str) -> None:
    done = tersor(line)
    assert done.code == 2
    assert says in done.err
    assert done.err.startswith("error: ")
    assert len(done.err.strip().splitlines()) == 1
    assert done.out == ""


@pytest.mark.parametrize(
    ("line", "kind", "code"),
    [
        ("run mine.py:net --out o prune keap=1", "SettingError", 2),
        ("run mine.py:net --out o prune where=x", "SiteError", 2),
        ("run mine.py:net --out o finetune", "RefusedError", 1),
        ("run mine.py:net --out o --task digitz prune", "SettingError", 2),
        ("show nothing.tersor", "StorageError", 1),
        ("run", "UsageError", 2),
    ],
)
def test_errors_as_json(tersor: Command, line: str, kind: str, code: int) -> None:
    plain, done = tersor(line), tersor(f"{line} --json")
    assert (plain.code, done.code) == (code, code)
    assert done.json["kind"] == kind
    assert plain.err.endswith(f"error: {done.json['error']}\n")


def test_exit_codes_are_1_2_or_3() -> None:
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)
             if issubclass(kind, errors.TersorError)}  # fmt: skip
    assert codes == {1, 2, 3}


def test_talk_goes_to_stderr_and_quiet_ends_it(tersor: Command) -> None:
    loud = tersor("run mine.py:net --out a prune keep=0.5 entropy")
    quiet = tersor("run mine.py:net --out b --quiet prune keep=0.5 entropy")
    assert loud.err.splitlines() == ["[1/2] prune", "[2/2] entropy"]
    assert quiet.err == ""
    for done in (loud, quiet):
        assert "bits a weight" in done.out
        assert "[1/2]" not in done.out


def test_every_step_is_a_word(tersor: Command) -> None:
    for word in STEPS:
        done = tersor(f"run mine.py:net --out o-{word} --json -q {word} no-such-setting=1")
        assert done.json["error"].startswith(f"{word}: no setting")


def test_an_unexpected_error_is_not_hidden(tersor: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **more: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("tersor.io.verify.verify", broken)
    done = tersor("verify mine.py")
    assert done.code == 1  # as of a user's code: the function is not Tersor's
    assert 'raise ZeroDivisionError("ours")' in done.err
    assert "error: ZeroDivisionError: ours" in done.err


def test_ctrl_c_is_130(tersor: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tersor.pipeline.run", stopped)
    done = tersor("run mine.py:net --out o prune --json")
    assert done.code == 130
    assert "--resume" in done.json["error"]


def test_only_the_first_process_speaks(tersor: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    done = tersor("run mine.py:net --out o prune")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_python_m_tersor_and_a_real_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tersor", "rum", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["kind"] == "UsageError"


def test_a_terminal_sees_bars(tersor: Command) -> None:
    tersor("--version")  # makes the folder
    ours, theirs = pty.openpty()
    line = ["-m", "tersor", "run", "mine.py:net", "--out", "o", "prune", "keep=0.5"]
    done = forks.run(line, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    assert done.returncode == 0
    assert "[1/1] prune" in shown
    assert "\x1b[" in shown
    assert "\x1b[" not in done.stdout
