"""The pipeline: three threads, the same results, nothing lost that should not be, nothing that grows or stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import cv2
import numpy as np
import pytest
from camera import camera
from clips import counted, number_of, plain, write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import PIECES, Script, bare, looped, noise, pieces, slowed, timed, wait_until

from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.pipeline import Output, Pipeline
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.video.source import Source
from stsm_rt.video.sources import RecordedSource, open_source


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def piped(recognizer: Recognizer, source: Source, *, frames: bool = False) -> list[Output]:
    recognizer.reset()
    with Pipeline(recognizer, source, frames=frames) as pipeline:
        return list(pipeline)


@settings(max_examples=60, deadline=None)
@given(plan=PIECES, fps=st.sampled_from([8.0, 25.0, 30.0]), frames=st.booleans())
def test_its_results_are_those_of_update_bit_for_bit_whatever_happens_in_the_stream(
    tiny_engine: Any, plan: Any, fps: float, frames: bool
) -> None:
    stream = pieces(plan, fps)
    items = stream.items
    one, other = (Recognizer(tiny_engine.path, threshold=0.3, roi=(4, 2, 40, 44)) for _ in range(2))
    expected, end = stream.looped(one)

    outputs = piped(other, stream.script(other), frames=frames)

    assert [bare(output.result) for output in outputs if output.result] == [result for result in expected if result]
    assert other.finish() == end
    if frames:
        assert [output.time for output in outputs] == [time for _, time in items]
        assert [output.result is None for output in outputs] == [result is None for result in expected]
        assert all(np.array_equal(output.frame, frame) for output, (frame, _) in zip(outputs, items, strict=True))
    else:
        assert all(output.frame is None and output.result is not None for output in outputs)


@pytest.mark.parametrize("frames", [True, False])
def test_a_real_video_gives_the_results_of_the_plain_loop(tiny_engine: Any, tmp_path: Path, frames: bool) -> None:
    path = write_video(tmp_path / "clip.mp4", noise(30, 1) + plain("green", 40) + noise(30, 2))
    with open_source(path) as source:
        items = list(source)
    recognizer = Recognizer(tiny_engine.path)
    expected, end = looped(recognizer, items)
    with open_source(path) as source:
        outputs = piped(recognizer, source, frames=frames)
    assert [bare(output.result) for output in outputs if output.result] == [result for result in expected if result]
    assert recognizer.finish() == end
    assert len(outputs) == (100 if frames else 34)


def test_an_event_that_runs_when_the_stream_is_reset_is_in_the_next_result(tiny_engine: Any) -> None:
    items = timed(plain("blue", 20), 10)
    recognizer = Recognizer(tiny_engine.path)
    source = Script(items, lambda index: recognizer.restart() if index == 12 else None)
    results = [output.result for output in piped(recognizer, source)]
    assert results[11] is not None and results[12] is not None
    assert results[11].active == "blue" and (results[12].active, results[12].frame) == (None, 0)
    assert [(event.label, event.end, event.frame) for event in results[12].events] == [("blue", 1.1, 11)]


def test_pictures_that_no_step_needs_are_not_made(tiny_engine: Any, tmp_path: Path) -> None:
    capture = Counting(write_video(tmp_path / "clip.mp4", counted(90)))
    with RecordedSource(capture, "clip") as source:  # type: ignore[arg-type]
        steps = len(piped(Recognizer(tiny_engine.path), source))
    assert capture.grabbed > 90 and (capture.retrieved, steps) == (30, 30)


class Counting:
    """A capture that counts what is asked of it."""

    def __init__(self, path: Path) -> None:
        self.grabbed = self.retrieved = 0
        self.released = False
        self._capture = cv2.VideoCapture(str(path))

    def grab(self) -> bool:
        self.grabbed += 1
        return self._capture.grab()

    def retrieve(self) -> tuple[bool, np.ndarray]:
        self.retrieved += 1
        return self._capture.retrieve()

    def get(self, what: int) -> float:
        return self._capture.get(what)

    def release(self) -> None:
        self.released = True
        self._capture.release()


def test_frames_belong_to_the_caller(tiny_engine: Any) -> None:
    items = timed(noise(30, 3), 10)
    expected, _ = looped(Recognizer(tiny_engine.path), items)
    recognizer, results = Recognizer(tiny_engine.path), []
    with Pipeline(recognizer, Script([(frame.copy(), time) for frame, time in items]), frames=True) as pipeline:
        for frame, _, result in pipeline:
            assert frame is not None
            frame[:] = 255
            results.append(bare(result))
    assert results == expected


def test_the_next_frame_is_read_while_the_engine_steps_and_the_caller_looks(tiny_engine: Any) -> None:
    source = Script(timed(noise(20, 0), 10))
    behind: list[int] = []

    def seen(_: np.ndarray) -> None:
        # Where reading waited for the step, this would wait in vain.
        behind.append(0)
        wait_until(lambda: source.given > min(len(behind), 19))

    recognizer = Recognizer(slowed(Engine.open(tiny_engine.path), 0.0, seen))
    with Pipeline(recognizer, source, frames=False) as pipeline:
        for index, _ in enumerate(pipeline):
            # The engine goes on while the caller holds an output.
            wait_until(lambda index=index: len(behind) > min(index + 1, 18))
    assert len(behind) == 20


def test_a_slow_caller_holds_a_file_back(tiny_engine: Any) -> None:
    source = Script(timed(noise(60, 0), 30))
    ahead = []
    with Pipeline(Recognizer(tiny_engine.path), source, frames=True) as pipeline:
        for index, _ in enumerate(pipeline):
            sleep(0.003)
            ahead.append(source.given - index)
    assert index == 59 and 3 < max(ahead) <= 10


def test_a_live_source_fills_the_engines_own_input(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    engine = slowed(Engine.open(tiny_engine.path), 0.0, lambda frames: given.append(frames is engine.frames))
    recognizer = Recognizer(engine)
    source, _ = camera(noise(20, 0), 100)
    with source:
        piped(recognizer, source)
    assert given and all(given)


def test_the_engine_gets_the_newest_frame_of_a_live_source_and_the_others_are_counted(tiny_engine: Any) -> None:
    frames = counted(80)
    behind = []

    def seen(picture: np.ndarray) -> None:
        behind.append(capture.given - 1 - number_of(picture[0]))

    recognizer = Recognizer(slowed(Engine.open(tiny_engine.path), 0.06, seen), every_frame=10.0)
    source, capture = camera(frames, 60)
    with source, Pipeline(recognizer, source, frames=False) as pipeline:
        results = [output.result for output in pipeline]
    assert len(results) == len(behind) >= 10
    # A frame may come while the input is made.
    assert np.median(behind) <= 1
    dropped = [result.dropped for result in results if result]
    assert dropped == sorted(dropped) and dropped[-1] > 20
    assert pipeline.frame_count + source.dropped == 80


def test_a_slow_caller_of_a_live_source_gets_every_result_and_new_frames(tiny_engine: Any) -> None:
    behind, results, pictures = [], [], []
    source, capture = camera(counted(120), 60)
    with source, Pipeline(Recognizer(tiny_engine.path, every_frame=10.0), source, frames=True) as pipeline:
        for frame, _, result in pipeline:
            results.append(result)
            if frame is not None:
                behind.append(capture.given - 1 - number_of(frame))
                pictures.append(number_of(frame))
                sleep(0.1)
    assert all(results) and [result.frame for result in results if result] == list(range(pipeline.frame_count))
    assert 8 <= len(pictures) < 40 and pictures == sorted(pictures)
    assert np.median(behind) <= 2
    assert pipeline.frame_count > 80


def test_frames_between_the_steps_that_a_slow_caller_misses_hold_nothing_up(tiny_engine: Any) -> None:
    source, _ = camera(counted(240), 240)
    with source, Pipeline(Recognizer(tiny_engine.path), source, frames=True) as pipeline:
        outputs = []
        for output in pipeline:
            outputs.append(output)
            sleep(0.1)
    assert pipeline.frame_count > 160 and len(outputs) < 40
    assert sum(output.result is not None for output in outputs) >= 6


def test_outputs_that_nobody_takes_are_bounded(tiny_engine: Any) -> None:
    source, capture = camera(counted(300), 400)
    with source, Pipeline(Recognizer(tiny_engine.path, every_frame=10.0), source, frames=True) as pipeline:
        wait_until(lambda: capture.released)
        outputs = list(pipeline)
    assert 60 <= pipeline.frame_count < 80
    assert sum(output.frame is not None for output in outputs[:60]) <= 1
    assert pipeline.frame_count + source.dropped == 300


def test_latency_runs_from_the_arrival_of_a_live_frame(tiny_engine: Any) -> None:
    recognizer = Recognizer(slowed(Engine.open(tiny_engine.path), 0.03), every_frame=10.0)
    source, _ = camera(noise(8, 0), 10, conversion=0.03)
    with source:
        latencies = [result.latency for result in recognizer.run(source)]
    # The first frame arrived when the source was opened.
    assert len(latencies) > 5 and all(latency >= 0.06 for latency in latencies[1:])


def test_an_unreadable_image_is_raised_after_the_results_before_it(tiny_engine: Any, tmp_path: Path) -> None:
    for index, frame in enumerate(counted(40)):
        cv2.imwrite(str(tmp_path / f"{index}.png"), frame)
    (tmp_path / "30.png").write_bytes(b"")
    results = []
    with pytest.raises(UserError, match=r"30\.png cannot be decoded"):
        for result in Recognizer(tiny_engine.path).run(tmp_path):
            results.append(result.frame)
    assert results == list(range(0, 30, 3))


def test_a_frame_that_does_not_fit_is_raised(tiny_engine: Any) -> None:
    items = timed(noise(10, 0) + noise(10, 0, (32, 24)), 10)
    outputs = []
    with pytest.raises(UserError, match="does not lie inside the frame of 32x24"):
        outputs += piped(Recognizer(tiny_engine.path, roi=(0, 0, 60, 40)), Script(items))
    assert outputs == []


def test_an_engine_that_fails_is_raised_after_the_results_before_it(tiny_engine: Any) -> None:
    engine = Engine.open(tiny_engine.path)
    steps: list[int] = []

    def seen(_: np.ndarray) -> None:
        steps.append(1)
        if len(steps) == 5:
            raise UserError("the GPU cannot go on")

    source, got = Script(timed(noise(1000, 0), 10)), []
    with (
        pytest.raises(UserError, match="cannot go on"),
        Pipeline(Recognizer(slowed(engine, 0.0, seen)), source, frames=False) as pipeline,
    ):
        for output in pipeline:
            got.append(output.time)
    assert got == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert source.given < 20


def test_whoever_leaves_early_ends_the_threads_and_stops_the_source(tiny_engine: Any, tmp_path: Path) -> None:
    recognizer = Recognizer(tiny_engine.path)
    with open_source(write_video(tmp_path / "clip.mp4", noise(200, 0))) as source:
        for _ in recognizer.run(source):
            break
        assert source.stopped and not any(t.name.startswith("stsm-rt") for t in threading.enumerate())
    source, _ = camera(counted(3), 1.0)
    with source, Pipeline(recognizer, source, frames=True) as pipeline:
        next(pipeline)
    with (
        source,
        pytest.raises(ZeroDivisionError),
        Pipeline(recognizer, Script(timed(counted(99))), frames=True) as pipe,
    ):
        next(pipe)
        1 / 0  # noqa: B018


def test_a_source_that_is_stopped_ends_it_after_what_was_read(tiny_engine: Any) -> None:
    source = Script(timed(noise(1000, 0), 10))
    outputs = []
    with Pipeline(Recognizer(tiny_engine.path), source, frames=True) as pipeline:
        for output in pipeline:
            outputs.append(output)
            if len(outputs) == 5:
                source.stop()
    assert len(outputs) == pipeline.frame_count == source.given < 20


def test_a_reader_that_hangs_is_left_behind_when_the_source_is_stopped(tiny_engine: Any) -> None:
    hang, before = threading.Event(), threading.active_count()
    source = Script(timed(noise(20, 0), 10), lambda index: hang.wait() if index == 12 else None)
    recognizer = Recognizer(tiny_engine.path)
    try:
        with Pipeline(recognizer, source, frames=True) as pipeline:
            taken = 0
            for _ in pipeline:
                taken += 1
                if taken == 12:
                    source.stop()
        assert taken == pipeline.frame_count == 12
    finally:
        hang.set()
    wait_until(lambda: source.given == 13 and threading.active_count() == before)
    # What came too late is nothing that was seen.
    assert pipeline.frame_count == 12


def test_a_capture_is_not_released_under_a_read_that_hangs(tmp_path: Path) -> None:
    capture = Counting(write_video(tmp_path / "clip.mp4", counted(9)))
    source = RecordedSource(capture, "clip")  # type: ignore[arg-type]
    source.read()
    hangs, go_on, grab = threading.Event(), threading.Event(), capture.grab

    def hanging() -> bool:
        hangs.set()
        go_on.wait()
        return grab()

    capture.grab = hanging  # type: ignore[method-assign]
    reader = threading.Thread(target=source.read)
    reader.start()
    hangs.wait()
    try:
        source.close()
        assert not capture.released
    finally:
        go_on.set()
        reader.join()
    source.close()
    assert capture.released


def test_a_pause_holds_it(tiny_engine: Any) -> None:
    source, _ = camera(counted(200), 100)
    with source, Pipeline(Recognizer(tiny_engine.path), source, frames=True) as pipeline:
        next(pipeline)
        pipeline.pause()
        sleep(0.2)
        taken = pipeline.frame_count
        sleep(0.3)
        assert pipeline.frame_count == taken
        pipeline.resume()
        wait_until(lambda: pipeline.frame_count > taken)
        assert sum(1 for _ in pipeline) > 10


@pytest.mark.parametrize("frames", [True, False])
def test_it_takes_as_many_frames_as_were_asked_for(tiny_engine: Any, frames: bool) -> None:
    source, recognizer = Script(timed(noise(100, 0))), Recognizer(tiny_engine.path)
    with Pipeline(recognizer, source, frames=frames, max_frames=31) as pipeline:
        outputs = list(pipeline)
    assert (pipeline.frame_count, source.given, len(outputs)) == (31, 31, 31 if frames else 11)


def test_pipelines_that_share_an_engine_take_turns(tiny_engine: Any) -> None:
    streams = [timed(noise(60, seed), 10) for seed in (1, 2, 3)]
    expected = [looped(Recognizer(tiny_engine.path), items)[0] for items in streams]
    engine = Engine.open(tiny_engine.path, slots=3)
    recognizers = [Recognizer(engine, slot=slot) for slot in range(3)]
    found: list[list[Result | None]] = [[], [], []]
    threads = [
        threading.Thread(
            target=lambda i=i: found[i].extend(bare(o.result) for o in piped(recognizers[i], Script(streams[i])))
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
