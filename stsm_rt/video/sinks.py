"""Where results go: JSON lines, and what becomes of a sink that fails."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from stsm_rt.errors import UserError
from stsm_rt.video.result_files import FileSink, Say


class JsonLinesSink(FileSink):
    """One JSON object per line; every line that is there is whole, and is there at once.

    A target that is no regular file (a pipe, a terminal) is written to directly.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Start the file.

        Args:
            path: Target.
            options: ``live``, ``rotate`` and ``say`` of ``FileSink``.

        Raises:
            UserError: If the target cannot be written.
        """
        super().__init__(path, **options)
        self._file = self._begin()

    def __enter__(self) -> JsonLinesSink:
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            BrokenPipeError: If it is a pipe that nobody reads any more.
            UserError: If it cannot be written; the lines before are there.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if self._file.length and self._is_full(self._file.length + len(line)):
            self._file.close()
            self._file = self._begin()
        try:
            self._file.append(line)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failure(error) from error

    def _finish(self) -> None:
        self._file.close()


class Sink(Protocol):
    """What ``Guarded`` looks after; each kind of ``FileSink`` is one.

    Attributes:
        path: The target as it was given.
    """

    path: Path

    def write(self, *arguments: Any, **named: Any) -> None:
        """Write a record or a picture."""

    def close(self) -> None:
        """Complete what was written."""

    def discard(self) -> None:
        """End after an error."""


class Guarded:
    """A sink that fails on its own: one line says so, and from then on it takes nothing.

    Whatever it writes to (a disk that is full, a pipe that nobody reads), recognition goes on. Any thread may write.

    Attributes:
        sink: The sink.
        failed: Whether it has ended early.
    """

    def __init__(self, sink: Sink, say: Say) -> None:
        """Take over a sink.

        Args:
            sink: It is closed with this.
            say: Takes the line.
        """
        self.sink = sink
        self.failed = False
        self._say = say
        self._lock = threading.Lock()

    def __enter__(self) -> Guarded:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.sink.discard()

    def write(self, *arguments: Any) -> None:
        """Write to the sink what its own ``write`` takes, as long as it works."""
        self._attempt(self.sink.write, *arguments)

    def close(self) -> None:
        """Close the sink; may be called twice."""
        self._attempt(self.sink.close)

    def _attempt(self, do: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            if self.failed:
                return
            try:
                do(*arguments)
            except (UserError, OSError) as error:
                self.failed = True
                reason = "whoever read it has gone" if isinstance(error, BrokenPipeError) else str(error)
                self.sink.discard()
                self._say(f"{self.sink.path} is given up, the rest goes on: {reason}")
