"""The shift by depthwise convolutions."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stsm_rt.check_weights import random_weights
from stsm_rt.export import export_onnx
from stsm_rt.networks import stream
from stsm_rt.shift import ShiftGroup, ShiftSpec, shift_spec, shift_step
from stsm_rt.shift_folding import FoldedShift, fold_shifts, one_hot_kernel

FRACTIONS = st.sampled_from([Fraction(1, 16), Fraction(1, 8), Fraction(1, 4)])
MOVES = st.integers(-2, 2)


@st.composite
def causal_specs(draw: st.DrawFn) -> ShiftSpec:
    """Any causal spec of up to six groups that fits 16 channels."""
    later = [
        ShiftGroup(draw(FRACTIONS), dt, draw(MOVES), draw(MOVES))
        for dt in sorted(draw(st.lists(st.integers(1, 3), max_size=2)))
    ]
    moves = draw(st.lists(st.tuples(MOVES, MOVES).filter(any), max_size=4))
    within = [ShiftGroup(Fraction(1, 16), 0, dh, dw) for dh, dw in moves]
    return ShiftSpec("drawn", tuple(later + within))


@settings(max_examples=60, deadline=None)
@given(causal_specs(), st.booleans(), st.integers(0, 2**32 - 1))
def test_it_is_the_shift(spec: ShiftSpec, whole: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 16, 5, 4)
    slices = spec.slices(16)
    previous = [torch.randn(2, sum(s.stop - s.start for s in slices if s.dt == dt), 5, 4) for dt in spec.delays]
    expected, kept = shift_step(x, previous, spec)
    got, got_kept = FoldedShift(spec, 16, whole=whole)(x, previous)
    assert torch.equal(got, expected)
    assert len(kept) == len(got_kept)
    assert all(torch.equal(a, b) for a, b in zip(got_kept, kept, strict=True))


def test_a_kernel_has_its_one_where_the_channel_comes_from() -> None:
    kernel = one_hot_kernel(shift_spec("stsm_online").slices(16)[1:], 2, 16)
    assert kernel.shape == (14, 1, 3, 3)
    assert (kernel.sum((1, 2, 3)) == 1).all()
    assert [tuple(index) for index in kernel[:5, 0].nonzero()[:, 1:].tolist()] == [
        (0, 1),
        (2, 1),
        (1, 0),
        (1, 2),
        (1, 1),
    ]


@pytest.mark.parametrize("name", ["r8", "r18", "mbv2", "lite0"])
@pytest.mark.parametrize("shift", ["tsm_online", "stsm_online", "stsm_joint_online"])
def test_a_folded_network_gives_the_same_logits_and_keeps_its_weights(name: str, shift: str) -> None:
    network = random_weights(name, height=64, width=64).network(shift)
    folded = copy.deepcopy(network)
    fold_shifts(folded)
    clip = torch.randint(0, 256, (1, 4, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(stream(folded, clip), stream(network, clip))
    assert folded.state_dict().keys() == network.state_dict().keys()


def operators(shift: str | None, tmp_path: Path, name: str = "lite0") -> list[str]:
    network = random_weights(name, height=64, width=64).network(shift)
    fold_shifts(network)
    export_onnx(network, tmp_path / "graph.onnx", height=64, width=64)
    return [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node]


@pytest.mark.slow
def test_a_block_of_the_graph_has_one_more_convolution_and_no_pad(tmp_path: Path) -> None:
    plain, temporal, both = (operators(shift, tmp_path) for shift in (None, "tsm_online", "stsm_online"))
    blocks = 9
    assert "Pad" not in both
    assert both.count("Conv") == plain.count("Conv") + blocks == temporal.count("Conv") + blocks
    for shifted in (temporal, both):
        assert shifted.count("Concat") == plain.count("Concat") + blocks
        assert shifted.count("Slice") == plain.count("Slice") + 2 * blocks
