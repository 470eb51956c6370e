"""Frames of an open capture, without those that a decoder made up."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.video.source import Frame

_MOST_FAILURES = 64  # reads in a row that may fail before a capture counts as ended
# What kind of picture a frame is, from OpenCV 4.9 on: the number of "I", "P", "B" or "?", and 0 where it is not known.
_FRAME_TYPE = getattr(cv2, "CAP_PROP_FRAME_TYPE", None)
_DEPENDS = (ord("P"), ord("B"))


class Decoder:
    """Grabs frames one after another and leaves out what cannot be trusted.

    OpenCV answers alike where a capture has ended and where one frame could not be decoded. After a frame that was not
    decoded, those that build on it are made up in part; they are left out up to the next picture that stands alone.

    A damaged picture that FFmpeg patches up without an error, from its neighbours or the picture before, passes: FFmpeg
    marks such pictures, but OpenCV has no way to ask for the mark.

    Attributes:
        left_out: Frames that were left out so far.
    """

    def __init__(self, capture: cv2.VideoCapture, *, longest: float = math.inf) -> None:
        """Begin.

        Args:
            capture: An open capture; whoever made it releases it.
            longest: Seconds; where a read fails after longer, the capture has ended.
        """
        self.left_out = 0
        self._capture = capture
        self._longest = longest
        self._broken = False

    def grab(self) -> bool:
        """Go to the next frame that can be trusted; False at the end."""
        failures = 0
        while True:
            asked = perf_counter()
            if not self._capture.grab():
                failures += 1
                if failures > _MOST_FAILURES or perf_counter() - asked > self._longest or self._is_complete():
                    return False
                continue
            if failures:
                self.left_out += failures
                self._broken = True
                failures = 0
            if not self._broken or not self._depends():
                self._broken = False
                return True
            self.left_out += 1

    def retrieve(self) -> Frame | None:
        """Make a picture of the frame, uint8 (H, W, 3), BGR; None where that fails."""
        ok, image = self._capture.retrieve()
        return as_frame(image) if ok else None

    def _is_complete(self) -> bool:
        count = declared_count(self._capture)
        return count is not None and self._capture.get(cv2.CAP_PROP_POS_FRAMES) >= count

    def _depends(self) -> bool:
        return _FRAME_TYPE is not None and int(self._capture.get(_FRAME_TYPE)) in _DEPENDS


def declared_rate(capture: cv2.VideoCapture) -> float | None:
    """Frames per second as an open capture declares them, or None."""
    rate = capture.get(cv2.CAP_PROP_FPS)
    # Containers without a frame rate declare the ticks of their clock, up to 90,000 per second.
    return rate if math.isfinite(rate) and 0 < rate <= 1000 else None


def declared_count(capture: cv2.VideoCapture) -> int | None:
    """Number of frames as an open capture declares it, or None."""
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if math.isfinite(count) and count > 0 else None


def size_of(frame: npt.NDArray[Any]) -> tuple[int, int]:
    """Width and height of a frame (H, W, 3) in pixels."""
    return frame.shape[1], frame.shape[0]


def as_frame(image: npt.NDArray[Any]) -> Frame:
    """What OpenCV gives, as a frame."""
    return np.asarray(image, np.uint8)
