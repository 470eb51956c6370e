"""Videos that browsers play: H.264 in an MP4, every frame at the time that it has in its source."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import cv2
import numpy as np

from stsm_rt.errors import UserError
from stsm_rt.video.recording import letterbox
from stsm_rt.video.source import Frame

_LONGEST_SIDE = 1280
_CLOCK = Fraction(1, 90_000)  # seconds; the usual rates are whole numbers of it
_FASTEST = 120.0  # frames per second that are declared: browsers refuse levels made for more
_KEY_FRAME_EVERY = 2  # seconds, so that a seek has little to decode


def browser_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size that a video of a given size gets: even sides, the longer one of at most 1280 pixels.

    Args:
        size: Width and height in pixels.
    """
    longest = max(size)
    width, height = (side * min(longest, _LONGEST_SIDE) // longest // 2 * 2 for side in size)
    return max(2, width), max(2, height)


class BrowserVideoSink:
    """Writes an MP4 file with H.264 pictures (yuv420p) and its index in front, so that a browser plays it at once.

    A frame that OpenCV has turned as the file's metadata say is written as it is seen. What has been encoded is in the
    file: memory does not grow with the video's length.

    Attributes:
        frame_count: Frames written so far.
        size: Width and height in pixels.
    """

    def __init__(self, path: Path, size: tuple[int, int], frame_rate: float) -> None:
        """Start the file.

        Args:
            path: Target, which is overwritten.
            size: Width and height of the frames in pixels; see ``browser_size`` for those of the video.
            frame_rate: Frames per second of the source, or about that many; how long the last frame is shown, and what
                the encoder expects.

        Raises:
            UserError: If the target cannot be written.
        """
        self.frame_count = 0
        self.size = browser_size(size)
        self._given = size
        self._frame_time = max(1, round(1 / frame_rate / _CLOCK))
        self._last = -1
        try:
            self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
            self._stream = self._container.add_stream(
                "libx264", Fraction(min(frame_rate, _FASTEST)).limit_denominator(1001)
            )
        except (av.FFmpegError, OSError) as error:
            raise _not_written(error) from error
        self._stream.width, self._stream.height = self.size
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"preset": "veryfast", "crf": "23"}
        self._stream.codec_context.time_base = _CLOCK
        # Without pictures that refer to later ones, each lasts until the next is decoded: no edit list moves the times.
        self._stream.codec_context.max_b_frames = 0
        self._stream.codec_context.gop_size = max(1, round(_KEY_FRAME_EVERY * min(frame_rate, _FASTEST)))

    def __enter__(self) -> BrowserVideoSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Complete the file; where an error ends the block, what is there is of no use."""
        if kind is None and self.frame_count:
            self._encode(None)
        try:
            self._container.close()
        except (av.FFmpegError, OSError) as failure:
            if kind is None:
                raise _not_written(failure) from failure

    def write(self, image: Frame, time: float) -> None:
        """Write one frame.

        Args:
            image: uint8 (H, W, 3), BGR; one that is not as large as was said is fitted in, with black borders.
            time: Source time in seconds, later than the frame before. The first frame is shown from 0 on, so that the
                video's clock is the source's.

        Raises:
            UserError: If the file cannot be written.
        """
        frame = av.VideoFrame.from_ndarray(self._fitted(image), "bgr24")
        pts = round(time / _CLOCK) if self.frame_count else 0
        self._last = frame.pts = max(pts, self._last + 1)
        frame.time_base = _CLOCK
        self._encode(frame)
        self.frame_count += 1

    def _fitted(self, image: Frame) -> Frame:
        width, height = self.size
        given = (image.shape[1], image.shape[0])
        if given != self._given:
            return letterbox(image, self.size)
        if 0 <= given[0] - width <= 1 and 0 <= given[1] - height <= 1:
            return np.ascontiguousarray(image[:height, :width])
        return np.asarray(cv2.resize(image, self.size, interpolation=cv2.INTER_AREA), np.uint8)

    def _encode(self, frame: av.VideoFrame | None) -> None:
        try:
            for packet in self._stream.encode(frame):
                # Of use for the last one only: the others last until the next.
                packet.duration = self._frame_time
                self._container.mux(packet)
        except (av.FFmpegError, OSError) as error:
            raise _not_written(error) from error


def _not_written(error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"the annotated video cannot be written ({reason}); look whether the disk is full")
