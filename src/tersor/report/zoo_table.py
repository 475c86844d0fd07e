"""Zoo table: what `tersor zoo` prints: each architecture with its task, parameters and MACs.

Parameters and MACs are counted anew. Accuracy depends on the training: train one and measure it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tersor.errors import MissingError
from tersor.zoo.architectures import ZOO, entry, zoo_model
from tersor.zoo.scene_tasks import METRICS
from tersor.zoo.scenes import SIZE

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]
EXAMPLE = """tersor run zoo:{name} --task zoo:{name} --recipe zoo:{name} --out out
tersor unpack out/model.tersor -o trained.safetensors
tersor run zoo:{name} --weights trained.safetensors --task zoo:{name} --recipe zoo:{name}:small --out small"""


def described(name: str | None = None) -> dict[str, Any]:
    """All architectures, or one. SettingError for an unknown one."""
    if name is not None:
        entry(name)
    found = [facts_of(key) for key in ZOO if name in {None, key}]
    return {"size": SIZE, "zoo": found, "one": name is not None}


def facts_of(name: str) -> dict[str, Any]:
    """What is known of one; parameters and MACs are None if its package is not installed."""
    of = entry(name)
    facts: dict[str, Any] = {
        "name": name, "task": of.task, "metric": METRICS[of.task], "source": of.source, "licence": of.licence,
        "paper": of.paper, "about": of.about, "parameters": None, "macs": None, "missing": None,
    }  # fmt: skip
    try:
        net = zoo_model(name)
    except MissingError as error:
        return facts | {"missing": str(error)}
    return facts | {"parameters": sum(p.numel() for p in net.parameters()), "macs": macs(net)}


@torch.no_grad()
def macs(net: nn.Module) -> int:
    """Multiplications and additions of a forward of one image, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, 3, SIZE, SIZE))
    return counter.get_total_flops() // 2


def tables(facts: Facts) -> Iterator[RenderableType]:
    """The facts as tables for people."""
    from rich.table import Table

    if facts["one"]:
        (found,) = facts["zoo"]
        rows = Table(show_header=False, box=None)
        for key in ("task", "metric", "source", "licence", "paper", "about", "parameters", "macs"):
            rows.add_row(key, number(found[key]) if key in {"parameters", "macs"} else found[key])
        yield rows
        if found["missing"]:
            yield found["missing"]
        yield EXAMPLE.format(name=found["name"])
        return
    table = Table("zoo:", "task", "parameters", f"MACs, {facts['size']} px", "source", "about", box=None)
    for item in facts["zoo"]:
        table.add_row(
            item["name"], item["task"], number(item["parameters"]), number(item["macs"]), item["source"],
            item["about"],
        )  # fmt: skip
    yield table
    if any(item["missing"] for item in facts["zoo"]):
        yield "Rows with - need packages that are not installed: pip install 'tersor[zoo]'"
    yield "MODEL and TASK: zoo:NAME. More on one: tersor zoo NAME"


def number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
