"""The facts of a run, and the tables made from them."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from tiny import CLASSES, tiny
from torch import nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.forms import Coded
from tersor.report.console import finite, p_value, ranged, seconds, settings, show, show_json, whole
from tersor.report.facts import facts_of, outline, unusual
from tersor.report.largest import ROWS
from tersor.report.table import report
from tersor.steps import Cluster, Entropy, Factorize, Finetune, Measure, Prune, Quantize

STEPS = (
    Prune(keep=0.25, where="0.weight"), Factorize(rank=40, where="2.weight"), Measure(), Finetune(),
    Quantize(bits=4), Entropy(), Measure(),
)  # fmt: skip


@pytest.fixture(scope="module")
def result() -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return run(model, STEPS, tiny("mlp").task)


@pytest.fixture
def facts(result: State) -> dict[str, Any]:
    return copy.deepcopy(facts_of(result))


def text_of(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    show(report(facts))
    return capsys.readouterr().out


def row(text: str, name: str) -> str:
    """The row of a table that begins with a name, with single spaces between words."""
    found = next(line for line in text.splitlines() if line.startswith(f" {name} "))
    return " ".join(found.split())


def test_facts_are_json_and_whole(facts: dict[str, Any], result: State) -> None:
    assert json.loads(json.dumps(facts)) == facts
    assert [step["step"] for step in facts["steps"]] == [step.name for step in STEPS]
    assert facts["ledger"] == result.ledger.digest
    assert all(step["seconds"] >= 0 for step in facts["steps"])


def test_every_entry_of_the_ledger_is_in_the_facts(facts: dict[str, Any], result: State) -> None:
    for entry in result.ledger.entries:
        step = facts["steps"][entry.step]
        if entry.is_edit:
            assert step["sites"][entry.site]["how"] == entry.how
            assert step["sites"][entry.site]["after"] == entry.after
        elif entry.site:
            assert step["sites"][entry.site]["text"] == entry.text
        elif entry.kind != "time":
            assert entry.text in [note["text"] for note in step["notes"]]


def test_bits_are_sums_over_all_sites(facts: dict[str, Any], result: State) -> None:
    assert facts["bits"]["stored"] == 8 * result.nbytes
    assert facts["bits"]["weights"] == 5 * 64 + 64 + 64 * CLASSES + CLASSES
    assert facts["bits"]["given"] == 32 * facts["bits"]["weights"]


def test_only_a_measure_after_the_last_edit_counts(result: State) -> None:
    *_, last = result.ledger.notes("accuracy")
    assert facts_of(result)["accuracy"] == last.data
    ended = copy.copy(result.ledger)
    ended.entries = [entry for entry in ended.entries if entry.step < 6]  # without the last measure
    from dataclasses import replace

    assert "accuracy" not in facts_of(replace(result, ledger=ended))


def test_layers_by_step(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(facts, capsys)
    head = row(text, "layer")
    for number, name in ((1, "prune"), (2, "factorize"), (4, "finetune"), (5, "quantize"), (6, "entropy")):
        assert f"{number} {name}" in head
    assert "measure" not in head  # it did nothing to a layer
    first, second, bias = (row(text, name).split() for name in ("0.weight", "2.weight", "2.bias"))
    assert first[1:4] == ["25.0%", "kept", "-"]
    assert second[1:3] == ["-", "skipped"]
    assert bias[1:4] == ["-", "-", "trained"]
    assert first[-2] == f"{facts['sites']['0.weight']['stored'] / 320:.2f}"


def test_what_was_skipped_has_its_reason(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(facts, capsys)
    assert "    2.weight skipped: rank 40 stores" in text
    assert "2 factorize: 1 skipped;" in text


HEAD = {
    "accuracy": {"before": [0.9837, 0.9723, 0.9904], "after": [0.9812, 0.9691, 0.9887],
                 "drop": [0.25, -0.31, 0.81], "p": 0.625, "n": 797},
    "metric": "accuracy",
    "files": {"given": {"nbytes": 360472}, "result": {"nbytes": 11903}},
    "latency": {"before": [0.0602, 0.0593, 0.0616], "after": [0.0501, 0.0495, 0.0515],
                "ratio": [1.2, 1.15, 1.25]},
}  # fmt: skip


def test_headline(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of({**facts, **HEAD}, capsys)
    assert row(text, "accuracy, %") == "accuracy, % 98.37 98.12 drop 0.25 points (95 %: -0.31 to 0.81)"
    within = "97.23 - 99.04 96.91 - 98.87 not significant: p = 0.62, paired, n = 797"
    assert row(text, "  95 % interval") == f"95 % interval {within}"
    assert row(text, "file, bytes") == "file, bytes 360,472 11,903 30.3 x smaller, all included"
    assert "1.20 x as fast (95 %: 1.15 to 1.25)" in row(text, "ONNX Runtime, ms")
    assert " faster" in text


def test_latency_names_its_runtime(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of({**facts, **HEAD, "latency": {**HEAD["latency"], "runtime": "openvino"}}, capsys)
    assert "1.20 x as fast" in row(text, "OpenVINO, ms")
    assert "ONNX" not in text


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        ((0.8, 0.7, 0.94), "slower"),
        ((1.01, 1.003, 1.02), "the same within 5%"),
        ((1.1, 0.9, 1.3), "no clear difference"),
        ((1.06, 1.04, 1.08), "no clear difference"),
    ],
)
def test_faster_needs_a_clear_difference(
    facts: dict[str, Any], capsys: pytest.CaptureFixture[str], ratio: tuple[float, ...], says: str
) -> None:
    text = text_of({**facts, **HEAD, "latency": {**HEAD["latency"], "ratio": list(ratio)}}, capsys)
    assert says in text
    assert "faster" not in text


def test_a_significant_drop_is_named(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of({**facts, **HEAD, "accuracy": {**HEAD["accuracy"], "p": 0.049}}, capsys)
    assert "significant: p = 0.049" in text
    assert "not significant" not in text


def test_what_was_not_measured_is_absent(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    del facts["accuracy"]
    text = text_of(facts, capsys).split("layer")[0]
    assert "accuracy" not in text
    assert "ONNX" not in text
    assert "file" not in text
    assert "bits a weight" in text


def test_an_interval_that_is_not_known(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {
        "before": [0.5, None, None],
        "after": [0.4, None, None],
        "drop": [10.0, None, None],
        "p": 1.0,
        "n": 1,
    }
    text = text_of({**facts, **HEAD, "accuracy": unknown}, capsys)
    assert (
        row(text, "  95 % interval") == "95 % interval unknown unknown not significant: p = 1, paired, n = 1"
    )
    assert "drop 10.00 points (95 %: unknown)" in text


def test_large_models_are_cut_and_say_so(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    site = facts["sites"]["0.weight"]
    facts["sites"] = {f"layer{n}.weight": {**site, "stored": 8000 - 8 * n} for n in range(ROWS + 5)}
    facts["sites"] |= {f"bn{n}.mean": {**site, "kind": "buffer", "stored": 4000} for n in range(4)}
    text = text_of(facts, capsys)
    rest = sum(1000 - n for n in range(ROWS, ROWS + 5))
    assert f"\n5 more layers, {rest:,} bytes\n4 buffers, 2,000 bytes\n--all shows every row\n" in text
    assert f"layer{ROWS - 1}.weight" in text
    assert f"layer{ROWS}.weight" not in text
    assert "bn0" not in text
    capsys.readouterr()
    show(report(facts, every=True))
    every = capsys.readouterr().out
    assert all(f" {name} " in every for name in facts["sites"])
    assert "--all" not in every


GOLDEN = """
                 before    after
 ───────────────────────────────────────────────────────────────
 bits a weight   32.000   11.527   entropy bound 3.450 (order 0)


 layer         1 quantize    bits   bound
 ────────────────────────────────────────
 fc.weight     16 values     4.00    3.90
 conv.weight   2.0% kept     8.00    3.00
 conv.bias     -            32.00   32.00

2 buffers, 16 bytes
--all shows every row
1 quantize: 2 done, 2 skipped; cut 1 to 2: outputs differ by 1e-15 of 3 (2 times); trained; 1.5 s
    a.mean, b.mean skipped: its 8 to 12 bytes stay
"""


def test_a_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    def site(weights: int, bits: float, bound: float, kind: str = "conv") -> dict[str, Any]:
        return {"weights": weights, "stored": bits * weights, "bound": bound * weights, "kind": kind}

    said = [f"cut {n}: outputs differ by 1e-15 of 3" for n in (1, 2)]
    step = {
        "step": "quantize", "settings": {}, "seconds": 1.5,
        "notes": [{"kind": "proved", "text": text} for text in [*said, "trained"]],
        "sites": {
            "conv.weight": {"did": "done", "how": "refine", "data": {"kept": 2}},
            "fc.weight": {"did": "done", "how": "refine", "data": {"entries": 16}},
            "a.mean": {"did": "skipped", "text": "its 8 bytes stay"},
            "b.mean": {"did": "skipped", "text": "its 12 bytes stay"},
        },
    }  # fmt: skip
    facts = {
        "bits": {"weights": 1000, "given": 32_000, "stored": 11_527, "bound": 3450}, "steps": [step],
        "sites": {
            "conv.weight": site(100, 8, 3), "conv.bias": site(10, 32, 32), "fc.weight": site(400, 4, 3.9),
            "a.mean": site(2, 32, 32, "buffer"), "b.mean": site(2, 32, 32, "buffer"),
        },
    }  # fmt: skip
    lines = [line.rstrip() for line in text_of(facts, capsys).splitlines()]
    assert "\n".join(lines) + "\n" == GOLDEN


def test_layers_with_long_names_are_distinct(
    facts: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{'encoder.layers.' * 6}{n}.weight" for n in range(3)]
    facts["sites"] = dict.fromkeys(names, facts["sites"]["0.weight"])
    lines = text_of(facts, capsys).splitlines()
    assert all(sum(line.startswith(f" {name} ") for line in lines) == 1 for name in names)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    text = "".join(line[1:].split("  ")[0].strip() for line in text_of(facts, capsys).splitlines())
    assert all(name in text for name in names)


def test_a_few_of_many_skipped_layers_are_named(
    facts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """33 batch counters used to fill one line."""
    step = facts["steps"][0]
    step["sites"] = {f"bn{n}.count": {"did": "skipped", "text": "int64"} for n in range(33)}
    text = text_of(facts, capsys)
    assert (
        "    bn0.count, bn1.count, bn2.count, bn3.count, bn4.count, bn5.count and 27 more skipped: int64"
        in text
    )
    step["sites"] = {f"bn{n}.count": {"did": "skipped", "text": "int64"} for n in range(2)}
    assert "    bn0.count, bn1.count skipped: int64" in text_of(facts, capsys)


def test_names_are_not_markup(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    facts["sites"] = {"[red]a[/red]": facts["sites"]["0.weight"], ":smile:": facts["sites"]["0.bias"]}
    text = text_of(facts, capsys)
    assert "[red]a[/red]" in text
    assert ":smile:" in text


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"a": math.inf, "b": [math.nan, 1.5], "c": (1, {"d": -math.inf})})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [1, {"d": None}]}
    assert finite(True) is True


def test_outlines() -> None:
    weight = torch.randn(64, 64)
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.copy_(weight)
    found = run(model, [Prune(keep=0.2), Cluster(), Entropy()]).forms["weight"]
    assert outline(found) == "Masked(Coded bool, Codebook(Coded uint8, Dense float32))"
    assert sum(isinstance(node, Coded) for _, node in found.walk()) == 2
    found = run(model, Quantize(bits=5)).forms["weight"]
    assert outline(found) == "Affine(5 bits, Dense int8, Dense float32)"


def test_unusual_settings() -> None:
    assert unusual({"step": "prune", "settings": {"keep": 0.1, "per": "lamp"}}) == {"keep": 0.1}
    assert unusual({"step": "of another version", "settings": {"a": 1}}) == {"a": 1}


def test_numbers() -> None:
    words = settings(
        {"keep": 0.1, "epochs": 40.0, "rank": None, "bf16": True, "where": ("a*", "!b"), "bits": 8}
    )
    assert words == "keep=0.1 epochs=40 rank=none bf16=true where=a*,!b bits=8"
    assert whole(1234567) == "1,234,567"
    assert [seconds(s) for s in (0.04, 59.96, 300)] == ["0.0 s", "60.0 s", "5.0 min"]
    assert [p_value(p) for p in (1e-9, 0.0123, 0.5, 1.0)] == ["p < 0.001", "p = 0.012", "p = 0.5", "p = 1"]
    assert ranged((0.123, 4.5), 1, "to") == "0.1 to 4.5"


def test_another_metric_has_its_own_unit(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = {"before": [12.5, 12.0, 13.0], "after": [12.75, 12.2, 13.3], "drop": [0.25, 0.1, 0.4], "p": 0.01,
             "n": 50, "metric": "perplexity", "unit": "", "better": "lower"}  # fmt: skip
    text = text_of({**facts, "accuracy": found}, capsys)
    assert row(text, "perplexity, lower is better") == (
        "perplexity, lower is better 12.5000 12.7500 drop 0.2500 (95 %: 0.1000 to 0.4000)"
    )
    assert "points" not in text.split("file, bytes")[0].split("bits a weight")[0]
    share = {**found, "before": [0.5, 0.4, 0.6], "after": [0.45, 0.4, 0.5], "drop": [5.0, 1.0, 9.0],
             "metric": "mean_iou", "unit": "points", "better": "higher"}  # fmt: skip
    table_row = row(text_of({**facts, "accuracy": share}, capsys), "mean_iou, %")
    assert table_row == "mean_iou, % 50.00 45.00 drop 5.00 points (95 %: 1.00 to 9.00)"
