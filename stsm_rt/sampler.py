"""Which frames of a source the network sees."""

from __future__ import annotations

import math


class Sampler:
    """Picks frames by their timestamps, so that a source of any frame rate is seen at the model's.

    A regular source is taken at a constant stride, at most at the model's rate: 30 frames/s at a rate of 10
    give every third frame, 25 frames/s give every third too. A source slower than the model gives every
    frame. A frame at the time of the one before is a duplicate and never taken.

    Attributes:
        gap: Seconds between two frames beyond which they are not one stream.
    """

    # Share of the period by which a frame may come early: cameras jitter and containers round to
    # milliseconds.
    _TOLERANCE = 0.1

    def __init__(self, frame_rate: float, *, every_frame: bool = False) -> None:
        """Prepare to pick frames.

        Args:
            frame_rate: Model steps per second of source time.
            every_frame: Whether to take every frame all the same; the gap is still the model's.
        """
        period = 1.0 / frame_rate
        self.gap = max(1.0, 4 * period)
        self._least = 0.0 if every_frame else period * (1 - self._TOLERANCE)
        self.reset()

    @classmethod
    def stride(cls, source_rate: float, frame_rate: float) -> int:
        """Return the stride at which a regular source is taken.

        Args:
            source_rate: Frames per second of the source.
            frame_rate: Model steps per second of source time.
        """
        return max(1, math.ceil(source_rate / frame_rate * (1 - cls._TOLERANCE)))

    def reset(self) -> None:
        """Forget the stream; its next frame is taken."""
        self._previous: float | None = None
        self._taken = -math.inf

    def breaks(self, time: float) -> bool:
        """Whether a frame at this source time (seconds) lies before the last one or after a gap."""
        return self._previous is not None and not 0 <= time - self._previous <= self.gap

    def wants(self, time: float) -> bool:
        """Whether the network should see a frame at this source time (seconds); this one is not taken yet."""
        return self.breaks(time) or self._is_due(time)

    def take(self, time: float) -> bool:
        """Whether the network should see the frame at this source time (seconds), which does not break the stream."""
        self._previous = time
        if not self._is_due(time):
            return False
        self._taken = time
        return True

    def _is_due(self, time: float) -> bool:
        return time > self._taken and time - self._taken >= self._least
