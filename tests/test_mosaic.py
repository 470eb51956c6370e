"""The mosaic: every camera in its place, and a lost one never as a frozen picture."""

from __future__ import annotations

import numpy as np
import pytest
from clips import plain

from stsm_rt.mosaic import Mosaic, draw_lost
from stsm_rt.result import Result

RESULT = Result(1.0, 10, ("walk", "run"), (0.7, 0.2), 0.01, 0, False, (), "walk")


def cell(mosaic: Mosaic, index: int, columns: int, rows: int) -> np.ndarray:
    height, width = mosaic.size[1] // rows, mosaic.size[0] // columns
    row, column = divmod(index, columns)
    return mosaic.canvas[row * height : (row + 1) * height, column * width : (column + 1) * width]


@pytest.mark.parametrize(
    ("count", "columns", "rows", "size"),
    [(1, 1, 1, (1280, 720)), (2, 2, 1, (1280, 480)), (4, 2, 2, (1280, 720)), (8, 3, 3, (1278, 720))],
)
def test_cameras_lie_in_a_grid(count: int, columns: int, rows: int, size: tuple[int, int]) -> None:
    mosaic = Mosaic([f"camera {i}" for i in range(count)])
    assert mosaic.size == size and mosaic.canvas.shape == (size[1], size[0], 3)
    for index in range(count):
        frame = np.full((480, 640, 3), 40 + 20 * index, np.uint8)
        mosaic.draw(index, frame, RESULT, time=1.0, fps=15)
        assert (frame == 40 + 20 * index).all()
    for index in range(count):
        part = cell(mosaic, index, columns, rows)
        assert (part[part.shape[0] // 3, part.shape[1] // 2] == 40 + 20 * index).all()


def test_a_picture_keeps_its_shape_and_the_region_is_marked_where_it_is() -> None:
    mosaic, bare = Mosaic(["a"], [(100, 200, 100, 150)]), Mosaic(["a"])
    upright = plain("green", 1, (300, 600))[0]
    for drawn in (mosaic, bare):
        drawn.draw(0, upright, RESULT, time=1.0, fps=15)
    green = (bare.canvas[500, :, 1] > 200) & (bare.canvas[500, :, 0] < 60)
    assert green.sum() == pytest.approx(360, abs=130) and not green[:440].any() and not green[-440:].any()
    rows, columns = np.nonzero((mosaic.canvas != bare.canvas).any(axis=2))
    scale, left = 720 / 600, 640 - 180
    assert columns.min() == pytest.approx(left + 100 * scale, abs=6)
    assert columns.max() == pytest.approx(left + 200 * scale, abs=6)
    assert (rows.min(), rows.max()) == (pytest.approx(200 * scale, abs=6), pytest.approx(350 * scale, abs=6))


def test_nothing_is_left_of_the_picture_of_a_lost_camera() -> None:
    mosaic = Mosaic(["door", "yard"])
    for index in range(2):
        mosaic.draw(index, plain("green", 1, (640, 480))[0], RESULT, time=1.0, fps=15)
    before = cell(mosaic, 1, 2, 1).copy()
    mosaic.draw_lost(0, "reconnecting", "the connection to http://***@host/camera ended " * 5)
    lost = cell(mosaic, 0, 2, 1).astype(int)
    assert not ((lost[:, :, 1] > 200) & (lost[:, :, [0, 2]].max(axis=2) < 80)).any()
    # In a colour that says so, and with the name where it was.
    assert ((lost[:, :, 2] > 200) & (lost[:, :, 0] < 110)).sum() > 200
    assert (cell(mosaic, 1, 2, 1) == before).all()
    again = Mosaic(["door", "yard"])
    again.draw_lost(0, "reconnecting", "the connection to http://***@host/camera ended " * 5)
    assert (cell(again, 0, 2, 1) == cell(mosaic, 0, 2, 1)).all()


@pytest.mark.parametrize("size", [(64, 48), (160, 120), (1920, 1080)])
def test_what_stands_for_a_lost_source_fits_into_any_size(size: tuple[int, int]) -> None:
    image = plain("green", 1, size)[0]
    draw_lost(image, "reconnecting", "because " * 40)
    assert image[:, 0].max() == image[0].max() == image[-1].max() == 30 and image.max() > 100
