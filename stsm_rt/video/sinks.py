"""Where results go: JSON lines, an annotated video, a window, snapshots."""

from __future__ import annotations

import abc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError

Frame = npt.NDArray[np.uint8]

# It says a line when its window is open, and leaves it open until its input ends.
_TRIAL = "import cv2, sys; cv2.namedWindow('stsm-rt'); cv2.waitKey(1); print(flush=True); sys.stdin.read()"
_TRIAL_SECONDS = 20.0
_KEYS = {ord("q"): "q", 27: "q", ord("r"): "r", ord(" "): " ", ord("s"): "s"}


class _FileSink(abc.ABC):
    """A file that takes its name when it is complete: ``close`` keeps it, ``discard`` removes it.

    As a context manager it is kept, unless an error ends the block.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._target = self.path.resolve()
        self._temporary = self._target.with_name(f".{self._target.stem}.{os.getpid()}.partial{self._target.suffix}")
        folder = self._target.parent
        if not folder.is_dir():
            raise UserError(f"{self.path} cannot be written: there is no folder {folder}; make it first")
        if self._target.is_dir():
            raise UserError(f"{self.path} is a folder; give the name of a file")
        if not os.access(folder, os.W_OK):
            raise UserError(f"{self.path} cannot be written: the folder {folder} is read-only; give another one")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def close(self) -> None:
        """Complete the file and give it its name."""
        self._finish()
        if self._temporary.exists():
            os.replace(self._temporary, self._target)

    def discard(self) -> None:
        """Remove what was written."""
        self._finish()
        self._temporary.unlink(missing_ok=True)

    @abc.abstractmethod
    def _finish(self) -> None:
        """Close what is open; may be called twice."""


class JsonLinesSink(_FileSink):
    """One JSON object per line.

    A target that is no regular file (a pipe, a terminal) is written to directly, line by line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Start the file.

        Args:
            path: Target; an existing file is replaced when the sink closes.

        Raises:
            UserError: If the target cannot be written.
        """
        super().__init__(path)
        direct = self._target.exists() and not self._target.is_file()
        try:
            self._file = open(  # noqa: SIM115 - closed by _finish
                self._target if direct else self._temporary, "w", encoding="utf-8", buffering=1
            )
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror})") from error

    def __enter__(self) -> JsonLinesSink:
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line."""
        try:
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror})") from error

    def _finish(self) -> None:
        self._file.close()


class VideoSink(_FileSink):
    """An MP4 file (MPEG-4 Part 2).

    Attributes:
        frame_count: Frames written so far.
    """

    def __init__(self, path: str | os.PathLike[str], size: tuple[int, int], fps: float) -> None:
        """Start the file.

        Args:
            path: Target, ending in ``.mp4``; an existing file is replaced when the sink closes.
            size: Width and height in pixels; an odd one loses its last column or row.
            fps: Frames per second at which the video plays.

        Raises:
            UserError: If the target cannot be written or is no MP4.
        """
        super().__init__(path)
        if self._target.suffix.lower() != ".mp4":
            raise UserError(f"the annotated video is an MP4, so {self.path} must end in .mp4")
        # The codec's clock ticks at most 65,535 times a second, and OpenCV looks for three decimals.
        self.fps = round(fps, 3 if fps < 60 else 2 if fps < 600 else 1)
        self.size = size
        self.frame_count = 0
        self._first_time: float | None = None
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._temporary), cv2.CAP_FFMPEG, codec, self.fps, size)
        if not self._writer.isOpened():
            self.discard()
            raise UserError(
                f"OpenCV cannot write {self.path} as MP4 with {size[0]}x{size[1]} pixels at {self.fps} "
                "frames/s; give another file or another source"
            )

    def __enter__(self) -> VideoSink:
        return self

    def write(self, image: Frame, time: float | None = None) -> None:
        """Write one frame.

        Args:
            image: uint8 (H, W, 3), BGR; one of another size is fitted in, with black borders.
            time: Source time in seconds. If given, the frame is repeated or left out so that the video plays
                at the source's speed although its frames came irregularly; at most one second is filled.
        """
        count = 1
        if time is not None:
            if self._first_time is None:
                self._first_time = time
            due = round((time - self._first_time) * self.fps) + 1
            count = due - self.frame_count
            if not 0 <= count <= self.fps:
                self._first_time = time - self.frame_count / self.fps
                count = 1
        if count > 0 and (image.shape[1], image.shape[0]) != self.size:
            image = letterbox(image, self.size)
        for _ in range(count):
            self._writer.write(image)
            self.frame_count += 1

    def close(self) -> None:
        """Complete the file and give it its name.

        Raises:
            UserError: If not all frames arrived in the file; it is removed.
        """
        self._finish()
        # OpenCV does not say when a disk is full.
        written = cv2.VideoCapture(str(self._temporary), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)
        if written != self.frame_count:
            self.discard()
            raise UserError(f"{self.path} could not be written completely; look whether the disk is full")
        super().close()

    def _finish(self) -> None:
        self._writer.release()


class Window:
    """A window on the screen.

    Keys: ``q`` or escape quits, ``r`` resets, space pauses, ``s`` takes a snapshot; closing the window quits.
    """

    def __init__(self, title: str, size: tuple[int, int]) -> None:
        """Open the window.

        Args:
            title: Its title.
            size: Width and height of the pictures in pixels; the window is made smaller if they are large.
        """
        self._title = title
        scale = min(1.0, 1280 / size[0], 800 / size[1])
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        cv2.resizeWindow(title, round(size[0] * scale), round(size[1] * scale))

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        cv2.destroyAllWindows()

    def show(self, image: Frame, wait: float = 0.0) -> str | None:
        """Show a picture and look for a key.

        Args:
            image: uint8 (H, W, 3), BGR.
            wait: Seconds to wait for a key, at least a millisecond.

        Returns:
            ``"q"``, ``"r"``, ``" "``, ``"s"`` or None.
        """
        cv2.imshow(self._title, image)
        key = cv2.waitKey(max(1, round(wait * 1000)))
        if cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1:
            return "q"
        return _KEYS.get(key & 0xFF) if key >= 0 else None


@contextmanager
def trial_window() -> Iterator[str | None]:
    """Find out whether a window can be opened; open yours in the block.

    Without a display, OpenCV does not raise but aborts the process. A display that is named may still not
    answer, and some builds of OpenCV have no windows, so a process of its own tries it. It keeps its window until the
    block ends, because a bare X server starts anew when its last client leaves.

    Yields:
        Why no window can be opened, or None where one can.
    """
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        yield "there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set)"
        return
    with subprocess.Popen(
        [sys.executable, "-c", _TRIAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        timer = threading.Timer(_TRIAL_SECONDS, process.kill)
        timer.start()
        try:
            opened = process.stdout.readline()
            timer.cancel()
            yield None if opened else "the display does not answer, or this OpenCV has no windows"
        finally:
            timer.cancel()
            process.kill()


def save_snapshot(image: Frame, folder: str | os.PathLike[str] = ".") -> Path:
    """Write a picture as ``snapshot-0001.png`` or with the next number that is free.

    Args:
        image: uint8 (H, W, 3), BGR.
        folder: Where to write it.

    Returns:
        The file that was written.

    Raises:
        UserError: If the folder cannot be written to.
    """
    ok, data = cv2.imencode(".png", image)
    if not ok:
        raise UserError(f"OpenCV cannot encode a picture of shape {image.shape} as PNG")
    number = 1
    while True:
        path = Path(folder) / f"snapshot-{number:04}.png"
        try:
            with open(path, "xb") as file:
                file.write(data.tobytes())
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"the snapshot {path} cannot be written ({error.strerror})") from error


def letterbox(image: Frame, size: tuple[int, int]) -> Frame:
    """Fit a picture into another size with black borders.

    Args:
        image: uint8 (H, W, 3), BGR.
        size: Width and height in pixels.

    Returns:
        A new picture, uint8 (height, width, 3).
    """
    scale = min(size[0] / image.shape[1], size[1] / image.shape[0])
    width, height = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    x, y = (size[0] - width) // 2, (size[1] - height) // 2
    canvas[y : y + height, x : x + width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return canvas
