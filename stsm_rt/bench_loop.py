"""The whole loop, from a video file to results: what it costs beside decoding and the step.

A file is played without a window (`stsm_rt.recognizer.Recognizer.run`). Processor time is that of the process, all
threads together, and is compared with that of decoding alone and of as many steps alone, in turns. The same file, over
and over at 30 frames per second, stands for a camera.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.endless_video import EndlessCapture
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.recognizer import Recognizer
from stsm_rt.timing import Comparison
from stsm_rt.video.fit import fit
from stsm_rt.video.sources import LiveSource, RecordedSource, open_source

CAMERA_RATE = 30.0
_WARM_UP_SHARE = 5
_SAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one way of spending time took, in each repetition.

    Attributes:
        processor: Seconds of all threads.
        wall: Seconds on the clock.
    """

    processor: tuple[float, ...]
    wall: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FileLoop:
    """A file, played as fast as it goes.

    Attributes:
        video: Name of the file.
        size: Its width and height in pixels.
        codec: Its four letters.
        frames: Frames of the file.
        steps: Steps that the loop made of them.
        loop: The whole loop.
        decode: Decoding every frame, and converting those that a step needs, alone.
        step: As many steps alone.
        resize: Cropping and resizing as many frames alone, which is no part of what the loop is compared with.
        processor: Processor time of the loop divided by that of decoding and steps alone.
        wall: Time of the loop divided by that of the steps alone: engine throughput divided by file throughput.
        frames_per_second: Of the loop, median.
        steps_per_second: Of the loop, median.
    """

    video: str
    size: tuple[int, int]
    codec: str
    frames: int
    steps: int
    loop: Parts
    decode: Parts
    step: Parts
    resize: Parts
    processor: Comparison
    wall: Comparison
    frames_per_second: float
    steps_per_second: float


@dataclass(frozen=True, kw_only=True)
class LiveLoop:
    """The file played as a camera.

    Attributes:
        frames: Frames that the camera gave.
        rate: Frames per second.
        dropped: Frames that the source dropped.
        results: Number of results.
        latency_median: Seconds from the frame's arrival to its result in the caller's hands.
        latency_p95: 95th percentile of these.
        latency_max: Longest of these.
        step: Seconds of a step alone, median.
        added_median: ``latency_median`` without the step.
        added_p95: ``latency_p95`` without the step.
    """

    frames: int
    rate: float
    dropped: int
    results: int
    latency_median: float
    latency_p95: float
    latency_max: float
    step: float
    added_median: float
    added_p95: float


@dataclass(frozen=True, kw_only=True)
class MemoryLoop:
    """Resident memory while the file is played over and over.

    Attributes:
        frames: Frames after the warm-up.
        megabytes: Resident memory, of 10^6 bytes, at equal distances in these frames.
        growth: Slope of a straight line through them, in megabytes per 10,000 frames.
    """

    frames: int
    megabytes: tuple[float, ...]
    growth: float


def time_file(engine: Engine, video: Path, pairs: int) -> FileLoop:
    """Play a file as fast as it goes, and its parts alone, in turns.

    Args:
        engine: Open.
        video: The file.
        pairs: Repetitions of each.

    Raises:
        UserError: The file cannot be played.
    """
    recognizer = Recognizer(engine)
    stepped = {result.time for result in recognizer.run(video)}
    with open_source(video) as source:
        size, (picture, _) = source.size, next(source)
    frames = _decode(video, stepped)
    ways = (
        lambda: sum(1 for _ in recognizer.run(video)),
        lambda: _decode(video, stepped),
        lambda: _steps(engine, len(stepped)),
        lambda: _fits(engine, picture, len(stepped)),
    )
    spent: list[list[tuple[float, float]]] = [[] for _ in ways]
    for pair in range(pairs):
        for index in range(len(ways)) if pair % 2 == 0 else reversed(range(len(ways))):
            begin = process_time(), perf_counter()
            ways[index]()
            spent[index].append((process_time() - begin[0], perf_counter() - begin[1]))
    loop, decode, step, resize = (
        Parts(processor=tuple(cpu for cpu, _ in of), wall=tuple(wall for _, wall in of)) for of in spent
    )
    seconds = float(np.median(loop.wall))
    return FileLoop(
        video=video.name,
        size=size,
        codec=_codec(video),
        frames=frames,
        steps=len(stepped),
        loop=loop,
        decode=decode,
        step=step,
        resize=resize,
        processor=Comparison.of(
            "decoding and steps alone",
            "the loop's processor time",
            np.array(loop.processor) / (np.array(decode.processor) + np.array(step.processor)),
        ),
        wall=Comparison.of("steps alone", "the loop's time", np.array(loop.wall) / np.array(step.wall)),
        frames_per_second=frames / seconds,
        steps_per_second=len(stepped) / seconds,
    )


def time_live(engine: Engine, video: Path, frames: int, step: float) -> LiveLoop:
    """Play a file as a camera and take the time from the arrival of a frame to its result.

    Args:
        engine: Open.
        video: The file; it starts again when it ends.
        frames: Number of frames that the camera gives, in real time.
        step: Seconds of a step alone, median.

    Raises:
        UserError: The file cannot be played.
    """
    capture = EndlessCapture(video, frames, rate=CAMERA_RATE)
    latencies = []
    with LiveSource(cast(cv2.VideoCapture, capture), video.name) as source:
        begin = capture.first
        for result in Recognizer(engine).run(source):
            latencies.append(perf_counter() - begin - result.time)
        dropped = source.dropped
    if not latencies:
        raise UserError(f"{video} gave no result as a camera; give --frames a larger number")
    median, p95 = float(np.median(latencies)), float(np.percentile(latencies, 95))
    return LiveLoop(
        frames=frames,
        rate=CAMERA_RATE,
        dropped=dropped,
        results=len(latencies),
        latency_median=median,
        latency_p95=p95,
        latency_max=max(latencies),
        step=step,
        added_median=median - step,
        added_p95=p95 - step,
    )


def watch_memory(engine: Engine, video: Path, frames: int) -> MemoryLoop | None:
    """Play a file over and over and watch the memory of the process.

    Args:
        engine: Open.
        video: The file.
        frames: Number of frames after the warm-up, which has a fifth as many more.

    Returns:
        What was seen, or None where the system does not tell, which only Linux does.

    Raises:
        UserError: The file cannot be played, or the frames are too few to fit a line.
    """
    if _resident() is None:
        return None
    gc.collect()  # what was used before must not look as if it shrank now
    warm_up = frames // _WARM_UP_SHARE
    capture = EndlessCapture(video, warm_up + frames)
    at = np.linspace(warm_up, warm_up + frames - 1, _SAMPLES)
    seen: list[tuple[int, float]] = []
    with RecordedSource(cast(cv2.VideoCapture, capture), video.name) as source:
        for result in Recognizer(engine).run(source):
            if len(seen) < len(at) and result.frame >= at[len(seen)]:
                seen.append((result.frame, _resident() or 0.0))
    if len(seen) < 2:
        raise UserError(f"{frames} frames are too few to watch the memory; give --frames at least 1000")
    slope = np.polyfit([frame for frame, _ in seen], [megabytes for _, megabytes in seen], 1)[0]
    return MemoryLoop(frames=frames, megabytes=tuple(value for _, value in seen), growth=float(10_000 * slope))


def _decode(video: Path, wanted: set[float]) -> int:
    """Decode a file as the loop does, and convert the frames of the wanted times; returns the number of frames."""
    count = 0
    with open_source(video) as source:
        while source.read(wanted.__contains__) is not None:
            count += 1
    return count


def _codec(video: Path) -> str:
    capture = cv2.VideoCapture(os.path.abspath(video), cv2.CAP_FFMPEG)
    letters = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little")
    capture.release()
    return letters.decode("ascii", "replace")


def _steps(engine: Engine, count: int) -> None:
    frames = engine.frames if engine.manifest.batch == 1 else engine.frames[:1]
    for _ in range(count):
        engine.step(frames, (0,))


def _fits(engine: Engine, picture: npt.NDArray[np.uint8], count: int) -> None:
    for _ in range(count):
        fit(picture, None, engine.frames[0])


def _resident() -> float | None:
    """Resident memory of this process in megabytes; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def loop_lines(file: FileLoop, live: LiveLoop, memory: MemoryLoop | None) -> list[str]:
    """What was measured, in words."""
    share = {
        name: 1000 * float(np.median(part.processor)) / file.steps
        for name, part in (("loop", file.loop), ("decode", file.decode), ("step", file.step), ("resize", file.resize))
    }
    found = [
        f"{file.video}: {file.size[0]}x{file.size[1]} {file.codec}, {file.frames} frames, {file.steps} steps",
        file.processor.line(),
        f"processor time for each step: loop {share['loop']:.2f} ms, decoding alone {share['decode']:.2f} ms, step "
        f"alone {share['step']:.2f} ms, cropping and resizing alone {share['resize']:.2f} ms",
        f"{file.wall.line()}: {file.frames_per_second:.0f} frames/s, {file.steps_per_second:.1f} steps/s",
        f"live at {live.rate:g} frames/s: {1000 * live.latency_median:.1f} ms from a frame's arrival to its result, "
        f"p95 {1000 * live.latency_p95:.1f} ms; beyond the step of {1000 * live.step:.1f} ms p95 "
        f"{1000 * live.added_p95:.1f} ms; {live.dropped} of {live.frames} frames dropped",
    ]
    if memory is None:
        return [*found, "memory: not measured, this system has no /proc/self/statm"]
    return [*found, f"memory: {memory.growth:+.2f} MB per 10,000 frames, over {memory.frames} frames"]
