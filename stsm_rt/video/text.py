"""Antialiased text on pictures, sized in pixels."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]


class Typeface:
    """Text of one size: OpenCV 5 draws these fonts with outlines, OpenCV 4 with strokes.

    Attributes:
        size: Height of the font in pixels; a capital is seven tenths of it.
    """

    def __init__(self, size: int, *, bold: bool = False) -> None:
        """Choose the font.

        Args:
            size: Height of the font in pixels.
            bold: Whether to draw heavier letters.
        """
        self.size = size
        self._face = cv2.FONT_HERSHEY_DUPLEX if bold else cv2.FONT_HERSHEY_SIMPLEX
        # A capital of these fonts is 21 units high at a scale of 1.
        self._scale = size * 0.7 / 21
        self._thickness = max(1, round(size * (0.08 if bold else 0.06)))

    def width(self, text: str) -> int:
        """Return the width of a text in pixels."""
        return int(cv2.getTextSize(text, self._face, self._scale, self._thickness)[0][0])

    def shorten(self, text: str, width: int) -> str:
        """Return the text, cut and ended with two dots where it is wider than ``width`` pixels."""
        if self.width(text) <= width:
            return text
        while text and self.width(text + "..") > width:
            text = text[:-1].rstrip()
        return text + ".."

    def draw(self, image: npt.NDArray[np.uint8], text: str, x: int, baseline: int, colour: Colour) -> None:
        """Draw a text in place.

        Args:
            image: uint8 (H, W, 3), BGR.
            text: What to draw.
            x: Left edge in pixels.
            baseline: Row on which the letters stand.
            colour: BGR.
        """
        place = (x, baseline)
        cv2.putText(image, text, place, self._face, self._scale, colour, self._thickness, cv2.LINE_AA)

    def centre(self, top: int, height: int) -> int:
        """Return the baseline at which capitals stand in the middle of a band, in pixels."""
        return top + round((height + self.size * 0.7) / 2)
