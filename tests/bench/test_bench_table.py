"""bench/table.py: rows replace rows of the same key, and targets are judged."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "bench" / "table.py"
spec = importlib.util.spec_from_file_location("bench_table", PATH)
assert spec is not None
assert spec.loader is not None
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)
Row, record, read = table.Row, table.record, table.read


def test_rows_replace_rows_and_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    record([Row("b", "x", "size", 3, "B"), Row("a", "y", "size", 2.345678, "%")], path)
    record([Row("b", "x", "size", 4, "B"), Row("b", "a, b", "note", 'said "so"')], path)
    assert path.read_text().splitlines() == [
        "bench,subject,measure,value,unit,target,met,note",
        "a,y,size,2.346,%,,,",
        'b,"a, b",note,"said ""so""",,,,',
        "b,x,size,4,B,,,",
    ]
    assert [row.key for row in read(path)] == [("a", "y", "size"), ("b", "a, b", "note"), ("b", "x", "size")]
    before = path.read_text()
    record([], path)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [(150, ">= 150", "yes"), (149.9, ">= 150", "no"), (1.0, "<= 1", "yes"), (1.2, "<= 1", "no"), (5, "", "")],
)
def test_targets(tmp_path: Path, value: float, target: str, met: str) -> None:
    record([Row("b", "x", "m", value, target=target)], tmp_path / "r.csv")
    assert read(tmp_path / "r.csv")[0].met == met


def test_what_is_not_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        record([], tmp_path / "r.csv")
    with pytest.raises(ValueError, match="begin with"):
        record([Row("b", "x", "m", 1, target="< 3")], tmp_path / "new.csv")
