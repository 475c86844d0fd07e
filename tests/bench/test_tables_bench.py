"""bench/tables.py and its rows: one an architecture, a quick one never replaces a whole one."""

import json
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tersor.core.recipe import Recipe
from tersor.core.state import start
from tersor.pipeline import run_pipeline
from tersor.steps import Quantize

Bench = Callable[[str], ModuleType]


def row(name: str, after: float, quick: bool = False) -> dict[str, Any]:
    return {
        "name": name, "quick": quick, "metric": "accuracy",
        "accuracy": {"before": [0.9, 0.88, 0.92], "after": [after, 0.8, 0.95], "drop": [1.5, 0.5, 2.5]},
        "latency": {"before": [2.0, 1.9, 2.1], "after": [0.5, 0.4, 0.6], "ratio": [4.0, 3.9, 4.1],
                    "noisy": False},
        "bytes": {"float": 1_000_000, "packed": 60_000, "onnx": 250_000},
        "trained": "finetune epochs=8", "compressed": "slim keep=0.5",
        "seconds": {"float": 600, "small": None}, "machine": "a CPU, load 1.0 of 2",
    }  # fmt: skip


def test_a_row_replaces_that_of_its_architecture(bench: Bench, tmp_path: Path) -> None:
    path, record = tmp_path / "tables.jsonl", bench("rows_file").record
    for given in (
        row("squeezenet", 0.1, quick=True), row("resnet18", 0.5), row("squeezenet", 0.2, quick=True),
        row("resnet18", 0.6), row("resnet18", 0.01, quick=True),
    ):  # fmt: skip
        record(given, path, itemgetter("name"))
    found = [(item["name"], item["accuracy"]["after"][0]) for item in map(json.loads, path.open())]
    assert found == [("resnet18", 0.6), ("squeezenet", 0.2)]


def test_rows_that_are_not_known_go(bench: Bench, tmp_path: Path) -> None:
    path, rows_file, name = tmp_path / "tables.jsonl", bench("rows_file"), itemgetter("name")
    for given in (row("squeezenet", 0.1), row("resnet18", 0.5)):
        rows_file.record(given, path, name)
    rows_file.keep({"resnet18", "vgg"}, path, name)
    assert [found["name"] for found in rows_file.read(path)] == ["resnet18"]


def test_the_zoo_has_a_line_for_each_architecture(bench: Bench) -> None:
    zoo = bench("zoo_table")
    text = zoo.text([row("resnet18", 0.885), row("squeezenet", 0.2, quick=True)])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| 90.0 | 88.5 | 1.50 (0.50 to 2.50) | 1,000,000 | 60,000 (6.0 %) | 250,000 (25.0 %) |" in text
    assert "4.00 (3.90 to 4.10)" in text
    assert "squeezenet (quick)" in lines
    for name in set(zoo.ZOO) - {"resnet18", "squeezenet"}:
        assert lines[name].startswith(f"| {name} | not measured |")


def test_rows_with_a_peer_are_beside_it(bench: Bench) -> None:
    zoo, timing = bench("zoo_table"), {"ratio": [2.0, 1.9, 2.1], "noisy": False}
    peer = {
        "method": "nncf-onnx-mixed", "bytes": 300_000, "accuracy": {"drop": [0.4, 0.1, 0.7]},
        "latency": {"onnxruntime": timing, "openvino": timing | {"ratio": [1.5, 0.9, 1.7], "noisy": True}},
    }  # fmt: skip
    alone, both = zoo.text([row("resnet18", 0.885)]), zoo.text([row("resnet18", 0.885) | {"peer": peer}])
    assert "NNCF" not in alone
    assert (
        "| resnet18 | 0.40 (0.10 to 0.70) | 1.50 (0.50 to 2.50) | 300,000 | 250,000 "
        "| 2.00 (1.90 to 2.10) | 1.50 (0.90 to 1.70), noisy |"
    ) in both


def test_quick_recipes_train_less_and_change_nothing_else(bench: Bench, tmp_path: Path) -> None:
    tables = bench("tables")
    whole, quick = (tables.recipe("zoo:yolo_lite:small", tmp_path / str(q), q) for q in (False, True))
    pairs = list(zip(*(tables.read_recipe(path).steps for path in (whole, quick)), strict=True))
    for a, b in pairs:
        assert replace(b, **({"epochs": a.epochs} if hasattr(a, "epochs") else {})) == a
    (distilled,) = (b.epochs / a.epochs for a, b in pairs if getattr(a, "epochs", 0))
    assert distilled == pytest.approx(0.02)
    assert tables.steps_in(whole).startswith("slim multiple=8 distill epochs=")


def test_a_row_states_the_recipes_that_ran(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of today: a training takes an hour, and recipes may change meanwhile."""
    tables = bench("tables")

    def run(model: str, task: str, out: Path, given: Path, *words: Any) -> None:
        bits = 8 if out.name == "float" else 3
        run_pipeline(start(nn.Linear(4, 4)), Recipe((Quantize(bits=bits),)), None, out)
        (out / tables.SECONDS).write_text("12\n")
        (out / "model.onnx").write_bytes(b"onnx")

    def command(*words: Any) -> str:
        Path(words[-1]).write_bytes(b"written")
        return ""

    found = {"metric": "accuracy", "accuracy": {}, "latency": {}}
    for name, value in {
        "run": run, "tersor": command, "compared": lambda *_: found, "PEERS": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(tables, name, value)
    options = SimpleNamespace(out=tmp_path, quick=False, weights=None)
    row = tables.measured("squeezenet", options)
    assert (row["trained"], row["compressed"]) == ("quantize", "quantize bits=3")
    assert row["seconds"] == {"float": 12, "small": 12}
    assert row["bytes"]["float"] == len(b"written")
