"""Steps on a part of a detector that cannot be traced: what changes is inside, and the whole model runs."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from detector import Detector, batches, detector, task
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tersor
from tersor.candidates.candidate import candidate
from tersor.candidates.export import export
from tersor.candidates.timed import timed
from tersor.core.proof import proved
from tersor.core.state import start
from tersor.forms import Dense
from tersor.model.outputs import tensors_of
from tersor.record.events import Cut, Edit, Group
from tersor.report.unit_groups import described


def maps(net: Detector) -> list[Tensor]:
    """The backbone's outputs for one batch, through a plain hook on the whole model."""
    found: list[object] = []
    handle = net.backbone.register_forward_hook(lambda *given: found.append(given[-1]))
    with torch.no_grad():
        net.eval()(batches(1, seed=9)[0][0])
    handle.remove()
    return list(tensors_of(found))


def same_outside(small: tersor.State, net: Detector) -> None:
    now, given = small.state_dict(), net.state_dict()
    outside = [name for name in given if not name.startswith("backbone.")]
    assert outside
    assert all(torch.equal(now[name], given[name]) for name in outside)


def macs(net: Detector, size: int = 16) -> float:
    """Of the backbone, counted by hooks on its convolutions."""
    counts: list[float] = []
    convs = [m for m in net.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    handles = [
        m.register_forward_hook(lambda m, _, out: counts.append(m.weight[0].numel() * out.numel()))
        for m in convs
    ]
    with torch.no_grad():
        net([torch.rand(3, size, size)])
    for handle in handles:
        handle.remove()
    return sum(counts)


def test_slim_cuts_inside_of_the_part() -> None:
    net = detector()
    small = tersor.run(net, [tersor.Slim(keep=0.6), tersor.Measure()], task())
    cut = small.model()
    assert isinstance(cut, Detector)
    assert 0.5 < macs(cut) / macs(net) <= 0.6
    same_outside(small, net)
    assert [x.shape for x in maps(cut)] == [x.shape for x in maps(net)]
    assert list(small.ledger.notes("proved"))


def test_slim_without_refitting_is_the_model_with_zeros(tmp_path: Path) -> None:
    """The units of one block's middle are not in a residual stream: zeros there are the cut."""
    net = detector()
    step = tersor.Slim(keep=0.5, of="units", correct=False, where="backbone.blocks.1.one.weight")
    small = tersor.run(net, step, task())
    kept = small.present("backbone.blocks.1.two.weight", 1)
    assert len(kept) == 4
    with torch.no_grad():
        gone = [at for at in range(8) if at not in kept]
        net.backbone.blocks[1].two.weight[:, gone] = 0
    for x, y in zip(maps(small.model()), maps(net), strict=True):
        torch.testing.assert_close(x, y)


def test_shorten_and_fold_work_inside_of_the_part() -> None:
    net = detector()
    short = tersor.run(net, tersor.Shorten(keep=0.7), task()).model()
    assert any(isinstance(block, torch.nn.Identity) for block in short.backbone.blocks)
    assert macs(short) <= 0.7 * macs(net)
    folded = tersor.run(net, tersor.Fold(), task())
    same_outside(folded, net)
    assert isinstance(folded.model().backbone.norm, torch.nn.Identity)
    for x, y in zip(maps(folded.model()), maps(net), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_dead_units_outside_of_the_part_stay() -> None:
    net = detector()
    with torch.no_grad():
        net.head.hidden.weight[:5] = 0  # dead, and outside
        net.backbone.blocks[0].one.weight[:3] = 0
        net.backbone.blocks[0].norm.bias[:3] = 0
        net.backbone.blocks[0].norm.running_mean[:3] = 0
    small = tersor.run(net, tersor.Fold(norms=False), task())
    same_outside(small, net)
    assert small.shape("backbone.blocks.0.one.weight")[0] == 5
    for x, y in zip(maps(small.model()), maps(net), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_factors_become_layers_inside_of_the_part_only() -> None:
    small = tersor.run(detector(), tersor.Factorize(keep=0.5, layers=True), task())
    paths = {change.module for change in small.changes}
    assert paths
    assert all(path.startswith("backbone.") for path in paths)
    skipped = {entry.site: entry.text for entry in small.ledger.notes("skipped")}
    assert "outside of the part" in skipped["head.hidden.weight"]


def test_multiplications_are_those_of_the_part_alone() -> None:
    """What the whole model does to make the part's inputs is not counted."""
    step = tersor.Factorize(keep=0.5, layers=True, of="macs")
    (note,) = tersor.run(detector(), step, task()).ledger.notes("ranks")
    net, images = detector().eval(), task().calibrate[0][0]  # type: ignore[index]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images)
    flops = counter.get_flop_counts()["Detector.backbone"]
    assert note.data["of"] == sum(flops.values()) // 2


@pytest.mark.wide
def test_activations_are_rounded_inside_and_the_whole_model_simulates_them(tmp_path: Path) -> None:
    net, parts = detector(), task()
    steps = [tersor.Quantize(activations=8), tersor.Entropy(), tersor.Measure(), tersor.Export()]
    small = tersor.run(net, steps, parts, out=tmp_path)
    assert small.grids
    assert all(edge.startswith(("backbone.", "backbone/")) for edge in small.grids)
    # The part's input is no argument of the model: the first layer rounds what it reads.
    assert "backbone.stem/conv2d:0<0" in small.grids
    same_outside_dense = small.model().net.head.hidden.weight
    assert len(same_outside_dense.unique()) <= 16 * 255
    # The file computes what the whole model's simulation gives the head.
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    seen: list[tuple] = []
    whole = small.model().eval()
    inner = whole.net.backbone
    handle = inner.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.no_grad():
        whole(batches(1, seed=9)[0][0])
    handle.remove()
    ((x,), out), *_ = seen
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for a, b in zip(got, tensors_of(out), strict=True):
        # one step of a grid of 256 levels, where two sums round differently
        assert abs(torch.from_numpy(a) - b).max() <= (b.max() - b.min()) / 100
    assert "QuantizeLinear" in (tmp_path / "model.onnx").read_bytes().decode("latin1")


def test_export_says_that_the_file_is_the_part(tmp_path: Path) -> None:
    net = detector()
    result = tersor.run(net, tersor.Export(), task(), out=tmp_path)
    (note,) = result.ledger.notes("written")
    assert note.data["part"] == "backbone"
    assert "the part backbone alone, without the rest of the model" in note.text
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["x"]
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        wanted = list(tensors_of(net.backbone(x)))
    for a, b in zip(session.run(None, {"x": x.numpy()}), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-5)


@pytest.mark.wide
def test_several_parts_are_a_file_each(tmp_path: Path) -> None:
    net = detector()
    small = tersor.run(
        net,
        [tersor.Slim(keep=0.6, of="units", per="family"), tersor.Export()],
        task(("backbone", "head")),
        out=tmp_path,
    )
    assert small.shape("head.hidden.weight")[0] < 16
    assert {note.data["path"]: note.data["part"] for note in small.ledger.notes("written")} == {
        "model.backbone.onnx": "backbone", "model.head.onnx": "head",
    }  # fmt: skip
    assert not (tmp_path / "model.onnx").exists()
    assert all((tmp_path / f"model.{name}.onnx").stat().st_size > 1000 for name in ("backbone", "head"))


@pytest.mark.wide
def test_latency_is_that_of_the_part() -> None:
    small = tersor.run(detector(), [tersor.Slim(keep=0.6), tersor.Measure(latency=True)], task())
    (note,) = small.ledger.notes("latency")
    assert note.data["parts"] == ["backbone"]
    assert "of the part backbone" in note.text


@pytest.mark.wide
def test_training_and_scores_are_of_the_whole_model() -> None:
    net, parts = detector(), task()
    step = tersor.Slim(keep=0.6, epochs=2, lr=0.01, rounds=2, penalty=1.0)
    small = tersor.run(net, [step, tersor.Measure()], parts)
    now = small.state_dict()
    assert not torch.equal(now["head.score.weight"], net.head.score.weight)
    (note,) = small.ledger.notes("accuracy")
    assert note.data["after"][0] == pytest.approx(float(parts.scores(small.model()).mean()))


@pytest.mark.sampled
@pytest.mark.parametrize("by", ["curvature", "activation", "l1"])
def test_importance_of_a_part_can_be_any(by: str) -> None:
    small = tersor.run(detector(), tersor.Slim(keep=0.6, by=by, correct=False), task())
    assert macs(small.model()) <= 0.6 * macs(detector())


def test_groups_are_those_of_the_part() -> None:
    facts = described(start(detector(), task()), task())
    assert facts["families"]
    assert all(f["family"].startswith("backbone.") for f in facts["families"])
    with pytest.raises(tersor.RefusedError, match="part='backbone'"):
        described(start(detector(), task(None)), task(None))


class Outside(nn.Module):
    """A part, layers after it, and a way around it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.last, self.norm = nn.Linear(16, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == 0).all()):
            return x[:, :4]
        return self.norm(self.last(self.body(x).relu()))


def outside_task(**more: Any) -> tersor.Task:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.zeros(32, dtype=torch.int64))]
    return tersor.Task("outside", evaluate=batches, calibrate=batches, part="body", **more)


WHY = "it is outside of the part that the task names"
OUTSIDE_STEPS: dict[str, tuple[Any, str]] = {
    "slim": (tersor.Slim(keep=0.5), "skipped"),
    "shorten": (tersor.Shorten(keep=0.9, unmet="nearest"), "skipped"),
    "fold": (tersor.Fold(), "skipped"),
    "fold norms": (tersor.Fold(), "left"),
    "quantize": (tersor.Quantize(activations=8), "integers"),
}


@pytest.mark.parametrize("name", OUTSIDE_STEPS)
def test_weights_outside_of_the_part_say_so(name: str) -> None:
    step, kind = OUTSIDE_STEPS[name]
    result = tersor.run(Outside().eval(), [step], outside_task())
    notes = [e.text for e in result.ledger.notes(kind) if "last" in e.site + e.text or "norm:" in e.text]
    assert notes
    assert all(WHY in text for text in notes)


def test_a_glob_of_nothing_but_weights_outside_says_so() -> None:
    with pytest.raises(tersor.RefusedError, match=f"where names last.weight alone: {WHY}"):
        tersor.run(Outside().eval(), [tersor.Slim(keep=0.5, where="last.*")], outside_task())


def test_an_example_that_does_not_reach_the_part_is_refused() -> None:
    with pytest.raises(tersor.TaskError, match=r"does not call its part body for example=\. Give one"):
        tersor.run(Outside().eval(), [tersor.Slim(keep=0.5)], outside_task(example=torch.zeros(2, 8)))


def test_a_wrong_cut_inside_of_a_part_is_refused() -> None:
    """The whole model's outputs hide it."""

    class Blind(Detector):
        def forward(self, images: list[Tensor]) -> object:
            super().forward(images)
            return torch.zeros(len(images))

    net, parts = Blind().eval(), task()
    state = start(net, parts)
    kept = tuple(range(4))
    wrong = (  # the second layer's inputs lose others than the first one's outputs
        Cut("backbone.blocks.0.one.weight", 0, kept, False),
        *(Cut(f"backbone.blocks.0.norm.{key}", 0, kept, key[0] == "z") for key in
          ("weight", "bias", "running_mean", "running_var")),
        Cut("backbone.blocks.0.two.weight", 1, tuple(range(4, 8)), True),
    )  # fmt: skip
    accepted, note = proved(state, Group("cut", wrong, "masked"), parts, "test")
    assert not accepted
    assert "outputs differ" in note.text
    whole = proved(state, Group("cut", wrong, "masked"), task(None), "test")[1]
    assert "the proof is void" in whole.text


def test_what_changes_outside_of_the_part_is_proved_on_the_whole_model() -> None:
    net, parts = detector(), task()
    state = start(net, parts)
    bias = state.forms["head.score.bias"]
    moved = Group("moved", (Edit("head.score.bias", bias, Dense(bias.decode() + 3), "refine"),), "same")
    accepted, note = proved(state, moved, parts, "test")
    assert not accepted, note.text


def test_a_change_that_only_the_part_survives_is_refused() -> None:
    class Fixed(Detector):
        def forward(self, images: list[Tensor]) -> object:
            assert self.backbone.blocks[0].one.out_channels == 8
            return super().forward(images)

    net = Fixed().eval()
    state = start(net, task())
    kept = tuple(range(4))
    names = ("weight", "bias", "running_mean", "running_var")
    cut = (
        Cut("backbone.blocks.0.one.weight", 0, kept, False),
        *(Cut(f"backbone.blocks.0.norm.{key}", 0, kept, False) for key in names),
        Cut("backbone.blocks.0.two.weight", 1, kept, True),
    )
    accepted, note = proved(state, Group("cut", cut, "masked"), task(), "test")
    assert not accepted
    assert "the part runs, and the whole model does not" in note.text


def test_roles_come_from_the_trace_of_the_part() -> None:
    state = start(detector(), task())
    assert not list(state.ledger.notes("classes"))
    assert list(start(detector(), task(None)).ledger.notes("classes"))


def test_a_file_loads_into_the_users_factory_and_resumes(tmp_path: Path) -> None:
    net, parts = detector(), task()
    steps = [tersor.Slim(keep=0.6), tersor.Quantize(bits=6), tersor.Entropy()]
    small = tersor.run(net, steps, parts, journal=tmp_path / "journal")
    tersor.save(small, tmp_path / "small.tersor")
    again = tersor.load(tmp_path / "small.tersor").model(Detector())
    for x, y in zip(maps(again), maps(small.model()), strict=True):
        assert torch.equal(x, y)
    resumed = tersor.run(net, steps, parts, journal=tmp_path / "journal", resume=True)
    assert resumed.digest == small.digest
    with pytest.raises(tersor.JournalError, match="code"):
        tersor.run(net, steps, task("head"), journal=tmp_path / "journal", resume=True)


def test_the_command_export_writes_one_part_and_refuses_several(tmp_path: Path) -> None:
    of = candidate("base", detector())
    facts = export(of, tmp_path / "part.onnx", task())
    assert facts["part"] == "backbone"
    assert "the part backbone alone" in facts["text"]
    with pytest.raises(tersor.RefusedError, match="names 2 parts, backbone, head, and a file holds one"):
        export(of, tmp_path / "two.onnx", task(("backbone", "head")))
    assert not (tmp_path / "two.onnx").exists()


@pytest.mark.wide
def test_compared_times_are_those_of_the_part() -> None:
    of = candidate("base", detector())
    facts = timed(of, of, task())
    assert facts["parts"] == ["backbone"]
    assert 0 < facts["before"][0] < 1000
