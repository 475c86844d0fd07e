"""Damaged and forged files: refused with a FormatError, or read; never another error, and both readers agree.

Three kinds: bytes changed anywhere; a text changed and its size and CRC put right; a text changed in meaning
with every digest put right, so that nothing but the rules of docs/format.md stands in the way.
"""

import contextlib
import copy
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import ROOT, Pieces, reference, take_apart

from tersor.errors import FormatError
from tersor.io import load

GOLDEN = ROOT / "tests" / "golden"
NAMES = (
    "model", "pruned-clustered-coded", "factors-and-rest", "halves", "dtypes", "coded-rans", "coded-huffman",
    "coded-packed", "coded-tables", "affine-groups", "codebook-rows", "loggrid-sums", "mask-in-mask",
)  # fmt: skip
SEEDS = {name: (GOLDEN / f"{name}.tersor").read_bytes() for name in NAMES}
ROUNDS = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 1
SECONDS = 5  # one read, on a slow machine

# What takes the place of a value: of the wrong type, out of range, huge, empty, words of the format.
VALUES: tuple[Any, ...] = (
    0, 1, 2, 3, -1, 7, 16, 255, 2**31, 2**40, 2**62, 2**70, 1.5, True, False, None, "", "x", "w", [], [0],
    [1], [2, 2], [3, 4], [1, 1], [3, 1], [0, 3], [2**40, 2**40], [2**61, 0, 2], [1] * 17, {},
    {"form": "dense"},
    {"form": "coded", "planes": [2]}, {"form": "coded", "planes": [2], "size": [2**20, 2**20]},
    "dense", "coded", "masked", "affine", "codebook", "loggrid", "lowrank", "sum", "float32", "float16",
    "bfloat16", "float64", "int8", "int16", "int64", "uint8", "bool", "complex64", "float8_e5m2",
)  # fmt: skip
KEYS = (
    "form", "shape", "dtype", "digest", "kind", "axis", "groups", "layer", "planes", "size", "pack", "kept",
    "bits", "group", "terms", "zero", "scale", "keep", "body", "codes", "index", "book", "a", "b",
)  # fmt: skip


def readers(path: Path, data: bytes) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any] | None]:
    """What the two readers make of a file; None where they refuse it."""
    path.write_bytes(data)
    began, first, said = time.perf_counter(), None, str(path)
    try:
        loaded = load(path)
        first = loaded.state_dict()
        loaded.ledger.digest  # noqa: B018  what is read can be reckoned with
    except FormatError as error:
        said = str(error)
    assert said.startswith(str(path))
    assert time.perf_counter() - began < SECONDS
    try:
        second = reference.read(path)
    except reference.BadFile:
        second = None
    return first, second


def agree(path: Path, data: bytes) -> bool:
    """Whether both readers read the file; it is a failure if one does, or if they read different things."""
    first, second = readers(path, data)
    assert (first is None) == (second is None), f"{'the second' if first is None else 'the first'} reads it"
    if first is None or second is None:
        return False
    assert first.keys() == second.keys()
    for name, value in first.items():
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert list(value.shape) == list(second[name].values.shape)
        # Where NaN comes in, its bits are not fixed.
        assert raw == second[name].values.tobytes() or bool(value.isnan().any())
    return True


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three changes anywhere: bits, bytes, cuts, pieces of this file or another."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 33))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(n) + data[at + n :]
        elif kind == 2:
            data = data[:at] + data[at + n :]
        elif kind == 3:
            data = data[:at] + rng.randbytes(n) + data[at:]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            other = rng.choice(list(SEEDS.values()))
            begin = rng.randrange(len(other))
            data = data[:at] + other[begin : begin + 8 * n] + data[at + rng.choice((0, 8 * n)) :]
        else:
            data = data[:at] + bytes([rng.choice(b'0123456789[]{}":,-.e \xff')]) + data[at + 1 :]
    return data


def test_changed_bytes(tmp_path: Path) -> None:
    rng, read = random.Random(1), 0
    for _ in range(1000 * ROUNDS):
        name = rng.choice(NAMES)
        data = mutated(SEEDS[name], rng)
        path = tmp_path / "m.tersor"
        first, _ = readers(path, data)
        if first is not None and data != SEEDS[name]:
            read += 1
    # What may change unseen: spaces behind the header, letters' case in no one's words.
    assert read <= 10 * ROUNDS


def test_changed_text(tmp_path: Path) -> None:
    rng = random.Random(2)
    for _ in range(400 * ROUNDS):
        pieces = take_apart(SEEDS[rng.choice(NAMES)])
        text = json.dumps(pieces.document, separators=(",", ":")).encode()
        agree(tmp_path / "m.tersor", pieces.with_text(mutated(text, rng) or b" "))


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    found: list[tuple[Any, Any]] = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


def forged(pieces: Pieces, rng: random.Random) -> Pieces:
    """One to three changes of what the text says, or of the bytes it speaks of."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        # Trees are the most of what a reader must check.
        sites = [s for s in pieces.document["sites"].values() if isinstance(s, dict) and "form" in s]
        below = [place for site in sites for place in places(site["form"])]
        spots = below if below and rng.random() < 0.7 else places(pieces.document)
        holder, key = rng.choice(spots)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, name = rng.choice(spots)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = json.loads(json.dumps(other[name]))
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and pieces.small:
            pieces.small = mutated(pieces.small, rng)
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        if not isinstance(pieces.document.get("sites"), dict):
            break
    return pieces


def test_forged_text(tmp_path: Path) -> None:
    rng, read = random.Random(3), 0
    for _ in range(600 * ROUNDS):
        pieces = forged(take_apart(SEEDS[rng.choice(NAMES)]), rng)
        with contextlib.suppress(reference.BadFile, KeyError, TypeError, AttributeError):
            pieces.sign()  # or it is not even a tree, and goes unsigned
        read += agree(tmp_path / "m.tersor", pieces.bytes())
    assert read >= 15 * ROUNDS  # some changes are legal, or nothing behind the digests was tried


@pytest.mark.parametrize("name", NAMES)
def test_every_length(name: str, tmp_path: Path) -> None:
    """No beginning of a file is a file."""
    data, path = SEEDS[name], tmp_path / "m.tersor"
    for length in {*range(0, len(data), 1 + len(data) // 80), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            load(path)


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_byte_of_payload_is_seen(name: str, tmp_path: Path) -> None:
    """Or it changes nothing: deflate leaves up to 7 bits of the text's last byte alone."""
    data, path = SEEDS[name], tmp_path / "m.tersor"
    start, unseen = 8 + int.from_bytes(data[:8], "little"), 0
    for at in range(start, len(data), 1 + (len(data) - start) // 150):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            read = load(path)
        except FormatError:
            continue
        unseen += 1
        whole = load(GOLDEN / f"{name}.tersor")
        assert read.digest == whole.digest
        assert read.ledger.digest == whole.ledger.digest
        assert dict(read.sites) == dict(whole.sites)
    assert unseen <= 1
