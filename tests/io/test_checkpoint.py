"""Checkpoints: each kind of file gives the saved tensors, and no code in it is executed."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forge import safetensors_file
from safetensors.torch import save_file
from torch import Tensor

from tersor.core.state import State
from tersor.dtypes import CODES
from tersor.errors import FormatError, SettingError, StorageError
from tersor.forms import Dense
from tersor.io.checkpoint import Checkpoint
from tersor.io.container_writer import save
from tersor.model.sites import Site
from tersor.record.ledger import Ledger


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "fc.weight": torch.randn(6, 5, generator=g),
        "fc.bias": torch.randn(6, generator=g).half(),
        "norm.running_mean": torch.randn(3, generator=g).double(),
        "steps": torch.tensor(7),
        "mask": torch.rand(4, 4, generator=g) < 0.5,
        "none": torch.zeros(0, 3),
        "b": torch.randn(2, 3, 4, generator=g).bfloat16(),
    }


def save_legacy(values: dict[str, Tensor], path: Path) -> None:
    torch.save(values, path, _use_new_zipfile_serialization=False)


def save_packed_zip(values: dict[str, Tensor], path: Path) -> None:
    """A checkpoint that another tool packed again, compressed."""
    torch.save(values, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def save_other_zip(values: dict[str, Tensor], path: Path) -> None:
    """The same, not compressed: its records are at other offsets than PyTorch's."""
    torch.save(values, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def save_training(values: dict[str, Tensor], path: Path) -> None:
    optimizer = {"state": {0: {"momentum": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "model": values, "optimizer": optimizer}, path)


WRITERS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], None]]] = {
    "safetensors": ("w.safetensors", lambda values, path: save_file(values, path, {"format": "pt"})),
    "torch": ("w.pt", torch.save),
    "torch, old": ("w.pth", save_legacy),
    "torch, compressed": ("w.bin", save_packed_zip),
    "torch, other offsets": ("w.bin", save_other_zip),
    "torch, of a training": ("w.ckpt", save_training),
}


def read_all(path: Path) -> dict[str, Tensor]:
    with Checkpoint(path) as source:
        for name, slot in source.slots.items():
            tensor = source.read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (slot.dtype, slot.shape)
            assert tensor.is_contiguous()
        values = {name: source.read(name) for name in source.slots}
        return values | {alias: values[name] for alias, name in source.aliases.items()}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("kind", WRITERS)
def test_reads_what_was_saved(kind: str, tmp_path: Path) -> None:
    name, write = WRITERS[kind]
    write(tensors(), tmp_path / name)
    check_equal(read_all(tmp_path / name), tensors())


def test_training_state_is_named(tmp_path: Path) -> None:
    save_training(tensors(), tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt") as source:
        assert (source.key, source.ignored) == ("model", {"epoch": 0, "optimizer": 1})
    torch.save({**tensors(), "epoch": 3}, tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt") as source:
        assert (source.key, source.ignored) == ("", {"epoch": 0})


@pytest.mark.parametrize("write", [torch.save, save_legacy, save_packed_zip, save_other_zip])
def test_views_and_ties(write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    given = {
        "embed": base, "head": base, "turned": base.t(), "row": base[2], "strided": base[::2, 1::2],
        "alone": torch.ones(3), "same values": torch.ones(3),
    }  # fmt: skip
    write(given, tmp_path / "w.pt")
    check_equal(read_all(tmp_path / "w.pt"), given)
    with Checkpoint(tmp_path / "w.pt") as source:
        assert source.aliases == {"head": "embed"}


def test_tensors_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100)}, tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt") as source:
        assert source.where["w"].tensors["w"].device.type == "meta"  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    torch.save({"w": value}, tmp_path / "w.pt")
    save_file({"w": value}, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        found = read_all(tmp_path / name)["w"]
        assert found.dtype is dtype
        assert found.view(torch.uint8).tolist() == value.view(torch.uint8).tolist()


# --- folders ---


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_folder(kind: str, index: bool, tmp_path: Path) -> None:
    write = save_file if kind == "safetensors" else torch.save
    names = list(tensors())
    parts = {f"model-{n}-of-2.{kind}": names[n - 1 :: 2] for n in (1, 2)}
    for file, held in parts.items():
        write({name: tensors()[name] for name in held}, tmp_path / file)
    if index:
        places = {name: file for file, held in parts.items() for name in held}
        (tmp_path / f"model.{kind}.index.json").write_text(json.dumps({"weight_map": places}))
        write({"other": torch.ones(2)}, tmp_path / f"consolidated.{kind}")  # not in the index
    check_equal(read_all(tmp_path), tensors())


def folder_with(tmp_path: Path, **files: str) -> Path:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            '{"weight_map":{"w":"../a.safetensors"}}',
            "w is in '../a.safetensors', which is not a file in the same folder",
        ),
        (
            '{"weight_map":{"w":"/etc/passwd"}}',
            "w is in '/etc/passwd', which is not a file in the same folder",
        ),
        ('{"weight_map":{"w":".."}}', "which is not a file in the same folder"),
        ('{"weight_map":{"w":1}}', "which is not a file in the same folder"),
        ('{"weight_map":{"v":"a.safetensors"}}', "the index says that it holds v, but it does not"),
        ('{"weight_map":{}}', "an index must have a weight_map"),
        ("[]", "an index must have a weight_map"),
        ("{", "is not JSON"),
    ],
)
def test_bad_index(index: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        Checkpoint(folder_with(tmp_path, m__index__json=index))


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the folder holds no weights"):
        Checkpoint(tmp_path)


def test_name_in_two_files(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match="b.safetensors: w is in another file of"):
        Checkpoint(folder_with(tmp_path))


def test_two_indexes(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="2 index files"):
        Checkpoint(folder_with(tmp_path, a__index__json="{}", b__index__json="{}"))


def test_a_file_of_the_index_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone.safetensors: cannot be read: No such file"):
        Checkpoint(folder_with(tmp_path, a__index__json='{"weight_map":{"w":"gone.safetensors"}}'))


# --- what is refused ---


class Evil:
    """Its pickle creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(zipped: bool, tmp_path: Path) -> None:
    path, made = tmp_path / "w.pt", tmp_path / "made"
    torch.save({"w": torch.ones(2), "x": Evil(made)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        FormatError, match=r"w.pt: it holds Python objects \(posix.mkdir\), and loading them would run code"
    ):
        Checkpoint(path)
    assert not made.exists()


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(
        FormatError, match=r"\(torch.nn.modules.linear.Linear\).*torch.save\(model.state_dict\(\)"
    ):
        Checkpoint(tmp_path / "w.pt")


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": [1, 2]}, protocol=2))


def cut(path: Path) -> None:
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:-200])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def overlapping(path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(1000)}, path)


def sparse(path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, path)


def no_tensors(path: Path) -> None:
    torch.save({"a": 1, "b": [2, {"c": "d"}]}, path)


def one_tensor(path: Path) -> None:
    torch.save(torch.ones(2), path)


def huge_header(path: Path) -> None:
    path.write_bytes((10**8 + 1).to_bytes(8, "little") + b"{" + bytes(100))


def not_weights(path: Path) -> None:
    path.write_text("hello, world: no weights here")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (bare_pickle, "it cannot be read as a PyTorch checkpoint|it holds Python objects"),
        (cut, "damaged zip|cannot be read as a PyTorch checkpoint"),
        (other_zip, "cannot be read as a PyTorch checkpoint"),
        (overlapping, "w: some of its elements share memory"),
        (
            sparse,
            r"w is a tensor of layout torch.sparse_coo; .* Store x.to_dense\(\)",
        ),
        (no_tensors, "it holds a dict with the keys 'a', 'b', but a state dict is expected"),
        (one_tensor, "it holds a Tensor, but a state dict is expected"),
        (huge_header, "not a .tersor or .safetensors file"),
        (not_weights, "begins with the bytes 68 65 6c 6c 6f"),
    ],
)
def test_what_is_refused(write: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write(path)
    with pytest.raises(FormatError, match=said) as caught:
        Checkpoint(path)
    assert str(caught.value).startswith(str(path))


def test_a_tersor_file_is_refused_with_a_hint_to_unpack(tmp_path: Path) -> None:
    site = {"w": Site("w", (2,), "float32", "other")}
    save(State(site, {"w": Dense(torch.ones(2))}, {}, Ledger("", {})), tmp_path / "m.tersor")
    with pytest.raises(SettingError, match="tersor unpack"):
        Checkpoint(tmp_path / "m.tersor")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read: No such file"):
        Checkpoint(tmp_path / "w.pt")


def test_a_bool_of_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(safetensors_file({"w": ("BOOL", [2], b"\1\2")}, None))
    with Checkpoint(tmp_path / "w.safetensors") as source, pytest.raises(FormatError, match="w: a bool is 2"):
        source.read("w")


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """A length of 640 in little-endian has the first bytes of a pickle of protocol 2."""
    for length in range(1, 700):
        data = safetensors_file({"w" * length: ("F32", [1], bytes(4))}, None)
        (tmp_path / "w.safetensors").write_bytes(data)
        if data[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no name makes a header of 640 bytes")
    assert list(read_all(tmp_path / "w.safetensors")) == ["w" * length]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_protocols(protocol: int, zipped: bool, tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "w.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    try:
        expected = torch.load(tmp_path / "w.pt", weights_only=True)
    except pickle.UnpicklingError:
        with pytest.raises(FormatError, match="w.pt: it"):
            Checkpoint(tmp_path / "w.pt")
    else:
        check_equal(read_all(tmp_path / "w.pt"), expected)


@pytest.mark.parametrize("index", [True, False])
def test_files_of_a_folder_that_are_not_read_are_named(index: bool, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    if index:
        (tmp_path / "model.index.json").write_text('{"weight_map":{"w":"model.safetensors"}}')
    (tmp_path / "vae").mkdir()
    for name in ("model.bin", "optimizer.pt", "vae/model.safetensors"):
        (tmp_path / name).write_bytes(b"not opened")
    with Checkpoint(tmp_path) as source:
        assert list(source.slots) == ["w"]
        assert source.ignored == dict.fromkeys(("vae/model.safetensors", "model.bin", "optimizer.pt"))


def test_files_that_a_trainer_writes_beside_the_weights(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    beside = ("optim.bin", "optimizer.bin", "scheduler.bin", "training_args.bin")
    for name in beside:
        (tmp_path / name).write_bytes(b"not opened")
    with Checkpoint(tmp_path) as source:
        assert list(source.slots) == ["w"]
        assert source.ignored == dict.fromkeys(beside)


PREFIXES = {
    "module.": "module.", "_orig_mod.": "_orig_mod.", "_orig_mod.module.": "_orig_mod.module.",
    "module._orig_mod.": "module._orig_mod.", "modules.": "", "body.": "", "": "",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["torch", "safetensors", "nested", "folder"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(prefix: str, kind: str, tmp_path: Path) -> None:
    """All names have them in what a wrapped module saved. Values, large ones and ties too, are its own."""
    given = {"a.weight": torch.randn(300, 400), "module.b": torch.randn(3)}
    found = {f"{prefix}{name}": tensor for name, tensor in given.items()}
    path = tmp_path / "w"
    if kind == "folder":
        path.mkdir()
        for number, (name, tensor) in enumerate(found.items()):
            save_file({name: tensor}, path / f"{number}.safetensors")
    elif kind == "safetensors":
        save_file(found, path)
    else:
        found[f"{prefix}tied"] = found[f"{prefix}a.weight"]
        torch.save({"model": found, "epoch": 3} if kind == "nested" else found, path)
    with Checkpoint(path) as file:
        stripped = PREFIXES[prefix]
        assert file.stripped == stripped
        left = prefix.removeprefix(stripped) if stripped else prefix
        assert set(file.slots) == {f"{left}{name}" for name in given}
        for name, tensor in given.items():
            assert torch.equal(file.read(f"{left}{name}"), tensor)
            assert torch.equal(file.form(f"{left}{name}").decode(), tensor)
        if kind in ("torch", "nested"):
            assert file.aliases == {f"{left}tied": f"{left}a.weight"}


def test_a_prefix_that_some_names_lack_or_that_is_a_whole_name_stays(tmp_path: Path) -> None:
    for names in (("module.a", "b"), ("module.", "module.a"), ("a.module.b",)):
        torch.save({name: torch.ones(n + 1) for n, name in enumerate(names)}, tmp_path / "w.pt")
        with Checkpoint(tmp_path / "w.pt") as file:
            assert file.stripped == ""
            assert set(file.slots) == set(names)
