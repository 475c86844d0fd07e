"""Recipes: Python, YAML and words give the same recipe; wrong input is refused with the near miss."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.recipe import Recipe, as_recipe
from tersor.errors import SettingError, StorageError
from tersor.steps import STEPS, Entropy, Prune, Quantize, read_recipe
from tersor.steps.recipe_text import dump, from_words, from_yaml

PYTHON = Recipe((Prune(keep=0.1, per="channel", where=("a.*", "!a.b")), Quantize(bits=4), Entropy()), seed=3)
YAML = """
tersor: 1
seed: 3
steps:
  - prune: {keep: 0.1, per: channel, where: ["a.*", "!a.b"]}
  - quantize: {bits: 4}
  - entropy
"""
WORDS = ["prune", "keep=0.1", "per=channel", "where=a.*,!a.b", "quantize", "bits=4", "entropy"]


def test_python_yaml_and_words_give_one_recipe() -> None:
    assert from_yaml(YAML, STEPS) == PYTHON
    assert from_yaml(YAML, STEPS).digest == PYTHON.digest
    # On the command line a list of globs is one text with commas; it means the same sites.
    words = from_words(WORDS, STEPS, seed=3)
    assert words.steps[1:] == PYTHON.steps[1:]
    assert words.steps[0] == Prune(keep=0.1, per="channel", where="a.*,!a.b")


@pytest.mark.parametrize(
    "words", ["prune keep=0.3", "cluster entries=5 init=density", "finetune lr=1e-3 epochs=2"]
)
def test_words_and_yaml_give_one_digest(words: str) -> None:
    step, *settings = words.split()
    inner = ", ".join(item.replace("=", ": ") for item in settings)
    assert from_words(words.split(), STEPS).digest == from_yaml(f"steps: [{step}: {{{inner}}}]", STEPS).digest


@pytest.mark.parametrize("word", STEPS)
def test_every_step_survives_yaml(word: str) -> None:
    recipe = Recipe((STEPS[word](),), seed=7)
    back = from_yaml(dump(recipe.to_json()), STEPS)
    assert back == recipe
    assert back.digest == recipe.digest
    assert json.loads(json.dumps(recipe.to_json())) == recipe.to_json()


@given(
    st.floats(1e-6, 1), st.sampled_from(["none", "2:4", "10:30"]), st.integers(0, 2**40),
    st.sampled_from(["*", "a,!b", "true", "1", "~", "null", "a: b", "x # y", "é"]),
)  # fmt: skip
def test_yaml_has_an_inverse(keep: float, pattern: str, seed: int, where: str) -> None:
    how: dict[str, Any] = {"keep": keep} if pattern == "none" else {"pattern": pattern}
    recipe = Recipe((Prune(**how, where=where),), seed)
    assert from_yaml(dump(recipe.to_json()), STEPS) == recipe


def test_a_pattern_needs_no_quotes() -> None:
    """YAML 1.1 reads 2:4 as a number of base 60."""
    assert from_yaml("steps: [prune: {pattern: 2:4}]", STEPS).steps == (Prune(pattern="2:4"),)


def test_numbers_are_read_as_people_write_them() -> None:
    found = from_yaml("steps: [finetune: {lr: 1e-3, epochs: 2}]", STEPS).steps[0]
    assert (found.lr, found.epochs) == (1e-3, 2.0)
    assert isinstance(found.epochs, float)


def test_settings_may_be_left_out() -> None:
    for text in ("steps: [entropy]", "steps: [entropy: ]", "steps: [entropy: {}]", "steps:\n- entropy:\n"):
        assert from_yaml(text, STEPS).steps == (Entropy(),)


def test_the_digest_depends_on_steps_settings_order_and_seed() -> None:
    recipes = [
        Recipe(steps, seed)
        for steps in ((Prune(),), (Prune(keep=0.4),), (Prune(), Entropy()), (Entropy(), Prune()))
        for seed in (0, 1)
    ]
    for a, b in itertools.combinations(recipes, 2):
        assert a.digest != b.digest
    assert Recipe((Prune(keep=0.5),)).digest == Recipe([Prune()]).digest


def test_as_recipe() -> None:
    assert as_recipe(Prune(), 4) == Recipe((Prune(),), 4)
    assert as_recipe([Prune(), Entropy()]) == Recipe((Prune(), Entropy()))
    assert as_recipe(PYTHON, 9) is PYTHON


# (text, what the message says)
REFUSED: list[tuple[str, str]] = [
    ("steps: [prume]", "no step 'prume'; did you mean 'prune'? Allowed: cluster"),
    ("steps: [prune: {kep: 0.5}]", "prune: no setting 'kep'; did you mean 'keep'?"),
    ("steps: [prune: {keep: 1.5}]", "prune: keep=1.5, but it is the share kept: 0 < keep <= 1"),
    ("steps: [prune: {keep: half}]", "prune: keep='half', but it must be float"),
    ("steps: [prune: {keep: [0.5]}]", "prune: keep=[0.5], but it must be float"),
    ("steps: [prune: {keep: .nan}]", "prune: keep=nan"),
    ("steps: [finetune: {epochs: .inf}]", "finetune: epochs=inf"),
    ("steps: [finetune: {lr: .inf}]", "finetune: lr=inf"),
    ("steps: [prune: {per: row}]", "prune: per='row'; it is now called 'channel'"),
    ("steps: [prune: {share: 0.3}]", "prune: no setting 'share'; it is now called 'teacher_weight'"),
    ("steps: [cluster: {start: linear}]", "no setting 'start'; it is now called 'init'"),
    ("steps: [rdoq: {per: column}]", "per='column'; it is now called 'input'"),
    ("steps: [finetune: {clip: 1}]", "no setting 'clip'; it is now called 'max_grad_norm'"),
    ("steps: [quantize: {per: column}]", "per='column'; Allowed: channel, group, tensor"),
    ("steps: [prune]\nsteps: [entropy]", "'steps' is given twice"),
    ("steps: [quantize: {bits: 4, bits: 8}]", "'bits' is given twice"),
    ("steps: [prune: {per: chanel}]", "prune: per='chanel'; did you mean 'channel'?"),
    ("steps: [prune: {1: 2}]", "prune: no setting 1"),
    ("steps: [prune: {where: [1, 2]}]", "prune: where=[1, 2]"),
    ("steps: [prune: 0.5]", "recipe: prune: settings must be a mapping, not 0.5"),
    ("steps: [prune: {}, entropy: {}, 4]", "a step is one word with its settings, not 4"),
    ("steps: [{prune: {}, entropy: {}}]", "a step is one word with its settings"),
    ("steps: [{1: {}}]", "no step 1"),
    ("steps: prune", "'steps' must be a list of steps, such as"),
    ("steps: {prune: {}}", "'steps' must be a list of steps"),
    ("steps: []", "no steps. Name at least one"),
    ("seed: 1", "'steps' must be a list of steps"),
    ("[prune]", "expected a mapping with 'steps', found list"),
    ("prune", "expected a mapping with 'steps', found str"),
    ("", "expected a mapping with 'steps', found NoneType"),
    ("{steps: [prune]", "recipe is not YAML"),
    ("steps: !!python/object/apply:os.system [ls]", "recipe is not YAML"),
    ("? [a]\n: 1", "recipe is not YAML"),
    ("steps: [prune]\nsteeps: 3", "no key 'steeps'; did you mean 'steps'?"),
    ("steps: [prune]\ntersor: 2", "recipe has format 2; this version reads 1. A newer tersor may read it."),
    ("steps: [prune]\ntersor: one", "recipe has format 'one'"),
    ("steps: [prune]\nseed: -1", "seed=-1, but it must be a whole number, 0 or more"),
    ("steps: [prune]\nseed: 0.5", "seed=0.5"),
    ("steps: [prune]\nseed: true", "seed=True"),
    ("steps: [prune]\nresult: [a]", "'result'"),
    ("steps: [prune]\nresult: {a: 1}", "'result'"),
    ("steps: [prune]\nbase: [1]", "'base'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(SettingError) as caught:
        from_yaml(text, STEPS)
    assert says in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps: prune")
    with pytest.raises(SettingError, match=r"mine\.yaml: 'steps' must be a list"):
        read_recipe(path)
    with pytest.raises(StorageError, match=r"none\.yaml: cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StorageError, match="cannot be read"):
        read_recipe(path)


WORDS_REFUSED: list[tuple[list[str], str]] = [
    (["quantize", "bits=4", "bits=8"], "quantize: bits is given twice"),
    (["keep=0.5"], "'keep=0.5' comes before any step; begin with one of cluster, distill"),
    (["prume"], "no step 'prume'; did you mean 'prune'?"),
    (["prune", "kepe=1"], "prune: no setting 'kepe'; did you mean 'keep'?"),
    (["prune", "keep=0"], "prune: keep=0.0, but"),
    (["prune", "0.5"], "no step '0.5'"),
    ([], "no steps. Name at least one, such as: prune keep=0.5"),
]


@pytest.mark.parametrize(("words", "says"), WORDS_REFUSED)
def test_words_refused(words: list[str], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        from_words(words, STEPS)
    assert says in str(caught.value)


def test_a_value_may_hold_an_equals_sign() -> None:
    assert from_words(["prune", "where=a=b"], STEPS).steps[0].where == "a=b"


@pytest.mark.parametrize("step", [Prune, "prune", None, {"prune": {}}, 4])
def test_a_step_is_an_instance(step: Any) -> None:
    with pytest.raises(SettingError, match="recipe: step 2 is .* must be a step, such as Prune"):
        Recipe((Prune(), step))


def test_yaml_is_for_people() -> None:
    lines = dump(PYTHON.to_json()).splitlines()
    assert lines[:3] == ["tersor: 1", "seed: 3", "steps:"]
    assert yaml.safe_load(dump(PYTHON.to_json())) == PYTHON.to_json()
