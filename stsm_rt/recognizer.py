"""Frames in, results out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from stsm_rt.decision import Decision, Event
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.video.cut import CutDetector
from stsm_rt.video.fit import check_frame, fit
from stsm_rt.video.sources import Source, open_source


@dataclass(frozen=True)
class Result:
    """What is known after one network step.

    Attributes:
        time: Source time of the step's frame in seconds.
        frame: Index of that frame among those given to the recognizer since its last reset.
        labels: The best labels, best first, without the background.
        scores: Their smoothed probabilities, 0 to 1.
        latency: Seconds from the frame handed over to this result.
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


class Sampler:
    """Picks frames by their timestamps, so that a source of any frame rate is seen at the model's.

    A regular source is taken at a constant stride, at most at the model's rate: 30 frames/s at a rate of 10
    give every third frame, 25 frames/s give every third too. A source slower than the model gives every
    frame.

    Attributes:
        gap: Seconds between two frames beyond which they are not one stream.
    """

    # Share of the period by which a frame may come early: cameras jitter and containers round to
    # milliseconds.
    _TOLERANCE = 0.1

    def __init__(self, frame_rate: float) -> None:
        """Prepare to pick frames.

        Args:
            frame_rate: Model steps per second of source time.
        """
        period = 1.0 / frame_rate
        self.gap = max(1.0, 4 * period)
        self._least = period * (1 - self._TOLERANCE)
        self.reset()

    def reset(self) -> None:
        """Forget the stream; its next frame is taken."""
        self._previous: float | None = None
        self._taken = -math.inf

    def breaks(self, time: float) -> bool:
        """Whether a frame at this source time (seconds) lies before the last one or after a gap."""
        return self._previous is not None and not 0 <= time - self._previous <= self.gap

    def take(self, time: float) -> bool:
        """Whether the network should see the frame at this source time (seconds)."""
        self._previous = time
        if time - self._taken < self._least:
            return False
        self._taken = time
        return True


class Recognizer:
    """Recognizes actions in one stream of frames.

    Attributes:
        engine: The engine that makes the steps.
        roi: The part of each frame that the network sees: x, y, width, height in pixels; None for the whole
            frame.

    Example:
        >>> recognizer = Recognizer()  # doctest: +SKIP
        >>> for result in recognizer.run(0):  # doctest: +SKIP
        ...     print(result.time, result.label, result.score)
    """

    def __init__(
        self,
        engine: Engine | str | os.PathLike[str] | None = None,
        *,
        slot: int = 0,
        topk: int = 3,
        threshold: float | None = None,
        roi: tuple[int, int, int, int] | None = None,
    ) -> None:
        """Open the engine, unless it is open already, and reset the slot's state.

        Args:
            engine: An open engine, the path of one, or None for the embedded engine.
            slot: The engine's slot that holds this stream's state. Several recognizers may share an engine,
                each with its own slot, in one thread.
            topk: Number of labels in a result.
            threshold: Score, 0 to 1, at which an event may start, instead of the manifest's.
            roi: Region of interest as x, y, width, height in pixels of the frame; None means the whole frame.

        Raises:
            UserError: If the engine cannot be opened or has no such slot, or an option is out of its range.
        """
        if slot < 0:
            raise UserError(f"the slot must be at least 0, not {slot}")
        self.engine = engine if isinstance(engine, Engine) else Engine.open(engine, slots=slot + 1)
        if slot >= self.engine.slots:
            raise UserError(
                f"the engine has {self.engine.slots} slots, numbered from 0, so there is no slot {slot}; "
                "open it with more"
            )
        self.roi = roi
        manifest = self.engine.manifest
        self._slots = (slot,)
        frames = self.engine.frames
        self._input = frames if manifest.batch == 1 else frames[slot : slot + 1]
        self._size: tuple[int, ...] | None = None
        self._decision = Decision(
            manifest.labels, manifest.background, manifest.decision, topk=topk, threshold=threshold
        )
        self._sampler = Sampler(manifest.frame_rate)
        self._cuts = CutDetector()
        self.reset()

    def reset(self) -> None:
        """Start over as if no frame had been seen; a running event is dropped, so ``finish`` it before."""
        self._restart()
        self._frame = -1
        self._last = (0.0, 0)

    def update(self, frame: npt.NDArray[np.uint8], time: float, *, dropped: int = 0) -> Result | None:
        """Take the next frame of the stream.

        A jump back in time, a gap of more than a second and four steps, another frame size or a cut to another
        picture ends the running event at the last frame before it and resets the state.

        Args:
            frame: uint8 (H, W, 3), BGR, as OpenCV gives it. It is neither changed nor kept.
            time: Source time in seconds.
            dropped: Frames that the source has dropped so far, for the result.

        Returns:
            The result of a network step, or None where the frame was skipped to keep to the model's frame
            rate.

        Raises:
            UserError: If the frame has another type or shape, the region of interest does not lie inside it,
                or the time is not finite.
        """
        begin = perf_counter()
        check_frame(frame)
        if not math.isfinite(time):
            raise UserError(f"the time of a frame must be a finite number of seconds, not {time}")
        ended: tuple[Event, ...] = ()
        before = self._last
        if self._size not in (None, frame.shape) or self._sampler.breaks(time):
            ended = self.finish()
            self._restart()
        self._size = frame.shape
        self._frame += 1
        self._last = (time, self._frame)
        if not self._sampler.take(time):
            return None
        fit(frame, self.roi, self._input[0])
        if self._cuts.is_cut(self._input[0]):
            ended = self._decision.finish(*before)
            self._forget()
        logits = self.engine.step(self._input, self._slots)[0]
        labels, scores, events = self._decision.update(logits, time, self._frame)
        return Result(
            time=time,
            frame=self._frame,
            labels=labels,
            scores=scores,
            latency=perf_counter() - begin,
            dropped=dropped,
            warming_up=self._decision.warming_up,
            events=ended + events,
            active=self._decision.active,
        )

    def finish(self) -> tuple[Event, ...]:
        """End the running event at the last frame, as the end of a stream does.

        Returns:
            The event that ended, or nothing.
        """
        return self._decision.finish(*self._last)

    def run(self, source: Source | int | str | os.PathLike[str]) -> Iterator[Result]:
        """Reset and recognize a whole source; ``finish`` then gives the event that still runs at its end.

        Args:
            source: A camera index, a path, a URL, or an open source. What was opened here is closed here.

        Yields:
            One result per network step.

        Raises:
            UserError: If the source cannot be opened or a frame is not usable.
        """
        if not isinstance(source, Source):
            with open_source(source) as opened:
                yield from self.run(opened)
            return
        self.reset()
        for frame, time in source:
            result = self.update(frame, time, dropped=source.dropped)
            if result is not None:
                yield result

    def _restart(self) -> None:
        self._forget()
        self._cuts.reset()
        self._sampler.reset()
        self._size = None

    def _forget(self) -> None:
        self.engine.reset(self._slots)
        self._decision.reset()
