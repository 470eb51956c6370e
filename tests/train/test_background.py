from __future__ import annotations

import dataclasses

import pytest
import torch

from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec
from stsm_rt.model import ModelSpec
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.background import moving_patches, refit, run


def test_a_refit_separates_the_background_and_leaves_every_other_row():
    torch.manual_seed(0)
    network = StreamingNetwork("r8", 4, shift=None)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    background = torch.arange(400) % 4 == 0
    features = torch.randn(400, 128) + background[:, None] * 0.5
    refit(network, features, background, actions=3)
    with torch.no_grad():
        said = network.classifier(features).argmax(1) == 3
    assert (said == background).float().mean() > 0.9
    for name, tensor in network.state_dict().items():
        if name.startswith("classifier"):
            assert torch.equal(tensor[:3], before[name][:3])
            assert not torch.equal(tensor[3], before[name][3])
        else:
            assert torch.equal(tensor, before[name]), name


def test_patches_move_through_a_picture_that_stands_still():
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(6, 8, 20, 30, 3, generator=generator) * 255
    clips = moving_patches(frames, generator)
    assert clips.shape == frames.shape
    kept = (clips == frames[:, :1]).all(-1).float().mean((1, 2, 3))
    assert (kept > 0.05).all()
    assert (kept < 1).all()
    assert any(not torch.equal(clips[i, 0], clips[i, -1]) for i in range(6))


def test_a_model_without_a_background_is_refused(moving_squares, small_recipe):
    spec = ModelSpec(
        network="r8",
        padding="symmetric",
        shift=None,
        rates=(),
        changes=False,
        labels=moving_squares.classes,
        background=None,
        height=16,
        width=32,
        frame_rate=30.0,
        decision=DecisionSpec(smoothing=1, threshold=0.5, release=0.5, min_steps=1),
        recipe=dataclasses.asdict(small_recipe),
    )
    with pytest.raises(UserError, match="no background"):
        run(spec.build(), spec, moving_squares, torch.arange(8), passes=1)
