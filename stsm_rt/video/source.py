"""What a source of frames is, whatever they come from."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
Wanted = Callable[[float], bool]


class Reading(NamedTuple):
    """A frame of a source.

    Attributes:
        frame: uint8 (H, W, 3), BGR, which belongs to the caller; None where it was not wanted.
        time: Seconds of the source's time.
        arrived: When it was there, by the clock of ``time.perf_counter``: captured by a camera, decoded from a file.
    """

    frame: Frame | None
    time: float
    arrived: float


class Source(abc.ABC):
    """An iterator of ``(frame, time)`` that is closed like a file; ``read`` is for who does not need every picture.

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
        reading = self.read()
        if reading is None:
            raise StopIteration
        assert reading.frame is not None
        return reading.frame, reading.time

    def read(self, wanted: Wanted | None = None) -> Reading | None:
        """Take the next frame; a live source waits for it.

        Args:
            wanted: Whether the frame at a source time (seconds) is looked at. Where it is not, the picture need not be
                made: the reading may be without a frame. It may be called in another thread and more than once.
                None: every frame is.

        Returns:
            The reading, or None at the end.

        Raises:
            UserError: If the frame cannot be read.
        """
        return None if self._stopped else self._next(wanted or every_frame)

    def stop(self) -> None:
        """End the iteration at the next frame; may be called from a signal handler or another thread."""
        self._stopped = True

    def close(self) -> None:
        """Give back the device, the connection or the file."""
        self.stop()

    @abc.abstractmethod
    def _next(self, wanted: Wanted) -> Reading | None: ...


def every_frame(_: float) -> bool:
    """Want the frame at any time."""
    return True
