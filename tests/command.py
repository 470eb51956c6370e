"""The command ``stsm-rt webcam`` as a process, and what it says and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from display import Display

ROOT = Path(__file__).resolve().parents[1]
SIZE = (320, 240)


def environment(**variables: str) -> dict[str, str]:
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PYTHONPATH": str(ROOT), **variables}


@contextmanager
def running(folder: Path, *arguments: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process that does not outlive the block."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "demo" / "webcam.py"), *map(str, arguments)],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def webcam(folder: Path, *arguments: object, **variables: str) -> tuple[int, str, str]:
    with running(folder, *arguments, **variables) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Lines:
    """The lines of a process, read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.seen: list[str] = []
        self._next = 0
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen.append(line)

    def has(self, word: str, seconds: float) -> bool:
        end = monotonic() + seconds
        while monotonic() < end:
            for index in range(self._next, len(self.seen)):
                if word in self.seen[index]:
                    self._next = index + 1
                    return True
            sleep(0.02)
        return False

    def wait_for(self, word: str) -> None:
        assert self.has(word, 15), self.seen


def press_until(display: Display, key: str, lines: Lines, word: str) -> None:
    """Press a key; again if the window did not have the keyboard yet."""
    for _ in range(5):
        display.press(key)
        if lines.has(word, 2):
            return
    raise AssertionError(lines.seen)
