from __future__ import annotations

import copy
import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from stsm_rt.errors import UserError
from stsm_rt.networks import (
    ARCHITECTURES,
    InvertedResidual,
    Padding,
    StreamingNetwork,
    residual_branch_starts,
    stream,
)
from stsm_rt.shift import PRESETS, RollingState, ShiftError, ShiftGroup, ShiftSpec, shift_clip

HEIGHT, WIDTH, FRAMES, CLASSES = 64, 80, 16, 7
RATES = (0.5, 0.2, 0.08)
TOLERANCE = 1e-5  # of the largest logit
CLEAR = 1e-2  # a fault shows at least this

EIGHTH = Fraction(1, 8)
TWO_FRAMES = ShiftSpec("two_frames", (ShiftGroup(EIGHTH, dt=2), ShiftGroup(Fraction(1, 16), dh=1)))
MIXED = ShiftSpec(
    "mixed",
    (
        ShiftGroup(EIGHTH, dt=1),
        ShiftGroup(EIGHTH, dt=2),
        ShiftGroup(Fraction(1, 16), dw=-1),
    ),
)
CAUSAL = {spec.name: spec for spec in PRESETS.values() if all(group.dt >= 0 for group in spec.groups)} | {
    spec.name: spec for spec in (TWO_FRAMES, MIXED)
}
RESIDUAL_BRANCHES = {"r18": 8, "r50": 16, "mbv2": 10, "mbv2_torchvision": 10, "lite0": 9, "r8": 3}


def clip_of(frames: int = FRAMES, *, batch: int = 1, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Frames (N, T, H, W, 3) uint8 of soft blobs with some grain, each unlike the one before."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch * frames, 3, 4, 5, generator=generator)
    blobs = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    grain = torch.rand(batch * frames, 3, height, width, generator=generator)
    pixels = (255 * (0.8 * blobs + 0.2 * grain)).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).unflatten(0, (batch, frames)).contiguous()


def residual_blocks(network: nn.Module) -> list[nn.Module]:
    """Every block that adds its branch to an identity or a projection, in order."""
    return [
        module
        for module in network.modules()
        if isinstance(module, BasicBlock | Bottleneck)
        or (isinstance(module, InvertedResidual | tv.mobilenetv2.InvertedResidual) and module.use_res_connect)
    ]


def first_conv(block: nn.Module) -> nn.Conv2d:
    return block.conv1 if isinstance(block, BasicBlock | Bottleneck) else block.conv[0][0]  # type: ignore[index,return-value]


def last_norm(block: nn.Module) -> nn.BatchNorm2d:
    if isinstance(block, Bottleneck):
        return block.bn3
    return block.bn2 if isinstance(block, BasicBlock) else block.conv[-1]  # type: ignore[index,return-value]


@torch.no_grad()
def randomise(network: StreamingNetwork, *, seed: int = 0, branch_gain: float = 0.2) -> StreamingNetwork:
    """Give every batch norm its own statistics, and the classifier logits of order one that vary over time.

    A deep random network amplifies rounding from layer to layer, trained ones hardly do: `branch_gain` is the
    size of what a residual branch adds to its block's input.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    clip = clip_of(seed=seed + 100)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.weight.copy_(uniform(norm.weight, 0.5, 1.5))
        norm.bias.copy_(uniform(norm.bias, -0.3, 0.3))
    for norm in map(last_norm, residual_blocks(network)):
        norm.weight.mul_(branch_gain)
        norm.bias.mul_(branch_gain)
    network.train()
    network.clip_features(clip)
    network.eval()
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean += norm.running_var.sqrt() * uniform(norm.running_mean, -0.1, 0.1)
        norm.running_var *= uniform(norm.running_var, 0.8, 1.25)
    features = network.averages.clip(network.clip_features(clip))
    network.offset.copy_(features.mean((0, 1)))
    network.scale.copy_(uniform(network.scale, 0.5, 1.5))
    network.classifier.weight.copy_(uniform(network.classifier.weight, -1, 1))
    network.classifier.weight.div_(network(clip).std())
    network.classifier.bias.copy_(uniform(network.classifier.bias, -0.2, 0.2))
    return network


def make(
    name: str,
    shift: ShiftSpec | None,
    *,
    head: bool = False,
    padding: Padding | None = None,
    branch_gain: float = 0.2,
) -> StreamingNetwork:
    torch.manual_seed(0)
    network = StreamingNetwork(name, CLASSES, shift=shift, rates=RATES if head else (), changes=head, padding=padding)
    return randomise(network, branch_gain=branch_gain)


def distance(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    assert torch.isfinite(logits).all()
    return float((logits - expected).abs().max() / expected.abs().max())


# The law of the house


@pytest.mark.parametrize("head", [False, True], ids=["frame", "averages"])
@pytest.mark.parametrize("spec", CAUSAL.values(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_stream_equals_the_causal_clip(name: str, spec: ShiftSpec, head: bool) -> None:
    network = make(name, spec, head=head)
    clip = clip_of()
    expected = network(clip)
    assert expected.shape == (1, FRAMES, CLASSES)
    assert 1 < expected.abs().max() < 20
    assert 0.3 < expected.std(1).mean() < 5  # they vary from frame to frame
    assert distance(stream(network, clip), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_what_remains_between_stream_and_clip_is_rounding(name: str) -> None:
    network = make(name, MIXED, branch_gain=1)
    states = network.state_specs(HEIGHT, WIDTH)
    network.double()
    clip = clip_of(8)
    rolling = RollingState([torch.zeros(s.shape, dtype=torch.float64) for s in states], [s.delay for s in states])
    logits = []
    for frame in clip.unbind(1):
        output, *following = network(frame, *rolling.read())
        rolling.write(following)
        logits.append(output)
    assert distance(torch.stack(logits, 1), network(clip)) <= 1e-11


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_odd_sizes_stream_as_well(name: str) -> None:
    network = make(name, PRESETS["stsm_joint_online"], head=True)
    clip = clip_of(5, height=67, width=49)
    assert distance(stream(network, clip), network(clip)) <= TOLERANCE


@torch.no_grad()
def test_streams_in_a_batch_are_the_streams_alone() -> None:
    network = make("r8", MIXED, head=True)
    clip = clip_of(8, batch=3)
    together = stream(network, clip)
    assert distance(together, network(clip)) <= TOLERANCE
    for i in range(3):
        assert distance(together[i : i + 1], network(clip[i : i + 1])) <= TOLERANCE


@torch.no_grad()
def test_a_stream_starts_afresh_each_time() -> None:
    network = make("r8", MIXED, head=True)
    first, other = clip_of(6), clip_of(6, seed=1)
    before = stream(network, first)
    stream(network, other)
    assert torch.equal(stream(network, first), before)


@torch.no_grad()
def tampered_stream(
    network: StreamingNetwork,
    clip: Tensor,
    *,
    zeroed: int | None = None,
    late: int | None = None,
    swapped: tuple[int, int] | None = None,
) -> Tensor:
    """`stream` with a fault: a state that always reads zero, comes a frame late, or is another one."""
    height, width = clip.shape[2:4]
    delays = [spec.delay + (i == late) for i, spec in enumerate(network.state_specs(height, width))]
    rolling = RollingState(network.initial_state(height, width), delays)
    logits = []
    for frame in clip.unbind(1):
        states = rolling.read()
        if zeroed is not None:
            states[zeroed] = torch.zeros_like(states[zeroed])
        if swapped is not None:
            i, j = swapped
            states[i], states[j] = states[j], states[i]
        output, *following = network(frame, *states)
        rolling.write(following)
        logits.append(output)
    return torch.stack(logits, 1)


@pytest.mark.parametrize(
    ("name", "spec", "swaps"),
    [
        ("r8", MIXED, 7),
        ("r18", CAUSAL["tsm_online"], 5),
        ("mbv2", CAUSAL["stsm_joint_online"], 6),
        ("lite0", CAUSAL["stsm_online"], 5),
    ],
    ids=["r8", "r18", "mbv2", "lite0"],
)
@torch.no_grad()
def test_every_state_matters(name: str, spec: ShiftSpec, swaps: int) -> None:
    network = make(name, spec, head=True)
    clip = clip_of(8)
    expected = network(clip)
    assert distance(tampered_stream(network, clip), expected) <= TOLERANCE
    states = network.state_specs(HEIGHT, WIDTH)
    assert len(states) == len(spec.delays) * RESIDUAL_BRANCHES[name] + 3
    broken = {}
    for i, state in enumerate(states):
        broken[f"zeroed {state.name}"] = distance(tampered_stream(network, clip, zeroed=i), expected)
        broken[f"late {state.name}"] = distance(tampered_stream(network, clip, late=i), expected)
    pairs = [p for p in itertools.combinations(range(len(states)), 2) if states[p[0]].shape == states[p[1]].shape]
    for i, j in pairs:
        broken[f"swapped {i}, {j}"] = distance(tampered_stream(network, clip, swapped=(i, j)), expected)
    assert len(pairs) == swaps
    assert {fault: error for fault, error in broken.items() if error < CLEAR} == {}


# Time


@pytest.mark.parametrize("head", [False, True], ids=["frame", "averages"])
@pytest.mark.parametrize("name", ["r8", "r18", "mbv2", "lite0"])
@torch.no_grad()
def test_the_future_never_leaks(name: str, head: bool) -> None:
    network = make(name, CAUSAL["stsm_joint_online"], head=head)
    clip = clip_of(8)
    logits = network(clip)
    for t in (1, 5, 7):
        changed = clip.clone()
        changed[:, t] = clip_of(1, seed=9)[:, 0]
        after = network(changed)
        assert torch.equal(after[:, :t], logits[:, :t])
        assert distance(after[:, t:], logits[:, t:]) > CLEAR


@torch.no_grad()
def test_a_shift_that_looks_ahead_does_see_the_future() -> None:
    network = make("r8", PRESETS["tsm"])
    clip = clip_of(8)
    changed = clip.clone()
    changed[:, 5] = clip_of(1, seed=9)[:, 0]
    assert distance(network(changed)[:, 4], network(clip)[:, 4]) > CLEAR


@pytest.mark.parametrize(("spec", "reach"), [(CAUSAL["tsm_online"], 3), (TWO_FRAMES, 6)], ids=["dt=1", "dt=2"])
@torch.no_grad()
def test_the_shift_remembers_dt_frames_for_each_branch(spec: ShiftSpec, reach: int) -> None:
    network = make("r8", spec)
    clip = clip_of(12)
    changed = clip.clone()
    changed[:, 2] = clip_of(1, seed=9)[:, 0]
    touched = (network(changed) - network(clip)).abs().amax((0, 2)) > 0
    expected = [2 <= t <= 2 + reach and (t - 2) % spec.delays[0] == 0 for t in range(12)]
    assert touched.tolist() == expected


# Where the shift is, and what it costs


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_shift_stands_before_each_branch_and_leaves_the_identity_alone(name: str) -> None:
    spec = CAUSAL["stsm_online"]
    network = make(name, spec)
    blocks = residual_blocks(network)
    assert len(blocks) == len(network.hooks) == RESIDUAL_BRANCHES[name]
    assert residual_branch_starts(network.backbone) == [first_conv(block) for block in blocks]
    into_block, into_conv, out_of_block = {}, {}, {}
    for i, block in enumerate(blocks):
        last_norm(block).weight.zero_()
        last_norm(block).bias.zero_()
        block.register_forward_pre_hook(lambda _, args, i=i: into_block.update({i: args[0]}), prepend=True)
        block.register_forward_hook(lambda _, args, output, i=i: out_of_block.update({i: output}))
        first_conv(block).register_forward_hook(lambda _, args, output, i=i: into_conv.update({i: args[0]}))
    network(clip_of(4))
    for i, block in enumerate(blocks):
        x = into_block[i]
        shifted = shift_clip(x.unflatten(0, (1, 4)), spec).flatten(0, 1)
        assert torch.equal(into_conv[i], shifted)
        assert not torch.equal(shifted, x)
        if isinstance(block, BasicBlock | Bottleneck):
            x = F.relu(x if block.downsample is None else block.downsample(x))
        assert torch.equal(out_of_block[i], x)


@pytest.mark.parametrize("spec", [*CAUSAL.values(), PRESETS["stsm"]], ids=lambda spec: spec.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_and_keys_are_the_plain_networks(name: str, spec: ShiftSpec) -> None:
    plain = StreamingNetwork(name, CLASSES, shift=None)
    shifted = StreamingNetwork(name, CLASSES, shift=spec)
    assert [(k, v.shape) for k, v in shifted.state_dict().items()] == [
        (k, v.shape) for k, v in plain.state_dict().items()
    ]
    assert [(k, p.shape) for k, p in shifted.named_parameters()] == [(k, p.shape) for k, p in plain.named_parameters()]
    shifted.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_flops_are_the_plain_networks(name: str) -> None:
    def flops(spec: ShiftSpec | None, *, step: bool) -> int:
        network = StreamingNetwork(name, CLASSES, shift=spec).eval()
        clip = clip_of(1)
        state = network.initial_state(HEIGHT, WIDTH) if step else []
        with FlopCounterMode(display=False) as counter:
            network(clip[:, 0] if step else clip, *state)
        return counter.get_total_flops()

    plain = flops(None, step=False)
    assert plain > 1e6
    assert flops(None, step=True) == plain
    for spec in CAUSAL.values():
        assert flops(spec, step=False) == plain
        assert flops(spec, step=True) == plain


@pytest.mark.parametrize(
    ("name", "reference"),
    [("r18", tv.resnet18), ("r50", tv.resnet50), ("mbv2", tv.mobilenet_v2)],
    ids=["r18", "r50", "mbv2"],
)
def test_backbone_keys_are_torchvisions(name: str, reference: type[nn.Module]) -> None:
    expected = [k for k in reference().state_dict() if not k.startswith(("fc.", "classifier."))]
    backbone = StreamingNetwork(name, CLASSES, shift=CAUSAL["stsm_online"]).backbone
    assert list(backbone.state_dict()) == expected


@pytest.mark.parametrize(
    ("name", "millions"), [("lite0", 3.371), ("mbv2", 2.224), ("r18", 11.177), ("r50", 23.508), ("r8", 0.307)]
)
def test_backbones_have_their_known_sizes(name: str, millions: float) -> None:
    backbone = StreamingNetwork(name, CLASSES, shift=None).backbone
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(millions * 1e6, abs=1e3)


# The networks themselves


@pytest.mark.parametrize(("height", "width"), [(64, 80), (65, 47)])
@torch.no_grad()
def test_mbv2_with_symmetric_padding_is_torchvisions(height: int, width: int) -> None:
    network = make("mbv2", None, padding="symmetric")
    reference = tv.mobilenet_v2().eval()
    reference.load_state_dict(network.backbone.state_dict(), strict=False)
    x = torch.randn(2, 3, height, width)
    assert torch.equal(network.backbone(x), reference.features(x).mean((2, 3)))


@pytest.mark.parametrize("name", ["r18", "r50"])
@torch.no_grad()
def test_resnets_are_torchvisions_up_to_the_pooling(name: str) -> None:
    network = make(name, None)
    reference = getattr(tv, {"r18": "resnet18", "r50": "resnet50"}[name])().eval()
    reference.load_state_dict(network.backbone.state_dict(), strict=False)
    reference.avgpool = nn.Identity()
    reference.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 80)
    maps = reference(x).unflatten(1, (ARCHITECTURES[name].features, -1))
    torch.testing.assert_close(network.backbone(x), maps.mean(2), rtol=1e-5, atol=1e-6)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Before and after, as TensorFlow's documentation defines SAME."""
    total = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9), (13, 6), (3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["lite0", "mbv2"])
@torch.no_grad()
def test_same_padding_is_tensorflows_for_even_and_odd_sizes(name: str, size: tuple[int, int]) -> None:
    network = StreamingNetwork(name, CLASSES, shift=None)
    assert network.padding == "same"
    strided = [m for m in network.backbone.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 5
    for conv in strided:
        x = torch.randn(1, conv.in_channels, *size)
        (top, bottom), (left, right) = (same_padding(n, k, 2) for n, k in zip(size, conv.kernel_size, strict=True))
        padded = F.pad(x, (left, right, top, bottom))
        y = conv(x)
        assert y.shape[2:] == (-(-size[0] // 2), -(-size[1] // 2))
        assert torch.equal(y, F.conv2d(padded, conv.weight, stride=2, groups=conv.groups))


def test_same_padding_gives_an_odd_pixel_to_the_right_and_below() -> None:
    assert same_padding(64, 3, 2) == (0, 1)
    assert same_padding(65, 3, 2) == (1, 1)
    assert same_padding(64, 5, 2) == (1, 2)
    assert same_padding(65, 5, 2) == (2, 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_only_strided_convolutions_know_the_padding(name: str) -> None:
    symmetric = StreamingNetwork(name, CLASSES, shift=None, padding="symmetric").backbone
    same = StreamingNetwork(name, CLASSES, shift=None, padding="same").backbone
    same.load_state_dict(symmetric.state_dict())
    for ours, theirs in zip(same.modules(), symmetric.modules(), strict=True):
        if not isinstance(ours, nn.Conv2d):
            continue
        assert isinstance(theirs, nn.Conv2d)
        assert theirs.padding == tuple(k // 2 for k in theirs.kernel_size)
        odd, even = torch.randn(1, ours.in_channels, 9, 7), torch.randn(1, ours.in_channels, 8, 6)
        torch.testing.assert_close(ours(odd), theirs(odd))  # where both pad alike
        differs = ours.stride == (2, 2) and ours.kernel_size != (1, 1)
        assert torch.allclose(ours(even), theirs(even), rtol=1e-4, atol=1e-4) != differs


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_frames_are_bgr_and_normalised_inside(name: str) -> None:
    network = make(name, None)
    frames = clip_of(2)[0]
    architecture = ARCHITECTURES[name]
    rgb = torch.from_numpy(frames.numpy()[..., ::-1].copy()).float()
    x = ((rgb - torch.tensor(architecture.mean)) / torch.tensor(architecture.std)).permute(0, 3, 1, 2)
    torch.testing.assert_close(network.pooled(frames), network.backbone(x), rtol=1e-4, atol=1e-5)
    assert distance(network.pooled(frames.flip(-1)), network.backbone(x)) > CLEAR
    clip = frames[None]
    assert torch.equal(network(clip.float()), network(clip))  # augmentation leaves floating pixels


# States


def test_states_are_named_in_order_with_shapes_and_delays() -> None:
    network = make("r8", MIXED, head=True)
    specs = network.state_specs(HEIGHT, WIDTH)
    assert [s.name for s in specs] == [f"state_{i:02d}" for i in range(9)]
    assert [s.shape for s in specs] == [
        *[(1, 4, 32, 40)] * 4,
        *[(1, 8, 16, 20)] * 2,
        (1, 4, 128),
        (1, 4, 1),
        (1, 128),
    ]
    assert [s.delay for s in specs] == [1, 2, 1, 2, 1, 2, 1, 1, 1]
    assert {s.dtype for s in specs} == {"float32"}
    assert [s.shape for s in network.state_specs(HEIGHT, WIDTH, batch=4)] == [(4, *s.shape[1:]) for s in specs]
    _, *following = network(clip_of(1)[:, 0], *network.initial_state(HEIGHT, WIDTH))
    assert [tuple(s.shape) for s in following] == [s.shape for s in specs]


def test_a_plain_network_has_no_state() -> None:
    network = make("r8", None)
    assert network.state_specs(HEIGHT, WIDTH) == ()
    (logits,) = network(clip_of(1)[:, 0])
    assert logits.shape == (1, CLASSES)


def test_half_precision_states_say_so() -> None:
    network = make("r8", CAUSAL["tsm_online"], head=True).half()
    assert {s.dtype for s in network.state_specs(HEIGHT, WIDTH)} == {"float16"}
    assert {s.dtype for s in network.initial_state(HEIGHT, WIDTH)} == {torch.float16}


@pytest.mark.parametrize("name", ["tsm", "stsm"])
def test_a_network_that_looks_ahead_refuses_its_step_form_by_name(name: str) -> None:
    network = StreamingNetwork("r8", CLASSES, shift=PRESETS[name]).eval()
    clip = clip_of(2)
    assert network(clip).shape == (1, 2, CLASSES)
    with pytest.raises(ShiftError, match=f"shift {name} .*{name}_online"):
        network.state_specs(HEIGHT, WIDTH)
    with pytest.raises(ShiftError, match=f"shift {name} "):
        network(clip[:, 0])
    with pytest.raises(ShiftError, match=f"shift {name} "):
        stream(network, clip)


@torch.no_grad()
def test_a_failed_step_leaves_the_clip_form_as_it_was() -> None:
    network = make("r8", MIXED, head=True)
    clip = clip_of(3)
    expected = network(clip)
    state = network.initial_state(HEIGHT, WIDTH)
    with pytest.raises(UserError, match="takes 9 states, got 8"):
        network(clip[:, 0], *state[:-1])
    with pytest.raises(UserError, match="takes 9 states, got 0"):
        network(clip[:, 0])
    with pytest.raises(RuntimeError):
        network(clip[:, 0], state[6], *state[1:])
    assert torch.equal(network(clip), expected)


def test_asking_for_the_states_leaves_a_network_in_training_as_it_was() -> None:
    network = make("r8", CAUSAL["tsm_online"]).train()
    frozen = network.backbone.get_submodule("stem.1").eval()
    before = copy.deepcopy(network.state_dict())
    network.state_specs(HEIGHT, WIDTH)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.training
    assert network.classifier.training
    assert not frozen.training


@torch.no_grad()
def test_a_copy_streams_on_its_own() -> None:
    network = make("r8", MIXED, head=True)
    clip = clip_of(5)
    expected = network(clip)
    duplicate = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.zero_()
    assert not set(map(id, duplicate.hooks)) & set(map(id, network.hooks))
    assert distance(stream(duplicate, clip), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_learns_through_the_clip_form(name: str) -> None:
    network = make(name, CAUSAL["stsm_joint_online"], head=True).train()
    network(clip_of(3)).square().sum().backward()
    still = [k for k, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


# Refusals


def test_an_unknown_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"unknown network 'r19'; there are r18, r50, mbv2, mbv2_torchvision, lite0, r8"
    ):
        StreamingNetwork("r19", CLASSES, shift=None)


def test_an_unknown_padding_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown padding 'SAME'; there are symmetric, same"):
        StreamingNetwork("r8", CLASSES, shift=None, padding="SAME")  # type: ignore[arg-type]


def test_a_shift_that_does_not_fit_a_layer_is_refused_with_the_numbers() -> None:
    thin = ShiftSpec("thin", (ShiftGroup(Fraction(1, 25), dt=1),))
    StreamingNetwork("r8", CLASSES, shift=thin)
    with pytest.raises(ShiftError, match=r"shift thin: a group of 1/25 of 24 channels"):
        StreamingNetwork("lite0", CLASSES, shift=thin)


def test_rates_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(UserError, match="fastest first"):
        StreamingNetwork("r8", CLASSES, shift=None, rates=(0.08, 0.5))
