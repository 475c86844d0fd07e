"""Kinds of models in the sweep of bench/architectures.py, and each of its checks on a faulty model.

Stand-ins always; one tiny model of each kind of torchvision and transformers, if these are installed.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import stand_ins
import torch
from torch import Tensor, nn

import tersor

Take = Callable[[str], ModuleType]


def vectors(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(2, *shape), torch.randint(stand_ins.CLASSES, (2,)))


def texts() -> dict[str, Tensor]:
    ids = torch.randint(stand_ins.WORDS, (2, 6))
    return {"input_ids": ids, "labels": ids}


def cases(zoo: ModuleType) -> dict[str, Any]:
    """The stand-ins as cases of the sweep."""
    features = {"teacher_weight": 0.0, "features": "backbone.1"}
    pair = {"logits": lambda output: output[0]}
    return {
        "segmenter": zoo.Case("stand-in", stand_ins.Segmenter, lambda: zoo.segment(8)),
        "pair": zoo.Case("stand-in", stand_ins.Pair, lambda: zoo.task_of(vectors(5), **pair)),
        "detector": zoo.Case("stand-in", stand_ins.Detector, lambda: zoo.detect(8), features),
        "turned": zoo.Case("stand-in", stand_ins.Turned, lambda: zoo.task_of(vectors(5))),
        "text": zoo.Case("stand-in", stand_ins.Text, lambda: zoo.task_of(texts)),
        "recurrent": zoo.Case("stand-in", stand_ins.Recurrent, lambda: zoo.task_of(vectors(4, 5))),
    }


@pytest.mark.parametrize("name", ["segmenter", "pair", "detector", "turned", "text", "recurrent"])
def test_a_stand_in_comes_back_as_it_was_compressed(bench: Take, name: str) -> None:
    outcome = bench("architectures").swept(name, cases(bench("zoo"))[name])
    assert outcome.verdict == "right", outcome.said
    assert outcome.done == outcome.weights > 0


# Tiny models of each kind.
def depthwise(zoo: ModuleType) -> Any:
    return zoo.Case("", zoo.torchvision_model("mobilenet_v2", width_mult=0.1, inverted_residual_setting=[
        [1, 8, 1, 1], [2, 8, 2, 2],
    ]), lambda: zoo.classify(32))  # fmt: skip


def backbone() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1))
    net.out_channels = 32  # type: ignore[assignment]
    return net


def segmenter(zoo: ModuleType) -> Any:
    def make() -> nn.Module:
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.segmentation.fcn import FCN, FCNHead

        return FCN(IntermediateLayerGetter(backbone(), {"3": "out"}), FCNHead(32, zoo.CLASSES))

    return zoo.Case("", make, lambda: zoo.segment(32))


def detector(zoo: ModuleType) -> Any:
    def make() -> nn.Module:
        from torchvision.models.detection import FCOS
        from torchvision.models.detection.anchor_utils import AnchorGenerator

        anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
        return FCOS(
            backbone(), zoo.CLASSES, min_size=64, max_size=64, anchor_generator=anchors, score_thresh=0.0,
            detections_per_img=20,
        )  # fmt: skip

    return zoo.Case("", make, lambda: zoo.detect(64), {"teacher_weight": 0.0, "features": "backbone.3"})


@pytest.mark.extra
@pytest.mark.parametrize("make", [depthwise, segmenter, detector])
def test_kinds_of_torchvision_come_back(bench: Take, make: Callable[[ModuleType], Any]) -> None:
    pytest.importorskip("torchvision")
    outcome = bench("architectures").swept("kind", make(bench("zoo")))
    assert outcome.verdict == "right", outcome.said
    assert outcome.done > 0


@pytest.mark.extra
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper"])
def test_kinds_of_transformers_come_back(bench: Take, name: str) -> None:
    pytest.importorskip("transformers")
    outcome = bench("architectures").swept(name, bench("zoo").CASES[name])
    assert outcome.verdict == "right", outcome.said
    assert outcome.done > 0


@pytest.mark.extra
def test_a_model_of_timm_comes_back(bench: Take) -> None:
    pytest.importorskip("timm")
    zoo = bench("zoo")
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    case = zoo.Case("", zoo.timm_model("vit_tiny_patch16_224", **settings), lambda: zoo.classify(32))
    outcome = bench("architectures").swept("vit", case)
    assert outcome.verdict == "right", outcome.said


# The checks, each on a model with a single fault.


class Subject(nn.Module):
    spare: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)
        self.register_buffer("spare", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x))) + self.spare


@dataclasses.dataclass
class Done:
    sound: ModuleType
    was: Any
    result: tersor.State
    asked: Any
    task: tersor.Task

    def faults(self, loaded: nn.Module, **changes: Any) -> list[str]:
        was, result = changes.get("was", self.was), changes.get("result", self.result)
        return list(self.sound.faults(was, result, loaded, self.asked))


@pytest.fixture
def done(bench: Take) -> Done:
    sound, architectures = bench("sound"), bench("architectures")
    torch.manual_seed(0)
    model = Subject().eval()
    task = bench("zoo").task_of(lambda: (torch.randn(2, 6), torch.randint(4, (2,))))
    asked = architectures.ASKED
    was = sound.given(model)
    steps = [
        tersor.Prune(keep=asked.keep, per="tensor"),
        tersor.Quantize(bits=asked.bits),
        tersor.Distill(epochs=1),
    ]
    return Done(sound, was, tersor.run(model, steps, task), asked, task)


def test_a_sound_model_has_no_fault(done: Done) -> None:
    assert done.faults(done.result.model()) == []
    assert done.sound.differing(done.task, done.result.model(), done.result.model()) == ""


def test_one_weight_that_was_not_pruned_is_seen(done: Done) -> None:
    model = done.result.model()
    weight = model.first.weight.data
    row = weight[(weight != 0).sum(1).argmax()]
    place = int((row == 0).nonzero()[0])
    row[place] = row.abs().max()  # on the grid, so that nothing else is wrong
    assert [f.split(": ")[1] for f in done.faults(model)] == ["1 of the pruned weights are not zero"]


def test_one_weight_too_many_is_seen_whichever_it_is(done: Done) -> None:
    """Any of several equal weights may be pruned, but not fewer than required."""
    same, sound = torch.ones(10), done.sound
    assert sound.unpruned(same, torch.tensor([1.0, 0.0] * 5), 0.5) == ""
    assert "6 weights are not zero, and 5" in sound.unpruned(same, torch.tensor([1.0] * 6 + [0.0] * 4), 0.5)


def test_one_weight_beside_its_grid_is_seen(done: Done) -> None:
    model = done.result.model()
    weight = model.second.weight.data
    row, column = (weight != 0).nonzero()[-1].tolist()
    weight[row, column] *= 1 + 0.01
    assert done.faults(model) == ["second.weight: 1 of 4 rows are on no grid of 4 bits"]


def test_grids_of_the_wrong_axis_are_seen(done: Done) -> None:
    codes = torch.randint(-7, 8, (5, 9)).float()
    by_row, by_column = codes * torch.rand(5, 1), codes * torch.rand(1, 9)
    assert bool(done.sound.on_grid(by_row, 4).all())
    assert not bool(done.sound.on_grid(by_column, 4).any())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_are_distinguished_from_other_values(done: Done, bits: int) -> None:
    """Compared with a slow search over all steps that the largest value allows."""
    top, draw = 2 ** (bits - 1) - 1, torch.Generator().manual_seed(bits)
    for size, moved in itertools.product((1, 2, 9, 50), (0.0, 0.003)):
        rows = torch.randint(-top, top + 1, (20, size), generator=draw) * torch.rand(20, 1, generator=draw)
        rows[:, 0] *= 1 + moved
        slow = [any(multiples(row, row.abs().max() / code) for code in range(1, top + 1)) for row in rows]
        assert done.sound.on_grid(rows, bits).tolist() == slow
        assert moved or all(slow)


def multiples(row: Tensor, step: Tensor) -> bool:
    counts = [float(x) / float(step) for x in row] if step > 0 else [0.0]
    return all(abs(count - round(count)) < 1e-4 for count in counts)


@pytest.mark.parametrize("bits", [4])
def test_a_grid_of_more_bits_is_seen(done: Done, bits: int) -> None:
    rows = torch.arange(-15, 16).float()[None] * 0.1
    assert not bool(done.sound.on_grid(rows, bits).any())
    assert bool(done.sound.on_grid(rows, bits + 1).all())


def test_a_change_that_no_step_made_is_found(done: Done) -> None:
    model = done.result.model()
    model.spare[2] += 1
    assert done.faults(model) == ["spare: changed, and no step says so"]
    model.register_buffer("more", torch.zeros(1))
    assert done.faults(model) == ["more: only one of the given and the loaded model has it"]


def test_a_trained_frozen_tensor_is_found(done: Done) -> None:
    was = done.was._replace(frozen=("norm.bias",))
    assert done.faults(done.result.model(), was=was) == ["norm.bias: frozen, and trained all the same"]


def test_another_shape_or_dtype_is_seen(done: Done) -> None:
    model = done.result.model()
    model.second.weight.data = model.second.weight.data.double()
    (fault,) = done.faults(model)
    assert fault.startswith("second.weight: torch.float64 [4, 9], given torch.float32")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_weight_that_a_step_passes_over_in_silence_is_seen(done: Done, step: int) -> None:
    ledger = done.result.ledger
    left = [e for e in ledger.entries if (e.step, e.site) != (step, "second.weight")]
    result = dataclasses.replace(done.result, ledger=dataclasses.replace(ledger, entries=left))
    name = ("prune", "quantize", "distill")[step]
    found = done.faults(done.result.model(), result=result)
    assert f"second.weight: {name} has no note on it" in found


def test_a_note_about_the_whole_model_counts_for_the_weights_that_it_names(done: Done) -> None:
    ledger = done.result.ledger
    left = [e for e in ledger.entries if (e.step, e.site) != (0, "second.weight")]
    for said, count in (("left: first.weight, second.weight; no more", 0), ("left: second.weights", 1)):
        note = dataclasses.replace(ledger.entries[0], site="", how="", kind="left", text=said)
        result = dataclasses.replace(done.result, ledger=dataclasses.replace(ledger, entries=[*left, note]))
        found = done.faults(done.result.model(), result=result)
        assert found == ["second.weight: prune has no note on it"] * count


def test_outputs_that_differ_or_are_constant_are_found(done: Done) -> None:
    differing, model, other = done.sound.differing, done.result.model(), done.result.model()
    other.second.bias.data[0] += 1e-6
    assert differing(done.task, model, other) == "the loaded model answers otherwise"
    for bias, said in ((torch.inf, "not finite"), (0.0, "all one number")):
        for weight in (*model.parameters(), *model.buffers()):
            weight.data.zero_()
        model.second.bias.data[0] = bias
        assert said in differing(done.task, model, model)


def test_a_given_model_that_was_changed_is_seen(done: Done) -> None:
    torch.manual_seed(0)
    model = Subject()
    assert done.sound.untouched(done.was, model) == ""
    model.norm.weight.data[3] = 2
    assert done.sound.untouched(done.was, model) == "norm.weight: the given model was changed"


def test_outputs_in_any_container_are_compared(done: Done) -> None:
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    output = {"a": (one, [two]), "b": stand_ins.Answer(three), "c": "text", "d": None}
    assert [len(t) for t in done.sound.tensors_of(output)] == [1, 2, 3]


def test_a_crash_and_a_refusal_are_told_apart(bench: Take) -> None:
    architectures, zoo = bench("architectures"), bench("zoo")

    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterruptLike

    class KeyboardInterruptLike(ArithmeticError):
        pass

    task = lambda: zoo.task_of(vectors(5))  # noqa: E731
    crashed = architectures.swept("broken", zoo.Case("", lambda: Broken(5, 3), task))
    assert (crashed.verdict, crashed.said[:8]) == ("wrong", "crashed:")
    refused = architectures.swept("narrow", zoo.Case("", lambda: nn.Linear(4, 3), task))
    assert refused.verdict == "refused"
    assert "do not fit" in refused.said

    def absent() -> nn.Module:
        return importlib.import_module("no_such_package").model()

    assert architectures.swept("absent", zoo.Case("", absent, task)).verdict == "missing"


@pytest.mark.wide
def test_a_model_is_swept_in_a_process_of_its_own(bench: Take) -> None:
    outcome = bench("architectures").apart("gru")
    assert (outcome.verdict, outcome.done) == ("right", outcome.weights), outcome.said
    assert outcome.seconds > 0
    assert outcome.megabytes > 50


@pytest.mark.sampled(patience=0.003)
@pytest.mark.parametrize(("seconds", "patience"), [(1, 60), (300, 0.003)])
def test_a_model_that_takes_too_long_is_wrong(bench: Take, seconds: int, patience: float) -> None:
    """By processor time, and by the clock."""
    outcome = bench("architectures").apart("gru", seconds, patience)
    assert (outcome.verdict, outcome.said) == ("wrong", f"not done after {seconds} s")


def test_names_are_models_globs_and_families(bench: Take) -> None:
    architectures, models = bench("architectures"), bench("zoo").CASES
    assert architectures.chosen(["gru", "lstm*"], models) == ["gru", "lstm", "lstm_both_ways"]
    assert set(architectures.chosen(["recurrent"], models)) == {"gru", "lstm", "lstm_both_ways"}
    with pytest.raises(KeyError, match="nothing"):
        architectures.chosen(["nothing"], models)


def test_rows_count_families_that_were_swept_whole(bench: Take) -> None:
    architectures = bench("architectures")
    found = [architectures.Outcome(name, "right", "", weights=2, done=2) for name in ("gru", "lstm")]
    assert list(architectures.rows(found)) == []
    found.append(architectures.Outcome("lstm_both_ways", "wrong", "x", weights=3, done=1))
    right, wrong, done = architectures.rows(found)
    assert (right.subject, right.value, right.unit, right.note) == (
        "recurrent",
        2,
        "of 3",
        "lstm_both_ways wrong",
    )
    assert wrong.value == 1
    assert (done.value, done.unit) == (5, "of 7")
