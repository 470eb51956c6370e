"""A video file that starts again at its end, as fast as it is read or at the pace of a camera."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import cv2
import numpy.typing as npt

from stsm_rt.video.sources import open_source


class EndlessCapture:
    """What `LiveSource` and `RecordedSource` use of a ``cv2.VideoCapture``, for a file that starts again at its end.

    It is no subclass, because OpenCV's crashes when it is collected.

    Attributes:
        first: When the first frame was there, by ``perf_counter``.
    """

    def __init__(self, video: Path, frames: int, *, rate: float | None = None) -> None:
        """Open the file.

        Args:
            video: The file.
            frames: Number of frames after which the capture ends.
            rate: Frames per second that it gives, as a camera does; None: as fast as they are taken.

        Raises:
            UserError: The file is no video.
        """
        open_source(video).close()  # says what is wrong
        self._path = os.path.abspath(video)
        self._capture = cv2.VideoCapture(self._path, cv2.CAP_FFMPEG)
        self._left = frames
        self._rate = rate
        self._given = 0
        self.first = 0.0

    def grab(self) -> bool:
        """Decode the next frame; with a rate, wait until it is due."""
        if self._given == self._left or not (self._capture.grab() or self._begins_again()):
            return False
        if self._given == 0:
            self.first = perf_counter()
        elif self._rate is not None:
            # Decoded before it is due, so a frame arrives on time.
            sleep(max(0.0, self.first + self._given / self._rate - perf_counter()))
        self._given += 1
        return True

    def retrieve(self) -> tuple[bool, npt.NDArray[Any]]:
        """The picture of the frame that was grabbed."""
        return self._capture.retrieve()

    def read(self) -> tuple[bool, npt.NDArray[Any] | None]:
        """Both at once."""
        return self.retrieve() if self.grab() else (False, None)

    def get(self, what: int) -> float:
        """A property of the file, but for the frame rate of a camera."""
        return self._rate if what == cv2.CAP_PROP_FPS and self._rate else self._capture.get(what)

    def release(self) -> None:
        """Close the file."""
        self._capture.release()

    def _begins_again(self) -> bool:
        return self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0) and self._capture.grab()
