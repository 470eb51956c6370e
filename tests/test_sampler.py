"""The sampler: any source is seen at the model's frame rate, at a constant stride."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stsm_rt.recognizer import Recognizer
from stsm_rt.sampler import Sampler

# A step may come this much earlier than the model's period.
EARLY = 0.1


@given(fps=st.floats(1, 240), rate=st.floats(2, 60), offset=st.floats(-100, 1e5))
def test_a_regular_source_is_taken_at_a_constant_stride_never_faster_than_the_model(
    fps: float, rate: float, offset: float
) -> None:
    exact = fps * (1 - EARLY) / rate
    assume(abs(exact - round(exact)) > 1e-3)
    sampler = Sampler(rate)
    taken = [i for i in range(400) if sampler.take(offset + i / fps)]
    strides = set(np.diff(taken))
    assert taken[0] == 0
    assert len(strides) == 1
    stride = int(strides.pop())
    assert stride == Sampler.stride(fps, rate)
    assert fps / stride <= rate / (1 - EARLY) * 1.001
    # The next smaller stride would have been too fast.
    assert stride == 1 or fps / (stride - 1) > rate


@pytest.mark.parametrize(
    ("fps", "rate", "stride"),
    [
        (30, 10, 3),
        (29.97, 10, 3),
        (30.1, 10, 3),
        (25, 10, 3),
        (60, 10, 6),
        (10, 10, 1),
        (7, 10, 1),
        (30, 30, 1),
    ],
)
def test_strides_of_common_sources(fps: float, rate: float, stride: int) -> None:
    assert Sampler.stride(fps, rate) == stride
    for milliseconds in (False, True):
        sampler = Sampler(rate)
        times = [round(i / fps, 3) if milliseconds else i / fps for i in range(90)]
        assert [i for i, time in enumerate(times) if sampler.take(time)] == list(range(0, 90, stride))


def test_a_camera_that_jitters_keeps_its_stride() -> None:
    jitter = np.random.default_rng(0).uniform(-0.0045, 0.0045, 300)
    sampler = Sampler(10)
    assert [i for i in range(300) if sampler.take(i / 30 + jitter[i])] == list(range(0, 300, 3))


@pytest.mark.parametrize(("rate", "gap"), [(10, 1.0), (2, 2.0)])
def test_a_gap_is_more_than_a_second_and_four_steps(rate: float, gap: float) -> None:
    sampler = Sampler(rate)
    assert not sampler.breaks(100.0)
    sampler.take(100.0)
    assert not sampler.breaks(100.0 + gap)
    assert sampler.breaks(100.0 + gap + 0.001)
    assert not sampler.breaks(100.0)
    assert sampler.breaks(99.999)


@given(rate=st.floats(2, 60), steps=st.lists(st.floats(-0.5, 2), min_size=1, max_size=30), every_frame=st.booleans())
def test_it_wants_what_it_takes(rate: float, steps: list[float], every_frame: bool) -> None:
    sampler, time = Sampler(rate, every_frame=every_frame), 0.0
    for step in steps:
        before, time = time, time + step
        wanted = sampler.wants(time)
        if sampler.breaks(time):
            sampler.reset()
        assert sampler.take(time) == wanted
        assert wanted or not every_frame or not time > before


@given(rate=st.floats(2, 60), steps=st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.033, 0.1, 0.4]), min_size=1))
def test_of_a_variable_frame_rate_each_frame_is_taken_that_is_due_and_no_duplicate(
    rate: float, steps: list[float]
) -> None:
    sampler, time = Sampler(rate), 5.0
    taken = [time] if sampler.take(time) else []
    for step in steps:
        time += step
        due = time > taken[-1] and time - taken[-1] >= (1 - EARLY) / rate
        assert sampler.take(time) == due
        taken += [time] * due
    assert len(set(taken)) == len(taken)


def test_a_duplicate_is_no_step_even_where_every_frame_is() -> None:
    sampler = Sampler(10, every_frame=True)
    assert [sampler.take(time) for time in (0, 0.04, 0.04, 0.04, 0.08)] == [True, True, False, False, True]


@pytest.mark.parametrize("every_frame", [None, 30.0])
def test_what_a_live_clock_does_reaches_the_results(make_engine: Any, every_frame: float | None) -> None:
    """Duplicates are no steps; a gap and a jump back begin anew, and the results say so."""
    engine = make_engine(frame_rate=30.0)
    recognizer = Recognizer(engine.path, every_frame=every_frame)
    steady = [i / 30 for i in range(20)]
    times = [*steady, steady[-1], 0.7, 9.0, *(9 + time for time in steady[1:]), 3.0, *(3 + time for time in steady[1:])]
    results = [recognizer.update(frame, time) for frame, time in zip(engine.frames(len(times)), times, strict=True)]
    assert results[20] is None and all(results[i] is not None for i in (*range(20), 21, 22, 42))
    warming = [None if result is None else result.warming_up for result in results]
    first = warming[:20].index(False)
    assert first > 0 and not any(warming[first:22])
    assert warming[22 : 22 + first + 1] == [*[True] * first, False]
    assert warming[42 : 42 + first + 1] == [*[True] * first, False]


def test_every_frame_is_taken_if_asked_for_and_the_gap_is_the_models() -> None:
    sampler = Sampler(2, every_frame=True)
    assert all(sampler.take(i / 240) for i in range(100))
    assert sampler.gap == Sampler(2).gap == 2.0
