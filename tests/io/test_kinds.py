"""Every kind of tensor that torch.save writes is read as torch.load reads it, or is refused by name."""

import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from tersor.core.run import run
from tersor.core.state import start
from tersor.dtypes import CODES
from tersor.errors import FormatError, RefusedError
from tersor.io.checkpoint import Checkpoint
from tersor.io.pack import pack
from tersor.io.patch.diff import diff
from tersor.io.patch.patch import patch
from tersor.io.unpack import unpack
from tersor.model.kinds import unfit

RANDOM = torch.Generator().manual_seed(0)
F = torch.randn(4, 6, generator=RANDOM)
C = torch.randn(3, 4, dtype=torch.complex64, generator=RANDOM)
LINE = torch.arange(1000.0)


class Sub(Tensor):
    """A user's class."""


def noted(value: Tensor) -> Tensor:
    value.note = {"a": 1}  # type: ignore[attr-defined]
    return value


def inferred() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3, 2) * 2


KEPT: dict[str, Callable[[], Tensor]] = {
    "conjugate": C.conj,
    "conjugate, turned": lambda: C.t().conj(),
    "conjugate, in part": lambda: C.conj()[1:, ::2],
    "conjugate of none": lambda: C.conj()[:0],
    "negative": lambda: C.conj().imag,
    "negative, of one": lambda: C.conj().imag[1, 2],
    "negative of floats": lambda: torch._neg_view(F),
    "negative conjugate": lambda: torch._neg_view(C.conj()),
    "conjugate parameter": lambda: nn.Parameter(C.conj()),
    "real": lambda: C.real,
    "imaginary": lambda: C.imag,
    "as real": lambda: torch.view_as_real(C),
    "as complex": lambda: torch.view_as_complex(F.view(4, 3, 2)),
    "parameter": lambda: nn.Parameter(F),
    "buffer": lambda: nn.Buffer(F),
    "needs a gradient": lambda: F.clone().requires_grad_(),
    "with attributes": lambda: noted(F.clone()),
    "parameter with attributes": lambda: noted(nn.Parameter(F.clone())),
    "of inference": inferred,
    "turned": F.t,
    "strided": lambda: F[::2, 1::2],
    "with an offset": lambda: F[1:],
    "little of much": lambda: LINE[10:12],
    "overlapping": lambda: LINE[:100].as_strided((3, 3), (1, 1)),
    "one of much, often": lambda: LINE[3:4].expand(10),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "bits as another dtype": lambda: F.view(torch.int32),
    "bytes": lambda: F.view(torch.uint8)[:, :4],
    "odd offset": lambda: F.view(torch.uint8).flatten()[3:],
    "none": lambda: torch.zeros(0, 3),
    "none, of much": lambda: F[:, 2:2],
    "none, with no strides": lambda: torch.from_numpy(np.zeros((0, 3), np.float32)),
    "one, with no strides": lambda: torch.tensor(3.5).expand(1, 1),
    "a number": lambda: torch.tensor(3.5),
    "a number, of much": lambda: F[1, 2],
    **{str(dtype): lambda dtype=dtype: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for dtype in CODES},
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "repeated": (lambda: F[:1].clone().expand(5, 6), r"w: some of its elements share memory.*contiguous\(\)"),
    "complex128": (lambda: C.to(torch.complex128), r"w is a torch.complex128 tensor; .*view_as_real\(x\)"),
    "complex128, conjugate": (lambda: C.to(torch.complex128).conj(), "w is a torch.complex128 tensor"),
    "complex32": (lambda: C.to(torch.complex32), "w is a torch.complex32 tensor; .*view_as_real"),
    "float4": (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "w is a torch.float4"),
    "bits": (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8), "w is a torch.bits8 tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(F, 0.1, 3, torch.qint8), "w is a quantized .*dequantize"),
    "quantized, by channel": (
        lambda: torch.quantize_per_channel(F, torch.ones(4), torch.zeros(4), 0, torch.qint8),
        "w is a quantized",
    ),
    "sparse": (F.to_sparse, r"w is a tensor of layout torch.sparse_coo.*to_dense\(\)"),
    "sparse rows": (F.to_sparse_csr, r"w is a tensor of layout torch.sparse_csr.*to_dense\(\)"),
    "sparse columns": (F.to_sparse_csc, "w is a tensor of layout torch.sparse_csc"),
    "sparse blocks": (lambda: F.to_sparse_bsr((2, 2)), "w is a tensor of layout torch.sparse_bsr"),
    "nested": (lambda: torch.nested.nested_tensor([F, F[:2]]), r"w is a nested tensor.*unbind\(\)"),
    "jagged": (lambda: torch.nested.nested_tensor([F, F[:2]], layout=torch.jagged), "w is a nested tensor"),
    "meta": (lambda: torch.empty(3, 4, device="meta"), "w is a meta tensor: it has no values"),
    "typed storage": (F.storage, "w is a TypedStorage; only tensors can be stored"),
    "storage": (F.untyped_storage, "w is a TypedStorage; only tensors can be stored"),
    "subclass": (lambda: F.as_subclass(Sub), "it holds Python objects .*Sub"),
    "numpy array": (F.numpy, "it holds Python objects .*numpy"),
}  # fmt: skip


def bits(value: Tensor) -> list[int]:
    plain = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.as_strided(plain.shape, (1,)).view(torch.uint8).tolist()


def check_same(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits(found) == bits(expected)


def written(value: Any, path: Path, *, zipped: bool) -> None:
    """A checkpoint with the value and a second tensor, in the new format or the old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes
        torch.save(OrderedDict(a=torch.ones(2), w=value), path, _use_new_zipfile_serialization=zipped)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("name", KEPT)
def test_tensors_are_those_that_torch_loads(name: str, zipped: bool, tmp_path: Path) -> None:
    written(KEPT[name](), tmp_path / "w.pt", zipped=zipped)
    try:
        expected = torch.load(tmp_path / "w.pt", weights_only=True)
    except AttributeError as error:  # of the newer dtypes, in the old format
        with pytest.raises(FormatError, match="cannot be read as a PyTorch checkpoint"):
            Checkpoint(tmp_path / "w.pt")
        assert "dtype" in str(error)  # noqa: PT017
        return
    with Checkpoint(tmp_path / "w.pt") as source:
        check_same(source.read("w"), expected["w"])
        check_same(source.form("w").array, expected["w"])
    pack(tmp_path / "w.pt", tmp_path / "w.tersor", tersor.Recipe((tersor.Entropy(),)))
    unpack(tmp_path / "w.tersor", tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    for key, value in expected.items():
        check_same(found[key], value)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_tensors_are_refused(name: str, zipped: bool, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    written(make(), tmp_path / "w.pt", zipped=zipped)
    if not zipped:  # torch itself cannot read the newer dtypes and nested tensors there
        said += "|cannot be read as a PyTorch checkpoint: (type object .* .*'dtype'|.*Storage)"
    with pytest.raises(FormatError, match=said):
        Checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("parts", ["whole", "imaginary"])
def test_a_conjugate_is_no_alias(parts: str, zipped: bool, tmp_path: Path) -> None:
    whole, turned = (C, C.conj()) if parts == "whole" else (C.imag, C.conj().imag)
    given = {"a": whole, "b": turned, "c": turned}
    torch.save(given, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with Checkpoint(tmp_path / "w.pt") as source:
        assert source.aliases == {"c": "b"}
        for name in source.slots:
            check_same(source.read(name), given[name])


@pytest.mark.parametrize("parts", ["whole", "imaginary"])
def test_a_large_conjugate_is_read_into_memory(parts: str, tmp_path: Path) -> None:
    large = torch.randn(1024, 2048, dtype=torch.complex64, generator=RANDOM)  # more than is held in memory
    value = large.conj() if parts == "whole" else large.conj().imag
    torch.save({"w": value}, tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt") as source:
        assert torch.equal(torch.cat(list(source.form("w").slices())), value.flatten())


def test_patches_of_conjugates(tmp_path: Path) -> None:
    torch.save({"w": C}, tmp_path / "old.pt")
    torch.save({"w": C.conj()}, tmp_path / "new.pt")
    diff(tmp_path / "old.pt", tmp_path / "new.pt", tmp_path / "p")
    patch(tmp_path / "old.pt", tmp_path / "p", tmp_path / "new.safetensors")
    check_same(load_file(tmp_path / "new.safetensors")["w"], C.conj())


def test_big_endian(tmp_path: Path) -> None:
    """A big-endian checkpoint is read as torch.load reads it."""
    torch.save({"w": F, "c": C.conj(), "h": F.half()}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    expected = torch.load(tmp_path / "w.pt", weights_only=True)
    assert not torch.equal(expected["w"], F)
    with Checkpoint(tmp_path / "w.pt") as source:
        for name, value in expected.items():
            check_same(source.read(name), value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(FormatError, match=r"w.pt: it is a TorchScript archive.*torch.save\(model.state_dict"):
        Checkpoint(tmp_path / "w.pt")


def test_the_table_is_that_of_files() -> None:
    assert not any(unfit(torch.zeros(2).to(dtype)) for dtype in CODES)


# --- the same in memory ---


def model_with(value: Any, kind: str) -> nn.Module:
    model = nn.Linear(3, 2)
    if kind == "buffer":
        model.register_buffer("w", value)
    else:
        trained = value.is_floating_point() or value.is_complex()
        model.register_parameter("w", nn.Parameter(value.detach(), requires_grad=trained))
    return model


IN_MEMORY = [name for name in KEPT if name not in ("one of much, often", "of inference")]


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
@pytest.mark.parametrize("name", IN_MEMORY)
def test_models_keep_these_tensors(name: str, kind: str, tmp_path: Path) -> None:
    value = KEPT[name]()
    done = run(model_with(value, kind), [tersor.Entropy()])
    tersor.save(done, tmp_path / "m.tersor")
    check_same(tersor.load(tmp_path / "m.tersor").state_dict()["w"], value)
    check_same(done.model().state_dict()["w"], value)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("subclass", "numpy array")])
def test_models_are_refused_by_name(name: str) -> None:
    make, said = REFUSED[name]
    value = make()
    if not isinstance(value, Tensor):
        return
    said = said.replace("w is", "w: the state dict holds").replace("w shows", "w: it shows")
    with pytest.raises(RefusedError, match=said):
        start(model_with(value, "buffer"))


def test_a_float_of_8_bits_is_stored_as_it_is() -> None:
    value = F.to(torch.float8_e4m3fn)
    done = run(model_with(value, "parameter"), [tersor.Quantize(bits=4), tersor.Entropy()])
    check_same(done.state_dict()["w"], value)
    assert not torch.equal(done.state_dict()["weight"], done.given.weight)
    with pytest.raises(RefusedError, match="w: 1 of 2 values are NaN"):
        start(model_with(torch.tensor([torch.nan, 1.0]).to(torch.float8_e5m2), "parameter"))
