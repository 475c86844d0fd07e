"""Described: the facts that `tersor show` prints of a file or folder, whatever it is.

a .tersor file, or the folder of a run      forms, bytes and history: report/show.py
report.json of a run                        its tables again
.safetensors, a state dict, a folder        names, shapes, dtypes, bytes, and what `pack` would do
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from tersor.errors import FormatError, SettingError, SiteError, few, near_few
from tersor.io.checkpoint import Checkpoint
from tersor.io.container import load_with
from tersor.io.name_hints import describe, left_alone
from tersor.io.patch.named_arrays import PATCH, kind_of
from tersor.measure.leaf_costs import leaf_costs_of
from tersor.pipeline import MODEL, REPORT
from tersor.report import weights_table
from tersor.report.html import write
from tersor.report.show import shown, tables
from tersor.report.table import report

Tables = Callable[[Any], Iterable[Any]]
UNFIT = (LookupError, TypeError, ValueError, AttributeError)  # of a document that is no report
RESULT = ("base", "result", "ledger", "bits", "steps", "sites")  # keys of every report


def described(
    path: Path,
    site: str | None = None,
    html: Path | None = None,
    *,
    key: str | None = None,
    every: bool = False,
) -> tuple[dict[str, Any], Tables]:
    """(the facts of a file or folder, the function that makes tables of them). `site`: a glob of names.
    `html`: also write a page, of a .tersor file. `key`: of a checkpoint with several networks. `every`:
    tables with a row for each tensor. FormatError for a file that is none of these, SiteError for a glob
    that matches nothing."""
    if path.is_dir() and all((path / name).is_file() for name in (MODEL, REPORT)):
        path /= MODEL
    kind = "weights" if path.is_dir() else kind_of(path)
    if kind == "" and path.suffix != ".tersor":
        kind = "report" if is_json(path) else "weights"
    if kind in ("report", "weights", PATCH) and html is not None:
        raise SettingError(
            f"show: --html draws where the bytes of a .tersor file are; leave it out for {path}"
        )
    if kind == PATCH:
        raise FormatError(
            f"{path}: it is a patch, which changes another file. Make that: tersor patch OLD {path} -o NEW"
        )
    if key is not None and kind != "weights":
        raise SettingError(f"show: --key is for a checkpoint with several networks, and not for {path}")
    if kind == "report":
        return of_report(path, site), partial(report, every=every)
    if kind == "weights":
        return of_weights(path, site, key), weights_table.tables
    result, leaves = load_with(path, lambda form, plain: tuple(leaf_costs_of(form, plain)))
    facts = shown(result, path, site, leaves=leaves)
    if html is not None:
        facts["html"] = write(facts, html, path)
    return facts, partial(tables, every=every)


def is_json(path: Path) -> bool:
    """Whether a file begins as a JSON object. A safetensors file begins with a length."""
    if not os.path.isfile(path):
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def of_report(path: Path, site: str | None) -> dict[str, Any]:
    """The facts in a run's report.json. FormatError if it is another document."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or (lacking := [key for key in RESULT if key not in facts]):
            raise FormatError(f"{path}: it is not the report.json of a run: it lacks {few(lacking)}")
        list(report(facts))
    except (UnicodeDecodeError, RecursionError, *UNFIT) as error:
        raise FormatError(f"{path}: it is not the report.json of a run: {str(error)[:100]}") from None
    return facts | {"sites": matching(facts["sites"], site, path)}


def of_weights(path: Path, site: str | None, key: str | None) -> dict[str, Any]:
    """The tensors of a checkpoint, and what pack would do with them."""
    with Checkpoint(path, key) as source:
        slots = matching(source.slots, site, path)
        sites = {name: describe(name, slot) for name, slot in slots.items()}
        kinds = {name: kind for kind, names in left_alone(sites, ()).items() for name in names}
        where = {name: part.name for part in source.files for name in part.names}
        along = source.folder.along if source.folder else {}
        tensors = {
            name: {
                "shape": list(slot.shape),
                "dtype": str(slot.dtype).removeprefix("torch."),
                "nbytes": math.prod(slot.shape) * slot.dtype.itemsize,
                "file": where[name],
                "steps": steps_would(sites[name].is_weight, kinds.get(name)),
            }
            for name, slot in slots.items()
        }
        return {
            "file": {"name": str(path), "nbytes": source.read_nbytes},
            "tensors": tensors,
            "sum": {"tensors": len(tensors), "nbytes": sum(found["nbytes"] for found in tensors.values())},
            "metadata": {part.name: dict(part.metadata) for part in source.files if part.metadata},
            "aliases": dict(source.aliases),
            "key": source.key,
            "attached": {name: file.stat().st_size for name, file in along.items()},
            "ignored": {name: count for name, count in source.ignored.items() if name not in along},
            "reasons": dict(source.reasons),
        }


def steps_would(is_weight: bool, kind: str | None) -> str:
    """What steps would do to a tensor, as far as its name and shape show."""
    return "change it" if is_weight else f"leave it: {kind}" if kind else "only code it"


def matching(found: Mapping[str, Any], glob: str | None, path: Path) -> dict[str, Any]:
    if glob is None:
        return dict(found)
    chosen = {name: item for name, item in found.items() if fnmatchcase(name, glob)}
    if not chosen:
        raise SiteError(f"{path}: no site {glob!r}; {near_few(glob, list(found), 'there are')}")
    return chosen
