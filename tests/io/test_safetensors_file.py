"""Safetensors files: compared with the safetensors library, reading and writing."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.dtypes import CODES
from tersor.errors import FormatError, RefusedError
from tersor.io import header
from tersor.io.header import build_header, natural
from tersor.io.safetensors_file import TensorFile, TensorWriter

SHAPES = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 2, 2))
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=8)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype, shape = draw(st.sampled_from(list(CODES))), draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def bits(value: Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert bits(found[name]) == bits(value)


def write(path: Path, values: dict[str, Tensor], **metadata: str) -> int:
    with path.open("wb") as out, TensorWriter(path.parent) as writer:
        for name, value in values.items():
            writer.add(name, value)
        return writer.finish(out, metadata)


@given(st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), tensors(), max_size=5))
def test_the_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, given_: dict[str, Tensor]
) -> None:
    path = tmp_path_factory.mktemp("ours") / "w.safetensors"
    assert write(path, given_, made="by us") == path.stat().st_size
    check_same(load_file(path), given_)


@given(st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), tensors(), max_size=5))
def test_we_read_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, given_: dict[str, Tensor]
) -> None:
    path = tmp_path_factory.mktemp("theirs") / "w.safetensors"
    save_file(given_, path, {"made": "by them"})
    with TensorFile(path) as file:
        check_same({name: file.read(name) for name in file.slots}, given_)
        assert file.metadata == {"made": "by them"}


def test_large_payload_is_collected_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.io.safetensors_file.IN_MEMORY", 100)
    monkeypatch.setattr("tersor.io.safetensors_file.CHUNK", 64)
    values = {str(n): torch.randn(n, 9) for n in (1, 3, 20)} | {"b": torch.ones(77, dtype=torch.uint8)}
    write(tmp_path / "w.safetensors", values)
    check_same(load_file(tmp_path / "w.safetensors"), values)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "w").open("wb") as out, TensorWriter(tmp_path) as writer:
        writer.add("a", torch.ones(2))
        writer.add("a", torch.ones(2))
        with pytest.raises(RefusedError, match="a: two tensors of the file would have this name"):
            writer.finish(out, {})
    with pytest.raises(RefusedError, match="__metadata__: two tensors"):
        build_header([("__metadata__", torch.uint8, (1,), 1)], {})


def test_longest_header(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [("n" * 100, torch.uint8, (1,), 1)]
    size = len(build_header(entries, {})) - 8
    monkeypatch.setattr(header, "LONGEST", size)
    build_header(entries, {})
    monkeypatch.setattr(header, "LONGEST", size - 1)
    with pytest.raises(RefusedError, match=f"take {size} bytes; a file holds {size - 1}"):
        build_header(entries, {})


def test_unsupported_dtypes_are_refused(tmp_path: Path) -> None:
    with (
        TensorWriter(tmp_path) as writer,
        pytest.raises(RefusedError, match=r"a: it is a torch.complex128 tensor; .*view_as_real"),
    ):
        writer.add("a", torch.ones(2, dtype=torch.complex128))


@pytest.mark.parametrize("length", range(0, 9))
def test_very_short_files(length: int, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"\x02\0\0\0\0\0\0\0{"[:length])
    with pytest.raises(FormatError):
        TensorFile(tmp_path / "w")


def test_natural() -> None:
    assert [natural(text) for text in ("0", "12", "-1", "1.0", "", " 1", "1e3", "9" * 19)] == [
        0,
        12,
        *[None] * 6,
    ]
    assert natural("\N{ARABIC-INDIC DIGIT ONE}") is None
