"""Small files that ask for much: time, memory, long messages, the terminal. Each is refused, and says why."""

import io
import itertools
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import constant, constant_bytes, floats, one_site, reference
from safetensors.torch import save_file

from tersor.core.recipe import Recipe
from tersor.errors import LONGEST, FormatError, SiteError, TersorError
from tersor.io.checkpoint import Checkpoint
from tersor.io.container import load, read_tensor
from tersor.io.container_writer import save
from tersor.io.pack import pack
from tersor.io.patch.diff import diff
from tersor.io.patch.patch import patch
from tersor.steps import STEPS, Entropy
from tersor.steps.recipe_text import from_yaml

SECONDS = 5  # of processor time, on a slow machine


def tiny(pieces: Any) -> bytes:
    pieces.tiny = True
    for site in pieces.document["sites"].values():
        site.pop("digest", None)
    return pieces.bytes()


def product(size: int, dtype: str) -> bytes:
    """A product of constants, in a file of some 60 bytes."""
    planes = {"float16": 2, "float32": 4, "float64": 8}[dtype]
    side = constant([size, size], dtype, planes)
    form = {"form": "lowrank", "left": side, "right": side}
    return tiny(one_site(form, [size, size], constant_bytes(60, planes) * 2, dtype=dtype))


def runs(columns: int) -> bytes:
    """No rows, so no elements, but a group for each of the columns."""
    codes = {"form": "dense", "shape": [0, columns], "dtype": "int8"}
    form = {"form": "affine", "runs": [columns], "codes": codes, "scale": {"form": "dense", "shape": [1, 1]}}
    return tiny(one_site(form, [0, columns], floats(1.0)))


def mixed(elements: int) -> bytes:
    """A stream of mixed contexts whose elements cost hardly a bit, and a microsecond each."""
    stream = bytes([5 | 4 << 3, 0, 0, 0, 0]) + b"\xff" * 12
    form = {"form": "coded", "planes": [len(stream)], "size": [elements], "dtype": "uint8"}
    return tiny(one_site(form, [elements], stream, dtype="uint8"))


HEAVY = {
    "product, float16": product(2000, "float16"), "product, float32": product(2300, "float32"),
    "product, float64": product(1500, "float64"), "runs of no rows": runs(1 << 34),
    "runs that fit memory": runs(1 << 27), "mixing": mixed(12_000_000),
}  # fmt: skip


@pytest.mark.parametrize("what", HEAVY)
def test_work_is_bounded_by_the_size_of_the_file(what: str, tmp_path: Path) -> None:
    """A file of 63 bytes kept `load` busy for a minute."""
    path = tmp_path / "m"
    path.write_bytes(HEAVY[what])
    assert path.stat().st_size < 200
    began = time.process_time()
    with pytest.raises(FormatError, match=r"declares [\d,]+ elements.*raise the limit"):
        load(path)
    assert time.process_time() - began < SECONDS
    with pytest.raises(reference.BadFile):
        reference.read(path)


def test_products_of_usual_sizes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(product(500, "float32"))
    assert load(path).state_dict()["w"].shape == (500, 500)


# --- pickles ---


class Call:
    """Pickles as a call of a function with these arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def doubled(levels: int) -> Any:
    """A dict that is reached 2^levels times."""
    value: Any = {"w": torch.ones(1)}
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


def wide(count: int) -> Any:
    row = dict.fromkeys(map(str, range(count)), 0)
    return [row] * count


def storage_of(elements: int) -> bytes:
    """A file of the older kind, which claims a storage that it does not hold."""
    file = io.BytesIO()
    torch.save({"w": torch.zeros(7)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue().replace(b"K\x07", b"J" + elements.to_bytes(4, "little"))


def saved(value: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def inflating() -> bytes:
    """A zip whose record is a thousand times as long as it is here."""
    out = io.BytesIO()
    plain = io.BytesIO(saved({"w": torch.zeros(20_000_000)}))
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


BOMBS = {
    "doubled": lambda: saved(doubled(28)), "doubled, older": lambda: saved(doubled(28), zipped=False),
    "bytearray": lambda: saved({"w": Call(bytearray, 3_000_000_000)}),
    "bytearray, older": lambda: saved({"w": Call(bytearray, 3_000_000_000)}, zipped=False),
    "tensor": lambda: saved({"w": Call(torch.Tensor, 30_000, 30_000)}, zipped=False),
    "storage": lambda: storage_of(700_000_000), "zip": inflating, "wide": lambda: saved({"w": wide(500)}),
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
def test_memory_is_bounded_by_the_size_of_the_checkpoint(what: str, tmp_path: Path) -> None:
    """A pickle of 404 bytes took 2.9 GB."""
    path = tmp_path / "w.pt"
    path.write_bytes(BOMBS[what]())
    resource = pytest.importorskip("resource")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(
        TersorError, match=r"justifies|there are more than|holds Python objects|a state dict is expected"
    ):
        Checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("nbytes", [400, 1000])
def test_a_pickle_that_ends_in_a_number_is_refused(nbytes: int, tmp_path: Path) -> None:
    """Torch raises struct.error, which is no ValueError."""
    data = saved({f"layer{n}": torch.zeros(3) for n in range(30)}, zipped=False)
    at = data.index(b"X", nbytes)  # a text, and the 4 bytes of its length
    (tmp_path / "w.pt").write_bytes(data[: at + 2])
    with pytest.raises(FormatError, match=r"w\.pt: it cannot be read as a PyTorch checkpoint"):
        Checkpoint(tmp_path / "w.pt")


def test_the_last_pickle_of_an_older_file_is_looked_at(tmp_path: Path) -> None:
    """The list of storages: torch read whatever it asks for."""
    data = saved({"w": torch.zeros(7)}, zipped=False)
    at = data.rindex(b"]q") - 2
    assert data[at : at + 2] == b"\x80\x02"
    ask = pickle.dumps([Call(bytearray, 3_000_000_000)], protocol=2)
    (tmp_path / "w.pt").write_bytes(data[:at] + ask + data[at:])
    with pytest.raises(FormatError, match="bytearray in it asks for more memory"):
        Checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("decoy", [b"no pickle", b""], ids=["no pickle", "damaged"])
def test_a_pickle_behind_one_that_cannot_be_read_is_looked_at(decoy: bytes, tmp_path: Path) -> None:
    plain, path = io.BytesIO(saved({"w": Call(bytearray, 3_000_000_000)})), tmp_path / "w.pt"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        kind = zipfile.ZIP_STORED if decoy else zipfile.ZIP_DEFLATED
        new.writestr("archive/decoy.pkl", decoy or b"decoy" * 99, kind)
        for name in old.namelist():
            new.writestr(name, old.read(name))
    if not decoy:
        data = bytearray(path.read_bytes())
        at = data.index(b"decoy.pkl") + len("decoy.pkl")
        data[at : at + 4] = b"\xff" * 4
        path.write_bytes(data)
    with pytest.raises(FormatError, match="bytearray in it asks for more memory"):
        Checkpoint(path)


def test_no_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.pt").write_bytes(saved({"w": torch.zeros(7)}))

    def load(*args: Any, **named: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        Checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [False, True])
def test_ordinary_checkpoints_are_read(zipped: bool, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(300, 40), torch.nn.BatchNorm1d(40))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    more = {
        "optimizer": optimizer.state_dict(),
        "seed": 2**62,
        "history": list(range(5000)),
        "b": bytearray(9),
    }
    torch.save({"model": net.state_dict(), **more}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with Checkpoint(tmp_path / "w.pt") as found:
        assert found.slots.keys() == net.state_dict().keys()


def test_a_zip_whose_names_are_not_text_is_refused(tmp_path: Path) -> None:
    data = saved({"w": torch.zeros(3)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = archive.namelist()[0].encode()
    at = data.rindex(b"PK\x01\x02")
    flagged = bytearray(data[:at] + data[at:])
    begin = data.index(b"PK\x01\x02")
    flagged[begin + 9] |= 8  # the name is UTF-8
    flagged[begin + 46 : begin + 46 + len(name)] = b"\xb4" * len(name)
    (tmp_path / "w.pt").write_bytes(bytes(flagged))
    with pytest.raises(FormatError, match="damaged zip file|cannot be read as a PyTorch checkpoint"):
        Checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 6000,
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")),
        "steps: &a [*a]",
        "steps: [{? [a] : b}]",
        "tersor: 9" + "9" * 5000,
        "- " * 3000,
        "steps: [2001-13-45]",
    ],
    ids=["brackets", "laughs", "itself", "list as key", "digits", "deep", "date"],
)
def test_recipes_are_bounded(text: str) -> None:
    """PyYAML takes the square of open brackets, and raises errors of many kinds."""
    began = time.process_time()
    with pytest.raises(TersorError) as caught:
        from_yaml(text, STEPS)
    assert len(str(caught.value)) < LONGEST + 100
    assert time.process_time() - began < SECONDS


# --- messages and the terminal ---

LONG = "layer." + "x" * 70_000
ESCAPE = "\x1b[2J\x1b]0;owned\x07a\nerror: all is well\x85\u202eb"


@pytest.mark.parametrize("name", [LONG, ESCAPE])
def test_messages_are_one_short_line(name: str, tmp_path: Path) -> None:
    """Names of 70,000 characters gave messages of 70 kB; escape sequences in names reached the terminal."""
    save_file({name: torch.randn(9, 9), "b": torch.full((3,), float("nan"))}, tmp_path / "w")
    messages = []
    with pytest.raises(TersorError) as caught:
        pack(tmp_path / "w", tmp_path / "m", Recipe((Entropy(),)))
    messages.append(str(caught.value))
    save_file({name: torch.full((3,), float("nan"))}, tmp_path / "w")
    with pytest.raises(TersorError) as caught:
        pack(tmp_path / "w", tmp_path / "m", Recipe((Entropy(),)))
    messages.append(str(caught.value))
    save_file({name: torch.randn(9, 9)}, tmp_path / "w")
    pack(tmp_path / "w", tmp_path / "m", Recipe((Entropy(),)))
    with pytest.raises(SiteError) as missing:
        read_tensor(tmp_path / "m", name[:-1])
    messages.append(str(missing.value))
    data = bytearray((tmp_path / "m").read_bytes())
    data[-3] ^= 1
    (tmp_path / "m").write_bytes(bytes(data))
    with pytest.raises(FormatError) as damaged:
        load(tmp_path / "m")
    messages.append(str(damaged.value))
    for message in messages:
        assert len(message) < LONGEST + 100, message[:300]
        assert message.isprintable(), message


def test_a_message_survives_a_pickle() -> None:
    error = SiteError(f"{LONG}: unknown\nline")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301
    assert len(str(error)) < 300


def test_a_site_named_as_the_leaf_of_another(tmp_path: Path) -> None:
    """`diff` looked for the leaf a:keep in the site of that name."""
    from tersor.core.state import State
    from tersor.encode import coded
    from tersor.forms import Dense, Masked
    from tersor.model.sites import Site
    from tersor.record.ledger import Ledger

    for seed, word in enumerate(("old", "new")):
        keep = torch.rand(30, 40, generator=torch.Generator().manual_seed(seed)) < 0.5
        w = torch.randn(30, 40, generator=torch.Generator().manual_seed(seed))
        forms = {"a": Masked(coded(keep), coded(w, keep)), "a:keep": Masked(Dense(keep), Dense(w))}
        sites = {name: Site(name, (30, 40), "float32", "linear", 0, 1, "") for name in forms}
        save(State(sites, forms, {}, Ledger("", {})), tmp_path / word)
    assert not diff(tmp_path / "old", tmp_path / "new", tmp_path / "p").whole
    patch(tmp_path / "old", tmp_path / "p", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "new").read_bytes()
