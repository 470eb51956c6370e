"""The process that analyses one uploaded video: ``python -m stsm_rt.app.analyse VIDEO --engine E --out DIR``.

A video that hangs a decoder, makes it crash or leak takes this process with it and nothing else; to cancel is to kill
it. The file goes the way of ``stsm-rt webcam``, so the results are the same. In DIR it leaves ``video.mp4``,
``events.jsonl``, ``events.csv`` and ``report.json``, all of them or none; `stsm_rt.app.report.Report` says what is in
them.

While it runs it writes JSON lines to stdout, ten a second at most: ``{"frames": 31, "time": 1.0, "duration": 12.3,
"label": "walk", "score": 0.71}`` with the frames written so far, the source time of the last one in seconds, the
duration that the file declares in seconds or null, and the best label with its score. An error is one sentence on
stderr, and the exit code 2. Where stdin is a pipe, the process ends when the pipe's other end is closed, as it is when
the parent dies.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType

import numpy as np

from stsm_rt.app.browser_video import BrowserVideoSink
from stsm_rt.app.container import Container, hold_opencv_to, read_container
from stsm_rt.app.report import CSV, FORMAT, JSONL, REPORT, VIDEO, EngineFacts, Latency, Report, SourceFacts, Span
from stsm_rt.app.score_curves import ScoreCurves
from stsm_rt.decision import Event
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError, report
from stsm_rt.pipeline import Pipeline
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.video.overlay import Overlay
from stsm_rt.video.sinks import JsonLinesSink
from stsm_rt.video.source import Frame
from stsm_rt.video.sources import open_source

_TOP = 3  # labels in each line of events.jsonl, as the command writes them
_FALLBACK_RATE = 30.0
_LATENCIES = 10_000  # of the last steps
_PROGRESS_EVERY = 0.1  # seconds
_GRACE = 0.5  # seconds by which a video may be longer than is allowed
_SPAN_FIELDS = [field.name for field in dataclasses.fields(Span)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the process.

    Args:
        argv: The arguments; None means those of the process.

    Returns:
        The exit code: 0, or 2 after an error in one sentence.
    """
    arguments = _arguments(argv)
    try:
        _analyse(arguments)
    except UserError as error:
        # The path of an upload says nothing to its owner, and where it lies is nobody's business.
        return report(UserError(str(error).replace(str(arguments.video), arguments.name)))
    except BrokenPipeError:
        # Nobody follows any more, and Python would fail once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


@dataclasses.dataclass(frozen=True)
class _Arguments:
    video: Path
    name: str
    engine: Path
    out: Path
    threshold: float | None
    smoothing: int | None
    roi: tuple[int, int, int, int] | None
    max_seconds: float | None


def _arguments(argv: Sequence[str] | None) -> _Arguments:
    parser = argparse.ArgumentParser(prog="python -m stsm_rt.app.analyse", description="Analyse one video.")
    parser.add_argument("video", metavar="VIDEO", type=Path)
    parser.add_argument("--engine", metavar="FILE", type=Path, required=True, help="engine to run")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the results go")
    parser.add_argument("--name", help="what to call the video (default: the name of its file)")
    parser.add_argument("--threshold", metavar="T", type=float, help="score from 0 to 1 that starts an event")
    parser.add_argument("--smoothing", metavar="N", type=int, help="steps over which the scores are averaged")
    parser.add_argument("--roi", nargs=4, type=int, metavar=("X", "Y", "W", "H"), help="part of the picture, in pixels")
    parser.add_argument("--max-seconds", metavar="S", type=float, help="refuse a longer video")
    given = vars(parser.parse_args(argv))
    given["name"] = given["name"] or given["video"].name
    given["roi"] = given["roi"] and tuple(given["roi"])
    return _Arguments(**given)


def _analyse(arguments: _Arguments) -> None:
    """Make the results in a folder within DIR, and give them their names when they are complete."""
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=arguments.out))
    except OSError as error:
        raise UserError(f"the folder {arguments.out} cannot be written to ({error.strerror})") from error
    try:
        _leave_with_parent(work)
        container = read_container(arguments.video, arguments.name)
        _check_duration(container.duration, arguments)
        hold_opencv_to(container)
        _play(arguments, container, work).save()
        for name in (VIDEO, JSONL, CSV, REPORT):
            os.replace(work / name, arguments.out / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _leave_with_parent(work: Path) -> None:
    """End this process, leaving nothing behind, when whoever started it is gone."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def wait() -> None:
        while os.read(0, 1):
            pass
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):
            work.parent.rmdir()
        os._exit(1)

    threading.Thread(target=wait, name="stsm-rt parent", daemon=True).start()


def _check_duration(seconds: float | None, arguments: _Arguments) -> None:
    limit = arguments.max_seconds
    if seconds is not None and limit is not None and seconds > limit + _GRACE:
        raise UserError(f"{arguments.name} is longer than {_in_words(limit)}, the most that is taken; cut it")


def _in_words(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 120 else f"{seconds:g} seconds"


def _play(arguments: _Arguments, container: Container, work: Path) -> Report:
    """Run the video through the recognizer into the sinks, and say what came of it."""
    engine = Engine.open(arguments.engine)
    manifest = engine.manifest
    with open_source(arguments.video) as source:
        recognizer = Recognizer(
            engine,
            topk=len(manifest.labels),  # for the curves
            threshold=arguments.threshold,
            smoothing=arguments.smoothing,
            roi=arguments.roi,
        )
        rate = source.frame_rate or _FALLBACK_RATE
        frames, last = 0, 0.0
        with (
            _Results(work, manifest.labels) as results,
            _Picture(work, source.size, rate, arguments.roi) as picture,
            Pipeline(recognizer, source, frames=True) as pipeline,
        ):
            progress = _Progress(container.duration)
            for frame, time, result in pipeline:
                _check_duration(time, arguments)
                if result is not None:
                    results.add(result)
                assert frame is not None and results.last is not None  # of a file; the first frame is always a step
                picture.add(frame, results.last, time)
                frames, last = frames + 1, time
                progress.tell(frames, time, results.last)
            results.add_events(recognizer.finish())
            progress.tell(frames, last, results.last, final=True)
        duration = last + 1 / rate
        return Report(
            format=FORMAT,
            engine=EngineFacts(manifest.network, manifest.precision, manifest.runtime, manifest.sha256),
            source=SourceFacts(
                name=arguments.name,
                width=source.size[0],
                height=source.size[1],
                frame_rate=source.frame_rate,
                frames=frames,
                duration=duration,
                declared_duration=container.duration,
            ),
            complete=container.is_complete(frames, duration),
            steps=results.steps,
            threshold=manifest.decision.threshold if arguments.threshold is None else arguments.threshold,
            smoothing=manifest.decision.smoothing if arguments.smoothing is None else arguments.smoothing,
            latency=results.latency(),
            events=tuple(results.events),
            scores=results.curves.choose({event.label for event in results.events}),
            files={"video": VIDEO, "jsonl": JSONL, "csv": CSV},
            folder=work,
        )


class _Results:
    """What the recognizer says, on its way to the two lists of events and the report."""

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        self.curves = ScoreCurves(labels)
        self.last: Result | None = None
        self.steps = 0
        self.events: list[Span] = []
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        with contextlib.ExitStack() as stack:
            self._lines = stack.enter_context(JsonLinesSink(folder / JSONL))
            self._rows = csv.writer(stack.enter_context(open(folder / CSV, "w", encoding="utf-8", newline="")))
            self._rows.writerow(_SPAN_FIELDS)
            self._stack = stack.pop_all()

    def __enter__(self) -> _Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def add(self, result: Result) -> None:
        self.last = result
        self.steps += 1
        self._latencies.append(result.latency)
        self.curves.add(result)
        top = dataclasses.replace(result, labels=result.labels[:_TOP], scores=result.scores[:_TOP])
        self._lines.write(top.to_record())
        self.add_events(result.events)

    def add_events(self, events: tuple[Event, ...]) -> None:
        for event in events:
            self._lines.write(event.to_record())
            if event.end is not None:
                span = Span(event.label, event.start, event.end, event.peak)
                self.events.append(span)
                self._rows.writerow(dataclasses.astuple(span))

    def latency(self) -> Latency:
        median, p95 = np.percentile(self._latencies, (50, 95))
        return Latency(float(median), float(p95))


class _Picture:
    """The annotated video."""

    def __init__(self, folder: Path, size: tuple[int, int], rate: float, roi: tuple[int, int, int, int] | None) -> None:
        self._overlay = Overlay(roi=roi)
        self._sink = BrowserVideoSink(folder / VIDEO, size, rate)
        self._begin = monotonic()

    def __enter__(self) -> _Picture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sink.__exit__(kind, error, traceback)

    def add(self, frame: Frame, result: Result, time: float) -> None:
        speed = (self._sink.frame_count + 1) / max(monotonic() - self._begin, 1e-6)
        self._overlay.draw(frame, result, time=time, fps=speed)
        self._sink.write(frame, time)


class _Progress:
    """Lines on stdout."""

    def __init__(self, duration: float | None) -> None:
        self._duration = duration
        self._due = 0.0

    def tell(self, frames: int, time: float, result: Result | None, *, final: bool = False) -> None:
        now = monotonic()
        if result is None or (now < self._due and not final):
            return
        self._due = now + _PROGRESS_EVERY
        line = {
            "frames": frames,
            "time": time,
            "duration": self._duration,
            "label": result.label,
            "score": result.score,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
