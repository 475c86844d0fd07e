"""Grid order: a recipe that makes the ranges of activations stale is refused before anything runs."""

import pytest
import torch
from torch import nn

import tersor
from tersor.errors import SettingError
from tersor.model.grid_order import refuse_order
from tersor.steps import recipe_from_words

LATE = "finetune epochs=1 quantize activations=8 prune measure"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (LATE, "step 3 prune changes weights after step 2 quantize.*step 4 measure needs the model"),
        ("quantize activations=8 cluster entropy export", "step 2 cluster.*step 4 export needs the model"),
        ("quantize activations=8 prune prune finetune epochs=1", "step 2 prune.*step 4 finetune needs"),
    ],
)
def test_a_step_that_would_run_under_stale_ranges_is_refused(words: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        refuse_order(recipe_from_words(words.split()).steps)


@pytest.mark.parametrize(
    "words",
    [
        "prune quantize activations=8 entropy measure export",
        "quantize activations=8 finetune epochs=1 measure",
        "quantize activations=8 prune quantize activations=8 measure",
        "quantize activations=8 fold measure",
        "quantize activations=8 prune slim quantize activations=8",
        "prune measure",
    ],
)
def test_others_pass(words: str) -> None:
    refuse_order(recipe_from_words(words.split()).steps, measured=True)


def test_without_a_measurement_a_result_may_be_stale() -> None:
    steps = recipe_from_words(["quantize", "activations=8", "prune", "entropy"]).steps
    refuse_order(steps)
    with pytest.raises(SettingError, match="the result is measured at the end"):
        refuse_order(steps, measured=True)


def test_a_run_is_refused_before_it_trains() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(16, 6)
    calls = []

    def train() -> list:
        calls.append(1)
        return [(x, x[:, :3].argmax(1))]

    task = tersor.Task("t", evaluate=[(x, x[:, :3].argmax(1))], train=train)
    with pytest.raises(SettingError, match="put quantize activations=... after it|Put quantize"):
        tersor.run(net, recipe_from_words(LATE.split()), task)
    assert not calls
