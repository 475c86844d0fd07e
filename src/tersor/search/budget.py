"""Budget: what a compressed model may lose, weigh and take: "drop<=0.5,size<=10%,latency<=50%@onnxruntime".

drop      the loss of the task's metric, in points if it is a share (accuracy), else in its own unit
size      bytes of the .tersor file: a share of the given weights as safetensors, or 200kB, 3MB, 512B
latency   a call in a runtime: a share of the given model's in the same runtime, or 2ms
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tersor.errors import SettingError, did_you_mean
from tersor.runtimes import RUNTIMES

EXAMPLE = "drop<=0.5,size<=10%,latency<=50%@onnxruntime"
PART = re.compile(r"(?P<word>\w+)\s*<=\s*(?P<number>[0-9.eE+-]+)\s*(?P<unit>%|[A-Za-z]*)(@(?P<runtime>\w+))?")
BYTES = {"B": 1.0, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
UNITS: dict[str, dict[str, float]] = {"drop": {"": 1.0}, "size": BYTES, "latency": {"ms": 1.0, "s": 1000.0}}
UNMEASURED = {"energy": "no counter of energy is read; bound latency, which it mostly follows"}


@dataclass(frozen=True)
class Bound:
    """The most that something may be: a share of the given model's, or a number of bytes or ms."""

    most: float
    share: bool

    def __str__(self) -> str:
        return f"{100 * self.most:g}%" if self.share else f"{self.most:g}"

    def used(self, value: float, given: float) -> float:
        """How much of the bound `value` takes, where the given model has `given`: above 1 it is over."""
        return value / (self.most * given if self.share else self.most)


@dataclass(frozen=True)
class Budget:
    """The bounds, of which None is no bound."""

    drop: float | None = None
    size: Bound | None = None
    latency: Bound | None = None
    runtime: str | None = None  # that latency is measured in

    def __str__(self) -> str:
        parts = [] if self.drop is None else [f"drop<={self.drop:g}"]
        parts += [] if self.size is None else [f"size<={self.size}{'' if self.size.share else 'B'}"]
        if self.latency is not None:
            parts.append(f"latency<={self.latency}{'' if self.latency.share else 'ms'}@{self.runtime}")
        return ",".join(parts)


def read_budget(text: str) -> Budget:
    """The budget in words. SettingError says what is allowed."""
    found: dict[str, float | Bound] = {}
    runtime = None
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = PART.fullmatch(part)
        if match is None:
            raise SettingError(f"budget: {part!r} is no bound. Write {EXAMPLE}, or some of these")
        word, unit = match["word"], match["unit"]
        if word in UNMEASURED:
            raise SettingError(f"budget: {part!r}, but {UNMEASURED[word]}")
        if word not in UNITS:
            raise SettingError(f"budget: {part!r}; {did_you_mean(word, UNITS)}")
        if word in found:
            raise SettingError(f"budget: {word} is bounded twice; give it once")
        share = unit == "%" and word != "drop"
        if not share and unit not in UNITS[word]:
            units = [*UNITS[word]] if word == "drop" else ["%", *UNITS[word]]
            what = "a plain number, in points of the metric" if word == "drop" else f"in {', '.join(units)}"
            raise SettingError(f"budget: {part!r}, but {word} is {what}. Write {EXAMPLE}")
        number = plain(match["number"], part) * (0.01 if share else UNITS[word][unit])
        if match["runtime"] is not None and word != "latency":
            raise SettingError(f"budget: {part!r}, but only latency is measured in a runtime")
        if word == "latency":
            runtime = match["runtime"] or "onnxruntime"
            if runtime not in RUNTIMES:
                raise SettingError(
                    f"budget: {part!r}: runtime {runtime!r}; {did_you_mean(runtime, RUNTIMES)}"
                )
        found[word] = number if word == "drop" else Bound(number, share)
    if not found:
        raise SettingError(f"budget: it is empty. Write {EXAMPLE}, or some of these")
    return Budget(**found, runtime=runtime)  # type: ignore[arg-type]


def plain(text: str, part: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise SettingError(f"budget: {part!r}, but {text!r} is no number above 0")
    return number
