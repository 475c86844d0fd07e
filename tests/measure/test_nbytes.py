"""Bytes compared with sums by hand and with files of safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from tersor.errors import StorageError
from tersor.measure.nbytes import file_nbytes, fp32_nbytes, state_tensors


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 3), nn.Linear(3, 11, bias=False)
        if how == "object":
            self.head.weight = self.embed.weight
        if how == "memory":
            self.head.weight = nn.Parameter(self.embed.weight.detach())
        self.register_buffer("kept", torch.zeros(5))
        self.register_buffer("dropped", torch.zeros(100), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("none", torch.zeros(0))


@pytest.mark.parametrize(("how", "weights"), [("object", 33), ("memory", 33), ("not", 66)])
def test_tied_tensors_count_once_and_buffers_count(how: str, weights: int) -> None:
    assert fp32_nbytes(Tied(how)) == 4 * (weights + 5) + 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_count_as_fp32_whatever_they_are(dtype: torch.dtype) -> None:
    assert fp32_nbytes(nn.Linear(7, 3, dtype=dtype)) == 4 * 24


def test_other_kinds_of_numbers() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.zeros(9, dtype=torch.bool))
    model.register_buffer("codes", torch.zeros(9, dtype=torch.uint8))
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex128))
    assert fp32_nbytes(model) == 9 + 9 + 2 * 8
    assert fp32_nbytes(nn.ReLU()) == 0


def test_tensors_without_memory_are_distinct() -> None:
    assert fp32_nbytes(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta")) == 4 * 40


def test_parts_of_one_memory_are_distinct() -> None:
    model = nn.Module()
    whole = torch.zeros(10)
    model.a, model.b = nn.Parameter(whole[:5]), nn.Parameter(whole[5:])
    assert fp32_nbytes(model) == 40
    assert len(state_tensors(model)) == 2


def test_it_is_the_payload_of_a_plain_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.LSTM(3, 5), nn.MultiheadAttention(4, 2))
    path = tmp_path / "model.safetensors"
    save_model(model, str(path))
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert fp32_nbytes(model) == path.stat().st_size - 8 - header


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 7)
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "sub" / "deeper" / "b").write_bytes(b"x" * 5)
    (tmp_path / "empty").write_bytes(b"")
    assert file_nbytes(tmp_path / "a") == 7
    assert file_nbytes(str(tmp_path)) == 12
    assert file_nbytes(tmp_path / "a", tmp_path, tmp_path / "sub") == 12
    assert file_nbytes() == 0
    with pytest.raises(StorageError, match="nowhere: no such file"):
        file_nbytes(tmp_path / "nowhere")
