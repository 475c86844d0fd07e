"""tersor show, pack, unpack and verify: their output agrees with the files."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import SITES, Command, Done

import tersor as package
from tersor.resolve import resolve_model


@pytest.fixture
def packed(tersor: Command) -> Command:
    """A folder with mine.py, its weights, and two files: m.tersor lossy with a ledger, l.tersor lossless."""
    safetensors.torch.save_file(resolve_model("mine.py:net").state_dict(), "w.safetensors")
    assert tersor("pack w.safetensors -o l.tersor -q").code == 0
    assert tersor("run mine.py:net -q --out o prune keep=0.3 quantize bits=4 where=2.* entropy").code == 0
    Path("o/model.tersor").rename("m.tersor")
    return tersor


def test_show_tells_the_forms_and_the_bits(packed: Command) -> None:
    facts = packed("show m.tersor --json").json
    result = package.load("m.tersor")
    assert facts["file"] == {"name": "m.tersor", "nbytes": Path("m.tersor").stat().st_size}
    assert list(facts["sites"]) == SITES
    for name, site in facts["sites"].items():
        assert site["stored"] == 8 * result.forms[name].nbytes
        assert site["weights"] == result.state_dict()[name].numel()
    assert facts["sites"]["2.weight"]["form"].startswith("Masked(Coded bool, Affine(4 bits, ")
    assert [step["step"] for step in facts["steps"]] == ["prune", "quantize", "entropy"]
    assert facts["result"] == result.digest


def test_show_as_tables(packed: Command) -> None:
    done = packed("show m.tersor")
    assert all(f" {name} " in done.out for name in SITES)
    assert "1 prune" in done.out
    assert "keep=0.3" in done.out
    assert "epochs" not in done.out  # a setting at its default


def test_show_one_site_or_a_glob(packed: Command) -> None:
    assert list(packed("show m.tersor 0.bias --json").json["sites"]) == ["0.bias"]
    assert list(packed("show", "m.tersor", "*.weight", "--json").json["sites"]) == ["0.weight", "2.weight"]
    done = packed("show m.tersor 0.bais")
    assert done.code == 2
    assert "did you mean '0.bias'" in done.err


def test_pack_without_steps_is_lossless(packed: Command) -> None:
    facts = packed("unpack l.tersor -o back.safetensors -q --json").json
    before, after = (
        safetensors.torch.load_file("w.safetensors"),
        safetensors.torch.load_file("back.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert facts["to"]["nbytes"] == Path("back.safetensors").stat().st_size


def test_pack_with_steps(packed: Command) -> None:
    facts = packed("pack w.safetensors -o q.tersor -q --json quantize bits=4 entropy").json
    assert facts["to"]["nbytes"] == Path("q.tersor").stat().st_size < package.load("l.tersor").nbytes
    assert facts["from"]["nbytes"] == Path("w.safetensors").stat().st_size
    worst = (
        package.load("q.tersor").state_dict()["0.weight"]
        - resolve_model("mine.py:net").state_dict()["0.weight"]
    )
    assert 0 < worst.abs().max() < 0.2


def test_sizes_are_printed(packed: Command) -> None:
    out = packed("pack w.safetensors -o q.tersor -q quantize bits=4 entropy").out
    small, large = (Path(name).stat().st_size for name in ("q.tersor", "w.safetensors"))
    assert out.splitlines()[1] == f"q.tersor: {small:,} bytes, {large / small:.2f} x smaller"
    assert "x larger" in packed("unpack q.tersor -o b.safetensors -q").out


def test_unpacked_weights_score_the_same(packed: Command) -> None:
    packed("unpack m.tersor -o back.safetensors -q")
    task = "--task mine.py:task -q --json"
    again = packed(f"run mine.py:net --weights back.safetensors {task} --out o3 measure").json["accuracy"]
    first = packed(f"run m.tersor --arch mine.py:net {task} --out o4 measure").json["accuracy"]
    assert again["before"] == first["after"]  # for a file, "before" is the first weights


def test_verify_finds_a_sound_file_sound(packed: Command) -> None:
    facts = packed("verify m.tersor --json").json
    assert facts["sound"]
    assert [check["site"] for check in facts["checks"]] == ["", *SITES]
    assert "4 parts, sound" in packed("verify m.tersor").out


def flipped(path: str, at: int) -> bytes:
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1
    return bytes(data)


def test_verify_names_what_is_damaged(packed: Command) -> None:
    size = Path("m.tersor").stat().st_size
    found = set()
    for at in range(size - 1, 0, -size // 12):
        Path("bad.tersor").write_bytes(flipped("m.tersor", at))
        done: Done = packed("verify bad.tersor --json")
        assert done.code == 1
        damaged = [check for check in done.json["checks"] if not check["sound"]]
        assert damaged
        found |= {check["site"] for check in damaged}
        assert packed("verify bad.tersor").out.startswith("damaged: ")
    assert found & set(SITES)  # not only "the file"


def test_pack_refuses_what_needs_the_model(packed: Command) -> None:
    done = packed("pack w.safetensors -o n.tersor prune per=global")
    assert done.code == 1
    assert "tersor run MODEL" in done.err
    assert not Path("n.tersor").exists()


def test_pack_reports_what_it_leaves_out(packed: Command) -> None:
    state = resolve_model("mine.py:net").state_dict()
    torch.save(
        {"state_dict": state, "epoch": 3, "optimizer": {"state": [state["0.bias"], state["2.bias"]]}}, "w.pt"
    )
    done = packed("pack w.pt -o t.tersor -q")
    assert done.out.splitlines()[-2] == "of the checkpoint: state_dict"
    assert done.out.splitlines()[-1] == "left out: epoch, optimizer (2 tensors)"
    facts = packed("pack w.pt -o t.tersor -q --json").json
    assert (facts["tensors"], facts["aliases"], facts["ignored"]) == (4, {}, {"epoch": 0, "optimizer": 2})
    assert "left out" not in packed("pack w.safetensors -o t.tersor -q").out


def test_what_is_left_out_counts_in_no_ratio(packed: Command) -> None:
    """A file with an optimizer was reported as 4 times smaller, and a factor of 3 was the optimizer."""
    state = resolve_model("mine.py:net").state_dict()
    moments = {n: {"exp_avg": torch.rand(999)} for n in range(3)}
    torch.save({"model": state, "adam": {"state": moments, "param_groups": []}}, "w.pt")
    tensors, file = sum(value.nbytes for value in state.values()), Path("w.pt").stat().st_size

    def share(name: str) -> float:
        return Path(name).stat().st_size / tensors

    first, second, *_ = packed("pack w.pt -o t.tersor -q").out.splitlines()
    assert first == f"w.pt: {file:,} bytes, {tensors:,} in the tensors that were packed"
    change = f"{1 / share('t.tersor'):.2f} x smaller" if share("t.tersor") < 1 else "x larger"
    assert second.endswith(f"{change} than these tensors")
    facts = packed("pack w.pt -o t.tersor -q --json").json
    assert (facts["from"]["tensors_nbytes"], facts["share"]) == (tensors, share("t.tersor"))
    facts = packed("pack w.safetensors -o t.tersor -q --json").json
    assert "tensors_nbytes" not in facts["from"]
    assert facts["share"] == facts["to"]["nbytes"] / facts["from"]["nbytes"]

    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, "old.pt")
    first, second, *_ = packed("diff old.pt w.pt -o p -q").out.splitlines()
    assert first == f"w.pt: {file:,} bytes, {tensors:,} in the tensors that were compared"
    assert second.endswith(f"{share('p'):.1%} of these tensors")
    assert packed("diff old.pt w.pt -o p -q --json").json["share"] == share("p")

    line = "pack w.pt -o r.tersor -q --max-drop 3 --model mine.py:net --task mine.py:task"
    assert packed(f"{line} --json").json["share"] == share("r.tersor")


def test_some_tensors_are_not_compared_with_all(packed: Command) -> None:
    done = packed("unpack m.tersor -o b.safetensors --only 2.bias -q")
    assert not [word for word in ("smaller", "larger") if word in done.out]
    assert "share" not in packed("unpack m.tersor -o b.safetensors --only 2.bias -q --json").json


def test_pack_reports_what_is_stored_once(packed: Command) -> None:
    weight = torch.ones(3, 3)
    torch.save({"a": weight, **{f"b{n}": weight for n in range(8)}}, "w.pt")
    last = packed("pack w.pt -o t.tersor -q").out.splitlines()[-1]
    assert last == "stored once: b0 = a, b1 = a, b2 = a, b3 = a, b4 = a, b5 = a and 2 more"


def test_tiny_files(packed: Command) -> None:
    assert (
        packed("run mine.py:net -q --out t --tiny prune keep=0.3 quantize bits=4 where=2.* entropy").code == 0
    )
    tiny, whole = Path("t/model.tersor"), Path("m.tersor")
    assert package.load(tiny).digest == package.load(whole).digest
    assert tiny.stat().st_size < whole.stat().st_size - 350
    assert packed("verify t/model.tersor").code == 0
    assert list(packed("show t/model.tersor --json").json["sites"]) == SITES
    packed("unpack t/model.tersor -o a.safetensors -q")
    packed("unpack m.tersor -o b.safetensors -q")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert packed("pack w.safetensors -o p.tersor --tiny -q").code == 0
    tiny.write_bytes(flipped("t/model.tersor", tiny.stat().st_size - 1))
    assert "the CRC of its bytes" in packed("verify t/model.tersor").out


def test_unpack_some_tensors_and_shards(packed: Command) -> None:
    assert packed("unpack l.tersor -o some.safetensors -q --only *.bias --only 2.weight").code == 0
    assert set(safetensors.torch.load_file("some.safetensors")) == {"0.bias", "2.bias", "2.weight"}
    done = packed("unpack l.tersor -o some.safetensors -q --only *.bais")
    assert (done.code, "no tensor is called '*.bais'" in done.err) == (2, True)
    facts = packed("unpack l.tersor -o shards -q --json --shard 1kB --workers 3").json
    assert facts["to"]["nbytes"] == sum(path.stat().st_size for path in Path("shards").iterdir())
    assert len(list(Path("shards").glob("model-*-of-*.safetensors"))) > 1
    done = packed("unpack l.tersor -o shards -q --shard 1kB")
    assert (done.code, "exists already" in done.err) == (1, True)
    assert packed("unpack l.tersor -o more -q --shard 1XB").code == 2
    assert packed("pack w.safetensors -o n.tersor -q --workers 0").code == 2
    assert not Path("n.tersor").exists()


def test_diff_and_patch(packed: Command) -> None:
    facts = packed("diff l.tersor m.tersor -o p -q --json").json
    assert facts["patch"] == {"name": "p", "nbytes": Path("p").stat().st_size}
    assert facts["new"]["nbytes"] == Path("m.tersor").stat().st_size
    assert sum(facts["arrays"].values()) >= len(SITES)
    facts = packed("patch l.tersor p -o again.tersor -q --json").json
    assert facts["to"] == {"name": "again.tersor", "nbytes": Path("m.tersor").stat().st_size}
    assert Path("again.tersor").read_bytes() == Path("m.tersor").read_bytes()
    share = Path("p").stat().st_size / Path("m.tersor").stat().st_size
    assert f"{share:.1%} of it" in packed("diff l.tersor m.tersor -o p -q").out
    assert packed("patch l.tersor p -o again.tersor -q").out.startswith("again.tersor: ")


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("patch m.tersor p -o n", 1, "there is nothing to do"),
        ("patch w.safetensors p -o n", 1, "Give the OLD that diff was given"),
        ("patch p l.tersor -o n", 2, "tersor patch OLD PATCH -o NEW"),
        ("patch l.tersor m.tersor -o n", 1, "tersor diff OLD NEW -o PATCH"),
        ("patch l.tersor none -o n", 1, "No such file"),
        ("diff p l.tersor -o n", 2, "it is a patch"),
        ("diff l.tersor -o n", 2, "NEW"),
        ("diff l.tersor mine.py -o n", 1, "mine.py: it is not a .tersor or .safetensors file"),
    ],
)
def test_diff_and_patch_refuse(packed: Command, line: str, code: int, says: str) -> None:
    packed("diff l.tersor m.tersor -o p -q")
    done = packed(line)
    assert (done.code, says in done.err) == (code, True), done.err
    assert not Path("n").exists()


def test_all_networks_are_packed_or_the_one_of_a_key(packed: Command) -> None:
    state = resolve_model("mine.py:net").state_dict()
    torch.save({"g": state, "g_ema": state, "optim": {"s": [torch.ones(2)]}, "mean": torch.ones(3)}, "w.pt")
    facts = packed("pack w.pt -o t.tersor -q --json").json
    assert (facts["key"], facts["ignored"]) == ("", {"optim": 1})
    assert facts["tensors"] + len(facts["aliases"]) == 9
    assert packed("pack w.pt -o t.tersor -q").out.splitlines()[-1] == "left out: optim (1 tensor)"
    out = packed("pack w.pt -o t.tersor -q --key g_ema").out.splitlines()
    assert out[-2] == "of the checkpoint: g_ema"
    assert out[-1] == "left out: g (4 tensors), optim (1 tensor), mean (1 tensor)"
    assert list(packed("show t.tersor --json").json["sites"]) == SITES
    done = packed("pack w.pt -o t.tersor -q --key g_emma")
    assert (done.code, "did you mean 'g_ema'" in done.err) == (2, True)
    done = packed("run mine.py:net -q --weights w.pt --out o5 entropy")
    assert (done.code, "choose it with --key g or --key g_ema" in done.err) == (1, True)
    assert packed("run mine.py:net -q --weights w.pt --key g_ema --out o5 entropy").code == 0
    done = packed("run mine.py:net -q --key g_ema --out o6 entropy")
    assert (done.code, "goes with --weights" in done.err) == (2, True)
    facts = packed("diff w.safetensors w.pt -o p -q --json").json
    assert facts["ignored"] == {"optim": 1}
