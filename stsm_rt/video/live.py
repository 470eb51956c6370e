"""Live sources: the newest frame wins, and a connection that is lost is made anew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter

import cv2

from stsm_rt.errors import UserError, redact
from stsm_rt.video.clock import StreamClock
from stsm_rt.video.decoding import Decoder, declared_rate, size_of
from stsm_rt.video.patience import Patience
from stsm_rt.video.source import OnChange, Reading, Source, SourceState, Wanted, every_frame

Connect = Callable[[], cv2.VideoCapture]

_WAKE = 0.1  # seconds after which a wait for a live frame looks whether it was stopped
_PARTING = 0.5  # seconds to wait for the threads at the end; a blocked connection holds its own longer, as a daemon
_MOST_BLOCKED = 4  # connections left behind that still block before no more are made


class NotLiveError(UserError):
    """What was connected is no live source, so no further attempt helps."""


class LiveSource(Source):
    """A camera or a stream: a thread reads it, the newest frame wins, and lost frames are counted.

    Another thread watches the reader. When the connection ends, or no frame comes for as long as the read time-out, it
    makes a new one, again and again. A reader that blocks in a driver is left behind. Nothing stands in for frames that
    did not come.

    Times are those of the source where it has any (see `StreamClock`), else those of arrival, in seconds since the
    source was opened: since its first frame or, where that was not waited for, since the call. They go on over
    connections.
    """

    live = True

    def __init__(
        self,
        capture: cv2.VideoCapture | None,
        name: str,
        *,
        connect: Connect | None = None,
        patience: Patience | None = None,
        wait: bool = False,
        positioned: Callable[[cv2.VideoCapture], bool] = lambda _: False,
        rate: Callable[[cv2.VideoCapture], float | None] = declared_rate,
        explaining: float = 0.0,
        on_change: OnChange | None = None,
    ) -> None:
        """Start to read and wait for the first frame.

        Args:
            capture: The opened device or stream, which is closed with the source; None lets ``connect`` open it.
            name: What to call the source, without credentials.
            connect: Opens the device or stream anew, or raises a `UserError`; a `NotLiveError` where no further attempt
                helps. None: when the connection ends, the source has ended.
            patience: How long to wait, and how often to try anew.
            wait: Whether to return at once, and to try as often as ``patience`` says until the first frame comes, so
                that ``size`` and ``frame_rate`` are not known yet. Otherwise the first attempt decides.
            positioned: Whether the positions of an opened capture are measured; see `StreamClock`.
            rate: Frames per second of an opened capture, or None where it is not known.
            explaining: Seconds beside the open time-out that ``connect`` may take to find out why it fails.
            on_change: See `Source`.

        Raises:
            UserError: If no frame arrives.
        """
        super().__init__(on_change)
        self.name = name
        self.size = (0, 0)
        self._connect = connect
        self._patience = patience or Patience()
        self._positioned = positioned
        self._rate = rate
        self._explaining = explaining
        lock = threading.Lock()
        self._condition = threading.Condition(lock)  # for whoever reads
        self._watched = threading.Condition(lock)  # for the watcher
        self._newest: Reading | None = None
        self._wanted: Wanted = every_frame  # of whoever waits for a frame just now
        self._failure = ""
        self._persists = wait  # also where nothing has ever come
        self._running_since = 0.0
        self._clock = StreamClock(perf_counter() if wait else None)
        self._blocked: list[_Connection] = []
        self._connection = _Connection(self, capture, connect)
        self._watcher = threading.Thread(target=self._watch, name="stsm-rt watcher", daemon=True)
        self._change(SourceState.OPENING)
        self._connection.start()
        self._watcher.start()
        if not wait:
            self._wait_for_first()

    @property
    def healthy(self) -> bool:
        """Whether it has run for 10 s (`Patience.healthy_after`) without a break."""
        running = self._state is SourceState.RUNNING
        return running and perf_counter() - self._running_since >= self._patience.healthy_after

    def close(self) -> None:
        """Stop the threads and give back the device or the connection."""
        super().close()
        with self._condition:
            self._watched.notify()
        end = perf_counter() + _PARTING
        for thread in (self._watcher, self._connection):
            thread.join(max(0.0, end - perf_counter()))

    def _wait_for_first(self) -> None:
        with self._condition:
            while self._state is SourceState.OPENING:
                self._condition.wait(_WAKE)
            failure = "" if self.size != (0, 0) else self._failure
        self._persists = True
        if failure:
            self.close()
            raise UserError(failure)

    def _next(self, wanted: Wanted) -> Reading | None:
        with self._condition:
            self._wanted = wanted
            while not (ready := self._is_ready(wanted)) and not self._is_over() and not self._stopped:
                self._condition.wait(_WAKE)
            self._wanted = every_frame
            newest, self._newest = self._newest, None
        if ready and not self._stopped:
            return newest
        if self._state is SourceState.FAILED and not self._stopped:
            raise UserError(self._failure)
        return None

    def _is_ready(self, wanted: Wanted) -> bool:
        newest = self._newest
        # Without a picture it was left by whoever waited before and wanted other frames.
        return newest is not None and (newest.frame is not None or not wanted(newest.time))

    def _is_over(self) -> bool:
        return self._state in (SourceState.ENDED, SourceState.FAILED)

    # What the reader of a connection calls.

    def _begin(self, connection: _Connection, capture: cv2.VideoCapture) -> None:
        with self._condition:
            if self._accepts(connection):
                connection.opened = perf_counter()
                self.frame_rate = self.frame_rate or self._rate(capture)
                self._clock.connect(positioned=self._positioned(capture))
                self._watched.notify()

    def _accepts(self, connection: _Connection) -> bool:
        return connection is self._connection and not self._stopped

    def _stamp(self, connection: _Connection, position: float) -> Reading | None:
        with self._condition:
            if not self._accepts(connection):
                return None
            arrived = perf_counter()
            time, stream = self._clock.stamp(arrived, position)
            return Reading(None, time, arrived, stream)

    def _put(self, connection: _Connection, reading: Reading, left_out: int) -> None:
        with self._condition:
            if not self._accepts(connection):
                return
            self.dropped += left_out + (self._newest is not None)
            self._newest = reading
            if self.size == (0, 0) and reading.frame is not None:
                self.size = size_of(reading.frame)
            connection.last = reading.arrived
            connection.frames += 1
            self._condition.notify()
            if connection.frames == 1:
                self._watched.notify()

    def _part(self, connection: _Connection) -> None:
        with self._condition:
            connection.over = True
            self._watched.notify()

    # What the watcher does.

    def _watch(self) -> None:
        attempt = 0
        while True:
            trouble = self._follow(attempt)
            connection, most = self._connection, self._patience.max_retries
            if self._stopped:
                return self._finish(SourceState.ENDED, "it was closed", attempt)
            if connection.frames and connection.last - self._running_since >= self._patience.healthy_after:
                attempt = 0
            if self._connect is None or most == 0 or connection.hopeless:
                has_ended = connection.frames > 0 and connection.over
                return self._finish(SourceState.ENDED if has_ended else SourceState.FAILED, trouble, attempt)
            if not self._persists or attempt == most:
                tried = f"{self.name} was given up after {attempt} attempts to come back; the last one said: "
                return self._finish(SourceState.FAILED, tried * (attempt > 0) + trouble, attempt)
            attempt += 1
            never = self.size == (0, 0)
            self._change_now(SourceState.OPENING if never else SourceState.RECONNECTING, trouble, attempt)
            if self._sleep(self._patience.delay(attempt)):
                self._reconnect()

    def _follow(self, attempt: int) -> str:
        """Watch a connection until it ends, stalls or is closed, and say in words what happened."""
        connection, patience = self._connection, self._patience
        with self._condition:
            while self._is_going(connection) and not connection.frames and (left := connection.left(patience)) > 0:
                self._watched.wait(left)
            if not connection.frames:
                return connection.trouble or self._why_nothing_came(connection)
            self._running_since = connection.last
            self.reconnects += connection.is_new
        self._change_now(SourceState.RUNNING, "", attempt)
        with self._condition:
            while self._is_going(connection) and (left := connection.left(patience)) > 0:
                self._watched.wait(left)
            # FFmpeg gives a read up at the same time-out.
            stalled = connection.left(patience) < 0.1 * patience.read_timeout
        if not stalled or self._stopped:
            return connection.trouble or f"the connection to {self.name} ended"
        trouble = f"{self.name} gave no frame for {patience.read_timeout:g} s"
        self._change_now(SourceState.STALLED, trouble, attempt)
        return trouble

    def _is_going(self, connection: _Connection) -> bool:
        return not connection.over and not self._stopped

    def _why_nothing_came(self, connection: _Connection) -> str:
        if connection.opened is None:
            return f"{self.name} does not open within {self._patience.open_timeout:g} s; check that it is on and free"
        return f"{self.name} was opened but gives no frame; check that nothing else uses it"

    def _sleep(self, seconds: float) -> bool:
        """Wait; False where the source was closed."""
        end = perf_counter() + seconds
        with self._condition:
            while not self._stopped and (left := end - perf_counter()) > 0:
                self._watched.wait(left)
        return not self._stopped

    def _reconnect(self) -> None:
        with self._condition:
            self._blocked = [old for old in (*self._blocked, self._connection) if old.is_alive()]
            connect = self._connect if len(self._blocked) < _MOST_BLOCKED else self._refuse
            self._connection = _Connection(self, None, connect, is_new=self.size != (0, 0))
        self._connection.start()

    def _refuse(self) -> cv2.VideoCapture:
        raise UserError(
            f"{self.name} still blocks {_MOST_BLOCKED} earlier connections; unplug it, or restart its driver"
        )

    def _change_now(self, state: SourceState, reason: str, attempt: int) -> None:
        self._change(state, time=self._clock.elapsed(perf_counter()), reason=reason, attempt=attempt)
        with self._condition:
            self._condition.notify()

    def _finish(self, state: SourceState, reason: str, attempt: int) -> None:
        self._failure = reason
        self._change_now(state, reason, attempt)


class _Connection(threading.Thread):
    """Opens a capture and reads it to its end, or until its source has another.

    Attributes:
        is_new: Whether it replaces one that was lost.
        opened: When it was open, by the clock of ``time.perf_counter``; None before.
        last: When its last frame came.
        frames: Frames that it gave.
        over: Whether it has ended.
        trouble: What went wrong, in words.
        hopeless: Whether it would go wrong again.
    """

    def __init__(
        self, source: LiveSource, capture: cv2.VideoCapture | None, connect: Connect | None, *, is_new: bool = False
    ) -> None:
        super().__init__(name="stsm-rt reader", daemon=True)
        self.is_new = is_new
        self.opened: float | None = None
        self.last = 0.0
        self.frames = 0
        self.over = False
        self.trouble = ""
        self.hopeless = False
        self._made = perf_counter()
        self._source = source
        self._capture = capture
        self._connect = connect

    def left(self, patience: Patience) -> float:
        """Seconds until it has stalled if nothing comes."""
        if self.opened is None:
            return self._made + patience.open_timeout + self._source._explaining - perf_counter()
        return max(self.opened, self.last) + patience.read_timeout - perf_counter()

    def run(self) -> None:
        """Open and read."""
        capture = self._capture
        try:
            if capture is None:
                assert self._connect is not None
                capture = self._connect()
            self._source._begin(self, capture)
            self._read(capture)
        except (UserError, cv2.error) as error:
            self.trouble, self.hopeless = str(error), isinstance(error, NotLiveError)
        except Exception as error:  # whatever it is, the watcher tries anew
            self.trouble = redact(f"{self._source.name} cannot be read ({type(error).__name__}: {error})")
        finally:
            if capture is not None:
                capture.release()
            self._source._part(self)

    def _read(self, capture: cv2.VideoCapture) -> None:
        source = self._source
        decoder = Decoder(capture, longest=source._patience.read_timeout / 2)
        left_out, stream = 0, -1
        while source._accepts(self) and decoder.grab():
            reading = source._stamp(self, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            if reading is None:
                return
            # The first frame of a stream is always looked at.
            if source._wanted(reading.time) or reading.stream != stream:
                frame = decoder.retrieve()
                if frame is None:
                    continue
                reading = reading._replace(frame=frame)
            stream = reading.stream
            source._put(self, reading, decoder.left_out - left_out)
            left_out = decoder.left_out
