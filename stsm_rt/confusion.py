"""The confusion matrix as a picture, drawn with OpenCV."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

_CELL = 34
_NAMED = 60  # most classes whose names and counts are written
_HEAT_MAP = 1600  # pixels that the cells of more classes share
_MARGIN = 18
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK = (45, 40, 36)
_FAINT = (226, 222, 218)
_PALE, _DEEP = np.array([250.0, 246, 242]), np.array([110.0, 62, 18])


def draw_confusion(labels: Sequence[str], matrix: npt.NDArray[np.integer], title: str) -> npt.NDArray[np.uint8]:
    """Draw a confusion matrix: a row for each true label, a column for each prediction, recall at the right.

    Args:
        labels: Names of the rows and columns.
        matrix: Counts, integers (labels, labels); row is the true label, column the prediction. A cell's
            shade is its share of the row.
        title: One line above the picture.

    Returns:
        Picture (H, W, 3) uint8 BGR. With more than 60 labels it has neither names nor numbers, only shades.
    """
    count = len(labels)
    if count > _NAMED:
        return _draw_shades(matrix, title)
    names = [label.replace("_", " ") for label in labels]
    longest = max(_text_width(name, 0.45) for name in names)
    left, top = _MARGIN + 20 + longest + 10, _MARGIN + 34 + longest + 10
    side = count * _CELL
    picture = np.full((top + side + _MARGIN + 24, left + side + 86 + _MARGIN, 3), 255, np.uint8)
    _write(picture, title, (_MARGIN, _MARGIN + 14), 0.6)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for row, name in enumerate(names):
        y = top + row * _CELL
        _write(picture, name, (left - 10 - _text_width(name, 0.45), y + _CELL // 2 + 5), 0.45)
        _write_upwards(picture, name, (left + row * _CELL + _CELL // 2 + 5, top - 10))
        for column in range(count):
            _draw_cell(picture, (left + column * _CELL, y), int(matrix[row, column]), shares[row, column])
        if matrix[row].sum():
            _write(picture, f"{100 * shares[row, row]:.0f} %", (left + side + 12, y + _CELL // 2 + 5), 0.45)
        corner = (left + row * _CELL, y)
        cv2.rectangle(picture, corner, (corner[0] + _CELL - 1, y + _CELL - 1), _INK, 1)
    _write(picture, "recall", (left + side + 12, top - 10), 0.45)
    _write(picture, "columns: prediction", (left, top + side + 22), 0.45)
    _write_upwards(picture, "rows: true label", (_MARGIN + 10, top + side))
    return picture


def _draw_shades(matrix: npt.NDArray[np.integer], title: str) -> npt.NDArray[np.uint8]:
    cell = max(2, _HEAT_MAP // len(matrix))
    side, top = cell * len(matrix), _MARGIN + 34
    picture = np.full((top + side + _MARGIN + 24, _MARGIN + side + _MARGIN, 3), 255, np.uint8)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shades = _PALE + (_DEEP - _PALE) * shares[:, :, None] ** 0.7
    cells = shades.astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    picture[top : top + side, _MARGIN : _MARGIN + side] = cells
    _write(picture, title, (_MARGIN, _MARGIN + 14), 0.6)
    _write(picture, "rows: true label, columns: prediction", (_MARGIN, top + side + 22), 0.45)
    return picture


def _draw_cell(picture: npt.NDArray[np.uint8], corner: tuple[int, int], count: int, share: float) -> None:
    x, y = corner
    colour = _PALE + (_DEEP - _PALE) * share**0.7 if count else _PALE
    cv2.rectangle(picture, corner, (x + _CELL - 1, y + _CELL - 1), colour.tolist(), -1)
    cv2.rectangle(picture, corner, (x + _CELL - 1, y + _CELL - 1), _FAINT, 1)
    if count:
        text = str(count)
        ink = (255, 255, 255) if share > 0.35 else _INK
        place = (x + (_CELL - _text_width(text, 0.42)) // 2, y + _CELL // 2 + 5)
        _write(picture, text, place, 0.42, ink)


def _text_width(text: str, scale: float) -> int:
    return cv2.getTextSize(text, _FONT, scale, 1)[0][0]


def _write(
    picture: npt.NDArray[np.uint8],
    text: str,
    place: tuple[int, int],
    scale: float,
    ink: tuple[int, int, int] = _INK,
) -> None:
    cv2.putText(picture, text, place, _FONT, scale, ink, 1, cv2.LINE_AA)


def _write_upwards(picture: npt.NDArray[np.uint8], text: str, place: tuple[int, int]) -> None:
    """Write text that is read from bottom to top; its baseline is at x and it starts at y of ``place``."""
    width = _text_width(text, 0.45)
    strip = np.full((20, width + 2, 3), 255, np.uint8)
    _write(strip, text, (0, 14), 0.45)
    turned = cv2.rotate(strip, cv2.ROTATE_90_COUNTERCLOCKWISE)
    x, y = place[0] - 14, place[1] - turned.shape[0]
    picture[y : y + turned.shape[0], x : x + turned.shape[1]] = turned
