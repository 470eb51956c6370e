"""What a source of frames is, whatever they come from."""

from __future__ import annotations

import abc
import enum
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stsm_rt.errors import redact

Frame = npt.NDArray[np.uint8]
Wanted = Callable[[float], bool]

_LOG = logging.getLogger("stsm_rt.source")


class SourceState(enum.Enum):
    """What a source does just now."""

    OPENING = "opening"  # nothing has come yet
    RUNNING = "running"
    STALLED = "stalled"  # connected, but no frame came for as long as the read time-out
    RECONNECTING = "reconnecting"
    ENDED = "ended"  # its last frame was read, or somebody closed it
    FAILED = "failed"  # given up; `Source.read` says why


@dataclass(frozen=True)
class StateChange:
    """A source has gone over to another state.

    Attributes:
        state: The new state.
        time: Source time in seconds.
        reason: Why, in a few words without credentials; may be empty.
        attempt: Attempts to connect since the source was last healthy; 0 for the first connection.
    """

    state: SourceState
    time: float
    reason: str = ""
    attempt: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", redact(self.reason))

    def to_record(self) -> dict[str, Any]:
        """Return the change as a record for a JSON line; its ``kind`` is ``"source"``."""
        return {
            "kind": "source",
            "state": self.state.value,
            "time": self.time,
            "reason": self.reason,
            "attempt": self.attempt,
        }


OnChange = Callable[[StateChange], None]


class Reading(NamedTuple):
    """A frame of a source.

    Attributes:
        frame: uint8 (H, W, 3), BGR, which belongs to the caller; None where it was not wanted.
        time: Seconds of the source's time.
        arrived: When it was there, by the clock of ``time.perf_counter``: captured by a camera, decoded from a file.
        stream: Number of the unbroken stream that the frame belongs to. It rises with every connection, and where a
            live source's own clock jumps: what was seen before then says nothing of this frame.
    """

    frame: Frame | None
    time: float
    arrived: float
    stream: int = 0


class Source(abc.ABC):
    """An iterator of ``(frame, time)`` that is closed like a file; ``read`` is for who does not need every picture.

    Frames are uint8 (H, W, 3) in BGR and belong to the caller; times are seconds of the source's time.

    Attributes:
        live: Whether frames are lost when nobody waits for them.
        dropped: Frames lost so far: nobody had time for them, where ``live`` is true, or they could not be decoded.
        frame_rate: Frames per second as the source declares it, or None.
        name: What to call the source, without credentials.
        frame_count: Number of frames as the source declares it, or None.
        size: Width and height of the first frame in pixels; (0, 0) while none has come.
        reconnects: How often a live source has come back after its connection was lost.
        on_change: Called with every change of state from here on, in whatever thread it happens; it must not block.
    """

    live: bool = False
    dropped: int = 0
    frame_rate: float | None = None
    name: str
    frame_count: int | None = None
    size: tuple[int, int]
    reconnects: int = 0

    def __init__(self, on_change: OnChange | None = None) -> None:
        self.on_change = on_change
        self._stopped = False
        self._state = SourceState.OPENING

    @property
    def state(self) -> SourceState:
        """What the source does just now."""
        return self._state

    @property
    def healthy(self) -> bool:
        """Whether it runs; a live source, for at least 10 s without a break."""
        return self._state is SourceState.RUNNING

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

    def _change(self, state: SourceState, *, time: float = 0.0, reason: str = "", attempt: int = 0) -> None:
        """Go over to another state, log it, and tell whoever wants to know."""
        self._state = state
        change = StateChange(state, time, reason, attempt)
        # Where it has failed, ``read`` raises why.
        level = logging.WARNING if state in (SourceState.STALLED, SourceState.RECONNECTING) else logging.INFO
        words = f"{change.state.value} at {time:.1f} s" + (f" ({change.reason})" if reason else "")
        _LOG.log(level, "%s: %s", redact(self.name), words)
        if self.on_change is not None:
            self.on_change(change)

    def _end(self, time: float, reason: str = "") -> None:
        """Take note that a recorded source has given its last frame."""
        if self._state is not SourceState.ENDED:
            self._change(SourceState.ENDED, time=time, reason=reason)

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
