"""Where frames come from: cameras, streams, video files and folders of images."""

from __future__ import annotations

import abc
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError, redact

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_FOLDER_RATE = 30.0
_FALLBACK_RATE = 30.0
_TIMEOUT_MS = 10_000
_WAKE = 0.1  # seconds after which a wait for a live frame looks whether it was stopped
_PATIENCE = 2.0  # seconds to wait for the reader; a stalled connection holds it longer, as a daemon

# What goes wrong is raised; FFmpeg's own log would print URLs with their credentials.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

Frame = npt.NDArray[np.uint8]


class Source(abc.ABC):
    """An iterator of ``(frame, time)`` that is closed like a file.

    Frames are uint8 (H, W, 3) in BGR and belong to the caller; times are seconds of the source's time.

    Attributes:
        live: Whether frames are lost when nobody waits for them.
        dropped: Frames lost so far, 0 where ``live`` is false.
        frame_rate: Frames per second as the source declares it, or None.
        name: What to call the source, without credentials.
        frame_count: Number of frames as the source declares it, or None.
        size: Width and height of the first frame in pixels.
    """

    live: bool = False
    dropped: int = 0
    frame_rate: float | None = None
    name: str
    frame_count: int | None = None
    size: tuple[int, int]

    def __init__(self) -> None:
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether somebody has ended the iteration with ``stop``."""
        return self._stopped

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        return self

    def __next__(self) -> tuple[Frame, float]:
        """Return the next frame and its time; a live source waits for it."""
        item = None if self._stopped else self._next()
        if item is None:
            raise StopIteration
        return item

    def stop(self) -> None:
        """End the iteration at the next frame; may be called from a signal handler or another thread."""
        self._stopped = True

    def close(self) -> None:
        """Give back the device, the connection or the file."""
        self.stop()

    @abc.abstractmethod
    def _next(self) -> tuple[Frame, float] | None: ...


class RecordedSource(Source):
    """A video file: waits for its consumer, loses nothing, keeps the container's time."""

    def __init__(self, capture: cv2.VideoCapture, name: str) -> None:
        """Read the first frame.

        Args:
            capture: The opened video, which is closed with the source.
            name: What to call the source.

        Raises:
            UserError: If the video holds no frame that can be decoded.
        """
        super().__init__()
        self.name = name
        self._capture = capture
        self._index = 0
        self._time = 0.0
        self.frame_rate = _declared_rate(capture)
        self.frame_count = _declared_count(capture)
        self._ahead = self._read()
        if self._ahead is None:
            capture.release()
            raise UserError(f"{name} holds no frame that can be decoded; give a video that plays")
        self.size = _size(self._ahead[0])

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._capture.release()

    def _next(self) -> tuple[Frame, float] | None:
        item, self._ahead = self._ahead, None
        return item or self._read()

    def _read(self) -> tuple[Frame, float] | None:
        ok, frame = self._capture.read()
        if not ok:
            return None
        time = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        # Raw streams and damaged containers have no times, ones that stand still, or far negative ones.
        if not self._index:
            time = max(0.0, time)
        elif not time > self._time:
            time = self._time + 1 / (self.frame_rate or _FALLBACK_RATE)
        self._index += 1
        self._time = time
        return _as_frame(frame), time


class FolderSource(Source):
    """The images of a folder in natural order (``2.png`` before ``10.png``), at 30 frames per second."""

    frame_rate = _FOLDER_RATE

    def __init__(self, folder: Path) -> None:
        """List the images and read the first one.

        Raises:
            UserError: If there is no image or the first one cannot be decoded.
        """
        super().__init__()
        self.name = str(folder)
        try:
            files = [path for path in folder.iterdir() if path.suffix.lower() in _IMAGES and path.name[0] != "."]
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be read ({error.strerror})") from error
        if not files:
            raise UserError(f"the folder {folder} holds no images ({' '.join(sorted(_IMAGES))})")
        self._files = sorted(files, key=_natural)
        self.frame_count = len(files)
        self._index = 0
        self.size = _size(self._load(self._files[0]))

    def _next(self) -> tuple[Frame, float] | None:
        if self._index == len(self._files):
            return None
        index = self._index
        self._index += 1
        return self._load(self._files[index]), index / _FOLDER_RATE

    @staticmethod
    def _load(path: Path) -> Frame:
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise UserError(f"the image {path} cannot be read ({error.strerror})") from error
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if image is None:
            raise UserError(f"the image {path} cannot be decoded; replace it or take it out of the folder")
        return _as_frame(image)


class LiveSource(Source):
    """A camera or a stream: a thread reads it, the newest frame wins, and lost frames are counted.

    Times are those of arrival, in seconds since the source was opened.
    """

    live = True

    def __init__(self, capture: cv2.VideoCapture, name: str) -> None:
        """Wait for the first frame and start the reader.

        Args:
            capture: The opened device or stream, which is closed with the source.
            name: What to call the source.

        Raises:
            UserError: If no frame arrives.
        """
        super().__init__()
        self.name = name
        self.frame_rate = _declared_rate(capture)
        self._capture = capture
        self._condition = threading.Condition()
        self._ended = False
        ok, frame = capture.read()
        if not ok:
            capture.release()
            raise UserError(f"{name} was opened but gives no frame; check that nothing else uses it")
        self._begin = monotonic()
        self._newest: tuple[Frame, float] | None = (_as_frame(frame), 0.0)
        self.size = _size(frame)
        self._reader = threading.Thread(target=self._read, name="stsm-rt reader", daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Stop the reader and give back the device or the connection."""
        super().close()
        self._reader.join(_PATIENCE)

    def _next(self) -> tuple[Frame, float] | None:
        with self._condition:
            while self._newest is None and not self._ended and not self._stopped:
                self._condition.wait(_WAKE)
            item, self._newest = self._newest, None
        return None if self._stopped else item

    def _read(self) -> None:
        while not self._stopped:
            ok, frame = self._capture.read()
            if not ok:
                break
            with self._condition:
                self.dropped += self._newest is not None
                self._newest = (_as_frame(frame), monotonic() - self._begin)
                self._condition.notify()
        with self._condition:
            self._ended = True
            self._condition.notify()
        self._capture.release()


def open_source(spec: int | str | os.PathLike[str]) -> Source:
    """Open a source of frames.

    Args:
        spec: A camera index (0 or ``"0"``), a URL (rtsp, http, https), a video file, or a folder of images. A
            URL of a recording with a known number of frames is played like a file, any other URL is live.

    Returns:
        The open source; use it in a ``with`` statement.

    Raises:
        UserError: If there is no such camera, file or folder, or it gives no frame.
    """
    _silence_opencv()
    text = os.fspath(spec) if not isinstance(spec, int) else str(spec)
    if isinstance(spec, int) or (isinstance(spec, str) and text.isdecimal()):
        return _open_camera(int(text))
    scheme = re.match(r"([a-z][a-z0-9+.-]+):/", text, re.IGNORECASE)
    if isinstance(spec, str) and scheme:
        return _open_url(text, scheme[1].lower())
    path = Path(text)
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise UserError(f"there is no video {path}; give a camera index, a video file, a folder of images, or a URL")
    if not os.access(path, os.R_OK):
        raise UserError(f"the video {path} may not be read; change its permissions")
    # An absolute path cannot be mistaken for a protocol ("a:b.mp4") by FFmpeg.
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise UserError(f"{path} is not a video that can be decoded; give a video file or a folder of images")
    return RecordedSource(capture, str(path))


def _open_camera(index: int) -> Source:
    try:
        capture = cv2.VideoCapture(index)
    except cv2.error:
        capture = None
    if capture is None or not capture.isOpened():
        raise UserError(
            f"camera {index} cannot be opened; check that it is connected, free and allowed to be used, "
            "or give a video as the source"
        )
    return LiveSource(capture, f"camera {index}")


def _open_url(url: str, scheme: str) -> Source:
    name = redact(url)
    if scheme not in ("rtsp", "http", "https"):
        raise UserError(f"{name} has the scheme {scheme}, rtsp, http and https can be opened")
    if scheme == "rtsp":
        os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp")
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, timeouts)
    if not capture.isOpened():
        raise UserError(
            f"{name} cannot be opened within {_TIMEOUT_MS // 1000} s; check the address, the network and the password"
        )
    return LiveSource(capture, name) if _declared_count(capture) is None else RecordedSource(capture, name)


def _silence_opencv() -> None:
    set_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # OpenCV 4, OpenCV 5
    set_level(0)


def _declared_rate(capture: cv2.VideoCapture) -> float | None:
    rate = capture.get(cv2.CAP_PROP_FPS)
    # Containers without a frame rate declare the ticks of their clock, up to 90,000 per second.
    return rate if math.isfinite(rate) and 0 < rate <= 1000 else None


def _declared_count(capture: cv2.VideoCapture) -> int | None:
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if math.isfinite(count) and count > 0 else None


def _size(frame: npt.NDArray[Any]) -> tuple[int, int]:
    return frame.shape[1], frame.shape[0]


def _as_frame(image: npt.NDArray[Any]) -> Frame:
    return np.asarray(image, np.uint8)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
