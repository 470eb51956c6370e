"""Records on their way to somebody else: a bounded queue, retries, and a file for what did not get there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Protocol

from stsm_rt.errors import UserError, redact

CAPACITY = 1000  # records that wait
PATIENCE = 600.0  # seconds after which a record is given up
DEAD_LETTERS = Path("stsm-rt-undelivered.jsonl")

_FIRST_DELAY = 1.0  # seconds before the second attempt; doubled each time
_LONGEST_DELAY = 60.0
_IDLE = 1.0  # seconds between two looks at an idle connection
_CLOSING = 0.8  # seconds that are left for what waits when the run ends


class Unreachable(Exception):
    """A failure that may pass: the same record is tried again.

    Attributes:
        after: Seconds that the other side asked to wait, or None.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(redact(reason))
        self.after = after


class Refused(Exception):
    """A failure that the same record would meet again."""

    def __init__(self, reason: str) -> None:
        super().__init__(redact(reason))


class Transport(Protocol):
    """How one record gets to the other side; used by one thread.

    Attributes:
        name: The other side, without secrets.
    """

    name: str

    def open(self) -> None:
        """Connect, where a connection is kept.

        Raises:
            Unreachable: If it cannot be made now.
        """

    def send(self, body: bytes, key: str) -> None:
        """Deliver a record and wait until the other side has it.

        Args:
            body: JSON, UTF-8.
            key: The same each time that this record is tried, and different from every other record's.

        Raises:
            Unreachable: If another attempt may succeed.
            Refused: If none will.
        """

    def idle(self) -> None:
        """Keep a connection alive; called about once a second while nothing is sent."""

    def close(self) -> None:
        """Give the connection back."""


@dataclass
class _Letter:
    record: Mapping[str, Any]
    body: bytes
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    put: float = field(default_factory=monotonic)
    reason: str = "the run ended first"


class Delivery:
    """Delivers records in order, in a thread of its own; whoever puts them in never waits.

    A record is tried until the other side has it: at most ten minutes, with pauses that double from 1 s to 60 s (each
    shortened by up to a half, at random, so that many senders do not come at once) or are as long as the other side
    asks for. What cannot be delivered goes to the dead-letter file: a record that was refused, one that took too long,
    the oldest when more than 1000 wait, and all that is left when the run ends. A record may arrive twice where only
    the answer was lost.

    Attributes:
        name: The other side, without secrets.
        delivered: Records that the other side has.
        undelivered: Records that went to the dead-letter file.
        lost: Records that are nowhere, because that file could not be written.
        dead_letters: The file.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        dead_letters: str | os.PathLike[str] = DEAD_LETTERS,
        say: Callable[[str], None] = lambda line: None,
        capacity: int = CAPACITY,
        patience: float = PATIENCE,
    ) -> None:
        """Start the thread.

        Args:
            transport: The way to the other side.
            dead_letters: JSON lines file to which undelivered records are appended; made when there is one.
            say: Takes one line when the other side stops taking records, and when it takes them again. It is called
                from the thread.
            capacity: How many records may wait.
            patience: Seconds after which a record is given up.

        Raises:
            UserError: If the dead-letter file's folder cannot be written to.
        """
        self.name = transport.name
        self.delivered = self.undelivered = self.lost = 0
        self.dead_letters = Path(dead_letters)
        if not os.access(self.dead_letters.absolute().parent, os.W_OK):
            raise UserError(
                f"undelivered events go to {self.dead_letters}, whose folder cannot be written to; run in another one"
            )
        self._transport = transport
        self._say = say
        self._capacity = capacity
        self._patience = patience
        self._changed = threading.Condition()
        self._waiting: deque[_Letter] = deque()
        self._dead: deque[_Letter] = deque()  # not in the file yet
        self._sending: _Letter | None = None
        self._delay = _FIRST_DELAY
        self._reason = "the run ended first"  # why the other side takes nothing, where that is known
        self._closing = self._abandoned = False
        self._failing = self._dead_failing = False
        self._thread = threading.Thread(target=self._run, name=f"stsm-rt to {self.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Delivery:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def put(self, record: Mapping[str, Any]) -> None:
        """Put a record in the queue, at once.

        Args:
            record: JSON-ready, for example ``Event.to_record()``.
        """
        record = dict(record)
        letter = _Letter(record, json.dumps(record, ensure_ascii=False, allow_nan=False).encode())
        with self._changed:
            if self._abandoned:
                self._give_up(letter, letter.reason)
            else:
                self._waiting.append(letter)
            if len(self._waiting) > self._capacity:
                self._give_up(self._waiting.popleft(), f"more than {self._capacity} events waited")
            self._changed.notify()
        if self._abandoned:
            self._write_dead()

    def close(self) -> None:
        """Deliver what waits, for 0.8 s at most, and put the rest into the dead-letter file; may be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSING)
        with self._changed:
            self._abandoned = True
            if self._sending is not None:
                self._give_up(self._sending, self._sending.reason)
            self._sending = None
            self._give_up_waiting(self._reason)
        self._write_dead()

    def _give_up(self, letter: _Letter, reason: str) -> None:
        letter.reason = reason
        self._dead.append(letter)
        if len(self._dead) > self._capacity:
            self._dead.popleft()
            self.lost += 1

    def _run(self) -> None:
        try:
            self._transport.open()
        except Exception as error:  # the same will happen to the first record, which knows what to do
            self._fail(f"cannot be reached ({redact(str(error))}); events are kept and tried again")
        while (letter := self._next()) is not None:
            while self._attempt(letter):
                pass
            self._write_dead()
        self._transport.close()

    def _next(self) -> _Letter | None:
        """Wait for a record; None when the run ends and nothing waits."""
        while True:
            with self._changed:
                if not self._waiting and not self._closing:
                    self._changed.wait(_IDLE)
                if self._waiting and not self._abandoned:
                    self._sending = self._waiting.popleft()
                    return self._sending
                if self._closing:
                    return None
            self._transport.idle()

    def _attempt(self, letter: _Letter) -> bool:
        """Try to deliver a record, and return whether to try it again."""
        try:
            self._transport.send(letter.body, letter.key)
        except Unreachable as error:
            self._fail(f"does not take events ({error}); they are kept and tried again")
            return self._pause(letter, error)
        except Exception as error:  # whatever it is, the next record goes its way
            reason = str(error) if isinstance(error, Refused) else redact(f"{type(error).__name__}: {error}")
            with self._changed:
                if self._sending is letter:
                    self._give_up(letter, reason)
                    self._sending = None
            self._fail(f"refuses events ({reason}); they go to {self.dead_letters}")
            return False
        with self._changed:
            if self._sending is letter:
                self.delivered += 1
                self._sending = None
        self._delay = _FIRST_DELAY
        self._reason = "the run ended first"
        if self._failing:
            self._failing = False
            self._tell(f"{self.name} takes events again")
        return False

    def _pause(self, letter: _Letter, error: Unreachable) -> bool:
        """Wait before the next attempt; return False where the record is given up instead."""
        pause = self._delay * random.uniform(0.5, 1.0)
        self._delay = min(2 * self._delay, _LONGEST_DELAY)
        if error.after is not None:
            pause = min(error.after, self._patience)
        letter.reason = self._reason = str(error)
        end = monotonic() + pause
        while True:
            with self._changed:
                if self._sending is not letter:
                    return False
                now = monotonic()
                if self._closing or now - letter.put > self._patience:
                    self._give_up(letter, letter.reason)
                    self._sending = None
                    if self._closing:  # the others would fare no better
                        self._give_up_waiting(self._reason)
                    return False
                while self._waiting and now - self._waiting[0].put > self._patience:
                    self._give_up(self._waiting.popleft(), letter.reason)
                if now >= end:
                    return True
                if not self._dead:
                    self._changed.wait(min(end - now, _IDLE))
            self._write_dead()

    def _give_up_waiting(self, reason: str) -> None:
        while self._waiting:
            self._give_up(self._waiting.popleft(), reason)

    def _fail(self, what: str) -> None:
        if not self._failing:
            self._failing = True
            self._tell(f"{self.name} {what}")

    def _tell(self, line: str) -> None:
        # Whoever heard it may have gone; the records go their way.
        with contextlib.suppress(OSError):
            self._say(line)

    def _write_dead(self) -> None:
        with self._changed:
            letters, self._dead = self._dead, deque()
        if not letters:
            return
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        lines = [
            {"kind": "undelivered", "to": self.name, "at": time, "reason": letter.reason, "record": letter.record}
            for letter in letters
        ]
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        try:
            with open(self.dead_letters, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(data) < len(data):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.lost += len(letters)
            if not self._dead_failing:
                self._dead_failing = True
                self._tell(f"{self.dead_letters} cannot be written ({error.strerror}), so undelivered events are lost")
        else:
            self.undelivered += len(letters)
