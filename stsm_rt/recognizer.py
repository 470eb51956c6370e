"""Frames in, results out."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from time import perf_counter

import numpy as np
import numpy.typing as npt

from stsm_rt.decision import Decision, Event
from stsm_rt.engine import Engine, frame_rate_of
from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec
from stsm_rt.pipeline import Pipeline
from stsm_rt.result import Prepared, Result
from stsm_rt.sampler import Sampler
from stsm_rt.video.cut import CutDetector
from stsm_rt.video.fit import check_frame, fit
from stsm_rt.video.source import Source
from stsm_rt.video.sources import open_source


class Recognizer:
    """Recognizes actions in one stream of frames.

    ``update`` does it frame by frame in one thread. It is made of two halves, which may run in two threads, the frames
    in order in both: ``prepare`` picks the frames and makes the network's input of them, ``conclude`` runs the engine.

    Attributes:
        engine: The engine that makes the steps.
        input: A buffer for the network's input, uint8 (1, input_height, input_width, 3): the engine's own where no
            other slot needs that, so that nothing is copied.
        roi: The part of each frame that the network sees: x, y, width, height in pixels; None for the whole
            frame.
        resets: How often the state was reset because the stream broke or was restarted, or because a step failed.
        failures: How many steps failed: the engine raised an error or gave numbers that are not finite.

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
        smoothing: int | None = None,
        roi: tuple[int, int, int, int] | None = None,
        every_frame: float | None = None,
        patience: int = 1,
    ) -> None:
        """Open the engine, unless it is open already, and reset the slot's state.

        Args:
            engine: An open engine, the path of one, or None for the embedded engine.
            slot: The engine's slot that holds this stream's state. Several recognizers may share an engine,
                each with its own slot, also in threads of their own: their steps take turns.
            topk: Number of labels in a result.
            threshold: Score, 0 to 1, at which an event may start, instead of the manifest's.
            smoothing: Steps of the model over which the scores are averaged, instead of the manifest's: fewer answer
                sooner, more are calmer.
            roi: Region of interest as x, y, width, height in pixels of the frame; None means the whole frame.
            every_frame: Frames per second of the source, to decide on each of them instead of at the model's frame
                rate. With k frames for each step of the model it is as if k recognizers were fed in turn: the engine
                has a stride of k (`Sampler.stride`), and the decision averages over the same span of time. None: at
                the model's frame rate.
            patience: Steps that have to fail in a row before that is an error; at each one before, the state is reset,
                there is no result, and the stream goes on. 1, the default, forgives none: who measures wants to know.

        Raises:
            UserError: If the engine cannot be opened, has no such slot or another stride, or an option is out of its
                range.
        """
        if slot < 0:
            raise UserError(f"the slot must be at least 0, not {slot}")
        if patience < 1:
            raise UserError(f"the patience must be at least 1 step, not {patience}")
        if smoothing is not None and smoothing < 1:
            raise UserError(f"the smoothing must be at least 1 step, not {smoothing}")
        if every_frame is not None and not 0 < every_frame < math.inf:
            raise UserError(f"the source's frames per second must be a positive number, not {every_frame}")
        if not isinstance(engine, Engine):
            stride = 1 if every_frame is None else Sampler.stride(every_frame, frame_rate_of(engine))
            engine = Engine.open(engine, slots=slot + 1, stride=stride)
        self.engine = engine
        if slot >= engine.slots:
            raise UserError(
                f"the engine has {engine.slots} slots, numbered from 0, so there is no slot {slot}; open it with more"
            )
        self.roi = roi
        manifest = engine.manifest
        self._every_frame = every_frame
        stride = self._stride(every_frame)
        if engine.stride != stride:
            raise UserError(
                f"the engine was opened with a stride of {engine.stride}, but "
                + ("the model's own frame rate" if every_frame is None else f"every frame of {every_frame:g} frames/s")
                + f" needs {stride}; open it with Engine.open(..., stride={stride})"
            )
        self._slots = (slot,)
        alone = engine.slots == manifest.batch == 1
        self.input = engine.frames if alone else np.empty((1, *engine.frames.shape[1:]), np.uint8)
        spec = manifest.decision if smoothing is None else dataclasses.replace(manifest.decision, smoothing=smoothing)
        self._decision = Decision(
            manifest.labels, manifest.background, _over(spec, stride), topk=topk, threshold=threshold
        )
        self._sampler = Sampler(manifest.frame_rate, every_frame=every_frame is not None)
        self._cuts = CutDetector()
        self._size: tuple[int, ...] | None = None
        self.resets = self.failures = 0
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        """Start over as if no frame had been seen; a running event is dropped, so ``finish`` it before."""
        self._forget()
        self._restarts = False
        self._begin_stream()
        self._frame = -1
        self._last = self._concluded = (0.0, 0)
        self._ended: tuple[Event, ...] = ()
        self._failed = 0

    def restart(self) -> None:
        """Let the next frame that is prepared be the first of another stream; any thread may call it.

        It is like ``finish`` and ``reset`` between that frame and the one before; the event that ends there is in the
        frame's result.
        """
        self._restarts = True

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
            rate, or where the step failed.

        Raises:
            UserError: If the frame has another type or shape, the region of interest does not lie inside it,
                the time is not finite, or as many steps in a row have failed as the patience allows.
        """
        arrived = perf_counter()
        check_frame(frame)
        prepared = self.prepare(frame, time, self.input, arrived=arrived, dropped=dropped)
        return None if prepared is None else self.conclude(prepared)

    def wants(self, time: float) -> bool:
        """Whether ``prepare`` would look at a frame at this source time in seconds; any thread may ask."""
        return self._restarts or self._sampler.wants(time)

    def prepare(
        self,
        frame: npt.NDArray[np.uint8] | None,
        time: float,
        out: npt.NDArray[np.uint8],
        *,
        arrived: float,
        dropped: int = 0,
    ) -> Prepared | None:
        """Do the first half of ``update``: pick the frame, notice where the stream breaks, crop and resize.

        Args:
            frame: uint8 (H, W, 3), BGR. It is neither changed nor kept. None where ``wants`` says that it is not
                looked at.
            time: Source time in seconds.
            out: The network's input, uint8 (1, input_height, input_width, 3), C-contiguous, written in place.
            arrived: When the frame was there, by the clock of ``time.perf_counter``.
            dropped: Frames that the source has dropped so far, for the result.

        Returns:
            What ``conclude`` needs, with ``out`` in it, or None where the frame is skipped.

        Raises:
            UserError: As ``update`` does.
        """
        if not math.isfinite(time):
            raise UserError(f"the time of a frame must be a finite number of seconds, not {time}")
        before = self._last
        restarts = self._restarts and frame is not None
        if restarts:
            self._restarts, self._frame = False, -1
        breaks = restarts or self._sampler.breaks(time)
        if breaks:
            self._begin_stream()
        self._frame += 1
        self._last = (time, self._frame)
        if not self._sampler.take(time):
            return None
        assert frame is not None
        fit(frame, self.roi, out[0])
        breaks |= self._size not in (None, frame.shape)
        self._size = frame.shape
        # Not the other way round: the detector has to see every picture.
        breaks = self._cuts.is_cut(out[0]) or breaks
        return Prepared(out, time, self._frame, before if breaks else None, dropped, arrived)

    def conclude(self, prepared: Prepared) -> Result | None:
        """Do the second half of ``update``: reset the state where the stream broke, make the step, decide.

        Returns:
            The result, or None where the step failed. The state was reset then, and the event that ended there is in
            the next result.

        Raises:
            UserError: If as many steps in a row have failed as the patience allows.
        """
        if prepared.ended is not None:
            self._ended += self._decision.finish(*prepared.ended)
            self._forget()
            self.resets += 1
        try:
            with self.engine.turn:
                logits = self.engine.step(prepared.input, self._slots)[0]
                # It refuses logits that are not finite.
                labels, scores, events = self._decision.update(logits, prepared.time, prepared.frame)
        except Exception as error:  # the runtimes' errors share no base class below it
            self._recover(error)
            return None
        self._failed, self._concluded = 0, (prepared.time, prepared.frame)
        ended, self._ended = self._ended, ()
        return Result(
            time=prepared.time,
            frame=prepared.frame,
            labels=labels,
            scores=scores,
            latency=perf_counter() - prepared.arrived,
            dropped=prepared.dropped,
            warming_up=self._decision.warming_up,
            events=ended + events,
            active=self._decision.active,
        )

    def finish(self) -> tuple[Event, ...]:
        """End the running event at the last frame, as the end of a stream does.

        Returns:
            The event that ended, or nothing.
        """
        ended, self._ended = self._ended, ()
        return ended + self._decision.finish(*self._last)

    def run(self, source: Source | int | str | os.PathLike[str]) -> Iterator[Result]:
        """Reset and recognize a whole source; ``finish`` then gives the event that still runs at its end.

        The source is read and the engine run in threads of their own (see `Pipeline`), so the next frames are on their
        way while a result is looked at. Whoever leaves early stops the source.

        Args:
            source: A camera index, a path, a URL, or an open source. What was opened here is closed here.

        Yields:
            One result per network step.

        Raises:
            UserError: If the source cannot be opened, a frame is not usable, or the source declares another frame rate
                than ``every_frame``, so that the stride is wrong.
        """
        if not isinstance(source, Source):
            with open_source(source) as opened:
                yield from self.run(opened)
            return
        stride = self._stride(source.frame_rate)
        if self._every_frame and source.frame_rate and stride != self.engine.stride:
            raise UserError(
                f"{source.name} has {source.frame_rate:g} frames/s, which needs a stride of {stride}, not that of "
                f"{self._every_frame:g} frames/s; give its frame rate as every_frame"
            )
        self.reset()
        with Pipeline(self, source, frames=False) as pipeline:
            for output in pipeline:
                if output.result is not None:
                    yield output.result

    def _stride(self, source_rate: float | None) -> int:
        return 1 if source_rate is None else Sampler.stride(source_rate, self.engine.manifest.frame_rate)

    def _begin_stream(self) -> None:
        self._cuts.reset()
        self._sampler.reset()
        self._size = None

    def _recover(self, error: Exception) -> None:
        """Go on after a step that failed, with the state at zero; raise the error where the patience is at its end."""
        self.failures += 1
        self._failed += 1
        self._ended += self._decision.finish(*self._concluded)
        try:
            self._forget()
        except Exception as second:  # without a state at zero nothing may go on
            raise _broken(self._failed, second) from second
        self.resets += 1
        if self._failed >= self._patience:
            raise (error if isinstance(error, UserError) and self._failed == 1 else _broken(self._failed, error))

    def _forget(self) -> None:
        with self.engine.turn:
            self.engine.reset(self._slots)
        self._decision.reset()


def _over(spec: DecisionSpec, stride: int) -> DecisionSpec:
    """The same decision over the same time, from steps that come ``stride`` times as fast."""
    return dataclasses.replace(spec, smoothing=spec.smoothing * stride, min_steps=spec.min_steps * stride)


def _broken(failed: int, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    times = f"at {failed} steps in a row, the last time" if failed > 1 else "at a step"
    return UserError(f"the engine failed {times} with: {lines[0]}; start again, and build the engine anew if it stays")
