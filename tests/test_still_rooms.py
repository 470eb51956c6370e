from __future__ import annotations

import numpy as np
import pytest

from stsm_rt.still_rooms import FRAME_RATE, GAP_SECONDS, HEIGHT, ROOM_SECONDS, WIDTH, paint_room, still_rooms


def take(minutes: float, seed: int) -> tuple[list[np.ndarray], list[float]]:
    frames, times = zip(*still_rooms(minutes, seed), strict=True)
    return list(frames), list(times)


def test_frames_are_vga_and_come_at_30_per_second():
    frames, times = take(0.05, seed=1)

    assert len(frames) == 90
    assert all(frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8 for frame in frames)
    assert np.allclose(np.diff(times), 1 / FRAME_RATE)


def test_the_same_seed_gives_the_same_pixels_and_another_seed_another_room():
    first, again, other = (take(0.01, seed)[0] for seed in (5, 5, 6))

    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.abs(first[0].astype(int) - other[0]).mean() > 10


def test_a_new_room_comes_after_a_gap_that_resets_a_recognizer():
    per_room = round(ROOM_SECONDS * FRAME_RATE)
    last = first = before = after = None
    for index, (frame, time) in enumerate(still_rooms(1.1 * ROOM_SECONDS / 60, seed=2)):
        if index == per_room - 1:
            last, before = frame, time
        if index == per_room:
            first, after = frame, time

    assert after - before == pytest.approx(GAP_SECONDS)
    assert np.abs(first.astype(int) - last).mean() > 10


def test_a_second_of_a_room_shows_noise_but_no_action():
    for seed in range(8):
        frames, _ = take(1 / 60, seed)
        blurred = [frame.reshape(HEIGHT // 16, 16, WIDTH // 16, 16, 3).mean(axis=(1, 3)) for frame in frames]
        level = [100 * picture / picture.mean() for picture in blurred]

        assert not np.array_equal(frames[0], frames[1])
        # At the same level of light, blocks of 16x16 pixels hardly change: only the camera moves, slowly.
        assert np.median(np.abs(level[-1] - level[0])) < 6


def test_rooms_have_texture_and_differ_in_light():
    pictures = [paint_room(np.random.default_rng(seed)) for seed in range(12)]

    assert all(picture.std() > 10 for picture in pictures)
    assert np.ptp([picture.mean() for picture in pictures]) > 40
