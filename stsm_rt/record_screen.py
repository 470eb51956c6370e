"""What a person sees while recording clips: the countdown, the running clip, the review."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.video.text import Colour, Typeface
from stsm_rt.video.window import Window

Frame = npt.NDArray[np.uint8]

KEEP, AGAIN, DELETE, QUIT = "k", "a", "d", "q"
_KEYS: Mapping[int, str] = MappingProxyType(
    {ord("k"): KEEP, 13: KEEP, ord("a"): AGAIN, ord("d"): DELETE, ord("q"): QUIT, 27: QUIT}
)
_WHITE: Colour = (255, 255, 255)
_MUTED: Colour = (196, 188, 180)
_ACCENT: Colour = (178, 212, 45)
_RED: Colour = (60, 60, 235)


class RecordWindow(Window):
    """A window that knows the keys of a recording: k or return keeps, a does it again, d deletes, q or escape quits."""

    def show(self, image: Frame, wait: float = 0.0) -> str | None:
        """Show a picture and look for a key.

        Args:
            image: uint8 (H, W, 3), BGR.
            wait: Seconds to wait for a key, at least a millisecond.

        Returns:
            `KEEP`, `AGAIN`, `DELETE`, `QUIT` or None; closing the window quits.
        """
        cv2.imshow(self._title, image)
        key = cv2.waitKey(max(1, round(wait * 1000)))
        if cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1:
            return QUIT
        return _KEYS.get(key & 0xFF) if key >= 0 else None


def countdown_screen(image: Frame, title: str, seconds: int) -> Frame:
    """The camera's picture, dimmed, with what comes and the seconds until then; a new picture of the same size."""
    screen = _dimmed(image, 0.55)
    side = min(screen.shape[:2])
    _title(screen, title, "get ready")
    number = Typeface(max(24, round(0.45 * side)), bold=True)
    _shadowed(
        screen, number, str(seconds), (screen.shape[1] - number.width(str(seconds))) // 2, _middle(screen, number)
    )
    return screen


def recording_screen(image: Frame, title: str, share: float) -> Frame:
    """The camera's picture in a red frame, with a bar of how much of the clip is recorded (0 to 1); a new picture."""
    screen = image.copy()
    height, width = screen.shape[:2]
    _title(screen, title, "recording")
    bar = max(4, height // 60)
    cv2.rectangle(screen, (0, 0), (width - 1, height - 1), _RED, max(2, bar // 2))
    cv2.rectangle(screen, (0, height - bar), (round(width * share), height), _RED, -1)
    return screen


def review_screen(image: Frame, title: str, share: float) -> Frame:
    """A picture of the recorded clip with the keys below and a bar of how much of it is played; a new picture."""
    screen = image.copy()
    height, width = screen.shape[:2]
    text = _text(screen)
    band = screen[height - 2 * text.size :]
    band[:] = _dimmed(band, 0.25)
    _title(screen, title, "review")
    keys = "k keep   a again   d delete   q quit"
    small = text if text.width(keys) <= width - text.size else Typeface(max(9, round(0.7 * text.size)))
    small.draw(
        screen, keys, (width - small.width(keys)) // 2, small.centre(height - 2 * text.size, 2 * text.size), _WHITE
    )
    bar = max(2, height // 120)
    cv2.rectangle(screen, (0, height - bar), (round(width * share), height), _ACCENT, -1)
    return screen


def _dimmed(picture: Frame, share: float) -> Frame:
    return np.asarray(cv2.convertScaleAbs(picture, alpha=share), np.uint8)


def _text(screen: Frame) -> Typeface:
    return Typeface(max(11, round(8 + 0.03 * min(screen.shape[:2]))))


def _title(screen: Frame, title: str, state: str) -> None:
    text = _text(screen)
    band = screen[: 2 * text.size]
    band[:] = _dimmed(band, 0.25)
    baseline = text.centre(0, 2 * text.size)
    right = screen.shape[1] - text.size - text.width(state)
    text.draw(screen, state, right, baseline, _RED if state == "recording" else _MUTED)
    text.draw(screen, text.shorten(title, right - 2 * text.size), text.size, baseline, _WHITE)


def _middle(screen: Frame, font: Typeface) -> int:
    return font.centre(0, screen.shape[0])


def _shadowed(screen: Frame, font: Typeface, text: str, x: int, baseline: int) -> None:
    offset = max(1, font.size // 40)
    font.draw(screen, text, x + offset, baseline + offset, (0, 0, 0))
    font.draw(screen, text, x, baseline, _ACCENT)
