"""How long a live source waits, and how often it tries anew."""

from __future__ import annotations

import random
from dataclasses import dataclass

from stsm_rt.errors import UserError

_DAY = 86400.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a live source waits for frames, and how often it tries anew.

    Attributes:
        open_timeout: Seconds within which a connection must open; at most a day.
        read_timeout: Seconds without a frame after which a connection has stalled and is made anew; at most a day.
        max_retries: Attempts to come back before the source has failed, counted since it was last healthy; None means
            no end. With 0 it ends where its connection does.
        first_delay: Seconds before the first attempt; each further one waits twice as long.
        longest_delay: Seconds beyond which the wait does not grow.
        healthy_after: Seconds of running without a break after which the source is healthy: not before are the attempts
            forgotten.
    """

    open_timeout: float = 10.0
    read_timeout: float = 10.0
    max_retries: int | None = None
    first_delay: float = 0.5
    longest_delay: float = 30.0
    healthy_after: float = 10.0

    def __post_init__(self) -> None:
        for name in ("open_timeout", "read_timeout"):
            if not 0 < getattr(self, name) <= _DAY:
                raise UserError(
                    f"the {name.replace('_', ' ')} must be more than 0 s and at most a day ({_DAY:g} s), "
                    f"not {getattr(self, name)}"
                )
        if self.max_retries is not None and self.max_retries < 0:
            raise UserError(f"the number of retries must be at least 0, not {self.max_retries}")

    def delay(self, attempt: int) -> float:
        """Seconds to wait before an attempt, from 1: doubled each time, capped, and by chance up to a half shorter.

        Many cameras that went down together do not come back at the same moment.
        """
        longest = self.first_delay * 2.0 ** min(attempt - 1, 64)
        return min(longest, self.longest_delay) * random.uniform(0.5, 1.0)
