"""tersor export, eval and compare: numbers counted by hand, and bad input."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from command_line import MINE, Command
from present import EACH, present
from torch import Tensor, nn

import tersor as package
from tersor.candidates import timed
from tersor.candidates.candidate import candidate, pair
from tersor.candidates.compare import compare
from tersor.errors import SettingError
from tersor.maths.statistics import mcnemar, wilson
from tersor.measure.latency import Timing
from tersor.report.comparison import evaluated_lines
from tersor.resolve import resolve_model
from tersor.runtimes import onnxruntime as writer

OF, WITH = "--task mine.py:task -q --json", "--model mine.py:net"
MORE = """
def narrow():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

def numbers():
    x, _ = data(20)
    return tersor.Task("numbers", evaluate=[(x, x[:, :3])], metric=lambda o, t: -((o - t) ** 2).mean(1))

def lines():
    return tersor.Task("lines", evaluate=[(data(20)[0], data(20)[1].float())])

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.kind, self.head = nn.Embedding(30, 8), nn.Embedding(2, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head((self.table(ids) + self.kind(ids % 2)).mean(1))

def words():
    torch.manual_seed(0)
    return Words()

def nine():
    return tersor.Task("nine", evaluate=[(torch.randn(4, 9), torch.zeros(4, dtype=torch.int64))])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.tersor, two bits a weight; its weights as a checkpoint and in ONNX files."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.py").write_text(MINE + MORE)
    state = package.run(resolve_model(f"{folder}/mine.py:net"), [package.Quantize(bits=2), package.Entropy()])
    package.save(state, folder / "a.tersor")
    safetensors.torch.save_file(state.state_dict(), folder / "a.safetensors")
    writer.write(state.model(), (torch.zeros(2, 6),), folder / "a.onnx")
    writer.write(state.model(), (torch.zeros(2, 6),), folder / "fixed.onnx", dynamic_batch=False)
    return folder


@pytest.fixture
def files(tersor: Command, made: Path) -> Command:
    shutil.copytree(made, ".", dirs_exist_ok=True)
    return tersor


def net(weights: str | None = None) -> nn.Module:
    """The network of mine.py, by hand: the weights are read by safetensors alone."""
    model = resolve_model("mine.py:net").model()
    if weights is not None:
        model.load_state_dict(safetensors.torch.load_file(weights))
    return model


def data() -> tuple[Tensor, Tensor]:
    """The evaluation set of mine.py."""
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(80))
    return x, x[:, :3].argmax(1)


def choices(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(data()[0]).argmax(1)


@pytest.mark.parametrize("name", ["a.tersor", "a.safetensors", "a.onnx", "base"])
def test_eval_counts_what_is_right(files: Command, name: str) -> None:
    done = files(f"eval {name} {OF} {'' if name.endswith('onnx') else WITH}")
    assert done.code == 0, done.err
    facts = done.json
    hits = int((choices(net(None if name == "base" else "a.safetensors")) == data()[1]).sum())
    assert 0 < hits < 80
    assert facts["value"] == pytest.approx([hits / 80, *wilson(hits, 80, z=1.959963984540054)])
    assert facts["n"] == 80
    assert facts["file"]["name"] == name
    if name == "base":
        safetensors.torch.save_file(net().state_dict(), "base.safetensors")
    assert facts["file"]["nbytes"] == os.stat("base.safetensors" if name == "base" else name).st_size
    assert facts["seconds"] > 0
    assert done.err == ""


def test_eval_for_people(files: Command) -> None:
    done = files("eval a.onnx --task mine.py:task")
    hits = int((choices(net("a.safetensors")) == data()[1]).sum())
    assert f"accuracy {100 * hits / 80:.2f} % (95 %: " in done.out
    assert f"a.onnx: {os.stat('a.onnx').st_size:,} bytes" in done.out
    assert done.err == "[1/1] score a.onnx\n"
    lower = {"file": {"name": "a", "kind": "tersor", "nbytes": 1}, "metric": "perplexity", "unit": "",
             "better": "lower", "value": [4.0, None, None], "n": 1, "seconds": 1.0, "task": "t"}  # fmt: skip
    assert "perplexity 4.0000 (95 %: unknown), lower is better, n = 1" in [*evaluated_lines(lower)][1]


@pytest.mark.parametrize("b", ["a.tersor", "a.onnx", "a.safetensors"])
def test_compare_pairs_samples(files: Command, b: str) -> None:
    facts = files(f"compare base {b} {OF} {WITH}").json
    before, after, y = choices(net()), choices(net("a.safetensors")), data()[1]
    was, now = before == y, after == y
    assert facts["decisions"] == {"same": int((before == after).sum()), "of": 80}
    assert 0 < facts["decisions"]["same"] < 80
    found = facts["accuracy"]
    assert found["before"][0] == pytest.approx(float(was.float().mean()))
    assert found["after"][0] == pytest.approx(float(now.float().mean()))
    assert found["drop"][0] == pytest.approx(100 * float((was.float() - now.float()).mean()), abs=1e-6)
    assert found["p"] == pytest.approx(mcnemar(was.tolist(), now.tolist()))
    assert found["drop"][1] <= found["drop"][0] <= found["drop"][2]
    assert facts["b"]["nbytes"] == os.stat(b).st_size
    assert "latency" not in facts


def test_compare_for_people(files: Command) -> None:
    done = files(f"compare base a.tersor --task mine.py:task {WITH}")
    same = int((choices(net()) == choices(net("a.safetensors"))).sum())
    assert f"{same} of 80 are equal" in done.out
    assert f"{os.stat('a.tersor').st_size:,}" in done.out
    assert "n = 80" in done.out
    assert done.err.splitlines() == ["[1/2] score base", "[2/2] score a.tersor"]
    swapped = files(f"compare a.tersor base --task mine.py:task {WITH}")
    assert " x larger" in swapped.out
    same = files("compare a.onnx a.onnx --task mine.py:task")
    assert "80 of 80 are equal" in same.out
    assert "drop 0.00 points" in same.out


def test_two_classes_of_models(files: Command) -> None:
    safetensors.torch.save_file(resolve_model("mine.py:narrow").model().state_dict(), "n.safetensors")
    done = files(f"compare a.tersor n.safetensors {OF} {WITH} --model-b mine.py:narrow")
    assert done.code == 0, done.err
    assert done.json["b"]["nbytes"] == os.stat("n.safetensors").st_size
    refused = files(f"compare a.tersor n.safetensors {OF} {WITH}")
    assert refused.code == 1
    assert "n.safetensors: 0.weight has shape [5, 6], but the model's has [48, 6]" in refused.err


@pytest.mark.wide
def test_latency_of_two_files(files: Command) -> None:
    done = files(f"compare base a.onnx {OF} {WITH} --latency --batch 4 --threads 2")
    assert done.code == 0, done.err
    found = done.json["latency"]
    assert (found["runtime"], found["batch"], found["threads"]) == ("onnxruntime", 4, 2)
    for word in ("before", "after", "ratio", "again"):
        middle, low, high = found[word]
        assert 0 < low <= middle <= high
    assert found["noisy"] == (not found["again"][1] <= 1 <= found["again"][2])
    assert list(done.json["accuracy"]) == ["before", "after", "drop", "p", "n"]


class Clock:
    """Stands for `interleave`: each session takes the given ms in every round."""

    def __init__(self, *ms: float):
        self.ms, self.names = ms, [""][:0]

    def __call__(self, runs: Any, watch: Any = None, **more: Any) -> dict[str, Timing]:
        self.names = list(runs)
        self.outputs = [run() for run in runs.values()]
        jitter = [1 + 0.001 * (i % 3 - 1) for i in range(40)]
        return {
            name: Timing(ms, ms, ms, tuple(ms * j for j in (jitter if name == "a" else [1.0] * 40)), 1)
            for name, ms in zip(runs, self.ms, strict=True)
        }


@pytest.mark.sampled(noisy=True)
@pytest.mark.parametrize(("again", "noisy"), [(1.0, False), (1.02, True)])
def test_the_ratio_and_a_noisy_machine(
    files: Command, monkeypatch: pytest.MonkeyPatch, again: float, noisy: bool
) -> None:
    clock = Clock(1.0, again, 0.5)
    monkeypatch.setattr(timed, "interleave", clock)
    facts = files(f"compare base a.onnx {OF} {WITH} --latency --batch 3").json
    assert facts["latency"]["ratio"][0] == pytest.approx(2)
    assert facts["latency"]["again"][0] == pytest.approx(1 / again)
    assert facts["latency"]["noisy"] is noisy
    assert clock.names == ["a", "a again", "b"]
    a, twin, b = (output[0] for output in clock.outputs)
    assert a.shape == b.shape == (3, 3)  # the batch
    assert np.array_equal(a, twin)
    calibrated = torch.randn(32, 6, generator=torch.Generator().manual_seed(32))[:3]
    assert np.allclose(a, net()(calibrated).detach(), atol=1e-5)  # A is the base, not the file
    assert np.allclose(b, net("a.safetensors")(calibrated).detach(), atol=1e-5)
    done = files(f"compare base a.onnx --task mine.py:task -q {WITH} --latency")
    assert ("too noisy for differences" in done.out) == noisy
    assert ("not known: too noisy" in done.out) == noisy
    assert ("faster" in done.out) != noisy
    assert "2.00 x as fast" in done.out


@pytest.mark.sampled(example="--shape 1x6")
@pytest.mark.parametrize("to", EACH)
@pytest.mark.parametrize("example", ["--task mine.py:task", "--shape 1x6", "--shape 5x6 --no-dynamic-batch"])
def test_export_writes_what_runs(files: Command, to: str, example: str) -> None:
    present(to)
    done = files(f"export a.tersor {WITH} {example} --to {to} --out made.onnx -q --json")
    assert done.code == 0, done.err
    assert done.json["to"] == {
        "name": "made.onnx", "runtime": to, "nbytes": os.stat("made.onnx").st_size
    }  # fmt: skip
    assert done.json["max_abs"] < 1e-4
    assert done.json["from"]["nbytes"] == os.stat("a.tersor").st_size
    session = onnxruntime.InferenceSession("made.onnx", providers=["CPUExecutionProvider"])
    x = data()[0][: 5 if "no-dynamic" in example else 80]
    given = session.get_inputs()[0]
    assert (given.shape[0] == 5) == ("no-dynamic" in example)
    (found,) = session.run(None, {given.name: x.numpy()})
    assert np.allclose(found, net("a.safetensors")(x).detach(), atol=1e-5)


def test_token_ids_are_an_input_of_whole_numbers(files: Command) -> None:
    """They are rows of the largest table that the model runs with."""
    done = files("export base --model mine.py:words --shape int64:1x16 -o w.onnx -q --json")
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession("w.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.type == "tensor(int64)"
    ids = torch.randint(30, (5, 16))
    (found,) = session.run(None, {given.name: ids.numpy()})
    assert np.allclose(found, resolve_model("mine.py:words").given(ids).detach(), atol=1e-5)


@pytest.mark.parametrize("runtime", EACH)
def test_a_file_with_a_fixed_batch_is_scored_in_parts(files: Command, runtime: str) -> None:
    """80 samples in batches of 32, 32 and 16, to a file that takes 2; and in one of 7 that leaves a rest."""
    present(runtime)
    state = package.run(resolve_model("mine.py:net"), [package.Quantize(bits=2)])
    writer.write(state.model(), (torch.zeros(7, 6),), Path("seven.onnx"), dynamic_batch=False)
    whole = files(f"eval a.onnx {OF} --runtime {runtime}").json
    for name in ("fixed.onnx", "seven.onnx"):
        found = files(f"eval {name} {OF} --runtime {runtime}").json
        assert found["n"] == 80
        assert found["value"] == whole["value"]


def test_parts_are_as_the_whole_and_outputs_without_samples_are_refused(files: Command) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    x = data()[0]
    module = candidate("fixed.onnx").module
    assert torch.allclose(module(x[:5]), net("a.safetensors")(x[:5]), atol=1e-5)
    assert module(x[:1]).shape == (1, 3)
    writer.write(Mean(), (torch.zeros(2, 6),), Path("mean.onnx"), dynamic_batch=False)
    with pytest.raises(package.TaskError, match="takes batches of 2 alone, and its output 'mean'.*cannot be"):
        candidate("mean.onnx").module(x[:4])


def test_export_names_the_file_itself(files: Command) -> None:
    Path("a.onnx").unlink()
    done = files(f"export a.tersor {WITH} --shape 2x6")
    assert f"a.onnx, for onnxruntime: {os.stat('a.onnx').st_size} bytes, differs from PyTorch" in done.out
    assert done.err == "[1/1] export\n"
    assert files(f"export base {WITH} --shape 2x6 -q").code == 0
    assert Path("model.onnx").exists()


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("eval a.tersor --task mine.py:task", 2, "holds weights, not code. Give the code too: --model"),
        ("eval base --task mine.py:task", 2, "base is the model itself. Give its code too: --model"),
        ("eval a.onnx --task mine.py:task --model mine.py:net", 2, "needs no code; leave out --model"),
        ("eval a.onnx --task mine.py:task --key k", 2, "--key k is for a checkpoint"),
        ("eval a.tersor --model mine.py:net", 2, "Missing option '--task'"),
        ("eval a.tersor --model mine.py:nut --task mine.py:task", 2, "did you mean 'net'?"),
        ("eval a.tersor --model mine.py:narrow --task mine.py:task", 2, "0.weight: the model has shape [5"),
        ("eval none.tersor --model mine.py:net --task mine.py:task", 1, "none.tersor: no such file"),
        ("eval mine.py --model mine.py:net --task mine.py:task", 1, "mine.py: it is not a .tersor"),
        ("eval a.onnx --task mine.py:task --runtime onnxrunime", 2, "did you mean 'onnxruntime'?"),
        ("eval broken.onnx --task mine.py:task", 1, "broken.onnx: ONNX Runtime cannot load it"),
        ("eval broken.tersor --model mine.py:net --task mine.py:task", 1, "broken.tersor"),
        ("eval a.onnx --task mine.py:nine", 1, "float32 [4, 9]} do not run"),
        ("eval a.onnx --task mine.py:lines", 1, "task 'lines'"),
        ("eval two.onnx --task mine.py:task", 1, "ambiguous which tensor to compare"),
        ("compare a.tersor a.onnx --task mine.py:task", 2, "Give the code too: --model file.py:factory"),
        ("compare a.onnx a.onnx --task mine.py:task --model mine.py:net", 2, "leave out --model"),
        ("compare a.onnx a.onnx --task mine.py:task --model-b mine.py:net", 2, "leave out --model-b"),
        ("compare base a.onnx --task mine.py:task --model mine.py:net --batch 4", 2, "give --latency too"),
        ("compare a.onnx a.onnx --task mine.py:task --latency --batch 0", 2, "batch=0, but it is a count"),
        ("export base --model mine.py:words --shape int8:1x16", 2, "did you mean 'int64'"),
        ("export base --model mine.py:words --shape 1x16", 1, "token ids are int64:1x128"),
        ("export a.tersor --model mine.py:net", 2, "an example input is needed. Give: --task TASK, or"),
        ("export a.tersor --shape 1x6", 2, "Give the code too: --model"),
        ("export a.tersor --model mine.py:net --shape 1x7", 1, "inputs of --shape 1x7 (float32) do not fit"),
        ("export a.tersor --model mine.py:net --shape 1x6 --shape 1x6", 1, "--shape 1x6 1x6 (float32)"),
        ("export a.tersor --model mine.py:net --shape 1xsix", 2, "sizes of one input joined by x"),
        ("export a.tersor --model mine.py:net --shape 0x6", 2, "sizes of one input joined by x"),
        ("export a.tersor --model mine.py:net --shape 1x6 --task mine.py:task", 2, "both --task and --shape"),
        ("export a.tersor --model mine.py:net --shape 1x6 --to onnx", 2, "did you mean 'onnxruntime'?"),
        ("export a.tersor --model mine.py:net --shape 1x6 -o m.bin", 2, "name it m.onnx"),
        ("export a.tersor --model mine.py:net --shape 1x6 -o a.tersor", 2, "is also the input a.tersor"),
        ("export a.onnx --shape 1x6", 1, "is a file for onnxruntime already"),
    ],
)  # fmt: skip
def test_bad_input(files: Command, line: str, code: int, says: str) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :3], x[:, 3:] * 2

    Path("broken.onnx").write_bytes(Path("a.onnx").read_bytes()[:500])
    Path("broken.tersor").write_bytes(Path("a.tersor").read_bytes()[:-9])
    if "two.onnx" in line:
        writer.write(Two(), (torch.zeros(2, 6),), "two.onnx")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    done = files(f"{line} --json -q")
    assert (done.code, says in done.err) == (code, True), done.err
    assert json.loads(done.out)["error"] in done.err
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_a_fixed_batch_is_timed_at_its_size(files: Command) -> None:
    task = package.Task("one", evaluate=[(data()[0][:2], data()[1][:2])])
    a, b = pair("fixed.onnx", "a.onnx")
    assert compare(a, b, task, latency=True, batch=2)["latency"]["batch"] == 2
    with pytest.raises(package.RefusedError, match=r"fixed.onnx: .* give the one that fixed.onnx takes"):
        compare(a, b, task, latency=True, batch=3)


def test_outputs_without_decisions(files: Command) -> None:
    done = files(f"compare base a.onnx --task mine.py:numbers {WITH} --json -q")
    assert done.json["decisions"].keys() == {"why"}
    assert "decisions are not compared" in files(f"compare base a.onnx --task mine.py:numbers -q {WITH}").out
    with torch.no_grad():
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(20))
        found = [
            -((model(x) - x[:, :3]) ** 2).mean(1).mean().item() for model in (net(), net("a.safetensors"))
        ]
    accuracy = done.json["accuracy"]
    assert [accuracy["before"][0], accuracy["after"][0]] == pytest.approx(found, rel=1e-5)


def test_a_checkpoint_does_not_change_the_module(files: Command) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    a, b = pair("base", "a.safetensors", model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert torch.equal(choices(a.module), choices(model))
    assert torch.equal(choices(b.module), choices(net("a.safetensors")))


def test_one_network_of_several_in_a_checkpoint(files: Command) -> None:
    weights = safetensors.torch.load_file("a.safetensors")
    torch.save({"ema": weights, "net": {key: value * 0 for key, value in weights.items()}}, "two.pt")
    facts = files(f"compare a.tersor two.pt {OF} {WITH} --key ema").json
    assert facts["decisions"] == {"same": 80, "of": 80}
    nbytes = os.stat("a.safetensors").st_size  # of the one network
    assert facts["b"] == {"name": "two.pt", "kind": "checkpoint", "nbytes": nbytes, "alone": True}
    with pytest.raises(SettingError, match="--key ema is for a checkpoint"):
        pair("a.onnx", "a.onnx", key="ema")
