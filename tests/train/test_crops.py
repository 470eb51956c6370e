from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stsm_rt.train.crops import CentreCrop, MultiScaleCrop, ThreeCrops


def gradients(height: int, width: int, frames: int = 1) -> torch.Tensor:
    """Each pixel tells where it is: its row, its column, and the frame."""
    rows = torch.arange(height)[:, None].expand(height, width) % 256
    columns = torch.arange(width)[None].expand(height, width) % 256
    planes = [torch.stack([rows, columns, torch.full_like(rows, frame)], -1) for frame in range(frames)]
    return torch.stack(planes).to(torch.uint8)


def published_crops(width: int, height: int, size: int) -> set[tuple[int, int, int, int]]:
    """The crops (x, y, width, height) that TSM draws from, written out for a square input."""
    sides = [int(min(width, height) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    crops = set()
    for i, h in enumerate(sides):
        for j, w in enumerate(sides):
            if abs(i - j) <= 1:
                dx, dy = (width - w) // 4, (height - h) // 4
                corners = [(0, 0), (4 * dx, 0), (0, 4 * dy), (4 * dx, 4 * dy), (2 * dx, 2 * dy)]
                edges = [(0, 2 * dy), (4 * dx, 2 * dy), (2 * dx, 4 * dy), (2 * dx, 0)]
                quarters = [(dx, dy), (3 * dx, dy), (dx, 3 * dy), (3 * dx, 3 * dy)]
                crops |= {(x, y, w, h) for x, y in corners + edges + quarters}
    return crops


def drawn(monkeypatch, frames: torch.Tensor, crop: MultiScaleCrop, times: int) -> set[tuple[int, int, int, int]]:
    """The rectangles (x, y, width, height) that are cut out of pictures made by `gradients`."""
    cuts = []

    def record(cut: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        y, x = cut[0, 0, 0, :2].tolist()
        cuts.append((x, y, cut.shape[2], cut.shape[1]))
        return torch.zeros(len(cut), *size, 3, dtype=torch.uint8)

    monkeypatch.setattr("stsm_rt.train.crops._resize", record)
    random = np.random.default_rng(0)
    for _ in range(times):
        crop(frames, random)
    return set(cuts)


@pytest.mark.parametrize(("width", "height"), [(90, 64), (64, 90), (64, 64), (35, 34)])
def test_training_crops_are_the_published_ones_and_all_of_them(monkeypatch, width, height):
    crop = MultiScaleCrop((32, 32))
    assert drawn(monkeypatch, gradients(height, width), crop, 3000) == published_crops(width, height, 32)


@settings(max_examples=60, deadline=None)
@given(
    picture=st.tuples(st.integers(8, 200), st.integers(8, 200)),
    size=st.tuples(st.integers(4, 64), st.integers(4, 64)),
    seed=st.integers(0, 999),
)
def test_every_crop_of_every_picture_has_the_size_asked_for(picture, size, seed):
    frames, random = gradients(*picture, frames=2), np.random.default_rng(seed)
    for crop, crops in ((MultiScaleCrop(size), 1), (CentreCrop(16, size), 1), (ThreeCrops(16, size), 3)):
        cut = crop(frames, random)
        assert cut.shape == (crops, 2, *size, 3)
        assert cut.dtype == torch.uint8
    for height, width in MultiScaleCrop(size).rectangles(*picture):
        assert 1 <= height <= picture[0]
        assert 1 <= width <= picture[1]


def test_all_frames_of_a_clip_are_cut_and_mirrored_alike():
    crop, random = MultiScaleCrop((24, 24)), np.random.default_rng(0)
    for _ in range(20):
        cut = crop(gradients(60, 80, frames=5), random)[0]
        assert (cut[..., :2] == cut[:1, ..., :2]).all()
        assert cut[:, 0, 0, 2].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_clips_are_mirrored_and_none_where_left_and_right_are_classes(flip):
    random, mirrored = np.random.default_rng(0), 0
    for _ in range(200):
        columns = MultiScaleCrop((16, 16), flip=flip)(gradients(40, 40), random)[0, 0, 0, :, 1].int()
        mirrored += bool(columns[0] > columns[-1])
    assert 70 < mirrored < 130 if flip else mirrored == 0


@pytest.mark.parametrize(("height", "width"), [(240, 427), (320, 180), (256, 256), (37, 91)])
def test_the_centre_crop_is_torchvisions_and_pillows(height, width):
    noise = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = CentreCrop(64, (56, 56))(noise)[0]
    theirs = tv.center_crop(tv.resize(noise.permute(0, 3, 1, 2), [64], antialias=True), [56, 56])
    assert torch.equal(ours, theirs.permute(0, 2, 3, 1))
    picture = Image.fromarray(noise[0].numpy())
    pillow = np.asarray(tv.center_crop(tv.resize(picture, [64]), [56, 56]))
    assert np.abs(pillow.astype(int) - ours[0].numpy()).max() <= 1


def test_three_crops_are_both_ends_and_the_middle_of_the_longer_side():
    wide = ThreeCrops(64, (64, 64))(gradients(64, 130))
    # TSM's positions: whole quarters of the free way, 66 // 4 = 16.
    assert wide[:, 0, 0, 0, 1].tolist() == [0, 64, 32]
    assert wide[:, 0, 0, 0, 0].tolist() == [0, 0, 0]
    tall = ThreeCrops(64, (64, 64))(gradients(130, 64))
    assert tall[:, 0, 0, 0, 0].tolist() == [0, 64, 32]


def test_a_wide_input_finds_its_crop_in_an_upright_picture():
    assert CentreCrop(32, (32, 48))(gradients(60, 40)).shape == (1, 1, 32, 48, 3)
