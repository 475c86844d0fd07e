"""Writes the golden files: python tests/golden/make.py

One file per form, some composed trees, tied tensors, every dtype, and all other features of a file: *.tersor.
expected.json has their decoded tensors, held.json the rest. They hold small whole numbers and hand-written
streams, so that every machine, encoder and version of PyTorch writes the same bytes. A change of the format
changes these bytes and needs a new number. Files that must be refused are in refused/, with a part of the
error message in refused.json; golden_refusals.py makes them.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from forge import Json  # noqa: E402
from golden_refusals import to_refuse  # noqa: E402

from tersor.core.state import State, digest_of  # noqa: E402
from tersor.dtypes import NAMED  # noqa: E402
from tersor.forms import (  # noqa: E402
    Affine,
    Codebook,
    Coded,
    Dense,
    Form,
    Grid,
    LogGrid,
    LowRank,
    Masked,
    Sum,
)
from tersor.io.container_writer import save  # noqa: E402
from tersor.model.changes import Replace, Set  # noqa: E402
from tersor.model.sites import Site  # noqa: E402
from tersor.record.ledger import Entry, Ledger  # noqa: E402


def whole(*shape: int, low: int = -3, span: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers low, low + 1, ..., repeated and slightly shuffled."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 5 + torch.arange(count) // 3) % span + low).reshape(shape).to(dtype)


def scale(*shape: int) -> Dense:
    """Powers of two, so that products are exact."""
    return Dense(2.0 ** whole(*shape, low=-2, span=4))


def stream(*planes: str, size: tuple[int, ...], dtype: str, **more: Any) -> Coded:
    """A coded leaf from streams in hex."""
    data = [bytes.fromhex(plane) for plane in planes]
    array = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)
    return Coded(array, size, dtype, tuple(map(len, data)), **more)


def raw(*symbols: int) -> str:
    return bytes([0, *symbols]).hex()


HUFFMAN = "02b212b6db6db6db6f2217fffffffffefffffff2fffdbe00"  # 9 symbols; a coder of docs/streams.md
RANS = "0b2d2c06131e80fdc00dd802001b669e9f8a23"  # 17 symbols
GRID = json.loads((HERE.parent / "coders" / "golden_matrix.json").read_text())  # streams of whole matrices
MIXED = GRID["mixing, sizes as a tree, kept, rate 3"]
KEPT = torch.tensor([int(c) for c in f"{int(MIXED['keep'], 16):096b}"]).bool().reshape(8, 12)
BOOLS = torch.tensor([[True, False, True, True], [False, False, True, False], [True, True, False, False]])

# Each form alone, with each of its settings and optional children.
FORMS: dict[str, Form] = {
    "dense": Dense(whole(3, 4)),
    "coded-raw": stream(raw(0, 1, 2), raw(3, 4, 5), size=(3,), dtype="int16"),
    "coded-constant": stream("0107", size=(3, 4), dtype="uint8"),
    "coded-huffman": stream(HUFFMAN, size=(3, 3), dtype="uint8"),
    "coded-again": stream(HUFFMAN, size=(3, 3), dtype="uint8", coder="huffman"),
    "coded-rans": stream(RANS, size=(17,), dtype="uint8"),
    "coded-turned": stream(raw(1, 0, 1), raw(126, 127, 128), size=(3,), dtype="bfloat16", turned=True),
    "coded-mixing": stream(GRID["mixing, no zeros"]["stream"], size=(4, 2, 5), dtype="uint8"),
    "coded-predictive": stream(GRID["predictive, nothing foreseen"]["stream"], size=(10, 7), dtype="int8"),
    "coded-packed": stream(raw(0b10110010, 0b11000000), size=(3, 4), dtype="bool", pack=True),
    "coded-bool": stream(raw(1, 0, 1), size=(3,), dtype="bool"),
    "masked": Masked(Dense(BOOLS), Dense(whole(3, 4))),
    "masked-kept": Masked(
        Dense(BOOLS), stream("0101", "0100", "0120", "0141", size=(3, 4), dtype="float32", kept=True)
    ),
    "affine": Affine(Dense(whole(3, 4, dtype=torch.int8)), scale(3, 1)),
    "affine-zero": Affine(
        Dense(whole(3, 4, dtype=torch.int8)), scale(3, 1), Dense(whole(3, 1, dtype=torch.int16)), bits=4
    ),
    "affine-groups": Affine(Dense(whole(3, 5, dtype=torch.int8)), scale(3, 3), None, bits=3, group=2),
    "affine-runs": Affine(Dense(whole(3, 5, dtype=torch.int8)), scale(3, 3), None, bits=3, runs=(1, 3, 1)),
    "affine-member": Affine(
        Dense(whole(3, 5, dtype=torch.int8)), scale(3, 2), Dense(whole(3, 2, dtype=torch.int16)), bits=4,
        member=Dense(torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8)),
    ),
    "affine-16": Affine(Dense(whole(3, 4, span=3000, dtype=torch.int16)), scale(1, 1), None, bits=16),
    "affine-axis": Affine(Dense(whole(2, 3, 2, 2, dtype=torch.int8)), scale(3, 1), axis=1),
    "codebook": Codebook(Dense(whole(3, 4, low=0, span=4, dtype=torch.uint8)), Dense(whole(4))),
    "codebook-rows": Codebook(
        Dense(whole(3, 4, low=0, span=4, dtype=torch.int16)), Dense(whole(3, 4, span=5)), scale(3, 1)
    ),
    "loggrid": LogGrid(Dense(whole(3, 4, dtype=torch.int8)), scale(3, 1)),
    "loggrid-sums": LogGrid(Dense(whole(3, 4, dtype=torch.int8)), scale(3, 2), bits=5, terms=2, group=3),
    "loggrid-runs": LogGrid(Dense(whole(3, 4, dtype=torch.int8)), scale(3, 2), runs=(3, 1)),
    "lowrank": LowRank(Dense(whole(4, 2)), Dense(whole(2, 3, 2, span=5))),
    "sum": Sum(Dense(whole(3, 4)), Dense(whole(3, 4, low=1, span=5))),
}  # fmt: skip

INDEX = stream(
    raw(0, 3, 2, 1, 1, 0), size=(3, 4), dtype="uint8", kept=True
)  # for the 6 elements that BOOLS keeps
COMPOSED: dict[str, Form] = {
    "mixing-kept": Masked(
        Dense(KEPT), Affine(stream(MIXED["stream"], size=(8, 12), dtype="int8", kept=True), scale(8, 1))
    ),
    # Deep Compression: a mask over shared values, both coded.
    "pruned-clustered-coded": Masked(FORMS["coded-packed"], Codebook(INDEX, Dense(whole(4)))),
    # Factors that are quantized and pruned, plus a residual.
    "factors-and-rest": Sum(
        LowRank(
            Affine(Dense(whole(4, 2, dtype=torch.int8)), scale(1, 1), bits=4),
            Masked(Dense(whole(2, 3) > 0), Dense(whole(2, 3))),
        ),
        Masked(Dense(whole(4, 3) > 1), LogGrid(Dense(whole(4, 3, dtype=torch.int8)), scale(4, 1))),
    ),
    "mask-in-mask": Masked(Dense(BOOLS), Masked(Dense(whole(3, 4) > -2), Dense(whole(3, 4)))),
    "coded-tables": Codebook(
        stream(raw(0, 1, 1, 0, 2, 2), size=(2, 3), dtype="uint8"),
        stream(raw(0, 0, 0), raw(0, 0, 0), raw(128, 0, 0), raw(63, 64, 191), size=(3,), dtype="float32"),
        axis=1,
    ),
}


def site(name: str, form: Form, **facts: Any) -> Site:
    dtype = str(form.decode().dtype).removeprefix("torch.")
    return Site(name, tuple(form.shape), dtype, "linear", **facts)


def result(forms: dict[str, Form], **more: Any) -> State:
    sites = {name: site(name, form, layer=name.rpartition(".")[0]) for name, form in forms.items()}
    return State(sites, forms, more.get("aliases", {}), more.get("ledger", Ledger("", {})))


def dtypes() -> State:
    """Every dtype, as a separate tensor and as a small leaf; no elements, one element, no axes."""
    forms: dict[str, Form] = {}
    for word, dtype in NAMED.items():
        values = whole(2, 3, low=0, span=2, dtype=torch.float32).to(dtype)
        forms[f"{word}.small"] = Dense(values)
    forms["large"] = Dense(whole(16, 16, dtype=torch.bfloat16).repeat(2, 2))
    forms["wide"] = Dense(whole(16, 16, dtype=torch.float64))
    forms["none"] = Dense(torch.zeros(0, 3))
    forms["one"] = Dense(torch.tensor(7, dtype=torch.int64))
    return result(forms)


def halves() -> State:
    """Forms that decode to float32, for sites of 16 bits; factors and tables of 16 bits."""
    forms = {
        "cast": Affine(Dense(whole(3, 4, dtype=torch.int8)), Dense(torch.full((1, 1), 1 / 3))),
        "scale": Affine(Dense(whole(3, 4, dtype=torch.int8)), Dense(torch.full((3, 1), 1 / 3).bfloat16())),
        "book": Codebook(
            Dense(whole(3, 4, low=0, span=3, dtype=torch.uint8)), Dense(torch.tensor([0.1, 0.2, 0.3]).half()),
            Dense(torch.full((1, 1), 1.1).half()),
        ),
        "sum": Sum(Dense(whole(3, 4).half() / 3), Dense(whole(3, 4).bfloat16() / 7)),
        "mask": Masked(Dense(BOOLS), Dense((whole(3, 4) / 3).bfloat16())),
    }  # fmt: skip
    halves = {
        "cast": "float16",
        "scale": "bfloat16",
        "book": "float16",
        "sum": "bfloat16",
        "mask": "bfloat16",
    }
    sites = {name: Site(name, (3, 4), halves[name], "conv", layer="net") for name in forms}
    return State(sites, forms, {}, Ledger("", {}))


def model() -> State:
    """A complete state: tied tensors, a named layer, buffers, recipe and ledger."""
    first = {
        "embed.weight": Dense(whole(4, 3)),
        "up.weight": Dense(whole(2, 3, 2, 2)),
        "up.bias": Dense(whole(3)),
    }
    forms: dict[str, Form] = {
        "embed.weight": Masked(Dense(whole(4, 3) > 0), first["embed.weight"]),
        "up.weight": Affine(Dense(whole(2, 3, 2, 2, dtype=torch.int8)), scale(3, 1), axis=1),
        "up.bias": first["up.bias"],
        "big": Coded(torch.zeros(1200, dtype=torch.uint8), (1199,), "uint8", (1200,)),
        "steps": Dense(torch.tensor(12)),
    }
    sites = {
        "embed.weight": Site("embed.weight", (4, 3), "float32", "embedding", layer="embed"),
        "up.weight": Site(
            "up.weight", (2, 3, 2, 2), "float32", "convtranspose", axis=1, groups=1, layer="up"
        ),
        "up.bias": Site("up.bias", (3,), "float32", "convtranspose", layer="up"),
        "big": Site("big", (1199,), "uint8", "other", layer="café"),
        "steps": Site("steps", (), "int64", "buffer"),
    }
    recipe = {"tersor": 1, "seed": 3, "steps": [{"prune": {"keep": 0.5}}, {"quantize": {"bits": 8}}]}
    ledger = Ledger(digest_of({name: form.digest for name, form in {**forms, **first}.items()}), recipe)
    before, masked, affine = (
        f.digest for f in (first["embed.weight"], forms["embed.weight"], forms["up.weight"])
    )
    ledger.entries = [
        Entry(0, "prune", "embed.weight", "wrap", before, "00112233445566ff"),
        Entry(0, "prune", "embed.weight", kind="done", text="kept 4 of 12 weights", data={"kept": 4}),
        Entry(0, "prune", "", kind="trained", text="prune trained", data={"loss": 0.25}),
        Entry(1, "quantize", "embed.weight", "refine", "00112233445566ff", masked),
        Entry(1, "quantize", "up.weight", "refine", first["up.weight"].digest, affine),
        Entry(1, "quantize", "up.bias", kind="skipped", text="ein Vektor, größer als nötig"),
    ]
    return State(sites, forms, {"head.weight": "embed.weight"}, ledger)


def cuts() -> State:
    """Cuts of two axes of a site, a list for three sites, a reordering, a coded leaf, an axis kept whole."""
    some, order = (0, 1, 3, 7), (2, 0)
    forms: dict[str, Form] = {
        "conv.weight": Affine(Dense(whole(4, 2, 2, 2, dtype=torch.int8)), scale(4, 1)),
        "conv.bias": Dense(whole(4)),
        "norm.running_mean": Dense(whole(4, low=1)),
        "up.weight": Masked(
            Dense(whole(2, 4) > 0),
            Affine(Dense(whole(2, 4, dtype=torch.int8)), scale(2, 2), None, runs=(1, 3)),
        ),
        "head.weight": stream(
            GRID["mixing, no zeros"]["stream"], size=(4, 2, 5), dtype="uint8", coder="fast"
        ),
        "all.weight": Dense(whole(3, 2)),
    }
    given = {
        "conv.weight": (8, 3, 2, 2), "conv.bias": (8,), "norm.running_mean": (8,), "up.weight": (3, 8),
        "head.weight": (9, 2, 70_000), "all.weight": (3, 2),
    }  # fmt: skip
    kept = {
        "conv.weight": {0: some, 1: order}, "conv.bias": {0: some}, "norm.running_mean": {0: some},
        "up.weight": {0: order, 1: some}, "head.weight": {0: some, 2: (69_999, 5, 6, 7, 0)},
        "all.weight": {0: (0, 1, 2)},
    }  # fmt: skip
    kinds = {"norm.running_mean": "buffer", "conv.bias": "conv", "conv.weight": "conv"}
    sites = {
        name: Site(name, shape, "uint8" if name == "head.weight" else "float32", kinds.get(name, "linear"),
                   layer=name.rpartition(".")[0])
        for name, shape in given.items()
    }  # fmt: skip
    return State(sites, forms, {"tied.bias": "conv.bias"}, Ledger("", {}), kept=kept)


def replaced() -> State:
    """Integers that were set, modules that were replaced, and sites that replacements made."""
    origins = {"fc.0.weight": "fc.weight right", "fc.1.weight": "fc.weight left", "fc.1.bias": "fc.bias"}
    forms: dict[str, Form] = {
        "fc.0.weight": Dense(whole(2, 5)), "fc.1.weight": Dense(whole(4, 2)), "fc.1.bias": Dense(whole(4)),
        "attn.in_proj_weight": Dense(whole(6, 2)),
    }  # fmt: skip
    sites = {
        name: Site(name, tuple(form.shape), "float32", "linear", layer=name.rpartition(".")[0],
                   origin=origins.get(name, ""))
        for name, form in forms.items()
    }  # fmt: skip
    changes = (
        Replace("fc", "product", {"layers": 2}),
        Set("attn", "num_heads", 1),
        Replace("attn", "attention", {"num_heads": 1, "head_dim": 2}),
        Replace("", "untie", {"tensor": "fc.1.bias"}),
        Set("norm", "normalized_shape.0", 4),
        Set("", "padding_idx", -1),
    )
    before = Dense(whole(4, 5)).digest
    steps = [{"factorize": {"rank": 2}}, {"slim": {}}]
    ledger = Ledger(before, {"tersor": 1, "seed": 0, "steps": steps})
    after = {name: form.digest for name, form in forms.items()}
    ledger.entries = [
        Entry(0, "factorize", "fc.weight", "absorb", before, "00112233445566ff"),
        Entry(0, "factorize", "fc", "replace", data={"stock": "product", "settings": {"layers": 2}}),
        Entry(1, "slim", "attn", "set", data={"attribute": "num_heads", "value": 1}),
        Entry(1, "slim", "attn.in_proj_weight", "cut", "0123456789abcdef", after["attn.in_proj_weight"],
              data={"axis": 0, "count": 6, "kept": "8899aabbccddeeff"}),
        Entry(1, "slim", "", kind="measured", text="all is well", data={"share": 0.5, "deep": {"list": [1]}}),
    ]  # fmt: skip
    return State(sites, forms, {}, ledger, changes=changes)


def grids() -> State:
    """Grids with one scale and with one per channel, coded leaves, a stale one, and their ledger."""
    forms: dict[str, Form] = {"conv.weight": Dense(whole(3, 2))}
    edges = {
        "/input:0": Grid(scale(1)),
        "conv/conv2d:0": Grid(scale(3), Dense(torch.tensor([0, 128, 255], dtype=torch.uint8)), stale=True),
        "conv/relu:0": Grid(
            stream(raw(0, 0), raw(0, 0), raw(128, 0), raw(62, 63), size=(2,), dtype="float32"),
            stream(raw(0, 9), raw(248, 7), size=(2,), dtype="int16"), 12, signed=True, axis=0,
        ),
        "": Grid(Dense(2.0 ** whole(300, low=-2, span=4)), None, 4),
    }  # fmt: skip
    compressed = result(forms)
    ledger = Ledger("", {"tersor": 1, "seed": 0, "steps": [{"calibrate": {}}, {"prune": {}}]})
    ledger.entries = [
        Entry(0, "calibrate", "/input:0", "absorb", "", edges["/input:0"].digest),
        Entry(
            0, "calibrate", "conv/conv2d:0", "absorb", "", edges["conv/conv2d:0"].replace(stale=False).digest
        ),
        Entry(1, "prune", "conv.weight", "wrap", "00112233445566ff", forms["conv.weight"].digest),
    ]
    return replace(compressed, grids=edges, ledger=ledger)


def dynamic() -> State:
    """Grids without a scale, beside one that has a scale."""
    edges = {"fc/linear:0<0": Grid(), "": Grid(stale=True), "/input:0": Grid(scale(1))}
    return replace(result({"fc.weight": Dense(whole(3, 2))}), grids=edges)


def attachments() -> State:
    """A stored attachment, a deflated one, an empty one, one in a folder."""
    files = {
        "config.json": b'{"hidden_size": 64, "layers": [' + b"2, " * 400 + b"2]}",
        "short": b"\x00\x01\xff",
        "empty": b"",
        "onnx/model of café.onnx": bytes(range(256)),
    }
    return replace(result({"w": Dense(whole(3, 4))}), attachments=files)


def history() -> State:
    """Steps shortened to a line, a seed per step, a step that is not in the recipe."""
    form = Masked(Dense(whole(3, 4) > 0), Dense(whole(3, 4)))
    steps = [{"prune": {"keep": 0.25, "ramp": 1e-05}}, {"größe": {}}, {"entropy": {}}]
    past = (("prune", "00112233445566ff"), ("quantize", "0123456789abcdef"))
    ledger = Ledger("fedcba9876543210", {"tersor": 1, "seed": [7, 0, 2**40], "steps": steps}, past=past)
    ledger.entries = [
        Entry(2, "prune", "w", "wrap", "1111222233334444", form.digest),
        Entry(4, "entropy", "w", "lossless", form.digest, "5555666677778888"),
        Entry(4, "entropy", "w", "refine", "9999aaaabbbbcccc", form.digest),
        Entry(4, "entropy", "gone", "wrap", "1111222233334444", "5555666677778888"),
        Entry(7, "by hand", "w", kind="", text=""),
    ]
    return State({"w": site("w", form)}, {"w": form}, {}, ledger)


def to_read() -> dict[str, State]:
    """The files that must be read, by name; those named tiny have the short header."""
    alone = {name: result({"w": form}) for name, form in (FORMS | COMPOSED).items()}
    composed = result({**COMPOSED, "": Dense(whole(2)), "large": Dense(whole(16, 17))})
    tiny = {"tiny-model": model(), "tiny-composed": composed, "tiny-none": result({})}
    tiny |= {"tiny-cuts": cuts(), "tiny-replaced": replaced(), "tiny-grids": grids()}
    tiny["tiny-dynamic"] = dynamic()
    states = {
        "cuts": cuts(), "replaced": replaced(), "grids": grids(), "attachments": attachments(),
        "history": history(), "dynamic": dynamic(),
    }  # fmt: skip
    return alone | {"dtypes": dtypes(), "halves": halves(), "model": model()} | states | tiny


def expected(compressed: State) -> Json:
    """The decoded tensors of a file: dtype, shape and SHA-256 of the bytes."""
    return {
        name: [
            str(value.dtype).removeprefix("torch."), list(value.shape),
            hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16],
        ]
        for name, value in compressed.state_dict().items()
    }  # fmt: skip


def held(compressed: State, *, tiny: bool) -> Json:
    """The other contents of a file: its digest, that of the ledger, and the parts."""
    ledger = Ledger("") if tiny else compressed.ledger
    return {
        "digest": compressed.digest, "ledger": ledger.digest,
        "kept": {name: {str(a): list(i) for a, i in axes.items()} for name, axes in compressed.kept.items()},
        "changes": [
            [type(change).__name__.lower(), *vars(change).values()] for change in compressed.changes
        ],
        "grids": {edge: grid.digest for edge, grid in compressed.grids.items()},
        "attachments": {
            name: hashlib.sha256(data).hexdigest()[:16] for name, data in compressed.attachments.items()
        },
    }  # fmt: skip


def write(folder: Path) -> None:
    (folder / "refused").mkdir(parents=True, exist_ok=True)
    for name, compressed in to_read().items():
        save(compressed, folder / f"{name}.tersor", tiny=name.startswith("tiny"))
    for name, (data, _) in to_refuse().items():
        (folder / "refused" / f"{name}.tersor").write_bytes(data)
    write_table(folder / "expected.json", {name: expected(result) for name, result in to_read().items()})
    parts = {name: held(result, tiny=name.startswith("tiny")) for name, result in to_read().items()}
    write_table(folder / "held.json", parts)
    write_table(folder / "refused.json", {name: said for name, (_, said) in to_refuse().items()})


def write_table(path: Path, table: Json) -> None:
    """Write JSON with one file per line."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in table.items())
    path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    write(HERE)
