"""Latency with a simulated clock: the order of calls, and the numbers that follow from it."""

import gc
import time
from collections.abc import Callable
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import SettingError
from tersor.measure import latency
from tersor.measure.latency import Timing, interleave, ratio

MS = 1_000_000


class Machine:
    """A clock in ns that only the candidates advance, each by its cost times the current drift."""

    def __init__(self, drift: Callable[[int], float] = lambda now: 1.0):
        self.now, self.drift, self.calls = 0, drift, [""][:0]
        self.before = ""

    def candidate(self, name: str, cost_ms: float, cold_ms: float = 0.0) -> Callable[[], None]:
        def run() -> None:
            cold = cold_ms if self.before != name else 0.0
            self.now += round((cost_ms + cold) * MS * self.drift(self.now))
            self.calls.append(name)
            self.before = name

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(latency, "perf_counter_ns", lambda: made.now)
    return made


def test_the_order_of_calls(machine: Machine) -> None:
    runs = {
        "a": machine.candidate("a", 1.0),
        "b": machine.candidate("b", 2.5),
        "c": machine.candidate("c", 9.0),
    }
    found = interleave(runs, rounds=3, burst_ms=5.0, warmup_ms=20.0)
    bursts: list[tuple[str, int]] = []
    for name in machine.calls:
        if bursts and bursts[-1][0] == name:
            bursts[-1] = (name, bursts[-1][1] + 1)
        else:
            bursts.append((name, 1))
    # 20 calls, 8, and 3 of warming up; then bursts of 5, 2 and 1, each after one call that is not timed.
    # The order turns after each round, so the last of one round is the first of the next.
    assert bursts == [
        ("a", 20),
        ("b", 8),
        ("c", 3),
        ("a", 6),
        ("b", 3),
        ("c", 4),
        ("b", 3),
        ("a", 12),
        ("b", 3),
        ("c", 2),
    ]
    assert {name: timing.calls for name, timing in found.items()} == {"a": 5, "b": 2, "c": 1}
    assert {name: timing.rounds for name, timing in found.items()} == {
        "a": (1.0,) * 3, "b": (2.5,) * 3, "c": (9.0,) * 3
    }  # fmt: skip


def test_drift_cancels_in_the_ratio(machine: Machine) -> None:
    """The machine gets three times slower: medians change, the ratio does not."""
    machine.drift = lambda now: 1 + 2 * now / (1200 * MS)
    runs = {"slow": machine.candidate("slow", 0.2), "fast": machine.candidate("fast", 0.1)}
    found = interleave(runs, rounds=41)
    slow = found["slow"]
    assert slow.low < slow.median_ms < slow.high
    assert max(slow.rounds) > 1.5 * min(slow.rounds)
    middle, low, high = ratio(found["slow"], found["fast"])
    assert 1.95 < low <= middle <= high < 2.05
    back = ratio(found["fast"], found["slow"])
    assert back.middle == pytest.approx(1 / middle)


def test_empty_caches_are_not_charged(machine: Machine) -> None:
    runs = {"a": machine.candidate("a", 1.0, cold_ms=3.0), "b": machine.candidate("b", 1.0)}
    found = interleave(runs, rounds=5)
    assert found["a"].median_ms == pytest.approx(1.0)


def test_outliers_do_not_move_the_median(machine: Machine) -> None:
    count = 0

    def drift(_: int) -> float:
        nonlocal count
        count += 1
        return 50.0 if count % 97 == 0 else 1.0

    machine.drift = drift
    found = interleave({"a": machine.candidate("a", 1.0)}, rounds=40)
    assert found["a"].median_ms == pytest.approx(1.0)
    assert max(found["a"].rounds) > 10


def test_a_call_too_short_for_the_clock(machine: Machine) -> None:
    found = interleave({"a": lambda: None, "b": machine.candidate("b", 1.0)}, rounds=1, warmup_ms=0)
    assert found["a"].calls == latency.MOST_CALLS
    with pytest.raises(SettingError, match="rounds of 0 ms"):
        ratio(found["b"], found["a"])


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=50), st.integers(0, 9))
def test_the_ratio_is_the_median_of_the_rounds_ratios(times: list[float], seed: int) -> None:
    others = times[seed % len(times) :] + times[: seed % len(times)]
    found = ratio(Timing(0, 0, 0, tuple(times), 1), Timing(0, 0, 0, tuple(others), 1))
    each = sorted(a / b for a, b in zip(times, others, strict=True))
    assert found.middle == median(each)
    assert found.low <= found.middle <= found.high
    assert {found.low, found.high} <= set(each)


def test_real_time() -> None:
    runs = {"one": lambda: time.sleep(0.001), "three": lambda: time.sleep(0.003)}
    seen: list[tuple[int, int]] = []
    found = interleave(
        runs, rounds=9, burst_ms=3, warmup_ms=1, watch=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 9) for i in range(1, 10)]
    assert found["one"].median_ms >= 1
    assert found["three"].median_ms >= 3
    assert ratio(found["three"], found["one"]).middle > 1.2


def test_the_collector_is_as_it_was() -> None:
    def fails() -> None:
        assert not gc.isenabled()
        raise OSError("broken")

    assert gc.isenabled()
    interleave({"a": lambda: None}, rounds=1, burst_ms=0.01, warmup_ms=0)
    assert gc.isenabled()
    with pytest.raises(OSError, match="broken"):
        interleave({"a": fails})
    assert gc.isenabled()
    gc.disable()
    try:
        interleave({"a": lambda: None}, rounds=1, burst_ms=0.01, warmup_ms=0)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: interleave({}), "at least one"),
        (lambda: interleave({"a": 3}), "functions without arguments"),
        (lambda: interleave({"a": print}, rounds=0), "rounds=0"),
        (lambda: interleave({"a": print}, burst_ms=0), "burst_ms=0"),
        (lambda: interleave({"a": print}, warmup_ms=-1), "warmup_ms=-1"),
        (lambda: interleave({"a": print}, burst_ms=float("nan")), "burst_ms=nan"),
        (lambda: ratio(Timing(1, 1, 1, (1, 1), 1), Timing(1, 1, 1, (1,), 1)), "2 and 1 rounds"),
        (lambda: ratio(Timing(1, 1, 1, (), 1), Timing(1, 1, 1, (), 1)), "0 and 0 rounds"),
    ],
)
def test_bad_calls(call: Callable[[], object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        call()
