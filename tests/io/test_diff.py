"""Diff and patch: the new file is restored byte for byte; patches are small; wrong files are refused."""

import copy
import hashlib
import itertools
import json
import os
import random
import signal
import string
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from forge import reference, safetensors_file  # puts reference/ on the path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.core.recipe import Recipe
from tersor.core.state import State
from tersor.encode import coded
from tersor.errors import FormatError, RefusedError, SettingError, StorageError, TersorError
from tersor.forms import Affine, Codebook, Dense, Form, LowRank, Masked
from tersor.forms.form import as_bytes
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.pack import pack
from tersor.io.patch.diff import diff
from tersor.io.patch.named_arrays import NamedArrays
from tersor.io.patch.patch import patch
from tersor.model.sites import Site
from tersor.record.ledger import Entry, Ledger
from tersor.steps import Cluster, Entropy, Factorize, Prune, Quantize

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECIPES: dict[str, tuple[Any, ...]] = {
    "lossless": (Entropy(),),
    "int8": (Quantize(bits=8), Entropy()),
    "groups": (Quantize(bits=4, per="group", group=16), Entropy()),
    "zeros": (Quantize(bits=4, per="channel", symmetric=False), Entropy()),
    "pruned": (Prune(keep=0.3, per="tensor"), Quantize(bits=4), Entropy()),
    "shared": (Prune(keep=0.5, per="tensor"), Cluster(entries=8), Entropy()),
    "factors": (Factorize(keep=0.5, per="tensor"), Quantize(bits=8), Entropy()),
    "plain": (Quantize(bits=8),),
}


def weights(seed: int, size: int = 48) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "first.weight": torch.randn(size, 40, generator=rng),
        "first.bias": torch.randn(size, generator=rng),
        "conv.weight": torch.randn(8, 4, 3, 3, generator=rng),
        "second.weight": torch.randn(10, size, generator=rng),
        "count": torch.tensor(7),
    }


def trained(old: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """The network some steps later: one layer renamed, one resized, one new, one removed, one unchanged."""
    rng = torch.Generator().manual_seed(seed)
    new = {
        name: value + 0.003 * torch.randn(value.shape, generator=rng)
        if value.is_floating_point()
        else value + 1
        for name, value in old.items()
    }
    new["conv.weight"] = old["conv.weight"]
    new["renamed.weight"] = new.pop("second.weight")
    new["first.bias"] = torch.cat([new["first.bias"], torch.ones(3)])
    new["added"] = torch.randn(20, 6, generator=rng)
    del new["count"]
    return new


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files old.* and new.* of every kind."""
    folder = tmp_path_factory.mktemp("files")
    old = weights(0)
    for word, values in (("old", old), ("new", trained(old))):
        source = folder / f"{word}.safetensors"
        save_file(values, source, {"format": "pt"})
        torch.save(values | {"tied": next(iter(values.values()))}, folder / f"{word}.pt")
        half = {
            name: value.bfloat16() if value.is_floating_point() else value for name, value in values.items()
        }
        save_file(half, folder / f"{word}.half.safetensors")
        write_shards(values, folder / f"{word}.folder")
        for recipe, steps in RECIPES.items():
            pack(source, folder / f"{word}.{recipe}.tersor", Recipe(steps))
        pack(source, folder / f"{word}.tiny.tersor", Recipe(RECIPES["int8"]), tiny=True)
    return folder


def write_shards(values: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    where = {name: f"part{number % 2}.safetensors" for number, name in enumerate(values)}
    for file in set(where.values()):
        save_file({name: values[name] for name in values if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def there_and_back(old: Path, new: Path, folder: Path) -> int:
    """Size of the patch. Checks that it makes NEW."""
    done = diff(old, new, folder / "p")
    assert done.nbytes == (folder / "p").stat().st_size
    made = patch(old, folder / "p", folder / "out")
    if new.is_dir():
        assert files_in(folder / "out") == files_in(new)
        assert made == sum(map(len, files_in(new).values()))
        return done.nbytes
    assert made == (folder / "out").stat().st_size
    if new.suffix != ".pt":
        assert (folder / "out").read_bytes() == new.read_bytes()
    else:
        found, expected = load_file(folder / "out"), torch.load(new)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sorted(path.name for path in folder.iterdir()) == ["out", "p"]
    return done.nbytes


KINDS = (
    "safetensors",
    "half.safetensors",
    "pt",
    "folder",
    "tiny.tersor",
    *(f"{name}.tersor" for name in RECIPES),
)


@pytest.mark.sampled(kind=("safetensors", "pruned.tersor", "int8.tersor", "lossless.tersor", "tiny.tersor"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_kind(kind: str, files: Path, tmp_path: Path) -> None:
    old, new = files / f"old.{kind}", files / f"new.{kind}"
    nbytes = there_and_back(old, new, tmp_path)
    whole = sum(path.stat().st_size for path in ([new] if new.is_file() else new.glob("*.safetensors")))
    assert nbytes < 0.75 * whole


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("safetensors", "int8.tersor"), ("int8.tersor", "safetensors"), ("pt", "folder"),
        ("folder", "lossless.tersor"), ("half.safetensors", "safetensors"),
        ("safetensors", "half.safetensors"),
        ("int8.tersor", "groups.tersor"), ("tiny.tersor", "int8.tersor"), ("int8.tersor", "tiny.tersor"),
        ("pruned.tersor", "shared.tersor"), ("factors.tersor", "plain.tersor"),
    ],
)  # fmt: skip
def test_kinds_mixed(old: str, new: str, files: Path, tmp_path: Path) -> None:
    there_and_back(files / f"old.{old}", files / f"new.{new}", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_file_takes_less_than_a_kilobyte(kind: str, files: Path, tmp_path: Path) -> None:
    old = files / f"old.{kind}"
    assert there_and_back(old, old, tmp_path) < 1000
    done = diff(old, old, tmp_path / "p")
    assert (done.changed, done.alone) == (0, 0)


def test_counts(files: Path, tmp_path: Path) -> None:
    done = diff(files / "old.safetensors", files / "new.safetensors", tmp_path / "p")
    assert (done.same, done.changed, done.alone) == (1, 3, 1)  # conv; weight, bias, renamed; added


def test_a_patch_that_would_be_larger_carries_the_new_file(tmp_path: Path) -> None:
    """Long names without a pattern: the header and what is said of each array have them, the file once."""
    letters, rng = random.Random(5), torch.Generator().manual_seed(5)
    names = ["".join(letters.choices(string.ascii_letters + string.digits, k=300)) for _ in range(400)]
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file({"one": torch.zeros(3)}, old)
    save_file({name: torch.randint(0, 256, (3,), generator=rng, dtype=torch.uint8) for name in names}, new)
    delta = diff(old, new, tmp_path / "p.patch")
    assert delta.whole
    assert delta.nbytes == (tmp_path / "p.patch").stat().st_size <= new.stat().st_size + 512
    patch(old, tmp_path / "p.patch", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == new.read_bytes()

    head = head_of(old)
    metadata, text, streams = take_apart(tmp_path / "p.patch", head)
    for more in ({"parts": {"one": {"how": "alone"}}}, {"text": {}}):
        forged_text = json.dumps(json.loads(text) | more).encode()
        (tmp_path / "bad.patch").write_bytes(put_together(metadata, forged_text, streams, head))
        with pytest.raises(FormatError, match="carries the new file whole, but states more of it"):
            patch(old, tmp_path / "bad.patch", tmp_path / "bad.safetensors")


def test_a_fine_tuned_model_is_far_smaller(tmp_path: Path) -> None:
    """One code of eight changes by one: about 0.7 bits per code, compared with seven in the file."""
    rng = torch.Generator().manual_seed(0)
    old = {"w": torch.randn(256, 256, generator=rng)}
    step = old["w"].abs().amax() / 127
    new = {"w": old["w"] + step * 0.12 * torch.randn(256, 256, generator=rng)}
    for word, values in (("old", old), ("new", new)):
        save_file(values, tmp_path / word)
        pack(tmp_path / word, tmp_path / f"{word}.tersor", Recipe((Quantize(per="tensor"), Entropy())))
    folder = tmp_path / "o"
    folder.mkdir()
    nbytes = there_and_back(tmp_path / "old.tersor", tmp_path / "new.tersor", folder)
    assert nbytes < 0.2 * (tmp_path / "new.tersor").stat().st_size


def test_a_changed_grid_costs_only_its_table(tmp_path: Path) -> None:
    """Rows of weights grow by a fifth: the grid changes and the codes stay."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-100, 101, (200, 300), generator=rng, dtype=torch.int8)
    scale = torch.rand(200, 1, generator=rng) + 0.1
    moved = codes.clone()
    moved[::2] = (codes[::2] * 1.2).round().clamp(-127, 127)  # every other row on a finer grid
    for word, form in (
        ("old", Affine(coded(codes), Dense(scale))),
        (
            "new",
            Affine(coded(moved), Dense(torch.where(torch.arange(200)[:, None] % 2 == 0, scale / 1.2, scale))),
        ),
    ):
        save(one(form), tmp_path / f"{word}.tersor")
    (tmp_path / "o").mkdir()
    assert there_and_back(tmp_path / "old.tersor", tmp_path / "new.tersor", tmp_path / "o") < 2500
    assert b'"grid":true' in text_of(tmp_path / "o" / "p", tmp_path / "old.tersor")


@pytest.mark.sampled(tiny=False)
@pytest.mark.parametrize("tiny", [False, True])
def test_a_grid_of_rows_times_columns_moves_too(tiny: bool, tmp_path: Path) -> None:
    """The scales of rdoq: a product of a row and a column. The old codes are moved to the new product."""
    import patcher

    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-100, 101, (120, 200), generator=rng, dtype=torch.int8)
    row, column = torch.rand(120, 1, generator=rng) + 0.1, torch.rand(1, 200, generator=rng) + 0.1
    moved, grown = codes.clone(), row.clone()
    moved[::2], grown[::2] = (codes[::2] * 1.2).round().clamp(-127, 127), row[::2] / 1.2
    for word, values, left in (("old", codes, row), ("new", moved, grown)):
        scale = LowRank(coded(left), Dense(column))
        save(one(Affine(coded(values), scale, group=1)), tmp_path / f"{word}.tersor", tiny=tiny)
    (tmp_path / "o").mkdir()
    old, new = tmp_path / "old.tersor", tmp_path / "new.tersor"
    assert there_and_back(old, new, tmp_path / "o") < 2500
    assert b'"grid":true' in text_of(tmp_path / "o" / "p", old)
    found = patcher.patched(old, tmp_path / "o" / "p")
    assert {name: value.values.tobytes() for name, value in found.items()} == stored(new)


@pytest.mark.parametrize("terms", [2, 0])
def test_a_product_of_several_terms_does_not_move(terms: int, tmp_path: Path) -> None:
    """The order of its sums is not fixed, so another machine might move the codes elsewhere."""
    codes = (floats(3, 60, 80) * 30).clamp(-100, 100).to(torch.int8)
    for n, word in enumerate(("old", "new")):
        factors = (floats(n, 60, 2).abs(), floats(n, 2, 80).abs())
        scale = (
            LowRank(*map(Dense, factors))
            if terms
            else Masked(Dense(codes > -200), Dense(factors[0] @ factors[1]))
        )
        save(one(Affine(coded(codes), scale, group=1)), tmp_path / word)
    (tmp_path / "o").mkdir()
    there_and_back(tmp_path / "old", tmp_path / "new", tmp_path / "o")
    assert b'"grid"' not in text_of(tmp_path / "o" / "p", tmp_path / "old")


def test_a_tensor_whose_name_is_empty(tmp_path: Path) -> None:
    for word, seed in (("old", 0), ("new", 1)):
        state = State(
            {"": Site("", (20, 30), "float32", "linear")}, {"": Dense(floats(seed, 20, 30))}, {}, Ledger("")
        )
        save(state, tmp_path / f"{word}.tersor")
    (tmp_path / "made").mkdir()
    there_and_back(tmp_path / "old.tersor", tmp_path / "new.tersor", tmp_path / "made")


def test_many_arrays_take_time_in_proportion(tmp_path: Path) -> None:
    """Names that only one of the files has were compared with all others: quadratic."""
    spent = {}
    for many in (300, 1200):
        for word in ("old", "new"):
            values = {f"{word}.{n}": torch.full((2,), n + len(word)) for n in range(many)}
            save_file(values, tmp_path / word)
        began = time.process_time()
        diff(tmp_path / "old", tmp_path / "new", tmp_path / "p")
        spent[many] = time.process_time() - began
    assert spent[1200] < 10 * spent[300]


def one(form: Form, **more: Form) -> State:
    forms = {"w": form} | more
    sites = {name: Site(name, tuple(f.shape), "float32", "linear", 0, 1, "") for name, f in forms.items()}
    return State(sites, forms, {}, Ledger("", {}))


def mask(seed: int, shape: tuple[int, ...] = (30, 40), share: float = 0.4) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def floats(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def foreign_mask(seed: int) -> Form:
    """The mask has a stream that this version would not write: a patch stores its bytes, not its elements."""
    keep = mask(seed)
    bits = coded(keep, coder="mixing").replace(coder="max")
    assert bits.digest != coded(keep).digest
    return Masked(bits, coded(floats(seed, 30, 40), keep))


def nested(seed: int) -> Form:
    """A mask in a mask: the inner leaf holds the elements that both keep."""
    outer, inner = mask(7), mask(8, share=0.5)
    return Masked(coded(outer), Masked(coded(inner), coded(floats(seed, 30, 40), inner & outer)))


def table(seed: int) -> Form:
    index = (floats(3, 30, 40) * 3).round().clamp(0, 7).to(torch.uint8)
    index[seed : seed + 3] += index[seed : seed + 3] < 7
    return Codebook(coded(index), Dense(floats(seed, 8).sort().values))


def ragged(seed: int) -> Form:
    """Unchanged codes on a grid whose groups change."""
    codes = (floats(3, 30, 40) * 30).to(torch.int8)
    return Affine(coded(codes), Dense(floats(seed, 30, 3).abs()), runs=(7 + seed, 21, 12 - seed))


def scattered(seed: int) -> Form:
    codes = (floats(3, 30, 40) * 30).to(torch.int8)
    member = Dense((torch.arange(40) * (3 + seed) % 5).to(torch.uint8))
    return Affine(coded(codes, coder="fast"), Dense(floats(seed, 30, 5).abs()), member=member)


def moved(seed: int) -> Form:
    """Runs without effect, since the scale has one column; the grid of every other row changes."""
    scale = torch.full((30, 1), 0.1)
    codes = (floats(3, 30, 400) * 20).round().clamp(-100, 100)
    if seed:
        scale[::2], codes[::2] = scale[::2] / 1.2, (codes[::2] * 1.2).round()
    return Affine(coded(codes.to(torch.int8)), Dense(scale), runs=(7, 393))


FORMS: dict[str, Callable[[int], Form]] = {
    "runs of one grid": moved,
    "ragged groups": ragged,
    "scattered groups": scattered,
    "kept": lambda n: Masked(coded(mask(n)), coded(floats(1, 30, 40), mask(n))),
    "kept, foreign mask": foreign_mask,
    "kept, plain mask": lambda n: Masked(Dense(mask(2)), coded(floats(n, 30, 40), mask(2))),
    "mask in mask": nested,
    "codebook": table,
    "low rank": lambda n: LowRank(coded(floats(n, 30, 4)), Dense(floats(1, 4, 40))),
    "coded fast": lambda n: coded(floats(n, 30, 40), coder="fast"),
    "coded by one coder": lambda n: Codebook(
        coded((mask(n) * 3).byte(), coder="mixing"), Dense(floats(1, 4))
    ),
    "scalar": lambda n: Dense(torch.tensor(float(n))),
    "empty": lambda n: Dense(torch.empty(0, n)),
    "NaN": lambda n: Dense(torch.tensor([float("nan"), -0.0, float("inf"), float(n)])),
}


@pytest.mark.sampled
@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("kind", FORMS)
def test_forms(kind: str, tiny: bool, tmp_path: Path) -> None:
    for word, n in (("old", 0), ("new", 1)):
        save(one(FORMS[kind](n), other=Dense(floats(5, 9))), tmp_path / f"{word}.tersor", tiny=tiny)
    (tmp_path / "o").mkdir()
    there_and_back(tmp_path / "old.tersor", tmp_path / "new.tersor", tmp_path / "o")


def test_ledger_and_aliases(tmp_path: Path) -> None:
    old, new = one(Dense(floats(0, 50, 60))), one(Dense(floats(1, 50, 60)))
    ledger = Ledger("", {"tersor": 1, "seed": 0, "steps": [{"prune": {"keep": 0.5}}]})
    ledger.entries.append(Entry(0, "prune", "w", kind="done", text='"quoted" ü', data={"x": [1, 2.5, None]}))
    new = State(new.sites, new.forms, {"tied": "w"}, ledger)
    save(old, tmp_path / "old.tersor")
    save(new, tmp_path / "new.tersor")
    (tmp_path / "o").mkdir()
    there_and_back(tmp_path / "old.tersor", tmp_path / "new.tersor", tmp_path / "o")
    assert load(tmp_path / "o" / "out").ledger.digest == ledger.digest


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.pairwise(sorted(GOLDEN.glob("*.tersor")))], ids=lambda p: p.stem
)
def test_golden_files(first: Path, second: Path, tmp_path: Path) -> None:
    """Files with every feature; some hold streams and texts that this version would write differently."""
    there_and_back(first, second, tmp_path)


def stored(path: Path) -> dict[str, bytes]:
    """The bytes of the arrays of a file; leaves are decoded."""
    with NamedArrays(path) as parts:
        return {name: as_bytes(parts.array(name)).tobytes() for name in parts.names}


@pytest.mark.sampled(kind=("safetensors", "int8.tersor", "pruned.tersor"))
@pytest.mark.parametrize("kind", ["safetensors", "half.safetensors", *(f"{name}.tersor" for name in RECIPES)])
def test_the_second_reader_makes_the_same_arrays(kind: str, files: Path, tmp_path: Path) -> None:
    """reference/patcher.py, which implements docs/format.md."""
    import patcher

    diff(files / f"old.{kind}", files / f"new.{kind}", tmp_path / "p")
    found = patcher.patched(files / f"old.{kind}", tmp_path / "p")
    assert {name: value.values.tobytes() for name, value in found.items()} == stored(files / f"new.{kind}")


STORED = {
    "mask in mask": ["w:body.body"], "coded by one coder": ["w:index"],
    "kept, foreign mask": ["w:keep", "w:body"],
}  # fmt: skip


@pytest.mark.sampled(kind=tuple(kind for kind in FORMS if kind != "runs of one grid"))
@pytest.mark.parametrize("kind", FORMS)
def test_the_second_reader_and_forms(kind: str, tmp_path: Path) -> None:
    import patcher

    for word, n in (("old", 0), ("new", 1)):
        save(one(FORMS[kind](n), other=Dense(floats(5, 9))), tmp_path / word)
    diff(tmp_path / "old", tmp_path / "new", tmp_path / "p")
    found, expected = patcher.patched(tmp_path / "old", tmp_path / "p"), stored(tmp_path / "new")
    for name in STORED.get(kind, []):
        del expected[name], found[name]  # coded as stored bytes
    assert {name: value.values.tobytes() for name, value in found.items()} == expected


def test_the_same_files_give_the_same_patch(files: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        diff(files / "old.int8.tersor", files / "new.int8.tersor", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_old_file_is_not_overwritten(files: Path, tmp_path: Path) -> None:
    """The old file is not overwritten, since another patch may need it."""
    path = tmp_path / "m.tersor"
    path.write_bytes((files / "old.int8.tersor").read_bytes())
    diff(path, files / "new.int8.tersor", tmp_path / "p")
    for taken in (path, tmp_path / "p"):
        with pytest.raises(SettingError, match="is also the input"):
            patch(path, tmp_path / "p", taken)
    assert path.read_bytes() == (files / "old.int8.tersor").read_bytes()


# --- refused ---


@pytest.fixture(scope="module")
def made(files: Path) -> dict[str, Path]:
    """Patches by kind."""
    found = {}
    for kind in ("int8.tersor", "pruned.tersor", "tiny.tersor", "safetensors", "folder"):
        found[kind] = files / f"{kind}.patch"
        diff(files / f"old.{kind}", files / f"new.{kind}", found[kind])
    return found


def test_a_wrong_base(files: Path, made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"was made for another file.*Give the OLD"):
        patch(files / "old.pruned.tersor", made["int8.tersor"], tmp_path / "out")
    with pytest.raises(RefusedError, match="there is nothing to do"):
        patch(files / "new.int8.tersor", made["int8.tersor"], tmp_path / "out")
    with pytest.raises(SettingError, match=r"it is a patch.*tersor patch OLD PATCH"):
        patch(made["int8.tersor"], files / "old.int8.tersor", tmp_path / "out")
    with pytest.raises(SettingError, match="it is a patch"):
        diff(files / "old.int8.tersor", made["int8.tersor"], tmp_path / "out")
    for name in ("new.int8.tersor", "new.tiny.tersor", "new.safetensors"):
        with pytest.raises(FormatError, match="it is not a patch"):
            patch(files / "old.int8.tersor", files / name, tmp_path / "out")
    with pytest.raises(StorageError):
        patch(files / "old.int8.tersor", tmp_path / "none", tmp_path / "out")
    with pytest.raises(StorageError):
        diff(files / "old.int8.tersor", tmp_path / "none", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_shard_of_another_name_is_another_base(files: Path, made: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_shards(weights(0), other)
    patch(other, made["folder"], tmp_path / "out")
    (other / "README.md").write_text("not weights")
    patch(other, made["folder"], tmp_path / "again")
    save_file(
        {**load_file(other / "part0.safetensors"), "first.weight": torch.zeros(48, 40)},
        other / "part0.safetensors",
    )
    with pytest.raises(RefusedError):
        patch(other, made["folder"], tmp_path / "out")


def take_apart(path: Path, head: bytes) -> tuple[dict[str, str], bytes, bytes]:
    """(metadata, text, streams) of a patch, read as docs/format.md specifies."""
    tensors, metadata = reference.container(path.read_bytes())
    unpacker = zlib.decompressobj(-15, reference.DICTIONARY + head)
    return (
        metadata,
        unpacker.decompress(tensors["patch"].values.tobytes()),
        tensors["streams"].values.tobytes(),
    )


def head_of(old: Path) -> bytes:
    """The JSON of OLD."""
    data = old.read_bytes()
    if data[:4] == reference.MAGIC:
        return zlib.decompressobj(-15, reference.TINY_DICTIONARY).decompress(data[8:])
    with safe_open(old, "pt") as file:
        metadata = file.metadata() or {}
    length = struct.unpack("<Q", data[:8])[0]
    if "tersor" not in metadata:
        return data[8 : 8 + length]
    tensors, _ = reference.container(data)
    return zlib.decompressobj(-15, reference.DICTIONARY).decompress(tensors["tersor"].values.tobytes())


def text_of(path: Path, old: Path) -> bytes:
    return take_apart(path, head_of(old))[1]


def put_together(metadata: dict[str, str], text: bytes, streams: bytes, head: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, reference.DICTIONARY + head)
    data = packer.compress(text) + packer.flush()
    metadata = metadata | {"size": str(len(text)), "crc": f"{zlib.crc32(text):08x}{zlib.crc32(streams):08x}"}
    tensors = {"patch": ("U8", [len(data)], data), "streams": ("U8", [len(streams)], streams)}
    return safetensors_file(tensors, metadata)


VALUES = (
    0,
    -1,
    2**40,
    1.5,
    True,
    None,
    "",
    "x",
    [],
    [1],
    [2**40, 2**40],
    {},
    "same",
    "alone",
    "max",
    "float32",
)


def forged(text: bytes, rng: random.Random) -> bytes:
    """The text with one value replaced."""
    document = json.loads(text)
    spots = list(walk(document))
    holder, key = rng.choice(spots)
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = copy.deepcopy(rng.choice((*VALUES, *(h[k] for h, k in rng.sample(spots, 3)))))
        if rng.random() < 0.3 and isinstance(holder, dict):
            holder[rng.choice(("how", "of", "grid", "coder", "keep", "n", "text"))] = rng.choice(VALUES)
    return json.dumps(document).encode()


def walk(value: Any) -> Any:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from walk(value[key])


@pytest.mark.sampled(kind=("tiny.tersor", "safetensors"))
@pytest.mark.parametrize("kind", ["int8.tersor", "pruned.tersor", "tiny.tersor", "safetensors"])
def test_damaged_patches(kind: str, files: Path, made: dict[str, Path], tmp_path: Path) -> None:
    """Patches with flipped bits, cut, or forged with correct checksums: a Tersor error, and no file."""
    old, path, rng = files / f"old.{kind}", tmp_path / "p", random.Random(kind)
    data, head = made[kind].read_bytes(), head_of(old)
    metadata, text, streams = take_apart(made[kind], head)
    for number in range(125):
        if number % 4 == 0:
            at = rng.randrange(len(data))
            bad = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif number % 4 == 1:
            bad = data[: rng.randrange(len(data))]
        elif number % 4 == 2:
            at = rng.randrange(len(streams))
            changed = streams[:at] + bytes([streams[at] ^ 1 << rng.randrange(8)]) + streams[at + 1 :]
            bad = put_together(metadata, text, changed, head)
        else:
            bad = put_together(metadata, forged(text, rng), streams, head)
        path.write_bytes(bad)
        try:
            patch(old, path, tmp_path / "out")
        except TersorError:
            assert not (tmp_path / "out").exists()
            continue
        # The change had no effect, such as settings stated twice; the result is never another file.
        assert (tmp_path / "out").read_bytes() == (files / f"new.{kind}").read_bytes()
        (tmp_path / "out").unlink()


@pytest.mark.parametrize("kind", ["ragged groups", "scattered groups"])
def test_only_even_groups_can_move(kind: str, tmp_path: Path) -> None:
    import patcher

    old = tmp_path / "old"
    for word, n in (("old", 0), ("new", 1)):
        save(one(FORMS[kind](n)), tmp_path / word)
    diff(old, tmp_path / "new", tmp_path / "p")
    metadata, text, streams = take_apart(tmp_path / "p", head_of(old))
    document = json.loads(text)
    assert b'"grid"' not in text
    document["parts"]["w:codes"] = {"grid": True, "coder": "max"}
    (tmp_path / "p").write_bytes(put_together(metadata, json.dumps(document).encode(), streams, head_of(old)))
    with pytest.raises(FormatError, match="its groups are not equal"):
        patch(old, tmp_path / "p", tmp_path / "out")
    with pytest.raises(reference.BadFile, match="its groups are not even"):
        patcher.patched(old, tmp_path / "p")


def test_the_limit_of_declared_elements(files: Path, made: dict[str, Path], tmp_path: Path) -> None:
    old = files / "old.safetensors"
    metadata, text, streams = take_apart(made["safetensors"], head_of(old))
    document = json.loads(text)
    size = 1 << 36
    document["head"] = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    document["parts"] = {"w": {"how": "alone", "n": [len(streams)]}}
    (tmp_path / "p").write_bytes(put_together(metadata, json.dumps(document).encode(), streams, head_of(old)))
    with pytest.raises(FormatError, match="more elements than its bytes"):
        patch(old, tmp_path / "p", tmp_path / "out")


def test_killed_while_patching(files: Path, made: dict[str, Path], tmp_path: Path) -> None:
    """After a kill the target is the earlier file or NEW, complete."""
    before, after = b"what was there", (files / "new.int8.tersor").read_bytes()
    words = [files / "old.int8.tersor", made["int8.tersor"], tmp_path / "out"]
    code = (
        "import sys\nfrom tersor.io.patch.patch import patch\npatch(*sys.argv[1:])\nprint(flush=True)\n"
        "while True: patch(*sys.argv[1:])"
    )
    rng, given = random.Random(0), hashlib.sha256(words[0].read_bytes()).digest()
    for _ in range(4):
        words[2].write_bytes(before)
        reading, writing = os.pipe()
        process = forks.start(["-c", code, *words], stdout=writing)
        os.close(writing)
        with open(reading) as file:
            if rng.random() < 0.7:
                file.readline()
            time.sleep(rng.uniform(0.0, 0.4))
            assert process.kill() == -signal.SIGKILL
        assert words[2].read_bytes() in (before, after)
        assert hashlib.sha256(words[0].read_bytes()).digest() == given
