"""Docs: each Python block runs, and each `$ tersor` line uses existing commands and options.

The blocks of one page share a namespace, in order, and run in an empty folder. A block directly after the
comment <!-- not run --> is skipped; a few such blocks are allowed in total.
"""

import contextlib
import functools
import importlib.util
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
NOT_RUN = "<!-- not run -->"
NOT_RUN_AT_MOST = 4
SHELLS = {"console", "sh", "bash", "shell"}

needs_cli = pytest.mark.skipif(
    importlib.util.find_spec("tersor.cli") is None, reason="tersor.cli does not exist yet"
)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line in the page
    run: bool


class Command(NamedTuple):
    words: list[str]
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, including indented ones (in a list)."""
    found, before = [], ""
    lines = iter(enumerate(page.splitlines(), 1))
    for number, line in lines:
        fence = re.match(r"(\s*)(`{3,}|~{3,})\s*([\w-]*)", line)
        if fence:
            indent, mark, language = fence.groups()
            body = []
            for _, inner in lines:
                if inner.strip().startswith(mark) and not inner.strip().strip(mark[0]):
                    break
                body.append(inner.removeprefix(indent))
            found.append(Block(language.lower(), "\n".join(body), number + 1, before != NOT_RUN))
        before = line.strip() or before
    return found


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "py")]


def execute(page: str, name: str) -> dict[str, Any]:
    """Run a page's blocks. The traceback of an error shows the line in the page."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(page):
        if block.run:
            text = "\n" * (block.line - 1) + block.text
            exec(compile(text, name, "exec"), namespace)
    return namespace


def commands(page: str) -> list[Command]:
    """The `$ tersor` lines in a page's shell blocks, each up to the first pipe, redirection, ; or &."""
    found = []
    for block in blocks(page):
        text = re.sub(
            r"\\\n\s*>?", lambda cut: " \0" * cut[0].count("\n"), block.text
        )  # one command, one line
        line = block.line
        for row in text.split("\n"):
            if block.language in SHELLS and row.startswith("$ tersor"):
                lexer = shlex.shlex(row[2:].replace("\0", ""), posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                words = list(lexer)
                end = next((i for i, word in enumerate(words) if set(word) <= set("|&;<>()")), len(words))
                found.append(Command(words[1:end], line))
            line += 1 + row.count("\0")
    return found


@functools.cache
def shown_help(subcommand: str) -> str | None:
    """The output of `tersor SUBCOMMAND --help`, or None if the command fails."""
    from tersor.cli import main

    out = io.StringIO()
    words = ["tersor", *([subcommand] if subcommand else []), "--help"]
    plain = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", words))
        stack.enter_context(mock.patch.dict(os.environ, plain))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
    return out.getvalue() if not code else None


def unknown(command: Command, helps: Callable[[str], str | None]) -> list[str]:
    """The words of a command that its help does not contain."""
    options = [word.split("=")[0] for word in command.words if re.match(r"--?[A-Za-z]", word)]
    subcommand = next((word for word in command.words if not word.startswith("-")), "")
    text = helps(subcommand)
    if text is None:
        return [subcommand]
    every = f"{text}\n{helps('') or ''}"
    return [option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", every)]


def cases(find: Callable[[str], list[Any]]) -> list[Any]:
    """One test case for each page that has such blocks or commands."""
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if find(p.read_text())]


@pytest.mark.sampled(page=(ROOT / "README.md", ROOT / "docs" / "which.md"))
@pytest.mark.parametrize("page", cases(python_blocks))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # a page can write a module and import it
    execute(page.read_text(), str(page.relative_to(ROOT)))


def test_only_a_few_blocks_are_skipped() -> None:
    skipped = [f"{p.name}:{b.line}" for p in PAGES for b in python_blocks(p.read_text()) if not b.run]
    assert len(skipped) <= NOT_RUN_AT_MOST, skipped


@needs_cli
@pytest.mark.parametrize("page", cases(commands))
def test_commands_exist(page: Path) -> None:
    found = {f"{page.name}:{c.line}": unknown(c, shown_help) for c in commands(page.read_text())}
    assert not {where: words for where, words in found.items() if words}


# ---- the tests above can fail ----------------------------------------------------------------------------

PAGE = """# Title

```python
x = 1
```
<!-- not run -->

```python
x = no_such_name
```
1. In a list:

   ```py
   y = x + 1
   ```

```console
$ tersor run net.py:net --task digits --out=out \\
>     --resume prune keep=-0.5 | tee --append log   # --comment
--not-a-command
$ tersor --json show 'a file'
$ make demo --silent
```
```text
$ tersor --no-such
```
"""
HELPS = {"": "--json --help", "run": "--task --out-dir --out, -o  --resume", "show": "--all"}


def test_blocks_share_a_namespace_and_marked_ones_are_skipped() -> None:
    assert [(b.language, b.line, b.run) for b in python_blocks(PAGE)] == [
        ("python", 4, True), ("python", 9, False), ("py", 14, True)
    ]  # fmt: skip
    assert execute(PAGE, "PAGE")["y"] == 2


def test_a_failing_block_fails_with_its_line() -> None:
    with pytest.raises(NameError, match="no_such_name") as caught:
        execute(PAGE.replace(NOT_RUN, ""), "PAGE")
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("PAGE", 9)


def test_commands_are_found_with_all_their_words() -> None:
    assert commands(PAGE) == [
        (["run", "net.py:net", "--task", "digits", "--out=out", "--resume", "prune", "keep=-0.5"], 18),
        (["--json", "show", "a file"], 21),
    ]


def test_known_commands_pass() -> None:
    assert [unknown(command, HELPS.get) for command in commands(PAGE)] == [[], []]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("$ tersor rum net", ["rum"]),
        ("$ tersor run net --tusk digits", ["--tusk"]),
        ("$ tersor run net --res", ["--res"]),
        ("$ tersor run net --out-di x -x", ["--out-di", "-x"]),
        ("$ tersor show a --resume", ["--resume"]),
    ],
)
def test_unknown_words_are_caught(line: str, wrong: list[str]) -> None:
    (command,) = commands(f"```console\n{line}\n```\n")
    assert unknown(command, HELPS.get) == wrong


@needs_cli
def test_an_unknown_command_has_no_help() -> None:
    assert shown_help("no-such-command") is None
    assert "--help" in (shown_help("show") or "")
