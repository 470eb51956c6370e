"""The decision: smoothing over the last steps, and events with hysteresis."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stsm_rt.decision import Decision, Event
from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec

LABELS = ("nothing", "walk", "jump", "wave")


def decision(
    *,
    smoothing: int = 1,
    enter: float = 0.6,
    release: float = 0.4,
    min_steps: int = 1,
    temperature: float = 1.0,
    topk: int = 3,
    threshold: float | None = None,
) -> Decision:
    spec = DecisionSpec(
        smoothing=smoothing, threshold=enter, release=release, min_steps=min_steps, temperature=temperature
    )
    return Decision(LABELS, "nothing", spec, topk=topk, threshold=threshold)


def logits(**scores: float) -> np.ndarray:
    """Logits whose softmax gives the named labels these probabilities and the rest to the background."""
    probabilities = np.array([1 - sum(scores.values()), *(scores.get(label, 0.0) for label in LABELS[1:])])
    return np.log(np.maximum(probabilities, 1e-12)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


walks = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(4)), elements=st.floats(-8, 8, width=32))


@given(walks, st.integers(1, 12), st.floats(0.25, 4))
def test_scores_are_the_mean_probabilities_of_the_last_steps(
    steps: np.ndarray, smoothing: int, temperature: float
) -> None:
    tested = decision(smoothing=smoothing, temperature=temperature)
    probabilities = softmax(steps.astype(np.float64) / temperature)
    for t, row in enumerate(steps):
        labels, scores, _ = tested.update(row, t / 10, t)
        expected = probabilities[max(0, t + 1 - smoothing) : t + 1].mean(axis=0)
        for label, score in zip(labels, scores, strict=True):
            assert score == pytest.approx(expected[LABELS.index(label)], abs=1e-9)
        assert list(scores) == sorted(scores, reverse=True)
        assert scores[0] == pytest.approx(expected[1:].max(), abs=1e-9)
        assert sum(scores) + expected[0] == pytest.approx(1)


@given(walks, st.integers(1, 5), st.floats(0, 1), st.floats(0, 1), st.integers(1, 4))
def test_events_never_overlap_and_each_start_has_its_end(
    steps: np.ndarray, smoothing: int, enter: float, ratio: float, min_steps: int
) -> None:
    tested = decision(smoothing=smoothing, enter=enter, release=enter * ratio, min_steps=min_steps)
    events: list[Event] = []
    for t, row in enumerate(steps):
        new = tested.update(row, t / 10, t)[2]
        events += new
        assert all(event.frame == t for event in new)
        assert tested.active == (events[-1].label if events and events[-1].end is None else None)
    events += tested.finish(len(steps) / 10, len(steps))

    assert tested.active is None
    assert [event.end is None for event in events] == [True, False] * (len(events) // 2)
    clock = 0.0
    for start, end in zip(events[::2], events[1::2], strict=True):
        assert (start.label, start.start) == (end.label, end.start)
        assert start.label != "nothing"
        assert end.end is not None and clock <= start.start <= end.end
        assert start.peak >= tested.threshold and end.peak >= start.peak
        clock = end.end


def test_the_background_is_never_ranked_and_never_an_event() -> None:
    tested = decision(topk=10)
    for t in range(20):
        labels, scores, events = tested.update(logits(walk=0.05), t, t)
        assert labels[0] == "walk" and "nothing" not in labels and len(labels) == 3
        assert scores[0] == pytest.approx(0.05)
        assert events == ()


def test_without_a_background_every_label_is_ranked() -> None:
    spec = DecisionSpec(smoothing=1, threshold=0.6, release=0.4, min_steps=1)
    tested = Decision(LABELS, None, spec, topk=4)
    labels, _, events = tested.update(logits(walk=0.1), 0.0, 0)
    assert labels[0] == "nothing"
    assert events[0].label == "nothing"


def test_an_event_starts_after_min_steps_in_a_row_and_ends_below_the_release() -> None:
    tested = decision(min_steps=3)
    course = [0.7, 0.7, 0.5, 0.7, 0.8, 0.9, 0.5, 0.41, 0.39, 0.7]
    seen = [tested.update(logits(walk=score), t / 10, t)[2] for t, score in enumerate(course)]
    assert [t for t, events in enumerate(seen) if events] == [5, 8]
    assert seen[5] == (Event("walk", 0.5, None, pytest.approx(0.9), 5),)
    assert seen[8] == (Event("walk", 0.5, 0.8, pytest.approx(0.9), 8),)


def test_another_label_takes_over_in_one_step() -> None:
    tested = decision(enter=0.5, release=0.1, min_steps=2)
    for t in range(3):
        tested.update(logits(walk=0.8), t, t)
    assert tested.update(logits(walk=0.3, jump=0.6), 3, 3)[2] == ()
    ended, started = tested.update(logits(walk=0.3, jump=0.6), 4, 4)[2]
    assert (ended.label, ended.end, started.label, started.start) == ("walk", 4, "jump", 4)
    assert tested.active == "jump"


def test_the_same_label_may_start_again_after_its_end() -> None:
    tested = decision()
    kinds = []
    for t, score in enumerate([0.9, 0.1, 0.9]):
        kinds += [event.end is None for event in tested.update(logits(walk=score), t, t)[2]]
    assert kinds == [True, False, True]


def test_the_threshold_can_be_replaced_and_takes_the_release_along() -> None:
    tested = decision(threshold=0.2)
    assert tested.release == 0.2
    assert tested.update(logits(walk=0.25), 0, 0)[2][0].label == "walk"
    assert decision(threshold=0.9).update(logits(walk=0.8), 0, 0)[2] == ()


def test_finish_asks_for_min_steps_again() -> None:
    tested = decision(min_steps=2)
    for t in range(3):
        tested.update(logits(walk=0.9), t, t)
    assert tested.finish(2.0, 2) == (Event("walk", 1, 2.0, pytest.approx(0.9), 2),)
    assert tested.finish(2.0, 2) == ()
    assert tested.update(logits(walk=0.9), 3, 3)[2] == ()
    assert len(tested.update(logits(walk=0.9), 4, 4)[2]) == 1


def test_after_a_reset_it_is_as_new() -> None:
    used, new = decision(smoothing=4, min_steps=2), decision(smoothing=4, min_steps=2)
    for t in range(6):
        used.update(logits(jump=0.9), t, t)
    used.reset()
    assert used.active is None
    for t in range(6):
        assert used.update(logits(walk=0.9), t, t) == new.update(logits(walk=0.9), t, t)
        assert used.warming_up is (t < 3)


def test_an_event_is_a_json_record() -> None:
    assert Event("walk", 0.5, None, 0.9, 5).to_record() == {
        "kind": "event", "time": 0.5, "frame": 5, "label": "walk", "score": 0.9,
        "start": 0.5, "end": None, "peak": 0.9,
    }  # fmt: skip
    assert Event("walk", 0.5, 0.8, 0.9, 8).to_record()["time"] == 0.8


def test_it_does_not_grow() -> None:
    tested, row = decision(smoothing=8), logits(walk=0.9)
    for t in range(100):
        tested.update(row, t, t)
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for t in range(100, 3000):
            tested.update(row, t, t)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 4096
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="not finite at frame 7"):
        decision().update(np.array([0, value, 0, 0], np.float32), 0.0, 7)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="topk must be at least 1, not 0"):
        decision(topk=0)
    with pytest.raises(UserError, match=r"between 0 and 1, not 1.5"):
        decision(threshold=1.5)
    with pytest.raises(UserError, match="4 logits were expected"):
        decision().update(np.zeros(3, np.float32), 0.0, 0)
    spec = DecisionSpec(smoothing=1, threshold=0.6, release=0.4, min_steps=1)
    with pytest.raises(UserError, match="besides the background"):
        Decision(("nothing",), "nothing", spec)
