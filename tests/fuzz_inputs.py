"""Other inputs, mutated: python tests/fuzz_inputs.py --files 200000 [--seed 1] [--keep FOLDER]

patch          a patch and its OLD: bytes anywhere, or its text with the checksums put right again
safetensors    a file of weights: bytes anywhere, or the entries of its header
pt             a file of torch.save, of both kinds: bytes anywhere, or in its pickle
recipe         YAML: characters, lines and values
Each is taken, or refused with an error of Tersor's own, within SECONDS and a bounded memory. fuzz.py mutates
.tersor files; its frame is used here.
"""

import contextlib
import io
import json
import random
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fuzz
from forge import header_of, reference, safetensors_file, with_header

KINDS = ("patch", "safetensors", "pt", "recipe")
RECIPE = """tersor: 1
seed: 3
steps:
- prune: {keep: 0.3, per: tensor, where: ["*.weight", "!head*"]}
- quantize: {bits: 4, per: group, group: 16, symmetric: false}
- cluster: {entries: 8}
- rdoq: {bits: 3.5, per: both}
- entropy: {coder: fast}
"""
WORDS = (
    "*a", "&a ", "[*a, *a]", "{", "}", "[", "- ", ": ", "\n", "\t", "!!python/object:os.system ", "!!binary ",
    "~", ".inf", ".nan", "1e999", "0x7f", "2001-01-01", "'", '"', "|", ">", "%", "\0", "\x1b[2J", "9" * 5000,
    "null", "true", "-1", "<<: *a", "? ", "? [a]\n: b", "\ud7ff", "x" * 9000, "[" * 3000,
)  # fmt: skip


class Seeds(NamedTuple):
    """What is mutated, and the OLD file of the patches."""

    old: bytes
    patches: list[bytes]
    weights: list[bytes]
    pickles: list[bytes]


def seeds() -> Seeds:
    import torch
    from safetensors.torch import save

    from tersor.core.recipe import Recipe
    from tersor.io.pack import pack
    from tersor.io.patch.diff import diff
    from tersor.steps import Entropy, Prune, Quantize

    def values(seed: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(seed)
        return {
            "a.weight": torch.randn(12, 9, generator=rng), "a.bias": torch.randn(12, generator=rng).half(),
            "n": torch.tensor(seed), "m": torch.randn(3, 4, generator=rng) > 0,
        }  # fmt: skip

    recipe = Recipe((Prune(keep=0.5, per="tensor"), Quantize(bits=5), Entropy()))
    weights, patches = [save(values(seed)) for seed in (0, 1)], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for word, data in zip("ab", weights, strict=True):
            (folder / word).write_bytes(data)
            pack(folder / word, folder / f"{word}.tersor", recipe)
        old = (folder / "a.tersor").read_bytes()
        for new in ("b.tersor", "b"):
            diff(folder / "a.tersor", folder / new, folder / "p")
            patches.append((folder / "p").read_bytes())
    pickles = []
    for zipped in (True, False):
        file = io.BytesIO()
        state = {"model": values(0), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3}
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        pickles.append(file.getvalue())
    return Seeds(old, patches, weights, pickles)


def head_of(old: bytes) -> bytes:
    tensors, _ = reference.container(old)
    return zlib.decompressobj(-15, reference.DICTIONARY).decompress(tensors["tersor"].values.tobytes())


def changed(document: Any, rng: random.Random) -> None:
    """One to three values of a JSON document replaced or removed."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(fuzz.places(document) or [({"": 0}, "")])
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = json.loads(json.dumps(rng.choice(fuzz.VALUES)))


def forged_patch(data: bytes, old: bytes, rng: random.Random) -> bytes:
    tensors, metadata = reference.container(data)
    head, streams = head_of(old), tensors["streams"].values.tobytes()
    text = zlib.decompressobj(-15, reference.DICTIONARY + head).decompress(tensors["patch"].values.tobytes())
    document = json.loads(text)
    if rng.random() < 0.3 and streams:
        streams = (fuzz.mutated(streams, rng) + streams)[: len(streams)]
    else:
        changed(document, rng)
    text = json.dumps(document).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, reference.DICTIONARY + head)
    packed = packer.compress(text) + packer.flush()
    metadata |= {"size": str(len(text)), "crc": f"{zlib.crc32(text):08x}{zlib.crc32(streams):08x}"}
    parts = {"patch": ("U8", [len(packed)], packed), "streams": ("U8", [len(streams)], streams)}
    return safetensors_file(parts, metadata)


def forged_weights(data: bytes, rng: random.Random) -> bytes:
    header, payload = header_of(data)
    changed(header, rng)
    return with_header(json.dumps(header).encode(), payload)


def forged_pickle(data: bytes, rng: random.Random) -> bytes:
    """The pickle of a zip changed, and its checksum put right."""
    if data[:2] != b"PK":
        at = rng.randrange(min(len(data), 600))
        return data[:at] + fuzz.mutated(data[at : at + 40], rng) + data[at + 40 :]
    out = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(data)) as was, zipfile.ZipFile(out, "w", kind) as new:
        for name in was.namelist():
            record = was.read(name)
            new.writestr(name, fuzz.mutated(record, rng) if name.endswith(".pkl") else record)
    return out.getvalue()


def forged_recipe(rng: random.Random) -> bytes:
    text = RECIPE
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(WORDS) + text[at + rng.choice((0, 0, 1, 5)) :]
    return text.encode("utf-8", "surrogatepass")


def mutant(found: Seeds, rng: random.Random) -> tuple[str, bytes]:
    """(kind, input)."""
    kind, plain = rng.choice(KINDS), rng.random() < 0.3
    made: dict[str, Callable[[], bytes]] = {
        "patch": lambda: forged_patch(rng.choice(found.patches), found.old, rng),
        "safetensors": lambda: forged_weights(rng.choice(found.weights), rng),
        "pt": lambda: forged_pickle(rng.choice(found.pickles), rng),
        "recipe": lambda: forged_recipe(rng),
    }
    if plain:
        every = {"patch": found.patches, "safetensors": found.weights, "pt": found.pickles}
        return kind, fuzz.mutated(rng.choice(every.get(kind, [RECIPE.encode()])), rng)
    return kind, made[kind]()


def examine(kind: str, path: Path, found: Seeds) -> str:
    """Use an input: "read" or "refused". Any error but one of Tersor's own comes out."""
    from tersor.errors import LONGEST, TersorError
    from tersor.io.checkpoint import Checkpoint
    from tersor.io.patch.patch import patch
    from tersor.steps import read_recipe

    try:
        if kind == "patch":
            (path.parent / "old").write_bytes(found.old)
            patch(path.parent / "old", path, path.parent / "new")
        elif kind == "recipe":
            read_recipe(path)
        else:
            with Checkpoint(path) as weights:
                for name in weights.slots:
                    weights.read(name)
        return "read"
    except TersorError as error:
        if len(str(error)) > LONGEST + 100 or not str(error).isprintable():
            raise ValueError(f"not a short line: {str(error)[:200]!r}") from None
    finally:
        (path.parent / "new").unlink(missing_ok=True)
    return "refused"


def batch(folder: Path, first: int, last: int, seed: int) -> None:
    found = seeds()
    with contextlib.suppress(OSError):
        (folder / "old").unlink()

    def check(path: Path, rng: random.Random) -> str:
        kind, data = mutant(found, rng)
        path.write_bytes(data)
        return f"{kind} {examine(kind, path, found)}"

    for data in (*found.weights, *found.pickles, *found.patches):  # everything is loaded before limits
        (folder / "case.tersor").write_bytes(data)
        for kind in KINDS:
            examine(kind, folder / "case.tersor", found)
    fuzz.limited(folder, first, last, seed, check)


if __name__ == "__main__":
    sys.exit(fuzz.main(__file__, batch))
