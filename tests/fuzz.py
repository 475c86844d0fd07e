"""Mutated files, by the hundred thousand: python tests/fuzz.py --files 200000 [--seed 1] [--keep FOLDER]

Each is a golden file, or one of a coder's streams, changed in one of five ways. In all but the last one the
checksums are put right again, so that nothing but the rules of docs/format.md and docs/streams.md stands in
the way:
    leaves    the bytes of leaves       forged    what the text says
    text      the text's own bytes      short     bytes behind the short header
    bytes     anything, anywhere
A file is read, or refused with an error of Tersor's own, within SECONDS and in the memory that it justifies.
All else (another error, a crash of the interpreter, a hang) is a finding: its file is kept.
"""

import argparse
import contextlib
import copy
import faulthandler
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from forge import ROOT, Pieces, one_site, reference, take_apart, tiny_file

GOLDEN = ROOT / "tests" / "golden"
NAMES = (
    "model", "pruned-clustered-coded", "factors-and-rest", "halves", "dtypes", "coded-rans", "coded-huffman",
    "coded-packed", "coded-tables", "affine-groups", "codebook-rows", "loggrid-sums", "mask-in-mask",
    "cuts", "replaced", "grids", "attachments", "history", "tiny-model", "tiny-composed", "tiny-cuts",
    "tiny-grids",
)  # fmt: skip
SEEDS = {name: (GOLDEN / f"{name}.tersor").read_bytes() for name in NAMES}
SHORT = ("sites", "aliases", "indices", "changes", "grids")  # keys of a text behind the short header
KINDS = ("leaves", "forged", "text", "short", "bytes")
BATCH = 5000  # files that one process reads
SECONDS = 10  # for one file, on a slow machine
ROOM = 512 << 20  # address space that threads and caches may take, besides what files justify

# What takes the place of a value: of the wrong type, out of range, huge, empty, words of the format.
VALUES: tuple[Any, ...] = (
    0, 1, 2, 3, -1, 7, 16, 255, 2**31, 2**40, 2**62, 2**70, 1.5, True, False, None, "", "x", "w", [], [0],
    [1], [2, 2], [3, 4], [1, 1], [3, 1], [0, 3], [2**40, 2**40], [2**61, 0, 2], [1] * 17, {},
    {"form": "dense"},
    {"form": "coded", "planes": [2]}, {"form": "coded", "planes": [2], "size": [2**20, 2**20]},
    {"0": 0}, {"form": "grid", "scale": {"form": "dense", "shape": [1]}}, [0, 2**30], [2**31 - 1, 1],
    [[0, 1]], ["set", "m", "n", 1], ["replace", "m", "identity", {}], [0, "wrap"], ["", "", "done", "so"],
    "0" * 16, "cut", "grid", "dense", "coded", "masked", "affine", "codebook", "loggrid", "lowrank", "sum",
    "float32", "float16", "bfloat16", "float64", "int8", "int16", "int64", "uint8", "bool", "complex64",
    "float8_e5m2",
)  # fmt: skip
KEYS = (
    "form", "shape", "dtype", "digest", "kind", "axis", "groups", "layer", "planes", "size", "pack", "kept",
    "bits", "group", "terms", "zero", "scale", "keep", "body", "codes", "index", "book", "a", "b",
    "indices", "origin", "changes", "grids", "attachments", "past", "seed", "step", "nbytes", "deflated", "0",
    "signed", "stale", "runs", "member", "coder",
)  # fmt: skip


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
        sites = [*pieces.document["sites"].values()]
        sites += grids.values() if isinstance(grids := pieces.document.get("grids", {}), dict) else ()
        sites = [s for s in sites if isinstance(s, dict) and "form" in s]
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


def signed(pieces: Pieces, rng: random.Random) -> bytes:
    """The file with every digest right; or as it is, where it is not even a tree."""
    with contextlib.suppress(reference.BadFile, KeyError, TypeError, AttributeError):
        pieces.sign()
    with contextlib.suppress(KeyError, TypeError, AttributeError, zlib.error):
        for name, told in pieces.document["attachments"].items():
            data = pieces.tensors[f"attachment:{name}"][2]
            if told.get("deflated"):
                unpacker = zlib.decompressobj(-15, reference.DICTIONARY)
                data = unpacker.decompress(data, 65536)
                told["nbytes"] = rng.choice((told["nbytes"], len(data)))
            told["sha256"] = hashlib.sha256(data).hexdigest()
    return pieces.bytes()


def changed_text(data: bytes, rng: random.Random) -> bytes:
    pieces = take_apart(data)
    text = json.dumps(pieces.document, separators=(",", ":")).encode()
    return pieces.with_text(mutated(text, rng) or b" ")


def changed_leaves(data: bytes, rng: random.Random) -> bytes:
    """Some leaf's bytes changed, not how many they are, and every digest right."""
    pieces = take_apart(data)
    spots = ["", *pieces.tensors] if pieces.small else list(pieces.tensors)
    name = rng.choice(spots) if spots else ""
    old = pieces.tensors[name][2] if name else pieces.small
    new = (mutated(old, rng) + rng.randbytes(len(old)))[: len(old)]
    if name:
        pieces.tensors[name] = (*pieces.tensors[name][:2], new)
    else:
        pieces.small = new
    return signed(pieces, rng)


def stream_files() -> dict[str, bytes]:
    """A file of one coded leaf by each coder that takes the symbols, a matrix of 10 columns."""
    from tersor.coders import CODERS, MATRIX_CODERS, encode
    from tersor.errors import TersorError

    rng = np.random.default_rng(0)
    symbols = {
        "few": rng.integers(0, 3, 40), "many": rng.integers(0, 256, 700), "one": np.full(30, 7),
        "skewed": np.minimum(rng.geometric(0.4, 900), 255), "long": np.minimum(rng.geometric(0.1, 6000), 255),
        "wide": np.rint(rng.normal(128, 9, 70_000)),
    }  # fmt: skip
    found = {}
    for coder in (*CODERS, *MATRIX_CODERS):
        for kind, values in symbols.items():
            if kind == "wide" and coder not in ("rans", "pieces"):
                continue  # it is for many states at once; the others take long for so many symbols
            if kind == "long" and coder == "mixing":
                values = values[:1500]  # of which the second reader, in plain Python, asks 60,000 contexts
            with contextlib.suppress(TersorError):  # a coder of constants takes no others
                stream, shape = encode(values.astype(np.uint8), coder, width=10), [len(values) // 10, 10]
                form = {"form": "coded", "planes": [len(stream)], "size": shape, "dtype": "uint8"}
                pieces = one_site(form, shape, stream, dtype="uint8")
                found[f"{coder}-{kind}"] = pieces.sign().bytes()
    return found


def mutant(seeds: dict[str, bytes], rng: random.Random) -> tuple[str, bytes]:
    """(kind, file)."""
    kind, data = rng.choice(KINDS), seeds[rng.choice(list(seeds))]
    if kind == "leaves":
        return kind, changed_leaves(data, rng)
    if kind == "forged":
        return kind, signed(forged(take_apart(data), rng), rng)
    if kind == "text":
        return kind, changed_text(data, rng)
    if kind == "short":
        pieces = take_apart(data)
        if not pieces.tensors:  # all files may have it, but for those with leaves of their own
            pieces.tiny = True
            held = [*pieces.document["sites"].values(), *pieces.document.get("grids", {}).values()]
            for one in held:
                one.pop("digest", None)
            pieces.document = {key: pieces.document[key] for key in SHORT if key in pieces.document}
            return kind, tiny_file(mutated(pieces.bytes()[8:], rng))
    return "bytes", mutated(data, rng)


def examine(path: Path, rng: random.Random) -> str:
    """Read a file: "read" or "refused". Any error but a FormatError comes out."""
    from tersor.errors import FormatError
    from tersor.io.container import TersorFile, load
    from tersor.io.unpack import unpack
    from tersor.io.verify import verify

    try:
        loaded = load(path)
        loaded.state_dict()
        loaded.ledger.digest, loaded.digest  # noqa: B018  what is read can be reckoned with
    except FormatError as error:
        if not str(error).startswith(str(path)):
            raise ValueError(f"the file is not named: {error}") from None
    else:
        if rng.random() < 0.4:
            shown_and_compared(path, path.parent)  # what is sound can be shown and compared
        return "read"
    other = rng.randrange(30)
    if other == 0 and all(row.sound for row in verify(path) if "NaN" not in row.text):
        raise ValueError("load refuses it, verify finds nothing")
    if other == 1:
        with contextlib.suppress(FormatError), TersorFile(path) as file:
            for name in file.sites:
                file.tensor(name)
    if other == 2:
        with contextlib.suppress(FormatError):
            unpack(path, path.with_suffix(".safetensors"))
    if other == 3:
        with contextlib.suppress(reference.BadFile):
            reference.read(path)
            raise ValueError("load refuses it, the second reader reads it")
    return "refused"


def shown_and_compared(path: Path, folder: Path) -> None:
    """Print a file's tables, write its page, and make a patch from another file to it."""
    from tersor.io.container import load
    from tersor.io.patch.diff import diff
    from tersor.io.patch.patch import patch
    from tersor.report.console import to_json
    from tersor.report.html import page
    from tersor.report.show import shown, tables

    facts = shown(load(path), path)
    list(tables(facts)), page(facts), to_json(facts)
    other, made, again = folder / "other.tersor", folder / "p", folder / "again"
    other.write_bytes(SEEDS["pruned-clustered-coded"])
    diff(other, path, made)
    patch(other, made, again)
    if again.read_bytes() != path.read_bytes():
        raise ValueError("the patch makes another file")


def batch(folder: Path, first: int, last: int, seed: int) -> None:
    """Read files `first` to `last` and print the outcomes. What is being read lies in the folder."""
    import torch

    from tersor.io.container import load

    torch.set_num_threads(1)
    seeds = SEEDS | stream_files()
    case = folder / "case.tersor"
    for data in seeds.values():  # all loops are loaded before memory is measured
        case.write_bytes(data)
        load(case).state_dict()
    shown_and_compared(case, folder)

    def check(path: Path, rng: random.Random) -> str:
        kind, data = mutant(seeds, rng)
        path.write_bytes(data)
        return f"{kind} {examine(path, rng)}"

    limited(folder, first, last, seed, check)


def limited(
    folder: Path, first: int, last: int, seed: int, check: Callable[[Path, random.Random], str]
) -> None:
    """Check files `first` to `last` with limits of time and memory, and print the outcomes."""
    from tersor.io.validate import limit_for

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = size + 24 * limit_for(1 << 16) + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    counts: Counter[str] = Counter()
    for number in range(first, last):
        rng = random.Random(f"{seed}/{number}")
        (folder / "at").write_text(str(number))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        counts[check(folder / "case.tersor", rng)] += 1
        faulthandler.cancel_dump_traceback_later()
    print(json.dumps(counts))


def run(
    files: int, seed: int, keep: Path, say: Callable[[str], Any] = print, script: str | None = None
) -> tuple[Counter[str], list[str]]:
    """(outcomes by kind, what was found)."""
    counts: Counter[str] = Counter()
    found: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder, first = Path(name), 0
        while first < files:
            last = min(first + BATCH, files)
            words = [str(folder), str(first), str(last), str(seed)]
            done = subprocess.run(
                [sys.executable, script or __file__, "--batch", *words],
                check=False,
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                counts.update(json.loads(done.stdout))
                first = last
            else:
                number = int((folder / "at").read_text())
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{number}.tersor").write_bytes((folder / "case.tersor").read_bytes())
                found.append(f"file {number} (exit {done.returncode}): {done.stderr.strip()[-1500:]}")
                say(found[-1])
                counts["found"] += 1
                counts["lost"] += (
                    number - first
                )  # checked before it in this batch; the worker printed nothing
                first = number + 1
            say(f"{first:,} files: {dict(sorted(counts.items()))}")
    return counts, found


def main(script: str = __file__, work: Callable[[Path, int, int, int], None] = batch) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--keep", type=Path, default=Path("out/fuzz"), help="folder for files that were found"
    )
    parser.add_argument("--batch", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch:
        folder, first, last, seed = options.batch
        work(Path(folder), int(first), int(last), int(seed))
        return 0
    _, found = run(options.files, options.seed, options.keep, script=script)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
