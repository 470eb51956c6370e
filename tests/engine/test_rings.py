"""Rings: a stride of k makes one engine of k that are fed in turn, with every runtime and every delay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stsm_rt.engine import Engine
from stsm_rt.errors import UserError

WEIGHTS = Path(__file__).parents[2] / "engines" / "actions_lite0.safetensors"
DELAYS = [(1, 1, 1), (1, 1, 2), (2, 1, 3)]

Open = Callable[[int], Engine]


def in_turn(engines: list[Engine], frames: np.ndarray, reset_at: int) -> np.ndarray:
    """The logits of engines that are given one frame after the other, all of them reset before one of the frames."""
    logits = []
    for t, frame in enumerate(frames):
        if t == reset_at:
            for engine in engines:
                engine.reset()
        logits.append(engines[t % len(engines)].step(frame[None])[0].copy())
    return np.stack(logits)


def check(open_engine: Open, frames: np.ndarray, stride: int, reset_at: int) -> None:
    whole = open_engine(stride)
    assert whole.stride == stride
    expected = in_turn([open_engine(1) for _ in range(stride)], frames, reset_at)
    assert np.array_equal(in_turn([whole], frames, reset_at), expected)


@settings(max_examples=25, deadline=None)
@given(delays=st.sampled_from(DELAYS), stride=st.integers(1, 5), reset_at=st.integers(1, 20), seed=st.integers(0, 9))
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_engine_with_a_stride_equals_as_many_engines_fed_in_turn(
    make_engine: Any, runtime: str, delays: Any, stride: int, reset_at: int, seed: int
) -> None:
    pytest.importorskip(runtime)
    tiny = make_engine(runtime=runtime, delays=delays)
    check(lambda k: Engine.open(tiny.path, threads=1, stride=k), tiny.frames(20, seed), stride, reset_at)


@pytest.mark.parametrize(("stride", "reset_at"), [(2, 0), (3, 5)])
def test_the_same_in_pytorch_with_delays_of_one_and_two(stride: int, reset_at: int) -> None:
    pytest.importorskip("torch")
    from stsm_rt.check_weights import moving_clip, random_weights
    from stsm_rt.engine.torch import TorchEngine
    from stsm_rt.shift import ShiftGroup, ShiftSpec

    weights = random_weights("r8", height=32, width=40)
    shift = ShiftSpec("one_and_two", (ShiftGroup(Fraction(1, 8), dt=1), ShiftGroup(Fraction(1, 8), dt=2)))
    spec = dataclasses.replace(weights.spec, shift=shift.to_json())
    network = spec.build()
    network.load_state_dict(weights.tensors)
    network.eval()
    frames = moving_clip(16, 32, 40, seed=0)
    check(lambda k: TorchEngine(network, spec, stride=k, device="cpu"), frames, stride, reset_at)


def test_a_wrong_stride_is_noticed(tiny_engine: Any) -> None:
    frames = tiny_engine.frames(9)
    two = in_turn([Engine.open(tiny_engine.path, stride=2)], frames, 0)
    three = in_turn([Engine.open(tiny_engine.path, stride=3)], frames, 0)
    assert abs(two - three).max() > 1e-2


def test_every_slot_has_the_stride(tiny_engine: Any) -> None:
    streams = [tiny_engine.frames(9, seed) for seed in (1, 2)]
    alone = [in_turn([Engine.open(tiny_engine.path, stride=3)], stream, 0) for stream in streams]
    engine = Engine.open(tiny_engine.path, slots=2, stride=3)
    together = np.stack([engine.step(np.stack(pair)).copy() for pair in zip(*streams, strict=True)])
    assert np.array_equal(together, np.stack(alone, axis=1))


def test_weights_take_a_stride() -> None:
    pytest.importorskip("torch")
    assert Engine.open(WEIGHTS, stride=2).stride == 2


def test_strides_that_cannot_be_served_are_refused(make_engine: Any, tiny_engine: Any) -> None:
    with pytest.raises(UserError, match="the stride must be at least 1, not 0"):
        Engine.open(tiny_engine.path, stride=0)
    batch = make_engine(batch=2, delays=(1, 1, 1)).path
    assert Engine.open(batch).stride == 1
    with pytest.raises(UserError, match=r"has batch 2, .* at a stride of 3; export it with batch 1"):
        Engine.open(batch, stride=3)
    with pytest.raises(UserError, match=r"at a stride of 12 .* repeat after 12025 steps.* with a smaller stride"):
        Engine.open(make_engine(delays=(1, 2, 3)).path, stride=12)
