"""Attachments: named files stored with the weights round-trip exactly; damaged ones are refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forge import take_apart
from tiny import tiny

from tersor.core.state import State, start
from tersor.errors import FormatError, RefusedError
from tersor.io.container import TersorFile, load
from tersor.io.container_writer import save
from tersor.io.verify import verify

NOISE = torch.randint(0, 256, (3000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FILES = {
    "config.json": b'{"hidden_size": 8}' * 100,
    "tokenizer/merges.txt": "größe 大\n".encode(),
    "noise.bin": NOISE.numpy().tobytes(),
    "empty": b"",
}


def with_files() -> State:
    return replace(start(tiny("mlp").model), attachments=FILES)


def test_round_trip(tmp_path: Path) -> None:
    path, given = tmp_path / "m.tersor", with_files()
    size = save(given, path)
    found = load(path)
    assert found.attachments == FILES
    assert found.digest == given.digest
    assert size < save(replace(given, attachments={}), tmp_path / "bare.tersor") + 3000 + 1000
    rows = {check.site: check for check in verify(path)}
    assert all(check.sound for check in rows.values())
    assert {f"attachment:{name}" for name in FILES} <= rows.keys()
    assert rows["attachment:noise.bin"].nbytes == len(FILES["noise.bin"])
    assert rows["attachment:config.json"].nbytes < len(FILES["config.json"]) / 2  # text is deflated


@pytest.mark.parametrize("name", ["config.json", "noise.bin"])
def test_a_changed_byte_is_detected(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.tersor"
    save(with_files(), path)
    data = bytearray(path.read_bytes())
    with TersorFile(path) as file:
        slot = file.source.slots[f"attachment:{name}"]
        data[(slot.begin + slot.end) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"attachments: {name} is damaged|cannot be inflated"):
        load(path)
    wrong = [check.site for check in verify(path) if not check.sound]
    assert wrong == [f"attachment:{name}"]


@pytest.mark.parametrize(
    "entry",
    [
        {"nbytes": 2999},
        {"sha256": "0" * 64},
        {"sha256": None},
        {"deflated": True},
        {"nbytes": 1 << 40, "deflated": True},
        {"nbytes": -1, "deflated": True},
        {"mode": 0o755},
    ],
    ids=str,
)
def test_a_wrong_entry_is_refused(entry: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "m.tersor"
    save(with_files(), path)
    pieces = take_apart(path.read_bytes())
    pieces.document["attachments"]["noise.bin"] |= entry
    path.write_bytes(pieces.bytes())
    with pytest.raises(FormatError):
        load(path)


def test_a_tensor_of_the_same_name_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.register_buffer("attachment:noise", torch.zeros(2))
    given = replace(start(model), attachments={"noise": FILES["noise.bin"]})
    with pytest.raises(RefusedError, match="attachment:noise: two tensors of the file would have this name"):
        save(given, tmp_path / "m.tersor")


def test_a_tiny_file_holds_none(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"tiny: .* holds no attachment, such as config\.json"):
        save(with_files(), tmp_path / "m.tersor", tiny=True)
    assert not list(tmp_path.iterdir())
