"""Delta: what changed from one file of weights to the next, and the next file from it. docs/format.md section 12.

diff    each array of NEW told by the array of OLD that tells it shortest: same name, else same shape, else none
patch   the same arrays, coded as they were, in a file of the same bytes; a wrong OLD is refused by its digest
Files other than .tersor and single .safetensors come back as one .safetensors file with the same tensors.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tersor.core.view import Watch
from tersor.files import atomic
from tersor.forms import Coded, coded
from tersor.forms.form import as_bytes
from tersor.io.change import fitted, tell
from tersor.io.parts import Parts
from tersor.io.tensors import TensorWriter, bytes_tensor
from tersor.io.text import deflate, dump

NUMBER = 1
TEXT, STREAMS = "patch", "streams"
PROFILES = ("max", "fast", "huffman", "rans")  # one of them wrote a coded leaf, or it is told as bytes
SAMPLE = 1 << 14  # elements that tell which array of OLD is nearest
MOST = 4  # arrays of OLD with another name that are tried


@dataclass(frozen=True)
class Delta:
    """What diff did."""

    nbytes: int  # of the patch
    new: int  # bytes of the new file
    arrays: int
    same: int  # of them, told as one of OLD
    changed: int  # told by one of OLD
    alone: int  # told without


def diff(
    old: str | os.PathLike[str], new: str | os.PathLike[str], out: str | os.PathLike[str],
    *, watch: Watch | None = None,
) -> Delta:  # fmt: skip
    """Write what makes NEW of OLD: .tersor files or checkpoints, in any pairing. FormatError where one of them
    is not sound."""
    watch = watch or Watch()
    with ExitStack() as stack:
        before, after = stack.enter_context(Parts(old)), stack.enter_context(Parts(new))
        text: dict[str, Any] = {"old": before.digest(), **frame(after)}
        telling = Telling(before, after)
        file = stack.enter_context(atomic(out))
        spool = stack.enter_context(tempfile.TemporaryFile(dir=str(Path(out).parent)))
        text["parts"] = {}
        for number, name in enumerate(after.names, 1):
            part, streams = telling.part(name)
            text["parts"][name] = part
            for stream in streams:
                spool.write(stream)
            watch.progress(number, len(after.names), name)
        size = spool.tell()
        spool.seek(0)
        nbytes = write_patch(file, text, spool, size, Path(out).parent)
        whole = sum(
            f.stat().st_size for f in ([after.path] if after.path.is_file() else after.path.iterdir())
        )
        hows = [part.get("how", "alone") for part in text["parts"].values()]
        same, alone = hows.count("same"), hows.count("alone")
        return Delta(nbytes, whole, len(hows), same, len(hows) - same - alone, alone)


def frame(after: Parts) -> dict[str, Any]:
    """What the patch must say of NEW besides its arrays."""
    if after.tersor is not None:
        file = after.tersor
        large = {
            name: [str(place.dtype).removeprefix("torch."), list(place.shape)]
            for name, place in file.places.found.items()
            if not place.small
        }
        return {
            "kind": "tersor",
            "tiny": file.source.tiny,
            "text": file.text,
            "large": large,
            "new": after.digest(),
        }
    if after.path.is_file():
        with open(after.path, "rb") as source:
            first = source.read(9)
            if first[8:] == b"{":
                head = source.read(int.from_bytes(first[:8], "little") - 1)
                return {"kind": "safetensors", "head": "{" + head.decode(), "new": after.digest()}
    slots = after.checkpoint.slots if after.checkpoint else {}
    listed = [
        [name, str(slot.dtype).removeprefix("torch."), list(slot.shape)] for name, slot in slots.items()
    ]
    return {
        "kind": "tensors",
        "tensors": listed,
        "aliases": dict(after.checkpoint.aliases) if after.checkpoint else {},
    }


class Telling:
    """Finds for each array of NEW what tells it shortest."""

    def __init__(self, before: Parts, after: Parts) -> None:
        self.before, self.after = before, after
        self.digests = {
            hashlib.sha256(as_bytes(before.array(name)).data).digest(): name
            for name in reversed(before.names)
        }
        self.gone = [name for name in before.names if name not in after.known]

    def part(self, name: str) -> tuple[dict[str, Any], list[bytes]]:
        array, part = self.after.array(name), {}
        keep = None
        if self.after.tersor is not None:
            leaf = self.after.leaf(name)
            if isinstance(leaf.stored, Coded):
                masks = {} if not leaf.keep else {"keep": leaf.keep}
                keep = self.after.array(leaf.keep) if leaf.keep else None
                coder = "" if leaf.keep == "" else wrote(leaf.stored, array, keep)
                if coder:
                    part = {"coder": coder, **masks}
                else:  # told as the bytes it is
                    array, keep = leaf.stored.data, None
        twin = self.digests.get(hashlib.sha256(as_bytes(array).data).digest())
        if twin is not None and like(self.before.array(twin), array):
            return part | {"how": "same"} | ({} if twin == name else {"of": twin}), []
        base, more, told = self.nearest(name, array, keep)
        how, streams = tell(array, base, keep) if told is None else told
        part |= more
        if more:
            part["how"] = how
        elif how != "subtract":
            part["alone"] = how
        return part | {"n": [len(stream) for stream in streams]}, streams

    def nearest(
        self, name: str, array: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, dict[str, Any], tuple[str, list[bytes]] | None]:
        """(base, how to find it, what it tells if that is known already)."""
        zeros = torch.zeros(array.shape, dtype=array.dtype)
        best: tuple[Tensor, dict[str, Any]] = (zeros, {})
        least = cost(array, zeros, keep)
        names = [name] if name in self.before.known else self.like(array)
        for other in names:
            found = fitted(self.before.array(other), tuple(array.shape), array.dtype)
            if found is None:
                continue
            named = {"of": other} if other != name else {"of": ""}
            for base, more in [(found, {}), *self.moved(name, other, found)]:
                price = cost(array, base, keep)
                if price < least:
                    least, best = price, (base, named | more)
        return *best, None

    def like(self, array: Tensor) -> list[str]:
        """Arrays that only OLD has, of this dtype and shape: one of them may have been renamed."""
        found = []
        for name in self.gone:
            if len(found) < MOST and like(self.before.array(name), array):
                found.append(name)
        return found

    def moved(self, name: str, other: str, found: Tensor) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Old codes rounded to the new grid, where both are codes of grids with a scale for all or each row."""
        if (
            self.before.tersor is None
            or self.after.tersor is None
            or found.dtype not in (torch.int8, torch.int16)
        ):
            return
        old, new = self.before.leaf(other).scale, self.after.leaf(name).scale
        if old is None or new is None or old.shape != new.shape or torch.equal(old, new):
            return
        ratio = (old.double() / new.double()).float()
        if ratio.isfinite().all() and ratio.numel() in (1, found.shape[0]):
            yield regrid(found, ratio), {"grid": ratio.flatten().tolist()}


def regrid(codes: Tensor, ratio: Tensor) -> Tensor:
    limits = torch.iinfo(codes.dtype)
    factor = ratio.double().reshape(-1, *[1] * (codes.ndim - 1))
    return (codes.double() * factor).round().clamp(limits.min, limits.max).to(codes.dtype)


def like(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


def cost(array: Tensor, base: Tensor, keep: Tensor | None) -> int:
    """Bytes that a sample of rows takes with this base."""
    rows = array.shape[0] if array.ndim else 1
    step = max(1, array.numel() // SAMPLE)
    if step > 1 and rows > step:
        array, base = array[::step].contiguous(), base[::step].contiguous()
        keep = None if keep is None else keep[::step].contiguous()
    return sum(map(len, tell(array, base, keep)[1]))


def wrote(stored: Coded, array: Tensor, keep: Tensor | None) -> str:
    """The profile that codes the array to the very bytes that are stored; empty where none does."""
    for profile in PROFILES:
        again = coded(array, keep, profile)
        if again.digest == stored.digest:
            return profile
    return ""


def write_patch(file: BinaryIO, text: Any, spool: BinaryIO, size: int, folder: Path) -> int:
    raw = dump(text)
    with TensorWriter(folder) as tensors:
        tensors.add(TEXT, bytes_tensor(deflate(raw)))
        streams = torch.from_numpy(np.fromfile(spool, dtype=np.uint8, count=size))
        tensors.add(STREAMS, streams)
        crc = zlib.crc32(streams.numpy().data)
        return tensors.finish(
            file,
            {"tersor-patch": str(NUMBER), "size": str(len(raw)), "crc": f"{zlib.crc32(raw):08x}{crc:08x}"},
        )
