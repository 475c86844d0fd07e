"""Budgets in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.search.budget import Bound, Budget, read_budget

NUMBERS = st.floats(1e-3, 1e6)


def test_a_budget_in_words() -> None:
    assert read_budget("drop<=0.5") == Budget(drop=0.5)
    assert read_budget("size<=10%, latency<=50%") == Budget(
        None, Bound(0.1, True), Bound(0.5, True), "onnxruntime"
    )
    found = read_budget("drop <= 1,size<=200kB,latency<=2ms@openvino")
    assert found == Budget(1.0, Bound(200_000, False), Bound(2.0, False), "openvino")
    assert read_budget("latency<=1s").latency == Bound(1000.0, False)
    assert read_budget("size<=3MB").size == Bound(3e6, False)


@given(NUMBERS, NUMBERS, NUMBERS, st.booleans(), st.booleans())
def test_what_is_printed_is_read_back(drop: float, size: float, ms: float, one: bool, two: bool) -> None:
    drop, size, ms = (float(f"{value:g}") for value in (drop, size, ms))  # as it is printed
    budget = Budget(drop, Bound(size, one), Bound(ms, two), "openvino")
    again = read_budget(str(budget))
    assert again.drop == budget.drop
    assert again.runtime == budget.runtime
    for bound, same in ((budget.size, again.size), (budget.latency, again.latency)):
        assert bound is not None
        assert same is not None
        assert same.share == bound.share
        assert same.most == pytest.approx(bound.most, rel=1e-5)


def test_a_share_is_of_the_given_model_and_a_number_is_not() -> None:
    assert Bound(0.1, True).used(5, 100) == 0.5
    assert Bound(10, False).used(20, 1000) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" , ", "is empty"),
        ("drop", "is no bound"),
        ("drop<0.5", "is no bound"),
        ("drop>=0.5", "is no bound"),
        ("sise<=10%", "did you mean 'size'"),
        ("drop<=5%", "a plain number, in points"),
        ("size<=10", "in %, B, kB, MB, GB"),
        ("size<=10KB", "in %, B, kB, MB, GB"),
        ("latency<=10", "in %, ms, s"),
        ("drop<=0", "no number above 0"),
        ("drop<=-1", "no number above 0"),
        ("drop<=1e999", "no number above 0"),
        ("size<=1.2.3kB", "no number above 0"),
        ("drop<=1,drop<=2", "bounded twice"),
        ("size<=10%@openvino", "only latency is measured in a runtime"),
        ("latency<=50%@opnvino", "did you mean 'openvino'"),
        ("energy<=50%", "no counter of energy"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        read_budget(text)
