"""The analysis of an uploaded video, in a process of its own that never outlives whoever wants it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import stsm_rt
from stsm_rt.app.report import Report
from stsm_rt.errors import UserError

_NICE = 10  # so that live visitors keep their frame rate
_SENTENCE = "stsm-rt: error: "
_ERROR_BYTES = 4096  # of the end of stderr that are looked at


@dataclass(frozen=True)
class Limits:
    """What a video may be.

    Attributes:
        megabytes: Size of its file in millions of bytes.
        seconds: Its duration.
        stall: Seconds for which its decoder may give nothing.
        running: Seconds that its analysis may take.
    """

    megabytes: int = 200
    seconds: float = 600
    stall: float = 20
    running: float = 3600


@dataclass(frozen=True)
class Progress:
    """How far the analysis is.

    Attributes:
        frames: Frames done.
        time: Source time of the last one in seconds.
        duration: Seconds that the file declares, or None.
        label: The best label just now.
        score: Its score, 0 to 1.
    """

    frames: int
    time: float
    duration: float | None
    label: str
    score: float


class Job:
    """The analysis of one video: iterate over it for the progress, then read the report.

    Leaving the ``with`` block ends the process and removes the folder, unless the analysis is complete.

    Attributes:
        video: The video.
        folder: Where the results are.
        limits: What the video may be.
        name: What its owner calls it.

    Example:
        >>> with Job(video, folder, engine=engine, limits=Limits()) as job:  # doctest: +SKIP
        ...     for progress in job:
        ...         print(progress.time, progress.label)
        >>> job.report.events  # doctest: +SKIP
    """

    def __init__(
        self,
        video: Path,
        folder: Path,
        *,
        engine: Path,
        threshold: float | None = None,
        smoothing: int | None = None,
        roi: tuple[int, int, int, int] | None = None,
        limits: Limits,
        name: str | None = None,
    ) -> None:
        """Check what can be told without reading the video; the process starts with the block.

        Args:
            video: The video.
            folder: Where the results go: a folder that is empty or does not exist yet.
            engine: The engine file.
            threshold: Score, 0 to 1, that starts an event; None means the engine's.
            smoothing: Steps over which scores are averaged; None means the engine's.
            roi: Region of interest as x, y, width, height in pixels of the frame; None means the whole frame.
            limits: What the video may be.
            name: What its owner calls it; None means the name of the file.

        Raises:
            UserError: If there is no such video, it is empty or too large.
            ValueError: If the folder holds something, which might be removed.
        """
        self.video, self.folder, self.limits = video, folder, limits
        self.name = name or video.name
        self._check()
        options = {"name": self.name, "threshold": threshold, "smoothing": smoothing, "max-seconds": limits.seconds}
        self._command = [
            sys.executable, "-m", "stsm_rt.app.analyse", str(video.absolute()),
            f"--engine={engine.absolute()}", f"--out={folder.absolute()}",
            *(f"--{option}={value}" for option, value in options.items() if value is not None),
            *(["--roi", *map(str, roi)] if roi else []),
        ]  # fmt: skip
        self._report: Report | None = None
        self._cancelled = False
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # ends with an empty one

    @property
    def report(self) -> Report:
        """What came of it.

        Raises:
            UserError: If the analysis is not complete.
        """
        if self._report is None:
            raise UserError(f"the analysis of {self.name} is not complete")
        return self._report

    def __enter__(self) -> Job:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,  # nothing is written; the process ends when it is closed
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            **_own_group(),
        )
        _defer(self._process.pid)
        self._reader = threading.Thread(target=self._read, name="stsm-rt job", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            pipe.close()
        if self._report is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __iter__(self) -> Iterator[Progress]:
        """Follow the process to its end.

        Yields:
            About ten a second.

        Raises:
            UserError: What is wrong with the video or the options, that its decoder stalls or crashed, that it takes
                too long, or that the job was cancelled.
        """
        end = monotonic() + self.limits.running
        try:
            while line := self._lines.get(timeout=self.limits.stall):
                if monotonic() > end:
                    self._kill()
                    raise UserError(
                        f"{self.name} took longer than {self.limits.running:g} seconds, so it was given up; cut it, "
                        "or make its pictures smaller"
                    )
                yield Progress(**json.loads(line))
            code = self._process.wait(self.limits.stall)
        except (queue.Empty, subprocess.TimeoutExpired):
            self._kill()
            raise UserError(
                f"nothing came of {self.name} for {self.limits.stall:g} seconds, so it was given up; "
                "try to convert it, or give another video"
            ) from None
        if self._cancelled:
            raise UserError(f"the analysis of {self.name} was stopped")
        if code:
            raise UserError(self._sentence())
        self._report = Report.load(self.folder)

    def cancel(self) -> None:
        """End the process at once; any thread may call it."""
        self._cancelled = True
        self._kill()

    def _check(self) -> None:
        if not self.video.is_file():
            raise UserError(f"there is no video {self.name}; give it again")
        size = self.video.stat().st_size
        if size == 0:
            raise UserError(f"{self.name} is empty; give a file that a video player plays")
        if size > self.limits.megabytes * 1e6:
            raise UserError(
                f"{self.name} has {size / 1e6:.0f} MB, at most {self.limits.megabytes} MB are taken; "
                "cut it or make it smaller"
            )
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"the folder of a job must be empty, but {self.folder} is not")

    def _kill(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _sentence(self) -> str:
        """What the process said last, or that it crashed."""
        end = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, end - _ERROR_BYTES))
        lines = self._errors.read().decode(errors="replace").splitlines()
        said = [line for line in lines if line.startswith(_SENTENCE)]
        return (
            said[-1].removeprefix(_SENTENCE)
            if said
            else f"{self.name} made its decoder crash; try to convert it, or give another video"
        )


def _defer(pid: int) -> None:
    """Let a process get time when others need none, and be the first to end where memory runs out."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PGRP, pid, _NICE)
    with contextlib.suppress(OSError):  # Linux only
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _own_group() -> dict[str, Any]:
    """Options of a process in a group of its own: it is killed as a whole, and out of reach of a terminal's Ctrl-C."""
    # A session of its own would make Linux's scheduler give it as much time as the server, however nice it is.
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def _environment() -> dict[str, str]:
    """The variables of this process, with which another finds the same stsm_rt."""
    root = str(Path(stsm_rt.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
