from __future__ import annotations

import mmap
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from clips import plain, write_video

from stsm_rt import bench_loop
from stsm_rt.bench_loop import loop_lines, time_file, time_live, watch_memory
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.video.sources import RecordedSource


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", plain("blue", 15) + plain("red", 15))


@pytest.fixture
def engine(tiny_engine) -> Engine:
    return Engine.open(tiny_engine.path)


def test_the_loop_is_compared_with_its_parts(engine: Engine, video: Path):
    found = time_file(engine, video, pairs=2)

    assert (found.video, found.size, found.frames, found.steps) == ("clip.mp4", (64, 48), 30, 10)
    assert found.codec
    for part in (found.loop, found.decode, found.step, found.resize):
        assert len(part.processor) == len(part.wall) == 2 and min(part.wall) > 0
    expected = [
        whole / (decode + step)
        for whole, decode, step in zip(found.loop.processor, found.decode.processor, found.step.processor, strict=True)
    ]
    assert found.processor.ratio_median == pytest.approx(np.median(expected))
    assert found.frames_per_second == pytest.approx(3 * found.steps_per_second)


def test_where_decoding_is_taken_alone_only_the_steps_frames_are_converted(video: Path, monkeypatch):
    converted: list[bool] = []
    read = RecordedSource.read

    def spy(source, wanted=None):
        reading = read(source, wanted)
        if reading is not None:
            converted.append(reading.frame is not None)
        return reading

    monkeypatch.setattr(RecordedSource, "read", spy)

    assert bench_loop._decode(video, {0.0, 0.5}) == 30
    assert converted == [index in (0, 15) for index in range(30)]


def test_live_latency_is_taken_from_the_arrival_of_a_frame_to_its_result(engine: Engine, video: Path):
    found = time_live(engine, video, frames=20, step=0.001)

    assert (found.frames, found.rate) == (20, 30.0)
    assert 1 <= found.results <= 7
    assert 0 < found.latency_median <= found.latency_p95 <= found.latency_max
    assert found.added_p95 == pytest.approx(found.latency_p95 - 0.001)


def test_a_slow_step_is_part_of_the_latency(engine: Engine, video: Path, monkeypatch):
    step = engine.step

    def slow(frames, slots=None):
        end = perf_counter() + 0.06
        while perf_counter() < end:
            pass
        return step(frames, slots)

    monkeypatch.setattr(engine, "step", slow)

    assert time_live(engine, video, frames=12, step=0.06).latency_median >= 0.06


def test_memory_is_watched_over_the_frames_after_the_warm_up(engine: Engine, video: Path, monkeypatch):
    growing = iter(range(100, 10_000))
    monkeypatch.setattr(bench_loop, "_resident", lambda: float(next(growing)))

    found = watch_memory(engine, video, frames=600)

    assert found is not None and found.frames == 600
    # 1 MB is added each time it is looked at, which is at 100 of 600 frames.
    assert found.growth == pytest.approx(10_000 / 6, rel=0.05)
    assert len(found.megabytes) > 80


def test_resident_memory_is_that_of_the_process():
    before = bench_loop._resident()
    # Not of the heap, which may have room from before.
    with mmap.mmap(-1, 50_000_000) as block:
        block.write(bytes(50_000_000))
        after = bench_loop._resident()

    if before is not None and after is not None:  # Linux
        assert 40 < after - before < 120


def test_where_the_system_does_not_tell_memory_is_left_out_and_said(engine: Engine, video: Path, monkeypatch):
    monkeypatch.setattr(bench_loop, "_resident", lambda: None)
    memory = watch_memory(engine, video, frames=100)

    assert memory is None
    lines = loop_lines(time_file(engine, video, 1), time_live(engine, video, 8, 0.001), memory)
    assert "not measured" in lines[-1]


def test_what_is_no_video_is_said(engine: Engine, tmp_path: Path):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for measure in (
        lambda: time_file(engine, text, 1),
        lambda: time_live(engine, text, 10, 0.001),
        lambda: watch_memory(engine, text, 10),
    ):
        with pytest.raises(UserError, match="not a video"):
            measure()


def test_too_few_frames_for_a_line_are_refused(engine: Engine, video: Path):
    with pytest.raises(UserError, match="too few"):
        watch_memory(engine, video, frames=2)
