"""Files that must be refused, each with a part of what is said of it. tests/golden/make.py writes them."""

import hashlib
import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from forge import (
    Json,
    Pieces,
    changed,
    constant,
    constant_bytes,
    floats,
    header_of,
    one_site,
    plain,
    reference,
    safetensors_file,
    tiny_file,
    with_header,
)

Case = tuple[str, bytes, str]  # name, the file, what is said

TABLE = {"form": "codebook", "index": plain("uint8", [2, 2]), "book": plain("float32", [3])}
GOOD = one_site(TABLE, [2, 2], bytes([0, 1, 2, 0]) + floats(1, 2, 3)).sign()
TEXT = json.dumps(GOOD.document, separators=(",", ":"))


def large() -> Pieces:
    """With a leaf that is a tensor of its own."""
    pieces = one_site("dense", [16, 16])
    pieces.add("w", "F32", [16, 16], floats(*range(256)))
    return pieces.sign()


def f32(*shape: int) -> Json:
    return plain("float32", list(shape))


def signed(form: Any, shape: list[int], nbytes: int | bytes, **facts: Any) -> bytes:
    """A file of one site whose digest is right, so that only the tree is wrong."""
    small = bytes(nbytes) if isinstance(nbytes, int) else nbytes
    return one_site(form, shape, small, **facts).sign().bytes()


def text_with(old: str, new: str) -> bytes:
    """The good file with a piece of its text replaced; size and CRC fit."""
    if old not in TEXT:
        raise ValueError(f"{old} is not in {TEXT}")
    return GOOD.with_text(TEXT.replace(old, new, 1).encode())


def with_entry(data: bytes, name: str, **facts: Any) -> bytes:
    """The file with another entry in its header."""
    header, payload = header_of(data)
    header[name] = header.get(name, {}) | facts
    return with_header(json.dumps(header, separators=(",", ":")).encode(), payload)


def with_metadata(data: bytes, **metadata: Any) -> bytes:
    return with_entry(data, "__metadata__", **metadata)


def header_text(old: str, new: str) -> bytes:
    header, payload = header_of(GOOD.bytes())
    return with_header(json.dumps(header).replace(old, new, 1).encode(), payload)


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def other_files() -> Iterator[Case]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(zipfile.ZipInfo("archive/data.pkl"), b"")
    onnx = b"\x08\x0a\x12\x07pytorch\x1a\x04v2.0" + bytes(20)
    weights = safetensors_file({"w": ("F32", [1], floats(1))}, {"format": "pt"})
    yield "empty", b"", "it is empty"
    yield "pickle", pickle.dumps({"w": [1, 2]}, protocol=2), "a pickle, such as an old PyTorch checkpoint"
    yield "zip", archive.getvalue(), "a zip file, such as a PyTorch checkpoint"
    yield "onnx", onnx, "an ONNX model"
    yield "plain-safetensors", weights, "lacks 'tersor'. Pack it with: tersor pack"
    newer = "has format 7; this version reads 1. A newer tersor may read it."
    yield "newer", with_metadata(GOOD.bytes(), tersor="7"), newer
    yield "number-not-plain", with_metadata(GOOD.bytes(), tersor="one"), "the file is damaged"


def damage() -> Iterator[Case]:
    good, wide = GOOD.bytes(), large().bytes()
    yield "cut-header", good[:40], "it is cut off"
    yield "cut-payload", good[:-1], "it is cut off: 1 bytes are missing"
    yield "longer", good + b"\0", "1 bytes too many"
    yield "flipped-small-leaf", flipped(good, -1), "w: damaged"
    yield "flipped-tensor", flipped(wide, wide.index(floats(255))), "w: damaged"
    yield "flipped-text", with_metadata(good, crc="00000000"), "its text is damaged"


def headers() -> Iterator[Case]:
    wide = large().bytes()
    nbytes = header_of(wide)[0]["tersor"]["shape"][0]
    yield "header-double-key", header_text("{", '{"__metadata__":{},'), "'__metadata__' is there twice"
    yield "metadata-no-text", with_metadata(GOOD.bytes(), size=120), "an object of strings"
    yield "metadata-list", with_header(b'{"__metadata__":["tersor"]}', b""), "an object of strings"
    yield "header-nan", header_text("{", '{"x":NaN,'), "NaN is not a number"
    yield "header-nested", header_text("{", '{"x":' + "[" * 5000 + "]" * 5000 + ","), "deeper than 64"
    yield "overlap", with_entry(wide, "tersor", data_offsets=[1020, 1020 + nbytes]), "overlaps"
    yield "hole", with_entry(wide, "tersor", data_offsets=[1028, 1028 + nbytes]), "a hole"
    yield "size-misfit", with_entry(wide, "w", shape=[16, 15]), "needs 960 bytes, its range has 1,024"
    yield "unknown-dtype", with_entry(wide, "w", dtype="F4"), "dtype 'F4'; known are"
    yield "extra-in-entry", with_entry(wide, "w", more=1), "must have dtype, shape and data_offsets"


def texts() -> Iterator[Case]:
    recipe, deep = '"recipe":{"x":%s},"sites"', "[" * 64 + "]" * 64
    yield "text-double-key", text_with('"shape"', '"digest":"0","shape"'), "is there twice"
    yield "text-nan", text_with('"sites"', recipe % "NaN"), "NaN is not a number"
    yield "text-huge-number", text_with('"sites"', recipe % "1e999"), "too large"
    yield "text-nested", text_with('"sites"', recipe % deep), "deeper than 64"
    yield "text-no-json", GOOD.with_text(TEXT.encode()[:-1]), "is not JSON"
    yield "text-no-utf8", GOOD.with_text(TEXT.encode().replace(b'"w"', b'"\xff"')), "is not UTF-8"
    yield "text-half-character", text_with('"w"', '"\\ud800"'), "is not UTF-8"
    yield "text-unknown-key", changed(GOOD, extra=1).bytes(), "no key 'extra'"
    yield "text-list", GOOD.with_text(b"[]"), "must be an object"
    yield "text-longer", with_metadata(GOOD.bytes(), size=str(len(TEXT) - 1)), "its text is not the"
    yield "text-bomb", GOOD.with_text(b'{"sites":{}' + b" " * 2_000_000 + b"}"), "justify 2 to"


def sites() -> Iterator[Case]:
    yield "no-sites", GOOD.with_text(b"{}"), "sites must be an object"
    yield "site-unknown-key", one_site("dense", [1], floats(1), color="red").bytes(), "no key 'color'"
    yield "site-axis", one_site("dense", [1], floats(1), axis=1).bytes(), "axis 1"
    yield "site-shape", signed(f32(2), [3], 8), "the site has [3]"
    yield "site-dtype", signed(plain("int8", [1]), [1], 1), "the site has torch.float32"
    yield "alias-of-nothing", changed(GOOD, aliases={"a": "b"}).bytes(), "cannot stand for 'b'"
    yield "alias-hides-site", changed(GOOD, aliases={"w": "w"}).bytes(), "cannot stand for 'w'"


def trees() -> Iterator[Case]:
    nested: Json = f32(1)
    for _ in range(9):
        nested = {"form": "sum", "a": nested, "b": f32(1)}
    idle = Pieces(GOOD.document, small=GOOD.small)
    idle.add("idle", "U8", [3], bytes(3))
    own_name = {"tersor": {"shape": [1], "digest": "0" * 16, "form": plain("uint8", [1])}}
    less, more = (Pieces(GOOD.document, small=small) for small in (GOOD.small[:-1], GOOD.small + b"\0"))
    bools = one_site(plain("bool", [2]), [2], b"\1\2", dtype="bool").bytes()
    yield "unknown-form", one_site({"form": "wavelet"}, [1]).bytes(), "form 'wavelet' is not known"
    yield "unknown-setting", one_site({"form": "dense", "bits": 3}, [1], floats(1)).bytes(), "setting 'bits'"
    yield "missing-child", one_site({"form": "masked", "keep": "dense"}, [1], b"\1").bytes(), "lacks 'body'"
    yield "nested-forms", one_site(nested, [1], bytes(40)).bytes(), "nested deeper than 8"
    yield "tensor-without-leaf", idle.bytes(), "no form uses this tensor"
    yield "small-missing", less.bytes(), "small leaves take 16 bytes, but 15 follow"
    yield "small-left-over", more.bytes(), "small leaves take 16 bytes, but 17 follow"
    yield "leaf-named-tersor", Pieces({"sites": own_name}, small=b"\0").bytes(), "two leaves have this name"
    yield "bool-of-two", bools, "a bool is 2"


def groups_of_columns(affine: dict[str, Any]) -> Iterator[Case]:
    """Codes [2, 2] and scales [2, 2] in 20 bytes."""
    member = {"member": plain("uint8", [2])}
    both = affine | member | {"runs": [1, 1]}
    yield "affine-runs", signed(affine | {"runs": [1, 2]}, [2, 2], 20), "runs [1, 2] for rows of 2"
    yield "affine-runs-none", signed(affine | {"runs": [2, 0]}, [2, 2], 20), "runs [2, 0] for rows of 2"
    yield "affine-runs-few", signed(affine | {"runs": [2]}, [2, 2], 20), "a table of [2, 2] for 2 rows of 2"
    word = one_site(affine | {"runs": "2"}, [2, 2], bytes(20)).bytes()
    yield "affine-runs-text", word, "affine.runs must be"
    yield "affine-two-ways", signed(both, [2, 2], 22), "groups are given in two ways"
    yield "affine-group-runs", signed(affine | {"runs": [1, 1], "group": 1}, [2, 2], 20), "in two ways"
    few = affine | {"member": plain("uint8", [1])}
    yield "affine-member", signed(few, [2, 2], 21), "member of torch.uint8 [1] for rows of 2"
    floating = affine | {"member": f32(2)}
    yield "affine-member-kind", signed(floating, [2, 2], 28), "member of torch.float32 [2]"
    codes = bytes(4) + floats(1, 1, 1, 1) + b"\0\2"
    yield "affine-member-far", signed(affine | member, [2, 2], codes), "codes 0 to 2, but groups 0 to 1"


def forms() -> Iterator[Case]:
    index = TABLE | {"book": f32(2)}
    negative = index | {"index": plain("int16", [2, 2])}
    affine = {"form": "affine", "codes": plain("int8", [2, 2]), "scale": f32(1, 1)}
    unsigned = affine | {"codes": plain("uint8", [2, 2])}
    levels = {"form": "loggrid", "codes": plain("int8", [1]), "scale": f32(1, 1), "bits": 2}
    masked = {"form": "masked", "keep": plain("bool", [2, 2]), "body": f32(2)}
    floating = {"form": "masked", "keep": f32(1), "body": f32(1)}
    product = {"form": "lowrank", "left": f32(2, 1), "right": f32(2, 2)}
    yield "codebook-index", signed(index, [2, 2], b"\0\1\2\0" + floats(1, 2)), "table entries 0 to 1"
    yield "codebook-negative", signed(negative, [2, 2], b"\xff\xff" + bytes(14)), "codes -1 to 0"
    yield "codebook-empty", signed(TABLE | {"book": f32(0)}, [2, 2], 4), "a table of [0]"
    yield "loggrid-code", signed(levels, [1], b"\xfe" + floats(1)), "levels -1 to 1"
    yield (
        "affine-scale",
        signed(affine | {"scale": f32(3, 1)}, [2, 2], 16),
        "a table of [3, 1] for 2 rows of 2",
    )
    kind = affine | {"scale": plain("int8", [1, 1])}
    yield "affine-scale-kind", signed(kind, [2, 2], 5), "scale of torch.int8"
    yield "affine-axis", signed(affine | {"axis": 2}, [2, 2], 8), "axis 2"
    yield from groups_of_columns(affine | {"scale": f32(2, 2)})
    yield "affine-codes", signed(unsigned, [2, 2], 8), "codes of torch.uint8"
    yield "masked-shapes", signed(masked, [2, 2], 12), "mask [2, 2], body [2]"
    yield "masked-by-floats", signed(floating, [1], 8), "a mask of torch.float32"
    yield "lowrank-ranks", signed(product, [2, 2], 24), "a product of [2, 1] and [2, 2]"
    yield "sum-shapes", signed({"form": "sum", "a": f32(2), "b": f32(1)}, [2], 12), "a sum of [2] and [1]"


def streams() -> Iterator[Case]:
    one = constant_bytes(1)
    kept, packed = constant([2], kept=True), constant([2], pack=True)
    yield "coded-kept-alone", signed(kept, [2], one, dtype="uint8"), "no mask of its shape"
    yield "coded-planes", signed(constant([2], "int16"), [2], one, dtype="int16"), "1 streams for int16"
    yield "coded-pack", signed(packed, [2], one, dtype="uint8"), "pack is set for uint8"
    unknown = one_site(constant([2], coder="best"), [2], one, dtype="uint8").bytes()
    yield "coded-coder", unknown, "coder 'best' is not known; known are max, fast, huffman, rans"
    yield "coded-stream", signed(constant([2]), [2], b"\7\7", dtype="uint8"), "coded stream"


def claims() -> Iterator[Case]:
    many, more = [2**20, 2**20], [2**40, 2**40]
    left, right = (constant(shape, "float32", 4) for shape in ([2**20, 1], [1, 2**20]))
    product = {"form": "lowrank", "left": left, "right": right}
    huge = one_site(constant(more), [1], constant_bytes(1), dtype="uint8").bytes()
    yield "claim-constant", signed(constant(many), many, constant_bytes(1), dtype="uint8"), "raise the limit"
    yield "claim-product", signed(product, many, constant_bytes(0, 8)), "raise the limit"
    yield "claim-overflow", huge, "list of lengths"


def ledgers() -> Iterator[Case]:
    def ledger(*events: Any, **facts: Any) -> bytes:
        return changed(GOOD, ledger=[{**facts, "events": list(events)}]).bytes()

    note, one = ["w", "", "a", "b"], "0" * 16
    yield "ledger-how", ledger([0, "magic"], name="x"), "how is 'magic'"
    yield "ledger-no-name", ledger(note), "ledger: name"
    steps = changed(GOOD, recipe={"steps": [{"prune": {}, "entropy": {}}]}).bytes()
    yield "ledger-steps", steps, "a step is an object with one key"
    yield "ledger-before-the-first", ledger(note, name="x", step=-1), "step -1"
    yield "ledger-digest", ledger([0, "wrap"], name="x"), "before must be 16 hex digits"
    yield "ledger-after", ledger(["gone", "wrap", one], name="x"), "after must be 16 hex digits"
    yield "ledger-site", ledger([1, "wrap", one], name="x"), "an event is [site, how, ...]"
    yield "ledger-object", ledger({"site": "w", "how": "wrap"}, name="x"), "an event is [site, how, ...]"
    yield "ledger-more", ledger([0, "wrap", one, one, one], name="x"), "a wrap has"
    yield "ledger-cut", ledger([0, "cut", 0, "2", one, one], name="x"), "a cut's count must be a whole number"
    yield "ledger-set", ledger(["m", "set", "groups", 1, one], name="x"), "a set has attribute, value"
    yield "ledger-note", ledger([0, "", "a"], name="x"), "a note is [site, '', kind, text, data]"
    past = changed(GOOD, past=[["prune", one]])
    yield "past-no-line", changed(GOOD, past=["prune"]).bytes(), "a line is a step's name and a digest"
    yield "past-digest", changed(GOOD, past=[["prune", "x"]]).bytes(), "past: a digest must be 16 hex"
    below = changed(past, ledger=[{"step": 0, "name": "x", "events": [note]}]).bytes()
    yield "past-step", below, "step 0, but its steps count from 1"
    seeds = changed(GOOD, recipe={"seed": [0, 1], "steps": [{"prune": {}}]}).bytes()
    yield "recipe-seeds", seeds, "seed is a whole number or one for each step"


def cuts() -> Iterator[Case]:
    """Of w, [2, 2] as given, with the lists of `indices`."""

    def cut(kept: Any, *indices: Any) -> bytes:
        pieces = one_site(plain("uint8", [1, 2]), [2, 2], bytes(2), dtype="uint8", kept=kept)
        return changed(pieces, indices=list(indices)).bytes()

    zero = {"0": 0}
    yield "cut-far", cut(zero, [2, 1]), "list 0 has index 2, but axis 0 has length 2"
    yield "cut-twice", cut(zero, [0, 2, 1, 1]), "has an index twice"
    yield "cut-empty", cut(zero, []), "of at least one index"
    yield "cut-run-empty", cut(zero, [0, 0]), "of at least one index"
    yield "cut-odd", cut(zero, [0, 1, 0]), "must be [first, count, ...]"
    yield "cut-axis", cut({"2": 0}, [0, 1]), "'2' is no axis of [2, 2]"
    yield "cut-axis-word", cut({"00": 0}, [0, 1]), "'00' is no axis"
    yield "cut-list", cut({"0": 1}, [0, 1]), "there is no list 1"
    yield "cut-list-bool", cut({"0": False}, [0, 1]), "must be a whole number"
    yield "cut-other-shape", signed_cut([0, 2]), "decodes to [1, 2], the site has [2, 2]"
    yield "cut-bomb", cut(zero, [0, 2**30]), "the lists hold 1,073,741,824 indices"
    yield "cut-bombs", cut(zero, *[[0, 2**19]] * 4), "the lists hold 2,097,152 indices"
    yield "cut-huge", cut(zero, [2**31, 1]), "must be [first, count, ...]"


def signed_cut(runs: list[int]) -> bytes:
    pieces = one_site(plain("uint8", [1, 2]), [2, 2], bytes(2), dtype="uint8", kept={"0": 0})
    return changed(pieces, indices=[runs]).sign().bytes()


def changes() -> Iterator[Case]:
    def change(*items: Any) -> bytes:
        return changed(GOOD, changes=list(items)).bytes()

    yield "change-unknown", change(["remove", "fc", "x", 1]), "an item is ['set', ...] or ['replace', ...]"
    yield "change-short", change(["set", "fc", "groups"]), "an item is ['set', ...]"
    yield "change-float", change(["set", "fc", "groups", 1.5]), "value must be a whole number"
    yield "change-far", change(["set", "fc", "groups", 2**31]), "below 2^31"
    yield "change-setting", change(["replace", "fc", "product", {"layers": [2]}]), "must be a string or below"
    yield "change-settings", change(["replace", "fc", "product", 2]), "settings must be an object"
    yield "change-object", changed(GOOD, changes={"fc": 1}).bytes(), "changes must be a list"


def edges() -> Iterator[Case]:
    one = {"form": "grid", "scale": f32(1)}

    def grid(form: Any, small: bytes, name: str = "e", **facts: Any) -> bytes:
        pieces = changed(GOOD, grids={name: {"digest": "0" * 16, "form": form, **facts}})
        pieces.small = GOOD.small + small
        return (pieces.sign() if not facts else pieces).bytes()

    def zero(*values: int, dtype: str = "int8", shape: int = 1) -> bytes:
        form = one | {"zero": plain(dtype, [shape])}
        return grid(form, floats(1) + bytes(value % 256 for value in values))

    yield "grid-zero-shape", zero(0, 0, shape=2), "a zero of torch.int8 [2] for a scale of [1]"
    yield "grid-zero-kind", zero(0, 0, 0, 0, dtype="float32"), "a zero of torch.float32 [1]"
    yield "grid-zero-far", zero(-1), "codes -1 to -1, but a zero is one of the codes 0 to 255"
    yield "grid-scale-none", grid(one | {"scale": f32(0)}, b""), "a scale of torch.float32 [0]"
    yield "grid-scale-axes", grid(one | {"scale": f32(1, 1)}, floats(1)), "a scale of torch.float32 [1, 1]"
    halves = one | {"scale": plain("float16", [1])}
    yield "grid-scale-kind", grid(halves, b"\0\x3c"), "a scale of torch.float16 [1]"
    yield "grid-scale-zero", grid(one, floats(0)), "a scale that is not a number above 0"
    yield "grid-scale-nan", grid(one, floats(float("nan"))), "a scale that is not a number above 0"
    yield "grid-bits", grid(one | {"bits": 17}, floats(1)), "bits 17"
    yield (
        "grid-tree",
        grid(one | {"scale": {"form": "sum", "a": f32(1), "b": f32(1)}}, floats(1, 1)),
        "leaves",
    )
    yield "grid-form", grid("dense", b"", digest="0" * 16), "an edge has a grid, not 'dense'"
    inner = {"form": "sum", "a": one, "b": f32(1)}
    yield "grid-in-form", one_site(inner, [1], floats(1, 1)).bytes(), "form 'grid' is not known"
    yield "grid-site", grid(one, floats(1), name="w"), "a site has this name"
    yield "grid-key", grid(one, floats(1), color="red"), "no key 'color'"
    yield "grid-damaged", grid(one, floats(1), digest="0" * 16), "e: damaged"
    wide = constant([2**20, 2**20], "float32", 4)
    yield "grid-claim", grid(one | {"scale": wide}, constant_bytes(1, 4)), "a scale of torch.float32"
    long = constant([2**40], "float32", 4)
    yield "grid-claim-long", grid(one | {"scale": long}, constant_bytes(1, 4)), "raise the limit"


def files() -> Iterator[Case]:
    """Attachments."""
    data, packed = b"ab" * 40, deflated(b"ab" * 40)
    sha = hashlib.sha256(data).hexdigest()

    def attached(stored: bytes | None, name: str = "a", **told: Any) -> bytes:
        pieces = changed(GOOD, attachments={name: {"nbytes": 80, "sha256": sha} | told})
        if stored is not None:
            pieces.add(f"attachment:{name}", "U8", [len(stored)], stored)
        return pieces.bytes()

    yield "attachment-damaged", attached(data[:-1] + b"c"), "its SHA-256 is not the one"
    yield "attachment-sha", attached(data, sha256=sha[:-1]), "sha256 must be 64 hex digits"
    yield "attachment-missing", attached(None), "needs a tensor attachment:a"
    yield "attachment-length", attached(data, nbytes=79), "states 79 bytes, but its tensor has 80"
    yield "attachment-no-length", attached(data, nbytes="80"), "nbytes must be a whole number"
    yield "attachment-short", attached(packed, deflated=True, nbytes=79), "its length is wrong"
    yield "attachment-long", attached(packed, deflated=True, nbytes=81), "is damaged"
    yield "attachment-behind", attached(packed + b"\0", deflated=True), "its length is wrong"
    yield "attachment-no-deflate", attached(b"\7" * 9, deflated=True), "cannot be inflated"
    yield "attachment-word", attached(packed, deflated=1), "must be true or false"
    zeros = deflated(bytes(300_000))
    yield "attachment-bomb", attached(zeros, deflated=True, nbytes=300_000), "deflated bytes justify up to"
    yield "attachment-free", attached(packed, deflated=True, nbytes=0), "and more than they are"
    yield "attachment-key", attached(data, mode=7), "no key 'mode'"
    for what, name in (("up", "../a"), ("root", "/a"), ("drive", "c:a"), ("back", "a\\b"), ("none", "")):
        yield f"attachment-{what}", attached(data, name), "is no name of an attachment"
    pieces = one_site({"form": "masked", "keep": plain("bool", [1]), "body": f32(1)}, [1])
    pieces.document["sites"] = {"attachment": pieces.document["sites"]["w"]}
    pieces.document["sites"]["attachment"]["form"]["body"] = "dense"
    pieces = changed(pieces, attachments={"body": {"nbytes": 4, "sha256": sha}})
    pieces.small = b"\0"
    pieces.add("attachment:body", "U8", [4], bytes(4))
    yield "attachment-and-leaf", pieces.bytes(), "an attachment and a leaf have this name"


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, reference.DICTIONARY)
    return packer.compress(data) + packer.flush()


def short_headers() -> Iterator[Case]:
    pieces = Pieces({"sites": {"w": {"shape": [2], "form": "dense"}}}, small=floats(1, 2), tiny=True)
    good = pieces.bytes()
    told = {"sites": {"w": pieces.document["sites"]["w"] | {"digest": "0" * 16}}}
    bits = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_FIXED)
    bomb = bits.compress(b" " * 300_000) + bits.flush()
    yield "tiny-short", good[:8], "more than 8"
    yield "tiny-cut", good[:-1], "CRC"
    yield "tiny-flipped", good[:-1] + bytes([good[-1] ^ 1]), "CRC"
    yield "tiny-more", tiny_file(good[8:] + b"0"), "small leaves take 8 bytes, but 9"
    yield "tiny-less", tiny_file(good[8:-1]), "small leaves take 8 bytes, but 7"
    yield "tiny-no-end", tiny_file(good[8:12]), "its text does not end"
    yield "tiny-bomb", tiny_file(bomb), "its text does not end"
    yield "tiny-number", reference.MAGIC[:3] + b"\2" + good[4:], "short header has another number"
    yield "tiny-digest", Pieces(told, small=pieces.small, tiny=True).bytes(), "no key 'digest'"
    yield "tiny-base", changed(pieces, base="0" * 16).bytes(), "no key 'base'"
    yield "tiny-ledger", changed(pieces, ledger=[]).bytes(), "no key 'ledger'"
    yield "tiny-past", changed(pieces, past=[]).bytes(), "no key 'past'"
    yield "tiny-attachments", changed(pieces, attachments={}).bytes(), "no key 'attachments'"
    edge = changed(pieces, grids={"e": {"digest": "0" * 16, "form": {"form": "grid", "scale": f32(1)}}})
    edge.small += floats(1)
    yield "tiny-grid-digest", edge.bytes(), "no key 'digest'"
    yield "tiny-empty", changed(pieces, sites=[]).bytes(), "sites must be an object"


def to_refuse() -> dict[str, tuple[bytes, str]]:
    """The files that must be refused, by name: (bytes, a part of what is said)."""
    groups = (
        other_files,
        damage,
        headers,
        texts,
        sites,
        trees,
        forms,
        streams,
        claims,
        ledgers,
        cuts,
        changes,
        edges,
        files,
        short_headers,
    )
    return {name: (data, said) for group in groups for name, data, said in group()}
