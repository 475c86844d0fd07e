"""Checkpoint weights: which tensors of a training checkpoint are its weights.

one network beside training state         its tensors, by their own names
several networks, or also loose tensors   all of them, with their keys: g_ema.conv.weight, latent_avg
key="g_ema"                               the tensors under that key, with the names below it
Training state (optimizers, schedulers, random states, numbers) is left out, and reported with its number of
tensors. An optimizer is recognized by its entries "state" and "param_groups", whatever its key.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tersor.errors import FormatError, SettingError, did_you_mean, few
from tersor.model.versions import Version, is_version

# Keys of training state beside networks.
TRAINING = re.compile(r"optim|sched|scaler|sampler|callbacks|loops|rng|random_state|^amp$", re.IGNORECASE)
RANDOM = re.compile(r"rng|random", re.IGNORECASE)
DEPTH = 32  # levels of nested dicts and lists
MOST = 1_000_000  # dicts, lists and tensors, counted each time that one is reached
FREE = 1000  # of them, besides one per byte of the file
ITEMS = 32  # entries of these per byte of the file: it may be compressed
STORAGES = (torch.TypedStorage, torch.UntypedStorage)  # storages of tensors, saved without their tensor
WRAPPERS = ("_orig_mod.", "module.")  # prefixes that torch.compile and data parallelism give to all names
SHOWN = 12  # keys in a message
Names = tuple[str, ...]
Item = TypeVar("Item")


class NoSuchKey(SettingError):
    """No tensor is under the key. With several files one of them may lack it."""

    brief = "nothing under the key"


class NotWeights(FormatError):
    """A sound file of something else than weights. In a folder it may lie beside them."""

    brief = "no weights"


class Chosen(NamedTuple):
    """The weights of a checkpoint."""

    tensors: dict[str, Any]  # by name; values may be storages
    key: str  # that they are under; "" if they are all of it or of several networks
    ignored: dict[str, int]  # parts left out -> tensors in them
    versions: dict[str, Version] | None = None  # of modules, by name; None if the state dict has none
    training: bool = False  # it is an optimizer's state, and no part of it


def choose(found: Any, path: Path, key: str | None = None) -> Chosen:
    """The weights of a loaded checkpoint. FormatError if there are none, SettingError for an unknown key."""
    flat = flattened(found, path)
    if () in flat or not flat:
        keys = f" with the keys {listing(found)}" if isinstance(found, Mapping) and found else ""
        raise NotWeights(
            f"{path}: it holds a {type(found).__name__}{keys}, but a state dict is expected: tensors "
            f"by name. Save one: torch.save({{'weight': tensor}}, 'weights.pt')"
        )
    if key is not None:
        tensors = under(key, named(flat, path), path, named(flattened(found, path, optimizers=False), path))
        chosen = {names for names in flat if ".".join(names).startswith(f"{key}.")}
        return Chosen(tensors, key, left_out(found, path, flat, chosen), versions(inner(found, key)))
    begin, parts = network(found, path)
    depth = len(begin)
    weights = flattened(found, path, optimizers=False)
    chosen = {names for names in weights if names[:depth] == begin and names[depth] in parts}
    tensors = named({names[depth:]: leaf for names, leaf in flat.items() if names in chosen}, path)
    stated = versions(inner(found, ".".join(begin)))
    ignored = left_out(found, path, flat, chosen)
    return Chosen(tensors, ".".join(begin), ignored, stated, is_optimizer(found))


def flattened(found: Any, path: Path, *, optimizers: bool = True) -> dict[Names, Any]:
    """All tensors and storages, by the tuple of keys that leads to them. `optimizers=False` leaves out nested
    optimizers."""
    flat: dict[Names, Any] = {}
    waiting: list[tuple[Names, Any]] = [((), found)]
    nbytes = path.stat().st_size
    most = min(MOST, FREE + nbytes)  # a dict in a file of 400 bytes may be reached 2^30 times
    items = FREE + ITEMS * nbytes  # in all dicts and lists, numbers too
    for _ in range(most):
        if not waiting:
            return flat
        names, value = waiting.pop()
        if isinstance(value, (Tensor, *STORAGES)):
            flat[names] = value
            continue
        if len(names) > DEPTH:
            break
        inside = children(value, path)
        items -= len(inside)
        if items < 0:
            break
        inner = [
            (name, item)
            for name, item in inside.items()
            if holds(item) and (optimizers or not is_optimizer(item))
        ]
        waiting += [((*names, name), item) for name, item in reversed(inner)]
    raise FormatError(
        f"{path}: its dicts and lists are nested more than {DEPTH} deep, or there are more than {most:,}: it "
        f"is not a checkpoint"
    )


def holds(value: Any) -> bool:
    """Whether this is a tensor or may contain some."""
    return isinstance(value, (Tensor, *STORAGES, Mapping, list, tuple, set))


def is_optimizer(value: Any) -> bool:
    """Whether this is the state of an optimizer: in torch.optim all have these two keys."""
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def children(value: Any, path: Path) -> dict[str, Any]:
    """The items of a dict, list, tuple or set, by key as text; empty for other values."""
    if not isinstance(value, Mapping | list | tuple | set):
        return {}
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    found: dict[str, Any] = {}
    for name, item in pairs:
        if str(name) in found:
            raise FormatError(f"{path}: two of its keys are written {str(name)[:100]!r}; rename one")
        found[str(name)] = item
    return found


def named(flat: Mapping[Names, Item], path: Path) -> dict[str, Item]:
    """The same, with keys joined by dots."""
    found: dict[str, Item] = {}
    for names, leaf in flat.items():
        name = ".".join(names)
        if name in found:
            raise FormatError(f"{path}: two of its tensors would be called {name[:200]}; rename one")
        found[name] = leaf
    return found


def under(
    key: str, items: Mapping[str, Item], path: Path, weights: Mapping[str, Any] | None = None
) -> dict[str, Item]:
    """The items under a key, with the names below it. NoSuchKey for an unknown key; its message has similar
    keys of `weights` (default: of all items), since a key usually names a network."""
    found = {name[len(key) + 1 :]: item for name, item in items.items() if name.startswith(f"{key}.")}
    if not found:
        every = {name.split(".")[0] for name in weights or items if "." in name}
        tops = {name for name in every if not TRAINING.search(name)} or every
        near = did_you_mean(key, get_close_matches(key, tops, n=SHOWN, cutoff=0.0))
        what = "it is one tensor" if key in items else "no tensor is under it"
        raise NoSuchKey(f"{path}: key={key!r}: {what}; {near if tops else 'leave out the key'}")
    return found


def network(found: Any, path: Path) -> tuple[Names, set[str]]:
    """(the keys that lead to the weights, those of the keys there that hold weights)."""
    begin: Names = ()
    while True:
        parts = {name: item for name, item in children(found, path).items() if flattened(item, path)}
        loose = {name: item for name, item in parts.items() if not children(item, path)}
        networks = [
            name for name, item in parts.items() if name not in loose and is_network(name, item, path)
        ]
        # Loose random states beside networks are not weights, nor are numbers beside one: an epoch, a score.
        if len(loose) < len(parts):
            loose = {name: item for name, item in loose.items() if not is_random(name, item)}
            if len(networks) == 1 and not any(getattr(item, "ndim", 1) for item in loose.values()):
                loose = {}
        kept = {*networks, *loose}
        if not kept:
            raise NotWeights(
                f"{path}: all of its tensors are training state, under {listing(parts)}. To use one of them "
                f"anyway, name it: --key {next(iter(parts))}"
            )
        (first, *others) = [name for name in parts if name in kept]
        if others or not isinstance(parts[first], Mapping):
            return begin, kept
        begin, found = (*begin, first), parts[first]


def is_network(name: str, item: Any, path: Path) -> bool:
    """Whether the item of a key may be a network."""
    if TRAINING.search(name) or is_optimizer(item):
        return False
    return bool(flattened(item, path, optimizers=False))


def is_random(name: str, item: Any) -> bool:
    return bool(RANDOM.search(name)) and getattr(item, "dtype", None) is torch.uint8


def left_out(found: Any, path: Path, flat: Mapping[Names, Any], chosen: set[Names]) -> dict[str, int]:
    """The outermost keys with nothing chosen under them -> number of tensors under each."""
    above = {names[:depth] for names in chosen for depth in range(len(names) + 1)}
    held = Counter(names[:depth] for names in flat for depth in range(len(names) + 1))
    counts: dict[str, int] = {}
    waiting: list[tuple[Names, Any]] = [((), found)]
    while waiting:
        names, value = waiting.pop(0)
        for name, item in children(value, path).items():
            at = (*names, name)
            if at not in above:
                counts[".".join(at)] = held[at]
            elif at not in chosen:
                waiting.append((at, item))
    return counts


def inner(found: Any, key: str) -> Any:
    """The dict under a key, whose parts may have dots in them; None if there is none."""
    if not key or not isinstance(found, Mapping):
        return found
    for name, item in found.items():
        if key == str(name):
            return item
        if key.startswith(f"{name}.") and (below := inner(item, key[len(str(name)) + 1 :])) is not None:
            return below
    return None


def versions(found: Any, above: str = "") -> dict[str, Version] | None:
    """The versions of modules that a state dict states, or those in a dict. PyTorch keeps them in its
    attribute `_metadata`, and some layers read old tensors by them."""
    stated = getattr(found, "_metadata", None)
    known: dict[str, Version] | None = None
    if isinstance(stated, Mapping):
        known = {
            f"{above}{name}".removesuffix("."): local["version"]
            for name, local in stated.items()
            if isinstance(local, Mapping) and is_version(local.get("version"))
        }
    elif isinstance(found, Mapping) and above.count(".") < DEPTH:
        for name, item in found.items():
            if (more := versions(item, f"{above}{name}.")) is not None:
                known = (known or {}) | more
    return known


def listing(names: Mapping[Any, Any]) -> str:
    """Keys as a short text."""
    return few((repr(str(name)[:60]) for name in names), SHOWN)


def prefix_of(names: Sequence[str]) -> str:
    """The prefixes of wrappers that all names have: "module._orig_mod."; "" if some name has none."""
    found = ""
    while names and (word := next((w for w in WRAPPERS if all(n.startswith(found + w) for n in names)), "")):
        found += word
    return found if all(len(name) > len(found) for name in names) else ""
