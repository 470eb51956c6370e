"""From logits to labels, scores and events: smoothing over time and hysteresis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec


@dataclass(frozen=True)
class Event:
    """An action that started or ended.

    It is reported twice: when it starts, with ``end`` None, and again when it ends.

    Attributes:
        label: The action.
        start: Source time in seconds of the step at which it was raised.
        end: Source time in seconds of the step at which it ended; None while it runs.
        peak: Highest score so far, 0 to 1.
        frame: Index of the frame at which it was raised or, once it has ended, at which it ended.
    """

    label: str
    start: float
    end: float | None
    peak: float
    frame: int

    def to_record(self) -> dict[str, Any]:
        """Return the event as a JSON-ready record, ``{"kind": "event", ...}``."""
        return {
            "kind": "event",
            "time": self.start if self.end is None else self.end,
            "frame": self.frame,
            "label": self.label,
            "score": self.peak,
            "start": self.start,
            "end": self.end,
            "peak": self.peak,
        }


class Decision:
    """Smooths class probabilities over time and raises events with hysteresis.

    Probabilities are ``softmax(logits / temperature)``, averaged over the last ``smoothing`` steps since the
    last reset. An event starts when one label is the best for ``min_steps`` steps in a row with a score of at
    least the threshold. It ends when its score falls below the release or another label's event starts, so
    there is never more than one. The background label takes no part in the ranking and is never an event, but
    keeps its share of the probability: scores and the background's add up to 1.

    Attributes:
        threshold: Score, 0 to 1, at which an event may start.
        release: Score, 0 to ``threshold``, below which a running event ends.
        topk: Number of labels that ``update`` returns.
    """

    def __init__(
        self,
        labels: Sequence[str],
        background: str | None,
        spec: DecisionSpec,
        *,
        topk: int = 3,
        threshold: float | None = None,
    ) -> None:
        """Prepare the buffers.

        Args:
            labels: One label per logit.
            background: The label that means "nothing I know", or None.
            spec: How logits become a decision.
            topk: Labels to return, best first; at most as many as there are without the background.
            threshold: Replaces the threshold of ``spec``; the release is lowered to it where it would be
                higher.

        Raises:
            UserError: If ``topk`` is less than 1, the threshold does not lie between 0 and 1, or there is no
                label besides the background.
        """
        if topk < 1:
            raise UserError(f"topk must be at least 1, not {topk}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"the threshold must be between 0 and 1, not {threshold}")
        self.threshold = spec.threshold if threshold is None else threshold
        self.release = min(spec.release, self.threshold)
        self._spec = spec
        self._labels = tuple(labels)
        self._foreground = np.array([i for i, label in enumerate(self._labels) if label != background], np.intp)
        if not len(self._foreground):
            raise UserError("there must be at least one label besides the background")
        self.topk = min(topk, len(self._foreground))
        self._ring = np.zeros((spec.smoothing, len(self._labels)))
        self._mean = np.zeros(len(self._labels))
        self.reset()

    def reset(self) -> None:
        """Forget every step and drop the running event without reporting its end."""
        self._steps = 0
        self._streak = 0
        self._streak_class = -1
        self._active = -1
        self._start = 0.0
        self._peak = 0.0

    @property
    def active(self) -> str | None:
        """Label of the running event, or None."""
        return None if self._active < 0 else self._labels[self._active]

    @property
    def warming_up(self) -> bool:
        """Whether fewer than ``smoothing`` steps have been made since the last reset."""
        return self._steps < self._spec.smoothing

    def update(
        self, logits: npt.NDArray[np.floating], time: float, frame: int
    ) -> tuple[tuple[str, ...], tuple[float, ...], tuple[Event, ...]]:
        """Take the logits of one step.

        Args:
            logits: Float (classes,).
            time: Source time of the step in seconds.
            frame: Index of the step's frame.

        Returns:
            The ``topk`` labels, best first; their smoothed scores; the events that ended or started at this
            step, an end before a start.

        Raises:
            UserError: If the number of logits is not the number of labels, or one of them is not finite.
        """
        if logits.shape != self._mean.shape:
            raise UserError(f"{len(self._labels)} logits were expected, one per label, not {list(logits.shape)}")
        row = self._ring[self._steps % len(self._ring)]
        np.divide(logits, self._spec.temperature, out=row, dtype=np.float64)
        if not np.isfinite(row).all():
            raise UserError(f"the engine gave logits that are not finite at frame {frame}; export the engine again")
        np.subtract(row, row.max(), out=row)
        np.exp(row, out=row)
        np.divide(row, row.sum(), out=row)
        self._steps += 1
        np.mean(self._ring[: self._steps], axis=0, out=self._mean)

        scores = self._mean[self._foreground]
        ranking = self._foreground[np.argsort(-scores, kind="stable")[: self.topk]]
        events = self._advance(int(ranking[0]), time, frame)
        return (
            tuple(self._labels[i] for i in ranking),
            tuple(float(self._mean[i]) for i in ranking),
            events,
        )

    def finish(self, time: float, frame: int) -> tuple[Event, ...]:
        """End the running event, if there is one.

        Args:
            time: Source time in seconds at which it ends.
            frame: Index of the frame at which it ends.

        Returns:
            The event that ended, or nothing.
        """
        self._streak = 0
        return self._end(time, frame)

    def _end(self, time: float, frame: int) -> tuple[Event, ...]:
        if self._active < 0:
            return ()
        event = Event(self._labels[self._active], self._start, time, self._peak, frame)
        self._active = -1
        return (event,)

    def _advance(self, best: int, time: float, frame: int) -> tuple[Event, ...]:
        score = float(self._mean[best])
        if score < self.threshold:
            self._streak = 0
        else:
            self._streak = self._streak + 1 if best == self._streak_class else 1
        self._streak_class = best

        ended: tuple[Event, ...] = ()
        starts = self._streak >= self._spec.min_steps and best != self._active
        if self._active >= 0:
            own = float(self._mean[self._active])
            self._peak = max(self._peak, own)
            if own < self.release or starts:
                ended = self._end(time, frame)
        if not starts:
            return ended
        self._active, self._start, self._peak = best, time, score
        return (*ended, Event(self._labels[best], time, None, score, frame))
