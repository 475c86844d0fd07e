"""Few bits: the note that names a better way where few bits are rounded to the nearest."""

from __future__ import annotations

from typing import Any

from tersor.core.view import View
from tersor.record.events import Note

FEW = 4  # bits from which on rounding to the nearest is far from the best
SCHEMES = ("uniform", "log")


def advice(step: Any, view: View) -> tuple[Note, ...]:
    """The note of a Quantize step; none where nothing better is known."""
    if step.scheme not in SCHEMES or step.bits > FEW or step.epochs or step.range == "fixed":
        return ()
    task, better = view.maybe_task, f"rdoq bits={step.bits}"
    if step.activations:  # integer kernels take one scale for each channel
        better += " per=channel before this step"
    if task is not None and task.calibrate is not None and step.scheme == "uniform":
        better = f"rounding=gptq or {better}"
    text = f"{step.bits} bits are rounded to the nearest; {better} loses less: docs/which.md"
    return (Note("", "advice", text),)
