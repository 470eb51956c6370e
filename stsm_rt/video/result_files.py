"""Files that keep what they have: how they begin, grow, go on in the next one, and end."""

from __future__ import annotations

import abc
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import BinaryIO

from stsm_rt.errors import UserError

Say = Callable[[str], None]

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_MOST = 1e18  # bytes or seconds
_SIZES = ("kb", "mb", "gb")


@dataclass(frozen=True)
class Rotation:
    """When a recording goes on in a new file.

    Attributes:
        size: Bytes that no file exceeds, unless a single piece does; None: any size.
        seconds: Time after which the next piece goes into a new file; None: never.
    """

    size: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rotation:
        """Read what a person typed, such as ``100MB`` or ``1h``.

        Args:
            text: A number with KB, MB, GB (powers of 1000), s, min or m, h or d; small letters will do.

        Raises:
            UserError: If it is nothing of that kind, less than a byte or a second, or 10 to the power of 18 or more.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
        amount = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
        if not found or not 1 <= amount < _MOST:
            raise UserError(f"--rotate takes a size such as 100MB or a time such as 1h, not {text!r}")
        return cls(size=int(amount)) if found[2] in _SIZES else cls(seconds=amount)


class GrowingFile:
    """A file that grows by whole pieces, which are there when the process is killed.

    Attributes:
        path: Where it lies.
        length: Bytes of all pieces.
    """

    def __init__(self, path: Path) -> None:
        """Begin the file.

        Args:
            path: Target; what is there is overwritten, and a pipe or a terminal is written to.

        Raises:
            OSError: If it cannot be opened.
        """
        self.path = path
        self.length = 0
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close

    def append(self, *parts: bytes | memoryview) -> None:
        """Append all parts of a piece or, where that fails, nothing.

        Raises:
            OSError: If the file cannot be written.
        """
        try:
            for part in parts:
                view = memoryview(part)
                while view:  # a disk that gets full takes a part before it says so
                    view = view[self._file.write(view) :]
        except OSError:
            with suppress(OSError):  # a pipe cannot take back
                self._file.truncate(self.length)
                self._file.seek(self.length)
            raise
        self.length += sum(map(len, parts))

    def overwrite(self, position: int, data: bytes) -> None:
        """Replace bytes that were written before."""
        self._file.seek(position)
        self._file.write(data)
        self._file.seek(self.length)

    def close(self) -> None:
        """Close it; may be called twice."""
        self._file.close()


class FileSink(abc.ABC):
    """A file of results.

    Of a recorded source it is there when it is complete, or not at all: it grows as ``NAME.partial-PID.EXT`` beside its
    target, which it replaces when it is closed. An error removes it, for the source can be played again; a kill leaves
    it behind, and the next run that writes to the same target says so.

    Of a live source nothing comes again, so it grows under its own name, is of use at any moment, and stays whatever
    ends the run. A file that was there before gets the time of its last write (UTC) into its name,
    ``NAME-20261123-073355.EXT``, and so does each file of a rotation when the next one begins: no file is ever lost.

    As a context manager it is closed, or discarded where an error ends the block.

    Attributes:
        path: The target as it was given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        live: bool = False,
        rotate: Rotation | None = None,
        say: Say = lambda line: None,
    ) -> None:
        self.path = Path(path)
        self._say = say
        self._rotate = rotate or Rotation()
        self._target = self.path.resolve()
        self._direct = self.path.exists() and not self.path.is_file() and not self.path.is_dir()
        self._live = live and not self._direct
        if rotate is not None and not self._live:
            raise UserError(f"--rotate is for files that record a camera or a live stream, which {self.path} does not")
        folder = self._target.parent
        if not self._direct:
            if not folder.is_dir():
                raise UserError(f"{self.path} cannot be written: there is no folder {folder}; make it first")
            if self._target.is_dir():
                raise UserError(f"{self.path} is a folder; give the name of a file")
            if not os.access(folder, os.W_OK):
                raise UserError(f"{self.path} cannot be written: the folder {folder} is read-only; give another one")
            for rest in sorted(folder.glob(f"{_escaped(self._target.stem)}.partial-*{_escaped(self._target.suffix)}")):
                say(f"{rest} is from a run that was killed or still goes on; it holds what that run had written")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def close(self) -> None:
        """Complete the file and give it its name; may be called twice.

        Raises:
            UserError: If it cannot be completed.
        """
        try:
            self._finish()
            if not self._live and not self._direct and self._place.exists():
                os.replace(self._place, self._target)
        except (OSError, UserError) as error:
            self.discard()
            raise error if isinstance(error, UserError) else self._failure(error) from error

    def discard(self) -> None:
        """End the file after an error: remove it, or keep what a live source gave."""
        with suppress(OSError, UserError):
            self._finish()
        if not self._live and not self._direct:
            self._place.unlink(missing_ok=True)

    @property
    def _place(self) -> Path:
        """Where the file is written."""
        if self._direct:
            return self.path
        if self._live:
            return self._target
        return self._target.with_name(f"{self._target.stem}.partial-{os.getpid()}{self._target.suffix}")

    def _begin(self) -> GrowingFile:
        """Open the file, or the next one of a rotation."""
        try:
            if self._live and self._target.exists() and self._target.stat().st_size:
                aside = set_aside(self._target)
                self._say(f"{self.path} goes on in a new file, what it held is in {aside.name}")
            self._opened = monotonic()
            return GrowingFile(self._place)
        except OSError as error:
            raise self._failure(error) from error

    def _is_full(self, length: int) -> bool:
        """Whether a piece that would make the file so long belongs into the next one."""
        size, seconds = self._rotate.size, self._rotate.seconds
        return (size is not None and length > size) or (seconds is not None and monotonic() - self._opened >= seconds)

    def _failure(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written ({error.strerror or error})")

    @abc.abstractmethod
    def _finish(self) -> None:
        """Close what is open; may be called twice."""


def set_aside(path: Path) -> Path:
    """Put the time of a file's last write (UTC) into its name, as in ``events-20261123-073355.jsonl``.

    Args:
        path: An existing file.

    Returns:
        Its new name; with a number behind the time where that is taken.

    Raises:
        OSError: If it cannot be renamed.
    """
    time = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        aside = path.with_name(f"{path.stem}-{time}{f'-{number}' if number > 1 else ''}{path.suffix}")
        try:
            open(aside, "xb").close()  # the name is ours, whoever else looks for one
        except FileExistsError:
            number += 1
            continue
        os.replace(path, aside)
        return aside


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
