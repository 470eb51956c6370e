"""Live visitors: a slot of a shared engine for each, and a line for those who wait for one."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from stsm_rt.app.engines import EngineChoice
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.video.source import Frame

_TOPK = 5
_PATIENCE = 5  # steps that fail in a row before a visit ends
_LONGEST_LINE = 100
_TICKET_SECONDS = 60.0
_MOST_TICKETS = 1000


@dataclass(frozen=True)
class Status:
    """What is going on.

    Attributes:
        engines: Titles of the engines that are open.
        slots: Slots in use, of all engines.
        inside: Visitors who have a place.
        waiting: Visitors who wait for one.
    """

    engines: tuple[str, ...]
    slots: int
    inside: int
    waiting: int


class Visitors:
    """Lets visitors in: at most so many at a time, whichever engine they choose, in the order in which they came.

    Each engine is opened once, when the first visitor needs it, with a slot for everybody who may be inside. A slot is
    a stream with a state of its own, so visitors share the engine and nothing else. Any thread may call.

    Attributes:
        idle: Seconds without a frame after which a visit should be ended.
        default: Title of the engine of those who choose none.
    """

    def __init__(self, choices: Sequence[EngineChoice], *, most: int, idle: float, threads: int | None = None) -> None:
        """Open nothing yet.

        Args:
            choices: The engines to choose from, the default one first.
            most: Visitors who may be inside at the same time.
            idle: Seconds without a frame after which a visit should be ended.
            threads: Threads that a step may use; None means one for each physical core.
        """
        self.idle = idle
        self.default = choices[0].title
        self._most = most
        self._lock = threading.Lock()
        self._inside: set[Visit] = set()
        self._line: deque[Visit] = deque()
        self._tickets: dict[str, float] = {}
        self._engines = {choice.title: _SharedEngine(choice, most, threads) for choice in choices}

    def ticket(self) -> str:
        """Hand out a ticket that ``redeem`` takes once, within a minute.

        Raises:
            UserError: If too many have been handed out.
        """
        ticket = secrets.token_urlsafe(24)
        now = monotonic()
        with self._lock:
            if len(self._tickets) >= _MOST_TICKETS:
                self._tickets = {other: end for other, end in self._tickets.items() if end > now}
            if len(self._tickets) >= _MOST_TICKETS:
                raise UserError("too many visitors come at once; please try again in a minute")
            self._tickets[ticket] = now + _TICKET_SECONDS
        return ticket

    def redeem(self, ticket: str) -> bool:
        """Take a ticket back, and say whether it was good."""
        with self._lock:
            return self._tickets.pop(ticket, 0.0) > monotonic()

    def enter(
        self,
        title: str | None = None,
        *,
        threshold: float | None = None,
        smoothing: int | None = None,
        moved: Callable[[], object] = lambda: None,
    ) -> Visit:
        """Let a visitor in, or put them at the end of the line.

        Args:
            title: Of the engine; None means the default one.
            threshold: Score, 0 to 1, at which an event may start; None means the engine's.
            smoothing: Steps over which scores are averaged; None means the engine's.
            moved: Called, in any thread, when somebody else has left: the place in the line may be another.

        Returns:
            The visit. Its caller ends it with ``leave``, whatever happens.

        Raises:
            UserError: If there is no such engine or the line is too long.
        """
        engine = self._engines.get(self.default if title is None else title)
        if engine is None:
            raise UserError(f"there is no engine {title!r} here; reload the page and choose one of the list")
        visit = Visit(self, engine, threshold, smoothing, moved)
        with self._lock:
            if len(self._line) >= _LONGEST_LINE:
                raise UserError(f"{len(self._line)} visitors are waiting already; please come back later")
            self._line.append(visit)
            self._admit()
        return visit

    @property
    def status(self) -> Status:
        """What is going on now."""
        with self._lock:
            return Status(
                engines=tuple(title for title, engine in self._engines.items() if engine.is_open),
                slots=sum(engine.slots_in_use for engine in self._engines.values()),
                inside=len(self._inside),
                waiting=len(self._line),
            )

    def _place_of(self, visit: Visit) -> int:
        with self._lock:
            return self._line.index(visit) + 1 if visit in self._line else 0

    def _remove(self, visit: Visit) -> None:
        with self._lock:
            waiting = [other for other in self._line if other is not visit]
            if visit in self._line:
                self._line.remove(visit)
            self._inside.discard(visit)
            self._admit()
        for other in waiting:
            other.moved()

    def _admit(self) -> None:
        while self._line and len(self._inside) < self._most:
            self._inside.add(self._line.popleft())


class Visit:
    """A visitor's time with a slot of their own, or in the line before it.

    One thread at a time calls ``open`` and ``update``; any thread may call the rest.

    Attributes:
        threshold: Score, 0 to 1, at which an event may start.
        aspect: Width of the network's input divided by its height.
        moved: Called when somebody else has left.
    """

    def __init__(
        self,
        visitors: Visitors,
        engine: _SharedEngine,
        threshold: float | None,
        smoothing: int | None,
        moved: Callable[[], object],
    ) -> None:
        """Belongs to ``Visitors.enter``."""
        self.threshold = engine.threshold if threshold is None else threshold
        self.aspect = engine.aspect
        self.moved = moved
        self._visitors = visitors
        self._engine = engine
        self._smoothing = smoothing
        self._slot: int | None = None
        self._recognizer: Recognizer | None = None
        self._lock = threading.Lock()
        self._busy = False
        self._left = threading.Event()

    @property
    def waiting(self) -> int:
        """Place in the line: 1 for who comes next, 0 for who is inside."""
        return self._visitors._place_of(self)

    def open(self) -> None:
        """Take a slot, with its state at zero; it takes seconds where the engine has to be opened first.

        Raises:
            UserError: If the engine does not open, all its slots are in use, or the threshold or the smoothing is out
                of its range.
        """
        with self._at_work():
            engine, self._slot = self._engine.take()
            self._recognizer = Recognizer(
                engine,
                slot=self._slot,
                topk=_TOPK,
                threshold=self.threshold,
                smoothing=self._smoothing,
                patience=_PATIENCE,
            )

    def wants(self, time: float) -> bool:
        """Whether the network would see a frame at this source time in seconds."""
        assert self._recognizer is not None
        return self._recognizer.wants(time)

    def update(self, frame: Frame | None, time: float, *, arrived: float, dropped: int = 0) -> Result | None:
        """Take the visitor's next frame.

        Args:
            frame: uint8 (H, W, 3), BGR; None where ``wants`` says that it is not looked at.
            time: Source time in seconds.
            arrived: When the frame was there, by the clock of ``time.perf_counter``.
            dropped: Frames dropped so far.

        Returns:
            The result of a network step, or None where the frame was skipped or the step failed.

        Raises:
            UserError: As ``Recognizer.update`` does.
        """
        with self._at_work():
            assert self._recognizer is not None
            prepared = self._recognizer.prepare(frame, time, self._recognizer.input, arrived=arrived, dropped=dropped)
            return None if prepared is None else self._recognizer.conclude(prepared)

    def leave(self) -> None:
        """Give the place back at once; while a step is made, at its end. A second call does nothing."""
        with self._lock:
            ready = not self._left.is_set() and not self._busy
            self._left.set()
        if ready:
            self._give_back()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Keep the slot from the next visitor while it is used here."""
        with self._lock:
            if self._left.is_set():
                raise RuntimeError("the visit has ended")
            self._busy = True
        try:
            yield
        finally:
            with self._lock:
                self._busy = False
                left = self._left.is_set()
            if left:
                self._give_back()

    def _give_back(self) -> None:
        if self._slot is not None:
            self._engine.give_back(self._slot)
        self._visitors._remove(self)


class _SharedEngine:
    """An engine that is opened when it is first needed, and its free slots."""

    def __init__(self, choice: EngineChoice, most: int, threads: int | None) -> None:
        self.threshold = choice.manifest.decision.threshold
        self.aspect = choice.manifest.input_width / choice.manifest.input_height
        self._choice = choice
        self._threads = threads
        # A graph with rows has no more slots than these.
        batch = choice.manifest.batch
        self._slots = most if batch == 1 else min(most, batch)
        self._free = list(range(self._slots))
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        return self._engine is not None

    @property
    def slots_in_use(self) -> int:
        return self._slots - len(self._free)

    def take(self) -> tuple[Engine, int]:
        with self._lock:
            if self._engine is None:
                self._engine = Engine.open(self._choice.path, slots=self._slots, threads=self._threads)
            if not self._free:
                raise UserError(
                    f"{self._choice.title} serves {self._slots} at a time and they are all busy; choose another engine"
                )
            return self._engine, self._free.pop(0)

    def give_back(self, slot: int) -> None:
        with self._lock:
            self._free.append(slot)
