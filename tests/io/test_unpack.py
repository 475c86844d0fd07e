"""Unpack: a selection of tensors, shards, the short header, the bytes read for one tensor, threads."""

import json
from pathlib import Path
from threading import Event, Timer, get_ident
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.core.recipe import Recipe
from tersor.errors import FormatError, RefusedError, SettingError, SiteError, StorageError
from tersor.io import pool
from tersor.io.checkpoint import Checkpoint
from tersor.io.container import TersorFile, load, read_tensor
from tersor.io.pack import pack
from tersor.io.unpack import unpack
from tersor.io.verify import verify
from tersor.steps import Entropy, Quantize

LOSSLESS = Recipe((Entropy(coder="fast"),))


def mixed(count: int = 24) -> dict[str, Tensor]:
    """Tensors of several dtypes and sizes, so that threads do not end in the order in which they began."""
    rng = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    given = {
        f"blocks.{n}.weight": torch.randn(3 + 60 * (n % 5), 40, generator=rng).to(dtypes[n % 4])
        for n in range(count)
    }
    return given | {"steps": torch.tensor(12), "mask": torch.ones(4, dtype=torch.bool)}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """w.pt with a tied tensor, packed as m.tersor."""
    given = mixed()
    torch.save(given | {"tied.weight": given["blocks.4.weight"]}, tmp_path / "w.pt")
    pack(tmp_path / "w.pt", tmp_path / "m.tersor", LOSSLESS)
    return tmp_path / "m.tersor"


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in expected.items()
    )


# --- threads ---


@pytest.mark.sampled
@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("recipe", [LOSSLESS, Recipe((Quantize(bits=3, range="mse"), Entropy()))])
def test_same_bytes_for_any_number_of_workers(recipe: Recipe, tiny: bool, tmp_path: Path) -> None:
    save_file(mixed(9), tmp_path / "w.safetensors")
    found = set()
    for workers in (1, 4, 7):
        pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", recipe, workers=workers, tiny=tiny)
        unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors", workers=workers)
        rows = tuple(map(repr, verify(tmp_path / "m.tersor", workers=workers)))
        found.add(((tmp_path / "m.tersor").read_bytes(), (tmp_path / "u.safetensors").read_bytes(), rows))
    assert len(found) == 1


def test_workers_are_checked(packed: Path) -> None:
    with pytest.raises(SettingError, match="workers=0, but it is a number of threads: 1 or more"):
        unpack(packed, packed.with_name("u.safetensors"), workers=0)
    assert not packed.with_name("u.safetensors").exists()


def test_memory_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BUDGET", 100)
    sizes, held, most = [10, 90, 30, 250, 10, 10, 60, 40, 100, 1], [], []

    def read(item: int) -> int:
        held.append(item)
        most.append(sum(sizes[n] for n in held))
        return item * item

    for number, found in enumerate(
        pool.in_order(range(len(sizes)), sizes.__getitem__, read, lambda item, given: (item, given), 3)
    ):
        assert found == (number, number**2)
        held.remove(number)
    assert max(size for size in most if size != 250) == 100  # up to the budget, not more
    assert 250 in most  # a larger one alone


def test_the_caller_works_too_while_it_waits() -> None:
    """With one thread the caller does all jobs. With two, one runs the first job, the other the rest."""
    alone = pool.in_order(range(9), lambda _: 1, lambda _: None, lambda *_: get_ident(), 1)
    assert set(alone) == {get_ident()}
    others_done = Event()

    def work(item: int, _: object) -> int:
        if item == 0:
            assert others_done.wait(30)
        elif item == 3:
            others_done.set()
        return get_ident()

    first, *others = pool.in_order(range(4), lambda _: 1, lambda _: None, work, 2)
    assert len({first, *others}) == 2
    assert first not in others
    assert get_ident() in (first, *others)


def test_first_error_ends_all() -> None:
    begun = []

    def work(item: int, _: object) -> int:
        begun.append(item)
        if item == 3:
            raise FormatError("three")
        return item

    jobs = pool.in_order(range(1000), lambda _: 1, lambda _: None, work, 2)
    assert [next(jobs) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(FormatError, match="three"):
        next(jobs)
    assert max(begun) < 20


@pytest.mark.parametrize(("error", "at_once"), [(KeyboardInterrupt(), True), (FormatError("one"), False)])
def test_an_interrupt_is_raised_at_once(error: BaseException, at_once: bool) -> None:
    """An interrupt of the caller's own work, while another thread runs the job before."""
    mine, begun, busy, go = get_ident(), [], Event(), Event()

    def work(item: int, _: object) -> int:
        if get_ident() != mine:
            busy.set()
            go.wait(30)
            return item
        begun.append(item)
        if len(begun) == 1:
            Timer(0.2, go.set).start()
            raise error
        return item

    def read(item: int) -> None:
        assert item == 0 or busy.wait(30)

    with pytest.raises(type(error)):
        list(pool.in_order(range(6), lambda _: 1, read, work, 2))
    assert (begun == [1]) == at_once


# --- shards ---


def test_shards_as_hugging_face_has_them(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    nbytes = unpack(packed, out, shard="80kB")
    given = torch.load(tmp_path / "w.pt")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sum(path.stat().st_size for path in out.iterdir()) == nbytes
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in given.values())
    found: dict[str, Tensor] = {}
    for file in files:
        part = load_file(out / file)
        assert sum(value.nbytes for value in part.values()) <= 80_000
        assert {name for name, where in index["weight_map"].items() if where == file} == part.keys()
        with safe_open(out / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= part
    assert same(found, given)
    with Checkpoint(out) as again:  # read with our own reader
        assert again.slots.keys() == given.keys()


def test_shards_of_one_are_one_file(packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "one", shard=10**9)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    assert same(load_file(tmp_path / "one" / "model.safetensors"), torch.load(tmp_path / "w.pt"))
    unpack(packed, tmp_path / "many", shard=1)
    assert len(list((tmp_path / "many").glob("model-*"))) == len(load(packed).sites)


@pytest.mark.extra
@pytest.mark.long
def test_transformers_reads_the_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "given", max_shard_size="4kB")
    pack(tmp_path / "given", tmp_path / "m.tersor", LOSSLESS)
    unpack(tmp_path / "m.tersor", tmp_path / "back", shard="6kB")
    config.save_pretrained(tmp_path / "back")
    back = transformers.BertModel.from_pretrained(tmp_path / "back")
    assert same(back.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5", 5), (5, 5), ("2GB", 2 * 10**9), ("3 MiB", 3 << 20), ("7k", 7000), ("1T", 10**12), ("9B", 9)],
)
def test_sizes_are_read(text: int | str, nbytes: int) -> None:
    from tersor.io.unpack import read_size

    assert read_size(text) == nbytes


@pytest.mark.parametrize("text", ["0", "-1", "2GX", "", "1.5GB", "GB", 0])
def test_invalid_sizes(text: int | str, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is a number of bytes: 2000000000, 500MB, 2GB, 1GiB"):
        unpack(packed, tmp_path / "f", shard=text)
    assert not (tmp_path / "f").exists()


def test_an_existing_folder_is_left_alone(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").write_text("")
    with pytest.raises(StorageError, match="exists already"):
        unpack(packed, tmp_path / "f", shard="1GB")
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["mine"]


def test_no_folder_of_a_damaged_file(packed: Path, tmp_path: Path) -> None:
    with TersorFile(packed) as file:
        place = file.places.found["blocks.23.weight"]
    data = bytearray(packed.read_bytes())
    data[place.begin] ^= 1
    packed.write_bytes(data)
    with pytest.raises(FormatError, match="blocks.23.weight: damaged"):
        unpack(packed, tmp_path / "f", shard="20kB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.tersor", "w.pt"]


# --- a selection of tensors ---


def test_only_some_tensors(packed: Path, tmp_path: Path) -> None:
    given, out = torch.load(tmp_path / "w.pt"), tmp_path / "u.safetensors"
    unpack(packed, out, only="blocks.1*")
    assert same(load_file(out), {name: v for name, v in given.items() if name.startswith("blocks.1")})
    unpack(packed, out, only=["steps", "tied.*"])  # an alias of blocks.4.weight, which is not selected
    assert same(load_file(out), {name: given[name] for name in ("steps", "tied.weight")})
    with pytest.raises(SiteError, match="no tensor is called 'block.*'"):
        unpack(packed, out, only=["steps", "block.*"])


class Counted:
    """A file that records the number and the ranges of bytes read."""

    def __init__(self, file: Any) -> None:
        self.file, self.ranges = file, []

    def readinto(self, buffer: Any) -> int:
        at = self.file.tell()
        count = self.file.readinto(buffer)
        self.ranges.append((at, at + count))
        return int(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_one_tensor_is_read_without_the_rest(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Counted] = []
    real = open

    def counting(*words: Any, **more: Any) -> Counted:
        opened.append(Counted(real(*words, **more)))
        return opened[-1]

    with TersorFile(packed) as file:
        text, place = file.source.slots["tersor"], file.places.found["blocks.4.weight"]
        header = min(slot.begin for slot in file.source.slots.values())
    given = torch.load(packed.with_name("w.pt"))
    monkeypatch.setattr("builtins.open", counting)
    found = read_tensor(packed, "tied.weight")
    monkeypatch.undo()
    assert torch.equal(found, given["tied.weight"])
    (source,) = opened
    wanted = [(0, 4), (0, 64), (8, header), (text.begin, text.end), (place.begin, place.end)]
    assert source.ranges == wanted  # the first bytes of the header, the text, the tensor
    assert sum(end - begin for begin, end in wanted) < packed.stat().st_size / 5


def test_only_damage_of_the_tensor_read_is_reported(packed: Path) -> None:
    with TersorFile(packed) as file:
        place = file.places.found["blocks.7.weight"]
    data = bytearray(packed.read_bytes())
    data[(place.begin + place.end) // 2] ^= 1
    packed.write_bytes(data)
    read_tensor(packed, "blocks.8.weight")
    with pytest.raises(FormatError, match=r"m\.tersor: blocks\.7\.weight: damaged: its digest is"):
        read_tensor(packed, "blocks.7.weight")
    assert [row.site for row in verify(packed) if not row.sound] == ["blocks.7.weight"]


# --- the short header ---


def test_tiny_holds_the_same_in_fewer_bytes(tmp_path: Path) -> None:
    """Overhead: about 100 bytes for the six tensors of a LeNet, and 20 more per layer."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    given = {f"{name}.weight": torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    given |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    save_file(given, tmp_path / "w.safetensors")
    recipe = Recipe((Quantize(bits=2, per="tensor"), Entropy()))
    sizes, loaded = {}, {}
    for tiny in (False, True):
        path = tmp_path / f"{tiny}.tersor"
        assert pack(tmp_path / "w.safetensors", path, recipe, tiny=tiny).nbytes == path.stat().st_size
        loaded[tiny] = load(path)
        sizes[tiny] = path.stat().st_size - loaded[tiny].nbytes
        assert all(row.sound for row in verify(path))
    assert loaded[True].digest == loaded[False].digest
    assert loaded[True].sites == loaded[False].sites
    assert not loaded[True].ledger.entries
    assert sizes[True] <= 125
    assert sizes[False] > 4 * sizes[True]
    unpack(tmp_path / "True.tersor", tmp_path / "u.safetensors")
    assert same(load_file(tmp_path / "u.safetensors"), loaded[False].state_dict())
    assert torch.equal(read_tensor(tmp_path / "True.tersor", "fc3.bias"), given["fc3.bias"])


def test_tiny_is_for_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.randn(100, 100)}, tmp_path / "w.safetensors")
    monkeypatch.setattr("tersor.io.short_header.LARGEST", 10_000)
    with pytest.raises(RefusedError, match=r"at most 10,000, since it is read whole. Leave out --tiny"):
        pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS, tiny=True)
    assert not (tmp_path / "m.tersor").exists()


def test_tiny_files_are_not_packed_again(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", LOSSLESS, tiny=True)
    with pytest.raises(SettingError, match=r"is a \.tersor file already"):
        pack(tmp_path / "m.tersor", tmp_path / "n.tersor", LOSSLESS)
