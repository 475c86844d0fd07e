"""Resolve: the model and the recipe that words on the command line name.

file.py:factory, package.module:factory      the user's own code: the module, or a function that returns it
torchvision:NAME                             an architecture of torchvision; --weights gives its weights
FILE.tersor with --arch file.py:factory      a compressed model, which continues from its forms
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import nn

from tersor.core.recipe import Recipe
from tersor.core.state import State, start
from tersor.errors import RefusedError, SettingError, did_you_mean, need
from tersor.io import load
from tersor.io.checkpoint import Checkpoint, read_from
from tersor.model.builtin_tasks import task_from
from tersor.model.import_object import import_object
from tersor.model.sites import sites_of
from tersor.model.task import Task
from tersor.steps import read_recipe, recipe_from_words


def resolve_task(text: str | None) -> Task | None:
    """The task that words name; None without words."""
    return None if text is None else task_from(text)


def resolve_model(
    text: str, *, weights: str | None = None, key: str | None = None, arch: str | None = None,
    base: str | None = None, task: Task | None = None,
) -> State:  # fmt: skip
    """The model that words name: file.py:factory, package.module:factory, torchvision:NAME, or a .tersor file
    with its code (`arch`). `weights`: .safetensors, or a state dict saved by torch.save; with `key`, only the
    entry of that name. `base`: the weights that the .tersor file was made from, if `arch` does not give them;
    losses are measured against them. `task`: its inputs show the role of each tensor."""
    if key is not None and weights is None:
        raise SettingError(f"model: --key {key} goes with --weights; give both, or leave it out")
    if text.endswith(".tersor"):
        if arch is None:
            raise SettingError(
                f"model: {text} holds weights, not code. Give the code too: --arch file.py:factory"
            )
        if weights is not None:
            raise SettingError(
                f"model: {text} holds the weights; leave out --weights. For the first weights use --base"
            )
        module = import_object(arch, "arch", SettingError, nn.Module)
        if base is not None:
            put_in(module, base)
        loaded = load(text).on(module)
        if base is not None and loaded.base is None:
            raise RefusedError(
                f"model: --base {base} does not hold the weights that {text} was made from (digest "
                f"{loaded.ledger.base}). Give those, or leave out --base"
            )
        return loaded
    for word, value in (("--arch", arch), ("--base", base)):
        if value is not None:
            raise SettingError(f"model: {word} goes with a .tersor file; {text!r} already names the code")
    module = resolve_module(text)
    if weights is not None:
        put_in(module, weights, key)
    return start(module, task)


def resolve_module(text: str) -> nn.Module:
    """The code that words name: file.py:factory, package.module:factory or torchvision:NAME."""
    word, _, name = text.partition(":")
    if word == "torchvision":
        return torchvision_model(name)
    module: nn.Module = import_object(text, "model", SettingError, nn.Module)
    return module


def resolve_files(*words: str | Path | None, weights: Iterable[str | Path | None] = ()) -> list[Path]:
    """The files that words name: paths, file.py:factory, fashion-mnist:FOLDER; and all files that reading
    `weights` opens."""
    paths = [Path(path) for path in weights if path]
    found = [file for path in paths if path.exists() for file in read_from(path)]
    for text in map(str, filter(None, words)):
        head, tail = text.rpartition(":")[0], text.partition(":")[2]
        for path in (Path(part) for part in (text, head, tail) if part):
            found += [path] if os.path.exists(path) else []
    return found


def resolve_rounding(
    weights: Path,
    max_drop: float | None,
    model: str | None,
    task: str | None,
    words: list[str] | None,
    *,
    key: str | None = None,
    workers: int | None = None,
) -> tuple[State, Task] | None:
    """The model with these weights, and the task that measures the loss from rounding them. None if
    `max_drop` is not given. SettingError if the options do not go together."""
    if max_drop is None:
        if model is not None or task is not None:
            raise SettingError("pack: --model and --task are for --max-drop; give it too, or leave them out")
        return None
    if model is None or task is None:
        raise SettingError(
            "pack: measuring --max-drop needs the model and a task. Give them too: --model "
            "file.py:factory --task TASK. Without them: rdoq bits=4 entropy"
        )
    if workers is not None:
        raise SettingError("pack: --workers is for packing without --max-drop; leave it out")
    if words:
        raise SettingError(
            f"pack: --max-drop includes rounding and coding; leave out {' '.join(words)!r}, or use run with "
            f"the model: tersor run MODEL --task TASK --out DIR ... rdoq max_drop={max_drop:g} entropy"
        )
    data = task_from(task)
    return resolve_model(model, weights=str(weights), key=key, task=data), data


def resolve_recipe(
    path: Path | None, words: list[str] | None, *, seed: int | None = None, zeros: str | None = None
) -> Recipe:
    """The recipe in a file or in words, with `seed` and `zeros` replaced if they are given."""
    if path is not None and words:
        raise SettingError(f"recipe: both {path} and words ({' '.join(words)}) are given; give one of them")
    if path is None and not words:
        raise SettingError(
            "recipe: none is given. Name a file, --recipe recipe.yaml, or steps: prune keep=0.1 entropy"
        )
    recipe = recipe_from_words(words or []) if path is None else read_recipe(path)
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    return recipe if zeros is None else replace(recipe, zeros=zeros)


def torchvision_model(name: str) -> nn.Module:
    """An architecture of torchvision, without weights."""
    try:
        from torchvision import models
    except ImportError:
        raise need("torchvision", "vision", f"model torchvision:{name}") from None
    if name not in models.list_models():
        raise SettingError(f"model: torchvision has no {name!r}; {did_you_mean(name, models.list_models())}")
    module: nn.Module = models.get_model(name, weights=None)
    return module


def put_in(module: nn.Module, path: str, key: str | None = None) -> None:
    """Load the weights of a file; RefusedError names what does not fit."""
    own = module.state_dict()
    tied = sites_of(module)[2]
    with Checkpoint(path, key) as file:
        if file.stripped:
            logging.getLogger("tersor").warning(
                "%s: names are used without the prefix %r, which a wrapper had given to all of them",
                path, file.stripped,
            )  # fmt: skip
        names = {**{name: name for name in file.slots}, **file.aliases}  # in the model -> in the file
        for pair in (pair for item in tied.items() for pair in (item, item[::-1])):
            if pair[0] not in names and pair[1] in names:  # a file may hold only one of tied tensors
                names[pair[0]] = names[pair[1]]
        if lacking := [name for name in own if name not in names]:
            hint = key_hint(lacking[0], names)
            raise RefusedError(f"{path}: it lacks {lacking[0]}, which the model has; {hint}")
        if extra := [name for name in names if name not in own]:
            hint = did_you_mean(extra[0], own)
            raise RefusedError(f"{path}: it has {extra[0]}, which the model lacks; {hint}")
        for name, tensor in own.items():
            shape = file.slots[names[name]].shape
            if shape != tuple(tensor.shape):
                raise RefusedError(
                    f"{path}: {name} has shape {list(shape)}, but the model's has {list(tensor.shape)}. "
                    f"Give the model that the weights were trained for (same class, same settings)."
                )
        for name in own:
            own[name] = file.read(names[name])
        module.load_state_dict(own)  # `own` keeps the version numbers of the modules


def key_hint(name: str, names: Iterable[str]) -> str:
    """The --key options under which a checkpoint of several networks has this name."""
    keys = [other.removesuffix(f".{name}") for other in names if other.endswith(f".{name}")]
    options = " or ".join(f"--key {key}" for key in keys[:3])
    return f"it has {keys[0]}.{name}: choose it with {options}" if keys else did_you_mean(name, names)
