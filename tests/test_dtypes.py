"""Every dtype of the installed PyTorch, as parameter and as buffer: worked on, or stored bit for bit and
noted, or refused before anything is written, with a way out that works."""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from source_tree import ROOT
from tiny import TRAINED, tiny
from torch import Tensor, nn

import tersor
from tersor.cli import main
from tersor.core.state import start
from tersor.dtypes import BY_DTYPE, CODED, CODES, FLOATS, INTEGERS, ROWS, Dtype, in_bytes, unsupported
from tersor.errors import FormatError, RefusedError, SiteError
from tersor.forms import Dense
from tersor.io.safetensors_file import TensorFile
from tersor.steps import STEPS

sys.path.append(str(ROOT / "reference"))
import reader

EVERY = sorted({item for item in vars(torch).values() if isinstance(item, torch.dtype)}, key=str)
HELD = [dtype for dtype in EVERY if dtype in CODES]
UNHELD = [dtype for dtype in EVERY if dtype not in CODES]
LEFT = [dtype for dtype in HELD if not BY_DTYPE[dtype].worked]
KINDS = ("parameter", "buffer")
QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)  # packed ones cannot be made
RECIPE = tersor.Recipe((tersor.Prune(per="tensor"), tersor.Quantize(), tersor.Entropy()))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of new dtypes


def value(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bits without NaN and infinity."""
    random = np.random.default_rng(seed)
    if dtype in QUANTIZED:
        return torch._empty_affine_quantized(shape, scale=1.0, zero_point=0, dtype=dtype)
    if str(dtype).startswith("torch.q"):
        return torch.empty(shape, dtype=dtype)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = torch.from_numpy(random.integers(0, 2 if dtype is torch.bool else 256, count, dtype=np.uint8))
    if not count:
        return torch.empty(shape, dtype=dtype)
    if dtype.is_complex or (dtype.is_floating_point and dtype not in UNHELD):
        wide = data.view(torch.float32 if dtype.is_complex else dtype)
        bad = ~(wide.float() if wide.dtype.itemsize == 1 else wide).isfinite()
        data.view(-1, wide.dtype.itemsize)[bad] = 1  # a small subnormal
    return data.view(dtype).reshape(shape)


def data_of(tensor: Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


class Net(nn.Module):
    """A small network that uses the tensor."""

    def __init__(self, w: Tensor, kind: str) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(5, 7), nn.Linear(7, 3)
        if kind == "buffer":
            self.register_buffer("w", w)
        else:
            trained = w.dtype.is_floating_point or w.dtype.is_complex
            self.w = nn.Parameter(w, requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:  # [B, 5]
        w = self.w.real if self.w.is_complex() else self.w
        return self.out(self.fc(x).relu()) * (1 + w.to(torch.float32).clamp(-3, 3).mean() / 8)


def net(dtype: torch.dtype, kind: str = "parameter", seed: int = 0) -> Net:
    torch.manual_seed(0)
    numbers = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return Net(numbers.to(dtype) if dtype in FLOATS else value(dtype, 4, 6, seed=seed), kind)


# --- the table ---


def test_every_dtype_of_this_torch_is_in_the_table() -> None:
    assert set(EVERY) <= BY_DTYPE.keys()
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_table_holds_together() -> None:
    for row in ROWS:
        assert bool(row.code) != bool(row.way), row.name
        assert row.code or not (row.worked or row.coded), row.name
        assert row.coded or not row.worked, row.name  # what steps make of a weight is coded
    assert (torch.float16, torch.bfloat16, torch.float32, torch.float64) == FLOATS
    assert (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) == INTEGERS


@pytest.mark.parametrize("dtype", HELD, ids=str)
def test_files_call_it_what_safetensors_calls_it(dtype: torch.dtype, tmp_path: Path) -> None:
    given = value(dtype, 3, 4)
    safetensors.torch.save_file({"w": given}, tmp_path / "w.safetensors")
    with TensorFile(tmp_path / "w.safetensors") as file:
        assert file.slots["w"].dtype is dtype
        assert data_of(file.read("w")) == data_of(given)


@pytest.mark.parametrize("dtype", UNHELD, ids=str)
def test_the_way_out_leads_out(dtype: torch.dtype) -> None:
    way = BY_DTYPE[dtype].way
    if str(dtype).startswith("torch.q"):
        assert way.startswith("x.dequantize()")
        given = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, dtype) if dtype in QUANTIZED else None
        assert given is None or torch.equal(given.dequantize(), torch.ones(3))
        return
    found = eval(way.split(",")[0], {"torch": torch, "x": value(dtype, 4, 6)})
    assert not unsupported(found.dtype)
    assert data_of(found) == data_of(value(dtype, 4, 6).view(torch.uint8))


def outcome(row: Dtype) -> tuple[str, ...]:
    if row.way:
        return f"refused: store `{row.way.split(',')[0]}`", "", "", ""
    worked, coded = "worked on" if row.worked else "left alone", "coded" if row.coded else "plain"
    return "as it is", worked, coded, "exported" if row.exported else "refused"


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    lines = re.findall(r"^\| (`.*) \|$", page.partition("## Dtypes")[2].partition("\n## ")[0], re.MULTILINE)
    found_rows = {}
    for names, *rest in (line.split("|") for line in lines):
        found_rows |= dict.fromkeys(re.findall(r"`(\w+)`", names), tuple(cell.strip() for cell in rest))
    assert found_rows == {row.name: outcome(row) for row in ROWS}


# --- runs ---


def skips(state: Any, number: int = 0) -> list[str]:
    return [
        e.text for e in state.ledger.entries if e.step == number and e.site == "w" and e.kind == "skipped"
    ]


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in STEPS if name != "export"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LEFT, ids=str)
def test_each_step_leaves_it_and_says_so_once(dtype: torch.dtype, kind: str, name: str) -> None:
    model, task, word = net(dtype, kind), tiny("mlp").task, str(dtype).removeprefix("torch.")
    more = {"unmet": "nearest"} if name == "shorten" else {}  # there are no branches
    for settings in ({}, TRAINED[name]) if name in TRAINED else ({},):
        done = tersor.run(model, STEPS[name](**settings | more), task)
        assert data_of(done.state_dict()["w"]) == data_of(model.w)
        assert data_of(done.model().state_dict()["w"]) == data_of(model.w)
        texts = skips(done)
        if name == "measure" or (kind == "buffer" and name != "entropy"):
            assert not texts
        elif name == "entropy" and word in CODED:
            assert len(texts) <= 1
            assert all("no coder shortens" in text for text in texts)
        else:
            assert len(texts) == 1
            assert texts[0].startswith(f"{word} is stored as it is: ")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_are_worked_on(dtype: torch.dtype) -> None:
    model, task = net(dtype), tiny("mlp").task
    for name in STEPS:
        if name not in ("measure", "export", "entropy", "slim", "shorten", "fold"):  # these need layers
            step = STEPS[name](**TRAINED.get(name, {}) | {"where": "w"})  # a scale, which has to be named
            done = tersor.run(model, step, task)
            assert data_of(done.state_dict()["w"]) != data_of(model.w), name
            assert done.state_dict()["w"].dtype is dtype
            assert not any("stored as it is" in text for text in skips(done)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", UNHELD, ids=str)
def test_what_no_file_holds_is_refused_before_anything_is_written(
    dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    w = value(dtype, 4, 6)
    model = Net(torch.ones(4, 6), "buffer")
    if kind == "buffer":
        model.w = w
    else:
        del model.w
        model.w = nn.Parameter(w, requires_grad=dtype.is_floating_point or dtype.is_complex)
    for name in STEPS:
        with pytest.raises(RefusedError, match=rf"^w: the state dict holds a .*{dtype}.* Store ") as caught:
            tersor.run(model, STEPS[name](), tiny("mlp").task, journal=tmp_path / "j", out=tmp_path)
        assert BY_DTYPE[dtype].way in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_glob_of_such_weights_alone_is_refused_by_its_dtype() -> None:
    message = "prune: where='w' matches no weight; w: complex64 is stored as it is: steps work on float16, "
    with pytest.raises(SiteError, match=re.escape(message)):
        tersor.run(net(torch.complex64), tersor.Prune(where="w"))
    with pytest.raises(SiteError, match="where='!w' excludes nothing; w: complex64 is stored as it is"):
        tersor.run(net(torch.complex64), tersor.Prune(where="*,!w"))
    assert not skips(tersor.run(net(torch.complex64), tersor.Prune(where="fc*")))


def test_nan_is_refused_whatever_the_dtype(tmp_path: Path) -> None:
    for dtype in HELD:
        if not (dtype.is_floating_point or dtype.is_complex):
            continue
        w = torch.ones(2, 2).to(dtype)
        w[0, 1] = torch.nan if not dtype.is_complex else complex(1.0, torch.nan)
        for kind in KINDS:
            with pytest.raises(RefusedError, match="w: 1 of 4 values are NaN"):
                start(Net(w, kind))
        safetensors.torch.save_file({"w": w, "v": torch.ones(2, 2)}, tmp_path / "w.safetensors")
        with pytest.raises(RefusedError, match="w: 1 of 4 values are NaN"):
            tersor.pack(tmp_path / "w.safetensors", tmp_path / "w.tersor", RECIPE)
        assert not (tmp_path / "w.tersor").exists()


@pytest.mark.parametrize("dtype", LEFT, ids=str)
def test_a_buffer_that_training_moves_is_stored_as_it_became(dtype: torch.dtype) -> None:
    """Such as a running scale. PyTorch cannot compare all dtypes with each other."""

    class Moving(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.w = moved(self.w)
            return self.out(self.fc(x).relu())

    def moved(w: Tensor) -> Tensor:
        return w.view(torch.uint8).flip(0).view(dtype)

    model, task = Moving(value(dtype, 4, 6), "buffer"), tiny("mlp").task
    done = tersor.run(model, tersor.Finetune(epochs=0.5, lr=0.01), task)  # one batch of two
    assert data_of(done.state_dict()["w"]) == data_of(moved(model.w))


def test_a_killed_run_notes_it_once(tmp_path: Path) -> None:
    """The executor's own notes are in the journal, and a resumed run has them once."""
    model, steps = net(torch.complex64), [tersor.Prune(), tersor.Quantize()]
    whole = tersor.run(model, steps, journal=tmp_path / "j")
    count = len(list((tmp_path / "j").glob("*.group")))
    assert count >= 8
    for cut in range(count):
        for path in sorted((tmp_path / "j").glob("*.group"))[cut:]:
            path.unlink()
        again = tersor.run(model, steps, journal=tmp_path / "j", resume=True)
        assert again.ledger.digest == whole.ledger.digest
        assert [len(skips(again, n)) for n in (0, 1)] == [1, 1]


# --- files ---


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HELD, ids=str)
def test_files_of_it(dtype: torch.dtype, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = start(net(dtype, kind)), start(net(dtype, kind, seed=1))
    wanted = data_of(first.state_dict()["w"])
    for short in (True, False):
        tersor.save(first, "a.tersor", tiny=short)
        assert data_of(tersor.load("a.tersor").state_dict()["w"]) == wanted
        assert reader.read("a.tersor")["w"].values.tobytes() == wanted
        assert all(row.sound for row in tersor.verify("a.tersor"))
        tersor.unpack("a.tersor", "a.safetensors")
        found = safetensors.torch.load_file("a.safetensors")["w"]
        assert (found.dtype, data_of(found)) == (dtype, wanted)
    tersor.save(second, "b.tersor")
    tersor.diff("a.tersor", "b.tersor", "p")
    tersor.patch("a.tersor", "p", "c.tersor")
    assert Path("c.tersor").read_bytes() == Path("b.tersor").read_bytes()
    for line in ("show a.tersor", "show a.tersor --json", "show a.tersor --html a.html", "verify a.tersor"):
        monkeypatch.setattr(sys, "argv", ["tersor", *line.split()])
        assert main() == 0, line


@pytest.mark.parametrize("dtype", HELD, ids=str)
def test_packs_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    word, given = str(dtype).removeprefix("torch."), value(dtype, 40, 30)
    torch.save({"w": given}, tmp_path / "w.pt")
    safetensors.torch.save_file({"w": given}, tmp_path / "w.safetensors")
    for source in ("w.pt", "w.safetensors"):
        tersor.pack(tmp_path / source, tmp_path / "w.tersor", tersor.Recipe((tersor.Entropy(),)))
        tersor.unpack(tmp_path / "w.tersor", tmp_path / "u.safetensors")
        assert data_of(safetensors.torch.load_file(tmp_path / "u.safetensors")["w"]) == data_of(given)
        if dtype in LEFT:
            with pytest.raises(SiteError, match=f"matches no weight; w: {word} is stored as it is"):
                tersor.pack(tmp_path / source, tmp_path / "w.tersor", RECIPE)
    torch.save({"w": given, "v": torch.ones(4, 4)}, tmp_path / "two.pt")
    if dtype in LEFT:
        packed = tersor.pack(tmp_path / "two.pt", tmp_path / "two.tersor", RECIPE)
        assert [len([e for e in packed.ledger.entries if e.step == n and e.site == "w"]) for n in (0, 1)] == [
            1,
            1,
        ]
        assert data_of(tersor.load(tmp_path / "two.tersor").state_dict()["w"]) == data_of(given)
    safetensors.torch.save_file({"w": value(dtype, 40, 30, seed=1)}, tmp_path / "x.safetensors")
    tersor.diff(tmp_path / "w.safetensors", tmp_path / "x.safetensors", tmp_path / "p")
    tersor.patch(tmp_path / "w.safetensors", tmp_path / "p", tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


@pytest.mark.parametrize("short", [False, True], ids=["", "tiny"])
@pytest.mark.parametrize("dtype", UNHELD, ids=str)
def test_nothing_is_written_that_cannot_be_read(dtype: torch.dtype, short: bool, tmp_path: Path) -> None:
    """Not even from a state that was made by hand; the earlier file stays."""
    state, path = start(net(torch.float32)), tmp_path / "m.tersor"
    tersor.save(state, path, tiny=short)
    before, site = path.read_bytes(), state.sites["w"]
    w = value(dtype, 4, 6)
    word = str(dtype).removeprefix("torch.")
    odd = replace(
        state, sites={**state.sites, "w": replace(site, dtype=word)}, forms={**state.forms, "w": Dense(w)}
    )
    with pytest.raises(RefusedError, match=f"w: it is a {dtype} tensor; a file holds bool.* Store "):
        tersor.save(odd, path, tiny=short)
    assert path.read_bytes() == before


def test_a_file_of_a_dtype_that_is_not_known_is_refused(tmp_path: Path) -> None:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this PyTorch has no floats of 4 bits")
    w = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    safetensors.torch.save_file({"w": w}, tmp_path / "w.safetensors")
    with pytest.raises(FormatError, match="w: .* dtype 'F4'; known are BOOL, .* Store others as bytes"):
        tersor.pack(tmp_path / "w.safetensors", tmp_path / "w.tersor", RECIPE)
    assert not (tmp_path / "w.tersor").exists()


# --- shapes, places in memory, bits ---

SHAPES = ((), (1,), (0,), (3, 0, 2), (2, 1, 3, 1, 2), (1, 1, 1, 1, 1), (300,), (65, 7))


def odd_bits(dtype: torch.dtype) -> Tensor:
    """Zeros of both signs, the smallest and the largest numbers, infinities; for integers both ends."""
    wide = dtype.itemsize // (2 if dtype.is_complex else 1)
    patterns = {
        0,
        1,
        1 << (8 * wide - 1),
        (1 << (8 * wide - 1)) + 1,
        (1 << (8 * wide - 1)) - 1,
        (1 << (8 * wide)) - 1,
    }
    if dtype is torch.bool:
        patterns = {0, 1}
    raw = b"".join(p.to_bytes(wide, "little") for p in sorted(patterns))
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).clone()
    part = data.view(torch.float32 if dtype.is_complex else dtype)
    if dtype.is_floating_point or dtype.is_complex:
        numbers = part.float() if part.dtype.itemsize == 1 else part
        part = part[~numbers.isnan()]
        if part.dtype.itemsize > 1:
            info = torch.finfo(part.dtype)
            more = [info.tiny, -info.tiny, info.max, info.min, info.eps, torch.inf, -torch.inf]
            part = torch.cat([part, torch.tensor(more, dtype=part.dtype)])
    if dtype.is_complex:
        pairs = list(itertools.product(part.tolist(), repeat=2))
        return torch.view_as_complex(torch.tensor(pairs, dtype=part.dtype))
    return part.clone()


@pytest.mark.parametrize("dtype", HELD, ids=str)
def test_odd_shapes_and_odd_bits_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    given = {f"shape {shape}": value(dtype, *shape) for shape in SHAPES}
    square = value(dtype, 6, 8)
    given |= {
        "turned": square.t(),
        "strided": square[::2, 1::3],
        "last": square[-1],
        "offset": square[1:, 2:],
    }
    given["odd"] = odd_bits(dtype)
    if dtype.is_complex:
        given |= {"conjugate": value(dtype, 6, 8).conj(), "conjugate of odd": odd_bits(dtype).conj()}
    if dtype in FLOATS:
        given["negative"] = torch._neg_view(value(dtype, 6, 8))
    model = nn.Module()
    for number, tensor in enumerate(given.values()):
        model.register_buffer(f"b{number}", tensor)
    wanted = {f"b{number}": (t.shape, data_of(t)) for number, t in enumerate(given.values())}

    def check(found: Any) -> None:
        assert {name: (t.shape, data_of(t)) for name, t in found.items()} == wanted

    state = tersor.run(model, tersor.Entropy())
    check(state.state_dict())
    for short in (False, True):
        tersor.save(state, tmp_path / "m.tersor", tiny=short)
        check(tersor.load(tmp_path / "m.tersor").state_dict())
        check(tersor.load(tmp_path / "m.tersor").model(model).state_dict())
        read = reader.read(tmp_path / "m.tersor")
        assert {n: (a.values.shape, a.values.tobytes()) for n, a in read.items()} == wanted
        tersor.unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors")
        check(safetensors.torch.load_file(tmp_path / "u.safetensors"))
    odd = {"odd", "conjugate of odd"} if dtype in FLOATS or dtype.is_complex else set()
    infinite = {f"b{n}" for n, name in enumerate(given) if name in odd}
    torch.save({n: t for n, t in model.state_dict().items() if n not in infinite}, tmp_path / "w.pt")
    tersor.pack(tmp_path / "w.pt", tmp_path / "w.tersor", tersor.Recipe((tersor.Entropy(),)))
    tersor.unpack(tmp_path / "w.tersor", tmp_path / "w.safetensors")
    packed = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert {n: (t.shape, data_of(t)) for n, t in packed.items()} == {
        n: want for n, want in wanted.items() if n not in infinite
    }


# --- runtimes ---

FEW = {torch.complex64, torch.float8_e5m2, torch.float8_e8m0fnu}


@pytest.mark.parametrize(
    "dtype", [d if d in FEW else pytest.param(d, marks=pytest.mark.long) for d in HELD], ids=str
)
def test_export(dtype: torch.dtype, tmp_path: Path) -> None:
    model, task = net(dtype), tiny("mlp").task
    if BY_DTYPE[dtype].exported:
        tersor.run(model, tersor.Export(), task, out=tmp_path)
        assert (tmp_path / "model.onnx").exists()
        return
    with pytest.raises(RefusedError, match=rf"w is {dtype}: give the model x.float\(\)"):
        tersor.run(model, tersor.Export(), task, out=tmp_path)
    assert not list(tmp_path.iterdir())


# --- what people see ---

MINE = """
import torch
from torch import nn
import tersor

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64, generator=random))
        self.eight = nn.Parameter(torch.ones(3, 6).to(torch.float8_e4m3fn))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x @ self.w.real) + x @ self.eight.float().T

def task():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    sets = {word: tersor.TensorBatches(x, x[:, :3].argmax(1), batch=32) for word in ("train", "evaluate")}
    return tersor.Task("thirds", **sets)
"""


def test_reports_and_checks_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)

    def call(line: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tersor", *line.split()])
        assert main() == 0
        return " ".join(capsys.readouterr().out.split())

    output = call("run mine.py:Net --task mine.py:task --out o -q prune keep=0.5 epochs=1 finetune measure")
    report = json.loads(Path("o/report.json").read_text())
    for number, name in enumerate(("prune", "finetune")):
        for site, dtype in (("w", "complex64"), ("eight", "float8_e4m3fn")):
            found = report["steps"][number]["sites"][site]
            assert found["did"] == "skipped", name
            assert found["text"].startswith(f"{dtype} is stored as it is")
    assert report["steps"][2]["sites"].keys() == {"fc.weight"}  # measure changes nothing
    assert output.count("w skipped: complex64 is stored as it is: steps work on float16") == 2
    Path("r.yaml").write_text("tersor: 1\nsteps:\n- prune: {keep: 0.5}\n")
    checked = call("check r.yaml --model mine.py:Net")
    assert "w: complex64 is stored as it is" in checked
    assert "eight: float8_e4m3fn is stored as it is" in checked


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3.5).expand(1),
        torch.tensor(3.5).expand(1, 1),
        torch.from_numpy(np.zeros((0, 3), np.float32)),
        torch.randn(5, 3).t(),
        torch.randn(4).expand(3, 4),
    ],
    ids=["one", "one by one", "none", "turned", "repeated"],
)
def test_bytes_do_not_depend_on_strides(value: torch.Tensor) -> None:
    assert in_bytes(value).numpy().tobytes() == np.array(value.tolist(), np.float32).tobytes()


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_with_a_buffer_without_strides_is_compressed(count: int, tmp_path: Path) -> None:
    net = torch.nn.Linear(4, 4)
    net.register_buffer(
        "fixed", torch.from_numpy(np.zeros((0, 3), np.float32)) if not count else torch.tensor(3.5).expand(1)
    )
    tersor.save(tersor.run(net, tersor.Entropy()), tmp_path / "net.tersor")
    found = tersor.load(tmp_path / "net.tersor").state_dict()["fixed"]
    assert found.shape == net.fixed.shape
    assert torch.equal(found, net.fixed)
