"""The time of a live source: its own where it has one, that of arrival otherwise."""

from __future__ import annotations

import math
from typing import NamedTuple


class Stamp(NamedTuple):
    """When a frame is, and of which unbroken stream.

    Attributes:
        time: Seconds of the source's time; it never goes back.
        stream: Number of the unbroken stream.
    """

    time: float
    stream: int


class StreamClock:
    """Gives the frames of a live source their times, over all its connections.

    A device or a server may say where in its stream a frame lies (its position). Positions keep the distances between
    frames that the network or a busy machine jumbles on the way here, so they are used wherever they behave: they may
    stand still (a duplicate) and leave gaps, but where they go back or ahead of the clock on the wall by more than a
    second, what lies between two frames is unknown, and a new stream begins. Where they drift away from the clock on
    the wall (some formats make them up from a declared frame rate), they are no clock, and that of arrival serves
    until the connection ends.

    The time goes on over connections: it is anchored anew at the clock on the wall wherever a stream begins.
    """

    # Seconds by which positions may go back, or ahead of the wall clock, between two frames: they come in bursts.
    _LEAP = 1.0
    # Seconds, and a share of the time since the anchor, by which positions and arrivals may come apart: a connection
    # that stalled and caught up, the frames that FFmpeg keeps while it looks what the stream is.
    _DRIFT = 10.0
    _DRIFT_SHARE = 0.1

    def __init__(self, begin: float | None = None) -> None:
        """Prepare the clock.

        Args:
            begin: The source's time 0, by the clock of ``time.perf_counter``, in seconds; None means the first frame.
        """
        self._begin = begin
        self._last = -math.inf
        self._stream = -1
        self._positioned = False
        self._anchor: tuple[float, float, float] | None = None  # time, position, arrival
        self._before = (0.0, 0.0)  # position, arrival of the frame before

    def elapsed(self, now: float) -> float:
        """Seconds of source time at a moment of ``time.perf_counter``, never before the last frame."""
        return max(0.0 if self._begin is None else now - self._begin, self._last)

    def connect(self, *, positioned: bool) -> None:
        """Begin with a new connection; its first frame begins a new stream.

        Args:
            positioned: Whether it may have positions that are measured, not made up.
        """
        self._positioned = positioned
        self._anchor = None

    def stamp(self, arrived: float, position: float) -> Stamp:
        """Give the next frame its time.

        Args:
            arrived: When the frame was there, by the clock of ``time.perf_counter``, in seconds.
            position: Where it lies in the source's stream, in seconds; ignored where there are no positions. 0 after
                the first frame means that this one has none, as OpenCV answers then: it lies as far behind the one
                before as it came later.
        """
        if self._begin is None:
            self._begin = arrived
        if self._anchor is None:
            self._begin_stream(arrived, position)
        elif self._positioned:
            if position == 0:
                position = self._before[0] + arrived - self._before[1]
            step, waited = position - self._before[0], arrived - self._before[1]
            _, position_then, arrived_then = self._anchor
            apart = (position - position_then) - (arrived - arrived_then)
            if not abs(apart) <= self._DRIFT + self._DRIFT_SHARE * (arrived - arrived_then):
                self._positioned = False
                self._begin_stream(arrived, position)
            elif not -self._LEAP <= step <= waited + self._LEAP:
                self._begin_stream(arrived, position)
        assert self._anchor is not None
        time, position_then, arrived_then = self._anchor
        time += position - position_then if self._positioned else arrived - arrived_then
        self._last = max(time, self._last)
        self._before = (position, arrived)
        return Stamp(self._last, self._stream)

    def _begin_stream(self, arrived: float, position: float) -> None:
        self._positioned = self._positioned and math.isfinite(position)
        self._stream += 1
        self._anchor = (self.elapsed(arrived), position, arrived)
