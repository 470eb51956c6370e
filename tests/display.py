"""A real X display for the tests that open a window."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True)
class Display:
    """A running virtual display."""

    name: str
    memory: Path
    width: int = 800
    height: int = 600

    def screenshot(self) -> np.ndarray:
        """What the display shows, (H, W, 3) BGR: the pixels end its dump, four bytes each."""
        data = np.fromfile(self.memory, np.uint8)[-self.width * self.height * 4 :]
        return data.reshape(self.height, self.width, 4)[:, :, :3]

    def press(self, key: str) -> None:
        """Press a key in the window under the pointer."""
        if shutil.which("xdotool") is None:
            pytest.skip("xdotool is not installed, so no key can be pressed (Debian: apt-get install xdotool)")
        centre = [str(self.width // 4), str(self.height // 4)]
        command = ["xdotool", "mousemove", *centre, "click", "1", "key", key]
        subprocess.run(command, env={**os.environ, "DISPLAY": self.name}, check=True, timeout=20)


@contextmanager
def virtual_display(folder: Path) -> Iterator[Display]:
    """Start Xvfb on a free display number, with its memory in a file; skip where it is not installed."""
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed, so no window can be tried (Debian: apt-get install xvfb)")
    reader, writer = os.pipe()
    screen = f"{Display.width}x{Display.height}x24"
    server = subprocess.Popen(
        [
            "Xvfb",
            "-displayfd",
            str(writer),
            "-screen",
            "0",
            screen,
            "-fbdir",
            str(folder),
            "-nolisten",
            "tcp",
            # Without this the server starts anew when its last client leaves, which the look for a display does.
            "-noreset",
        ],
        pass_fds=[writer],
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as numbers:
            number = numbers.readline().strip()
        yield Display(f":{number}", folder / "Xvfb_screen0")
    finally:
        server.terminate()
        server.wait(10)
