"""Folders: what is packed, what goes along, what is left out; metadata and files come back as they were."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import take_apart
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import start
from tersor.errors import FormatError, RefusedError, SettingError, StorageError
from tersor.io.checkpoint import Checkpoint
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.folder import LARGEST, SMALL, plain_name, scan
from tersor.io.pack import pack
from tersor.io.patch.diff import diff
from tersor.io.patch.patch import patch
from tersor.io.unpack import unpack
from tersor.io.verify import verify
from tersor.record.observer import Observer
from tersor.resolve import put_in
from tersor.steps import Entropy, Quantize

LORA = {
    "format": "pt",
    "ss_network_dim": "8",
    "ss_base_model": "größe 大",
    "note": 'a "quoted"\nline',
    "": "",
}
CONFIG = b'{"architectures": ["TinyModel"], "hidden_size": 8}\n'
WORDS = {
    "config.json": CONFIG,
    "tokenizer.json": b'{"model": {"vocab": {}}}' * 50,
    "tokenizer.model": bytes(range(256)) * 9,  # binary: sentencepiece
    "1_Pooling/config.json": b"{}",
    "LICENSE": b"MIT",
    "README.md": "größe 大\r\n".encode(),
    "empty.txt": b"",
}


def tensors(count: int = 6, rows: int = 8) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {f"layers.{n}.weight": torch.randn(rows, 16, generator=rng) for n in range(count)}


def folder(path: Path, **files: bytes) -> Path:
    """A folder as save_pretrained leaves it: model.safetensors, config.json, a tokenizer."""
    path.mkdir()
    save_file(tensors(), path / "model.safetensors", {"format": "pt"})
    for name, data in (WORDS | files).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    return path


def sharded(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Two shards with an index; the second has metadata of its own."""
    path.mkdir()
    names = list(tensors())
    where = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        own = {"format": "pt"} | (metadata or {}) if number == 2 else {"format": "pt"}
        save_file({name: tensors()[name] for name in part}, path / file, own)
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_bytes(CONFIG)
    return path


def metadata_of(path: Path) -> dict[str, str] | None:
    with safe_open(path, "pt") as file:
        return file.metadata()


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


# --- a folder comes back ---


def test_a_folder_comes_back(tmp_path: Path) -> None:
    given = folder(tmp_path / "given")
    done = pack(given, tmp_path / "m.tersor")
    assert done.attached == {name: len(data) for name, data in WORDS.items()}
    assert done.ignored == {}
    rows = {check.site: check.sound for check in verify(tmp_path / "m.tersor")}
    assert all(rows.values())
    assert rows.keys() >= {f"attachment:{name}" for name in WORDS}
    nbytes = unpack(tmp_path / "m.tersor", f"{tmp_path}/back/")
    back = contents(tmp_path / "back")
    assert {name: data for name, data in back.items() if name != "model.safetensors"} == WORDS
    assert same(load_file(tmp_path / "back/model.safetensors"), tensors())
    assert nbytes == sum(map(len, back.values()))
    again = pack(tmp_path / "back", tmp_path / "again.tersor")
    assert again.nbytes == done.nbytes
    assert (tmp_path / "again.tersor").read_bytes() == (tmp_path / "m.tersor").read_bytes()


@pytest.mark.parametrize("size", ["1200", "1GB"])
def test_shards_of_another_size_have_the_same_files_beside_them(size: str, tmp_path: Path) -> None:
    pack(sharded(tmp_path / "given", {"note": "second"}), tmp_path / "m.tersor", Quantize(bits=8))
    unpack(tmp_path / "m.tersor", tmp_path / "back", shard=size)
    assert (tmp_path / "back/config.json").read_bytes() == CONFIG
    with Checkpoint(tmp_path / "back") as source:
        assert source.slots.keys() == tensors().keys()
        assert len(source.files) == (3 if size == "1200" else 1)
        # What the files agree on, and what only one of them said.
        assert all(part.metadata == {"format": "pt", "note": "second"} for part in source.files)


def test_shards_come_back_with_their_names_tensors_and_metadata(tmp_path: Path) -> None:
    given = sharded(tmp_path / "given", LORA)
    pack(given, tmp_path / "m.tersor")
    (tmp_path / "back").mkdir()  # an empty folder is taken too
    unpack(tmp_path / "m.tersor", tmp_path / "back")
    assert contents(tmp_path / "back").keys() == contents(given).keys()
    for number, metadata in ((1, {"format": "pt"}), (2, LORA)):
        name = f"model-{number:05d}-of-00002.safetensors"
        assert metadata_of(tmp_path / "back" / name) == metadata
        assert same(load_file(tmp_path / "back" / name), load_file(given / name))
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert (
        index["weight_map"] == json.loads((given / "model.safetensors.index.json").read_text())["weight_map"]
    )


def test_files_of_pytorch_come_back_as_safetensors(tmp_path: Path) -> None:
    (given := tmp_path / "given").mkdir()
    weight = torch.randn(4, 4)
    first, second = {"a": weight, "tied": weight}, {"b": torch.ones(3), "again": weight.clone()}
    torch.save(first, given / "pytorch_model-00001-of-00002.bin")
    torch.save(second, given / "pytorch_model-00002-of-00002.bin")
    where = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin")
    where |= dict.fromkeys(second, "pytorch_model-00002-of-00002.bin")
    (given / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    pack(given, tmp_path / "m.tersor")
    unpack(tmp_path / "m.tersor", f"{tmp_path}/back/")
    assert same(load_file(tmp_path / "back/model-00001-of-00002.safetensors"), first)
    assert same(load_file(tmp_path / "back/model-00002-of-00002.safetensors"), second)
    with Checkpoint(tmp_path / "back") as source:  # the index names both
        assert source.folder is not None
        assert source.folder.index == tmp_path / "back/model.safetensors.index.json"


def test_tensors_that_a_later_run_made_are_written_too(tmp_path: Path) -> None:
    """The layout of the folder names the tensors that it had. A run may have split some."""
    pack(sharded(tmp_path / "given"), tmp_path / "m.tersor")
    state = load(tmp_path / "m.tersor")
    name = next(iter(state.sites))
    from dataclasses import replace

    new = {("new" if key == name else key): site for key, site in state.sites.items()}
    sites = {key: replace(site, name=key) for key, site in new.items()}
    forms = {("new" if key == name else key): form for key, form in state.forms.items()}
    save(
        replace(state, sites=sites, forms=forms, ledger=start(nn.Linear(1, 1)).ledger), tmp_path / "n.tersor"
    )
    unpack(tmp_path / "n.tersor", f"{tmp_path}/back/")
    with Checkpoint(tmp_path / "back") as source:
        assert source.slots.keys() == sites.keys()


# --- metadata ---


@pytest.mark.parametrize("metadata", [LORA, {"format": "np"}, {"only": "this"}, {"format": "pt"}, None])
def test_metadata_comes_back(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "lora.safetensors", metadata)
    pack(tmp_path / "lora.safetensors", tmp_path / "m.tersor", Quantize(bits=8))
    unpack(tmp_path / "m.tersor", tmp_path / "back.safetensors")
    assert metadata_of(tmp_path / "back.safetensors") == (metadata or {"format": "pt"})
    unpack(tmp_path / "m.tersor", tmp_path / "part.safetensors", only="layers.1.*")
    assert metadata_of(tmp_path / "part.safetensors") == (metadata or {"format": "pt"})
    state = run(load(tmp_path / "m.tersor"), Entropy())  # a run that continues keeps it
    save(state, tmp_path / "n.tersor")
    unpack(tmp_path / "n.tersor", tmp_path / "last.safetensors")
    assert metadata_of(tmp_path / "last.safetensors") == (metadata or {"format": "pt"})


def test_usual_metadata_takes_no_byte(tmp_path: Path) -> None:
    sizes = set()
    for metadata in (None, {"format": "pt"}):
        save_file(tensors(), tmp_path / "w.safetensors", metadata)
        sizes.add(pack(tmp_path / "w.safetensors", tmp_path / "m.tersor").nbytes)
    assert len(sizes) == 1
    assert load(tmp_path / "m.tersor").attachments == {}


def test_an_adapter_keeps_its_name(tmp_path: Path) -> None:
    (given := tmp_path / "given").mkdir()
    save_file(tensors(), given / "adapter_model.safetensors", LORA)
    (given / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    pack(given, tmp_path / "m.tersor")
    for out in (f"{tmp_path}/whole/", f"{tmp_path}/shards/"):
        unpack(tmp_path / "m.tersor", out, shard="1GB" if "shards" in out else None)
        assert sorted(contents(Path(out))) == ["adapter_config.json", "adapter_model.safetensors"]
        assert metadata_of(Path(out) / "adapter_model.safetensors") == LORA


def test_a_short_header_holds_neither(tmp_path: Path) -> None:
    given = folder(tmp_path / "given")
    save_file(tensors(), given / "model.safetensors", LORA)
    done = pack(given, tmp_path / "m.tersor", tiny=True)
    assert done.attached == {}
    assert done.ignored == {**dict.fromkeys(WORDS), "metadata of the .safetensors": 0}
    assert load(tmp_path / "m.tersor").attachments == {}


# --- what counts, and what is left out ---


def test_only_what_was_packed_counts(tmp_path: Path) -> None:
    """Two strangers of 50 MB beside the weights gave a ratio of 9 for a true 4."""
    given = folder(tmp_path / "given", **{"video.mp4": b"0" * 50_000, "notes/talk.pdf": b"0" * 50_000})
    torch.save({"state": {}, "x": torch.zeros(9000)}, given / "optimizer.pt")
    done = pack(given, tmp_path / "m.tersor", Quantize(bits=4))
    assert done.ignored == dict.fromkeys(["video.mp4", "notes/talk.pdf", "optimizer.pt"])
    assert done.read == (given / "model.safetensors").stat().st_size
    from tersor.report.file_sizes import packed, packed_lines

    facts = packed(given, tmp_path / "m.tersor", done, (Quantize(bits=4),))
    read = done.read + sum(map(len, WORDS.values()))
    assert facts["from"] == {"name": str(given), "nbytes": read}
    assert facts["share"] == (tmp_path / "m.tersor").stat().st_size / read
    text = "\n".join(packed_lines(facts))
    assert "video.mp4 (a file)" in text
    assert "attached: " in text


def test_a_file_of_the_training_does_not_stop_a_pack(tmp_path: Path) -> None:
    (given := tmp_path / "given").mkdir()
    torch.save(tensors(), given / "pytorch_model.bin")
    torch.save({"args": Path("x")}, given / "arguments.bin")  # a pickle of objects, under any name
    torch.save(torch.get_rng_state(), given / "random.bin")
    torch.save({"state": {0: {"m": torch.ones(3)}}, "param_groups": []}, given / "adam.bin")
    for name in (
        "training_args.bin",
        "rng_state_0.pth",
        "scheduler.pt",
        "optimizer.pt",
        "trainer_state.json",
    ):
        (given / name).write_bytes(b"not opened")
    done = pack(given, tmp_path / "m.tersor")
    assert load(tmp_path / "m.tersor").sites.keys() == tensors().keys()
    assert done.ignored.keys() == {path.name for path in given.iterdir()} - {"pytorch_model.bin"}
    assert {done.reasons[n] for n in ("arguments.bin", "random.bin", "adam.bin")} == {"no weights"}


def test_a_folder_of_nothing_but_pickles_is_refused_with_the_reason(tmp_path: Path) -> None:
    torch.save({"args": Path("x")}, tmp_path / "arguments.bin")
    with pytest.raises(FormatError, match="it holds Python objects"):
        Checkpoint(tmp_path)


def test_damaged_weights_are_not_taken_for_something_else(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "a.bin")
    torch.save({"other": torch.randn(400)}, tmp_path / "b.bin")
    (tmp_path / "b.bin").write_bytes((tmp_path / "b.bin").read_bytes()[:900])
    with pytest.raises(FormatError, match=r"b\.bin"):
        Checkpoint(tmp_path)


def test_a_file_of_the_index_must_hold_weights(tmp_path: Path) -> None:
    torch.save({"args": Path("x")}, tmp_path / "a.bin")
    torch.save(tensors(), tmp_path / "b.bin")
    where = {**dict.fromkeys(tensors(), "b.bin"), "lost": "a.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(FormatError, match="it holds Python objects"):
        Checkpoint(tmp_path)


def test_files_that_go_along_are_small_or_of_a_tokenizer(tmp_path: Path) -> None:
    given = folder(tmp_path / "given", **{"modeling.py": b"print()", ".env": b"KEY=1", "data.jsonl": b"{}"})
    (given / "train.json").write_bytes(b" " * (SMALL + 1))
    (given / "vocab.txt").write_bytes(b" " * (SMALL + 1))
    with open(given / "tokenizer.json", "wb") as file:
        file.truncate(LARGEST + 1)
    (given / ".git").mkdir()
    (given / ".git" / "config.json").write_text("{}")
    (given / "a:b.json").write_text("{}")
    found = scan(given)
    assert found.along.keys() == {*WORDS, "vocab.txt"} - {"tokenizer.json"}
    assert found.others == {
        "modeling.py": "", ".env": "hidden", "data.jsonl": "", "train.json": f"{SMALL + 1:,} bytes",
        "tokenizer.json": f"{LARGEST + 1:,} bytes", ".git/": "a hidden folder", "a:b.json": "an unsafe name",
    }  # fmt: skip


def test_another_checkpoint_in_the_folder_is_left_out_whole(tmp_path: Path) -> None:
    given = folder(tmp_path / "given", **{"checkpoint-500/config.json": b"{}"})
    save_file(tensors(1), given / "checkpoint-500/model.safetensors")
    done = pack(given, tmp_path / "m.tersor")
    assert done.ignored == dict.fromkeys(["checkpoint-500/config.json", "checkpoint-500/model.safetensors"])
    assert done.reasons["checkpoint-500/config.json"] == "of other weights"


def test_no_attach(tmp_path: Path) -> None:
    done = pack(folder(tmp_path / "given"), tmp_path / "m.tersor", attach=False)
    assert (done.attached, done.ignored) == ({}, dict.fromkeys(WORDS))
    assert load(tmp_path / "m.tersor").attachments == {}


# --- links ---


def test_links_out_of_the_folder_do_not_go_along(tmp_path: Path) -> None:
    """A downloaded folder may link vocab.txt to a private key."""
    given = folder(tmp_path / "given")
    (tmp_path / "private").write_text("secret")
    (tmp_path / "inside").mkdir()
    (given / "vocab.txt").symlink_to(tmp_path / "private")
    (given / "same.json").symlink_to("config.json")
    (given / "gone.json").symlink_to("nothing.json")
    (given / "loop").symlink_to(given)
    (given / "linked").symlink_to(tmp_path / "inside")
    os.mkfifo(given / "pipe.json")
    os.mkfifo(given / "pipe.safetensors")  # opening it would wait for ever
    done = pack(given, tmp_path / "m.tersor")
    assert done.attached.keys() == {*WORDS, "same.json"}
    assert {name: done.reasons[name] for name in done.ignored} == {
        "vocab.txt": "a link out of the folder", "gone.json": "a link to nothing", "loop/": "a linked folder",
        "linked/": "a linked folder", "pipe.json": "no regular file", "pipe.safetensors": "no regular file",
    }  # fmt: skip
    assert b"secret" not in b"".join(load(tmp_path / "m.tersor").attachments.values())


def test_the_cache_of_hugging_face_is_read_through_its_links(tmp_path: Path) -> None:
    plain = folder(tmp_path / "plain")
    blobs, cached = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/4c1d"
    blobs.mkdir(parents=True)
    cached.mkdir(parents=True)
    for number, path in enumerate(path for path in plain.iterdir() if path.is_file()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (cached / path.name).symlink_to(f"../../blobs/{number}")
    done = pack(cached, tmp_path / "m.tersor")
    assert done.attached.keys() == WORDS.keys() - {"1_Pooling/config.json"}


# --- indexes ---


def test_of_two_indexes_the_one_of_safetensors_is_read(tmp_path: Path) -> None:
    given = sharded(tmp_path / "given")
    (given / "pytorch_model.bin.index.json").write_text('{"weight_map": {"gone": "pytorch_model.bin"}}')
    with Checkpoint(given) as source:
        assert source.slots.keys() == tensors().keys()
        assert "pytorch_model.bin.index.json" in source.ignored


def test_weights_that_the_index_does_not_list_are_left_out_with_a_reason(tmp_path: Path) -> None:
    given = sharded(tmp_path / "given")
    save_file({"other": torch.ones(3)}, given / "adapter.safetensors")
    (given / "optimizer.bin").write_bytes(b"1")
    with Checkpoint(given) as source:
        assert source.slots.keys() == tensors().keys()
        assert source.reasons == {"adapter.safetensors": "not in the index"}
        assert source.ignored.keys() >= {"adapter.safetensors", "optimizer.bin"}


@pytest.mark.parametrize("name", ["con", "NUL.json", "com1.txt", "Lpt9.a.b", "aux ", "com\u00b9"])
def test_names_that_windows_keeps_for_devices_are_unsafe(name: str) -> None:
    assert not plain_name(name)
    assert plain_name(f"x{name.strip()}")
    assert plain_name("console.json")


def test_the_index_of_shards_that_were_not_downloaded_does_not_hide_the_weights(tmp_path: Path) -> None:
    given = folder(tmp_path / "given")
    (given / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "pytorch_model-1-of-2.bin"}}')
    with Checkpoint(given) as source:
        assert source.slots.keys() == tensors().keys()


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    given = sharded(tmp_path / "given")
    (given / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        StorageError, match=r"model-00002-of-00002\.safetensors: cannot be read: No such file"
    ):
        pack(given, tmp_path / "m.tersor")
    assert not (tmp_path / "m.tersor").exists()


# --- nothing that is read is overwritten ---


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "old.bin"])
def test_no_file_of_the_folder_is_overwritten(name: str, tmp_path: Path) -> None:
    given = folder(tmp_path / "given", **{"old.bin": b"weights of another kind"})
    before = contents(given)
    with pytest.raises(SettingError, match="is also the input"):
        pack(given, given / name)
    assert contents(given) == before
    pack(given, given / "m.tersor")
    assert pack(given, given / "m.tersor").ignored["m.tersor"] is None  # the earlier result


def test_a_folder_with_files_is_not_written_to(tmp_path: Path) -> None:
    pack(given := folder(tmp_path / "given"), tmp_path / "m.tersor")
    before = contents(given)
    with pytest.raises(StorageError, match="exists already"):
        unpack(tmp_path / "m.tersor", given)
    assert contents(given) == before


def test_one_file_says_what_it_does_not_hold(tmp_path: Path) -> None:
    class Heard(Observer):
        said = ""

        def message(self, text: str) -> None:
            self.said += text

    pack(folder(tmp_path / "given"), tmp_path / "m.tersor")
    unpack(tmp_path / "m.tersor", tmp_path / "back.safetensors", observer=(heard := Heard()))
    assert heard.said.startswith("not written: ")
    assert "-o back/" in heard.said


# --- round trips of any files ---

PARTS = st.text("abcXYZ09_- äß大.", min_size=1, max_size=12)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(NAMES, st.binary(max_size=300), max_size=5))
def test_attachments_come_back_bit_for_bit_or_are_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    """Names are checked by a plain rule: what is written is in the folder, whole, and nothing else is."""
    from dataclasses import replace
    from shutil import rmtree

    parts = [part for name in files for part in name.split("/")]
    keys = [name.casefold() for name in files]
    fine = all(part[0] != "." and part[-1] not in ". " for part in parts) and len(set(keys)) == len(keys)
    fine = fine and not any(a != b and b.startswith(f"{a}/") for a in keys for b in keys)
    rmtree(tmp_path / "back", ignore_errors=True)
    state = replace(start(nn.Linear(2, 2)), attachments=files)
    try:
        save(state, tmp_path / "m.tersor")
    except RefusedError:  # a part of nothing but dots
        assert any(not part.strip(".") for part in parts)
        return
    assert load(tmp_path / "m.tersor").attachments == files
    if not fine:
        with pytest.raises(FormatError, match="attachments: "):
            unpack(tmp_path / "m.tersor", f"{tmp_path}/back/")
        assert not (tmp_path / "back").exists()
        return
    unpack(tmp_path / "m.tersor", f"{tmp_path}/back/")
    assert contents(tmp_path / "back").keys() == {*files, "model.safetensors"}
    assert all((tmp_path / "back" / name).read_bytes() == data for name, data in files.items())


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../up", "a/../../up", "..", "a//b", "C:\\x", "a\\b", "a:b", "a\nb", "a\x00b",
        ".git/config", "sub/.git/config", ".bashrc", "model.safetensors", "MODEL.safetensors",
        "model.safetensors/x", "x" * 300, "end.", "end ", "a*b",
    ],
)  # fmt: skip
def test_a_malicious_name_writes_nothing(name: str, tmp_path: Path) -> None:
    """The file is forged: our writer refuses most of these names."""
    pack(folder(tmp_path / "given"), tmp_path / "m.tersor")
    pieces = take_apart((tmp_path / "m.tersor").read_bytes())
    attached = pieces.document["attachments"]
    attached[name] = attached.pop("config.json")
    pieces.tensors = {
        (f"attachment:{name}" if key == "attachment:config.json" else key): value
        for key, value in pieces.tensors.items()
    }
    (tmp_path / "bad.tersor").write_bytes(pieces.bytes())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FormatError, match="attachments: "):
        unpack(tmp_path / "bad.tersor", f"{tmp_path}/back/")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "document",
    [
        '{"files": [{"name": "../x.safetensors"}]}',
        '{"files": [{"name": "/tmp/x.safetensors"}]}',
        '{"files": [{"name": ".x.safetensors"}]}',
        '{"files": [{"name": "x.py"}]}',
        '{"files": [{"name": "config.json"}]}',
        '{"files": [{"name": "a.safetensors"}, {"name": "A.safetensors"}]}',
        '{"files": [{"name": "\xe9.safetensors"}, {"name": "e\u0301.safetensors"}]}',
        '{"files": [{"metadata": {"a": 1}}]}',
        '{"files": [{"metadata": []}]}',
        '{"files": [{"tensors": [1]}]}',
        '{"files": [{"mode": "0755"}]}',
        '{"files": []}',
        '{"files": [{}], "index": "../x.index.json"}',
        '{"files": [{}], "index": "x.json"}',
        '{"files": "x"}',
        "[]",
        "{",
    ],
)
def test_a_damaged_layout_is_refused(document: str, tmp_path: Path) -> None:
    from dataclasses import replace

    given = replace(start(nn.Linear(2, 2)), attachments={".tersor/files.json": document.encode()})
    save(given, tmp_path / "m.tersor")
    with pytest.raises(FormatError, match=r"attachments: \.tersor/files\.json"):
        unpack(tmp_path / "m.tersor", f"{tmp_path}/back/")
    with pytest.raises(FormatError, match=r"attachments: \.tersor/files\.json"):
        load(tmp_path / "m.tersor")
    assert [c.site for c in verify(tmp_path / "m.tersor") if not c.sound] == ["attachment:.tersor/files.json"]
    assert not (tmp_path / "back").exists()


# --- patches ---


def test_a_patch_between_packed_folders_has_the_files(tmp_path: Path) -> None:
    old = folder(tmp_path / "old")
    new = folder(tmp_path / "new", **{"config.json": b'{"changed": 1}', "added.json": b"{}"})
    save_file({n: t + 1 for n, t in tensors().items()}, new / "model.safetensors", LORA)
    for path in (old, new):
        pack(path, path.with_suffix(".tersor"))
    diff(tmp_path / "old.tersor", tmp_path / "new.tersor", tmp_path / "p")
    patch(tmp_path / "old.tersor", tmp_path / "p", tmp_path / "made.tersor")
    assert (tmp_path / "made.tersor").read_bytes() == (tmp_path / "new.tersor").read_bytes()


def test_a_patch_between_folders_names_the_files_that_it_does_not_hold(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old"), folder(tmp_path / "new", **{"video.mp4": b"0" * 9999})
    save_file({n: t + 1 for n, t in tensors().items()}, new / "model.safetensors")
    done = diff(old, new, tmp_path / "p")
    assert done.ignored == {"video.mp4": None}
    assert done.read == sum((new / name).stat().st_size for name in (*WORDS, "model.safetensors"))
    patch(old, tmp_path / "p", tmp_path / "made")
    assert contents(tmp_path / "made") == {n: b for n, b in contents(new).items() if n != "video.mp4"}


# --- versions of modules ---


class Picky(nn.Module):
    """As torchvision's MNASNet: refuses tensors without a version, and rescales those of version 1."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def _load_from_state_dict(self, state, prefix, local, *rest):  # type: ignore[no-untyped-def]
        if local.get("version") not in (1, 2):
            raise ValueError(f"version is {local.get('version')}")
        if local["version"] == 1:
            for key in [key for key in state if key.startswith(f"{prefix}fc.")]:
                state[key] = state[key] * 2
        super()._load_from_state_dict(state, prefix, local, *rest)


def old_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model of version 1."""
    found = model.state_dict()
    found._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    return found


def test_a_module_that_asks_for_its_version_loads_what_a_file_decodes_to(tmp_path: Path) -> None:
    model = Picky()
    with pytest.raises(ValueError, match="version is None"):  # or this test shows nothing
        Picky().load_state_dict(dict(model.state_dict()))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    pack(tmp_path / "w.pt", tmp_path / "packed.tersor")
    save(run(model, Recipe((Entropy(),))), tmp_path / "run.tersor")
    for file in ("packed.tersor", "run.tersor"):
        state = load(tmp_path / file)
        again = Picky()
        again.load_state_dict(state.state_dict())
        assert same(dict(again.state_dict()), dict(model.state_dict()))
        assert state.attachments == {".tersor/versions.json": b'{"":2}'}
    assert "versions" not in str(load_usual(tmp_path).attachments)
    Picky().load_state_dict(run(model, Recipe((Entropy(),))).state_dict())


class Named(nn.Module):
    """As transformers' Phi-3: its version is a text."""

    _version: Any = "0.0.5"

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def _load_from_state_dict(self, state, prefix, local, *rest):  # type: ignore[no-untyped-def]
        if local.get("version") != "0.0.5":
            raise ValueError(f"version is {local.get('version')}")
        super()._load_from_state_dict(state, prefix, local, *rest)


def test_a_version_may_be_a_text(tmp_path: Path) -> None:
    model = Named()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    pack(tmp_path / "w.pt", tmp_path / "packed.tersor")
    save(run(model, Recipe((Entropy(),))), tmp_path / "run.tersor")
    for file in ("packed.tersor", "run.tersor"):
        again = Named()
        again.load_state_dict(load(tmp_path / file).state_dict())
        assert same(dict(again.state_dict()), dict(model.state_dict()))
    put_in(again := Named(), str(tmp_path / "w.pt"))
    assert same(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("version", [-1, 1 << 40, 1.5, (1, 2), None, "long" * 99, True])
def test_any_other_version_makes_a_file_that_can_be_read(version: Any, tmp_path: Path) -> None:
    named = Named()
    named._version = version
    model = nn.Sequential(named, nn.ReLU())
    save(run(model, Recipe((Entropy(),))), tmp_path / "run.tersor")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    pack(tmp_path / "w.pt", tmp_path / "packed.tersor")
    for file in ("packed.tersor", "run.tersor"):
        assert torch.equal(load(tmp_path / file).state_dict()["0.fc.weight"], named.fc.weight)


def load_usual(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A network of usual versions, which takes no attachment."""
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(), tmp_path / "u.pt")
    pack(tmp_path / "u.pt", tmp_path / "u.tersor")
    return load(tmp_path / "u.tersor")


@pytest.mark.parametrize("version", [1, 2])
def test_weights_of_an_older_version_are_loaded_by_the_modules_own_code(version: int, tmp_path: Path) -> None:
    model, plain = Picky(), Picky()
    torch.save(old_of(model) if version == 1 else model.state_dict(), tmp_path / "w.pt")
    plain.load_state_dict(torch.load(tmp_path / "w.pt"))
    put_in(loaded := Picky(), str(tmp_path / "w.pt"))
    assert same(dict(loaded.state_dict()), dict(plain.state_dict()))
    factor = 2 if version == 1 else 1
    assert torch.equal(loaded.fc.weight, model.fc.weight * factor)


def test_an_older_version_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = old_of(Picky())
    del state["fc.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(RefusedError, match="another version of Picky, whose code cannot load it: .*fc.bias"):
        put_in(Picky(), str(tmp_path / "w.pt"))


def test_files_of_earlier_versions_make_folders(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden"
    unpack(golden / "attachments.tersor", f"{tmp_path}/one/")
    held = load(golden / "attachments.tersor").attachments
    found = contents(tmp_path / "one")
    assert {name: found[name] for name in held} == held
    assert found.keys() == {*held, "model.safetensors"}
    unpack(golden / "model.tersor", f"{tmp_path}/two/")
    assert contents(tmp_path / "two").keys() == {"model.safetensors"}


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore")
def test_mnasnet(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    net = models.mnasnet0_5(weights=None)
    result = run(net, Recipe((Quantize(bits=8, where="layers.14.weight"),)))
    save(result, tmp_path / "run.tersor")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    pack(tmp_path / "w.pt", tmp_path / "packed.tersor", Entropy(where="layers.14.weight"))
    for file, expected in (("run.tersor", result.model().state_dict()), ("packed.tersor", net.state_dict())):
        again = models.mnasnet0_5(weights=None)
        again.load_state_dict(load(tmp_path / file).state_dict())
        assert same(dict(again.state_dict()), dict(expected))
    put_in(loaded := models.mnasnet0_5(weights=None), str(tmp_path / "w.pt"))
    assert same(dict(loaded.state_dict()), dict(net.state_dict()))
    # Version 1 had a stem of full width, which torchvision's own code makes.
    old = models.mnasnet0_5(weights=None)
    old._load_from_state_dict({}, "", {"version": 1}, False, [], [], [])
    assert old.state_dict()._metadata[""]["version"] == 1
    torch.save(old.state_dict(), tmp_path / "old.pt")
    plain, ours = models.mnasnet0_5(weights=None), models.mnasnet0_5(weights=None)
    plain.load_state_dict(torch.load(tmp_path / "old.pt"))
    put_in(ours, str(tmp_path / "old.pt"))
    assert same(dict(ours.state_dict()), dict(old.state_dict()))
    assert same(dict(ours.state_dict()), dict(plain.state_dict()))
    assert ours.state_dict()["layers.0.weight"].shape[0] == 32


ODD = ('a;b"c.txt', "what?.md", "a:b.json", "ends in a dot..json", "back\\slash.txt", "new\nline.txt",
       "ü ö.md", "README.md", "readme.MD", "Readme.md", "in/A.json", "IN/a.json", "sub.json",
       "SUB.json/x.json", "\xe9.md", "e\u0301.md", "x" * 250 + ".txt", "a b.json ")  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(ODD)))
def test_whatever_is_packed_can_be_unpacked(tmp_path: Path, names: set[str]) -> None:
    """What goes along can be written to a folder again; the rest is named."""
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    folder, file, back = root / "given", root / "m.tersor", root / "back"
    folder.mkdir()
    save_file({"w": torch.ones(3, 4)}, folder / "model.safetensors")
    for name in names:
        if len(name) < 250:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(name.encode())
    found = scan(folder)
    assert {*found.along, *found.others} == {name for name in names if len(name) < 250}
    pack(folder, file)
    assert all(check.sound for check in verify(file))
    unpack(file, f"{back}/")
    written = {path.relative_to(back).as_posix() for path in back.rglob("*") if path.is_file()}
    assert written - {"model.safetensors"} == {*found.along}
    assert all((back / name).read_bytes() == name.encode() for name in found.along)


@pytest.mark.parametrize(
    "names",
    [("a:b.safetensors",), ("A.safetensors", "a.safetensors"), ("\xe9.pt", "e\u0301.pt"), ('q".bin',)],
    ids=str,
)
def test_weights_whose_names_no_folder_could_have_are_refused_when_they_are_packed(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """A file that names them would be refused by every reader."""
    for at, name in enumerate(names):
        tensors = {f"w{at}": torch.ones(3, 4)}
        save_file(tensors, tmp_path / name) if name.endswith("s") else torch.save(tensors, tmp_path / name)
    (tmp_path / "out").mkdir()
    with pytest.raises(FormatError, match="name"):
        pack(tmp_path, tmp_path / "out" / "m.tersor")
    assert not list((tmp_path / "out").iterdir())
    if len(names) == 1:  # by itself the file's name plays no part
        pack(tmp_path / names[0], tmp_path / "out" / "m.tersor")
        assert all(check.sound for check in verify(tmp_path / "out" / "m.tersor"))
