"""The recognizer: one way from frames to results, and a state that never leaks into another stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import counted, plain, write_video
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec
from stsm_rt.recognizer import Recognizer, Result, Sampler
from stsm_rt.video.fit import fit
from stsm_rt.video.sources import open_source

# A step may come this much earlier than the model's period.
EARLY = 0.1


def noise(count: int, seed: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    """Frames of one scene under heavy noise: no cut between any two, whatever their seeds."""
    scene = np.linspace(0, 160, size[0], dtype=np.uint8)[None, None, :, None]
    return list(scene + np.random.default_rng(seed).integers(0, 96, (count, size[1], size[0], 3), np.uint8))


def play(recognizer: Recognizer, frames: list[np.ndarray], start: float = 0.0, fps: float = 10.0) -> list[Result]:
    results = [recognizer.update(frame, start + i / fps) for i, frame in enumerate(frames)]
    return [result for result in results if result is not None]


def scores(results: list[Result]) -> list[Any]:
    return [(result.labels, result.scores, result.warming_up) for result in results]


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


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    before=st.integers(1, 9),
    kind=st.sampled_from(["gap", "back", "size", "reset"]),
)
def test_after_a_break_it_is_a_fresh_recognizer(tiny_engine: Any, seed: int, before: int, kind: str) -> None:
    used, fresh = Recognizer(tiny_engine.path), Recognizer(tiny_engine.path)
    play(used, noise(before, seed, (32, 32) if kind == "size" else (64, 48)))
    if kind == "reset":
        used.reset()
    start = {"gap": (before - 1) / 10 + 1.01, "back": (before - 1) / 10 - 0.01}.get(kind, before / 10)
    after = noise(8, seed + 1)
    assert scores(play(used, after, start)) == scores(play(fresh, after, start))


def test_a_cut_ends_the_event_before_it_and_starts_afresh(tiny_engine: Any) -> None:
    first, second = noise(9, 1), [frame[:, ::-1].copy() for frame in noise(9, 2)]
    recognizer = Recognizer(tiny_engine.path, threshold=0.05)
    results = play(recognizer, first + second)
    fresh = play(Recognizer(tiny_engine.path, threshold=0.05), second)
    assert scores(results[9:]) == scores(fresh)
    assert results[8].active is not None
    assert [event.end for event in results[9].events if event.end is not None] == [pytest.approx(0.8)]


def test_without_a_break_the_state_is_kept(tiny_engine: Any) -> None:
    used, fresh = Recognizer(tiny_engine.path), Recognizer(tiny_engine.path)
    play(used, noise(5, 0))
    after = noise(1, 1)
    one, other = play(used, after, 1.3)[0], play(fresh, after, 1.3)[0]
    assert one.scores != other.scores
    assert (one.warming_up, other.warming_up) == (False, True)


def test_a_break_ends_the_running_event_where_the_stream_broke(tiny_engine: Any) -> None:
    recognizer = Recognizer(tiny_engine.path)
    play(recognizer, plain("blue", 8))
    (result,) = play(recognizer, plain("blue", 1), 5.0)
    (event,) = result.events
    assert (event.label, event.end, event.frame) == ("blue", 0.7, 7)
    assert (result.active, result.warming_up, result.frame) == (None, True, 8)


def test_an_action_in_a_real_video_becomes_one_event(tiny_engine: Any, tmp_path: Path) -> None:
    frames = plain("black", 30) + plain("green", 60) + plain("black", 30)
    recognizer = Recognizer(tiny_engine.path)
    results = list(recognizer.run(write_video(tmp_path / "green.mp4", frames)))
    events = [event for result in results for event in result.events]
    assert [(event.label, event.end is None) for event in events] == [("green", True), ("green", False)]
    assert 1.0 <= events[0].start < 1.6 and 3.0 <= (events[1].end or 0) < 3.6
    assert len(results) == 40 and recognizer.finish() == ()
    assert {result.active for result in results[:10]} == {None}
    assert results[19].active == results[19].label == "green" and results[19].score == results[19].scores[0]
    assert [result.frame for result in results] == list(range(0, 120, 3))
    assert [result.time for result in results] == pytest.approx([i / 10 for i in range(40)], abs=1e-3)


def test_a_running_event_is_ended_by_finish(tiny_engine: Any, tmp_path: Path) -> None:
    recognizer = Recognizer(tiny_engine.path)
    results = list(recognizer.run(write_video(tmp_path / "red.mp4", plain("red", 31))))
    assert results[-1].active == "red"
    (event,) = recognizer.finish()
    assert (event.label, event.end, event.frame) == ("red", pytest.approx(1.0, abs=1e-3), 30)


def test_the_same_video_gives_the_same_results_every_time_and_frame_by_frame(tiny_engine: Any, tmp_path: Path) -> None:
    path = write_video(tmp_path / "noise.mp4", noise(40, 3))
    recognizer = Recognizer(tiny_engine.path)
    first = scores(list(recognizer.run(path)))
    with open_source(path) as source:
        second = scores(list(recognizer.run(source)))
    recognizer.reset()
    with open_source(path) as source:
        third = [recognizer.update(frame, time) for frame, time in source]
    assert first == second == scores([result for result in third if result is not None])


def test_the_results_are_those_of_the_engine_and_the_decision(tiny_engine: Any) -> None:
    frames = noise(6, 5)
    inputs = np.zeros((6, 12, 16, 3), np.uint8)
    for frame, row in zip(frames, inputs, strict=True):
        fit(frame, None, row)
    logits = tiny_engine.reference(inputs).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for t, result in enumerate(play(Recognizer(tiny_engine.path), frames)):
        mean = probabilities[max(0, t - 2) : t + 1].mean(axis=0)
        for label, score in zip(result.labels, result.scores, strict=True):
            assert score == pytest.approx(mean[tiny_engine.manifest.labels.index(label)], abs=1e-4)


def test_recognizers_share_an_engine_without_touching_each_other(tiny_engine: Any) -> None:
    engine = Engine.open(tiny_engine.path, slots=2)
    pair = [Recognizer(engine, slot=0), Recognizer(engine, slot=1)]
    streams = [noise(8, 1), noise(8, 2)]
    together: list[list[Result]] = [[], []]
    for t in range(8):
        for recognizer, stream, results in zip(pair, streams, together, strict=True):
            results += play(recognizer, [stream[t]], t / 10)
        if t == 3:
            Recognizer(engine, slot=1).reset()
            pair[1] = Recognizer(engine, slot=1)
    assert scores(together[0]) == scores(play(Recognizer(tiny_engine.path), streams[0]))
    assert scores(together[1][4:]) == scores(play(Recognizer(tiny_engine.path), streams[1][4:], 0.4))


def test_a_slot_of_a_batch_is_as_good_as_an_engine_of_its_own(make_engine: Any, tiny_engine: Any) -> None:
    engine = Engine.open(make_engine(batch=2, delays=(1, 1, 1)).path, slots=2)
    alone = make_engine(delays=(1, 1, 1))
    pair = [Recognizer(engine, slot=0), Recognizer(engine, slot=1)]
    streams = [noise(6, 1), noise(6, 2)]
    for t in range(6):
        for recognizer, stream in zip(pair, streams, strict=True):
            play(recognizer, [stream[t]], t / 10)
    for recognizer, stream in zip(pair, streams, strict=True):
        more = play(recognizer, stream, 0.6)
        expected = play(Recognizer(alone.path), [*stream, *stream])[6:]
        assert [r.labels for r in more] == [r.labels for r in expected]
        assert np.allclose([r.scores for r in more], [r.scores for r in expected], atol=1e-5)


def test_the_region_of_interest_is_what_the_network_sees(tiny_engine: Any) -> None:
    frame = plain("black", 1, (200, 100))[0]
    frame[20:60, 100:160] = (0, 0, 255)
    for roi, label in (((100, 20, 60, 40), "red"), (None, None)):
        recognizer = Recognizer(tiny_engine.path, roi=roi)
        assert play(recognizer, [frame] * 6)[-1].active == label


def test_frames_are_neither_changed_nor_kept(tiny_engine: Any) -> None:
    frames = noise(6, 9)
    expected = scores(play(Recognizer(tiny_engine.path), [frame.copy() for frame in frames]))
    recognizer, results = Recognizer(tiny_engine.path), []
    for t, frame in enumerate(frames):
        given_frame = frame.copy()
        results += play(recognizer, [given_frame], t / 10)
        assert (given_frame == frame).all()
        given_frame[:] = 0
    assert scores(results) == expected


def test_options_reach_the_results(make_engine: Any) -> None:
    spec = DecisionSpec(smoothing=5, threshold=0.999, release=0.4, min_steps=1)
    path = make_engine(decision=spec, frame_rate=5.0).path
    recognizer = Recognizer(path, topk=2, threshold=0.5)
    results = [recognizer.update(f, i / 10, dropped=i) for i, f in enumerate(plain("blue", 20))]
    steps = [result for result in results if result is not None]
    assert len(steps) == 10
    assert all(len(step.labels) == len(step.scores) == 2 for step in steps)
    assert [step.dropped for step in steps] == list(range(0, 20, 2))
    assert [step.warming_up for step in steps] == [True] * 4 + [False] * 6
    assert steps[-1].active == "blue"
    assert all(0 < step.latency < 5 for step in steps)


def test_a_result_is_a_json_record() -> None:
    result = Result(1.5, 45, ("walk", "run"), (0.7, 0.2), 0.01, 3, False, (), "walk")
    assert result.to_record() == {
        "kind": "result", "time": 1.5, "frame": 45, "label": "walk", "score": 0.7,
        "labels": ["walk", "run"], "scores": [0.7, 0.2], "latency": 0.01, "dropped": 3,
        "warming_up": False, "active": "walk",
    }  # fmt: skip


def test_what_is_no_frame_is_refused(tiny_engine: Any) -> None:
    recognizer = Recognizer(tiny_engine.path)
    good = counted(1)[0]
    for frame, word in (
        (good.astype(np.float32), "not float32"),
        (good[:, :, 0], "not uint8"),
        (np.zeros((0, 4, 3), np.uint8), "not uint8"),
        (None, "NoneType"),
    ):
        with pytest.raises(UserError, match=word):
            recognizer.update(frame, 0.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="finite number of seconds, not nan"):
        recognizer.update(good, float("nan"))
    with pytest.raises(UserError, match=r"60,0,10,10 .* does not lie inside the frame of 64x48"):
        Recognizer(tiny_engine.path, roi=(60, 0, 10, 10)).update(good, 0.0)


def test_a_slot_that_does_not_exist_is_refused(tiny_engine: Any) -> None:
    with pytest.raises(UserError, match="no slot 2"):
        Recognizer(Engine.open(tiny_engine.path, slots=2), slot=2)
    with pytest.raises(UserError, match="at least 0, not -1"):
        Recognizer(tiny_engine.path, slot=-1)
