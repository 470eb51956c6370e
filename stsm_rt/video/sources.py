"""Where frames come from: cameras, streams, video files and folders of images."""

from __future__ import annotations

import math
import os
import re
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError, redact
from stsm_rt.video.source import Frame, Reading, Source, Wanted, every_frame

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_FOLDER_RATE = 30.0
_FALLBACK_RATE = 30.0
_TIMEOUT_MS = 10_000
_WAKE = 0.1  # seconds after which a wait for a live frame looks whether it was stopped
_PATIENCE = 2.0  # seconds to wait for the reader; a stalled connection holds it longer, as a daemon

# What goes wrong is raised; FFmpeg's own log would print URLs with their credentials.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


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
        self._ahead = self._read(every_frame)
        if self._ahead is None or self._ahead.frame is None:
            capture.release()
            raise UserError(f"{name} holds no frame that can be decoded; give a video that plays")
        self.size = _size(self._ahead.frame)

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._capture.release()

    def _next(self, wanted: Wanted) -> Reading | None:
        if self._ahead is None:
            return self._read(wanted)
        first, self._ahead = self._ahead, None
        return first._replace(arrived=perf_counter())

    def _read(self, wanted: Wanted) -> Reading | None:
        """Decode the next frame, and make a picture of it where it is wanted: that takes as long once more."""
        if not self._capture.grab():
            return None
        time = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        # Raw streams and damaged containers have no times, ones that stand still, or far negative ones.
        if not self._index:
            time = max(0.0, time)
        elif not time > self._time:
            time = self._time + 1 / (self.frame_rate or _FALLBACK_RATE)
        self._index += 1
        self._time = time
        frame = None
        if wanted(time):
            ok, image = self._capture.retrieve()
            if not ok:
                return None
            frame = _as_frame(image)
        return Reading(frame, time, perf_counter())


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

    def _next(self, wanted: Wanted) -> Reading | None:
        if self._index == len(self._files):
            return None
        index, time = self._index, self._index / _FOLDER_RATE
        self._index += 1
        frame = self._load(self._files[index]) if wanted(time) else None
        return Reading(frame, time, perf_counter())

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
        self._begin = perf_counter()
        self._newest: Reading | None = Reading(_as_frame(frame), 0.0, self._begin)
        self._wanted: Wanted = every_frame  # of whoever waits for a frame just now
        self.size = _size(frame)
        self._reader = threading.Thread(target=self._read, name="stsm-rt reader", daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Stop the reader and give back the device or the connection."""
        super().close()
        self._reader.join(_PATIENCE)

    def _next(self, wanted: Wanted) -> Reading | None:
        with self._condition:
            self._wanted = wanted
            while not (ready := self._is_ready(wanted)) and not self._ended and not self._stopped:
                self._condition.wait(_WAKE)
            self._wanted = every_frame
            newest, self._newest = self._newest, None
        return newest if ready and not self._stopped else None

    def _is_ready(self, wanted: Wanted) -> bool:
        newest = self._newest
        # Without a picture it was left by whoever waited before and wanted other frames.
        return newest is not None and (newest.frame is not None or not wanted(newest.time))

    def _read(self) -> None:
        while not self._stopped and self._capture.grab():
            arrived = perf_counter()
            time = arrived - self._begin
            frame = None
            if self._wanted(time):
                ok, image = self._capture.retrieve()
                if not ok:
                    break
                frame = _as_frame(image)
            with self._condition:
                self.dropped += self._newest is not None
                self._newest = Reading(frame, time, arrived)
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
    # An absolute path cannot be mistaken for a protocol ("a:b.mp4") by FFmpeg. OpenCV decodes with a thread for each
    # core. Beside an engine that has threads of its own, half as many play a file as fast (on two cores, 640x480 and
    # 1920x1080 H.264) and take 10 to 30 % less processor time for decoding.
    threads = [cv2.CAP_PROP_N_THREADS, max(1, cv2.getNumberOfCPUs() // 2)]
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, threads)
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
    # Each further thread holds back a frame: with eight of them a live H.264 stream came 230 ms later than with one.
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, [*timeouts, cv2.CAP_PROP_N_THREADS, 1])
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
