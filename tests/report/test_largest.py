"""Largest: what a table shows of many sites, what its last lines say, and notes that are summed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.report.largest import ROWS, folded, largest, summed

SITES = {f"w{n}": {"stored": 8 * n, "kind": "linear"} for n in range(40)}
BUFFERS = {f"b{n}": {"nbytes": 1000, "stored": 0, "kind": "buffer"} for n in range(3)}


def test_the_largest_come_first_and_the_rest_is_counted() -> None:
    rows = largest(SITES | BUFFERS)
    assert rows.shown == [f"w{n}" for n in range(39, 39 - ROWS, -1)]
    assert (len(rows.more), rows.buffers) == (40 - ROWS, ["b0", "b1", "b2"])
    assert list(folded(rows, SITES | BUFFERS, "layer")) == [
        f"{40 - ROWS} more layers, {sum(range(40 - ROWS))} bytes", "3 buffers, 3,000 bytes",
        "--all shows every row",
    ]  # fmt: skip


def test_every_row_on_request_and_no_line_for_one_site() -> None:
    rows = largest(SITES | BUFFERS, every=True)
    assert len(rows.shown) == 43
    assert list(folded(rows, SITES | BUFFERS, "layer")) == []
    few = {name: SITES[name] for name in list(SITES)[:ROWS]} | {"b": BUFFERS["b0"]}
    assert len(largest(few).shown) == ROWS + 1, "one more row, and one buffer among the largest, are shown"
    assert largest(few).shown[0] == "b"
    assert largest(few).more == []


@given(st.lists(st.integers(0, 100), max_size=80), st.lists(st.booleans(), max_size=80))
def test_no_site_is_lost(sizes: list[int], kinds: list[bool]) -> None:
    sites = {
        f"s{n}": {"nbytes": size, "kind": "buffer" if buffer else "conv"}
        for n, (size, buffer) in enumerate(zip(sizes, kinds, strict=False))
    }
    rows = largest(sites)
    assert sorted([*rows.shown, *rows.more, *rows.buffers]) == sorted(sites)
    assert all(sites[a]["nbytes"] >= sites[b]["nbytes"] for a in rows.shown for b in rows.more)
    assert len(rows.shown) <= ROWS + 1


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["no coder shortens its 12 bytes", "no coder shortens its 1,160 bytes"],
         ["no coder shortens its 12 to 1,160 bytes (2 times)"]),
        (["same", "same", "other"], ["same (2 times)", "other"]),
        (["cut 1: differ by 1.3e-15 of 2.83", "kept", "cut 2: differ by 9e-16 of 2.83"],
         ["cut 1 to 2: differ by 9e-16 to 1.3e-15 of 2.83 (2 times)", "kept"]),
        (["layer1.0.bn1 folded into it", "layer2.3.bn1 folded into it"],
         ["layer1.0.bn1 folded into it", "layer2.3.bn1 folded into it"]),
        (["0.weight: 3 zeros", "2.weight: 3 zeros"], ["0.weight: 3 zeros", "2.weight: 3 zeros"]),
        (["359720 to 3357 bytes; 0.98 to 0.99 (p = 1)"], ["359720 to 3357 bytes; 0.98 to 0.99 (p = 1)"]),
        (["64 x 3 -> 5", "64 x 3 -> 7, done"], ["64 x 3 -> 5", "64 x 3 -> 7, done"]),
        ([], []),
    ],
)  # fmt: skip
def test_notes_with_equal_words_are_one(texts: list[str], found: list[str]) -> None:
    assert summed(texts) == found


@given(st.lists(st.text("ab 1.0,:-%e", max_size=12), max_size=6))
def test_any_texts_can_be_summed(texts: list[str]) -> None:
    assert len(summed(texts)) <= len(texts)
    assert summed(texts[:1]) == texts[:1]
