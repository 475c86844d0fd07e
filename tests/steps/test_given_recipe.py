"""Whatever is given as a recipe, in tersor.run and tersor.pack: steps, a Recipe, a path."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tersor
from tersor.steps.recipe_text import dump, lock

STEPS = (tersor.Prune(keep=0.5, per="tensor"), tersor.Quantize(bits=4), tersor.Entropy())


def forms(path: Path, folder: Path) -> list[Any]:
    """The same steps in each way."""
    recipe = tersor.Recipe(STEPS, seed=3)
    path.write_text(dump(recipe.to_json()))
    return [recipe, list(STEPS), STEPS, path, str(path)]


@pytest.mark.parametrize("way", range(5), ids=["recipe", "list", "tuple", "path", "text"])
def test_run_and_pack_take_the_same(way: int, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5))
    given = forms(tmp_path / "recipe.yaml", tmp_path)[way]
    expected = tersor.run(net, tersor.Recipe(STEPS, seed=3))
    assert tersor.run(net, given, seed=3).ledger.digest == expected.ledger.digest
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    tersor.pack(tmp_path / "w.safetensors", tmp_path / "a.tersor", tersor.Recipe(STEPS, seed=3))
    tersor.pack(tmp_path / "w.safetensors", tmp_path / "b.tersor", given, seed=3)
    assert (tmp_path / "a.tersor").read_bytes() == (tmp_path / "b.tersor").read_bytes()


def test_pack_takes_one_step_or_none(tmp_path: Path) -> None:
    save_file({"w": torch.randn(40, 40)}, tmp_path / "w.safetensors")
    sizes = []
    for recipe in (tersor.Entropy(), [tersor.Entropy()]):
        sizes.append(tersor.pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", recipe).nbytes)
    sizes.append(tersor.pack(tmp_path / "w.safetensors", tmp_path / "m.tersor").nbytes)  # lossless
    assert len(set(sizes)) == 1


def test_a_lock_file_is_compared(tmp_path: Path) -> None:
    net = nn.Linear(30, 20)
    (tmp_path / "lock.yaml").write_text(dump(lock(tersor.run(net, STEPS))))
    assert tersor.run(net, tmp_path / "lock.yaml").digest == tersor.run(net, STEPS).digest
    with pytest.raises(tersor.RefusedError, match="the lock is for base"):
        tersor.run(nn.Linear(30, 20), tmp_path / "lock.yaml")


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (
            "prune keep=0.5",
            tersor.SettingError,
            r"Give steps as objects: \[tersor\.Prune\(\), ",
        ),
        ("quantize", tersor.SettingError, r"\[tersor\.Quantize\(\), tersor\.Entropy\(\)\]"),
        ("", tersor.SettingError, "'' is no file"),
        ("gone.yaml", tersor.StorageError, "gone.yaml: cannot be read: No such file"),
        (Path("gone"), tersor.StorageError, "gone: cannot be read"),
        (7, tersor.SettingError, "step 1 is 7, but it must be a step"),
        ([], tersor.SettingError, "no steps"),
    ],
    ids=repr,
)
def test_what_is_no_recipe(given: Any, error: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        tersor.run(nn.Linear(3, 3), given)
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(error, match=said):
        tersor.pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", given)
    assert not (tmp_path / "m.tersor").exists()
