"""Frames on standard input: a YUV4MPEG2 stream, as ``ffmpeg -f yuv4mpegpipe`` and GStreamer's ``y4menc`` write it."""

from __future__ import annotations

import os
import select
import sys
from time import perf_counter
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError
from stsm_rt.video.source import Frame, OnChange, Reading, Source, SourceState, Wanted, every_frame

_WAKE = 0.1  # seconds after which a wait for bytes looks whether it was stopped
_LONGEST_LINE = 4096
_LARGEST_SIDE = 16384
_FASTEST = 1e6  # frames per second; the slowest is one in as many seconds
_HOW = "for example ffmpeg -i INPUT -f yuv4mpegpipe - | stsm-rt webcam --source -"
# Luma rows and columns for each of chroma; None: no chroma.
_CHROMA: dict[str, tuple[int, int] | None] = {
    "420": (2, 2),
    "420jpeg": (2, 2),
    "420mpeg2": (2, 2),
    "420paldv": (2, 2),
    "422": (1, 2),
    "444": (1, 1),
    "mono": None,
}


class _Format(NamedTuple):
    """What the first line of a stream says."""

    width: int
    height: int
    rate: float
    chroma: tuple[int, int] | None
    full_range: bool

    @property
    def chroma_size(self) -> tuple[int, int]:
        """Rows and columns of either chroma plane, rounded up."""
        if self.chroma is None:
            return 0, 0
        return -(-self.height // self.chroma[0]), -(-self.width // self.chroma[1])

    @property
    def bytes_per_frame(self) -> int:
        rows, columns = self.chroma_size
        return self.width * self.height + 2 * rows * columns


class StandardInput(Source):
    """A YUV4MPEG2 stream: size, frame rate and pixel format are in its first line, so nothing need be told.

    Every frame counts, in order, and whoever writes waits for whoever reads, as with a file. Frame i is i divided by
    the declared frame rate seconds after the first.
    """

    name = "standard input"

    def __init__(self, descriptor: int | None = None, *, on_change: OnChange | None = None) -> None:
        """Read the first line and the first frame.

        Args:
            descriptor: What to read from; None means standard input.
            on_change: See `Source`.

        Raises:
            UserError: If it is closed or a terminal, or what comes is not such a stream.
        """
        super().__init__(on_change)
        try:
            self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        except (AttributeError, OSError, ValueError):  # it is None in a process that was started without
            raise UserError(f"standard input is closed, where a YUV4MPEG2 stream was expected; {_HOW}") from None
        if os.isatty(self._descriptor):
            raise UserError(f"standard input is a terminal, where a YUV4MPEG2 stream was expected; pipe one in, {_HOW}")
        self._buffer = bytearray()
        self._index = 0
        line = self._read_line()
        self._format = _parse(line or b"")
        self.size = (self._format.width, self._format.height)
        self.frame_rate = self._format.rate
        self._ahead = self._read(every_frame)
        if self._ahead is None:
            raise UserError(
                f"the stream on {self.name} ended before its first frame; let the program before it write one"
            )
        self._change(SourceState.RUNNING)

    def _next(self, wanted: Wanted) -> Reading | None:
        reading, self._ahead = self._ahead, None
        if reading is None:
            reading = self._read(wanted)
        if reading is None:
            self._end(self._index / self._format.rate, "it broke off in the middle of a frame" if self._buffer else "")
        return reading

    def _read(self, wanted: Wanted) -> Reading | None:
        line = self._read_line()
        if line is None:
            return None
        if line.split(b" ")[0] != b"FRAME":
            raise UserError(
                f"the stream on {self.name} is damaged: a frame was expected, {line[:20]!r} came; start it anew"
            )
        data = self._take(self._format.bytes_per_frame)
        if data is None:
            return None
        time = self._index / self._format.rate
        self._index += 1
        return Reading(_picture(data, self._format) if wanted(time) else None, time, perf_counter())

    def _read_line(self) -> bytes | None:
        """The next line without its end, or None at the end of the stream."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _LONGEST_LINE:
                raise _not_a_stream(bytes(self._buffer))
            if not self._fill(_LONGEST_LINE):
                return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _take(self, count: int) -> bytes | None:
        """The next bytes, or None where the stream ends before."""
        while len(self._buffer) < count:
            if not self._fill(count - len(self._buffer)):
                return None
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _fill(self, most: int) -> bool:
        """Wait for bytes; False at the end, or where somebody has stopped the source."""
        while not self._stopped:
            if _can_wait and not select.select([self._descriptor], [], [], _WAKE)[0]:
                continue
            data = os.read(self._descriptor, most)
            self._buffer += data
            return bool(data)
        return False


_can_wait = os.name == "posix"  # elsewhere pipes cannot be waited for with a time-out


def _parse(line: bytes) -> _Format:
    """Read the first line: ``YUV4MPEG2 W640 H480 F30:1 Ip A1:1 C420jpeg``."""
    words = line.decode("latin-1").split(" ")
    if words[0] != "YUV4MPEG2":
        raise _not_a_stream(line)
    fields = {word[0]: word[1:] for word in words[1:] if word and word[0] != "X"}
    try:
        width, height = int(fields["W"]), int(fields["H"])
        frames, _, seconds = fields.get("F", "").partition(":")
        rate = int(frames) / int(seconds)
    except (KeyError, ValueError, ArithmeticError):
        raise _not_a_stream(line) from None
    if not (0 < width <= _LARGEST_SIDE and 0 < height <= _LARGEST_SIDE and 1 / _FASTEST <= rate <= _FASTEST):
        raise _not_a_stream(line)
    layout = fields.get("C", "420")
    if layout not in _CHROMA:
        raise UserError(
            f"the pixel format C{layout} on standard input cannot be read, {', '.join(_CHROMA)} can; "
            "have it converted, with ffmpeg by -pix_fmt yuv420p"
        )
    return _Format(width, height, rate, _CHROMA[layout], "XCOLORRANGE=FULL" in words)


def _not_a_stream(came: bytes) -> UserError:
    return UserError(
        f"standard input must be a YUV4MPEG2 stream with a size and a frame rate, not {came[:40]!r}; {_HOW}"
    )


def _picture(data: bytes, form: _Format) -> Frame:
    """Make BGR of planes, by BT.601."""
    width, height = form.width, form.height
    planes = np.frombuffer(data, np.uint8)
    if form.chroma == (2, 2) and not width % 2 and not height % 2 and not form.full_range:
        return np.asarray(cv2.cvtColor(planes.reshape(height * 3 // 2, width), cv2.COLOR_YUV2BGR_I420), np.uint8)
    luma = planes[: width * height].reshape(height, width)
    rows, columns = form.chroma_size
    chroma = planes[width * height :].reshape(2, rows, columns) if rows else np.full((2, 1, 1), 128, np.uint8)
    full: list[npt.NDArray[np.uint8]] = [luma]
    for plane in chroma:
        if form.chroma is None:
            full.append(np.full_like(luma, 128))
            continue
        down, across = form.chroma
        # An odd last row or column has a chroma value of its own: enlarge to whole blocks and cut.
        large = cv2.resize(plane, (columns * across, rows * down), interpolation=cv2.INTER_LINEAR)
        full.append(np.asarray(large[:height, :width], np.uint8))
    return np.asarray(cv2.transform(cv2.merge(full), _TO_BGR[form.full_range]), np.uint8)


def _to_bgr(full_range: bool) -> npt.NDArray[np.float64]:
    """The matrix (3, 4) from Y, U, V and 1 to B, G, R (ITU-R BT.601)."""
    black, luma, chroma = (0.0, 1.0, 1.0) if full_range else (16.0, 255 / 219, 255 / 224)
    matrix = np.array(
        [[luma, 1.772 * chroma, 0], [luma, -0.344136 * chroma, -0.714136 * chroma], [luma, 0, 1.402 * chroma]]
    )
    return np.column_stack([matrix, -matrix @ np.array([black, 128, 128])])


_TO_BGR = {full_range: _to_bgr(full_range) for full_range in (False, True)}
