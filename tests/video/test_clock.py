"""The time of a live source: positions where they behave, arrivals otherwise, one clock over all connections."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stsm_rt.video.clock import StreamClock

JITTER = st.lists(st.floats(0, 0.5), min_size=2, max_size=60)


def stamps(
    clock: StreamClock, frames: list[tuple[float, float]], *, positioned: bool = True
) -> list[tuple[float, int]]:
    """Times and streams of frames (arrival, position) of a new connection."""
    clock.connect(positioned=positioned)
    return [tuple(clock.stamp(arrived, position)) for arrived, position in frames]  # type: ignore[misc]


@given(jitter=JITTER, start=st.floats(-1e4, 1e6), fps=st.sampled_from([5, 15, 25, 30]))
def test_frames_that_come_late_or_in_bursts_keep_their_distances(jitter: list[float], start: float, fps: int) -> None:
    arrivals = [start]
    for i, late in enumerate(jitter, 1):
        arrivals.append(max(arrivals[-1], start + i / fps + late))
    frames = [(arrived, 7 + i / fps) for i, arrived in enumerate(arrivals)]
    times = stamps(StreamClock(), frames)
    assert [stream for _, stream in times] == [0] * len(frames)
    assert [time for time, _ in times] == pytest.approx([i / fps for i in range(len(frames))], abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(-1e9, 1e9) | st.just(float("nan"))), min_size=1), st.booleans())
def test_whatever_comes_time_never_goes_back_and_is_finite(steps: list[tuple[float, float]], positioned: bool) -> None:
    clock, arrived, frames = StreamClock(100.0), 100.0, []
    for step, position in steps:
        arrived += step
        frames.append((arrived, position))
    times = [*stamps(clock, frames, positioned=positioned), *stamps(clock, [(arrived + 1, 0.0)], positioned=positioned)]
    assert all(0 <= later[0] - earlier[0] < 1e6 for earlier, later in pairwise(times))
    assert all(later[1] - earlier[1] in (0, 1) for earlier, later in pairwise(times))
    assert times[-1][1] == times[-2][1] + 1


@given(JITTER)
def test_without_positions_time_is_that_of_arrival(steps: list[float]) -> None:
    arrivals = [sum(steps[: i + 1]) for i in range(len(steps))]
    times = stamps(StreamClock(0.0), [(arrived, 1.0) for arrived in arrivals], positioned=False)
    assert [time for time, _ in times] == pytest.approx(arrivals)
    assert {stream for _, stream in times} == {0}


def test_duplicates_small_steps_back_and_missing_positions_break_nothing() -> None:
    positions = [0, 0.1, 0.1, 0.2, 0.15, 0.3, 0.0, 0.5]
    frames = [(i / 10, position) for i, position in enumerate(positions)]
    assert stamps(StreamClock(), frames) == [
        (pytest.approx(time), 0) for time in (0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.5)
    ]


@pytest.mark.parametrize("jump", [-5.0, -1.2, 3.0, 86400.0])
def test_a_jump_that_the_wall_clock_does_not_confirm_begins_another_stream(jump: float) -> None:
    frames = [(i / 10, i / 10 + (jump if i >= 10 else 0)) for i in range(20)]
    times = stamps(StreamClock(), [(arrived, 50 + position) for arrived, position in frames])
    assert [stream for _, stream in times] == [0] * 10 + [1] * 10
    assert [time for time, _ in times] == pytest.approx([i / 10 for i in range(20)])


def test_a_gap_in_the_stream_stays_in_the_times() -> None:
    times = stamps(StreamClock(), [(0, 1), (0.1, 1.1), (4.1, 5.1), (4.2, 5.2)])
    assert times == [(pytest.approx(time), 0) for time in (0, 0.1, 4.1, 4.2)]


def test_a_stream_that_was_held_up_and_catches_up_is_one() -> None:
    held_up = [(0.1 * i, 0.1 * i) for i in range(10)] + [(6 + 0.001 * i, 0.1 * i) for i in range(10, 60)]
    assert {stream for _, stream in stamps(StreamClock(), held_up)} == {0}


@pytest.mark.parametrize("pace", [0.4, 2.5])
def test_positions_that_are_made_up_give_way_to_arrivals(pace: float) -> None:
    frames = [(i / 10, pace * i / 10) for i in range(600)]
    times = stamps(StreamClock(), frames)
    assert {stream for _, stream in times} == {0, 1}
    late = [time for time, _ in times[-50:]]
    assert [later - earlier for earlier, later in pairwise(late)] == pytest.approx([0.1] * 49)


def test_the_time_goes_on_over_connections() -> None:
    clock = StreamClock(10.0)
    assert stamps(clock, [(12, 500), (12.1, 500.1)]) == [(2, 0), (pytest.approx(2.1), 0)]
    assert clock.elapsed(15) == 5
    assert stamps(clock, [(20, 3), (20.1, 3.1)]) == [(10, 1), (pytest.approx(10.1), 1)]
    # A burst went ahead of the wall clock; the next connection does not go back.
    assert stamps(clock, [(21, 0), (21.001, 0.9), (21.002, 1.8)])[-1] == (pytest.approx(12.8), 2)
    assert stamps(clock, [(21.1, 7)]) == [(pytest.approx(12.8), 3)]
