"""A window on the screen, and snapshots of what it shows."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import cv2

from stsm_rt.errors import UserError
from stsm_rt.video.source import Frame

# It says a line when its window is open, and leaves it open until its input ends.
_TRIAL = "import cv2, sys; cv2.namedWindow('stsm-rt'); cv2.waitKey(1); print(flush=True); sys.stdin.read()"
_TRIAL_SECONDS = 20.0
_KEYS = {ord("q"): "q", 27: "q", ord("r"): "r", ord(" "): " ", ord("s"): "s"}


class Window:
    """A window on the screen.

    Keys: ``q`` or escape quits, ``r`` resets, space pauses, ``s`` takes a snapshot; closing the window quits.
    """

    def __init__(self, title: str, size: tuple[int, int]) -> None:
        """Open the window.

        Args:
            title: Its title.
            size: Width and height of the pictures in pixels; the window is made smaller if they are large.
        """
        self._title = title
        scale = min(1.0, 1280 / size[0], 800 / size[1])
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        cv2.resizeWindow(title, round(size[0] * scale), round(size[1] * scale))

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        cv2.destroyAllWindows()

    def show(self, image: Frame, wait: float = 0.0) -> str | None:
        """Show a picture and look for a key.

        Args:
            image: uint8 (H, W, 3), BGR.
            wait: Seconds to wait for a key, at least a millisecond.

        Returns:
            ``"q"``, ``"r"``, ``" "``, ``"s"`` or None.
        """
        cv2.imshow(self._title, image)
        key = cv2.waitKey(max(1, round(wait * 1000)))
        if cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1:
            return "q"
        return _KEYS.get(key & 0xFF) if key >= 0 else None


@contextmanager
def trial_window() -> Iterator[str | None]:
    """Find out whether a window can be opened; open yours in the block.

    Without a display, OpenCV does not raise but aborts the process. A display that is named may still not
    answer, and some builds of OpenCV have no windows, so a process of its own tries it. It keeps its window until the
    block ends, because a bare X server starts anew when its last client leaves.

    Yields:
        Why no window can be opened, or None where one can.
    """
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        yield "there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set)"
        return
    with subprocess.Popen(
        [sys.executable, "-c", _TRIAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        timer = threading.Timer(_TRIAL_SECONDS, process.kill)
        timer.start()
        try:
            opened = process.stdout.readline()
            timer.cancel()
            yield None if opened else "the display does not answer, or this OpenCV has no windows"
        finally:
            timer.cancel()
            process.kill()


def save_snapshot(image: Frame, folder: str | os.PathLike[str] = ".") -> Path:
    """Write a picture as ``snapshot-0001.png`` or with the next number that is free.

    Args:
        image: uint8 (H, W, 3), BGR.
        folder: Where to write it.

    Returns:
        The file that was written.

    Raises:
        UserError: If the folder cannot be written to.
    """
    ok, data = cv2.imencode(".png", image)
    if not ok:
        raise UserError(f"OpenCV cannot encode a picture of shape {image.shape} as PNG")
    number = 1
    while True:
        path = Path(folder) / f"snapshot-{number:04}.png"
        try:
            with open(path, "xb") as file:
                file.write(data.tobytes())
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"the snapshot {path} cannot be written ({error.strerror})") from error
