"""The command that watches a camera or a video and says what people do."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import numpy as np

from stsm_rt.decision import Event
from stsm_rt.errors import UserError, redact, report
from stsm_rt.pipeline import Pipeline
from stsm_rt.recognizer import Recognizer, Result
from stsm_rt.video.fit import crop_rectangle
from stsm_rt.video.overlay import Overlay
from stsm_rt.video.sample import sample_clip
from stsm_rt.video.sinks import Frame, JsonLinesSink, VideoSink, Window, save_snapshot, trial_window
from stsm_rt.video.source import Source
from stsm_rt.video.sources import open_source

_FALLBACK_RATE = 30.0
_PAUSE_POLL = 0.1  # seconds between two looks at the keyboard while paused
_LONGEST_WAIT = 1.0  # seconds that a frame of a slow recording is waited for, deaf to signals
_LATENCIES = 10_000  # of the last steps; a camera may run for weeks

_Roi = tuple[int, int, int, int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments; None means those of the process.

    Returns:
        The exit code: 0, or 2 after an error in one sentence.
    """
    try:
        arguments = _arguments(argv)
        with contextlib.ExitStack() as stack:
            session = _Session(arguments, stack)
            with _stopping(session.source):
                session.play()
        session.summarize()
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone, and Python would fail once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


@dataclass(frozen=True)
class _Arguments:
    engine: str | None
    source: str | None
    roi: _Roi | None
    headless: bool
    save: Path | None
    events: Path | None
    topk: int
    threshold: float | None
    smoothing: int | None
    every_frame: bool
    max_frames: int | None


def _arguments(argv: Sequence[str] | None) -> _Arguments:
    parser = _Parser(
        prog="stsm-rt webcam",
        description="Recognize actions in a camera, a video, a stream or a folder of images, frame by frame.",
        epilog="Keys in the window: q quits, r resets, space pauses, s takes a snapshot.",
    )
    parser.add_argument("--engine", metavar="FILE", help="engine to run (default: the embedded one)")
    parser.add_argument(
        "--source",
        metavar="0|FILE|DIR|URL",
        help="camera index, video file, folder of images, or rtsp/http URL "
        "(default: camera 0, or the sample clip where there is none)",
    )
    parser.add_argument("--roi", metavar="X,Y,W,H", type=_roi, help="part of the picture to look at, in pixels")
    parser.add_argument("--headless", action="store_true", help="open no window")
    parser.add_argument("--save", metavar="OUT.mp4", type=Path, help="write the annotated video")
    parser.add_argument("--events", metavar="OUT.jsonl", type=Path, help="write results and events as JSON lines")
    parser.add_argument("--topk", metavar="K", type=int, default=3, help="labels in each result (default: 3)")
    parser.add_argument("--threshold", metavar="T", type=float, help="score from 0 to 1 that starts an event")
    parser.add_argument("--smoothing", metavar="N", type=int, help="steps over which the scores are averaged")
    parser.add_argument(
        "--every-frame", action="store_true", help="decide on every frame, not only at the model's frame rate"
    )
    parser.add_argument("--max-frames", metavar="N", type=int, help="stop after N frames")
    arguments = _Arguments(**vars(parser.parse_args(argv)))
    if arguments.max_frames is not None and arguments.max_frames < 1:
        raise UserError(f"--max-frames must be at least 1, not {arguments.max_frames}")
    paths = [os.path.realpath(path) for path in (arguments.save, arguments.events, arguments.source) if path]
    if len(set(paths)) < len(paths):
        raise UserError("--save, --events and --source must be different files")
    return arguments


def _roi(text: str) -> _Roi:
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"x,y,w,h in whole pixels were expected, for example 40,0,320,240, not {text!r}"
        ) from None
    return x, y, width, height


def _open(spec: str | None, roi: _Roi | None) -> tuple[Source, _Roi | None]:
    """Open the source that was asked for, or camera 0, or else the sample clip with its region."""
    if spec is not None:
        return open_source(spec), roi
    try:
        return open_source(0), roi
    except UserError:
        pass
    try:
        clip = sample_clip()
    except UserError as error:
        raise UserError(f"no camera was found and {error}") from error
    _say("no camera was found, so the sample clip is played (choose another with --source)")
    return open_source(clip.path), roi or clip.roi


class _Session:
    """One source on its way through the recognizer to the sinks."""

    def __init__(self, arguments: _Arguments, stack: contextlib.ExitStack) -> None:
        source, roi = _open(arguments.source, arguments.roi)
        self.source = stack.enter_context(source)
        if arguments.every_frame and source.frame_rate is None:
            raise UserError(f"--every-frame needs the frame rate of {source.name}, which declares none; leave it out")
        self._recognizer = Recognizer(
            arguments.engine,
            topk=arguments.topk,
            threshold=arguments.threshold,
            smoothing=arguments.smoothing,
            roi=roi,
            every_frame=source.frame_rate if arguments.every_frame else None,
        )
        manifest = self._recognizer.engine.manifest
        crop_rectangle(source.size, roi, (manifest.input_width, manifest.input_height))
        self._overlay = Overlay(roi=roi)
        self._lines: JsonLinesSink | None = None
        self._video: VideoSink | None = None
        self._window: Window | None = None
        if arguments.events:
            self._lines = stack.enter_context(JsonLinesSink(arguments.events))
        if arguments.save:
            rate = source.frame_rate or _FALLBACK_RATE
            self._video = stack.enter_context(VideoSink(arguments.save, source.size, rate))
        if not arguments.headless:
            with trial_window() as reason:
                if reason is None:
                    self._window = stack.enter_context(Window("stsm-rt", source.size))
            _say(
                f"{reason}, so it runs headless"
                if reason
                else "keys in the window: q quits, r resets, space pauses, s takes a snapshot"
            )
        _say(f"watching {source.name}, {source.size[0]}x{source.size[1]} pixels")
        self._pipeline = Pipeline(
            self._recognizer,
            source,
            frames=self._video is not None or self._window is not None,
            max_frames=arguments.max_frames,
        )
        self._result: Result | None = None
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._steps = self._events = 0
        self._fps = 0.0
        self._begin = self._previous = monotonic()

    def play(self) -> None:
        """Play the source to its end, to the last frame asked for, or until somebody stops it."""
        start = monotonic()
        with self._pipeline:
            for frame, time, result in self._pipeline:
                if result is not None:
                    self._take(result)
                # The first frame is always a step.
                if frame is not None and self._result is not None:
                    self._measure()
                    self._overlay.draw(frame, self._result, time=time, fps=self._fps)
                    if self._video:
                        self._video.write(frame, time if self.source.live else None)
                    if self._window and not self.source.stopped:
                        due = 0.0 if self.source.live else start + time - monotonic()
                        start += self._show(frame, min(max(0.0, due), _LONGEST_WAIT))
        self._tell(self._recognizer.finish())

    def summarize(self) -> None:
        """Say what was done and where the files are."""
        seconds = monotonic() - self._begin
        _say(
            f"{_count(self._pipeline.frame_count, 'frame')}, {_count(self._steps, 'step')}, "
            f"{_count(self._events, 'event')} in {seconds:.1f} s"
            + (f", {self.source.dropped} frames dropped" if self.source.live else "")
        )
        if self.source.live and self._latencies:
            median, p95 = 1000 * np.percentile(self._latencies, (50, 95))
            _say(f"from a frame's arrival to its result: median {median:.1f} ms, p95 {p95:.1f} ms")
        if self._video:
            _say(f"annotated video: {self._video.path}")
        if self._lines:
            _say(f"results and events: {self._lines.path}")

    def _take(self, result: Result) -> None:
        self._result = result
        self._steps += 1
        self._latencies.append(result.latency)
        self._overlay.follow(result)
        if self._lines:
            self._lines.write(result.to_record())
        self._tell(result.events)

    def _show(self, image: Frame, wait: float) -> float:
        """Show a frame, obey the keys, and return how long it was paused in seconds."""
        assert self._window is not None
        key = self._window.show(image, wait)
        begin = monotonic()
        if key == " ":
            self._pipeline.pause()
            self._overlay.change_note(image, "paused")
            key = None
            while key not in (" ", "q") and not self.source.stopped:
                key = self._window.show(image, _PAUSE_POLL)
                self._obey(key, image)
            self._previous = monotonic()
            self._pipeline.resume()
        self._obey(key, image)
        return monotonic() - begin

    def _obey(self, key: str | None, image: Frame) -> None:
        if key == "q":
            self.source.stop()
        elif key == "r":
            self._pipeline.reset()
            _say("reset")
        elif key == "s":
            _say(f"snapshot: {save_snapshot(image)}")

    def _tell(self, events: tuple[Event, ...]) -> None:
        for event in events:
            if event.end is None:
                self._events += 1
                _say(f"{event.start:8.2f} s  {event.label} starts (score {event.peak:.2f})")
            else:
                length = event.end - event.start
                _say(f"{event.end:8.2f} s  {event.label} ends after {length:.2f} s (peak {event.peak:.2f})")
            if self._lines:
                self._lines.write(event.to_record())

    def _measure(self) -> None:
        now = monotonic()
        rate = 1 / max(now - self._previous, 1e-6)
        self._fps = 0.9 * self._fps + 0.1 * rate if self._fps else rate
        self._previous = now


@contextlib.contextmanager
def _stopping(source: Source) -> Iterator[None]:
    """End the source at SIGINT or SIGTERM, so that all files are completed; a second one ends the process."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: object) -> None:
        source.stop()
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: signals go elsewhere
        pass
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _say(line: str) -> None:
    print(redact(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
