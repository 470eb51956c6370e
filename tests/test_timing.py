from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stsm_rt import timing
from stsm_rt.timing import Candidate, Comparison, Times, median_interval, time_in_turns, title


class PacedEngine:
    """An engine on a clock of its own, whose first steps after a switch take longer."""

    clock = 0.0
    last: PacedEngine | None = None

    def __init__(self, manifest: Any, seconds: float) -> None:
        self.manifest = manifest
        self.frames = np.zeros((1, 4, 4, 3), np.uint8)
        self.seconds = seconds
        self.since_switch = 0

    def step(self, frames: np.ndarray, slots: Sequence[int] | None = None) -> None:
        self.since_switch = self.since_switch + 1 if PacedEngine.last is self else 1
        PacedEngine.last = self
        PacedEngine.clock += self.seconds * (2 if self.since_switch <= 2 else 1)
        # The machine slows down all the time, which is what pairs are for.
        self.seconds *= 1.001


@pytest.fixture
def paced(tiny_engine, monkeypatch):
    PacedEngine.clock, PacedEngine.last = 0.0, None
    monkeypatch.setattr(timing, "perf_counter", lambda: PacedEngine.clock)
    return lambda seconds: PacedEngine(tiny_engine.manifest, seconds)


def test_the_first_steps_after_a_switch_are_not_counted(paced):
    run = timing.time_engines([paced(0.010), paced(0.020)], ["a", "b"], pairs=4)[0]

    assert run.steps == 4 * 4  # the slower engine makes 4 steps in 0.08 s
    assert 0.010 <= run.min <= run.median <= run.p95 < 0.014


def test_ratios_are_taken_pair_by_pair_and_survive_a_drift_of_the_machine(paced):
    a, b = timing.time_engines([paced(0.010), paced(0.020)], ["a", "b"], pairs=12)
    comparison = timing.compare(a, b)

    assert max(a.blocks) / min(a.blocks) > 1.05
    assert comparison.ratio_median == pytest.approx(2, rel=0.01)
    assert 1.98 < comparison.ratio_min <= comparison.ratio_median <= comparison.ratio_max < 2.02
    assert (comparison.a, comparison.b, comparison.pairs) == ("a", "b", 12)


def test_a_run_says_what_was_timed(paced, tiny_engine):
    (run,) = timing.time_engines([paced(0.010)], ["colours"], pairs=1)

    assert (run.engine, run.network, run.runtime, run.shift, run.precision, run.input) == (
        "colours",
        "colours",
        "onnxruntime",
        "tsm_online",
        "fp32",
        (12, 16),
    )
    assert run.sha256 == tiny_engine.manifest.sha256


def test_the_order_is_turned_round_from_pair_to_pair():
    order: list[str] = []
    candidates = [
        Candidate(step=lambda name=name: order.append(name), warm_up=0, counted=1)  # type: ignore[misc]
        for name in "abc"
    ]

    time_in_turns(candidates, pairs=3, after=lambda pair: order.append(str(pair)))

    assert "".join(order) == "abc0cba1abc2"


def test_a_block_counts_as_many_steps_as_its_candidate_asks_for():
    calls: list[int] = []
    ((block,),) = time_in_turns([Candidate(step=lambda: calls.append(1), warm_up=2, counted=3)], pairs=1)

    assert len(block) == 3 and len(calls) == 5


@pytest.mark.parametrize(("seconds", "warm_up", "counted"), [(0.0001, 4, 24), (0.01, 4, 8), (0.05, 2, 3)])
def test_a_block_takes_a_tenth_of_a_second_but_never_less_than_a_few_steps(paced, seconds, warm_up, counted):
    (candidate,) = timing.engine_candidates([paced(seconds)])

    assert (candidate.warm_up, candidate.counted) == (warm_up, counted)


def test_times_are_those_of_all_steps_and_a_median_for_each_block():
    times = Times.of([[1.0, 2.0, 6.0], [3.0, 4.0, 5.0]])

    assert (times.steps, times.median, times.min, times.blocks) == (6, 3.5, 1.0, (2.0, 4.0))
    assert 5.0 < times.p95 <= 6.0


ratios = st.lists(st.floats(0.5, 2.0), min_size=3, max_size=40).map(np.array)


@settings(max_examples=30, deadline=None)
@given(ratios)
def test_the_interval_holds_the_median_and_lies_within_the_values(values):
    low, high = median_interval(values)

    assert values.min() <= low <= np.median(values) <= high <= values.max()


@settings(max_examples=10, deadline=None)
@given(ratios)
def test_the_interval_of_scaled_values_is_the_scaled_interval(values):
    assert median_interval(2 * values) == pytest.approx(tuple(2 * end for end in median_interval(values)))


def test_the_interval_holds_the_true_median_in_95_of_100_samples():
    rng = np.random.default_rng(1)
    intervals = [median_interval(rng.lognormal(0, 0.05, 30)) for _ in range(200)]

    assert 0.90 <= np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.99


def test_a_single_pair_has_no_interval():
    comparison = Comparison.of("a", "b", [1.5])

    assert (comparison.ratio_median, comparison.interval) == (1.5, None)
    assert comparison.line() == "b / a: x1.500 (1.500 to 1.500 over 1 pair)"


def test_names_are_said_once_where_they_begin_alike():
    assert title("r50 fp32 plain", "r50 fp32 tsm") == "r50 fp32 tsm / plain"
    assert title("r50 tsm", "r50 tsm again") == "r50 tsm / itself"
    assert title("r50 tsm naive", "r50 tsm") == "r50 tsm / naive"
    assert title("r50 tsm", "r50 tsm naive") == "r50 tsm naive / r50 tsm"
    assert title("a.onnx", "b.onnx") == "b.onnx / a.onnx"
