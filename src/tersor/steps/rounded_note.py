"""Rounded note: what rounding did to one site: the grid, and the signal to noise ratio of its weights.

decibels = 10 log10(sum w^2 / sum (w - rounded)^2), in float64: squares of float32 may overflow or underflow
"""

from __future__ import annotations

import math

from tersor.forms import Form
from tersor.record.events import Note


def rounded_note(site: str, before: Form, after: Form, grid: str) -> Note:
    """`grid`: in words, such as "4 bits"."""
    power = error = 0.0
    for old, new in zip(before.slices(), after.slices(), strict=True):
        old, new = old.double(), new.double()
        power += float(old.square().sum())
        error += float((old - new).square().sum())
    exact = not (error > 0 and power > 0)
    decibels = math.inf if exact else 10 * math.log10(power / error)
    text = f"{grid}, exact" if exact else f"{grid}, signal to noise {decibels:.1f} dB"
    return Note(site, "done", text, {} if exact else {"decibels": round(decibels, 3)})
