"""Groups: which parameters of a training share a learning rate and a weight decay.

lr of a parameter = lr * schedule * factor      the factor of the first glob that its site's name matches
Matrices and convolutions decay; vectors do not. What is frozen is in no group: no optimizer moves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from tersor.errors import SettingError, SiteError, near_few
from tersor.model.trainable import TrainableForms


def factors_of(given: Any, who: str) -> str:
    """A setting lr_of in its one spelling, "head.*=10.0,*.bias=0.5", from that text, a mapping, or a list of
    either pairs or such texts; SettingError for any other."""
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
        if not isinstance(glob, str) or not glob.strip() or "," in glob or not 0 < value < math.inf:
            raise SettingError(
                f"{who}: lr_of={given!r}, but it is globs of weights with factors of lr above 0, such as "
                f"'head.*=10,*.bias=0.5' or {{'head.*': 10}}. To keep weights still freeze them, or leave "
                f"them out by where"
            )
        found.append(f"{glob.strip()}={value!r}")
    return ",".join(found)


def pairs(told: str) -> list[tuple[str, float]]:
    """(glob, factor) of what factors_of gives."""
    halves = (word.rpartition("=") for word in told.split(",") if word)
    return [(glob, float(factor)) for glob, _, factor in halves]


def groups_of(tuned: TrainableForms, lr_of: str, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with its "factor". SiteError for a glob that no parameter in training
    matches."""
    table, sites = pairs(lr_of), tuned.learning
    for glob, _ in table:
        if not any(fnmatchcase(site, glob) for site in sites):
            raise SiteError(
                f"training: lr_of: {glob!r} matches no weight that learns; "
                f"{near_few(glob, sites, 'those that learn are')}"
            )
    factor_of = {}
    for site in sites:
        factor = next((factor for glob, factor in table if fnmatchcase(site, glob)), 1.0)
        factor_of.update({id(parameter): factor for parameter in tuned.part_of(site).parameters()})
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    every = [p for p in tuned.parameters() if p.requires_grad]
    for decays in (True, False):
        for parameter in every:
            if (parameter.ndim >= 2) == decays:
                sort = weight_decay if decays else 0.0, factor_of.get(id(parameter), 1.0)
                found.setdefault(sort, []).append(parameter)
    return [{"params": p, "weight_decay": decay, "factor": factor} for (decay, factor), p in found.items()]
