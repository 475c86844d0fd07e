"""The zoo's recipes: each architecture has one that trains it and one that compresses it."""

from pathlib import Path

import pytest

from tersor.errors import SettingError
from tersor.resolve import resolve_recipe
from tersor.zoo.architectures import RECIPES, ZOO, zoo_recipe


@pytest.mark.parametrize("name", ZOO)
def test_each_architecture_has_its_recipes(name: str) -> None:
    train, small = (resolve_recipe(Path(f"zoo:{name}{end}"), None) for end in ("", ":small"))
    assert [step.name for step in train.steps] == ["finetune"]
    assert [step.name for step in small.steps][-2:] == ["entropy", "export"]


def test_no_recipe_is_left_over_and_wrong_words_are_named() -> None:
    used = {zoo_recipe(f"zoo:{name}{end}") for name in ZOO for end in ("", ":small")}
    assert used == set(RECIPES.glob("*.yaml"))
    with pytest.raises(SettingError, match="zoo:yolo_lite:small compresses it"):
        resolve_recipe(Path("zoo:yolo_lite:smal"), None)
    with pytest.raises(SettingError, match="did you mean 'yolo_lite'"):
        resolve_recipe(Path("zoo:yolo_lit"), None)
    assert resolve_recipe(Path("zoo:resnet18"), None, seed=5).seed == 5
