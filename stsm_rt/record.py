"""The command ``stsm-rt record``: clips of your own action from the camera, one file each, for ``stsm-rt train``."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, strftime
from typing import NoReturn, TypeVar

from stsm_rt.errors import UserError, redact, report
from stsm_rt.own_clips import LONGEST_CLIP, check_label
from stsm_rt.record_screen import (
    AGAIN,
    DELETE,
    KEEP,
    QUIT,
    RecordWindow,
    countdown_screen,
    recording_screen,
    review_screen,
)
from stsm_rt.video.recording import VideoSink
from stsm_rt.video.source import Frame, Source
from stsm_rt.video.sources import open_source
from stsm_rt.video.window import trial_window

_FALLBACK_RATE = 30.0
_GAP = 1.0  # seconds without a picture after which a clip is not whole

_Value = TypeVar("_Value", int, float)


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
            with contextlib.suppress(ValueError):  # not in the main thread: signals go elsewhere
                stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _interrupt))
            session = _Session(arguments, stack)
            session.record()
        session.summarize()
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@dataclass(frozen=True)
class _Arguments:
    label: str
    folder: Path
    source: str
    clips: int
    seconds: float
    countdown: int
    headless: bool


def _arguments(argv: Sequence[str] | None) -> _Arguments:
    parser = _Parser(
        prog="stsm-rt record",
        description="Record clips of an action, each after a countdown, into FOLDER/LABEL.",
        epilog="Keys in the window, after each clip: k keeps it, a does it again, d deletes it and goes on, q ends the "
        "session without it. The picture is not mirrored: your right hand is on its left. Each run is one recording, "
        "and stsm-rt train holds out whole recordings: record every class several times, in other clothes, light or "
        "places. The class 'nothing' is for what looks like an action and is none.",
    )
    parser.add_argument("label", metavar="LABEL", help="the action, such as wave_left, or nothing")
    parser.add_argument(
        "--folder", type=Path, default=Path("actions"), help="holds a folder per class (default: actions)"
    )
    parser.add_argument(
        "--source", metavar="0|FILE|DIR|URL", default="0", help="what to record from (default: camera 0)"
    )
    parser.add_argument("--clips", metavar="N", type=int, default=12, help="how many to record (default: 12)")
    parser.add_argument("--seconds", metavar="S", type=float, default=3.0, help="length of a clip (default: 3)")
    parser.add_argument("--countdown", metavar="S", type=int, default=3, help="seconds before a clip (default: 3)")
    parser.add_argument("--headless", action="store_true", help="open no window: every clip is kept")
    arguments = _Arguments(**vars(parser.parse_args(argv)))
    check_label(arguments.label)
    if arguments.clips < 1:
        raise UserError(f"--clips must be at least 1, not {arguments.clips}")
    if not 0.5 <= arguments.seconds <= LONGEST_CLIP:
        raise UserError(f"--seconds must be between 0.5 and {LONGEST_CLIP:g}, not {arguments.seconds:g}")
    if not 0 <= arguments.countdown <= 60:
        raise UserError(f"--countdown must be between 0 and 60 seconds, not {arguments.countdown}")
    return arguments


class _Session:
    """One recording: some clips of one class from one source."""

    def __init__(self, arguments: _Arguments, stack: contextlib.ExitStack) -> None:
        self._arguments = arguments
        self._folder = arguments.folder / arguments.label
        spec = arguments.source
        self._source: Source = stack.enter_context(open_source(spec))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the folder {self._folder} cannot be made ({error.strerror}); give another --folder"
            ) from error
        self._recording = _free_name(self._folder)
        # A clip has its name only when it is kept.
        self._draft = self._folder / f".{self._recording}.{os.getpid()}.mp4"
        stack.callback(self._draft.unlink, missing_ok=True)
        self._window: RecordWindow | None = None
        if not arguments.headless:
            with trial_window() as reason:
                if reason is None:
                    self._window = RecordWindow("stsm-rt record", self._source.size)
                    stack.enter_context(self._window)
            if reason:
                _say(f"{reason}, so it runs headless and keeps every clip")
        self._rate = self._source.frame_rate or _FALLBACK_RATE
        self._shown = monotonic()  # when the last frame was
        self._saved = 0
        self._time = -math.inf  # of the last frame
        _say(f"recording {self._recording} of {arguments.label!r} from {self._source.name}, not mirrored")

    def record(self) -> None:
        """Record, show and keep clips until there are enough, the source ends or somebody quits."""
        number = 1
        while number <= self._arguments.clips:
            title = f"{self._arguments.label}: clip {number} of {self._arguments.clips}"
            answer = self._count_down(title) or self._take(title)
            if answer is None and self._window is not None:
                answer = self._review(title)
            if answer in (None, KEEP):
                self._keep()
            if answer == QUIT:
                return
            if answer == AGAIN:
                _say(f"{title}: again")
                continue
            if answer == DELETE:
                _say(f"{title}: deleted")
            number += 1

    def summarize(self) -> None:
        """Say what there is now."""
        there = sum(1 for path in self._folder.glob("*.mp4") if not path.name.startswith("."))
        _say(f"{_count(self._saved, 'clip')} recorded, {self._folder} now holds {there}")
        if self._saved:
            _say(f"when every class has some: stsm-rt train {self._arguments.folder}")

    def _count_down(self, title: str) -> str | None:
        """Show the seconds until the clip; returns `QUIT` if somebody does or the source ends."""
        first: float | None = None
        left = self._arguments.countdown
        if left:
            print(f"{title}:", end=" ", flush=True)
        said = left + 1
        while left:
            frame = self._next()
            if frame is None:
                print("the source ended", flush=True)
                return QUIT
            first = self._time if first is None else min(first, self._time)
            left = self._arguments.countdown - math.floor(self._time - first)
            if 0 < left < said:
                said = left
                print(left, end=" ", flush=True)
            if left > 0 and self._show(countdown_screen, frame, title, left) == QUIT:
                print(flush=True)
                return QUIT
            left = max(left, 0)
        print("go" if self._arguments.countdown else f"{title}: go", flush=True)
        return None

    def _take(self, title: str) -> str | None:
        """Record a clip as the draft; returns what is to be done where it is not whole."""
        first: float | None = None
        size: tuple[int, ...] | None = None
        with VideoSink(self._draft, self._source.size, self._rate) as sink:
            while True:
                before = self._time
                frame = self._next()
                if frame is None:
                    _say(f"{title}: the source ended before the clip was whole, so it is not kept")
                    return QUIT
                if first is not None and (not 0 < self._time - before <= _GAP or frame.shape != size):
                    _say(f"{title}: the picture stopped or changed its size, so the clip is recorded again")
                    return AGAIN
                first, size = self._time if first is None else first, frame.shape
                sink.write(frame, self._time if self._source.live else None)
                age = self._time - first
                if self._show(recording_screen, frame, title, age / self._arguments.seconds) == QUIT:
                    return QUIT
                # The last frame lasts a period, too.
                if age >= self._arguments.seconds - 1.5 / self._rate:
                    return None

    def _review(self, title: str) -> str:
        """Play the draft until somebody decides."""
        _say(f"{title}: k keeps it, a does it again, d deletes it, q ends the session without it")
        assert self._window is not None
        while True:
            with open_source(self._draft) as clip:
                count = max(1, clip.frame_count or 1)
                for index, (frame, _) in enumerate(clip):
                    key = self._window.show(review_screen(frame, title, (index + 1) / count), 1 / self._rate)
                    if key is not None:
                        return key

    def _keep(self) -> None:
        self._saved += 1
        path = self._folder / f"{self._recording}-{self._saved:04}.mp4"
        os.replace(self._draft, path)
        _say(f"  {path}")

    def _next(self) -> Frame | None:
        taken = next(self._source, None)
        if taken is None:
            return None
        frame, self._time = taken
        return frame

    def _show(self, draw: Callable[[Frame, str, _Value], Frame], frame: Frame, title: str, value: _Value) -> str | None:
        """Show a frame where there is a window, a recorded one when it is due, and return the key that was pressed."""
        if self._window is None:
            return None
        wait = 0.0 if self._source.live else self._shown + 1 / self._rate - monotonic()
        key = self._window.show(draw(frame, title, value), max(0.0, wait))
        self._shown = monotonic()
        return key


def _free_name(folder: Path) -> str:
    """The time now as the name of a recording that no clip in the folder has."""
    stamp = strftime("%Y%m%d-%H%M%S")
    name, number = stamp, 1
    while any(folder.glob(f"{name}-*")):
        number += 1
        name = f"{stamp}.{number}"
    return name


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _say(line: str) -> None:
    print(redact(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
