"""Verify: a file checked site by site, all of it, with what was found; it does not stop at the first fault.

bytes against digests, forms against their rules, decoded values, the ledger against what is stored
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tersor.errors import FormatError
from tersor.forms import Form
from tersor.io.container import NUMBER, TersorFile
from tersor.io.pool import in_order
from tersor.model.changes import Replace


@dataclass(frozen=True)
class Check:
    """One site, or the file as a whole (site "")."""

    site: str
    sound: bool
    text: str
    nbytes: int = 0  # stored for this site


def verify(
    path: str | os.PathLike[str], *, limit: int | None = None, workers: int | None = None
) -> list[Check]:
    """A row for the file and one for each site. StorageError where the file cannot be opened."""
    try:
        file = TersorFile(path, limit=limit)
    except FormatError as error:
        return [Check("", False, str(error))]
    with file:
        size, kind = file.source.nbytes, "tiny" if file.source.tiny else f"format {NUMBER}"
        rows = [Check("", True, f"{kind}, {len(file.sites)} sites, text sound", size)]
        last = {entry.site: entry.after for entry in file.ledger.entries if entry.after}
        read, work = partial(read_site, file), partial(check_site, file)
        checks = in_order(file.sites, file.nbytes, read, work, workers)
        for name, row in zip(file.sites, checks, strict=True):
            rows.append(row)
            digest = file.digests[name]
            if last.get(name, digest) != digest:
                text = f"the ledger ends with form {last[name]}, the file holds {digest}"
                rows.append(Check(name, False, text))
        rows += [check_rest(edge, file.grid) for edge in file.grids]
        rows += [check_rest(name, file.attachment) for name in file.attachments]
        gone = tuple(f"{change.module}." for change in file.changes if isinstance(change, Replace))
        rows += [
            Check(site, False, "the ledger edits a site that the file lacks")
            for site in last
            if site not in file.sites and site not in file.grids and not site.startswith(gone)
        ]
        return rows


def check_rest(name: str, read: Callable[[str], Any]) -> Check:
    """An edge's grid, or an attachment."""
    try:
        found = read(name)
    except FormatError as error:
        return Check(name, False, str(error))
    nbytes = len(found) if isinstance(found, bytes) else found.nbytes
    return Check(name, True, f"{nbytes} bytes" if isinstance(found, bytes) else f"{found!r}", nbytes)


def read_site(file: TersorFile, name: str) -> Form | FormatError:
    try:
        return file.read(name)
    except FormatError as error:
        return error


def check_site(file: TersorFile, name: str, form: Form | FormatError) -> Check:
    if isinstance(form, FormatError):
        return Check(name, False, str(form))
    try:
        file.check(name, form)
        bad = not_finite(file.slices(name, form), buffer=file.sites[name].kind == "buffer")
    except FormatError as error:
        return Check(name, False, str(error))
    if bad:
        return Check(name, False, f"{bad} of {math.prod(form.shape)} values are NaN or infinite", form.nbytes)
    return Check(name, True, f"{form!r}", form.nbytes)


def not_finite(slices: Iterable[Tensor], *, buffer: bool) -> int:
    """How many values are NaN or infinite. A buffer may hold infinities: attention masks do."""
    count = 0
    for part in slices:
        if part.is_floating_point():
            wide = part.float() if part.dtype.itemsize == 1 else part  # 8-bit floats have no such test
            count += int((wide.isnan() if buffer else ~wide.isfinite()).sum())
    return count
