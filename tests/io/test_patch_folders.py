"""Patches of folders and of files beside the weights: byte for byte, small, refused if they are damaged."""

import hashlib
import json
import random
import tracemalloc
from pathlib import Path
from shutil import rmtree
from typing import Any

import forge  # noqa: F401  puts reference/ on the path
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_diff import head_of, put_together, take_apart

from tersor.core.recipe import Recipe
from tersor.errors import FormatError, RefusedError, SettingError, StorageError, TersorError
from tersor.io.pack import pack
from tersor.io.patch import encoder
from tersor.io.patch.diff import HEAD, Spool, diff
from tersor.io.patch.named_arrays import NamedArrays
from tersor.io.patch.patch import patch
from tersor.io.patch.texts import BLOCK, text_from, text_streams
from tersor.io.unpack import unpack
from tersor.steps import Entropy, Quantize

WORDS = [f"{hashlib.sha256(bytes([n % 256, n // 256])).hexdigest()[: 2 + n % 9]}_{n}" for n in range(6000)]


def tokenizer(words: list[str]) -> str:
    return json.dumps({"model": {"vocab": {word: number for number, word in enumerate(words)}}}, indent=1)


def write(folder: Path, *, step: float, words: list[str], others: dict[str, str], shards: int = 1) -> None:
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    values = {f"l{n}.weight": torch.randn(40, 30, generator=rng) for n in range(3)}
    values = {name: value + step * torch.randn(40, 30, generator=rng) for name, value in values.items()}
    if shards == 1:
        save_file(values, folder / "model.safetensors", {"format": "pt", "step": str(step)})
    else:
        where = {name: f"model-{n}-of-3.safetensors" for n, name in enumerate(values)}
        for name, file in where.items():
            save_file({name: values[name]}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for name, text in {"tokenizer.json": tokenizer(words), **others}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


CONFIG = json.dumps({"hidden_size": 40, "layers": list(range(60)), "dtype": "float32"}, indent=2)
LICENCE = "Permission is granted. " * 40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders, packs of them and single files: one.*, and two.* some steps later."""
    folder = tmp_path_factory.mktemp("files")
    one = {"config.json": CONFIG, "LICENSE": LICENCE, "gone.txt": "was here", "renamed.md": "a page " * 50}
    two = {
        "config.json": CONFIG.replace("float32", "bfloat16"), "LICENSE": LICENCE, "added/new.json": "[1, 2]",
        "other.md": "a page " * 50, "empty.txt": "",
    }  # fmt: skip
    later = [*WORDS[:2000], "inserted", *WORDS[2000:]]
    for word, others, words, step in (("one", one, WORDS, 0.0), ("two", two, later, 0.001)):
        write(folder / word, step=step, words=words, others=others)
        write(folder / f"{word}.shards", step=step, words=words, others=others, shards=3)
        for recipe, steps in {"lossless": (Entropy(),), "int8": (Quantize(bits=8), Entropy())}.items():
            pack(folder / word, folder / f"{word}.{recipe}.tersor", Recipe(steps))
            pack(folder / f"{word}.shards", folder / f"{word}.shards.{recipe}.tersor", Recipe(steps))
        (folder / f"{word}.safetensors").write_bytes((folder / word / "model.safetensors").read_bytes())
    return folder


@pytest.fixture(scope="module")
def apart(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, bytes, Any]:
    """The parts of a patch from a file to a folder, for those who put it together otherwise."""
    old, done = files / "one.safetensors", tmp_path_factory.mktemp("apart") / "p"
    diff(old, files / "two", done)
    return take_apart(done, head_of(old))


def tree(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {f"{p.relative_to(path)}": p.read_bytes() for p in path.rglob("*") if p.is_file()}


def there(old: Path, new: Path, folder: Path) -> int:
    """Size of the patch. Checks that it makes NEW, of one file or of all of its files."""
    done = diff(old, new, folder / "p")
    made = patch(old, folder / "p", folder / "out")
    assert tree(folder / "out") == tree(new)
    assert made == sum(map(len, tree(new).values()))
    assert done.nbytes == (folder / "p").stat().st_size
    assert not done.ignored
    return done.nbytes


KINDS = ("", ".shards", ".lossless.tersor", ".int8.tersor", ".shards.int8.tersor", ".safetensors")


@pytest.mark.sampled
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_any_to_any(old: str, new: str, files: Path, tmp_path: Path) -> None:
    nbytes = there(files / f"one{old}", files / f"two{new}", tmp_path)
    size = sum(map(len, tree(files / f"two{new}").values()))
    assert nbytes < (0.6 if new in (old, "", ".shards") else 1) * size


@pytest.mark.parametrize("kind", ["", ".shards", ".int8.tersor"])
def test_back_again_and_the_same(kind: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    there(files / f"two{kind}", files / f"one{kind}", tmp_path / "a")
    assert there(files / f"two{kind}", files / f"two{kind}", tmp_path) < 1000


def test_a_word_in_a_tokenizer_costs_its_digits(tmp_path: Path) -> None:
    """4,000 of 6,000 ids move by one; a word at the end moves none."""
    for name, words in (("old", WORDS), ("mid", [*WORDS[:2000], "x", *WORDS[2000:]]), ("end", [*WORDS, "x"])):
        write(tmp_path / name, step=0, words=words, others={})
        pack(tmp_path / name, tmp_path / f"{name}.tersor", Recipe((Entropy(),)))
    for ending in ("", ".tersor"):
        base = diff(tmp_path / f"old{ending}", tmp_path / f"old{ending}", tmp_path / "p").nbytes
        middle = diff(tmp_path / f"old{ending}", tmp_path / f"mid{ending}", tmp_path / "p").nbytes
        end = diff(tmp_path / f"old{ending}", tmp_path / f"end{ending}", tmp_path / "p").nbytes
        assert end - base < 300
        assert middle - base < 4000 * 4


@pytest.mark.parametrize("single", [True, False])
def test_prefixes_of_wrappers(single: bool, tmp_path: Path) -> None:
    """Their names are in the header; those of the arrays are without."""
    for n, word in enumerate(("old", "new")):
        (tmp_path / word).mkdir()
        values = {f"module.l{k}.weight": torch.randn(50, 40) for k in range(2)}
        if n:
            values = {name: value + 1e-4 for name, value in load(tmp_path / "old").items()}
        save_file(values, tmp_path / word / "model.safetensors")
    end = "model.safetensors" if single else ""
    (tmp_path / "o").mkdir()
    nbytes = there(tmp_path / "old" / end, tmp_path / "new" / end, tmp_path / "o")
    assert nbytes < 0.8 * 16_000


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 3])
def test_one_old_file_may_be_renamed(shards: int, tmp_path: Path) -> None:
    """Its name is no part of its digest, so no header of NEW depends on it."""
    import patcher

    write(tmp_path / "old", step=0, words=WORDS[:9], others={})
    write(tmp_path / "new", step=0, words=WORDS[:7], others={}, shards=shards)
    old, moved = tmp_path / "old" / "model.safetensors", tmp_path / "moved.safetensors"
    if shards == 1:  # with the very header: save_file orders its metadata anew each time
        (tmp_path / "new" / "model.safetensors").write_bytes(old.read_bytes())
    diff(old, tmp_path / "new", tmp_path / "p")
    old.rename(moved)
    patch(moved, tmp_path / "p", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "new")
    found = patcher.patched(moved, tmp_path / "p")
    values = {name: value.numpy().tobytes() for name, value in load_file(moved).items()}
    assert {name: found[name].values.tobytes() for name in values} == values


def test_a_header_of_a_folder_takes_no_byte(tmp_path: Path) -> None:
    """Nor does that of one .safetensors, under any name."""
    values = {hashlib.sha256(bytes([n])).hexdigest(): torch.full((3,), float(n)) for n in range(250)}
    for word in ("old", "new"):
        (tmp_path / word).mkdir()
        save_file(values, tmp_path / word / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "other.safetensors")
    for end in ("model.safetensors", "other.safetensors"):
        old = tmp_path / "new" if end[0] == "m" else tmp_path / "old" / end
        assert there(old, tmp_path / "new", tmp_path) < 1000
        rmtree(tmp_path / "out")


def test_a_folder_with_nothing_in_common_is_carried(tmp_path: Path) -> None:
    letters, rng = random.Random(5), torch.Generator().manual_seed(5)
    names = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=300)) for _ in range(400)]
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    save_file({"one": torch.zeros(3)}, tmp_path / "old" / "model.safetensors")
    values = {n: torch.randint(0, 256, (3,), generator=rng, dtype=torch.uint8) for n in names}
    save_file(values, tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text("{}")
    done = diff(tmp_path / "old", tmp_path / "new", tmp_path / "p")
    assert done.whole
    assert done.nbytes <= sum(map(len, tree(tmp_path / "new").values())) + HEAD
    patch(tmp_path / "old", tmp_path / "p", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "new")


@pytest.mark.sampled
@pytest.mark.parametrize("old", ["one", "one.safetensors", "new", "empty.safetensors"])
@pytest.mark.parametrize("new", ["one.shards", "new", "bare", "empty.safetensors"])
def test_a_shard_without_tensors_is_a_file_of_the_folder(
    old: str, new: str, files: Path, tmp_path: Path
) -> None:
    """As a padding of shards. It is part of the digest of an OLD folder too."""
    for name, data in {**tree(files / "two"), "zz.safetensors": None}.items():
        (path := tmp_path / "new" / name).parent.mkdir(exist_ok=True, parents=True)
        save_file({}, path, {"format": "pt"}) if data is None else path.write_bytes(data)
    (tmp_path / "bare").mkdir()
    for name in ("bare/model.safetensors", "empty.safetensors"):
        save_file({}, tmp_path / name)
    (tmp_path / "o").mkdir()
    found = [path if path.exists() else files / path.name for path in (tmp_path / old, tmp_path / new)]
    there(*found, tmp_path / "o")
    save_file({"more": torch.ones(2)}, tmp_path / "new" / "zz.safetensors")
    save_file({}, tmp_path / "empty.safetensors", {"other": "metadata"})
    if old in ("new", "empty.safetensors"):
        with pytest.raises(RefusedError, match="was made for another file"):
            patch(found[0], tmp_path / "o" / "p", tmp_path / "no")


def test_pickles_become_one_file(tmp_path: Path) -> None:
    """They cannot be made byte for byte, so what lies beside them is listed as left out."""
    for n, word in enumerate(("old", "new")):
        (tmp_path / word).mkdir()
        torch.save({"w": torch.full((30, 20), float(n))}, tmp_path / word / "pytorch_model.bin")
        (tmp_path / word / "config.json").write_text(f"[{n}]")
    done = diff(tmp_path / "old", tmp_path / "new", tmp_path / "p")
    assert done.ignored == {"config.json": None}
    assert done.reasons == {"config.json": "the patch makes one file, not a folder"}
    patch(tmp_path / "old", tmp_path / "p", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").is_file()


@pytest.mark.wide
def test_the_second_reader_makes_the_same_files(files: Path, tmp_path: Path) -> None:
    import patcher

    old = files / "one.lossless.tersor"
    diff(old, files / "two", tmp_path / "p")
    found = patcher.patched(old, tmp_path / "p")
    for name, data in tree(files / "two").items():
        if name != "model.safetensors":
            assert found.pop(f"attachment:{name}").values.tobytes() == data, name
    expected = {name: value.numpy().tobytes() for name, value in load(files / "two").items()}
    assert {name: value.values.tobytes() for name, value in found.items()} == expected

    diff(old, files / "two.lossless.tersor", tmp_path / "p")
    found = patcher.patched(old, tmp_path / "p")
    for name in ("config.json", "tokenizer.json"):  # coded as texts
        assert found[f"attachment:{name}"].values.tobytes() == (files / "two" / name).read_bytes()


texts = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=30), st.integers(0, 1500)),
)


@given(texts, texts, texts, texts)
@example(b"", b"", b"", b"")
@example(b"a" * BLOCK, b"", b"", b"b" * (BLOCK + 1))
@example(b"", random.Random(0).randbytes(40_000), b"x", b"")
def test_texts_come_back(head: bytes, one: bytes, other: bytes, tail: bytes) -> None:
    import patcher

    old, new = head + one + tail, head + other + tail
    lengths, streams = text_streams(new, old)
    assert text_from(lengths, iter(streams), old) == new
    assert patcher.text_bytes(lengths, streams, old) == new
    assert lengths[0] >= len(head)
    assert lengths[1] <= len(other)


def test_a_long_text_is_not_searched_byte_by_byte() -> None:
    old = random.Random(0).randbytes(8 << 20)
    new = old[: 5 << 20] + b"new" + old[5 << 20 :]
    lengths, streams = text_streams(new, old)
    assert lengths[1] <= 3 + 8
    assert sum(map(len, streams)) < 20
    assert text_from(lengths, iter(streams), old) == new


def test_a_file_below_a_folder_with_the_weights_name_is_left_out(files: Path, tmp_path: Path) -> None:
    """On some systems `Model.safetensors/` and `model.safetensors` are one name."""
    for word in ("Model.safetensors", "model-1-of-3.SAFETENSORS"):
        (tmp_path / word).mkdir()
        kind = "two.shards" if "1" in word else "two"
        for name, data in tree(files / kind).items():
            (tmp_path / word / "new" / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / word / "new" / name).write_bytes(data)
        (tmp_path / word / "new" / word).mkdir()
        (tmp_path / word / "new" / word / "a.json").write_text("{}")
        done = diff(files / "one", tmp_path / word / "new", tmp_path / word / "p")
        assert done.reasons[f"{word}/a.json"].startswith("another file has its name, but for capitals")
        patch(files / "one", tmp_path / word / "p", tmp_path / word / "out")
        assert tree(tmp_path / word / "out") == tree(files / kind)
        pack(tmp_path / word / "new", tmp_path / word / "m.tersor", Recipe((Entropy(),)))
        unpack(tmp_path / word / "m.tersor", f"{tmp_path / word}/back/")


class Sliced(bytes):
    """Bytes that count those copied by slices."""

    copied = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        piece = Sliced(super().__getitem__(key))
        Sliced.copied += len(piece)
        return piece


def test_a_new_text_is_copied_a_few_times_and_not_for_each_block() -> None:
    """In 128 blocks; a block's dictionary copies 32 kB for 8 kB."""
    size, Sliced.copied = 1 << 20, 0
    text_streams(Sliced(size), b"")
    assert Sliced.copied < 10 * size


def test_a_file_beside_the_weights_is_not_deflated_to_compare_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(encoder, "deflate")
    there(files / "one", files / "two", tmp_path)


# --- refused ---


@pytest.mark.parametrize(
    "names",
    [["a\nb"], ["a*b"], ["x" * 238], ["A", "a"], ["end", "b:c"], ["\xe9", "E\u0301"]],
    ids=["line", "star", "long", "capitals", "colon", "accents"],
)
def test_no_patch_that_would_be_refused(names: list[str], files: Path, tmp_path: Path) -> None:
    """`diff` refuses the names that `patch` refuses, before it codes anything."""
    (tmp_path / "new").mkdir()
    for n, name in enumerate(names):
        save_file({f"l{n}.weight": torch.ones(40, 30)}, tmp_path / "new" / f"{name}.safetensors")
    with pytest.raises(FormatError, match="Rename it, or give the file in place of its folder"):
        diff(files / "one", tmp_path / "new", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_what_is_carried_is_applied_once(files: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for name, data in tree(files / "two").items():
        if "/" not in name:
            (tmp_path / "new" / name).write_bytes(data)
    with NamedArrays(files / "one") as before, NamedArrays(tmp_path / "new") as after:
        assert after.folder
        with Spool(tmp_path) as spool:
            assert spool.carry(before, after).new == after.digest
        data = bytearray((files / "two" / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "new" / "model.safetensors").write_bytes(data)
        with Spool(tmp_path) as spool, pytest.raises(FormatError, match="it changed while it was read"):
            spool.carry(before, after)


def test_another_file_beside_the_old_weights(files: Path, tmp_path: Path) -> None:
    """They are not part of OLD's digest: the same weights suffice, until a file is made of another one."""
    diff(files / "one", files / "two", tmp_path / "p")
    for name, data in tree(files / "one").items():
        (tmp_path / "old" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "old" / name).write_bytes(data)
    (tmp_path / "old" / "gone.txt").unlink()
    patch(tmp_path / "old", tmp_path / "p", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(files / "two")
    (tmp_path / "old" / "tokenizer.json").write_text(tokenizer(["y", *WORDS]))
    with pytest.raises(FormatError, match=r"tokenizer\.json: the file that it makes has a wrong SHA-256"):
        patch(tmp_path / "old", tmp_path / "p", tmp_path / "no")
    (tmp_path / "old" / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        patch(tmp_path / "old", tmp_path / "p", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_folder_with_the_new_weights_may_have_old_files_beside_them(files: Path, tmp_path: Path) -> None:
    diff(files / "one", files / "two", tmp_path / "p")
    (tmp_path / "half").mkdir()
    for folder, name in (("two", "model.safetensors"), ("one", "config.json")):
        (tmp_path / "half" / name).write_bytes((files / folder / name).read_bytes())
    for old in (tmp_path / "half", files / "two"):
        with pytest.raises(RefusedError, match=r"has already\. For the files beside them, give the OLD that"):
            patch(old, tmp_path / "p", tmp_path / "no")
    diff(files / "one.safetensors", files / "two.safetensors", tmp_path / "p")
    with pytest.raises(RefusedError, match="there is nothing to do"):
        patch(files / "two.safetensors", tmp_path / "p", tmp_path / "no")


def test_the_folder_must_be_new(files: Path, tmp_path: Path) -> None:
    diff(files / "one", files / "two", tmp_path / "p")
    with pytest.raises(SettingError, match=r"it makes a folder, so name one: two/"):
        patch(files / "one", tmp_path / "p", tmp_path / "two.safetensors")
    with pytest.raises(StorageError, match="exists already"):
        patch(files / "one", tmp_path / "p", files / "one")
    (tmp_path / "empty").mkdir()
    patch(files / "one", tmp_path / "p", tmp_path / "empty")
    assert tree(tmp_path / "empty") == tree(files / "two")


@pytest.mark.parametrize(
    "name",
    [
        "../x.json", "/tmp/x.json", ".git/config", "a/../../x.txt", "con\u0000.txt", "model.safetensors",
        ".tersor/../../x.json", ".tersor/../model.safetensors", ".tersor/../.git/config", ".tersor/a\u0000b",
        ".tersor//tmp/x.json", ".tersor/x.json", ".tersor/files.json", "Model.safetensors/x.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["others", "files"])
def test_unsafe_names(
    key: str, name: str, files: Path, apart: tuple[Any, bytes, Any], tmp_path: Path
) -> None:
    if (key, name) == ("files", "model.safetensors"):
        pytest.skip("the name that it has")
    old = files / "one.safetensors"
    metadata, text, streams = apart
    document = json.loads(text)
    word = "config.json" if key == "others" else "model.safetensors"
    document[key][name] = document[key].pop(word)
    if key == "others":
        document["parts"][f"attachment:{name}"] = document["parts"].pop(f"attachment:{word}")
    (tmp_path / "p").write_bytes(put_together(metadata, json.dumps(document).encode(), streams, head_of(old)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FormatError, match="the files that it makes: "):
        patch(old, tmp_path / "p", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "lengths",
    [[0, 5], [0, 0, 0], [1 << 40, 0, 0], [0, 1 << 40, 0], [0, -1, 0], [0, 5.5, 0], "text", [0, 70, 0], None],
    ids=str,
)
def test_wrong_lengths_of_a_text(
    lengths: object, files: Path, apart: tuple[Any, bytes, Any], tmp_path: Path
) -> None:
    old = files / "one.safetensors"
    metadata, text, streams = apart
    document = json.loads(text)
    part = document["parts"]["attachment:tokenizer.json"]
    assert part["how"] == "text"
    assert part["text"][0] == part["text"][2] == 0
    part["text"] = lengths
    if lengths is None:
        del part["text"]
    (tmp_path / "p").write_bytes(put_together(metadata, json.dumps(document).encode(), streams, head_of(old)))
    with pytest.raises(FormatError):
        patch(old, tmp_path / "p", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("new", ["two", "two.int8.tersor"])
def test_a_text_longer_than_its_file_is_refused_before_it_is_inflated(
    new: str, files: Path, tmp_path: Path
) -> None:
    """A patch of 50 kB states a text of 16 MiB for a tokenizer."""
    old = files / "one.safetensors"
    diff(old, files / new, tmp_path / "p")
    metadata, text, streams = take_apart(tmp_path / "p", head_of(old))
    document = json.loads(text)
    _, zeros = text_streams(bytes(16 << 20), b"")
    document["parts"]["attachment:tokenizer.json"] = {
        "how": "text", "text": [0, 16 << 20, 0], "n": [*map(len, zeros)]
    }  # fmt: skip
    at, pieces = 0, []
    for name, part in json.loads(text)["parts"].items():
        begin, at = at, at + sum(part.get("n", []))
        pieces.append(b"".join(zeros) if name == "attachment:tokenizer.json" else streams[begin:at])
    raw = put_together(metadata, json.dumps(document).encode(), b"".join(pieces), head_of(old))
    (tmp_path / "p").write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"its text has 16,777,216 bytes, not \d\d"):
            patch(old, tmp_path / "p", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_tensors_are_no_texts(files: Path, tmp_path: Path) -> None:
    old = files / "one.safetensors"
    diff(old, files / "two.safetensors", tmp_path / "p")
    metadata, text, streams = take_apart(tmp_path / "p", head_of(old))
    document = json.loads(text)
    document["parts"]["l0.weight"] |= {"how": "text", "text": [0, 0, 0]}
    (tmp_path / "p").write_bytes(put_together(metadata, json.dumps(document).encode(), streams, head_of(old)))
    with pytest.raises(FormatError, match="it is not an attachment"):
        patch(old, tmp_path / "p", tmp_path / "out")


def test_damaged_patches_of_folders(files: Path, tmp_path: Path) -> None:
    """Flipped bits with correct checksums: an error and no folder, or the same folder."""
    old, rng = files / "one.int8.tersor", random.Random(0)
    diff(old, files / "two.shards", tmp_path / "p")
    metadata, text, streams = take_apart(tmp_path / "p", head_of(old))
    for number in range(40):
        at = rng.randrange(len(streams))
        changed = streams[:at] + bytes([streams[at] ^ 1 << rng.randrange(8)]) + streams[at + 1 :]
        (tmp_path / "p").write_bytes(put_together(metadata, text, changed, head_of(old)))
        try:
            patch(old, tmp_path / "p", tmp_path / f"out{number}")
        except TersorError:
            assert not (tmp_path / f"out{number}").exists()
            continue
        assert tree(tmp_path / f"out{number}") == tree(files / "two.shards")


def test_weights_of_one_name_but_for_capitals(files: Path, tmp_path: Path) -> None:
    old = files / "one.safetensors"
    diff(old, files / "two", tmp_path / "p")
    metadata, text, streams = take_apart(tmp_path / "p", head_of(old))
    document = json.loads(text)
    document["files"]["Model.safetensors"] = document["files"]["model.safetensors"]
    (tmp_path / "p").write_bytes(put_together(metadata, json.dumps(document).encode(), streams, head_of(old)))
    with pytest.raises(FormatError, match=r"'model\.safetensors' and another file"):
        patch(old, tmp_path / "p", tmp_path / "out")


def test_a_whole_folder_cut_short(files: Path, tmp_path: Path) -> None:
    old = files / "one.safetensors"
    digest = hashlib.sha256(old.read_bytes()).hexdigest()
    data = (files / "two" / "model.safetensors").read_bytes()
    for size, fine in ((len(data), True), (len(data) + 1, False), (-1, False), (len(data) - 1, False)):
        text = {"kind": "folder", "files": {"a.safetensors": size}, "others": {}, "whole": True, "parts": {}}
        sha = hashlib.sha256(f"a.safetensors\0{size}\0".encode() + data[: max(0, size)]).hexdigest()
        metadata = {"tersor-patch": "1", "old": digest, "new": sha}
        raw = put_together(metadata, json.dumps(text).encode(), data, head_of(old))
        (tmp_path / "p").write_bytes(raw)
        if fine:
            patch(old, tmp_path / "p", tmp_path / "out")
            assert tree(tmp_path / "out") == {"a.safetensors": data}
            continue
        with pytest.raises(FormatError, match="but not those of the files that it carries"):
            patch(old, tmp_path / "p", tmp_path / "no")
        assert not (tmp_path / "no").exists()
