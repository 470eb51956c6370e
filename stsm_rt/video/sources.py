"""Where frames come from: cameras, streams, video files, folders of images and standard input."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np

from stsm_rt.errors import UserError, redact
from stsm_rt.video import captures
from stsm_rt.video.decoding import Decoder, as_frame, declared_count, declared_rate, size_of
from stsm_rt.video.live import LiveSource, NotLiveError
from stsm_rt.video.patience import Patience
from stsm_rt.video.source import Frame, OnChange, Reading, Source, SourceState, Wanted, every_frame
from stsm_rt.video.standard_input import StandardInput

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_FOLDER_RATE = 30.0
_FALLBACK_RATE = 30.0
_WAKE = 0.1  # seconds after which a wait for a server hears Ctrl-C on every system
_PARTING = 0.1  # seconds to wait for a read at the end; one that hangs in a connection keeps its capture


class RecordedSource(Source):
    """A video file: waits for its consumer, loses nothing that can be decoded, keeps the container's time."""

    def __init__(
        self,
        capture: cv2.VideoCapture,
        name: str,
        *,
        read_timeout: float = math.inf,
        on_change: OnChange | None = None,
    ) -> None:
        """Read the first frame.

        Args:
            capture: The opened video, which is closed with the source.
            name: What to call the source.
            read_timeout: Seconds after which a capture on a network gives a read up.
            on_change: See `Source`.

        Raises:
            UserError: If the video holds no frame that can be decoded.
        """
        super().__init__(on_change)
        self.name = name
        self._capture = capture
        self._reading = threading.Lock()
        self._decoder = Decoder(capture, longest=read_timeout / 2)
        self._index = 0
        self._time = 0.0
        self.frame_rate = declared_rate(capture)
        self.frame_count = declared_count(capture)
        self._ahead = self._read(every_frame)
        if self._ahead is None or self._ahead.frame is None:
            capture.release()
            raise UserError(f"{name} holds no frame that can be decoded; give a video that plays")
        self.size = size_of(self._ahead.frame)
        self._change(SourceState.RUNNING)

    def close(self) -> None:
        """Close the file; where another thread hangs in a read, it is closed when nobody has it any more."""
        super().close()
        if self._reading.acquire(timeout=_PARTING):
            self._capture.release()
            self._reading.release()

    def _next(self, wanted: Wanted) -> Reading | None:
        if self._ahead is not None:
            first, self._ahead = self._ahead, None
            return first._replace(arrived=perf_counter())
        reading = self._read(wanted)
        self.dropped = self._decoder.left_out
        if reading is None:
            self._end(self._time, self._ending())
        return reading

    def _ending(self) -> str:
        # What a container declares may be reckoned from its duration, and so be a frame or two beside the truth.
        came, count = self._index + self.dropped, self.frame_count
        return f"it broke off after {came} of {count} frames" if count and came < 0.95 * count - 2 else ""

    def _read(self, wanted: Wanted) -> Reading | None:
        """Decode the next frame, and make a picture of it where it is wanted: that takes as long once more."""
        with self._reading:
            return self._decode(wanted)

    def _decode(self, wanted: Wanted) -> Reading | None:
        if not self._decoder.grab():
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
            frame = self._decoder.retrieve()
            if frame is None:
                return None
        return Reading(frame, time, perf_counter())


class FolderSource(Source):
    """The images of a folder in natural order (``2.png`` before ``10.png``), at 30 frames per second."""

    frame_rate = _FOLDER_RATE

    def __init__(self, folder: Path, *, on_change: OnChange | None = None) -> None:
        """List the images and read the first one.

        Args:
            folder: Where they lie.
            on_change: See `Source`.

        Raises:
            UserError: If there is no image or the first one cannot be decoded.
        """
        super().__init__(on_change)
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
        self.size = size_of(self._load(self._files[0]))
        self._change(SourceState.RUNNING)

    def _next(self, wanted: Wanted) -> Reading | None:
        if self._index == len(self._files):
            self._end(self._index / _FOLDER_RATE)
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
        try:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        except cv2.error:  # more pixels than OpenCV takes
            image = None
        if image is None:
            raise UserError(f"the image {path} cannot be decoded; replace it or take it out of the folder")
        return as_frame(image)


def open_source(
    spec: int | str | os.PathLike[str],
    *,
    open_timeout: float = 10.0,
    read_timeout: float = 10.0,
    max_retries: int | None = None,
    wait: bool = False,
    on_change: OnChange | None = None,
) -> Source:
    """Open a source of frames.

    Args:
        spec: A camera index (0 or ``"0"``) or the path of its device (``"/dev/v4l/by-id/..."`` stays the same when
            cameras are plugged), a URL (rtsp, http, https), a GStreamer pipeline (elements joined by ``" ! "``, or
            ``"gstreamer:..."``) where OpenCV has GStreamer, a video file, a folder of images, or ``"-"`` for a
            YUV4MPEG2 stream on standard input. A URL of a recording with a known number of frames is played like a
            file, but refused where it is waited for; any other URL, a camera and a pipeline are live.
        open_timeout: Seconds within which a live source must open.
        read_timeout: Seconds without a frame after which a live source has stalled and is connected anew.
        max_retries: Attempts to connect a live source anew before it has failed and ``read`` says why, counted since
            it last ran for 10 s; None means no end. With 0 it ends where its connection does.
        wait: Whether to return at once and wait for a live source that is not there yet, as often as ``max_retries``
            says, while ``read`` blocks; its ``size`` and ``frame_rate`` are not known before its first frame.
            Otherwise the first attempt to open it decides.
        on_change: Called with every change of the source's state, in whatever thread it happens; it must not block.

    Returns:
        The open source; use it in a ``with`` statement.

    Raises:
        UserError: If there is no such camera, file or folder, it gives no frame, or a number is out of its range.
    """
    captures.silence_opencv()
    patience = Patience(open_timeout=open_timeout, read_timeout=read_timeout, max_retries=max_retries)
    text = os.fspath(spec) if not isinstance(spec, int) else str(spec)
    live = partial(LiveSource, patience=patience, wait=wait, on_change=on_change)
    if isinstance(spec, int | str):
        if text == "-":
            return StandardInput(on_change=on_change)
        if isinstance(spec, int) or text.isdecimal():
            return _open_camera(int(text), live)
        if not os.path.isdir(text):
            captures.check_name(text)
        if captures.is_device(text):
            return _open_camera(text, live)
        if captures.is_pipeline(text):
            # OpenCV asks a pipeline how far it has come, which is no better than when a frame arrived.
            return live(None, redact(text), connect=partial(captures.open_pipeline, text))
        if re.match(r"[a-z][a-z0-9+.-]+:/", text, re.IGNORECASE):
            return _open_url(text, patience, wait=wait, on_change=on_change)
    path = Path(text)
    if path.is_dir():
        return FolderSource(path, on_change=on_change)
    return RecordedSource(captures.open_file(path), str(path), on_change=on_change)


def _open_camera(camera: int | str, live: partial[LiveSource]) -> Source:
    connect = partial(captures.open_camera, camera)
    # macOS asks for permission in the main thread only.
    first = connect() if sys.platform == "darwin" else None
    # Video4Linux gives the time of capture.
    return live(first, f"camera {camera}", connect=connect, positioned=lambda _: sys.platform == "linux")


def _open_url(url: str, patience: Patience, *, wait: bool, on_change: OnChange | None) -> Source:
    name, scheme = redact(url), captures.scheme_of(url)
    if scheme not in captures.SCHEMES:
        raise UserError(f"{name} has the scheme {scheme}, {', '.join(captures.SCHEMES)} can be opened")
    connect = partial(captures.open_stream, url, open_timeout=patience.open_timeout, read_timeout=patience.read_timeout)
    # Only its server knows whether a URL is a recording.
    first = None if wait or scheme == "rtsp" else _in_a_thread(connect)
    if first is not None and declared_count(first) is not None:
        return RecordedSource(first, name, read_timeout=patience.read_timeout, on_change=on_change)
    return LiveSource(
        first,
        name,
        connect=connect if scheme == "rtsp" else partial(_only_live, connect, name),
        patience=patience,
        wait=wait,
        positioned=partial(captures.has_positions, scheme=scheme),
        rate=partial(captures.measured_rate, scheme=scheme),
        explaining=captures.EXPLAINING,
        on_change=on_change,
    )


def _only_live(connect: Callable[[], cv2.VideoCapture], name: str) -> cv2.VideoCapture:
    """Open a stream, and refuse a recording, of which a live source would drop frames and begin again at the end."""
    capture = connect()
    if declared_count(capture) is not None:
        capture.release()
        raise NotLiveError(f"{name} is a recording where a live stream was expected; download it and give the file")
    return capture


def _in_a_thread(connect: Callable[[], cv2.VideoCapture]) -> cv2.VideoCapture:
    """Open a stream while this thread can hear Ctrl-C, which it cannot inside OpenCV."""
    opened: list[cv2.VideoCapture | Exception] = []

    def run() -> None:
        try:
            opened.append(connect())
        except Exception as error:
            opened.append(error)

    thread = threading.Thread(target=run, name="stsm-rt opener", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_WAKE)
    if isinstance(opened[0], Exception):
        raise opened[0]
    return opened[0]


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
