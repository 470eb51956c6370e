"""From a frame to the network's input: crop and resize, the same way everywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError


class Rectangle(NamedTuple):
    """A part of a picture, in whole pixels from its top left corner."""

    x: int
    y: int
    width: int
    height: int


def crop_rectangle(size: tuple[int, int], roi: tuple[int, int, int, int] | None, aspect: tuple[int, int]) -> Rectangle:
    """Find the largest centred rectangle of a given shape in a frame or in a region of it.

    Args:
        size: Width and height of the frame in pixels.
        roi: Region of interest as x, y, width, height in pixels; None means the whole frame.
        aspect: Width and height whose ratio the rectangle has, as nearly as whole pixels allow.

    Returns:
        The rectangle, in pixels of the frame.

    Raises:
        UserError: If the region is empty or does not lie inside the frame.
    """
    x, y, width, height = (0, 0, *size) if roi is None else roi
    if width < 1 or height < 1 or x < 0 or y < 0 or x + width > size[0] or y + height > size[1]:
        raise UserError(
            f"the region of interest {x},{y},{width},{height} (x,y,w,h) does not lie inside the frame of "
            f"{size[0]}x{size[1]} pixels"
        )
    crop_width = min(width, max(1, round(height * aspect[0] / aspect[1])))
    crop_height = min(height, max(1, round(width * aspect[1] / aspect[0])))
    return Rectangle(x + (width - crop_width) // 2, y + (height - crop_height) // 2, crop_width, crop_height)


def fit(frame: npt.NDArray[Any], roi: tuple[int, int, int, int] | None, out: npt.NDArray[np.uint8]) -> None:
    """Cut the largest centred rectangle of the input's shape out of a frame and resize it into the input.

    Shrinking averages areas (``cv2.INTER_AREA``), enlarging interpolates linearly.

    Args:
        frame: uint8 (H, W, 3), BGR.
        roi: Region of interest as x, y, width, height in pixels of the frame; None means the whole frame.
        out: uint8 (input height, input width, 3), C-contiguous; written in place.

    Raises:
        UserError: If the frame has another type or shape, or the region does not lie inside it.
    """
    check_frame(frame)
    height, width = out.shape[:2]
    x, y, crop_width, crop_height = crop_rectangle((frame.shape[1], frame.shape[0]), roi, (width, height))
    crop = frame[y : y + crop_height, x : x + crop_width]
    if (crop_width, crop_height) == (width, height):
        np.copyto(out, crop)
        return
    shrinks = crop_width * crop_height > width * height
    cv2.resize(crop, (width, height), dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def check_frame(frame: object) -> None:
    """Check that an array is a colour frame as OpenCV gives it.

    Raises:
        UserError: If it is not uint8 (H, W, 3) with at least one pixel.
    """
    if not isinstance(frame, np.ndarray):
        raise UserError(f"a frame must be a numpy array, uint8 (H, W, 3) BGR, not {type(frame).__name__}")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise UserError(f"a frame must be uint8 (H, W, 3) BGR, not {frame.dtype} {frame.shape}")
