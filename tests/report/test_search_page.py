"""The page that draws a search: every trial has a point where its numbers say, and names cannot break it."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.report.search_page import PLOT, Axis, page
from tests.report.test_html import HOSTILE, Page

BOUNDS = {"drop": 0.5, "nbytes": 100.0, "ratio": None}


def trial(name: str, drop: float, nbytes: int, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "recipe": "quantize", "why": "", "seconds": 1.0, "drop": [drop, drop - 0.1, drop + 0.1],
        "nbytes": nbytes, "latency": None, "over": [], **more,
    }  # fmt: skip


def search(*trials: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "budget": "drop<=0.5", "bounds": BOUNDS, "aim": "size", "decided_by": "train", "given_nbytes": 1000,
        "trials": trials, "best": trials[0]["name"], "unit": "points", **more,
    }  # fmt: skip


def circles(text: str) -> dict[str, dict[str, Any]]:
    """The points by the trial's name."""
    found = re.findall(
        r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)" r="\d"><title>(.*?): drop', text, re.DOTALL
    )
    return {name: {"kind": kind, "x": float(x), "y": float(y)} for kind, x, y, name in found}


def test_every_trial_has_a_point_where_its_numbers_say() -> None:
    rows = [trial("a", 0.1, 80), trial("b", 0.6, 40, over=["drop"]), trial("c", 9.0, 20, over=["drop"])]
    text = page(search(*rows, {**trial("d", 0.0, 0), "why": "no such weights"}))
    points = circles(text)
    assert {name: point["kind"] for name, point in points.items()} == {
        "a": "best",
        "b": "over",
        "c": "beyond",
    }
    assert points["c"]["x"] < points["b"]["x"] < points["a"]["x"]
    # Equal steps on a logarithmic axis: 80 to 40 to 20.
    assert points["a"]["x"] - points["b"]["x"] == pytest.approx(points["b"]["x"] - points["c"]["x"], abs=0.2)
    assert points["c"]["y"] == PLOT.y  # above the plot
    # The drop's axis goes from the lowest end of an interval to three times the bound.
    assert points["a"]["y"] == pytest.approx(PLOT.y + PLOT.h * (1.5 - 0.1) / 1.5, abs=0.1)
    assert text.count('class="bound"') == 2
    assert "refused (1): no such weights" in text


def test_speeds_have_a_plot_of_their_own_and_the_page_works_offline() -> None:
    latency = {"ratio": [2.0, 1.9, 2.1]}
    text = page(search(trial("a", 0.1, 80, latency=latency), bounds={**BOUNDS, "ratio": 2.0}))
    assert text.count("<figure") == 2
    elements = Page(text).elements
    assert not any("src" in attrs or "href" in attrs for _, attrs in elements)
    assert any(attrs.get("http-equiv") == "Content-Security-Policy" for _, attrs in elements)


def test_a_search_without_a_result_has_a_page() -> None:
    text = page(search({**trial("a", 0.0, 0), "why": "no"}, best=None))
    assert "None of 1 trials" in text
    assert "<figure" not in text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_and_not_run(name: str) -> None:
    elements = Page(
        page(search(trial(name, 0.1, 80, recipe=name), {**trial("b", 0, 0), "why": name}))
    ).elements
    assert {tag for tag, _ in elements}.isdisjoint({"script", "img"})
    assert not any(key.startswith("on") for _, attrs in elements for key in attrs)


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e6), st.booleans())
def test_ticks_are_few_and_within_the_axis(low: float, times: float, log: bool) -> None:
    axis = Axis(low, low * times, 0, 100, log)
    ticks = axis.ticks()
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    assert len(ticks) <= 40
    assert all(0 <= axis.place(tick) <= 100 for tick in ticks)
    assert [axis.place(tick) for tick in ticks] == sorted(axis.place(tick) for tick in ticks)
    assert axis.place(axis.low) == 0
    assert axis.place(axis.high) == 100


def test_intervals_without_an_end_and_values_that_are_no_numbers_are_drawn() -> None:
    wild = {**trial("a", 0.1, 80), "drop": [math.nan, -math.inf, math.inf]}
    for bounds in (BOUNDS, {**BOUNDS, "drop": None, "nbytes": None}):
        text = page(search(wild, trial("b", 0.2, 40), bounds=bounds))
        assert set(circles(text)) == {"a", "b"}
        assert not re.search(r'[xy]\d?="(nan|inf|-inf)"', text)
