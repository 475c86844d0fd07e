"""Encoder: how each array of NEW is coded in a patch: against which array of OLD, or alone.

cost    estimated on a sample of rows for each candidate; the chosen one is coded, and if that takes more
        bytes than the array takes in NEW, the array is also coded alone. Texts: texts.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tersor.encode import coded
from tersor.forms import PROFILES, Coded
from tersor.forms.form import as_bytes
from tersor.io.json_text import Json, deflate
from tersor.io.patch.named_arrays import NamedArrays
from tersor.io.patch.patch_reader import ALONE, SAME, TEXT
from tersor.io.patch.residual import fitted, residual_streams
from tersor.io.patch.texts import text_streams
from tersor.io.patch.uniform_grids import movable, regrid

SAMPLE = 1 << 14  # elements sampled to estimate the bytes of an array
MOST = 4  # OLD arrays with another name that are tried


class Target(NamedTuple):
    """An array of NEW to be coded."""

    array: Tensor
    part: Json  # entries of its part that do not depend on the base
    keep: Tensor | None = None


class Encoder:
    """Codes each array of NEW against the OLD array that gives the fewest bytes."""

    def __init__(self, before: NamedArrays, after: NamedArrays) -> None:
        self.before, self.after = before, after
        self.kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.twins: dict[str, str] = {}  # digest of an array, or of a stored leaf -> its name in OLD
        for name in before.names:
            array = before.array(name)
            self.kinds[name] = array.dtype, tuple(array.shape)
            self.twins.setdefault(digest_array(array), name)
            if before.tersor is not None:
                self.twins.setdefault(before.leaf(name).stored.digest, name)
        here = set(after.names)
        self.gone: dict[tuple[torch.dtype, tuple[int, ...]], list[str]] = {}  # arrays that NEW lacks, by kind
        for name in before.names:
            if name not in here:
                self.gone.setdefault(self.kinds[name], []).append(name)
        self.profiles: dict[str, str] = {}  # of coded leaves of NEW

    def part(self, name: str) -> tuple[Json, Iterable[bytes]]:
        """(the part of an array, its streams)."""
        if self.after.tersor is not None:
            stored = self.after.leaf(name).stored
            if isinstance(stored, Coded) and stored.digest in self.twins:
                return self.same(name, stored.digest), iter(())
        target = self.target(name)
        digest = digest_array(target.array)
        if digest in self.twins:
            return target.part | self.same(name, digest), iter(())
        if text := self.text(name, target.array):
            return text
        base, found = self.nearest(name, target)
        streams = residual_streams(target.array, base, target.keep)
        if base is None or "coder" not in target.part:
            return target.part | found, streams
        both = list(streams)
        if sum(map(len, both)) > self.after.leaf(name).stored.nbytes:  # the sample was misleading
            alone = list(residual_streams(target.array, None, target.keep))
            if sum(map(len, alone)) < sum(map(len, both)):
                return target.part | {"how": ALONE}, alone
        return target.part | found, both

    def same(self, name: str, digest: str) -> Json:
        twin = self.twins[digest]
        return {"how": SAME} | ({} if twin == name else {"of": twin})

    def text(self, name: str, array: Tensor) -> tuple[Json, list[bytes]] | None:
        """An attachment or a file beside the weights, coded against the earlier bytes of that name if there
        are any. None for other arrays, and where that is no shorter."""
        new = self.after.text(name)
        if new is None or ((stored := as_bytes(array).tobytes()) != new and stored != deflate(new)):
            return None
        lengths, streams = text_streams(new, self.before.text(name) or b"")
        shorter = sum(map(len, streams)) < sum(map(len, residual_streams(array, None)))
        return ({"how": TEXT, "text": lengths}, streams) if shorter else None

    def target(self, name: str) -> Target:
        """An array of NEW; a coded leaf is decoded if coding it again gives the same bytes."""
        if self.after.tersor is None:
            return Target(self.after.array(name), {})
        leaf = self.after.leaf(name)
        if not isinstance(leaf.stored, Coded):
            return Target(leaf.array, {})
        keep = self.after.array(leaf.keep) if leaf.keep else None
        known = leaf.keep is None or (leaf.keep != "" and self.is_decoded(leaf.keep))
        if name not in self.profiles:
            self.profiles[name] = profile_of(leaf.stored, leaf.array, keep) if known else ""
        profile = self.profiles[name]
        if not profile:
            return Target(leaf.stored.data, {})
        return Target(leaf.array, {"coder": profile} | ({"keep": leaf.keep} if leaf.keep else {}), keep)

    def is_decoded(self, leaf: str) -> bool:
        """Whether the reader of the patch has a leaf's elements, and not only its stored bytes."""
        stored = self.after.leaf(leaf).stored
        return (
            not isinstance(stored, Coded) or stored.digest in self.twins or "coder" in self.target(leaf).part
        )

    def nearest(self, name: str, target: Target) -> tuple[Tensor | None, Json]:
        """(the base with the fewest bytes, the entries of the part that name it)."""
        best: tuple[Tensor | None, Json] = (None, {"how": ALONE})
        least = cost(target, None)
        for other in self.candidates(name, target.array):
            found = fitted(self.before.array(other), tuple(target.array.shape), target.array.dtype)
            if found is None:
                continue
            named = {} if other == name else {"of": other}
            for base, entries in ((found, named), *self.regridded(name, other, found, named)):
                nbytes = cost(target, base)
                if nbytes < least:
                    least, best = nbytes, (base, entries)
        return best

    def candidates(self, name: str, array: Tensor) -> list[str]:
        """The OLD array of this name, else some that NEW lacks: the array may have been renamed."""
        if name in self.kinds:
            return [name]
        kind = array.dtype, tuple(array.shape)
        return self.gone.get(kind, [])[:MOST]

    def regridded(self, name: str, other: str, found: Tensor, named: Json) -> Iterator[tuple[Tensor, Json]]:
        """Old codes rounded to the new grid, if both are codes on uniform grids."""
        if self.before.tersor is None or self.after.tersor is None:
            return
        new = self.after.leaf(name)
        old = self.before.leaf(other).grid if new.grid is not None else None
        if old is None or new.grid is None or not movable(found, old, new.grid):
            return
        if all(map(self.is_decoded, new.tables)):
            yield regrid(found, old, new.grid), named | {"grid": True}


def digest_array(array: Tensor) -> str:
    sha = hashlib.sha256(f"{array.dtype} {tuple(array.shape)} ".encode())
    sha.update(as_bytes(array).data)
    return sha.hexdigest()


def cost(target: Target, base: Tensor | None) -> int:
    """Estimated bytes with this base: those of a sample of rows."""
    array, _, keep = target
    step = max(1, array.numel() // SAMPLE)
    if step > 1 and array.ndim and array.shape[0] > step:
        array = array[::step].contiguous()
        base = None if base is None else base[::step].contiguous()
        keep = None if keep is None else keep[::step].contiguous()
    return sum(map(len, residual_streams(array, base, keep, "fast")))


def profile_of(stored: Coded, array: Tensor, keep: Tensor | None) -> str:
    """The profile that codes the array to the stored bytes; "" if none does."""
    for profile in dict.fromkeys((stored.coder, *PROFILES)):
        if coded(array, keep, profile).replace(coder=stored.coder).digest == stored.digest:
            return profile
    return ""
