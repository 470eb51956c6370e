"""Still rooms: synthetic camera streams in which nobody does anything.

A room is a painted picture: a textured wall and floor with furniture-like shapes. A camera looks at it for
half a minute: it stands still or pans slowly, its sensor is noisy, and the light drifts, flickers or is
switched. Every number comes from the seed, so a stream can be repeated exactly, and other seeds give other
rooms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

FRAME_RATE = 30.0
WIDTH, HEIGHT = 640, 480
ROOM_SECONDS = 30.0
GAP_SECONDS = 10.0
"""Time between the last frame of a room and the first of the next: a recognizer takes it for a new stream."""

_CANVAS_WIDTH, _CANVAS_HEIGHT = 960, 600


@dataclass(frozen=True)
class _Camera:
    """How one room is filmed: radians, Hz, and amplitudes in pixels or as factors of brightness."""

    noise: float
    pan_x: float
    pan_y: float
    pan_rate: float
    pan_phase: float
    tremble: float
    drift: float
    drift_rate: float
    flicker: float
    flicker_rate: float
    switches: tuple[tuple[float, float], ...]


def still_rooms(minutes: float, seed: int = 0) -> Iterator[tuple[np.ndarray, float]]:
    """Film one room after another.

    Args:
        minutes: Length of all rooms together, without the gaps between them.
        seed: Decides the rooms, the cameras and the noise.

    Yields:
        Frame (480, 640, 3) uint8 BGR, a new array each time, and its time in seconds. Times are 1/30 s apart
        within a room of 30 s and jump by ``GAP_SECONDS`` from room to room.
    """
    frames_left = round(minutes * 60 * FRAME_RATE)
    frames_per_room = round(ROOM_SECONDS * FRAME_RATE)
    room, start = 0, 0.0
    while frames_left > 0:
        count = min(frames_left, frames_per_room)
        for index, frame in enumerate(_film((seed, room), count)):
            yield frame, start + index / FRAME_RATE
        start += (count - 1) / FRAME_RATE + GAP_SECONDS
        frames_left -= count
        room += 1


def paint_room(rng: np.random.Generator) -> np.ndarray:
    """Paint a room that is wider and higher than a frame, so that a camera can pan over it.

    Args:
        rng: Decides everything in the picture.

    Returns:
        Picture (600, 960, 3) uint8 BGR.
    """
    picture = np.empty((_CANVAS_HEIGHT, _CANVAS_WIDTH, 3), np.float32)
    horizon = int(rng.uniform(0.55, 0.78) * _CANVAS_HEIGHT)
    picture[:horizon] = _wall(rng, horizon)
    picture[horizon:] = _floor(rng, _CANVAS_HEIGHT - horizon)
    board = int(rng.integers(6, 16))
    picture[horizon - board : horizon] = _tint(rng, 120, 240)
    if rng.random() < 0.7:
        _window(picture, rng, horizon)
    for _ in range(int(rng.integers(0, 4))):
        _picture_frame(picture, rng, horizon)
    furniture = [_door, _shelf, _lamp, _sofa, _table, _plant]
    for index in sorted(rng.permutation(len(furniture))[: int(rng.integers(2, 6))]):
        furniture[index](picture, rng, horizon)
    lit = np.clip(_light_falloff(rng) * picture, 0, 255).astype(np.uint8)
    return cv2.GaussianBlur(lit, (0, 0), rng.uniform(0.5, 1.3))


def _film(seed: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    picture = paint_room(rng)
    camera = _camera(rng, count / FRAME_RATE)
    # Noise is cut at a random place from a field that is larger than the frame: fresh enough, and cheap.
    field = rng.normal(0, camera.noise, (HEIGHT + 64, WIDTH + 64, 3)).astype(np.float32)
    field = np.clip(np.rint(field), -127, 127).astype(np.int16)
    centre = ((_CANVAS_WIDTH - 1) / 2, (_CANVAS_HEIGHT - 1) / 2)
    shades = np.arange(256, dtype=np.float32)
    for index in range(count):
        time = index / FRAME_RATE
        angle = 2 * np.pi * camera.pan_rate * time + camera.pan_phase
        shake = rng.normal(0, 1, 2) * camera.tremble
        view = cv2.getRectSubPix(
            picture,
            (WIDTH, HEIGHT),
            (
                centre[0] + camera.pan_x * np.sin(angle) + shake[0],
                centre[1] + camera.pan_y * np.sin(0.7 * angle) + shake[1],
            ),
        )
        curve = np.clip(shades * _brightness(camera, time), 0, 255).astype(np.uint8)
        top, left = rng.integers(0, 64, 2)
        noise = field[top : top + HEIGHT, left : left + WIDTH]
        yield cv2.add(cv2.LUT(view, curve), noise, dtype=cv2.CV_8U)


def _camera(rng: np.random.Generator, seconds: float) -> _Camera:
    pans, trembles, drifts, flickers, switches = rng.random(5) < (0.5, 0.25, 0.6, 0.25, 0.4)
    return _Camera(
        noise=float(rng.uniform(1, 12)),
        pan_x=float(rng.uniform(20, 150)) * pans,
        pan_y=float(rng.uniform(0, 50)) * pans,
        pan_rate=float(rng.uniform(0.01, 0.04)),
        pan_phase=float(rng.uniform(0, 2 * np.pi)),
        tremble=float(rng.uniform(0.2, 1.0)) * trembles,
        drift=float(rng.uniform(0.05, 0.35)) * drifts,
        drift_rate=float(rng.uniform(0.02, 0.15)),
        flicker=float(rng.uniform(0.01, 0.06)) * flickers,
        flicker_rate=float(rng.uniform(1, 12)),
        switches=tuple(
            (float(time), float(rng.uniform(0.35, 1.3)))
            for time in np.sort(rng.uniform(0, seconds, int(rng.integers(1, 4)) * int(switches)))
        ),
    )


def _brightness(camera: _Camera, time: float) -> float:
    level = 1.0
    for when, factor in camera.switches:
        if time >= when:
            # A lamp or an automatic exposure settles within a quarter of a second.
            level += (factor - level) * (1 - np.exp((when - time) / 0.08))
    level *= 1 + camera.drift * np.sin(2 * np.pi * camera.drift_rate * time)
    return float(level * (1 + camera.flicker * np.sin(2 * np.pi * camera.flicker_rate * time)))


def _tint(rng: np.random.Generator, low: float, high: float, colour: float = 14) -> np.ndarray:
    return np.clip(rng.uniform(low, high) + rng.uniform(-colour, colour, 3), 0, 255).astype(np.float32)


def _clouds(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise (height, width, 1) float32, about -1 to 1, with blobs of `cell` pixels."""
    small = rng.normal(0, 0.5, (int(height / cell) + 2, int(width / cell) + 2)).astype(np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]


def _texture(rng: np.random.Generator, height: int, width: int, strength: float) -> np.ndarray:
    rough = _clouds(rng, height, width, rng.uniform(2, 5)) + _clouds(rng, height, width, rng.uniform(30, 120))
    return strength * rough


def _wall(rng: np.random.Generator, height: int) -> np.ndarray:
    colour = _tint(rng, 70, 225)
    wall = colour + _texture(rng, height, _CANVAS_WIDTH, rng.uniform(1, 8))
    pattern = rng.integers(0, 4)
    if pattern == 1:
        stripes = (np.arange(_CANVAS_WIDTH) // int(rng.integers(10, 60))) % 2
        wall += (rng.uniform(5, 30) * stripes)[None, :, None]
    elif pattern == 2:
        brick_height, brick_width = int(rng.integers(14, 30)), int(rng.integers(40, 80))
        rows = np.arange(height)[:, None]
        columns = np.arange(_CANVAS_WIDTH)[None, :] + (rows // brick_height % 2) * (brick_width // 2)
        joints = (rows % brick_height < 2) | (columns % brick_width < 2)
        wall -= (rng.uniform(10, 45) * joints)[..., None]
    return wall


def _floor(rng: np.random.Generator, height: int) -> np.ndarray:
    floor = _tint(rng, 50, 180) + _texture(rng, height, _CANVAS_WIDTH, rng.uniform(3, 14))
    depth = (np.arange(height, dtype=np.float32)[:, None] + 40) / 40
    across = (np.arange(_CANVAS_WIDTH, dtype=np.float32)[None, :] - _CANVAS_WIDTH / 2) / depth
    if rng.random() < 0.6:
        planks = np.floor(across / rng.uniform(8, 25)).astype(int)
        shades = rng.normal(0, rng.uniform(4, 14), 4001).astype(np.float32)
        floor += shades[planks % 4001][..., None]
    return floor * np.linspace(0.8, 1.05, height, dtype=np.float32)[:, None, None]


def _light_falloff(rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[0:_CANVAS_HEIGHT, 0:_CANVAS_WIDTH].astype(np.float32)
    x, y = rng.uniform(0, _CANVAS_WIDTH), rng.uniform(-100, _CANVAS_HEIGHT / 2)
    distance = np.hypot(columns - x, rows - y) / _CANVAS_WIDTH
    return (rng.uniform(0.9, 1.2) - rng.uniform(0.1, 0.6) * distance)[..., None].astype(np.float32)


def _box(
    picture: np.ndarray,
    rng: np.random.Generator,
    box: tuple[float, ...],
    colour: np.ndarray,
    texture: float = 5,
) -> None:
    """Fill a rectangle (left, top, right, bottom) with a textured colour, cut off at the border."""
    height, width = picture.shape[:2]
    left, right = (int(np.clip(edge, 0, width)) for edge in (box[0], box[2]))
    top, bottom = (int(np.clip(edge, 0, height)) for edge in (box[1], box[3]))
    if right > left and bottom > top:
        grain = texture * _clouds(rng, bottom - top, right - left, 4)
        picture[top:bottom, left:right] = np.clip(colour + grain, 0, 255)


def _window(picture: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width, height = rng.uniform(120, 300), rng.uniform(120, 0.6 * horizon)
    left, top = rng.uniform(0, _CANVAS_WIDTH - width), rng.uniform(20, 0.9 * horizon - height)
    frame = _tint(rng, 150, 250, 10)
    _box(picture, rng, (left, top, left + width, top + height), frame)
    for column in range(2):
        pane = left + 8 + column * (width / 2 - 2)
        box = (pane, top + 8, pane + width / 2 - 14, top + height - 8)
        _box(picture, rng, box, _tint(rng, 170, 240), texture=12)


def _picture_frame(picture: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width, height = rng.uniform(50, 160), rng.uniform(50, 140)
    left, top = rng.uniform(0, _CANVAS_WIDTH - width), rng.uniform(10, 0.7 * horizon - height)
    _box(picture, rng, (left, top, left + width, top + height), _tint(rng, 20, 120))
    for _ in range(int(rng.integers(1, 5))):
        inner = np.sort(rng.uniform(8, width - 8, 2)), np.sort(rng.uniform(8, height - 8, 2))
        box = (left + inner[0][0], top + inner[1][0], left + inner[0][1], top + inner[1][1])
        _box(picture, rng, box, _tint(rng, 40, 210, 40), texture=20)


def _shelf(picture: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width, bottom = rng.uniform(120, 280), horizon + rng.uniform(5, 40)
    left, top = rng.uniform(-40, _CANVAS_WIDTH - width), rng.uniform(40, 0.45 * horizon)
    wood = _tint(rng, 40, 150)
    _box(picture, rng, (left, top, left + width, bottom), wood * 0.6)
    boards = np.linspace(top, bottom, int(rng.integers(4, 7)))
    for upper, lower in itertools.pairwise(boards):
        x = left + 8
        while x < left + width - 16:
            book = rng.uniform(6, 22)
            height = (lower - upper) * rng.uniform(0.5, 0.9)
            if rng.random() < 0.85:
                box = (x, lower - height, min(x + book, left + width - 8), lower)
                _box(picture, rng, box, _tint(rng, 30, 180, 45))
            x += book + 1
        _box(picture, rng, (left, lower - 4, left + width, lower + 3), wood)
    for side in (left, left + width - 7):
        _box(picture, rng, (side, top, side + 7, bottom), wood)


def _sofa(picture: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width, height = rng.uniform(240, 420), rng.uniform(110, 160)
    left, bottom = rng.uniform(-60, _CANVAS_WIDTH - width + 60), horizon + rng.uniform(50, 110)
    cloth, top = _tint(rng, 40, 190, 30), bottom - height
    _box(picture, rng, (left, top, left + width, bottom), cloth * 0.8, texture=12)
    seats = int(rng.integers(2, 4))
    seat = (width - 60) / seats
    for index in range(seats):
        x = left + 30 + index * seat
        _box(picture, rng, (x + 2, top + 6, x + seat - 2, top + height * 0.5), cloth * 0.95, texture=12)
        _box(picture, rng, (x + 2, top + height * 0.53, x + seat - 2, bottom - 25), cloth, texture=12)
    for x in (left - 6, left + width - 30):
        _box(picture, rng, (x, top + height * 0.25, x + 36, bottom), cloth * 1.05, texture=12)


def _table(picture: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width, left = rng.uniform(160, 340), rng.uniform(-40, _CANVAS_WIDTH - 160)
    bottom = horizon + rng.uniform(60, 130)
    top = bottom - rng.uniform(100, 170)
    wood = _tint(rng, 50, 190)
    for x in (left + 8, left + width - 20):
        _box(picture, rng, (x, top, x + 12, bottom), wood * 0.7)
    _box(picture, rng, (left, top, left + width, top + 16), wood)
    for _ in range(int(rng.integers(0, 4))):
        x, side = rng.uniform(left, left + width - 40), rng.uniform(12, 55)
        _box(picture, rng, (x, top - side, x + rng.uniform(15, 50), top), _tint(rng, 30, 210, 45))


def _lamp(picture: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    x, top, bottom = rng.uniform(40, _CANVAS_WIDTH - 40), rng.uniform(90, 200), horizon + rng.uniform(10, 60)
    _box(picture, rng, (x - 3, top, x + 3, bottom), _tint(rng, 20, 120, 10))
    base = (round(x), round(bottom))
    cv2.ellipse(picture, base, (32, 9), 0, 0, 360, _tint(rng, 20, 120, 10).tolist(), -1, cv2.LINE_AA)
    shade = np.array([(x - 28, top - 50), (x + 28, top - 50), (x + 52, top + 15), (x - 52, top + 15)])
    cv2.fillPoly(picture, [np.rint(shade).astype(np.int32)], _tint(rng, 180, 255).tolist(), cv2.LINE_AA)


def _plant(picture: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    x, bottom = rng.uniform(40, _CANVAS_WIDTH - 40), horizon + rng.uniform(20, 80)
    for _ in range(int(rng.integers(12, 30))):
        angle, reach = rng.uniform(-160, -20), rng.uniform(35, 90)
        tip = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))]) * reach
        leaf = (round(x + tip[0]), round(bottom - 45 + tip[1]))
        green = np.array([rng.uniform(20, 70), rng.uniform(60, 160), rng.uniform(20, 90)])
        axes = (round(reach / 2.5), int(rng.integers(4, 11)))
        cv2.ellipse(picture, leaf, axes, angle, 0, 360, green.tolist(), -1, cv2.LINE_AA)
    _box(picture, rng, (x - 26, bottom - 50, x + 26, bottom), _tint(rng, 40, 200, 30))


def _door(picture: np.ndarray, rng: np.random.Generator, horizon: int) -> None:
    width, left = rng.uniform(130, 180), rng.uniform(0, _CANVAS_WIDTH - 180)
    top, colour = rng.uniform(20, 80), _tint(rng, 70, 235)
    _box(picture, rng, (left, top, left + width, horizon + 4), colour * 0.75)
    _box(picture, rng, (left + 9, top + 9, left + width - 9, horizon + 4), colour)
    for lower, upper in ((0.08, 0.45), (0.52, 0.92)):
        height = horizon - top
        box = (left + 30, top + lower * height, left + width - 30, top + upper * height)
        _box(picture, rng, box, colour * 0.9)
    knob = (round(left + width - 22), round(top + 0.5 * (horizon - top)))
    cv2.circle(picture, knob, 6, _tint(rng, 60, 220, 10).tolist(), -1, cv2.LINE_AA)
