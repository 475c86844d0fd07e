"""Zoo table: what `tersor zoo` prints: each architecture with its task, sizes, accuracy and time.

Parameters and MACs are counted anew; what was measured comes from zoo/measured.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tersor.errors import MissingError
from tersor.zoo.architectures import ZOO, entry, zoo_model
from tersor.zoo.measured import measured, suits
from tersor.zoo.scene_tasks import METRICS
from tersor.zoo.scenes import SIZE

if TYPE_CHECKING:
    from rich.console import RenderableType

Facts = Mapping[str, Any]
EXAMPLE = (
    "tersor run zoo:{name} --task zoo:{name} --recipe zoo:{name} --out out",
    "tersor unpack out/model.tersor -o trained.safetensors",
    "tersor run zoo:{name} --weights trained.safetensors --task zoo:{name} --recipe zoo:{name}:small "
    "--out small",
)
MEASURED = (
    "%, kB, ms: of the trained network, then of --recipe zoo:NAME:small; 1,000 test scenes, ONNX "
    "Runtime, one image, one thread, {machine}. How: docs/tables.md (h)"
)


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
        "measured": found(name), "suits": suits(name),
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


def found(name: str) -> dict[str, Any] | None:
    """What was measured, before and after compression; None if nothing was."""
    row = measured().get(name)
    if row is None:
        return None
    ends = ("before", "after")
    return {
        "metric": [row["accuracy"][end][0] for end in ends],
        "bytes": [row["bytes"]["float"], row["bytes"]["packed"]],
        "onnx_bytes": row["bytes"]["onnx"],
        "milliseconds": [row["latency"][end][0] for end in ends],
        "trained": row["trained"], "compressed": row["compressed"], "machine": row["machine"],
    }  # fmt: skip


def tables(facts: Facts) -> Iterator[RenderableType]:
    """The facts as tables for people."""
    from rich.table import Table

    if facts["one"]:
        (item,) = facts["zoo"]
        rows = Table(show_header=False, box=None)
        for key in ("task", "metric", "source", "licence", "paper", "about"):
            rows.add_row(key, item[key])
        for key in ("parameters", "macs"):
            rows.add_row(key, number(item[key]))
        for key, text in zip(("%", "kB", "ms"), cells(item), strict=True):
            rows.add_row(key, text)
        for target, why in item["suits"].items():
            rows.add_row(f"suits {target}", why)
        yield rows
        if item["missing"]:
            yield item["missing"]
        yield from measured_how(facts)
        yield from (line.format(name=item["name"]) for line in EXAMPLE)
        return
    table = Table(
        "zoo:", "task", "parameters", f"MACs, {facts['size']} px", "metric", "%", "kB", "ms", "suits",
        box=None,
    )  # fmt: skip
    for item in facts["zoo"]:
        table.add_row(
            item["name"], item["task"], number(item["parameters"]), number(item["macs"]), item["metric"],
            *cells(item), ", ".join(item["suits"]),
        )  # fmt: skip
    yield table
    if any(item["missing"] for item in facts["zoo"]):
        yield "Rows with - need packages that are not installed: pip install 'tersor[zoo]'"
    yield from measured_how(facts)
    yield "suits: cloud, the best metric; mobile, the fewest ms; edge, the smallest file, of the same metric"
    yield "MODEL and TASK: zoo:NAME. More on one: tersor zoo NAME"


def cells(item: Facts) -> tuple[str, str, str]:
    """Metric in percent, kilobytes and milliseconds, before and after."""
    of = item["measured"]
    if of is None:
        return "-", "-", "-"
    return (
        ", ".join(f"{100 * value:.1f}" for value in of["metric"]),
        ", ".join(f"{size / 1000:,.0f}" for size in of["bytes"]),
        ", ".join(f"{value:.2f}" for value in of["milliseconds"]),
    )


def measured_how(facts: Facts) -> Iterator[str]:
    machines = {
        item["measured"]["machine"].partition(", load")[0] for item in facts["zoo"] if item["measured"]
    }
    if machines:
        yield MEASURED.format(machine="; ".join(sorted(machines)))


def number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
