"""Commands run in this process, in an empty folder with a user's own file in it: mine.py."""

import sys
from pathlib import Path

import pytest
from command_line import MINE, Command, Done

from tersor.cli import main


@pytest.fixture
def tersor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line, given as one text or as words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)

    def call(*words: object) -> Done:
        line = str(words[0]).split() if len(words) == 1 else [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["tersor", *line])
        capsys.readouterr()
        code = main()
        return Done(code, *capsys.readouterr())

    return call
