"""bench/comparisons.py and its page: every recipe is one of Tersor's, and each number is that of its row."""

import copy
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tersor.errors import SettingError
from tersor.steps import Entropy, recipe_from_words

Bench = Callable[[str], ModuleType]
ORT, VINO = "onnxruntime", "openvino"


def ratio(middle: float, noisy: bool = False) -> dict[str, Any]:
    alone = {"megabytes": 12.34, "seconds": [0.125, 0.12, 0.13]}
    return {
        "before": [0.25, 0.24, 0.26], "after": [0.25 / middle, 0.1, 0.4],
        "ratio": [middle, middle - 0.01, middle + 0.01], "noisy": noisy,
        "before alone": alone, "after alone": {"megabytes": 5.67, "seconds": [0.25, 0.24, 0.26]},
    }  # fmt: skip


def row(key: tuple[str, str, int], **more: Any) -> dict[str, Any]:
    net, recipe, seed = key
    return {
        "net": net, "recipe": recipe, "seed": seed, "quick": False, "machine": "a CPU, load 1.0 of 2",
        "trained": {"epochs": 12, "seconds": 645}, "energy": "not measured: no counter", "seconds": 25.4,
        "accuracy": {"before": [0.92, 0.91, 0.93], "after": [0.9, 0.89, 0.91], "drop": [2.0, 1.5, 2.5]},
        "bytes": {"given": 1000, "plain": 500, "coded": 125}, "weights": [400, 100], "macs": [4000, 1000],
    } | more  # fmt: skip


@pytest.fixture
def trials(bench: Bench) -> dict[str, list[Any]]:
    return bench("comparison_rows").TABLES


def lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield line.strip("| ").split(" | ")


def test_every_recipe_is_one_that_tersor_reads_and_ends_with_the_lossless_step(
    trials: dict[str, list[Any]],
) -> None:
    assert list(trials) == [*"abcdefg", "i"]
    refused = []
    for trial in (trial for rows in trials.values() for trial in rows):
        if not trial.words:
            assert trial.why, trial
            continue
        try:
            assert isinstance(recipe_from_words(trial.words.split()).steps[-1], Entropy), trial
        except SettingError:  # a row with this reason
            refused.append((trial.group, trial.label))
    groups = (f"{how}, 8-bit activations" for how in ("rounded", "trained"))
    assert refused == [(group, bits) for group in groups for bits in ("16", "1")]


def test_labels_of_a_group_differ(trials: dict[str, list[Any]]) -> None:
    for letter, rows in trials.items():
        places = [(trial.group, trial.label) for trial in rows]
        assert len(places) == len(set(places)), letter


def test_the_page_in_the_docs_is_that_of_the_rows(bench: Bench) -> None:
    page = bench("tables_page")
    assert page.PAGE.read_text() == page.written(), "run python bench/tables_page.py"


def test_every_recorded_row_is_in_a_table(bench: Bench, trials: dict[str, list[Any]]) -> None:
    known = {trial.key for rows in trials.values() for trial in rows}
    rows_file = bench("rows_file")
    rows = rows_file.read(rows_file.COMPARISON_ROWS)
    assert {(row["net"], row["recipe"], row["seed"]) for row in rows} <= known


def test_a_line_has_the_numbers_of_its_row(bench: Bench, trials: dict[str, list[Any]]) -> None:
    tables = bench("comparison_tables")
    trial = trials["b"][0]
    found = row(trial.key, runtimes={ORT: ratio(1.25), VINO: ratio(0.8, noisy=True)})
    line = tables.line(trial, found, tables.COLUMNS["b"])
    assert line == (
        "single weights", "90.00 (89.00 to 91.00)", "2.00 (1.50 to 2.50)", "100 (25.0 %)", "25.0 %",
        "1.25 (1.24 to 1.26)", "0.80 (0.79 to 0.81), noisy", "125 (12.5 %)", "25", f"`{trial.words}`",
    )  # fmt: skip
    running = tables.line(trial, found, tables.RUNNING)
    assert running[1] == "0.250 (0.240 to 0.260), 0.200 (0.100 to 0.400)"
    assert running[5:8] == (
        "12.3, 5.7", "0.125 (0.120 to 0.130), 0.250 (0.240 to 0.260)", "not measured: no counter"
    )  # fmt: skip


def test_what_is_not_measured_says_so_and_why(bench: Bench, trials: dict[str, list[Any]]) -> None:
    tables = bench("comparison_tables")
    columns = tables.COLUMNS["c"]
    first = trials["c"][0]
    assert tables.line(first, None, columns)[1] == "not measured"
    refused = {"net": "lenet5", "recipe": first.words, "seed": 0, "quick": False, "refused": "quantize: no"}
    assert tables.line(first, refused, columns)[1] == "quantize: no"
    absent = next(trial for trial in trials["b"] if trial.label == "blocks" and not trial.words)
    assert tables.line(absent, None, columns)[1] == "LeNet-5 has no residual branch"
    assert tables.speed(VINO)(row(first.key, runtimes={ORT: ratio(2)})) == "not measured"


def test_equal_accuracy_takes_the_fewest_weights_within_a_point(
    bench: Bench, trials: dict[str, list[Any]]
) -> None:
    tables = bench("comparison_tables")
    single = [trial for trial in trials["b"] if trial.label == "single weights" and trial.net == "lenet5"]
    kept, ends = (200, 100, 50), (0.4, 1.0, 1.01)
    rows = {
        trial.key: row(
            trial.key, weights=[400, left], accuracy=row(trial.key)["accuracy"] | {"drop": [0.1, 0.0, end]}
        )
        for trial, left, end in zip(single, kept, ends, strict=True)
    }
    assert list(lines(tables.equal_accuracy(rows)))[1:] == [
        ["single weights", "100 (25.0 %)", "0.10 (0.00 to 1.00)", "125 (12.5 %)"]
    ]


def test_equal_bytes_takes_the_least_drop_within_five_percent(
    bench: Bench, trials: dict[str, list[Any]]
) -> None:
    tables = bench("comparison_tables")
    linear = next(trial for trial in trials["d"] if trial.group == "linear")
    means = [trial for trial in trials["d"] if trial.group == "k-means"][:3]
    sizes = {linear: (300, 2.0), means[0]: (299, 3.0), means[1]: (315, 2.5), means[2]: (316, 1.0)}
    rows = {
        trial.key: row(
            trial.key,
            bytes={"given": 1000, "plain": 500, "coded": size},
            accuracy={"before": [1, 1, 1], "after": [1, 1, 1], "drop": [fall, fall - 0.1, fall + 0.1]},
        )
        for trial, (size, fall) in sizes.items()
    }
    (line,) = list(lines(tables.equal_bytes(rows)))[1:]
    assert line == [
        "300", f"2.00 (1.90 to 2.10); {linear.label}", "none fits",
        f"2.50 (2.40 to 2.60); {means[1].label}, 315 bytes",
    ]  # fmt: skip


def test_gains_are_paired_by_seed(bench: Bench, trials: dict[str, list[Any]]) -> None:
    """Gains 1, 2, 3 have the mean 2 and, by Student's table, the half width 4.303 / sqrt(3)."""
    tables = bench("comparison_tables")
    net = bench("comparison_rows").STUDENTS[0]
    rows = {}
    for trial in trials["e"]:
        if trial.net == net:
            value = 0.8 + 0.01 * trial.seed
            value += 0.01 * (1 + trial.seed) if "distill" in trial.words else 0
            accuracy = {"before": [0.9] * 3, "after": [value] * 3, "drop": [0.0] * 3}
            rows[trial.key] = row(trial.key, accuracy=accuracy)
    (line,) = [line for line in lines(tables.students(rows)) if line[0] == net]
    half = 4.302653 / math.sqrt(3)
    assert line[2:6] == [
        "81.00",
        "83.00",
        f"+2.00 ({2 - half:+.2f} to {2 + half:+.2f})",
        "+1.00, +2.00, +3.00",
    ]


def test_verdicts_follow_from_intervals(bench: Bench, trials: dict[str, list[Any]]) -> None:
    claims = {claim.text: claim for claim in bench("misconceptions").CLAIMS}
    assert len(claims) >= 5
    verdict = lambda claim, rows: bench("misconceptions").line(claim, claim.signs(rows))[1]  # noqa: E731
    zeros = claims["90 % zeros make a network ten times as fast."]
    (pruned,) = [trial for trial in trials["a"] if trial.words.startswith("prune keep=0.1")]
    assert verdict(zeros, {}) == "not measured"
    for middle, noisy, said in (
        (1.0, False, "**refuted**"),
        (1.0, True, "not refuted"),
        (10, False, "not refuted"),
    ):
        assert verdict(zeros, {pruned.key: row(pruned.key, runtimes={ORT: ratio(middle, noisy)})}) == said
    fewer = claims["A network with k times fewer MACs is k times as fast."]
    (slim,) = [trial for trial in trials["a"] if trial.words.startswith("slim keep=0.4 ")]
    for middle, said in ((3.5, "**refuted**"), (4.0, "not refuted")):  # 4 times fewer MACs
        assert verdict(fewer, {slim.key: row(slim.key, runtimes={ORT: ratio(middle)})}) == said
    means = claims["Shared values (k-means) beat linear levels at equal bytes."]
    linear = next(trial for trial in trials["d"] if trial.group == "linear")
    book = next(trial for trial in trials["d"] if trial.group == "k-means")
    for low, said in ((2.51, "**refuted**"), (2.5, "not refuted")):  # the linear file's ends at 2.5
        other = row(book.key, accuracy=row(book.key)["accuracy"] | {"drop": [3.0, low, 3.5]})
        assert verdict(means, {linear.key: row(linear.key), book.key: other}) == said
    files = claims["90 % zeros make a file ten times smaller."]
    for plain, said in ((101, "**refuted**"), (100, "not refuted")):
        found = row(pruned.key, bytes={"given": 1000, "plain": plain, "coded": 50})
        assert verdict(files, {pruned.key: found}) == said
    slower = claims["An int8 file is always faster."]
    integer = trials["i"][0]
    for seconds, said in (([0.25, 0.131, 0.3], "**refuted**"), ([0.25, 0.13, 0.3], "not refuted")):
        timed = ratio(1.0)  # 0.99 to 1.01; the given network takes 0.12 to 0.13 s
        timed["after alone"]["seconds"] = seconds
        assert verdict(slower, {integer.key: row(integer.key, runtimes={ORT: timed})}) == said
    four = claims["4 bits round without loss."]
    rounded = next(trial for trial in trials["c"] if trial.words == "quantize bits=4 entropy")
    for low, said in ((0.1, "**refuted**"), (-0.1, "not refuted")):
        found = copy.deepcopy(row(rounded.key))
        found["accuracy"]["drop"] = [0.2, low, 0.5]
        assert verdict(four, {rounded.key: found}) == said


def test_a_killed_run_continues_and_a_changed_recipe_is_a_new_row(
    bench: Bench, trials: dict[str, list[Any]]
) -> None:
    comparisons = bench("comparisons")
    trial, other = trials["c"][:2]
    whole, quick = row(trial.key), row(trial.key, quick=True)
    assert comparisons.done(trial, [whole], quick=False)
    assert comparisons.done(trial, [whole], quick=True)
    assert comparisons.done(trial, [quick], quick=True)
    assert not comparisons.done(trial, [quick], quick=False)
    assert not comparisons.done(other, [whole], quick=False)
    every = comparisons.asked(list(trials), quick=False)
    assert len({item.key for item in every}) == len(every)
    assert {item.key for rows in trials.values() for item in rows if item.words} == {t.key for t in every}
    for letter, given in trials.items():
        ends = comparisons.asked([letter], quick=True)
        assert 0 < len(ends) <= 2 * len({item.group for item in given})
        assert all(item.seed == 0 and item.net != "resnet20" for item in ends)
    timed = {item.key for rows in trials.values() for item in rows if item.timed}
    assert {item.key for item in every if item.timed} == timed


def test_without_its_networks_it_says_where_it_looked(bench: Bench, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("TERSOR_NETWORKS", str(tmp_path))
    comparisons = bench("comparisons")
    monkeypatch.setattr(comparisons.networks, "task", lambda: None)
    monkeypatch.setattr(comparisons.networks, "steady", lambda: None)  # it sets threads for the process
    monkeypatch.setattr(comparisons, "keep", lambda *_: pytest.fail("rows were touched"))
    with pytest.raises(SystemExit) as ended:
        comparisons.main(["c"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"bench: no lenet5.safetensors in {tmp_path}.")


def test_students_begin_from_the_weights_of_their_seed(bench: Bench, trials: dict[str, list[Any]]) -> None:
    made = bench("comparisons").made
    first, again, other = (
        made(next(trial for trial in trials["e"] if trial.seed == seed and trial.net == "lenet5:4,10,50"))
        for seed in (0, 0, 1)
    )
    assert first.conv2.weight.shape == (10, 4, 5, 5)
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)


def test_a_teacher_is_found_where_the_networks_are(bench: Bench, monkeypatch, tmp_path) -> None:
    (tmp_path / "lenet5.safetensors").touch()
    monkeypatch.setenv("TERSOR_NETWORKS", str(tmp_path))
    located = bench("comparisons").located
    assert located("distill teacher_file=lenet5.safetensors entropy") == (
        f"distill teacher_file={tmp_path}/lenet5.safetensors entropy"
    )
    assert located("quantize entropy") == "quantize entropy"
