"""What is known after a step of the network, and what is needed to make one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stsm_rt.decision import Event


@dataclass(frozen=True)
class Result:
    """What is known after one network step.

    Attributes:
        time: Source time of the step's frame in seconds.
        frame: Index of that frame among those given to the recognizer since its last reset.
        labels: The best labels, best first, without the background.
        scores: Their smoothed probabilities, 0 to 1.
        latency: Seconds from the frame to this result: from its arrival where a live source is run, from its decoding
            where a file is, from the call of ``update``.
        dropped: Frames that the source has dropped so far.
        warming_up: Whether fewer steps than the decision averages over have been made since the last reset.
        events: Events that ended or started at this step, an end before a start.
        active: Label of the running event, or None.
    """

    time: float
    frame: int
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    latency: float
    dropped: int
    warming_up: bool
    events: tuple[Event, ...]
    active: str | None

    @property
    def label(self) -> str:
        """The best label."""
        return self.labels[0]

    @property
    def score(self) -> float:
        """The score of the best label."""
        return self.scores[0]

    def to_record(self) -> dict[str, Any]:
        """Return the result without its events as a JSON-ready record, ``{"kind": "result", ...}``."""
        return {
            "kind": "result",
            "time": self.time,
            "frame": self.frame,
            "label": self.label,
            "score": self.score,
            "labels": list(self.labels),
            "scores": list(self.scores),
            "latency": self.latency,
            "dropped": self.dropped,
            "warming_up": self.warming_up,
            "active": self.active,
        }


class Prepared(NamedTuple):
    """A frame that the network is to see, on its way from who reads the source to who runs the engine.

    Attributes:
        input: The network's input, uint8 (1, input_height, input_width, 3), BGR.
        time: Source time of the frame in seconds.
        frame: Its index.
        ended: Time and index of the frame at which the stream before this one ended; None where it goes on.
        dropped: Frames that the source has dropped so far.
        arrived: When the frame was there, by the clock of ``time.perf_counter``.
    """

    input: npt.NDArray[np.uint8]
    time: float
    frame: int
    ended: tuple[float, int] | None
    dropped: int
    arrived: float
