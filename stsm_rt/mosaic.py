"""What a person sees of several cameras: a grid of pictures, and what stands for one that is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from stsm_rt.result import Result
from stsm_rt.video.overlay import Overlay
from stsm_rt.video.source import Frame
from stsm_rt.video.text import Colour, Typeface

_LARGEST = (1280, 720)  # pixels, of the whole
_SMALLEST_CELL = (160, 120)
_GROUND: Colour = (30, 24, 20)
_TAG: Colour = (62, 53, 46)
_WHITE: Colour = (255, 255, 255)
_MUTED: Colour = (176, 166, 156)
_ALERT: Colour = (80, 120, 250)
_CALM = ("opening", "ended")  # states that nobody need worry about, unless there is a reason


class Mosaic:
    """A grid of cameras, each with its name, its picture and its results.

    Attributes:
        canvas: uint8 (H, W, 3), BGR: all of it, as it was drawn last.
        size: Its width and height in pixels.
    """

    def __init__(self, names: Sequence[str], rois: Sequence[tuple[int, int, int, int] | None] | None = None) -> None:
        """Lay out the grid: as many columns as rows, or one more, within 1280x720 pixels.

        Args:
            names: Of the cameras, from left to right and from top to bottom.
            rois: The region that the network sees of each, x, y, width, height in pixels of its frames, or None.
        """
        self._names = names
        self._rois = rois or [None] * len(names)
        columns = math.ceil(math.sqrt(len(names)))
        rows = math.ceil(len(names) / columns)
        width = max(_SMALLEST_CELL[0], _LARGEST[0] // columns // 2 * 2)
        # No higher than a picture of 4:3.
        height = max(_SMALLEST_CELL[1], min(_LARGEST[1] // rows, 3 * width // 4) // 2 * 2)
        self.size = (columns * width, rows * height)
        self.canvas: Frame = np.full((self.size[1], self.size[0], 3), _GROUND, np.uint8)
        self._cells = [
            self.canvas[row * height : (row + 1) * height, column * width : (column + 1) * width]
            for row in range(rows)
            for column in range(columns)
        ]
        self._overlays = [Overlay() for _ in names]
        self._fitted: list[tuple[int, int] | None] = [None] * len(names)
        self._tag = Typeface(max(11, height // 22), bold=True)

    def follow(self, index: int, result: Result) -> None:
        """Take note of a result of a camera."""
        self._overlays[index].follow(result)

    def draw(self, index: int, picture: Frame, result: Result | None, *, time: float, fps: float) -> None:
        """Draw a camera that gives pictures.

        Args:
            index: Which camera.
            picture: uint8 (H, W, 3), BGR, of any size; it stays as it is.
            result: Its newest result, or None before the first.
            time: Source time of the picture in seconds.
            fps: Frames per second to show.
        """
        cell = self._cells[index]
        scale = min(cell.shape[1] / picture.shape[1], cell.shape[0] / picture.shape[0])
        width, height = (max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0]))
        x, y = (cell.shape[1] - width) // 2, (cell.shape[0] - height) // 2
        cell[:] = _GROUND
        # OpenCV does not resize into a part of an array in place.
        inside = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        roi = self._rois[index]
        if roi is not None and self._fitted[index] != (width, height):
            x0, y0, w, h = (round(side * scale) for side in roi)
            self._overlays[index] = Overlay(roi=(x0, y0, min(w, width - x0), min(h, height - y0)))
            self._fitted[index] = (width, height)
        if result is not None:
            self._overlays[index].draw(inside, result, time=time, fps=fps)  # type: ignore[arg-type]
        cell[y : y + height, x : x + width] = inside
        self._draw_name(index)

    def draw_lost(self, index: int, state: str, reason: str = "") -> None:
        """Draw a camera that gives no pictures: nothing that it once gave is left.

        Args:
            index: Which camera.
            state: What it does, such as ``"reconnecting"``.
            reason: Why, in a sentence; may be empty.
        """
        draw_lost(self._cells[index], state, reason)
        self._draw_name(index)

    def _draw_name(self, index: int) -> None:
        cell, font = self._cells[index], self._tag
        pad = font.size // 2
        name = font.shorten(self._names[index], cell.shape[1] - 4 * pad)
        height = 2 * font.size
        cell[pad : pad + height, pad : 3 * pad + font.width(name)] = _TAG
        font.draw(cell, name, 2 * pad, font.centre(pad, height), _WHITE)
        cell[-1:] = cell[:, -1:] = _TAG  # a line between neighbours


def draw_lost(image: Frame, state: str, reason: str = "") -> None:
    """Fill a picture with what stands for a source that gives none.

    Args:
        image: uint8 (H, W, 3), BGR; nothing of it is left.
        state: What the source does, such as ``"reconnecting"``.
        reason: Why, in a sentence, up to four lines of which are shown; may be empty.
    """
    height, width = image.shape[:2]
    image[:] = _GROUND
    title, small = Typeface(max(14, min(width, height) // 9), bold=True), Typeface(max(10, min(width, height) // 20))
    inner = round(0.84 * width)
    state = title.shorten(state, inner)
    baseline = round(0.45 * height)
    colour = _MUTED if state in _CALM and not reason else _ALERT
    title.draw(image, state, (width - title.width(state)) // 2, baseline, colour)
    most = min(4, int((height - baseline) / (1.7 * small.size) - 0.5))
    for number, line in enumerate(_wrapped(reason, small, inner)[:most], 1):
        small.draw(image, line, (width - small.width(line)) // 2, baseline + round(1.7 * number * small.size), _MUTED)


def _wrapped(text: str, font: Typeface, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(font.shorten(word, width))
    return lines
