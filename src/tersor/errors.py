"""Errors: a class for every mistake that a user can make. Each prints as one message without a traceback.

A message says who refuses, what was given, what is allowed, and what to do. `exit_code` is the exit code of
the command line: 2 for a wrong call (a misspelt option), 1 for a request that is understood and refused, 3
for a fault in Tersor itself.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

FEW = 12  # names that a message lists
MANY = 60  # words of Tersor's own that it lists
WORD = 200  # characters of a word in a message: names come from files, and may have 100,000
LONGEST = 4000  # characters of a message
HIDDEN = ("Cc", "Cf", "Cn", "Cs", "Co", "Zl", "Zp")  # Unicode categories that are shown as \u{...}
BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
LONG_WORDS = re.compile(rf"\S{{{WORD + 1},}}")


class TersorError(Exception):
    """Base of all errors that Tersor raises on purpose. Its message is one line of limited length, and names
    in it cannot control a terminal.

    `done`: the state of a run that ended with it, if only steps that change nothing were left."""

    exit_code: ClassVar[int] = 1
    done: Any = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*(one_line(arg) if isinstance(arg, str) else arg for arg in args))


class SettingError(TersorError):
    """A setting, option or argument that is not allowed."""

    exit_code = 2


class SiteError(TersorError):
    """A weight that does not exist, or that a step cannot work on."""

    exit_code = 2


class TaskError(TersorError):
    """A task whose batches, loss or metric do not fit the model."""


class FormatError(TersorError):
    """A file or byte stream that is damaged or has another format."""


class RefusedError(TersorError):
    """A valid request that cannot be carried out: NaN weights, a step without the data it needs."""


class StorageError(TersorError):
    """A file that cannot be read or written: a full disk, a missing folder, no permission."""


class JournalError(TersorError):
    """A journal that is damaged, in use, or of another model, recipe or data set, or would be overwritten."""


class BudgetError(TersorError):
    """A budget that no result meets."""


class MissingError(TersorError):
    """An optional package that this call needs and that is not installed."""


class UserCodeError(TersorError):
    """On the command line, an error that the user's own code raised. It is the __cause__."""


class InternalError(TersorError):
    """A fault in Tersor itself, with the step and the site that it was at. The original is the __cause__."""

    exit_code = 3


def visible(value: Any) -> Any:
    """Text with its invisible and direction-changing characters replaced by their number, as \\u{202e}: names
    come from files, and could rewrite a terminal."""
    if not isinstance(value, str) or value.isprintable():
        return value
    return "".join(f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in HIDDEN else c for c in value)


def one_line(text: str) -> str:
    """A message as one line without invisible characters; long words and a long text are shortened."""
    if len(text) <= WORD and text.isprintable():
        return text
    text = LONG_WORDS.sub(lambda word: shortened(word[0]), visible(BREAKS.sub(" ", text)))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text) - LONGEST:,} characters more)"


def shortened(name: str) -> str:
    """A name of at most about 200 characters: its beginning and its end."""
    return name if len(name) <= WORD else f"{name[: WORD - 60]}...{name[-50:]}"


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """'did you mean "channel"? Allowed: channel, group, tensor' for a misspelt word."""
    names = sorted(shortened(str(name)) for name in allowed)  # a search takes the square of their length
    near = difflib.get_close_matches(shortened(str(word)), names, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{guess}Allowed: {few(names, MANY)}"


def near_few(word: str, names: Collection[str], there_are: str) -> str:
    """The same for names in a model. If there are many, only some are listed."""
    text = did_you_mean(word, names)
    if len(names) <= FEW:
        return text
    some = ", ".join(map(shortened, list(names)[:6]))
    return f"{text.split('Allowed:')[0]}{there_are} {len(names)}, such as {some}"


def few(names: Iterable[str], most: int = 4) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    more = len(names) - most
    return ", ".join(map(shortened, names[:most])) + (f" and {more} more" if more > 0 else "")


def counted(count: int, noun: str) -> str:
    """'1 step', '2 steps', '3 entries', '4 branches'."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else many}"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class name."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def need(package: str, extra: str, why: str) -> MissingError:
    """The error for an optional package that is not installed."""
    return MissingError(f"{why} needs the package {package}. Install it with: pip install 'tersor[{extra}]'")
