"""Resolve: the model and the recipe that words on the command line name.

file.py:factory, package.module:factory      the user's own code: the module, or a function that returns it
hf:FOLDER                                    a folder of Hugging Face's transformers, with its weights
torchvision:NAME, timm:NAME                  an architecture of that library; --weights gives its weights
zoo:NAME                                     one of the zoo, and its task
FILE.pt2                                     an exported program
FILE.tersor with --arch file.py:factory      a compressed model, which continues from its forms
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.recipe import Recipe
from tersor.core.state import State, start
from tersor.errors import RefusedError, SettingError, did_you_mean
from tersor.io.attached import OURS, attachments_of
from tersor.io.checkpoint import Checkpoint
from tersor.io.container import load
from tersor.io.folder import inputs_of, read_from
from tersor.measure.nbytes import file_nbytes
from tersor.model.builtin_tasks import task_from
from tersor.model.sites import sites_of
from tersor.model.task import Task
from tersor.model.versions import Version, versions_of
from tersor.steps import read_recipe, recipe_from_words
from tersor.zoo.architectures import zoo_recipe
from tersor.zoo.words import folder_of, network_of


def resolve_task(text: str | None) -> Task | None:
    """The task that words name; None without words."""
    return None if text is None else task_of(text)


def task_of(text: str) -> Task:
    """The task that words name: a built-in one, the user's, scenes:KIND or zoo:NAME, each with :FOLDER."""
    if text.partition(":")[0] in SCENES:
        from tersor.zoo.scene_tasks import scene_task_from

        return scene_task_from(text)
    return task_from(text)


def resolve_model(
    text: str, *, weights: str | None = None, key: str | None = None, arch: str | None = None,
    base: str | None = None, task: Task | None = None,
) -> State:  # fmt: skip
    """The model that words name: file.py:factory, package.module:factory, torchvision:NAME, hf:FOLDER, or a
    .tersor file with its code (`arch`, in the same words). `weights`: .safetensors, or a state dict saved by
    torch.save; with `key`, only the entry of that name. `base`: the weights that the .tersor file was made
    from, if `arch` does not give them; losses are measured against them. `task`: its inputs show the role of
    each tensor."""
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
        module = network_of(arch, "arch")
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
    module = network_of(text)
    if weights is not None:
        put_in(module, weights, key)
    state = start(module, task)
    if (folder := folder_of(text)) is None:
        return state
    with Checkpoint(folder) as source:
        along = attachments_of(source)
    return replace(
        state, attachments={name: data for name, data in along.items() if not name.startswith(OURS)}
    )


def resolve_files(*words: str | Path | None, weights: Iterable[str | Path | None] = ()) -> list[Path]:
    """The files that words name: paths, file.py:factory, fashion-mnist:FOLDER; and all files that reading
    `weights` opens."""
    paths = [Path(path) for path in weights if path]
    found = [file for path in paths if path.exists() for file in inputs_of(path)]
    for text in map(str, filter(None, words)):
        if (folder := folder_of(text)) is not None and folder.is_dir():
            found += inputs_of(folder)
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
    attach: bool = True,
) -> tuple[State, Task] | None:
    """The model with these weights, and the task that measures the loss from rounding them. None if
    `max_drop` is not given. `attach`: with the files that go along with a folder. SettingError if the options
    do not go together."""
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
    data = task_of(task)
    state = resolve_model(model, weights=str(weights), key=key, task=data)
    with Checkpoint(weights, key) as source:
        return replace(state, attachments=attachments_of(source) if attach else {}), data


def rounded_from(state: State, weights: Path) -> tuple[int, int]:
    """(bytes of the tensors as given and of what goes along, bytes of the files that these were read from)"""
    along = sum(len(data) for name, data in state.attachments.items() if not name.startswith(OURS))
    return (state.given_nbytes or 0) + along, file_nbytes(*read_from(weights)) + along


def resolve_recipe(
    path: Path | None, words: list[str] | None, *, seed: int | None = None, zeros: str | None = None
) -> Recipe:
    """The recipe in a file, of an architecture (zoo:NAME, zoo:NAME:small) or in words, with `seed` and
    `zeros` replaced if they are given."""
    if path is not None and words:
        raise SettingError(f"recipe: both {path} and words ({' '.join(words)}) are given; give one of them")
    if path is None and not words:
        raise SettingError(
            "recipe: none is given. Name a file, --recipe recipe.yaml, or steps: prune keep=0.1 entropy"
        )
    if path is None:
        recipe = recipe_from_words(words or [])
    else:
        text = str(path)
        recipe = read_recipe(zoo_recipe(text) if text.startswith("zoo:") else path)
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    return recipe if zeros is None else replace(recipe, zeros=zeros)


SCENES = ("scenes", "zoo")  # words of tasks on composed scenes


def put_in(module: nn.Module, path: str, key: str | None = None) -> bool:
    """Load the weights of a file; whether the file holds other tensors too, such as an optimizer's.
    RefusedError names what does not fit."""
    own = module.state_dict()
    tied = sites_of(module)[2]
    with Checkpoint(path, key) as file:
        if file.stripped:
            logging.getLogger("tersor").warning(
                "%s: names are used without the prefix %r, which a wrapper had given to all of them",
                path, file.stripped,
            )  # fmt: skip
        if file.versions is not None and differ(file.versions, versions_of(module)):
            load_older(module, file)
            return any(file.ignored.values())
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
        return any(file.ignored.values())


def differ(stated: Mapping[str, Version], own: Mapping[str, Any]) -> bool:
    """Whether weights are of other versions of the modules than the model's."""
    return any(name in stated and stated[name] != version for name, version in own.items())


def load_older(module: nn.Module, file: Checkpoint) -> None:
    """Load weights of other versions by the modules' own code, which may rename or rescale tensors."""
    names = {**{name: name for name in file.slots}, **file.aliases}
    state = OrderedDict((name, file.read(own)) for name, own in names.items())
    state._metadata = {name: {"version": n} for name, n in (file.versions or {}).items()}  # type: ignore[attr-defined]
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, LookupError) as error:
        raise RefusedError(
            f"{file.path}: it is of another version of {type(module).__name__}, whose code cannot load it: "
            f"{' '.join(str(error).split())[:400]}"
        ) from None


def key_hint(name: str, names: Iterable[str]) -> str:
    """The --key options under which a checkpoint of several networks has this name."""
    keys = [other.removesuffix(f".{name}") for other in names if other.endswith(f".{name}")]
    options = " or ".join(f"--key {key}" for key in keys[:3])
    return f"it has {keys[0]}.{name}: choose it with {options}" if keys else did_you_mean(name, names)
