"""Left: the parameters that a step's `where` means and that it leaves alone for their dtype, by name.

Integers, complex numbers, floats of 8 bits: no step rewrites them and no training moves them (dtypes.py), so
nobody would hear of them. The executor notes them once for each step, behind what the step itself says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tersor.dtypes import left_as
from tersor.model.sites import Site, globs_of
from tersor.record.events import Group, Note
from tersor.record.ledger import Ledger

LEFT = "left as they are"  # the key of the executor's group of such notes


def left_alone(
    step: Any, sites: Mapping[str, Site], ledger: Ledger, at: int, done: Collection[str]
) -> Group | None:
    """The notes of step number `at`, which has run; None where nothing is left. `done`: sites that are not
    meant."""
    if getattr(step, "lossless", False):  # it leaves nothing as it was that it could change
        return None
    spoken = {entry.site for entry in ledger.entries if entry.step == at} | set(done)
    notes = [
        Note(site.name, "skipped", left_as(site.dtype))
        for site in sites.values()
        if site.kind != "buffer" and not site.floating and site.name not in spoken
        if meant(step.where, site.name)
    ]  # fmt: skip
    return Group(LEFT, tuple(notes)) if notes else None


def meant(where: str | Collection[str], name: str) -> bool:
    """Whether the globs mean a site of this name, whatever it is."""
    wanted, unwanted = (any(fnmatchcase(name, glob) for glob in globs) for globs in globs_of(where))
    return wanted and not unwanted
