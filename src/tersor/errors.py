"""Errors: a class for every mistake that a user can make. Each prints as one message without a traceback.

A message says who refuses, what was given, what is allowed, and what to do. `exit_code` is the exit code of
the command line: 2 for a wrong call (a misspelt option), 1 for a request that is understood and refused, 3
for a fault in Tersor itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import ClassVar

FEW = 12  # names that a message lists


class TersorError(Exception):
    """Base of all errors that Tersor raises on purpose."""

    exit_code: ClassVar[int] = 1


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


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """'did you mean "channel"? Allowed: channel, group, tensor' for a misspelt word."""
    names = sorted(str(name) for name in allowed)
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{guess}Allowed: {', '.join(names)}"


def near_few(word: str, names: Collection[str], there_are: str) -> str:
    """The same for names in a model. If there are many, only some are listed."""
    text = did_you_mean(word, names)
    if len(names) <= FEW:
        return text
    return f"{text.split('Allowed:')[0]}{there_are} {len(names)}, such as {', '.join(list(names)[:6])}"


def few(names: Iterable[str], most: int = 4) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class name."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def need(package: str, extra: str, why: str) -> MissingError:
    """The error for an optional package that is not installed."""
    return MissingError(f"{why} needs the package {package}. Install it with: pip install 'tersor[{extra}]'")
