"""Exits: what a command prints when it ends, result or error, and its exit code.

exit 0      done
exit 1      understood and refused (errors.py)
exit 2      a wrong call: a misspelt word or setting
exit 3      a fault in Tersor itself (boundary.py), with its traceback on stderr
exit 130    stopped by Ctrl-C
exit 141    the reader of the output, such as head, has closed the pipe
An error of the user's own code has exit code 1, and a traceback that begins in that code.
With --json stdout is one JSON document, also for an error: {"error": text, "kind": class}.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import typer

from tersor.boundary import bounded, line_of, theirs_first
from tersor.errors import InternalError, TaskError, TersorError, UserCodeError, first_line

STOPPED, UNREAD = 130, 141  # by Ctrl-C, by a reader that is gone: as shells have it


@dataclass(frozen=True)
class Answer:
    """The result of a command, and how to show it to people."""

    facts: dict[str, Any]
    json: bool
    tables: Callable[[Any], Iterable[Any]]
    code: int = 0

    def deliver(self) -> int:
        """Print it on stdout and return the exit code."""
        from tersor.report.console import show, show_json

        if self.json:
            show_json(self.facts)
        else:
            show(self.tables(self.facts))
        return self.code


def ended(app: typer.Typer) -> int:
    """Run the words of sys.argv and return the exit code."""
    try:
        code = answered(app)
        sys.stdout.flush()  # else Python flushes at its end and prints an error there
        return code
    except (BrokenPipeError, SystemExit) as error:  # typer turns a BrokenPipeError into a SystemExit
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def answered(app: typer.Typer) -> int:
    """The same without the check for a closed pipe."""
    words = sys.argv[1:] or ["--help"]
    who = f"tersor {words[0]}"
    passes = (typer.TyperException, typer.Abort, typer.Exit)
    try:
        # The output of a user's own file must not get into the document.
        with (
            redirect_stdout(sys.stderr) if "--json" in words else nullcontext(),
            bounded(who, passes=passes, wrap=True),
        ):
            answer = app(words, prog_name="tersor", standalone_mode=False)
        if answer != STOPPED:
            with bounded(who):
                return answer.deliver() if isinstance(answer, Answer) else 0
    except (InternalError, UserCodeError) as error:
        return refuse_with_traceback(error, words)
    except TaskError as error:
        if (cause := error.__cause__) is not None and line_of(cause):  # a loss that is being debugged
            say_traceback(theirs_first(cause))
        return refuse(str(error), type(error).__name__, error.exit_code, words)
    except TersorError as error:
        return refuse(str(error), type(error).__name__, error.exit_code, words)
    except MemoryError as error:
        return refuse(f"not enough memory: {first_line(error)}", type(error).__name__, 1, words)
    except typer.TyperException as error:
        context: Any = getattr(error, "ctx", None)
        path = "tersor" if context is None else context.command_path
        said = error.format_message().rstrip(".")
        if context is not None and context.parent is None and hasattr(error, "option_name"):
            said += ". Options go after the command: tersor COMMAND ... --option"
        return refuse(f"{said}. See: {path} --help", "UsageError", 2, words)
    except (KeyboardInterrupt, typer.Abort):
        pass
    return refuse("stopped; --resume continues a run", "KeyboardInterrupt", STOPPED, words)


def refuse_with_traceback(error: TersorError, words: list[str]) -> int:
    """For a fault of ours all of its traceback; for an error of the user's code the part in that code."""
    cause = error.__cause__ or error
    own = isinstance(error, UserCodeError)
    say_traceback(theirs_first(cause) if own else cause)
    return refuse(str(error), type(cause if own else error).__name__, error.exit_code, words)


def say_traceback(error: BaseException) -> None:
    from tersor.report.console import talk

    for line in "".join(traceback.format_exception(error)).rstrip().splitlines():
        talk(line)


def refuse(text: str, kind: str, code: int, words: list[str]) -> int:
    from tersor.report.console import show_json, talk

    if "--json" in words:
        show_json({"error": text, "kind": kind})
    talk(f"error: {text}")
    return code
