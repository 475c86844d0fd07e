"""The results table parses, its verdicts follow from its values, and the page shows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tersor.core.run import run
from tersor.steps import Quantize

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_the_table_parses_and_each_row_has_a_value(bench):
    rows = bench("table").read()
    assert rows
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.bench, row
        assert row.subject, row
        assert row.measure, row
        assert float(row.value) == float(row.value), row  # no NaN


def test_verdicts_follow_from_values_and_targets(bench):
    for row in bench("table").read():
        assert bool(row.met) == bool(row.target), row
        if row.target:
            sign, limit = row.target.split()
            holds = {"<=": float(row.value) <= float(limit), ">=": float(row.value) >= float(limit)}[sign]
            assert row.met == ("yes" if holds else "no"), row


def test_every_bench_of_the_table_is_one_that_can_be_run(bench):
    benches = bench("run").BENCHES
    assert {row.bench for row in bench("table").read()} <= set(benches)


def test_the_page_is_what_the_script_writes(bench):
    page = bench("page")
    text = page.README.read_text()
    assert text == page.page(text, bench("table").read()), "run python bench/page.py"


def test_the_page_keeps_what_is_written_by_hand_and_shows_each_row(bench):
    page, Row = bench("page"), bench("table").Row
    text = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    rows = [Row("b", "s|t", "m", "1.5", "x", ">= 1", "yes", "n"), Row("b", "u", "m", "7")]
    once = page.page(text, rows)
    assert once.startswith(f"before\n{page.BEGIN}\n")
    assert once.endswith(f"{page.END}\nafter\n")
    assert "old" not in once
    assert "1 of 1 targets are met." in once
    assert "| b | s/t | m | 1.5 x | >= 1 | **yes** |\n" in once
    assert "| u | m | 7 |  |\n" in once
    assert page.page(once, rows) == once
    with pytest.raises(ValueError, match="lost its marks"):
        page.page("before after", rows)


@pytest.mark.wide
def test_a_bench_without_its_networks_says_where_it_looked(tmp_path):
    environment = os.environ | {"TERSOR_NETWORKS": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, BENCH / "lowrank.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"bench: no lenet300.safetensors in {tmp_path}.")
    assert "TERSOR_NETWORKS" in ran.stderr


def test_data_that_is_missing_is_named_with_the_way_out(bench, tmp_path, monkeypatch):
    from tersor.errors import MissingError

    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "none"))
    with pytest.raises(MissingError, match="dataset-fashion-mnist.*FASHION_MNIST"):
        bench("networks").task()


def test_networks_have_the_sizes_that_are_said(bench):
    networks = bench("networks")
    sizes = {"lenet300": 266_610, "lenet5": 431_080, "resnet20": 272_186, "vgg": 1_175_210}
    found = {name: networks.parameters(networks.NETWORKS[name]()) for name in sizes}
    assert found == sizes


@pytest.mark.parametrize("name", ["lenet300", "resnet20"])
def test_what_is_scored_is_what_the_file_holds(bench, name):
    """All benches score a new network with the weights of the file."""
    given = bench("networks").NETWORKS[name]()
    result = run(given, Quantize(bits=8))
    model, nbytes = bench("job").read_back(result, name)
    assert nbytes > sum(value.numel() for value in given.parameters())
    wanted = result.model().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_a_teacher_answers_from_memory_as_it_answered(bench):
    import torch

    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    images = torch.randn(301, 1, 3, 4)
    remembered = bench("distillation").Remembered(teacher, images)
    chosen = torch.randperm(301)[:57]
    with torch.no_grad():
        torch.testing.assert_close(remembered(images[chosen]), teacher(images[chosen]))
    with pytest.raises(ValueError, match="not seen"):
        remembered(images[:1] + 1)
