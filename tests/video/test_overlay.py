"""The overlay: readable on any picture, inside its panel, and gone where it should be."""

from __future__ import annotations

import numpy as np
import pytest
from clips import plain

from stsm_rt.decision import Event
from stsm_rt.result import Result
from stsm_rt.video.overlay import Overlay

SIZES = [(214, 160), (640, 480), (720, 1280), (1920, 1080)]


def result(
    *,
    time: float = 1.0,
    active: str | None = None,
    events: tuple[Event, ...] = (),
    labels: tuple[str, ...] = ("walk", "shoot_ball", "swing_baseball"),
    scores: tuple[float, ...] = (0.7, 0.2, 0.05),
    warming_up: bool = False,
) -> Result:
    return Result(time, 30, labels, scores, 0.012, 0, warming_up, events, active)


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (before != after).any(axis=2)


def drawn(picture: np.ndarray, overlay: Overlay, shown: Result, *, time: float = 1.0, note: str = "") -> np.ndarray:
    image = picture.copy()
    overlay.draw(image, shown, time=time, fps=30, note=note)
    return image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shade", [0, 128, 255])
def test_the_panel_is_small_and_its_text_stands_out(size: tuple[int, int], shade: int) -> None:
    picture = np.full((size[1], size[0], 3), shade, np.uint8)
    image = drawn(picture, Overlay(), result())
    rows, columns = np.nonzero(changed(picture, image))
    assert rows.min() > size[1] * 0.4 and rows.max() < size[1] - 1
    assert columns.min() > 0 and columns.max() < size[0] * 0.6
    panel = image[rows.min() : rows.max(), columns.min() : columns.max()].max(axis=2)
    # The pane is dark whatever is behind it, and there are white letters on it.
    assert np.median(panel) < 100
    assert (panel > 200).mean() > 0.01


@pytest.mark.parametrize("size", [*SIZES, (120, 120), (119, 200), (1, 1), (2000, 120), (120, 2000)])
def test_labels_of_any_length_stay_in_the_panel(size: tuple[int, int]) -> None:
    picture = plain("black", 1, size)[0]
    short = changed(picture, drawn(picture, Overlay(), result(active="walk")))
    labels = ("a_label_that_is_much_too_long_for_any_panel_of_this_world",) * 3
    event = Event(labels[0], -9.0, None, 0.7, 30)
    shown = result(labels=labels, active=labels[0], events=(event,), scores=(1.0, 1.0, 1.0))
    long = changed(picture, drawn(picture, Overlay(), shown, note="a note that is too long for it, too"))
    for axis in (0, 1):
        if min(size) < 120:
            assert not short.any() and not long.any()
        else:
            places, others = np.nonzero(short.any(axis=axis))[0], np.nonzero(long.any(axis=axis))[0]
            assert others.min() >= places.min() - 2 and others.max() <= places.max() + 2


def test_bars_grow_with_the_score() -> None:
    picture = plain("black", 1, (640, 480))[0]
    lit = [
        int(drawn(picture, Overlay(), result(scores=(score, 0.0, 0.0), active="walk")).astype(int)[:, :, 1].sum())
        for score in (0.1, 0.4, 0.7, 1.0)
    ]
    assert lit == sorted(lit) and lit[-1] > lit[0] * 1.1


def test_an_event_flashes_and_fades() -> None:
    picture, overlay = plain("black", 1, (640, 480))[0], Overlay()
    start = Event("walk", 1.0, None, 0.7, 30)
    edges = [drawn(picture, overlay, result(), time=0.9)[0].max()]
    edges.append(drawn(picture, overlay, result(active="walk", events=(start,)), time=1.0)[0].max())
    for time in (1.3, 1.9, 2.3):
        edges.append(drawn(picture, overlay, result(active="walk"), time=time)[0].max())
    assert edges[0] == 0 and edges[1] > edges[2] > edges[3] > 0 and edges[4] == 0
    top = drawn(picture, overlay, result(active="walk"), time=1.5)[10:60, 200:440]
    assert (top.max(axis=2) > 200).sum() > 500


def test_the_end_of_an_event_ends_the_flash() -> None:
    picture, overlay = plain("black", 1, (640, 480))[0], Overlay()
    drawn(picture, overlay, result(active="walk", events=(Event("walk", 1.0, None, 0.7, 30),)))
    end = Event("walk", 1.0, 1.2, 0.7, 36)
    assert drawn(picture, overlay, result(events=(end,)), time=1.2)[0].max() == 0


def test_the_region_is_marked_by_its_corners() -> None:
    picture = plain("black", 1, (640, 480))[0]
    roi = (400, 40, 200, 160)
    marked = changed(drawn(picture, Overlay(), result()), drawn(picture, Overlay(roi=roi), result()))
    assert marked[36:205, 396:605].sum() == marked.sum() > 0
    assert not marked[60:180, 420:580].any()


@pytest.mark.parametrize("size", [*SIZES, (119, 200)])
def test_another_note_is_as_if_it_had_been_drawn_at_once(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    overlay = Overlay()
    image = drawn(picture, overlay, result(warming_up=True))
    overlay.change_note(image, "paused")
    assert np.array_equal(image, drawn(picture, Overlay(), result(), note="paused"))


def test_an_event_of_a_result_without_a_frame_flashes_too() -> None:
    picture, overlay = plain("black", 1, (640, 480))[0], Overlay()
    overlay.follow(result(active="walk", events=(Event("walk", 1.0, None, 0.7, 30),)))
    assert drawn(picture, overlay, result(active="walk"), time=1.1)[0].max() > 0


def test_a_change_of_size_is_followed() -> None:
    overlay = Overlay()
    for size in SIZES:
        picture = plain("black", 1, size)[0]
        assert (drawn(picture, overlay, result()) == drawn(picture, Overlay(), result())).all()


def test_fewer_labels_than_rows_are_fine() -> None:
    picture = plain("black", 1, (640, 480))[0]
    image = drawn(picture, Overlay(), result(labels=("walk",), scores=(0.7,), warming_up=True))
    assert changed(picture, image).any()
