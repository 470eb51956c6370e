from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from insertion_networks import IMAGE_NETWORKS, VIDEO_NETWORKS, clip_of, distance, network_of, stream
from torch import Tensor, nn

from stsm_rt.errors import UserError
from stsm_rt.insertion import insert_shift
from stsm_rt.shift import PRESETS, ShiftError, ShiftGroup, ShiftSpec

TOLERANCE = 1e-5
FRAMES = 4
MIXED = ShiftSpec(
    "mixed",
    (ShiftGroup(Fraction(1, 8), dt=2), ShiftGroup(Fraction(1, 8), dt=1, dh=1), ShiftGroup(Fraction(1, 16), dw=-1)),
)


class Network(nn.Module):
    """A residual convolution, and a module that may look at several frames (N*T, C, H, W)."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.other = other
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(x + self.conv(x)).mean((2, 3)))


class OverFrames(nn.Module):
    """A module applied to clips (N, C, T, H, W) within a network of frames."""

    def __init__(self, inner: nn.Module | Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.unflatten(0, (-1, FRAMES)).transpose(1, 2))
        return y.expand(-1, -1, FRAMES, -1, -1).transpose(1, 2).flatten(0, 1)


class OverSequence(nn.Module):
    """A recurrent or attending layer over the mean of each frame, time first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3)).unflatten(0, (-1, FRAMES)).transpose(0, 1)
        arguments = (means,) * (3 if isinstance(self.inner, nn.MultiheadAttention) else 1)
        return x + self.inner(*arguments)[0].transpose(0, 1).flatten(0, 1)[:, :, None, None]


def before(x: Tensor) -> Tensor:
    """The frame before, in all channels: another network's shift."""
    return F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))


@pytest.mark.parametrize(
    ("other", "layer"),
    [
        (OverFrames(nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0))), r"layer other\.inner \(Conv3d\)"),
        (OverFrames(before), r"layer other \(OverFrames\)"),
        (OverFrames(nn.MaxPool3d((FRAMES, 1, 1))), r"layer other\.inner \(MaxPool3d\)"),
        (OverFrames(lambda x: x.mean(2, keepdim=True)), r"layer other \(OverFrames\)"),
        (OverSequence(nn.MultiheadAttention(16, 2)), r"layer other\.inner \(MultiheadAttention\)"),
        (OverSequence(nn.GRU(16, 16)), r"layer other\.inner \(GRU\)"),
    ],
    ids=["convolution", "shift", "pooling", "mean", "attention", "recurrence"],
)
def test_a_layer_over_time_has_no_step_form_and_is_named(other: nn.Module, layer: str) -> None:
    inserted = insert_shift(
        Network(other).eval(), "tsm_online", where="conv", frames=FRAMES, example=torch.zeros(1, FRAMES, 16, 6, 6)
    )
    with pytest.raises(UserError, match=f"^{layer} makes what it computes for a frame depend on other frames"):
        inserted.step_form(torch.zeros(1, 16, 6, 6))
    assert inserted.model(torch.zeros(2, FRAMES, 16, 6, 6)).shape == (2, FRAMES, 3)  # the clip form works on


@pytest.mark.parametrize(
    "other",
    [nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Softmax(1)],
    ids=["batch-norm", "pooling-in-space", "softmax-over-channels"],
)
@torch.no_grad()
def test_a_layer_that_looks_at_each_frame_alone_is_no_obstacle(other: nn.Module) -> None:
    network = Network(other).train()
    clip = clip_of((2, FRAMES, 16, 6, 6))
    step = insert_shift(network, "tsm_online", where="conv", example=clip).step_form(clip[:, 0])
    assert network.training
    network.eval()  # in training, the statistics of batch norm are those of all frames
    assert distance(stream(step, clip), network(clip)) <= TOLERANCE


def test_a_network_that_needs_several_frames_at_once_says_so() -> None:
    network = Network(OverFrames(nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1))))
    clip = torch.zeros(1, FRAMES, 16, 6, 6)
    inserted = insert_shift(network, "tsm_online", where="conv", frames=FRAMES, example=clip)
    with pytest.raises(UserError, match=r"Network does not run on \(1, 16, 6, 6\): "):
        inserted.step_form(clip[:, 0])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("r3d_18", r"layer stem\.0 \(Conv3d\)"),
        ("mc3_18", r"layer stem\.0 \(Conv3d\)"),
        ("r2plus1d_18", r"layer stem\.3 \(Conv3d\)"),
        ("s3d", r"layer features\.0\.1\.0 \(Conv3d\)"),
        ("swin3d_t", r"layer patch_embed\.proj \(Conv3d\)"),
    ],
)
def test_a_video_network_has_no_step_form(name: str, layer: str) -> None:
    case = VIDEO_NETWORKS[name]
    inserted = insert_shift(case.build(), "tsm_online", where=case.where, example=torch.zeros(case.shape))
    with pytest.raises(UserError, match=f"^{layer} makes"):
        inserted.step_form(torch.zeros(1, 3, 64, 64))


def test_a_video_network_that_only_pools_over_time_names_the_pooling() -> None:
    network = nn.Sequential(nn.Conv3d(3, 16, (1, 3, 3)), nn.Conv3d(16, 16, 1), nn.AdaptiveAvgPool3d(1))
    inserted = insert_shift(network, "tsm_online", where="1", example=torch.zeros(1, 3, 6, 8, 8))
    with pytest.raises(UserError, match=r"^layer 2 \(AdaptiveAvgPool3d\) makes"):
        inserted.step_form(torch.zeros(1, 3, 8, 8))
    frames = insert_shift(
        nn.Sequential(*list(network)[:1], nn.Conv3d(16, 4, 1)),
        "tsm_online",
        where="1",
        example=torch.zeros(1, 3, 6, 8, 8),
    )
    with pytest.raises(UserError, match="takes whole clips"):
        frames.step_form(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("spec", ["tsm", "stsm"])
def test_a_spec_that_looks_ahead_has_no_step_form(spec: str) -> None:
    inserted = insert_shift(Network(nn.Identity()), spec, example=torch.zeros(1, 2, 16, 6, 6))
    with pytest.raises(ShiftError, match=rf"shift {spec} takes channels from later frames.*{spec}_online"):
        inserted.step_form(torch.zeros(1, 16, 6, 6))


@torch.no_grad()
def test_delays_of_several_frames_and_batches_of_streams() -> None:
    network = Network(nn.Identity()).eval()
    clip = clip_of((3, 7, 16, 6, 8))
    inserted = insert_shift(network, MIXED, example=clip)
    step = inserted.step_form(clip[:, 0])
    assert step.delays == (2, 1)
    assert [state.shape for state in step.initial_state()] == [(3, 2, 6, 8)] * 2
    assert distance(stream(step, clip), network(clip)) <= TOLERANCE
    assert distance(stream(inserted.step_form(clip[:1, 0]), clip[:1]), network(clip[:1])) <= TOLERANCE


@torch.no_grad()
def test_the_clip_form_works_between_steps() -> None:
    network = Network(nn.Identity()).eval()
    clip = clip_of((1, 3, 16, 6, 8))
    step = insert_shift(network, "tsm_online", example=clip).step_form(clip[:, 0])
    expected = network(clip)  # leaves the states' sizes alone
    _, *states = step(clip[:, 0], *step.initial_state())
    assert torch.equal(network(clip), expected)
    assert distance(step(clip[:, 1], *states)[0], expected[:, 1]) <= TOLERANCE
    with pytest.raises(RuntimeError):
        step(clip[:, 1, :, :3], *states)
    assert torch.equal(network(clip), expected)


@pytest.mark.parametrize("frame", [torch.zeros(16, 6, 6), torch.zeros(1, 16, 6, 6, dtype=torch.uint8)])
def test_a_frame_that_is_none_is_refused(frame: Tensor) -> None:
    inserted = insert_shift(Network(nn.Identity()), "tsm_online", example=torch.zeros(1, 2, 16, 6, 6))
    with pytest.raises(UserError, match=r"a frame is \(N, C, H, W\) of floating numbers, got \("):
        inserted.step_form(frame)


def test_a_wrong_number_of_states_is_refused() -> None:
    step = insert_shift(Network(nn.Identity()), "tsm_online", example=torch.zeros(1, 2, 16, 6, 6)).step_form(
        torch.zeros(1, 16, 6, 6)
    )
    with pytest.raises(UserError, match="takes 1 states, got 0; see initial_state"):
        step(torch.zeros(1, 16, 6, 6))


@torch.no_grad()
def test_double_precision_leaves_rounding_only() -> None:
    network = network_of(IMAGE_NETWORKS["tv_mobilenet_v3_small"]).double()
    clip = clip_of((1, 4, 3, 64, 64)).double()
    step = insert_shift(network, "stsm_online", example=clip).step_form(clip[:, 0])
    assert step.initial_state()[0].dtype == torch.float64
    assert distance(stream(step, clip), network(clip)) <= 1e-12


@pytest.mark.parametrize("name", ["tv_resnet18", "tv_vit"])
@torch.no_grad()
def test_the_step_form_exports(name: str) -> None:
    case = IMAGE_NETWORKS[name]
    network = network_of(case)
    clip = clip_of(case.shape)
    step = insert_shift(network, case.shift, example=clip).step_form(clip[:, 0])
    program = torch.export.export(step, (clip[:, 0], *step.initial_state())).module()
    _, *states = step(clip[:, 0], *step.initial_state())
    logits, *following = program(clip[:, 1], *states)
    assert distance(logits, network(clip)[:, 1]) <= TOLERANCE
    assert len(following) == len(states)


def test_presets_that_are_causal_stream_on_a_pretrained_layout() -> None:
    keys = list(tv.resnet18().state_dict())
    inserted = insert_shift(tv.resnet18(), PRESETS["tsm_online"])
    step = inserted.step_form(torch.zeros(1, 3, 64, 64))
    assert list(inserted.model.state_dict()) == keys
    assert [key.removeprefix("network.") for key in step.state_dict()] == keys
