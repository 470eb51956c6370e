"""The recognizer: one way from frames to results, and a state that never leaks into another stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import counted, plain, write_video
from hypothesis import given, settings
from hypothesis import strategies as st

from stsm_rt.engine import Engine, frame_rate_of
from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.video.fit import fit
from stsm_rt.video.sources import open_source


def noise(count: int, seed: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    """Frames of one scene under heavy noise: no cut between any two, whatever their seeds."""
    scene = np.linspace(0, 160, size[0], dtype=np.uint8)[None, None, :, None]
    return list(scene + np.random.default_rng(seed).integers(0, 96, (count, size[1], size[0], 3), np.uint8))


def play(recognizer: Recognizer, frames: list[np.ndarray], start: float = 0.0, fps: float = 10.0) -> list[Result]:
    results = [recognizer.update(frame, start + i / fps) for i, frame in enumerate(frames)]
    return [result for result in results if result is not None]


def scores(results: list[Result]) -> list[Any]:
    return [(result.labels, result.scores, result.warming_up) for result in results]


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


def test_a_cut_right_after_a_break_is_noticed(tiny_engine: Any) -> None:
    first, second = noise(4, 1), [frame[:, ::-1].copy() for frame in noise(4, 2)]
    recognizer = Recognizer(tiny_engine.path)
    play(recognizer, noise(3, 0))
    play(recognizer, first[:1], 9.0)
    assert scores(play(recognizer, second, 9.1)) == scores(play(Recognizer(tiny_engine.path), second))


def test_a_restart_waits_for_a_frame_that_is_looked_at(tiny_engine: Any) -> None:
    recognizer = Recognizer(tiny_engine.path)
    play(recognizer, noise(3, 0))
    assert not recognizer.wants(0.25)
    # Whoever read this frame had asked before.
    recognizer.restart()
    assert recognizer.prepare(None, 0.25, recognizer.input, arrived=0.0) is None
    assert recognizer.wants(0.26)
    after = noise(4, 1)
    results = play(recognizer, after, 0.26)
    assert results[0].frame == 0 and scores(results) == scores(play(Recognizer(tiny_engine.path), after))


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


def broken(engine: Engine, failures: dict[int, Any]) -> Engine:
    """The same engine, whose steps fail at these numbers, from 0: by an error, or by a number among the logits."""
    step, made = engine.step, iter(range(10_000))

    def failing(frames: np.ndarray, slots: Any = None) -> np.ndarray:
        logits = step(frames, slots)
        failure = failures.get(next(made))
        if isinstance(failure, Exception):
            raise failure
        if failure is not None:
            logits[0, 1] = failure
        return logits

    engine.step = failing  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error"), UserError("no"), np.nan, np.inf, -np.inf])
def test_a_step_that_fails_resets_the_state_and_the_stream_goes_on(tiny_engine: Any, failure: Any) -> None:
    frames = plain("blue", 8) + plain("blue", 12)
    recognizer = Recognizer(broken(Engine.open(tiny_engine.path), {8: failure}), patience=2)
    results = [recognizer.update(frame, i / 10) for i, frame in enumerate(frames)]
    assert [i for i, result in enumerate(results) if result is None] == [8]
    assert (recognizer.failures, recognizer.resets) == (1, 1)
    after = [result for result in results[9:] if result is not None]
    assert scores(after) == scores(play(Recognizer(tiny_engine.path), frames[9:]))
    # The event that ran is ended where it was last seen, in the next result.
    assert results[7] is not None and results[7].active == "blue"
    assert [(event.label, event.end, event.frame) for event in after[0].events] == [("blue", 0.7, 7)]
    assert [event.end for event in after[1].events + after[2].events] == [None]
    assert after[0].warming_up


def test_an_event_that_a_failed_step_ended_is_not_lost_at_the_end(tiny_engine: Any) -> None:
    recognizer = Recognizer(broken(Engine.open(tiny_engine.path), {8: np.nan}), patience=2)
    play(recognizer, plain("blue", 9))
    assert [(event.label, event.end) for event in recognizer.finish()] == [("blue", 0.7)]
    assert recognizer.finish() == ()


def test_steps_that_fail_in_a_row_are_an_error(tiny_engine: Any) -> None:
    frames = noise(9, 1)
    failures: dict[int, Any] = {1: np.nan, 2: np.nan, 4: np.nan, 5: RuntimeError("lost\ndetails"), 6: np.nan}
    recognizer = Recognizer(broken(Engine.open(tiny_engine.path), failures), patience=3)
    for i, frame in enumerate(frames[:6]):
        assert (recognizer.update(frame, i / 10) is None) == (i in failures)
    with pytest.raises(UserError, match="failed at 3 steps in a row, the last time with: the engine gave logits that"):
        recognizer.update(frames[6], 0.6)
    strict = Recognizer(broken(Engine.open(tiny_engine.path), {0: RuntimeError("lost\ndetails")}))
    with pytest.raises(UserError, match="the engine failed at a step with: lost; start again, and build"):
        strict.update(frames[0], 0.0)
    with pytest.raises(UserError, match="patience must be at least 1 step, not 0"):
        Recognizer(tiny_engine.path, patience=0)


def test_a_state_that_cannot_be_reset_is_an_error_at_once(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = broken(Engine.open(tiny_engine.path), {0: RuntimeError("first")})
    recognizer = Recognizer(engine, patience=9)

    def reset(slots: Any = None) -> None:
        raise RuntimeError("the GPU has gone")

    monkeypatch.setattr(engine, "reset", reset)
    with pytest.raises(UserError, match="the GPU has gone"):
        recognizer.update(noise(1, 0)[0], 0.0)


def test_resets_of_the_state_are_counted(tiny_engine: Any) -> None:
    recognizer = Recognizer(tiny_engine.path)
    play(recognizer, noise(5, 1))
    assert recognizer.resets == 0
    play(recognizer, noise(5, 2), 9.0)
    recognizer.restart()
    play(recognizer, noise(5, 3), 9.5)
    # A new stream after a gap is one reset, not two.
    recognizer.restart()
    play(recognizer, noise(5, 4), 20.0)
    assert recognizer.resets == 3


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


def test_smoothing_is_the_span_of_the_average(make_engine: Any) -> None:
    path = make_engine(decision=DecisionSpec(smoothing=1, threshold=0.5, release=0.4, min_steps=1)).path
    frames = plain("blue", 12)
    single = [step.scores[step.labels.index("blue")] for step in play(Recognizer(path), frames)]
    smooth = play(Recognizer(path, smoothing=4), frames)
    means = [np.mean(single[max(0, t - 3) : t + 1]) for t in range(12)]
    assert [step.scores[step.labels.index("blue")] for step in smooth] == pytest.approx(means)
    assert [step.warming_up for step in smooth] == [True] * 3 + [False] * 9
    with pytest.raises(UserError, match="at least 1 step, not 0"):
        Recognizer(path, smoothing=0)


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


@pytest.mark.parametrize(("fps", "stride"), [(30.0, 3), (25.0, 3), (20.0, 2), (7.0, 1)])
def test_on_every_frame_the_probabilities_are_the_mean_of_recognizers_fed_in_turn(
    tiny_engine: Any, fps: float, stride: int
) -> None:
    frames = noise(12, 4) + plain("blue", 9) + noise(12, 5)
    whole = Recognizer(tiny_engine.path, every_frame=fps)
    # Given their frames at the model's rate, each of them makes a step of every one.
    several = [Recognizer(tiny_engine.path) for _ in range(stride)]
    assert whole.engine.stride == stride
    results = play(whole, frames, fps=fps)
    assert [result.frame for result in results] == list(range(len(frames)))
    for first in range(0, len(frames) // stride * stride, stride):
        turn = [play(several[i], [frames[first + i]], first / stride / 10)[0] for i in range(stride)]
        shares = [dict(zip(result.labels, result.scores, strict=True)) for result in turn]
        result = results[first + stride - 1]
        for label, score in zip(result.labels, result.scores, strict=True):
            assert score == pytest.approx(np.mean([share[label] for share in shares]), abs=1e-9)
        assert result.warming_up == turn[-1].warming_up


def test_on_every_frame_an_event_takes_as_long_as_at_the_models_rate(tiny_engine: Any) -> None:
    frames = plain("black", 30) + plain("green", 60) + plain("black", 30)
    spans = []
    for every_frame in (None, 30.0):
        recognizer = Recognizer(tiny_engine.path, every_frame=every_frame)
        results = play(recognizer, frames, fps=30)
        assert len(results) == (120 if every_frame else 40)
        spans.append([event for result in results for event in result.events if event.end is not None])
    (seldom,), (often,) = spans
    assert (often.start, often.end) == pytest.approx((seldom.start, seldom.end), abs=0.2)


def test_on_every_frame_as_many_more_steps_in_a_row_start_an_event(make_engine: Any) -> None:
    spec = DecisionSpec(smoothing=1, threshold=0.01, release=0.01, min_steps=4)
    path = make_engine(decision=spec).path
    for every_frame, frame in ((None, 9), (30.0, 11)):
        results = play(Recognizer(path, every_frame=every_frame), plain("blue", 30), fps=30)
        assert [event.frame for result in results for event in result.events] == [frame]


@pytest.mark.parametrize("start", [5 / 30 + 1.01, 4 / 30 - 0.01])
def test_on_every_frame_a_break_is_a_break_too(tiny_engine: Any, start: float) -> None:
    used, fresh = (Recognizer(tiny_engine.path, every_frame=30.0) for _ in range(2))
    play(used, noise(5, 1), fps=30)
    after = noise(12, 2)
    assert scores(play(used, after, start, 30)) == scores(play(fresh, after, start, 30))


def test_a_wrong_stride_or_frame_rate_is_refused(tiny_engine: Any, tmp_path: Path) -> None:
    every = Recognizer(Engine.open(tiny_engine.path, stride=3), every_frame=29.97)
    with pytest.raises(
        UserError, match=r"stride of 1, but every frame of 30 frames/s needs 3; open it with .*stride=3"
    ):
        Recognizer(Engine.open(tiny_engine.path), every_frame=30)
    with pytest.raises(
        UserError, match=r"stride of 3, but the model's own frame rate needs 1; open it with .*stride=1"
    ):
        Recognizer(Engine.open(tiny_engine.path, stride=3))
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="must be a positive number"):
            Recognizer(tiny_engine.path, every_frame=rate)
    path = write_video(tmp_path / "fast.mp4", counted(30), 60)
    with pytest.raises(UserError, match=r"fast.mp4 has 60 frames/s, which needs a stride of 6, not that of 29.97"):
        next(every.run(path))
    assert len(list(every.run(write_video(tmp_path / "right.mp4", counted(30), 30)))) == 30


def test_weights_are_opened_at_the_stride_that_every_frame_needs() -> None:
    pytest.importorskip("torch")
    weights = Path(__file__).parents[1] / "engines" / "actions_lite0.safetensors"
    assert frame_rate_of(weights) == frame_rate_of()
    assert Recognizer(weights, every_frame=2 * frame_rate_of()).engine.stride == 2


def test_a_slot_that_does_not_exist_is_refused(tiny_engine: Any) -> None:
    with pytest.raises(UserError, match="no slot 2"):
        Recognizer(Engine.open(tiny_engine.path, slots=2), slot=2)
    with pytest.raises(UserError, match="at least 0, not -1"):
        Recognizer(tiny_engine.path, slot=-1)
