"""The command that watches cameras or a video and says what people do."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

import numpy as np

from stsm_rt.cameras import CLOSED
from stsm_rt.errors import UserError, report
from stsm_rt.mosaic import draw_lost
from stsm_rt.pipeline import Output, Pipeline
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.video.fit import crop_rectangle
from stsm_rt.video.overlay import Overlay
from stsm_rt.video.sample import sample_clip
from stsm_rt.video.source import Frame, Source, SourceState, StateChange
from stsm_rt.video.sources import open_source
from stsm_rt.video.window import save_snapshot
from stsm_rt.webcam_options import Options, Roi, parse
from stsm_rt.webcam_outputs import Outputs, flush, say
from stsm_rt.webcam_several import PATIENCE, SeveralCameras

_FALLBACK_RATE = 30.0
_PAUSE_POLL = 0.1  # seconds between two looks at the keyboard while paused
_LONGEST_WAIT = 1.0  # seconds that a frame of a slow recording is waited for, deaf to signals
_PAINTING, _PAINTING_EVERY = 0.02, 0.2  # seconds that the window gets, and how often; else a busy one never paints
_IDLE = 0.2  # seconds without a frame after which the window and the status line are looked after all the same
_STALE = 2.0  # seconds without a frame after which a live source's last one is not shown any more


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments; None means those of the process.

    Returns:
        The exit code: 0; 1 where a file was given up or the output could not be written; 2 after an error in one
        sentence.
    """
    return max(_run(argv), flush())


def _run(argv: Sequence[str] | None) -> int:
    # What the sources log is said with the results.
    logging.getLogger("stsm_rt").addHandler(logging.NullHandler())
    try:
        options = parse(argv)
        with contextlib.ExitStack() as stack:
            session = SeveralCameras(options, stack) if options.cameras else _OneCamera(options, stack)
            with _stopping(session.stop):
                session.play()
        return session.summarize()
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


def _open(options: Options, changes: queue.SimpleQueue[StateChange]) -> tuple[Source, Roi | None]:
    """Open the source that was asked for, or camera 0, or else the sample clip with its region."""

    def opened(spec: str | int) -> Source:
        return open_source(
            spec, read_timeout=options.read_timeout, max_retries=options.max_retries, on_change=changes.put
        )

    if options.source is not None:
        return opened(options.source), options.roi
    try:
        return opened(0), options.roi
    except UserError:
        # That it is not there is no news of the clip.
        while not changes.empty():
            changes.get()
    try:
        clip = sample_clip()
    except UserError as error:
        raise UserError(f"no camera was found and {error}") from error
    say("no camera was found, so the sample clip is played (choose another with --source)")
    return open_source(clip.path, on_change=changes.put), options.roi or clip.roi


class _OneCamera:
    """One source on its way through the recognizer to the sinks."""

    def __init__(self, options: Options, stack: contextlib.ExitStack) -> None:
        self._changes: queue.SimpleQueue[StateChange] = queue.SimpleQueue()
        source, roi = _open(options, self._changes)
        self._opened = stack.enter_context(contextlib.ExitStack())
        self._source = self._opened.enter_context(source)
        if options.every_frame and source.frame_rate is None:
            raise UserError(f"--every-frame needs the frame rate of {source.name}, which declares none; leave it out")
        self._recognizer = Recognizer(
            options.engine,
            topk=options.topk,
            threshold=options.threshold,
            smoothing=options.smoothing,
            roi=roi,
            every_frame=source.frame_rate if options.every_frame else None,
            patience=PATIENCE,
        )
        manifest = self._recognizer.engine.manifest
        crop_rectangle(source.size, roi, (manifest.input_width, manifest.input_height))
        self._overlay = Overlay(roi=roi)
        self._outputs = Outputs(options, stack, live=source.live)
        self._outputs.add(source.name, source, self._recognizer)
        self._outputs.open_video(source.size, source.frame_rate or _FALLBACK_RATE)
        keys = "keys in the window: q quits, r resets, space pauses, s takes a snapshot"
        self._outputs.open_window(source.size, keys)
        say(f"watching {source.name}, {source.size[0]}x{source.size[1]} pixels")
        self._pipeline = Pipeline(
            self._recognizer,
            source,
            frames=self._outputs.video is not None or self._outputs.window is not None,
            max_frames=options.max_frames,
            on_frame=lambda: self._outputs.frame(source.name),
        )
        self._result: Result | None = None
        self._time = 0.0
        self._reason = ""
        self._fps = 0.0
        self._previous = self._shown = monotonic()
        self._painted = 0.0

    def stop(self) -> None:
        """End at the next frame; may be called from a signal handler."""
        self._source.stop()

    def play(self) -> None:
        """Play the source to its end, to the last frame asked for, or until somebody stops it."""
        self._start = monotonic()
        try:
            with self._pipeline:
                self._take_all()
        finally:
            # Now, while what it says of its end can still be written.
            self._opened.close()
            self._take_changes()
            if self._source.state not in (SourceState.ENDED, SourceState.FAILED):
                self._outputs.change(self._source.name, StateChange(SourceState.ENDED, self._time, CLOSED))
            self._outputs.events(self._source.name, self._recognizer.finish())

    def summarize(self) -> int:
        """Say what was done, and give the exit code."""
        self._outputs.summarize(self._pipeline.frame_count)
        return int(self._outputs.failed)

    def _take_all(self) -> None:
        while True:
            try:
                output = self._pipeline.take(_IDLE)
            except StopIteration:
                return
            self._take_changes()
            if output is not None:
                self._take(output)
            elif self._source.live:
                self._show_lost()
            self._outputs.tick()

    def _take(self, output: Output) -> None:
        frame, time, result = output
        self._time = time
        if result is not None:
            self._result = result
            self._overlay.follow(result)
            self._outputs.result(self._source.name, result)
        # The first frame is a step, unless that failed.
        if frame is not None and self._result is not None:
            self._measure()
            self._overlay.draw(frame, self._result, time=time, fps=self._fps)
            self._outputs.write_frame(frame, time if self._source.live else None)
            if self._outputs.window and not self._source.stopped:
                now = self._shown = monotonic()
                wait = 0.0 if self._source.live else min(self._start + time - now, _LONGEST_WAIT)
                if now - self._painted > _PAINTING_EVERY:
                    wait = max(wait, _PAINTING)
                if wait >= _PAINTING:
                    self._painted = now
                self._start += self._show(frame, max(0.0, wait))

    def _take_changes(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                change = self._changes.get_nowait()
                self._reason = change.reason
                self._outputs.change(self._source.name, change)

    def _show_lost(self) -> None:
        """Show in the window that no frame comes, and not the last one as if it were new."""
        silence = monotonic() - self._shown
        running = self._source.state is SourceState.RUNNING
        if self._outputs.window and not self._source.stopped and (not running or silence > _STALE):
            image: Frame = np.zeros((self._source.size[1], self._source.size[0], 3), np.uint8)
            state = f"no frame for {silence:.0f} s" if running else self._source.state.value
            draw_lost(image, state, "" if running else self._reason)
            self._show(image, 0.0)

    def _show(self, image: Frame, wait: float) -> float:
        """Show a frame, obey the keys, and return how long it was paused in seconds."""
        assert self._outputs.window is not None
        key = self._outputs.window.show(image, wait)
        begin = monotonic()
        if key == " ":
            self._pipeline.pause()
            self._overlay.change_note(image, "paused")
            key = None
            while key not in (" ", "q") and not self._source.stopped:
                key = self._outputs.window.show(image, _PAUSE_POLL)
                self._obey(key, image)
            self._previous = monotonic()
            self._pipeline.resume()
        self._obey(key, image)
        return monotonic() - begin

    def _obey(self, key: str | None, image: Frame) -> None:
        if key == "q":
            self.stop()
        elif key == "r":
            self._pipeline.reset()
            say("reset")
        elif key == "s":
            say(f"snapshot: {save_snapshot(image)}")

    def _measure(self) -> None:
        now = monotonic()
        rate = 1 / max(now - self._previous, 1e-6)
        self._fps = 0.9 * self._fps + 0.1 * rate if self._fps else rate
        self._previous = now


@contextlib.contextmanager
def _stopping(stop: Callable[[], object]) -> Iterator[None]:
    """End it all at SIGINT or SIGTERM, so that all files are completed; a second one ends the process."""
    before: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        stop()
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals go elsewhere
        pass
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


if __name__ == "__main__":
    sys.exit(main())
