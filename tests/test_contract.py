"""The contract suite: properties of every step of STEPS, alone, in pairs and in random orders.

A step is tested as soon as it is in the table. Cheap settings for steps that train are in tests/tiny.py;
without them a step runs only with its defaults.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import forks
import numpy as np
import pytest
import torch
from tiny import MODELS, SMALL, TRAINED, Tiny, tiny

from tersor.check import check
from tersor.core.apply import apply
from tersor.core.history import replay, undo
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State, start
from tersor.errors import MissingError, SettingError, SiteError
from tersor.forms import Form, LowRank, Masked, Sum, uncoded
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.record.events import Edit
from tersor.record.journal import lines_of
from tersor.settings import make, settings_of
from tersor.steps import STEPS
from tersor.steps.recipe_text import dump, from_words, from_yaml

DEAR = ("export",)  # seconds each: combined with every other step, but only on the smallest model
OF_THE_WHOLE = ("export",)  # its notes are on the model, not on its weights
ALONE = [(name, False) for name in STEPS] + [(name, True) for name in TRAINED]
PAIRS = list(itertools.product(STEPS, repeat=2))
# Other orders each night, the same in all workers of pytest-xdist: a failing one names its seed.
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # None without workers: any seed
ORDERS = random.Random(RUN).sample(range(10**6), 40) if NIGHTLY else range(2)


def step(name: str, *, trained: bool = False) -> Any:
    return STEPS[name](**(TRAINED[name] if trained else SMALL.get(name, {})))


def model_for(*names: str) -> str:
    """One of the tiny models, which depends only on the combination of steps."""
    if set(names) & set(DEAR):
        return "mlp"
    return list(MODELS)[zlib.crc32("/".join(names).encode()) % len(MODELS)]


@cache
def first_alone(model: str, name: str, trained: bool) -> State:
    """The result of one step, without a journal."""
    given = tiny(model)
    with TemporaryDirectory() as folder:
        return run(given.model, step(name, trained=trained), given.task, out=Path(folder))


def outcome(given: Tiny, steps: list[Any], folder: Path) -> State:
    """The result of a run, with a journal in the folder."""
    shutil.rmtree(folder / "journal", ignore_errors=True)
    recipe = Recipe(tuple(steps))
    return run(given.model, recipe, given.task, journal=folder / "journal", out=folder)


def alone() -> Iterator[Any]:
    for (name, trained), model in itertools.product(ALONE, MODELS):
        if name not in DEAR or model == "mlp":
            yield pytest.param(name, trained, model, id=f"{name}{'-trained' if trained else ''}-{model}")


@pytest.mark.sampled(("name", "trained"), "model")
@pytest.mark.parametrize(("name", "trained", "model"), list(alone()))
def test_a_step_alone(name: str, trained: bool, model: str, tmp_path: Path) -> None:
    given = tiny(model)
    before = state_of(given)
    result = outcome(given, [step(name, trained=trained)], tmp_path)
    assert state_of(given) == before, "the model, its modes, hooks or torch's own state changed"
    sound(result, given, tmp_path / "journal")
    there_and_back(result, given, tmp_path / "journal")
    on_disk(result, tmp_path)


@pytest.mark.sampled
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_any_two_steps(first: str, second: str, tmp_path: Path) -> None:
    given = tiny(model_for(first, second))
    before = state_of(given)
    trained = [name in TRAINED and zlib.crc32(name.encode() + bytes([i])) % 2 == 0 for i, name in
               enumerate((first, second))]  # fmt: skip
    steps = [step(name, trained=flag) for name, flag in zip((first, second), trained, strict=True)]
    result = outcome(given, steps, tmp_path)
    assert state_of(given) == before
    sound(result, given, tmp_path / "journal")
    there_and_back(result, given, tmp_path / "journal")
    one_back = undo(result, 1, journal=tmp_path / "journal")
    first_only = first_alone(given.name, first, trained[0])
    assert one_back.digest == first_only.digest
    assert run(first_only, steps[1], given.task, out=tmp_path).ledger.digest == result.ledger.digest
    on_disk(result, tmp_path)


@pytest.mark.sampled("seed")
@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("model", MODELS)
def test_all_steps_in_a_random_order(model: str, seed: int, tmp_path: Path) -> None:
    names = [name for name in STEPS if name not in DEAR]
    random.Random(f"{model}/{seed}").shuffle(names)
    given = tiny(model)
    result = outcome(
        given, [step(name, trained=name in TRAINED and seed % 2 == 0) for name in names], tmp_path
    )
    sound(result, given, tmp_path / "journal")
    there_and_back(result, given, tmp_path / "journal")
    on_disk(result, tmp_path)


def test_events_are_the_same_in_another_process() -> None:
    here = digests()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_contract; print(test_contract.as_json())"
    child = forks.run(["-c", code, Path(__file__).parent], check=True)  # its hashes have another seed
    there, seed = json.loads(child.stdout.splitlines()[-1])
    assert there == here
    assert seed != hash("a") or "PYTHONHASHSEED" in os.environ


def as_json() -> str:
    return json.dumps([digests(), hash("a")])


def digests() -> dict[str, str]:
    """The ledger digest of every cheap step, with training if it can train."""
    torch.set_num_threads(1)  # sums in another order would differ
    found = {}
    for name in STEPS:
        if name not in DEAR:
            given = tiny("conv")
            found[name] = run(given.model, step(name, trained=name in TRAINED), given.task).ledger.digest
    return found


@pytest.mark.parametrize(("name", "trained"), ALONE)
def test_settings_survive_yaml_and_words(name: str, trained: bool) -> None:
    made = step(name, trained=trained)
    recipe = Recipe((made,), seed=3)
    assert from_yaml(dump(recipe.to_json()), STEPS) == recipe
    words = [name] + [f"{key}={'' if value is None else value}" for key, value in settings_of(made).items()]
    assert from_words(words, STEPS, seed=3) == recipe
    assert hash(recipe.digest) == hash(Recipe((step(name, trained=trained),), seed=3).digest)


@pytest.mark.parametrize("name", STEPS)
def test_bad_settings_are_refused(name: str) -> None:
    for item in dataclasses.fields(STEPS[name]):
        with pytest.raises(SettingError, match=f"did you mean '{item.name}'"):
            make(STEPS[name], {f"{item.name}x": 1})
        if item.type in ("float", "int", "float | None", "int | None"):
            with pytest.raises(SettingError, match=item.name):
                make(STEPS[name], {item.name: "many"})
            with pytest.raises(SettingError, match=item.name):
                make(STEPS[name], {item.name: -1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        STEPS[name]().where = "x"


@pytest.mark.parametrize("name", [name for name in STEPS if "where" in settings_of(STEPS[name]())])
def test_a_where_that_matches_nothing_names_the_near_miss(name: str, tmp_path: Path) -> None:
    given = tiny("conv")
    with pytest.raises(SiteError, match=r"head\.weigth.*did you mean 'head\.weight'"):
        outcome(given, [dataclasses.replace(step(name), where="head.weigth")], tmp_path)


OPTIONAL = ("accelerate", "sklearn", "torchvision", "zstandard")


@pytest.mark.parametrize("name", [name for name in STEPS if name not in DEAR])
def test_optional_packages_are_optional(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With default settings a step runs without them; one that always trains says which it needs."""
    for package in OPTIONAL:
        monkeypatch.setitem(sys.modules, package, None)
    trains = getattr(step(name), "epochs", 0) > 0
    with pytest.raises(MissingError, match="accelerate") if trains else contextlib.nullcontext():
        outcome(tiny("mlp"), [step(name)], tmp_path)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_a_description(name: str) -> None:
    kind = STEPS[name]
    header = (inspect.getmodule(kind).__doc__ or "").strip().splitlines()
    assert len([line for line in header if line.strip()]) >= 3, "a file opens with the idea in a few lines"
    assert header[0].split(":")[0].lower() == name
    assert check(Recipe((kind(),)))[0]["what"] == (kind.__doc__ or "").splitlines()[0]


def state_of(given: Tiny) -> tuple[Any, ...]:
    """Everything that a run must not change."""
    model = given.model
    return (
        start(model).digest,
        [(name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
         for name, module in model.named_modules()],
        [(name, value.requires_grad, value.grad is None) for name, value in model.named_parameters()],
        sorted(vars(model)), torch.is_grad_enabled(), torch.get_rng_state().tolist(), random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
        torch.get_default_dtype(), torch.get_num_threads(), given.task.digest(),
    )  # fmt: skip


def sound(result: State, given: Tiny, journal: Path | None = None) -> None:
    """Shapes, dtypes and values are valid, and each edit is as its `how` says."""
    for name, value in result.state_dict().items():
        if name in given.model.state_dict():
            wanted = given.model.state_dict()[name]
            kept = result.kept.get(result.aliases.get(name, name), {})
            shape = [len(kept.get(axis, range(n))) for axis, n in enumerate(wanted.shape)]
            assert (list(value.shape), value.dtype) == (shape, wanted.dtype), name
            assert torch.isfinite(value).all() or not torch.isfinite(wanted).all(), name
    out = given.out(result.model())
    assert out.shape == given.out().shape
    assert torch.isfinite(out).all()
    for edit in edits_of(given, journal) if journal is not None else ():
        before, after = edit.before, edit.after
        assert isinstance(before, Form)
        assert isinstance(after, Form)
        if edit.how == "wrap":
            assert any(node.digest == before.digest for _, node in after.walk()), edit
        elif edit.how == "lossless":
            assert torch.equal(before.decode().nan_to_num(), after.decode().nan_to_num()), edit
        elif edit.how == "refine":
            assert frame(uncoded(before)) <= frame(uncoded(after)), edit
    speaks(result)


def edits_of(given: Tiny, journal: Path) -> Iterator[Edit]:
    """The edits of a run, with the forms before them, from its journal."""
    state = start(given.model)
    for line in lines_of(journal):
        for event in (group := line.group()).events:
            if isinstance(event, Edit) and event.site in state.forms:
                yield dataclasses.replace(event, before=state.forms[event.site])
        state = apply(state, group, "test")[0]


def frame(form: Form) -> set[tuple[str, str]]:
    """The nodes around the leaves, with their paths: refine must keep them. A scale that is a product is part
    of a grid, and moves with it under a new mask."""
    return {
        (path, node.name) for path, node in form.walk()
        if isinstance(node, (Masked, LowRank, Sum)) and "scale" not in path.split(".")
    }  # fmt: skip


def speaks(result: State) -> None:
    """Every step has a note on every weight: done, measured, or skipped with the reason."""
    weights = {name for name, site in result.sites.items() if site.is_weight and not site.origin}
    for number, name in enumerate(result.ledger.step_names()):
        recorded = [entry for entry in result.ledger.entries if entry.step == number]
        assert recorded, f"{name} said nothing"
        silent = weights - {entry.site for entry in recorded}
        assert not silent or name in OF_THE_WHOLE, f"{name} said nothing of {silent}"
        skipped = [entry for entry in recorded if entry.kind == "skipped"]
        assert all(len(entry.text) > 10 for entry in skipped), "why?"


def there_and_back(result: State, given: Tiny, journal: Path) -> None:
    """Undo restores and replay repeats, bit for bit."""
    back = undo(result)
    assert back.digest == result.ledger.base
    for name, value in back.state_dict().items():
        assert torch.equal(value, given.model.state_dict()[name]), name
    again = replay(given.model, result.ledger, journal)
    assert again.digest == result.digest
    assert again.ledger.digest == result.ledger.digest


def on_disk(result: State, folder: Path) -> None:
    """Save and load return the same state, aliases and ledger too, and reported bytes equal those on disk."""
    nbytes = save(result, folder / "model.tersor")
    assert nbytes == (folder / "model.tersor").stat().st_size >= result.nbytes
    loaded = load(folder / "model.tersor")
    assert loaded.digest == result.digest
    assert loaded.nbytes == result.nbytes
    assert loaded.ledger.digest == result.ledger.digest
    mine = result.state_dict()
    assert set(loaded.state_dict()) == set(mine)
    assert all(torch.equal(value, mine[name]) for name, value in loaded.state_dict().items())
