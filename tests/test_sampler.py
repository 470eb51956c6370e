"""The sampler: any source is seen at the model's frame rate, at a constant stride."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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
        time += step
        wanted = sampler.wants(time)
        if sampler.breaks(time):
            sampler.reset()
        assert sampler.take(time) == wanted
        assert wanted or not every_frame


def test_every_frame_is_taken_if_asked_for_and_the_gap_is_the_models() -> None:
    sampler = Sampler(2, every_frame=True)
    assert all(sampler.take(i / 240) for i in range(100))
    assert sampler.gap == Sampler(2).gap == 2.0
