from __future__ import annotations

import itertools
import json
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stsm_rt.errors import UserError
from stsm_rt.shift import (
    PRESETS,
    RollingState,
    ShiftError,
    ShiftGroup,
    ShiftSpec,
    shift_clip,
    shift_spec,
    shift_step,
)

CAUSAL_PRESETS = ("tsm_online", "stsm_online", "stsm_joint_online")
AHEAD_PRESETS = ("tsm", "stsm")
MIXED = ShiftSpec(
    "mixed",
    (
        ShiftGroup(Fraction(1, 8), dt=2, dh=1),
        ShiftGroup(Fraction(1, 8), dt=2),
        ShiftGroup(Fraction(1, 16), dt=1, dw=-1),
        ShiftGroup(Fraction(1, 8), dt=1, dh=-1, dw=1),
        ShiftGroup(Fraction(1, 16), dh=1),
    ),
)


@st.composite
def specs(draw: st.DrawFn, *, dts: tuple[int, ...], reach: int, max_channels: int = 12) -> tuple[ShiftSpec, int]:
    """A random table of groups and displacements, and a number of channels that it fits.

    The fractions are such that C * fraction is often no whole number.
    """
    channels = draw(st.integers(1, max_channels))
    around = range(-reach, reach + 1)
    groups: list[ShiftGroup] = []
    free = channels
    for dt in (*draw(st.permutations([dt for dt in dts if dt])), 0):
        moves = [(dh, dw) for dh in around for dw in around if (dt, dh, dw) != (0, 0, 0)]
        for dh, dw in draw(st.lists(st.sampled_from(moves), max_size=3)) if moves else []:
            if free == 0:
                break
            count = draw(st.integers(1, free))
            free -= count
            surplus = draw(st.sampled_from([Fraction(0), Fraction(1, 3), Fraction(6, 7)]))
            fraction = min((count + surplus) / channels, Fraction(1))
            groups.append(ShiftGroup(fraction, dt, dh, dw))
    assume(groups)
    return ShiftSpec("drawn", tuple(groups)), channels


def shapes() -> st.SearchStrategy[tuple[int, int, int, int]]:
    """N, T, H, W."""
    return st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))


def clip_of(n: int, t: int, channels: int, h: int, w: int, seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, t, channels, h, w, generator=generator, **options)


def displacements(spec: ShiftSpec, channels: int) -> list[tuple[int, int, int]]:
    """For each channel (dt, dh, dw), from the definition alone."""
    moves = []
    for group in spec.groups:
        count = channels * group.fraction.numerator // group.fraction.denominator
        moves += [(group.dt, group.dh, group.dw)] * count
    return moves + [(0, 0, 0)] * (channels - len(moves))


def one_hot_convolution(x: Tensor, spec: ShiftSpec) -> Tensor:
    """The shift as a depthwise 3x3x3 convolution, for displacements of at most one."""
    channels = x.shape[2]
    kernels = torch.zeros(channels, 1, 3, 3, 3, dtype=x.dtype)
    for channel, (dt, dh, dw) in enumerate(displacements(spec, channels)):
        kernels[channel, 0, 1 - dt, 1 - dh, 1 - dw] = 1
    return F.conv3d(x.transpose(1, 2), kernels, padding=1, groups=channels).transpose(1, 2)


def indexed(x: Tensor, spec: ShiftSpec) -> Tensor:
    """The shift by its formula, one number at a time."""
    n, frames, channels, height, width = x.shape
    values = x.tolist()
    y = torch.zeros_like(x)
    moves = displacements(spec, channels)
    for i, t, c, h, w in itertools.product(*map(range, (n, frames, channels, height, width))):
        dt, dh, dw = moves[c]
        if 0 <= t - dt < frames and 0 <= h - dh < height and 0 <= w - dw < width:
            y[i, t, c, h, w] = values[i][t - dt][c][h - dh][w - dw]
    return y


def streamed(x: Tensor, spec: ShiftSpec) -> Tensor:
    """The step form, fed frame by frame from a state of zeros."""
    counts = [sum(channel_dt == dt for channel_dt, _, _ in displacements(spec, x.shape[2])) for dt in spec.delays]
    zeros = [x.new_zeros(x.shape[0], count, *x.shape[3:]) for count in counts]
    rolling = RollingState(zeros, spec.delays)
    frames = []
    for frame in x.unbind(1):
        y, following = shift_step(frame, rolling.read(), spec)
        assert [s.shape for s in following] == [z.shape for z in zeros]
        rolling.write(following)
        frames.append(y)
    return torch.stack(frames, 1)


# Clip form


@settings(deadline=None)
@given(specs(dts=(-1, 1), reach=1), shapes(), st.integers(0, 2**16))
def test_the_clip_form_is_a_one_hot_depthwise_convolution(
    fitted: tuple[ShiftSpec, int], shape: tuple[int, int, int, int], seed: int
) -> None:
    spec, channels = fitted
    n, t, h, w = shape
    x = clip_of(n, t, channels, h, w, seed)
    torch.testing.assert_close(shift_clip(x, spec), one_hot_convolution(x, spec), rtol=0, atol=0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("channels", [16, 24, 35])
def test_every_preset_is_its_one_hot_depthwise_convolution(name: str, channels: int) -> None:
    x = clip_of(2, 5, channels, 6, 7)
    spec = shift_spec(name)
    y = shift_clip(x, spec)
    assert torch.equal(y, one_hot_convolution(x, spec))
    assert not torch.equal(y, x)


@settings(deadline=None, max_examples=40)
@given(specs(dts=(-3, -1, 1, 2), reach=3, max_channels=6), shapes(), st.integers(0, 2**16))
def test_larger_displacements_follow_the_formula(
    fitted: tuple[ShiftSpec, int], shape: tuple[int, int, int, int], seed: int
) -> None:
    spec, channels = fitted
    n, t, h, w = shape
    x = clip_of(n, t, channels, h, w, seed)
    assert torch.equal(shift_clip(x, spec), indexed(x, spec))


def test_directions_are_those_of_the_documentation() -> None:
    x = torch.arange(2 * 4 * 2 * 2, dtype=torch.float32).view(1, 2, 4, 2, 2) + 1
    quarter = Fraction(1, 4)
    spec = ShiftSpec("each", (ShiftGroup(quarter, dt=1), ShiftGroup(quarter, dh=1), ShiftGroup(quarter, dw=1)))
    y = shift_clip(x, spec)
    assert torch.equal(y[0, 1, 0], x[0, 0, 0])  # dt = 1: from the frame before
    assert not y[0, 0, 0].any()
    assert torch.equal(y[0, :, 1, 1], x[0, :, 1, 0])  # dh = 1: from the row above
    assert not y[0, :, 1, 0].any()
    assert torch.equal(y[0, :, 2, :, 1], x[0, :, 2, :, 0])  # dw = 1: from the column to the left
    assert not y[0, :, 2, :, 0].any()
    assert torch.equal(y[0, :, 3], x[0, :, 3])


@settings(deadline=None, max_examples=40)
@given(specs(dts=(-1, 1), reach=1, max_channels=8), shapes(), st.integers(0, 2**16))
def test_the_gradient_is_that_of_the_convolution(
    fitted: tuple[ShiftSpec, int], shape: tuple[int, int, int, int], seed: int
) -> None:
    spec, channels = fitted
    n, t, h, w = shape
    x = clip_of(n, t, channels, h, w, seed).requires_grad_()
    weights = clip_of(n, t, channels, h, w, seed + 1)
    (ours,) = torch.autograd.grad((shift_clip(x, spec) * weights).sum(), x)
    (reference,) = torch.autograd.grad((one_hot_convolution(x, spec) * weights).sum(), x)
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [*PRESETS.values(), MIXED], ids=lambda spec: spec.name)
def test_the_gradient_agrees_with_finite_differences(spec: ShiftSpec) -> None:
    x = clip_of(1, 3, 16, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_clip(x, spec), (x,))


def test_a_shift_multiplies_nothing_and_stores_no_activation() -> None:
    x = clip_of(1, 3, 16, 4, 4, requires_grad=True)
    spec = shift_spec("stsm_joint_online")
    stored: list[Tensor] = []

    def store(saved: Tensor) -> Tensor:
        stored.append(saved)
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(store, lambda saved: saved),
        FlopCounterMode(display=False) as counter,
    ):
        y = shift_clip(x, spec)
    assert stored == []
    assert counter.get_total_flops() == 0
    assert set(y.flatten().tolist()) <= {0.0, *x.flatten().tolist()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_type_of_the_numbers_is_kept(dtype: torch.dtype) -> None:
    x = clip_of(1, 4, 16, 3, 3).to(dtype)
    y = shift_clip(x, MIXED)
    assert y.dtype == dtype
    assert torch.equal(y.double(), shift_clip(x.double(), MIXED))
    assert torch.equal(streamed(x, MIXED), y)


def test_any_memory_layout_gives_the_same_numbers() -> None:
    x = clip_of(2, 4, 16, 5, 6)
    expected = shift_clip(x, MIXED)
    before = x.clone()
    channels_last = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 4))
    time_inside = x.transpose(1, 2).contiguous().transpose(1, 2)
    for y in (channels_last, time_inside, torch.stack([x, x], -1)[..., 0]):
        assert not y.is_contiguous()
        assert torch.equal(shift_clip(y, MIXED), expected)
        assert torch.equal(streamed(y, MIXED), expected)
    repeated = x[:, :1].expand(-1, 4, -1, -1, -1)
    assert torch.equal(shift_clip(repeated, MIXED), shift_clip(repeated.contiguous(), MIXED))
    assert torch.equal(x, before)  # and the input is left alone


# Step form


@settings(deadline=None)
@given(specs(dts=(1, 2, 3), reach=2), shapes(), st.integers(0, 2**16))
def test_the_step_form_equals_the_clip_form(
    fitted: tuple[ShiftSpec, int], shape: tuple[int, int, int, int], seed: int
) -> None:
    spec, channels = fitted
    n, t, h, w = shape
    x = clip_of(n, t, channels, h, w, seed)
    assert torch.equal(streamed(x, spec), shift_clip(x, spec))


@pytest.mark.parametrize(
    "spec",
    [
        *(PRESETS[name] for name in CAUSAL_PRESETS),
        ShiftSpec("two", (ShiftGroup(Fraction(1, 8), dt=2),)),
        MIXED,
    ],
    ids=lambda spec: spec.name,
)
def test_a_stream_of_sixteen_frames_equals_the_clip(spec: ShiftSpec) -> None:
    x = clip_of(2, 16, 32, 5, 6)
    y = shift_clip(x, spec)
    assert torch.equal(streamed(x, spec), y)
    assert torch.equal(y, indexed(x, spec))


def test_a_spec_keeps_one_slice_for_each_delay_in_channel_order() -> None:
    assert MIXED.delays == (2, 1)
    assert [PRESETS[name].delays for name in CAUSAL_PRESETS] == [(1,)] * 3
    _, following = shift_step(
        x := clip_of(1, 1, 16, 2, 2)[:, 0], [torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 2, 2)], MIXED
    )
    assert torch.equal(following[0], x[:, :4])
    assert torch.equal(following[1], x[:, 4:7])


def test_a_spec_without_groups_moves_nothing() -> None:
    spec = ShiftSpec("none", ())
    x = clip_of(1, 2, 3, 2, 2)
    assert torch.equal(shift_clip(x, spec), x)
    assert torch.equal(streamed(x, spec), x)


@pytest.mark.parametrize("name", AHEAD_PRESETS)
def test_a_spec_that_looks_ahead_refuses_its_step_form_by_name(name: str) -> None:
    with pytest.raises(ShiftError, match=rf"shift {name} .*frame by frame; use .*{name}_online"):
        shift_step(torch.zeros(1, 16, 2, 2), [torch.zeros(1, 2, 2, 2)] * 2, shift_spec(name))
    with pytest.raises(ShiftError, match=rf"shift {name} "):
        _ = shift_spec(name).delays


def test_a_table_of_ones_own_that_looks_ahead_is_refused_by_its_name() -> None:
    spec = ShiftSpec("mine", (ShiftGroup(Fraction(1, 4), dt=-2, dh=1),))
    with pytest.raises(ShiftError, match=r"shift mine .*use a causal one such as stsm_online"):
        shift_step(torch.zeros(1, 4, 2, 2), [], spec)


def test_a_rolling_state_reads_what_was_written_delay_frames_before() -> None:
    rolling = RollingState([torch.tensor(0.0), torch.tensor(0.0)], [1, 3])
    seen = []
    for t in range(1, 6):
        seen.append([int(s) for s in rolling.read()])
        rolling.write([torch.tensor(float(t))] * 2)
    assert seen == [[0, 0], [1, 0], [2, 0], [3, 1], [4, 2]]


# Specs


def test_the_presets_are_those_of_the_design() -> None:
    def rows(name: str) -> list[tuple[str, int, int, int]]:
        return [(str(g.fraction), g.dt, g.dh, g.dw) for g in PRESETS[name].groups]

    around = [("1/16", 0, 1, 0), ("1/16", 0, -1, 0), ("1/16", 0, 0, 1), ("1/16", 0, 0, -1)]
    assert rows("tsm") == [("1/8", -1, 0, 0), ("1/8", 1, 0, 0)]
    assert rows("tsm_online") == [("1/8", 1, 0, 0)]
    assert sorted(rows("stsm")) == sorted([("1/8", -1, 0, 0), ("1/8", 1, 0, 0), *around])
    assert rows("stsm_online") == [("1/8", 1, 0, 0), *around]
    assert rows("stsm_joint_online") == [("1/8", 1, 0, 0), *((f, 1, dh, dw) for f, _, dh, dw in around)]


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown shift 'tms'.*tsm, tsm_online, stsm, stsm_online"):
        shift_spec("tms")


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 40))
def test_a_group_takes_the_floor_of_its_share(channels: int, numerator: int, denominator: int) -> None:
    assume(numerator <= denominator)
    spec = ShiftSpec("one", (ShiftGroup(Fraction(numerator, denominator), dt=1),))
    expected = channels * numerator // denominator
    if expected == 0:
        with pytest.raises(ShiftError):
            spec.slices(channels)
    else:
        (taken,) = spec.slices(channels)
        assert (taken.start, taken.stop) == (0, expected)


def test_groups_take_consecutive_channels() -> None:
    slices = shift_spec("stsm_online").slices(24)
    assert [(s.start, s.stop) for s in slices] == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]


def test_a_group_without_a_channel_is_refused_with_the_numbers() -> None:
    with pytest.raises(ShiftError, match=r"stsm_online: a group of 1/16 of 15 channels.* at least 16"):
        shift_clip(torch.zeros(1, 1, 15, 2, 2), shift_spec("stsm_online"))
    spec = ShiftSpec("odd", (ShiftGroup(Fraction(2, 7), dt=1),))
    with pytest.raises(ShiftError, match=r"2/7 of 3 channels.* at least 4"):
        spec.slices(3)
    assert spec.slices(4)[0].stop == 1


def test_groups_beyond_the_channels_are_refused_with_the_numbers() -> None:
    spec = ShiftSpec("much", (ShiftGroup(Fraction(2, 3), dt=1), ShiftGroup(Fraction(1, 2), dh=1)))
    with pytest.raises(ShiftError, match=r"shift much: the groups need 7 channels, the layer has 6"):
        shift_step(torch.zeros(1, 6, 2, 2), [torch.zeros(1, 4, 2, 2)], spec)


@pytest.mark.parametrize("fraction", [Fraction(0), Fraction(-1, 8), Fraction(9, 8)])
def test_a_fraction_out_of_range_is_refused(fraction: Fraction) -> None:
    with pytest.raises(ShiftError, match=rf"bad: a fraction lies in \(0, 1\], got {fraction}"):
        ShiftSpec("bad", (ShiftGroup(fraction, dt=1),))


def test_a_group_that_moves_nowhere_is_refused() -> None:
    with pytest.raises(ShiftError, match="moves nowhere"):
        ShiftSpec("still", (ShiftGroup(Fraction(1, 8)),))


@pytest.mark.parametrize("dts", [(0, 1), (1, 2, 1), (1, 0, 2)])
def test_temporal_groups_out_of_place_are_refused(dts: tuple[int, ...]) -> None:
    with pytest.raises(ShiftError, match="temporal groups come first") as caught:
        ShiftSpec("loose", tuple(ShiftGroup(Fraction(1, 8), dt=dt, dh=1) for dt in dts))
    assert str(list(dts)) in str(caught.value)


# JSON


@given(specs(dts=(-2, -1, 1, 2), reach=3))
def test_a_spec_survives_json(fitted: tuple[ShiftSpec, int]) -> None:
    spec, _ = fitted
    assert ShiftSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_json_is_the_documented_one() -> None:
    assert shift_spec("tsm_online").to_json() == {
        "name": "tsm_online",
        "groups": [{"fraction": "1/8", "dt": 1, "dh": 0, "dw": 0}],
    }


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "3",
        '"tsm"',
        "{}",
        '{"name": "x"}',
        '{"groups": []}',
        '{"name": "x", "groups": 1}',
        '{"name": "x", "groups": "abc"}',
        '{"name": "x", "groups": [3]}',
        '{"name": "x", "groups": [{"dt": 1, "dh": 0, "dw": 0}]}',
        '{"name": "x", "groups": [{"fraction": "1/8", "dt": 1, "dh": 0}]}',
        '{"name": "x", "groups": [{"fraction": "a/8", "dt": 1, "dh": 0, "dw": 0}]}',
        '{"name": "x", "groups": [{"fraction": "1/0", "dt": 1, "dh": 0, "dw": 0}]}',
        '{"name": "x", "groups": [{"fraction": Infinity, "dt": 1, "dh": 0, "dw": 0}]}',
        '{"name": "x", "groups": [{"fraction": null, "dt": 1, "dh": 0, "dw": 0}]}',
        '{"name": "x", "groups": [{"fraction": "1/8", "dt": 1.5, "dh": 0, "dw": 0}]}',
        '{"name": "x", "groups": [{"fraction": "1/8", "dt": "1", "dh": 0, "dw": 0}]}',
        '{"name": "x", "groups": [{"fraction": "1/8", "dt": null, "dh": 0, "dw": 0}]}',
        '{"name": "x", "groups": [{"fraction": "9/8", "dt": 1, "dh": 0, "dw": 0}]}',
    ],
)
def test_malformed_json_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ShiftError) as caught:
        ShiftSpec.from_json(json.loads(text))
    assert "\n" not in str(caught.value)
    assert "fraction" in str(caught.value)
