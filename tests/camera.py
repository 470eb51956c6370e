"""A camera for the tests: frames of our own, in real time."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter, sleep

import cv2
import numpy as np

from stsm_rt.video.sources import LiveSource

Frame = np.ndarray


class PacedCapture:
    """What a `LiveSource` uses of a ``cv2.VideoCapture``: frame i comes i/fps seconds after the first, never earlier.

    Attributes:
        given: Frames grabbed so far.
        converted: For each frame that was made into a picture, by its index, when that began.
    """

    def __init__(self, frames: Sequence[Frame], fps: float, *, conversion: float = 0.0) -> None:
        self.given = 0
        self.converted: dict[int, float] = {}
        self.released = False
        self._frames, self._fps, self._conversion = frames, fps, conversion
        self._begin = 0.0

    def grab(self) -> bool:
        if self.given == len(self._frames):
            return False
        self._begin = self._begin or perf_counter()
        sleep(max(0.0, self._begin + self.given / self._fps - perf_counter()))
        self.given += 1
        return True

    def retrieve(self) -> tuple[bool, Frame]:
        self.converted[self.given - 1] = perf_counter()
        sleep(self._conversion)
        return True, self._frames[self.given - 1].copy()

    def read(self) -> tuple[bool, Frame | None]:
        return self.retrieve() if self.grab() else (False, None)

    def get(self, what: int) -> float:
        return self._fps if what == cv2.CAP_PROP_FPS else 0.0

    def release(self) -> None:
        self.released = True


def camera(frames: Sequence[Frame], fps: float, *, conversion: float = 0.0) -> tuple[LiveSource, PacedCapture]:
    """Open a camera that shows these frames and ends."""
    capture = PacedCapture(frames, fps, conversion=conversion)
    return LiveSource(capture, "a camera of the tests"), capture  # type: ignore[arg-type]
