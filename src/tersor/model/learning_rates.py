"""Learning rates: parameter groups of the optimizer, each with one learning rate factor and weight decay.

lr of a parameter = lr * schedule * factor      factor: that of the first glob that matches its site's name
Matrices and convolutions have weight decay; vectors do not. Frozen parameters are in no group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from tersor.errors import SettingError, SiteError, near_few
from tersor.model.trainable_forms import TrainableForms

MOST = 1e6  # of a rate, a factor and what else optimizers multiply in float32


def factors_of(given: Any, who: str) -> str:
    """The setting lr_of in its normal form, "head.*=10.0,*.bias=0.5", from such a text, a mapping, or a list
    of pairs or texts. SettingError for anything else."""
    if isinstance(given, str):
        items: list[Any] = [word for word in map(str.strip, given.split(",")) if word]
    elif isinstance(given, Mapping):
        items = list(given.items())
    else:
        items = list(given) if isinstance(given, (list, tuple)) else [given]
    found = []
    for item in items:
        glob, _, factor = item.rpartition("=") if isinstance(item, str) else ("", "", "")
        if isinstance(item, (list, tuple)) and len(item) == 2:
            glob, factor = item
        try:
            value = float(factor)
        except (TypeError, ValueError):
            value = math.nan
        if not isinstance(glob, str) or not glob.strip() or "," in glob or not 0 < value <= MOST:
            raise SettingError(
                f"{who}: lr_of={given!r}, but it must be globs of weights with factors of lr above 0, up to "
                f"1e6, such as 'head.*=10,*.bias=0.5' or {{'head.*': 10}}. To keep weights unchanged, freeze "
                f"them or leave them out with where"
            )
        found.append(f"{glob.strip()}={value!r}")
    return ",".join(found)


def pairs(lr_of: str) -> list[tuple[str, float]]:
    """The (glob, factor) pairs of a text from factors_of."""
    halves = (word.rpartition("=") for word in lr_of.split(",") if word)
    return [(glob, float(factor)) for glob, _, factor in halves]


def check_globs(lr_of: str, sites: Collection[str], who: str, noun: str, plural: str) -> None:
    """SiteError for a glob of lr_of that matches none of the sites."""
    for glob, _ in pairs(lr_of):
        if not any(fnmatchcase(site, glob) for site in sites):
            raise SiteError(f"{who}: lr_of: {glob!r} matches no {noun}; {near_few(glob, sites, plural)}")


def groups_of(trainable: TrainableForms, lr_of: str, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, each with its "factor". SiteError for a glob that matches no site in
    training."""
    table, sites = pairs(lr_of), trainable.learning
    check_globs(lr_of, sites, "training", "weight that learns", "those that learn are")
    factor_of = {}
    for site in sites:
        factor = next((factor for glob, factor in table if fnmatchcase(site, glob)), 1.0)
        factor_of.update({id(parameter): factor for parameter in trainable.part_of(site).parameters()})
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    every = [p for p in trainable.parameters() if p.requires_grad]
    for decays in (True, False):
        for parameter in every:
            if (parameter.ndim >= 2) == decays:
                key = weight_decay if decays else 0.0, factor_of.get(id(parameter), 1.0)
                found.setdefault(key, []).append(parameter)
    return [{"params": p, "weight_decay": decay, "factor": factor} for (decay, factor), p in found.items()]
