"""Console: data on stdout, messages on stderr, numbers in one style.

With --json, stdout holds one JSON document and nothing else. Numbers that are not finite become null, since
JSON cannot hold them. Color never carries meaning alone, so plain text is complete.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tersor.errors import one_line, visible
from tersor.threads import first

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

NARROWEST = 100  # columns if the output is no terminal: a pipe has no width of its own
SMALLEST = 80  # columns of a terminal: a narrower one breaks the lines, else columns would vanish


def stdout() -> Console:
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  exits.ended handles it; rich would exit with 1

        def render_str(self, text: str, **more: Any) -> Any:
            """Every text goes through here, of lines and of cells: each is one line."""
            return super().render_str(visible(text), **more)

    # Looked up at each call: tests and callers may have put another stream in its place.
    width = None if sys.stdout.isatty() else NARROWEST
    return Ours(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def show(parts: Iterable[RenderableType]) -> None:
    """Print tables and lines on stdout."""
    if not first():
        return
    from rich.table import Table

    console = stdout()
    width, wide = max(console.width, SMALLEST), not sys.stdout.isatty()
    console.width = width
    for part in parts:
        if wide and isinstance(part, Table):  # no width limit: whole names can be searched for
            names = part.columns[0]
            names.no_wrap = True
            console.width = width + max((len(visible(str(name))) for name in names.cells), default=0)
        console.print(part, soft_wrap=isinstance(part, str))


def show_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    if first():
        print(to_json(document))


def to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(finite(document), indent=1, allow_nan=False)


def talk(text: str) -> None:
    """A line for people, on stderr."""
    if first():
        print(one_line(text), file=sys.stderr, flush=True)


def finite(value: Any) -> Any:
    """The value with None in place of infinities and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def whole(number: int) -> str:
    """12345 -> "12,345"."""
    return f"{number:,}"


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def ranged(ends: Sequence[float | None], digits: int, word: str = "-") -> str:
    """Two ends of an interval: 97.23 - 99.04."""
    low, high = ends
    if low is None or high is None:
        return "unknown"
    return f"{low:.{digits}f} {word} {high:.{digits}f}"


def settings(values: Mapping[str, Any]) -> str:
    """Settings as words of the command line: "keep=0.1 epochs=40 latency=true"."""
    return " ".join(f"{key}={setting(value)}" for key, value in values.items())


def setting(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 120 else f"{s / 60:.1f} min"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.995 else "p = 1"
