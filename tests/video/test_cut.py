from __future__ import annotations

import cv2
import numpy as np

from stsm_rt.video.cut import CutDetector


def scene(seed, size=(96, 128)):
    """A picture of large smooth patches, as scenes are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def cuts(pictures):
    detector = CutDetector()
    return [detector.is_cut(picture) for picture in pictures]


def test_another_scene_is_a_cut_and_the_first_picture_is_none():
    assert cuts([scene(0), scene(0), scene(1), scene(1)]) == [False, False, True, False]


def test_light_noise_and_a_moving_camera_are_no_cuts():
    picture = scene(2)
    noise = np.random.default_rng(0).normal(0, 15, picture.shape)
    views = [
        picture,
        (picture * 0.3).astype(np.uint8),
        np.clip(picture.astype(int) + 60, 0, 255).astype(np.uint8),
        np.clip(picture + noise, 0, 255).astype(np.uint8),
        np.roll(picture, 6, 1),
    ]
    assert cuts(views) == [False] * len(views)


def test_a_covered_lens_is_no_cut():
    dark = np.random.default_rng(0).integers(0, 6, (96, 128, 3), np.uint8)
    assert cuts([scene(3), dark, dark[::-1], dark]) == [False] * 4


def test_a_reset_forgets_the_last_picture():
    detector = CutDetector()
    detector.is_cut(scene(0))
    detector.reset()
    assert not detector.is_cut(scene(1))
