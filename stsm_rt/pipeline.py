"""A source on its way through a recognizer: reading, steps and output at the same time."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from stsm_rt.video.source import Frame, Source

if TYPE_CHECKING:
    from stsm_rt.recognizer import Recognizer
    from stsm_rt.result import Prepared, Result

_INPUTS = 3  # of a file: one in the engine, one that waits for it, one that is being written
_MOST_FRAMES = 8  # of a file that are under way: memory, and how far a window lies behind
_MOST_RESULTS = 64  # of a live source that wait for a slow consumer
_WAKE = 0.1  # seconds after which a thread that waits looks whether the source was stopped
_PARTING = 0.5  # seconds to wait for a reader at the end; one that hangs in a connection is left behind, as a daemon


class Output(NamedTuple):
    """A frame that has gone through the recognizer.

    Attributes:
        frame: uint8 (H, W, 3), BGR, which belongs to the caller; None where no frames were asked for, or where a newer
            frame of a live source was there before the caller had time for this one.
        time: Source time in seconds.
        result: Of the network step; None where the frame was skipped to keep to the model's frame rate, or the step
            failed.
    """

    frame: Frame | None
    time: float
    result: Result | None


class _Reading(NamedTuple):
    """A frame on its way to the engine."""

    frame: Frame | None
    time: float
    prepared: Prepared | None


class Pipeline:
    """Runs a source through a recognizer in two threads and hands the outputs, in order, to a third: the caller's.

    The reader decodes, picks the frames and makes the network's inputs of them; the engine makes the steps; whoever
    iterates shows or writes what comes out. The results are those of ``Recognizer.update`` in a loop. Where the source
    begins another stream (`Reading.stream`), so does the recognizer.

    A file loses nothing: it is read ahead by a few frames, and waits for the slowest of the three. From a live source
    the engine gets the newest frame: there is one input buffer, and no frame is taken from the source before it is
    free, so the source drops (and counts) what there is no time for. A slow caller does not slow the engine of a live
    source down: it gets every result, with the frames that are still new when it asks for them. Nothing grows: while
    too many outputs wait, nothing is read.

    Use it in a ``with`` statement and iterate over it. Leaving the block ends the threads, and stops the source if it
    has not ended. Until then nothing else may use the recognizer, but for ``Pipeline.reset``; other recognizers may use
    its engine.

    Attributes:
        frame_count: Frames taken from the source so far.

    Example:
        >>> with open_source(0) as source, Pipeline(recognizer, source, frames=True) as pipeline:  # doctest: +SKIP
        ...     for frame, time, result in pipeline:
        ...         ...
    """

    def __init__(
        self,
        recognizer: Recognizer,
        source: Source,
        *,
        frames: bool,
        max_frames: int | None = None,
        on_frame: Callable[[], object] | None = None,
    ) -> None:
        """Prepare the buffers; the threads start with the block.

        Args:
            recognizer: What to run; its state is taken as it is.
            source: Where the frames come from; it is not closed.
            frames: Whether to hand out the frames. Without, there is one output per step, and frames that no step
                needs are not made into pictures.
            max_frames: How many frames to take from the source; None means all.
            on_frame: Called for each frame that was taken from the source, in the thread that reads.
        """
        self.frame_count = 0
        self._recognizer = recognizer
        self._source = source
        self._frames = frames
        self._max_frames = max_frames
        self._on_frame = on_frame
        self._most = _MOST_RESULTS if source.live else _MOST_FRAMES
        shape = recognizer.input.shape
        self._inputs = [recognizer.input] if source.live else [np.empty(shape, np.uint8) for _ in range(_INPUTS)]

        lock = threading.Lock()
        self._room = threading.Condition(lock)  # for another frame
        self._work = threading.Condition(lock)  # for the engine
        self._news = threading.Condition(lock)  # for the caller
        self._read: deque[_Reading] = deque()
        self._done: deque[Output] = deque()
        self._under_way = 0  # in either queue or between them
        self._paused = self._leaving = self._all_read = self._all_done = False
        self._patience_ends = math.inf
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=run, name=f"stsm-rt {name}", daemon=True)
            for name, run in (("input", self._run_reader), ("engine", self._run_engine))
        ]

    def __enter__(self) -> Pipeline:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._room:
            if not self._all_read:
                self._source.stop()
            self._leave()
        reader, engine = self._threads
        engine.join()
        reader.join(max(_WAKE, self._patience() - perf_counter()))

    def __iter__(self) -> Iterator[Output]:
        return self

    def __next__(self) -> Output:
        """Wait for the next output.

        Raises:
            StopIteration: At the end of the source.
            UserError: What went wrong in a thread, after all that came out before.
        """
        while (output := self.take(None)) is None:
            pass
        return output

    def take(self, timeout: float | None) -> Output | None:
        """Wait for the next output, but not for longer than a time-out.

        Args:
            timeout: Seconds; None waits as long as it takes.

        Returns:
            The output, or None where there was none in time.

        Raises:
            StopIteration: At the end of the source.
            UserError: As ``__next__`` does.
        """
        with self._news:
            if not self._done and not self._all_done:
                self._news.wait(timeout)
            if self._done:
                self._under_way -= 1
                self._room.notify()
                return self._done.popleft()
            if not self._all_done:
                return None
        if self._error is not None:
            raise self._error
        raise StopIteration

    def reset(self) -> None:
        """Start a new stream at the next frame that is read; see ``Recognizer.restart``."""
        self._recognizer.restart()

    def pause(self) -> None:
        """Read no frame until ``resume``; what has been read still comes out."""
        self._paused = True

    def resume(self) -> None:
        """Go on reading."""
        with self._room:
            self._paused = False
            self._room.notify()

    def _run_reader(self) -> None:
        try:
            self._read_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._work:
                self._all_read = True
                self._work.notify()

    def _read_all(self) -> None:
        recognizer, source = self._recognizer, self._source
        wanted = None if self._frames else recognizer.wants
        stream = None
        while self.frame_count != self._max_frames:
            buffer = self._wait_for_room()
            reading = None if buffer is None else source.read(wanted)
            if buffer is None or reading is None or self._leaving:
                return
            self.frame_count += 1
            if self._on_frame is not None:
                self._on_frame()
            frame, time, arrived, _ = reading
            if stream not in (None, reading.stream):
                recognizer.restart()
            stream = reading.stream
            prepared = recognizer.prepare(frame, time, buffer, arrived=arrived, dropped=source.dropped)
            with self._work:
                if prepared is None:
                    self._inputs.append(buffer)
                if prepared is not None or self._frames:
                    self._under_way += 1
                    self._read.append(_Reading(frame if self._frames else None, time, prepared))
                    self._work.notify()

    def _wait_for_room(self) -> npt.NDArray[np.uint8] | None:
        """Take a free input buffer, or None where the caller has left."""
        with self._room:
            while not self._leaving and (self._paused or not self._inputs or self._under_way >= self._most):
                self._room.wait()
            return None if self._leaving else self._inputs.pop()

    def _run_engine(self) -> None:
        try:
            while (reading := self._wait_for_work()) is not None:
                self._conclude(reading)
        except BaseException as error:
            self._error = error
        finally:
            with self._room:
                self._all_done = True
                self._leave()

    def _wait_for_work(self) -> _Reading | None:
        with self._work:
            while not self._leaving and not self._read and not self._all_read:
                if self._source.stopped and perf_counter() > self._patience():
                    break  # the reader hangs
                self._work.wait(_WAKE)
            return None if self._leaving or not self._read else self._read.popleft()

    def _patience(self) -> float:
        """Until when the reader is waited for; asked for the first time when the end has begun."""
        self._patience_ends = min(self._patience_ends, perf_counter() + _PARTING)
        return self._patience_ends

    def _conclude(self, reading: _Reading) -> None:
        frame, time, prepared = reading
        result = None if prepared is None else self._recognizer.conclude(prepared)
        with self._room:
            if prepared is not None:
                self._inputs.append(prepared.input)
            if self._source.live:
                self._outdate()
            self._done.append(Output(frame, time, result))
            self._room.notify()
            self._news.notify()

    def _outdate(self) -> None:
        """Take its frame away from an output that the caller had no time for; its result it will get."""
        if self._done:
            last = self._done.pop()
            if last.result is None:
                self._under_way -= 1
            else:
                self._done.append(last._replace(frame=None))

    def _leave(self) -> None:
        self._leaving = True
        for condition in (self._room, self._work, self._news):
            condition.notify()
