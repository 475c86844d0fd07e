"""Groups: learning rates by glob, and gradient clipping, against plain PyTorch."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import resumed
from tiny import tiny
from torch import nn

from tersor import STEPS, Finetune, Prune, SettingError, SiteError, run
from tersor.core.recipe import Recipe
from tersor.settings import settings_of
from tersor.steps.recipe_text import dump, from_words, from_yaml

SPELLINGS: list[Any] = [
    "layers.0.*=10,*.bias=0.5", " layers.0.* = 10 , *.bias=.5", {"layers.0.*": 10, "*.bias": 0.5},
    [("layers.0.*", 10), ("*.bias", 0.5)], ("layers.0.*=10", "*.bias=0.5"),
    [["layers.0.*", "10"], ["*.bias", 0.5]],
]  # fmt: skip
ONE = "layers.0.*=10.0,*.bias=0.5"


@pytest.mark.parametrize("given", SPELLINGS, ids=str)
def test_every_spelling_is_one_setting(given: Any) -> None:
    step = Finetune(lr_of=given)
    assert step.lr_of == ONE
    recipe = Recipe((step,))
    assert from_yaml(dump(recipe.to_json()), STEPS) == recipe
    assert from_words(["finetune", f"lr_of={ONE}"], STEPS) == recipe
    assert recipe.digest == Recipe((Finetune(lr_of=ONE),)).digest
    words = ["finetune", *(f"{k}={'' if v is None else v}" for k, v in settings_of(step).items())]
    assert from_words(words, STEPS) == recipe


def test_yaml_takes_a_mapping() -> None:
    text = "steps:\n  - finetune:\n      lr_of: {'layers.0.*': 10, '*.bias': 0.5}\n"
    assert from_yaml(text, STEPS).steps[0] == Finetune(lr_of=ONE)


BAD = ["head", "head.*=x", "=3", "head.*=0", "head.*=-1", "head.*=inf", {"head.*": None}, {3: 1}, 7,
       [("a", 1, 2)], {"a,b": 1}]  # fmt: skip


@pytest.mark.parametrize("given", BAD, ids=str)
def test_a_wrong_setting_is_refused(given: Any) -> None:
    with pytest.raises(
        SettingError, match="finetune: lr_of=.*, but it must be globs of weights with factors"
    ):
        Finetune(lr_of=given)


def test_a_glob_that_matches_no_trained_weight_is_refused_with_near_misses() -> None:
    t = tiny("mlp")
    with pytest.raises(
        SiteError, match=r"'layer\.0\.weight' matches no .*; did you mean 'layers\.0\.weight'"
    ):
        run(t.model, Finetune(lr_of={"layer.0.weight": 2}), t.task)
    t.model.layers[0].weight.requires_grad = False
    for step in (Finetune(lr_of="layers.0.weight=2"), Finetune(lr_of="layers.0.weight=2", where="*.bias")):
        with pytest.raises(SiteError, match=r"lr_of: 'layers\.0\.weight' matches no weight that learns"):
            run(t.model, step, t.task)


@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_loop_equals_plain_pytorch_with_groups_and_clipping(clip: float | None, optimizer: str) -> None:
    t, lr, decay = tiny("mlp"), 0.05, 0.3
    batches = list(t.task.batches("calibrate"))
    step = Finetune(
        epochs=3,
        lr=lr,
        schedule="constant",
        max_grad_norm=clip,
        lr_of=ONE,
        weight_decay=decay,
        optimizer=optimizer,
    )
    result = run(t.model, step, replace(t.task, train=batches))
    model = copy.deepcopy(t.model).train()
    factors = {"layers.0.weight": 10, "layers.0.bias": 10, "layers.2.bias": 0.5, "layers.4.bias": 0.5,
               "layers.6.bias": 0.5}  # fmt: skip
    groups = [
        {"params": [p], "lr": lr * factors.get(name, 1), "weight_decay": decay if p.ndim > 1 else 0.0}
        for name, p in model.named_parameters()
    ]
    kind: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    plain = kind(groups, lr=lr, **({} if optimizer == "adamw" else {"momentum": 0.9, "nesterov": True}))
    for x, y in batches * 3:
        plain.zero_grad()
        t.task.loss(model(x), y).backward()
        if clip is not None:
            assert float(nn.utils.clip_grad_norm_(model.parameters(), clip)) > clip
        plain.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_clipping_norm_that_is_not_positive_is_refused() -> None:
    for clip in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SettingError, match="finetune: max_grad_norm=.*, but it is a norm: above 0"):
            Finetune(max_grad_norm=clip)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_training_resumes_to_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    t = tiny("conv")
    step = Prune(
        keep=0.4,
        epochs=3,
        ramp=0.8,
        lr=0.02,
        max_grad_norm=0.1,
        lr_of="stem.*=3,norm*=0.1",
        optimizer=optimizer,
    )
    whole = run(t.model, step, t.task)
    assert resumed(t.model, step, t.task, tmp_path).ledger.digest == whole.ledger.digest
