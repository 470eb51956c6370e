"""Several cameras on one engine: a reader, a recognizer and a slot for each, and one thread that makes all steps."""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stsm_rt.decision import Event
from stsm_rt.errors import UserError
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Prepared, Result
from stsm_rt.video.source import OnChange, Reading, Source, SourceState, StateChange

_WAKE = 0.1  # seconds after which a thread that waits looks whether it was stopped
_PATIENCE = 0.7  # seconds to wait for readers; one that hangs in a connection is left behind, as a daemon
_MOST_NEWS = 64  # for each camera, that wait for a slow consumer

CLOSED = "it was closed"  # why a source has ended that somebody stopped

OpenSource = Callable[[OnChange], Source]


class News(NamedTuple):
    """Something that happened at a camera.

    Attributes:
        camera: Where.
        result: Of a network step, or None.
        change: Its source has gone over to another state, or None.
        events: Those that ended when the camera left.
    """

    camera: Camera
    result: Result | None = None
    change: StateChange | None = None
    events: tuple[Event, ...] = ()


class Camera:
    """One of several cameras.

    Attributes:
        name: What to call it.
        recognizer: In a slot of its own.
        source: Where its frames come from. Whoever made the camera closes it, until `Cameras` does.
        frame_count: Frames taken from the source so far.
        picture: The newest frame; None before the first, and where no pictures were asked for. Leave it as it is.
        state: What its source does, as its last change says.
        error: Why it failed, or None.
    """

    def __init__(self, name: str, recognizer: Recognizer, open_source: OpenSource) -> None:
        """Open its source.

        Args:
            name: What to call it.
            recognizer: In a slot of its own; its state is taken as it is.
            open_source: Opens its source, which calls what it is given with every change of its state. So that one that
                is not there yet holds nobody up, it need not wait for a live one (``open_source(..., wait=True)``).

        Raises:
            UserError: If the source cannot be opened.
        """
        self.name = name
        self.recognizer = recognizer
        self.frame_count = 0
        self.picture: Reading | None = None
        self.state = SourceState.OPENING
        self.error: UserError | None = None
        self._overtaken = 0  # frames that the network should have seen, but newer ones came before its turn
        self._waiting: Reading | Prepared | None = None  # of a live camera, of a recording
        self._in_line = self._over = self._done = False
        self._stream: int | None = None
        self._time = 0.0
        # So that no change overtakes another; a signal handler may come back here.
        self._changing = threading.RLock()
        self._changes: deque[StateChange] = deque()  # before the cameras start
        self._hear: OnChange = self._changes.append
        self.source = open_source(self._change)

    def _change(self, change: StateChange) -> None:
        with self._changing:
            self._hear(change)

    def _prepare(self, reading: Reading, out: npt.NDArray[np.uint8]) -> Prepared | None:
        """Make the network's input of a reading; None where it is skipped or has nothing to be seen."""
        if self._stream not in (None, reading.stream):
            self.recognizer.restart()
        self._stream, self._time = reading.stream, reading.time
        frame, time, arrived, _ = reading
        return self.recognizer.prepare(frame, time, out, arrived=arrived, dropped=self.dropped)

    @property
    def dropped(self) -> int:
        """Frames lost so far, by the source or because the engine was busy with others."""
        return self._overtaken + self.source.dropped


class Cameras:
    """Runs several cameras through recognizers that share an engine, each as if it were alone.

    Each camera is read in a thread of its own, so nobody waits for a slow one. One thread makes the steps: the camera
    that has waited longest is next, and of a live camera it takes the newest frame then. What a live camera gave
    meanwhile is dropped and counted. A recording loses nothing: it waits until the engine has taken the frame before.
    A camera that ends or fails leaves; the others do not notice.

    Use it in a ``with`` statement and call ``take`` until it gives None. Nothing grows: while too much news waits, no
    step is made.

    Attributes:
        cameras: In the order that was given.
    """

    def __init__(
        self,
        cameras: Sequence[Camera],
        *,
        pictures: bool = False,
        paced: bool = False,
        max_frames: int | None = None,
        on_frame: Callable[[Camera], object] | None = None,
    ) -> None:
        """Prepare the threads; they start with the block, which closes the sources.

        Args:
            cameras: Each with a recognizer in a slot of its own; usually all of one engine.
            pictures: Whether to keep the newest frame of each, for ``Camera.picture``. Without, frames that no step
                needs are not made into pictures.
            paced: Whether recordings are played at their own speed, as one wants to see them.
            max_frames: How many frames to take from each source; None means all.
            on_frame: Called with the camera for each frame that was taken from its source, in the camera's thread.
        """
        self.cameras = tuple(cameras)
        self._pictures, self._paced, self._max_frames, self._on_frame = pictures, paced, max_frames, on_frame
        # A signal handler that stops a source may come back here through the news of it.
        lock = threading.RLock()
        self._work = threading.Condition(lock)  # for the engine
        self._room = threading.Condition(lock)  # for another frame of a recording
        self._fresh = threading.Condition(lock)  # for the caller
        self._line: deque[Camera] = deque()
        self._news: deque[News] = deque()
        self._stopped = threading.Event()
        self._patience_ends = math.inf
        self._leaving = self._all_done = False
        self._error: BaseException | None = None
        self._readers = [
            threading.Thread(target=self._run_reader, args=(camera,), name=f"stsm-rt {camera.name}", daemon=True)
            for camera in self.cameras
        ]
        self._engine = threading.Thread(target=self._run_engine, name="stsm-rt engine", daemon=True)

    def __enter__(self) -> Cameras:
        for camera in self.cameras:
            with camera._changing:
                for change in camera._changes:
                    self._change(camera, change)
                camera._hear = functools.partial(self._change, camera)
        for thread in (*self._readers, self._engine):
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leaving = True
        self.stop()
        # Whoever stopped them has waited since.
        end = max(self._patience_ends, perf_counter() + _WAKE)
        for thread in (self._engine, *self._readers):
            thread.join(max(0.0, end - perf_counter()))

    def stop(self) -> None:
        """End all cameras at their next frames; may be called from a signal handler or another thread."""
        # No lock: whom a signal interrupts may hold it.
        self._patience_ends = min(self._patience_ends, perf_counter() + _PATIENCE)
        self._stopped.set()
        for camera in self.cameras:
            camera.source.stop()

    def reset(self) -> None:
        """Start a new stream of each camera at its next frame; see ``Recognizer.restart``."""
        for camera in self.cameras:
            camera.recognizer.restart()

    def take(self, timeout: float) -> list[News] | None:
        """Wait for news and take all there is.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            The news, oldest first, none if nothing happened in time; None when all cameras have left and all their
            news was taken.

        Raises:
            UserError: The engine has failed for good, after all that came out before.
        """
        with self._fresh:
            if not self._news and not self._all_done:
                self._fresh.wait(timeout)
            news = list(self._news)
            self._news.clear()
            self._work.notify()
            if news or not self._all_done:
                return news
        if self._error is not None:
            raise self._error
        return None

    def _run_reader(self, camera: Camera) -> None:
        try:
            with camera.source as source:
                self._read_all(camera, source)
            if camera.state not in (SourceState.ENDED, SourceState.FAILED):
                camera._change(StateChange(SourceState.ENDED, camera._time, CLOSED))
        except UserError as error:
            self._fail(camera, error)
        except BaseException as error:
            self._error = error
            self._leaving = True
        finally:
            with self._work:
                camera._over = True
                self._queue(camera)

    def _read_all(self, camera: Camera, source: Source) -> None:
        wanted = None if self._pictures else camera.recognizer.wants
        inputs = [np.empty_like(camera.recognizer.input) for _ in range(2)]
        start: float | None = None
        while not self._stopped.is_set() and camera.frame_count != self._max_frames:
            reading = source.read(wanted)
            if reading is None or camera.error is not None:
                return
            if self._paced and not source.live:
                # From the first frame on, which took its time to be opened.
                start = perf_counter() - reading.time if start is None else start
                self._stopped.wait(max(0.0, start + reading.time - perf_counter()))
            camera.frame_count += 1
            if self._on_frame is not None:
                self._on_frame(camera)
            if self._pictures:
                camera.picture = reading
            if source.live:
                self._offer(camera, reading)
            elif not self._hand_over(camera, reading, inputs):
                return

    def _offer(self, camera: Camera, reading: Reading) -> None:
        """Let the newest frame of a live camera wait for the engine, in place of an older one."""
        if reading.frame is None:
            return
        with self._work:
            if camera._waiting is not None and camera.recognizer.wants(camera._waiting.time):
                camera._overtaken += 1
            camera._waiting = reading
            self._queue(camera)

    def _hand_over(self, camera: Camera, reading: Reading, inputs: list[npt.NDArray[np.uint8]]) -> bool:
        """Give the engine the next frame of a recording, when it has taken the one before; False where it has left."""
        with self._room:
            while camera._waiting is not None and not self._leaving:
                self._room.wait(_WAKE)
            if self._leaving:
                return False
        # The last of the two inputs may be in the engine just now; the first is free.
        if (prepared := camera._prepare(reading, inputs[0])) is not None:
            inputs.reverse()
            with self._work:
                camera._waiting = prepared
                self._queue(camera)
        return True

    def _queue(self, camera: Camera) -> None:
        if not camera._in_line:
            camera._in_line = True
            self._line.append(camera)
            self._work.notify()

    def _run_engine(self) -> None:
        try:
            while (camera := self._next()) is not None:
                self._serve(camera)
            for camera in self.cameras:
                if not camera._done:
                    self._tell(News(camera, events=camera.recognizer.finish()))
        except BaseException as error:
            self._error = error
        finally:
            self.stop()
            with self._fresh:
                self._leaving = self._all_done = True
                self._fresh.notify()

    def _next(self) -> Camera | None:
        """The camera that has waited longest; None when all have left."""
        with self._work:
            while not self._leaving and not all(camera._done for camera in self.cameras):
                if self._line and len(self._news) < _MOST_NEWS * len(self.cameras):
                    return self._line.popleft()
                if perf_counter() > self._patience_ends:
                    break  # a reader hangs
                self._work.wait(_WAKE)
            return None

    def _serve(self, camera: Camera) -> None:
        with self._room:
            waiting, camera._waiting = camera._waiting, None
            camera._in_line = False
            if waiting is not None and camera._over:
                self._queue(camera)  # once more, to end it
            self._room.notify_all()
        if waiting is None:
            camera._done = True
            self._tell(News(camera, events=camera.recognizer.finish()))
            return
        try:
            prepared = waiting if isinstance(waiting, Prepared) else camera._prepare(waiting, camera.recognizer.input)
        except UserError as error:  # its frames are not as its options say
            self._fail(camera, error)
            return
        if prepared is not None and (result := camera.recognizer.conclude(prepared)) is not None:
            self._tell(News(camera, result))

    def _fail(self, camera: Camera, error: UserError) -> None:
        camera.error = error
        camera.source.stop()
        if camera.state is not SourceState.FAILED:
            camera._change(StateChange(SourceState.FAILED, camera._time, str(error)))

    def _change(self, camera: Camera, change: StateChange) -> None:
        # A source that was stopped because the camera has failed says that it has ended.
        if camera.state is not SourceState.FAILED:
            camera.state = change.state
            self._tell(News(camera, change=change))

    def _tell(self, news: News) -> None:
        with self._fresh:
            self._news.append(news)
            self._fresh.notify()
