"""What the command ``stsm-rt webcam`` says, writes, sends and counts."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import numpy as np

from stsm_rt.cameras import CLOSED
from stsm_rt.decision import Event
from stsm_rt.delivery import Delivery
from stsm_rt.errors import redact
from stsm_rt.health import HealthServer
from stsm_rt.notify import Mqtt, Webhook
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.run_counts import CameraMetrics, Metrics, status_line
from stsm_rt.video.recording import VideoSink
from stsm_rt.video.sinks import Guarded, JsonLinesSink
from stsm_rt.video.source import Frame, Source, SourceState, StateChange
from stsm_rt.video.window import Window, trial_window
from stsm_rt.webcam_options import Options

_LATENCIES = 10_000  # of the last steps of a camera; it may run for weeks
_STATUS_SECONDS = {True: 1.0, False: 60.0}  # between two status lines, on a terminal and in a log
_CLEAR = "\r\x1b[K"
_TROUBLE = (SourceState.STALLED, SourceState.RECONNECTING, SourceState.FAILED)

_lock = threading.Lock()
_status = ""  # what stands in the terminal's last line
_unwritten = False  # whether standard output took nothing the last time


def say(line: str) -> None:
    """Print a line, without credentials, above the status line."""
    with _lock:
        _print(f"{_CLEAR if _status else ''}{redact(line)}\n{_status}")


def flush() -> int:
    """Give up what standard output still does not take, and return the exit code: 1 if it took nothing at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python would fail once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(_unwritten)


def _print(text: str) -> None:
    """Write to standard output; where it takes nothing, as on a full disk, say so once and go on."""
    global _unwritten
    try:
        print(text, end="", flush=True)
        _unwritten = False
    except BrokenPipeError:
        raise
    except OSError as error:
        if not _unwritten:
            _unwritten = True
            with contextlib.suppress(OSError):
                sys.stderr.write(f"stsm-rt: standard output cannot be written ({error.strerror}); the rest goes on\n")


class Outputs:
    """Where results, events and changes of state go: standard output, files, other machines, the metrics.

    Attributes:
        window: The window, or None.
        video: The annotated video, or None.
        failed: Whether a file was given up.
    """

    def __init__(self, options: Options, stack: contextlib.ExitStack, *, live: bool) -> None:
        """Open everything that was asked for but the window and the video.

        Args:
            options: What was asked for.
            stack: What closes it all.
            live: Whether nothing that is written could be had again by another run.

        Raises:
            UserError: If something cannot be opened.
        """
        self.window: Window | None = None
        self.video: Guarded | None = None
        self._stack, self._live, self._options = stack, live, options
        self._lines: Guarded | None = None
        self._deliveries: list[Delivery] = []
        self._metrics = Metrics()
        self._counts: dict[str, _Counts] = {}
        self._begin = self._said = monotonic()
        if options.events:
            sink = JsonLinesSink(options.events, live=live, rotate=options.rotate, say=say)
            self._lines = stack.enter_context(Guarded(sink, say))
        stack.callback(self._close_deliveries)
        if options.webhook is not None:
            self._deliveries.append(Webhook(options.webhook, say=say))
        if options.mqtt is not None:
            self._deliveries.append(Mqtt(options.mqtt, say=say))
        if options.metrics is not None:
            server = stack.enter_context(HealthServer(self._metrics, options.metrics))
            say(f"metrics on {server.url}/metrics, health on {server.url}/healthz")

    @property
    def failed(self) -> bool:
        """Whether a file was given up."""
        return any(sink.failed for sink in (self._lines, self.video) if sink)

    def open_video(self, size: tuple[int, int], rate: float) -> None:
        """Begin the annotated video, if it was asked for.

        Args:
            size: Width and height in pixels.
            rate: Frames per second.

        Raises:
            UserError: If it cannot be written.
        """
        path, rotate = self._options.save, self._options.rotate
        if path is not None:
            sink = VideoSink(path, size, rate, live=self._live, rotate=rotate, say=say)
            self.video = self._stack.enter_context(Guarded(sink, say))

    def open_window(self, size: tuple[int, int], keys: str) -> None:
        """Open the window, unless none is wanted or there is no display.

        Args:
            size: Width and height of its pictures in pixels.
            keys: What is said about its keys.
        """
        if self._options.headless:
            return
        with trial_window() as reason:
            if reason is None:
                self.window = self._stack.enter_context(Window("stsm-rt", size))
        say(f"{reason}, so it runs headless" if reason else keys)

    def add(
        self,
        name: str,
        source: Source,
        recognizer: Recognizer,
        *,
        one_of_several: bool = False,
        dropped: Callable[[], int] | None = None,
    ) -> None:
        """Begin to count for a camera.

        Args:
            name: What to call it.
            source: Its source.
            recognizer: Its recognizer.
            one_of_several: Whether its records and lines have to say whose they are.
            dropped: Gives the number of frames that were lost; None: those that the source counts.
        """
        metrics = self._metrics.camera(name)
        metrics.state(source.state.value)
        prefix = {"camera": name} if one_of_several else {}
        self._counts[name] = _Counts(metrics, source, recognizer, prefix, dropped or (lambda: source.dropped))

    def frame(self, name: str) -> None:
        """Count a frame that was taken from the source; any thread may call it."""
        counts = self._counts[name]
        counts.metrics.frame(counts.dropped())

    def result(self, name: str, result: Result) -> None:
        """Take a result and its events."""
        counts = self._counts[name]
        counts.steps += 1
        counts.latencies.append(result.latency)
        counts.metrics.step(result.latency)
        counts.follow()
        self._write(counts.prefix, result.to_record())
        self.events(name, result.events)

    def events(self, name: str, events: tuple[Event, ...]) -> None:
        """Take events."""
        counts = self._counts[name]
        where = f"{name}: " if counts.prefix else ""
        for event in events:
            if event.end is None:
                counts.events += 1
                say(f"{event.start:8.2f} s  {where}{event.label} starts (score {event.peak:.2f})")
            else:
                length = event.end - event.start
                say(f"{event.end:8.2f} s  {where}{event.label} ends after {length:.2f} s (peak {event.peak:.2f})")
            self._write(counts.prefix, event.to_record())
            for delivery in self._deliveries:
                delivery.put({**counts.prefix, **event.to_record()})

    def change(self, name: str, change: StateChange) -> None:
        """Take a change of a source's state."""
        counts = self._counts[name]
        early = change.state is SourceState.ENDED and change.reason not in ("", CLOSED)
        counts.metrics.state(change.state.value, early=early)
        counts.follow()
        self._write(counts.prefix, change.to_record())
        came_back = change.state is SourceState.RUNNING and counts.in_trouble
        counts.in_trouble = change.state in _TROUBLE
        if counts.in_trouble or came_back or early:
            where = name if counts.prefix else counts.source.name
            why = f": {change.reason}" if change.reason else ""
            what = "has ended" if early else f"is {change.state.value}{' again' if came_back else ''}"
            say(f"{change.time:8.2f} s  {where} {what}{why}")

    def tick(self) -> None:
        """Say how everything is doing, where there is no window to see it and it is time again."""
        on_terminal = sys.stdout.isatty()
        if self.window is None and monotonic() - self._said >= _STATUS_SECONDS[on_terminal]:
            self._said = monotonic()
            if on_terminal:
                _show_status(status_line(self._metrics))
            else:
                say(f"status: {status_line(self._metrics)}")

    def summarize(self, frames: int) -> None:
        """Say what was done and where the files are.

        Args:
            frames: Number of frames that were taken.
        """
        _show_status("")
        counts = list(self._counts.values())
        live = [of for of in counts if of.source.live]
        dropped = sum(of.dropped() for of in live)
        say(
            f"{_count(frames, 'frame')}, {_count(sum(of.steps for of in counts), 'step')}, "
            f"{_count(sum(of.events for of in counts), 'event')} in {monotonic() - self._begin:.1f} s"
            + (f", {dropped} frames dropped" if live else "")
        )
        for name, of in self._counts.items():
            failures, prefix = of.recognizer.failures, f"{name}: " if of.prefix else ""
            if of.source.live and of.latencies:
                median, p95 = 1000 * np.percentile(of.latencies, (50, 95))
                say(f"{prefix}from a frame's arrival to its result: median {median:.1f} ms, p95 {p95:.1f} ms")
            if failures:
                say(f"{prefix}{_count(failures, 'step')} of the engine failed, and the state was reset each time")
        for to in self._deliveries:
            if to.undelivered:
                say(f"{_count(to.undelivered, 'event record')} for {to.name} did not get there: {to.dead_letters}")
            if to.lost:
                say(f"{_count(to.lost, 'event record')} for {to.name} lost: {to.dead_letters} could not take them")
        if self.video and not self.video.failed:
            say(f"annotated video: {self.video.sink.path}")
        if self._lines and not self._lines.failed:
            say(f"results and events: {self._lines.sink.path}")

    def write_frame(self, image: Frame, time: float | None) -> None:
        """Write a frame of the annotated video, if there is one; see ``VideoSink.write``."""
        if self.video is not None:
            self.video.write(image, time)

    def _write(self, prefix: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write({**prefix, **record})

    def _close_deliveries(self) -> None:
        # Each takes less than a second, all together too.
        closing = [threading.Thread(target=delivery.close) for delivery in self._deliveries]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()


class _Counts:
    """What is counted of one camera."""

    def __init__(
        self,
        metrics: CameraMetrics,
        source: Source,
        recognizer: Recognizer,
        prefix: Mapping[str, Any],
        dropped: Callable[[], int],
    ) -> None:
        self.metrics, self.source, self.recognizer, self.prefix = metrics, source, recognizer, prefix
        self.dropped = dropped
        self.steps = self.events = 0
        self.latencies: deque[float] = deque(maxlen=_LATENCIES)
        self.in_trouble = False
        self._resets = self._reconnects = 0

    def follow(self) -> None:
        """Hand on what others count."""
        for _ in range(self.recognizer.resets - self._resets):
            self.metrics.reset()
        for _ in range(self.source.reconnects - self._reconnects):
            self.metrics.reconnected()
        self._resets, self._reconnects = self.recognizer.resets, self.source.reconnects


def _show_status(line: str) -> None:
    global _status
    with _lock:
        if line or _status:
            _status = redact(line)
            _print(_CLEAR + _status)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
