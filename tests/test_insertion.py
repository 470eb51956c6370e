from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from insertion_networks import IMAGE_NETWORKS, VIDEO_NETWORKS, Case, clip_of, distance, network_of, reference, stream
from torch import Tensor, nn

import stsm_rt
from stsm_rt.errors import UserError
from stsm_rt.insertion import Insertion, insert_shift
from stsm_rt.shift import PRESETS, ShiftError, ShiftGroup, ShiftSpec

TOLERANCE = 1e-5  # of the largest logit
CLEAR = 1e-3  # a fault shows at least this


class Residual(nn.Module):
    """x + conv(x)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def small(*layers: nn.Module) -> nn.Sequential:
    """A network of three residual blocks, or of `layers`; 16 channels in, frames of any size."""
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (Residual(), Residual(), Residual()))).eval()


SMALL = torch.zeros(1, 4, 16, 6, 7)


def keys(network: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(key, value.shape) for key, value in network.state_dict().items()]


# The law: what is inserted is the shift, at every residual branch, and a stream equals the clip


@pytest.mark.parametrize(
    "case", [*IMAGE_NETWORKS.values(), *VIDEO_NETWORKS.values()], ids=[*IMAGE_NETWORKS, *VIDEO_NETWORKS]
)
@torch.no_grad()
def test_the_shift_goes_into_networks_of_others_and_is_exact(case: Case) -> None:
    network = network_of(case)
    clip = clip_of(case.shape)
    image = case in IMAGE_NETWORKS.values()
    plain = network(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]) if image else network(clip)
    expected = reference(network, case, clip)
    before = keys(network)

    inserted = insert_shift(network, case.shift, where=case.where, example=clip)

    assert sorted(layer.path for layer in inserted.layers) == sorted(case.paths(network))
    assert keys(network) == before
    assert inserted.parameters[0] == inserted.parameters[1] == sum(p.numel() for p in network.parameters())
    assert inserted.flops[0] == inserted.flops[1] > 1e6
    logits = network(clip)
    assert distance(logits, expected) <= TOLERANCE
    assert distance(plain, expected) > CLEAR
    if not image:
        return
    step = inserted.step_form(clip[:, 0])
    assert distance(stream(step, clip), logits) <= TOLERANCE
    first = step(clip[:, 0], *step.initial_state())
    forgetful = step(clip[:, 1], *step.initial_state())[0]
    assert distance(step(clip[:, 1], *first[1:])[0], logits[:, 1]) <= TOLERANCE
    assert distance(forgetful, logits[:, 1]) > CLEAR


@st.composite
def clips(draw: st.DrawFn) -> Tensor:
    """(N, T, C, H, W) of random numbers, C no multiple of 8 mostly."""
    shape = tuple(draw(st.integers(low, high)) for low, high in ((1, 2), (1, 5), (8, 35), (1, 4), (1, 4)))
    return clip_of(shape, draw(st.integers(0, 2**16)))


def seen_by_the_layer(clip: Tensor, spec: str) -> Tensor:
    network = small(nn.Conv2d(clip.shape[2], 1, 1))
    insert_shift(network, spec, where="0", example=clip)
    seen = []
    network[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    network(clip)
    return seen[0].unflatten(0, clip.shape[:2])


@settings(deadline=None, max_examples=25)
@given(clips())
@torch.no_grad()
def test_tsm_takes_the_first_eighth_from_the_future_and_the_second_from_the_past(clip: Tensor) -> None:
    y = seen_by_the_layer(clip, "tsm")
    frames, share = clip.shape[1], clip.shape[2] // 8
    for t in range(frames):
        after = clip[:, t + 1, :share] if t + 1 < frames else torch.zeros_like(clip[:, t, :share])
        earlier = clip[:, t - 1, share : 2 * share] if t > 0 else torch.zeros_like(clip[:, t, :share])
        assert torch.equal(y[:, t, :share], after)
        assert torch.equal(y[:, t, share : 2 * share], earlier)
        assert torch.equal(y[:, t, 2 * share :], clip[:, t, 2 * share :])


@settings(deadline=None, max_examples=25)
@given(clips())
@torch.no_grad()
def test_online_tsm_takes_the_first_eighth_from_the_past_and_nothing_else(clip: Tensor) -> None:
    y = seen_by_the_layer(clip, "tsm_online")
    share = clip.shape[2] // 8
    for t in range(clip.shape[1]):
        earlier = clip[:, t - 1, :share] if t > 0 else torch.zeros_like(clip[:, t, :share])
        assert torch.equal(y[:, t, :share], earlier)
        assert torch.equal(y[:, t, share:], clip[:, t, share:])


# Where it goes


def test_it_is_at_hand_in_the_package() -> None:
    assert stsm_rt.insert_shift is insert_shift


@torch.no_grad()
def test_a_pattern_names_the_layers() -> None:
    network = small()
    inserted = insert_shift(network, "tsm_online", where="[02].conv", example=SMALL)
    assert [layer.path for layer in inserted.layers] == ["0.conv", "2.conv"]
    seen = {}
    for path in ("0.conv", "1.conv"):
        network.get_submodule(path).register_forward_hook(lambda m, args, y, path=path: seen.update({path: args[0]}))
    clip = clip_of(SMALL.shape)
    network(clip)
    assert not torch.equal(seen["0.conv"], clip[0])
    assert torch.equal(seen["0.conv"][1:, :2], clip[0, :-1, :2])
    assert torch.equal(seen["1.conv"], clip[0] + F.conv2d(seen["0.conv"], *network[0].conv.parameters(), padding=1))


def test_what_was_done_is_printed() -> None:
    assert str(insert_shift(small(), "stsm_online", example=SMALL)).splitlines() == [
        "shift stsm_online by (dt, dh, dw) before 3 layers of Sequential",
        *(
            f"  {i}.conv  Conv2d  (N*T, C, H, W)  16 channels, of which 0:2 by (1, 0, 0), 2:3 by (0, 1, 0), "
            "3:4 by (0, -1, 0), 4:5 by (0, 0, 1), 5:6 by (0, 0, -1)"
            for i in range(3)
        ),
        "parameters 6,960 before, 6,960 after",
        "FLOPs 2,322,432 before, 2,322,432 after, for a clip (N, T, C, H, W) = (1, 4, 16, 6, 7)",
    ]


@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.LayerNorm(16)], ids=["Linear", "LayerNorm"])
@torch.no_grad()
def test_channels_last_pictures_move_in_space_too(layer: nn.Module) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.permute(0, 2, 3, 1))

    network = Last()
    insert_shift(network, "stsm_online", where="layer", example=SMALL)
    clip = clip_of(SMALL.shape)
    convolution = small(nn.Conv2d(16, 1, 1))
    insert_shift(convolution, "stsm_online", where="0", example=SMALL)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    convolution[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    network(clip)
    convolution(clip)
    assert torch.equal(seen[0].permute(0, 3, 1, 2), seen[1])


@torch.no_grad()
def test_it_comes_before_the_hooks_that_a_layer_has() -> None:
    network = small(nn.Conv2d(16, 1, 3))
    network[0].register_forward_pre_hook(lambda module, args: (F.pad(args[0], (1, 1, 1, 1), value=7.0),))
    insert_shift(network, "stsm", where="0", example=SMALL)
    seen: list[Tensor] = []
    network[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    network(clip_of(SMALL.shape))
    assert (seen[0][:, :, 0] == 7).all()


# How it is used


@torch.no_grad()
def test_folded_frames_are_the_clip() -> None:
    network = small()
    insert_shift(network, "stsm", frames=4, example=SMALL)
    clip = clip_of((3, 4, 16, 6, 7))
    assert torch.equal(network(clip.flatten(0, 1)).unflatten(0, (3, 4)), network(clip))
    longer = clip_of((1, 6, 16, 6, 7))
    assert network(longer).shape == longer.shape  # a clip brings its own length


@torch.no_grad()
def test_a_failed_call_leaves_no_length_behind() -> None:
    network = small(Residual(), Residual(), nn.Conv2d(16, 4, 7))
    insert_shift(network, "tsm", frames=2, example=torch.zeros(1, 2, 16, 8, 8))
    folded = clip_of((8, 16, 8, 8))
    expected = network(folded)
    with pytest.raises(RuntimeError):
        network(clip_of((2, 4, 16, 3, 3)))
    part = folded
    for module in network.children():  # as a method beside forward would call them
        part = module(part)
    assert torch.equal(part, expected)


def test_a_dictionary_of_outputs_is_unfolded() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": self.block(x), "mean": self.block.conv.weight.mean()}

    network = Both()
    insert_shift(network, "tsm", example=SMALL)
    output = network(clip_of(SMALL.shape))
    assert output["features"].shape == SMALL.shape
    assert output["mean"].shape == ()


def test_checkpoints_load_before_and_after() -> None:
    plain, shifted = small(), small(Residual(), Residual(), Residual())
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    insert_shift(shifted, "tsm", example=SMALL)
    shifted.load_state_dict(plain.state_dict())
    small().load_state_dict(shifted.state_dict())
    assert [name for name, _ in shifted.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_training_reaches_every_parameter_and_keeps_the_modes() -> None:
    network = small(Residual(), nn.BatchNorm2d(16), Residual()).train()
    network[2].eval()
    statistics = copy.deepcopy(network[1].state_dict())
    insert_shift(network, "stsm", example=SMALL)
    assert network[0].training and not network[2].training
    assert all(torch.equal(value, statistics[key]) for key, value in network[1].state_dict().items())
    network(clip_of((2, 4, 16, 6, 7))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@torch.no_grad()
def test_a_copy_is_a_network_of_its_own() -> None:
    inserted = insert_shift(small(), "tsm_online", example=SMALL)
    twin = copy.deepcopy(inserted)
    clip = clip_of((1, 5, 16, 6, 7))
    expected = inserted.model(clip)
    for parameter in inserted.model.parameters():
        parameter.zero_()
    assert torch.equal(twin.model(clip), expected)
    assert distance(stream(twin.step_form(clip[:, 0]), clip), expected) <= TOLERANCE


# Refusals


def refused(network: nn.Module, spec: ShiftSpec | str = "tsm_online", **options: object) -> str:
    """The sentence; the network is as it was."""
    clip = clip_of((1, 2, 16, 6, 7)) if "example" not in options else options["example"]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules()]
    with pytest.raises(UserError) as caught:
        insert_shift(network, spec, **({"example": clip} | options))  # type: ignore[arg-type]
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules()] == hooks
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_network_without_residual_branches_is_refused() -> None:
    sentence = refused(small(nn.Conv2d(16, 16, 1), nn.ReLU()))
    assert sentence.startswith("Sequential has no residual branch") and "its modules are 0, 1" in sentence


def test_a_pattern_that_matches_nothing_is_refused_with_the_modules() -> None:
    assert "matches where='layer*'; its modules are 0, 0.conv, 1, 1.conv" in refused(small(), where="layer*")


def test_a_second_shift_is_refused() -> None:
    network = small()
    insert_shift(network, "tsm", where="0.conv", example=SMALL)
    assert "holds a shift already" in refused(network, where="1.conv")


def test_a_layer_that_is_too_narrow_is_named() -> None:
    sentence = refused(small(Residual(), nn.Conv2d(16, 8, 1), Residual(8)), "stsm_online")
    assert sentence.startswith("layer 2.conv: shift stsm_online: a group of 1/16 of 8 channels gets none")


def test_a_layer_that_runs_twice_is_named() -> None:
    block = Residual()
    assert refused(small(block, block)).startswith("layer 0.conv runs 2 times")


def test_a_layer_with_the_identity_inside_is_named() -> None:
    sentence = refused(small(), where="1")
    assert sentence.startswith("layer 1 holds a residual connection") and sentence.endswith("its branch, 1.conv")
    assert refused(small(), where="*").startswith("layer 0 holds a residual connection")


def test_two_layers_with_one_input_are_named() -> None:
    network = small(nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()))
    assert refused(network, where="0*").startswith("layers 0 and 0.0 get the same input")


def test_attention_that_takes_its_input_three_times_is_named() -> None:
    network = IMAGE_NETWORKS["tv_vit"].build()
    sentence = refused(network, where="*.self_attention", example=torch.zeros(1, 2, 3, 64, 64))
    assert "encoder_layer_0.self_attention gets its input as 3 of its arguments" in sentence


def test_tokens_do_not_move_in_the_picture() -> None:
    sentence = refused(IMAGE_NETWORKS["tv_vit"].build(), "stsm_online", example=torch.zeros(1, 2, 3, 64, 64))
    assert "layer encoder.layers.encoder_layer_0.ln_1 gets tokens (2, 17, 96)" in sentence
    assert sentence.endswith("such as tsm_online")


def test_windows_are_no_frames() -> None:
    network = IMAGE_NETWORKS["timm_swin_tiny"].build()
    sentence = refused(network, where="layers.0.blocks.0.attn", example=torch.zeros(1, 2, 3, 64, 64))
    assert "layer layers.0.blocks.0.attn gets" in sentence and "whose batch is not the 2 frames" in sentence


class Sequences(nn.Module):
    """Layers that get something else than pictures of frames."""

    def __init__(self) -> None:
        super().__init__()
        self.over_pixels = nn.Conv1d(16, 16, 1)
        self.pooled = nn.Linear(16, 16)
        self.constant = nn.Conv2d(16, 16, 1)
        self.square = nn.Sequential(type("LayerNorm2d", (nn.LayerNorm,), {})(16))

    def forward(self, x: Tensor) -> Tensor:
        square = self.square(x.new_zeros(1, 16, 1, 16) + x.mean((2, 3), keepdim=True))
        y = self.pooled(self.over_pixels(x.flatten(2)).mean(2)) + self.constant(torch.zeros(1, 16, 1, 1)).mean()
        return y + square.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("over_pixels", "layer over_pixels gets (2, 16, 42), expected images (N*T, C, H, W) or tokens (N*T, L, C)"),
        ("pooled", "layer pooled gets (2, 16), expected images"),
        ("constant", "layer constant gets nothing of the frames"),
        ("square.0", "layer square.0 gets (2, 16, 1, 16), in which the channels are the second axis or the last"),
    ],
)
def test_layers_whose_input_is_no_picture_are_named(where: str, sentence: str) -> None:
    assert refused(Sequences(), where=where).startswith(sentence)


def test_a_video_network_needs_an_axis_of_time() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv3d(3, 16, 2, 2)
            self.mixer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return x + self.mixer(x).relu()

    sentence = refused(Tokens(), example=torch.zeros(1, 3, 4, 8, 8))
    assert sentence.startswith("layer mixer gets (1, 32, 16), expected clips with an axis of time")


def test_an_example_that_does_not_fit_is_refused_with_the_reason() -> None:
    assert "does not run on (2, 3, 8, 8): " in refused(small(), example=torch.zeros(1, 2, 3, 8, 8))
    assert "is a clip (N, T, C, H, W), got (2, 16, 8, 8)" in refused(small(), example=torch.zeros(2, 16, 8, 8))


def test_frames_are_of_a_folded_2d_network() -> None:
    assert refused(small(), frames=0).startswith("frames is T of a 2D model's folded clips, at least 1, got 0")
    video = VIDEO_NETWORKS["mc3_18"].build()
    assert refused(video, frames=4, example=torch.zeros(1, 3, 4, 32, 32)).startswith("frames is T of a 2D model's")


def test_a_network_that_runs_only_once_is_left_as_it_was() -> None:
    class Once(Residual):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            if self.runs > 1:
                raise ValueError("no more")
            return super().forward(x)

    assert "does not run on (1, 2, 16, 6, 7): no more; give" in refused(small(Once()))


def test_an_unknown_preset_is_refused() -> None:
    assert "unknown shift 'tms'" in refused(small(), "tms")


@pytest.mark.parametrize(
    ("frames", "shape", "sentence"),
    [
        (None, (4, 16, 6, 7), r"takes clips \(N, T, C, H, W\).*got \(4, 16, 6, 7\)"),
        (None, (16, 6, 7), r"got \(16, 6, 7\)"),
        (4, (6, 16, 6, 7), r"layer 0.conv got 6 frames, which are no clips of T = 4"),
    ],
)
def test_frames_without_a_length_are_refused(frames: int | None, shape: tuple[int, ...], sentence: str) -> None:
    network = small()
    insert_shift(network, "tsm", frames=frames, example=SMALL)
    with pytest.raises(UserError, match=sentence):
        network(torch.zeros(shape))


def test_a_part_of_the_network_alone_does_not_pass_unshifted() -> None:
    network = small()
    insert_shift(network, "tsm", example=SMALL)
    with pytest.raises(UserError, match=r"layer 1.conv got 4 frames, which are no clips of T = None"):
        network[1](torch.zeros(4, 16, 6, 7))


def test_the_example_is_made_up_where_none_is_given() -> None:
    inserted = insert_shift(nn.Sequential(nn.Conv2d(5, 16, 8, 8), Residual()).double(), "tsm")
    assert isinstance(inserted, Insertion)
    assert inserted.clip_shape == (1, 2, 5, 224, 224)
    flow = insert_shift(nn.Sequential(nn.Conv3d(2, 16, 8, 8), nn.ReLU()), "stsm", where="1")
    assert flow.clip_shape == (1, 2, 16, 224, 224)


def test_a_table_of_ones_own_goes_in() -> None:
    spec = ShiftSpec("mine", (ShiftGroup(Fraction(1, 4), dt=-2),))
    inserted = insert_shift(small(), spec, example=SMALL)
    assert inserted.spec is spec
    with pytest.raises(ShiftError, match="shift mine takes channels from later frames"):
        inserted.step_form(SMALL[:, 0])
    assert set(PRESETS) >= {"tsm"}
