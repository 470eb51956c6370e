"""The crop and the resize before the network."""

from __future__ import annotations

from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stsm_rt.errors import UserError
from stsm_rt.video.fit import crop_rectangle, fit

sides = st.integers(1, 3000)


@given(st.tuples(sides, sides), st.tuples(st.integers(1, 512), st.integers(1, 512)), st.data())
def test_the_crop_is_the_largest_centred_rectangle_of_its_shape(
    size: tuple[int, int], aspect: tuple[int, int], data: st.DataObject
) -> None:
    roi = None
    x, y, width, height = 0, 0, *size
    if data.draw(st.booleans()):
        x, y = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
        width, height = data.draw(st.integers(1, size[0] - x)), data.draw(st.integers(1, size[1] - y))
        roi = (x, y, width, height)
    crop = crop_rectangle(size, roi, aspect)
    left, top = crop.x - x, crop.y - y
    right, bottom = width - crop.width - left, height - crop.height - top
    assert min(left, top, right, bottom) >= 0
    assert right - left in (0, 1) and bottom - top in (0, 1)
    assert crop.width == width or crop.height == height
    # Nearest whole pixels, and never less than one.
    ratio = Fraction(*aspect)
    nearest = abs(crop.width - crop.height * ratio) <= 0.5 or abs(crop.height - crop.width / ratio) <= 0.5
    assert nearest or 1 in (crop.width, crop.height)


def test_crops_that_can_be_checked_by_hand() -> None:
    assert crop_rectangle((1920, 1080), None, (4, 3)) == (240, 0, 1440, 1080)
    assert crop_rectangle((480, 640), None, (4, 3)) == (0, 140, 480, 360)
    assert crop_rectangle((214, 160), (10, 20, 100, 50), (1, 1)) == (35, 20, 50, 50)


@pytest.mark.parametrize("size", [(127, 96), (640, 95), (100, 400), (40, 30), (7, 5), (1, 1)])
def test_fit_resizes_the_crop_into_the_given_memory(size: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    batch = np.zeros((3, 48, 64, 3), np.uint8)
    fit(frame, None, batch[1])
    x, y, width, height = crop_rectangle(size, None, (64, 48))
    method = cv2.INTER_AREA if width > 64 else cv2.INTER_LINEAR
    expected = cv2.resize(frame[y : y + height, x : x + width], (64, 48), interpolation=method)
    assert (batch[1] == expected).all()
    assert not batch[0].any() and not batch[2].any()


def test_a_frame_of_the_right_size_is_copied_exactly() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    out = np.zeros_like(frame)
    fit(frame, None, out)
    assert (out == frame).all()
    fit(np.pad(frame, ((5, 7), (3, 2), (0, 0))), (3, 5, 64, 48), out)
    assert (out == frame).all()


def test_shrinking_averages_areas() -> None:
    stripes = np.zeros((480, 640, 3), np.uint8)
    stripes[:, ::2] = 200
    out = np.zeros((48, 64, 3), np.uint8)
    fit(stripes, None, out)
    assert (out == 100).all()


@pytest.mark.parametrize("size", [(128, 96), (640, 480), (641, 479), (1283, 1001), (2000, 1500), (150, 3000)])
def test_a_large_picture_is_averaged_by_halves(size: tuple[int, int]) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    frame = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    out = np.zeros((48, 64, 3), np.uint8)
    fit(frame, None, out)
    x, y, width, height = crop_rectangle(size, None, (64, 48))
    crop = frame[y : y + height, x : x + width]
    expected = cv2.resize(crop, (64, 48), interpolation=cv2.INTER_AREA).astype(int)
    assert abs(out - expected).mean() < 2
    # A pixel and its mirror image see the same: nothing is shifted to one side.
    mirrored = np.zeros_like(out)
    fit(np.ascontiguousarray(frame[::-1, ::-1]), None, mirrored)
    assert abs(mirrored[::-1, ::-1].astype(int) - out).mean() < 1.5


def test_a_view_that_is_not_contiguous_is_fine() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8)
    expected, out = np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)
    fit(np.ascontiguousarray(frame[:, ::-1]), None, expected)
    fit(frame[:, ::-1], None, out)
    assert (out == expected).all()


@pytest.mark.parametrize(
    "roi", [(-1, 0, 10, 10), (0, 0, 65, 10), (60, 0, 5, 5), (0, 0, 0, 5), (0, 0, 5, -5), (99, 99, 1, 1)]
)
def test_a_region_that_is_not_inside_the_frame_is_refused(roi: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match="does not lie inside the frame of 64x48 pixels"):
        crop_rectangle((64, 48), roi, (4, 3))
