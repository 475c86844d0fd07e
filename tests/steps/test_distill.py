"""Finetune and distill: which sites learn, from which teacher, and which structure is kept."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import Tiny, tiny
from torch import nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError, SiteError
from tersor.model.losses import soften
from tersor.steps import Cluster, Distill, Entropy, Finetune, Prune, Quantize


def moved(result: State, step: int = 0) -> set[str]:
    return {entry.site for entry in result.ledger.edits() if entry.step == step}


def test_all_parameters_and_moving_buffers_learn() -> None:
    t = tiny("conv")
    result = run(t.model, Finetune(epochs=1, lr=0.01), t.task)
    assert moved(result) == set(t.model.state_dict())
    t = tiny("attention")
    result = run(t.model, Finetune(epochs=1, lr=0.01), t.task)
    assert moved(result) == set(t.model.state_dict()) - {"mask", "head.weight"}


def test_where_picks_the_sites_that_learn() -> None:
    t = tiny("mlp")
    for where, want in (
        ("layers.0.weight", {"layers.0.weight"}),
        ("*.bias", {f"layers.{k}.bias" for k in (0, 2, 4, 6)}),
    ):
        result = run(t.model, Finetune(epochs=1, lr=0.01, where=where), t.task)
        assert moved(result) == want
    t = tiny("conv")
    result = run(t.model, Finetune(epochs=1, lr=0.01, where="head.weight"), t.task)
    assert {name for name in moved(result) if result.sites[name].is_parameter} == {"head.weight"}


def test_finetuning_is_plain_training() -> None:
    """One epoch, compared with a plain torch loop on the same batches."""
    t, lr = tiny("mlp"), 0.05
    batches = list(t.task.batches("calibrate"))
    from dataclasses import replace

    result = run(t.model, Finetune(epochs=2, lr=lr, schedule="constant"), replace(t.task, train=batches))
    model = copy.deepcopy(t.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for x, y in batches * 2:
        optimizer.zero_grad()
        t.task.loss(model(x), y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_structure_is_kept() -> None:
    t = tiny("conv")
    steps = [Prune(keep=0.4), Cluster(entries=4), Entropy(coder="huffman")]
    before = run(t.model, steps, t.task)
    for step in (Finetune(epochs=2, lr=0.01), Distill(epochs=2, lr=0.01)):
        after = run(before, step, t.task)
        for name in ("stem.weight", "block.weight", "head.weight"):
            assert len(after.state_dict()[name].unique()) <= 5
            assert torch.equal(after.state_dict()[name] == 0, before.state_dict()[name] == 0)


def test_a_buffer_that_training_leaves_keeps_its_code() -> None:
    t = tiny("attention")
    coded = run(t.model, Entropy(coder="huffman"), t.task)
    tuned = run(coded, Finetune(epochs=1), t.task)
    assert tuned.forms["mask"] is coded.forms["mask"]


# --- distill ---


def distance(t: Tiny, model: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(soften(model(x), teacher(x), 4.0)) for x, _ in t.task.batches("calibrate"))


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_the_student_comes_nearer_to_its_teacher(name: str) -> None:
    t = tiny(name)
    cut = run(t.model, Prune(keep=0.3), t.task)
    whole = run(t.model, [Prune(keep=0.3), Distill(epochs=15, teacher_weight=1.0, lr=0.01)], t.task)
    assert distance(t, whole.model(), t.model) < 0.6 * distance(t, cut.model(), t.model)


def test_teacher_weight_1_needs_no_labels() -> None:
    """Only soft targets are used: other labels give the same student."""
    from dataclasses import replace

    t = tiny("mlp")
    batches = list(t.task.batches("calibrate"))
    found = [
        run(
            t.model,
            [Quantize(bits=3), Distill(epochs=1, teacher_weight=1.0)],
            replace(t.task, train=[(x, y + k) for x, y in batches]),
        )
        for k in (0, -5)
    ]
    assert found[0].digest == found[1].digest


def test_the_teacher_is_the_model_as_it_was_given() -> None:
    t = tiny("mlp")
    steps = [Prune(keep=0.3), Distill(epochs=2, lr=0.01)]
    given = run(t.model, steps, t.task)
    named = run(t.model, [steps[0], Distill(epochs=2, lr=0.01, teacher=tiny("mlp").model)], t.task)
    assert given.digest == named.digest
    other = run(t.model, [steps[0], Distill(epochs=2, lr=0.01, teacher=tiny("mlp", seed=5).model)], t.task)
    assert other.digest != given.digest


def test_a_teacher_of_another_class() -> None:
    t = tiny("mlp")
    wide = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3))
    result = run(t.model, Distill(epochs=1, lr=0.01, teacher=wide), t.task)
    assert "layers.0.weight" in moved(result)


def test_a_module_as_teacher_is_left_alone_and_named_in_the_recipe(tmp_path: Path) -> None:
    t, teacher = tiny("conv"), tiny("conv", seed=4).model
    teacher.train()
    teacher.drop.eval()
    modes = [m.training for m in teacher.modules()]
    before = copy.deepcopy(teacher.state_dict())
    step = Distill(epochs=1, teacher=teacher, features="block", channels_last=True)
    result = run(t.model, step, t.task, journal=tmp_path)
    assert [m.training for m in teacher.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.is_contiguous() for p in teacher.parameters())
    assert not any(m._forward_hooks for m in teacher.modules())
    teacher_text = result.ledger.recipe["steps"][0]["distill"]["teacher"]
    assert teacher_text.startswith("Conv ")
    assert len(result.ledger.digest) == 16
    again = run(t.model, step, t.task, journal=tmp_path, resume=True)
    assert again.ledger.digest == result.ledger.digest


def test_a_teacher_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(3)\n    return torch.nn.Linear(5, 3)\n"
    )
    t = tiny("mlp")
    result = run(t.model, Distill(epochs=1, teacher=f"{tmp_path / 'mine.py'}:net"), t.task)
    assert "layers.0.weight" in moved(result)
    with pytest.raises(SettingError, match=r"nett"):
        run(t.model, Distill(epochs=1, teacher=f"{tmp_path / 'mine.py'}:nett"), t.task)


def test_a_teachers_weights_come_from_a_file(tmp_path: Path) -> None:
    """The file's weights teach, not those of the factory; the same as the module itself does."""
    (tmp_path / "mine.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(5, 3)\n")
    t, teacher = tiny("mlp"), nn.Linear(5, 3)
    name, file = f"{tmp_path / 'mine.py'}:net", tmp_path / "t.safetensors"
    save_file(teacher.state_dict(), file)
    named = run(t.model, Distill(teacher=name, teacher_file=str(file)), t.task)
    given = run(t.model, Distill(teacher=teacher), t.task)
    assert all(torch.equal(a, given.state_dict()[key]) for key, a in named.state_dict().items())
    save_file({"weight": torch.zeros(3, 5)}, tmp_path / "part.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    for other, error, message in (
        ("none.safetensors", SettingError, "cannot be read"),
        ("t.pt", SettingError, r"is no \.safetensors file"),
        ("part.safetensors", RefusedError, "does not fit: .*bias"),
        ("damaged.safetensors", RefusedError, "does not fit"),
    ):
        with pytest.raises(error, match=message):
            run(t.model, Distill(teacher=name, teacher_file=str(tmp_path / other)), t.task)
    with pytest.raises(SettingError, match="has no effect if teacher=''"):
        Distill(teacher_file=str(file))


def test_features_are_checked_before_anything_trains() -> None:
    t = tiny("conv")
    with pytest.raises(
        SettingError, match=r"features: the model has no layer 'blocks'; did you mean 'block'\?"
    ):
        run(t.model, Distill(features="blocks"), t.task)
    with pytest.raises(SettingError, match="features: the teacher has no layer 'block'"):
        run(t.model, Distill(features="block", teacher=nn.Conv2d(1, 1, 1)), t.task)


@pytest.mark.parametrize("features", ["block=", "=block", "stem, block="])
def test_half_a_pair_of_layers_is_refused(features: str) -> None:
    """An empty name would mean the whole model."""
    with pytest.raises(SettingError, match="distill: features=.*, but it is names of layers"):
        Distill(features=features)


def test_a_layer_under_two_names_is_known_by_both() -> None:
    t, teacher = tiny("conv"), tiny("conv", seed=3).model
    teacher.same = teacher.block
    runs = [run(t.model, Distill(features=word, teacher=teacher), t.task) for word in ("block", "block=same")]
    assert runs[0].digest == runs[1].digest


def test_features_alone() -> None:
    t = tiny("conv")
    result = run(
        t.model, [Quantize(bits=3), Distill(teacher_weight=0.0, features="block, norm1", lr=0.01)], t.task
    )
    assert "stem.weight" in moved(result, 1)


BAD: list[tuple[type, dict[str, Any], str]] = [
    (Finetune, {"epochs": 0}, "finetune: epochs=0, but it is a number of passes: above 0"),
    (Distill, {"epochs": 0}, "distill: epochs=0"),
    (Distill, {"teacher_weight": 0}, "teacher_weight=0 without features leaves the teacher out"),
    (Distill, {"teacher_weight": 2}, "distill: teacher_weight=2"),
    (Distill, {"teacher": 3}, "distill: teacher=3, but it is '' (the given model)"),
    (Distill, {"feature_weight": -1}, "feature_weight=-1"),
    (Distill, {"feature_weight": math.inf}, "feature_weight=inf"),
    *((Distill, {key: 1e300}, f"{key}=1e+300") for key in ("epochs", "lr", "temperature", "weight_decay")),
    (Finetune, {"lr_of": "*=1e300"}, "with factors of lr above 0, up to 1e6"),
]


@pytest.mark.parametrize(("kind", "settings", "says"), BAD, ids=str)
def test_bad_settings(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        kind(**settings)
    assert says in str(caught.value)


def test_where_that_matches_nothing() -> None:
    t = tiny("mlp")
    with pytest.raises(SiteError, match="did you mean"):
        run(t.model, Finetune(where="layer.0.weight"), t.task)
