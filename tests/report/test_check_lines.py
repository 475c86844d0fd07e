"""tersor check: the report on a recipe agrees with a real run of it."""

import itertools
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from halving import Halving
from tiny import CLASSES, MODELS, tiny
from torch import nn

from tersor.check import check
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import SettingError, SiteError, TersorError
from tersor.forms import Coded, Form
from tersor.report.check_lines import counted, lines
from tersor.standin import clash, example, globs, stand_in, stand_in_for
from tersor.steps import STEPS, read_recipe, recipe_from_words

ROOT = Path(__file__).resolve().parents[2]


def warnings(words: str) -> list[list[str]]:
    """The warnings of each step."""
    return [[w["text"] for w in facts["warnings"]] for facts in check(recipe_from_words(words.split()))]


@pytest.mark.parametrize(
    "words",
    [
        "prune keep=0.1 ramp=0.5 epochs=4 cluster epochs=2 quantize where=*.bias entropy measure",
        "prune keep=0.5 quantize bits=4 finetune distill entropy export",
        "factorize keep=0.4 prune keep=0.5 quantize entropy",
        "quantize where=conv* cluster where=fc* entropy",
        "entropy where=a.* finetune where=b.*",
    ],
)
def test_sound_recipes_have_no_warning(words: str) -> None:
    assert not any(warnings(words))


@pytest.mark.parametrize(
    ("words", "step", "says"),
    [
        ("quantize quantize bits=4", 1, "absorbs the result of step 1 quantize (affine)"),
        ("cluster quantize", 1, "absorbs the result of step 1 cluster (codebook)"),
        ("quantize scheme=log cluster epochs=3", 1, "absorbs the result of step 1 quantize (loggrid)"),
        ("prune factorize", 1, "absorbs the result of step 1 prune (masked)"),
        ("prune quantize cluster", 2, "absorbs the result of step 2 quantize (affine)"),
        ("factorize factorize keep=0.3", 1, "absorbs the result of step 1 factorize (lowrank)"),
        ("quantize where=conv* cluster where=*", 1, "absorbs the result of step 1 quantize (affine)"),
        ("entropy finetune", 1, "stores decoded what step 1 entropy coded"),
        ("quantize entropy distill", 2, "stores decoded what step 2 entropy coded"),
        ("entropy prune", 1, "stores decoded what step 1 entropy coded"),
        ("cluster entropy quantize", 2, "absorbs the result of step 1 cluster (codebook)"),
    ],
)
def test_losses_are_reported(words: str, step: int, says: str) -> None:
    found = warnings(words)
    assert any(says in text for text in found[step])
    assert not any(found[:step])


# Measuring and exporting change nothing.
EDITING = [word for word in STEPS if word not in ("measure", "export")]
MORE = {"shorten": ("unmet=nearest",)}  # there are no branches


def words_of(name: str) -> list[str]:
    return [name, *MORE.get(name, ())]


@cache
def wide() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, CLASSES))


@cache
def alone(name: str) -> State:
    return run(wide(), recipe_from_words(words_of(name)), tiny("mlp").task)


@pytest.mark.sampled(each=2)
@pytest.mark.parametrize("pair", list(itertools.product(EDITING, repeat=2)), ids="-".join)
def test_every_pair_is_reported_as_it_runs(pair: tuple[str, str]) -> None:
    """A real run absorbs forms and leaves leaves uncoded as the check reported. Whether a coder shortens a
    small bias depends on its values, so only weights are compared."""
    model, recipe = wide(), recipe_from_words([*words_of(pair[0]), *words_of(pair[1])])
    reported: dict[str, set[str]] = {"absorbs": set(), "stores": set()}
    for warning in check(recipe, model)[1]["warnings"]:
        reported[warning["text"].split()[0]] |= set(warning["sites"]) & WEIGHTS
    first, both = alone(pair[0]), run(model, recipe, tiny("mlp").task)
    absorbed = {e.site for e in both.ledger.edits() if e.step == 1 and e.how == "absorb"} & WEIGHTS
    uncoded = {name for name in WEIGHTS if coded(first.forms[name]) and not coded(both.forms[name])}
    assert reported == {"absorbs": absorbed, "stores": uncoded}


WEIGHTS = {"0.weight", "2.weight"}


def coded(form: Form) -> bool:
    return any(isinstance(node, Coded) for _, node in form.walk())


def test_needs_and_settings() -> None:
    prune, measure, export, entropy = check(
        recipe_from_words(["prune", "epochs=2", "measure", "export", "entropy"])
    )
    assert prune["needs"] == "a task with training batches"
    assert prune["settings"] == {"epochs": 2.0}
    assert prune["what"] == (STEPS["prune"].__doc__ or "").splitlines()[0]
    assert export["needs"] == "a task"
    assert entropy["needs"] is None
    assert measure["notes"]


def test_with_a_model_the_sites_are_named() -> None:
    model = tiny("conv").model
    prune, entropy = check(recipe_from_words(["prune", "where=block*", "entropy"]), model)
    assert prune["sites"] == ["block.weight"]
    assert set(entropy["sites"]) >= set(dict(model.named_parameters()))
    (finetune,) = check(recipe_from_words(["finetune", "where=head*"]), model)
    assert finetune["sites"] == ["head.weight"]


def test_cuts_are_reported_without_a_task_to_prove_them_on() -> None:
    """A dry run reports what the groups would cut; only a real run proves them."""
    (facts,) = check(Recipe((Halving("mlp"),)), tiny("mlp").model)
    cut = [f"layers.{number}.{word}" for number in (0, 4) for word in ("weight", "bias")]
    assert set(facts["sites"]) == {*cut, "layers.2.weight", "layers.6.weight"}


def test_with_a_model_globs_and_layers_are_checked() -> None:
    model = tiny("conv").model
    with pytest.raises(SiteError, match="did you mean 'block.weight'"):
        check(recipe_from_words(["prune", "where=blok.weight"]), model)
    with pytest.raises(SettingError, match="no layer 'steam'; did you mean 'stem'"):
        check(recipe_from_words(["distill", "features=steam"]), model)
    assert check(recipe_from_words(["distill", "features=stem"]), model)
    assert check(recipe_from_words(["distill", "features=steam"]))  # cannot be checked without a model


@pytest.mark.parametrize("name", MODELS)
def test_checking_leaves_the_model_alone(name: str) -> None:
    model = tiny(name).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check(recipe_from_words(["prune", "epochs=1", "cluster", "entropy"]), model)
    assert all((before[key] == value).all() for key, value in model.state_dict().items())


def test_the_recipes_that_come_with_us_have_no_warning() -> None:
    paths = [path for folder in ("src/tersor/recipes", "examples") for path in (ROOT / folder).glob("*.yaml")]
    assert paths
    for path in paths:
        assert not any(facts["warnings"] for facts in check(read_recipe(path)))


def test_lines_for_people() -> None:
    page = "\n".join(lines({"steps": check(recipe_from_words(["quantize", "bits=4", "cluster"]))}))
    assert "1 quantize: Store weights in few bits" in page
    assert "  bits=4" in page
    assert "  warning: absorbs the result of step 1 quantize" in page
    assert page.endswith("2 steps, 1 warning")
    assert counted(list("abcdefghij")) == "10 sites: a, b, c, d, e, f and 4 more"


@pytest.mark.parametrize(
    "pattern", ["*", "*.bias", "blocks.*", "fc?", "conv[12].weight", "layer*.conv*", "a.b"]
)
def test_a_glob_means_its_example(pattern: str) -> None:
    from fnmatch import fnmatchcase

    name = example(pattern)
    assert fnmatchcase(name, pattern)
    assert not set(name) & set("*?[]")
    stand = stand_in(recipe_from_words(["prune", f"where={pattern}"]))
    assert name in stand.sites


@pytest.mark.parametrize("words", ["distill features=fc.weight", "prune where=fc1 distill features=fc1"])
def test_a_layer_with_the_name_of_a_weight_is_an_error_without_a_crash(words: str) -> None:
    """The stand-in cannot have both."""
    with suppress(TersorError):
        assert check(recipe_from_words(words.split()))


def test_globs_and_names_that_clash() -> None:
    assert globs("a.*, !b.*") == ["a.*", "b.*"]
    assert globs(("a", "!b")) == ["a", "b"]
    assert clash("a.b", "a")
    assert clash("a", "a.b")
    assert clash("a", "a")
    assert not clash("a.b", "a.bc")


@pytest.mark.parametrize("name", MODELS)
def test_a_stand_in_has_the_models_names(name: str) -> None:
    from tersor.core.state import start

    given = start(tiny(name).model)
    stand = stand_in_for(given)
    assert stand.sites.keys() == given.sites.keys()
    for site, other in zip(stand.sites.values(), given.sites.values(), strict=True):
        assert (site.kind, site.axis, site.dtype) == (other.kind, other.axis, other.dtype)
        assert stand.forms[site.name].shape == site.shape
