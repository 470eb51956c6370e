"""The PyTorch engine on the CPU: the same rings and slots as on a GPU, without CUDA graphs."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

from stsm_rt.check_weights import moving_clip, random_weights
from stsm_rt.engine.torch import TorchEngine
from stsm_rt.errors import UserError
from stsm_rt.model import ModelSpec
from stsm_rt.networks import StreamingNetwork, stream
from stsm_rt.shift import ShiftGroup, ShiftSpec, shift_spec

HEIGHT, WIDTH, FRAMES = 32, 40, 9
WEIGHTS = random_weights("r8", height=HEIGHT, width=WIDTH)
EIGHTH = Fraction(1, 8)
TWO_FRAMES = ShiftSpec("two_frames", (ShiftGroup(EIGHTH, dt=2), ShiftGroup(EIGHTH, dh=1)))
ONE_AND_TWO = ShiftSpec("one_and_two", (ShiftGroup(EIGHTH, dt=1), ShiftGroup(EIGHTH, dt=2)))


def model(shift: ShiftSpec | None) -> tuple[StreamingNetwork, ModelSpec]:
    spec = dataclasses.replace(WEIGHTS.spec, shift=shift.to_json() if shift else None)
    network = spec.build()
    network.load_state_dict(WEIGHTS.tensors)
    return network.eval(), spec


def open_engine(shift: ShiftSpec | None = TWO_FRAMES, slots: int = 1) -> TorchEngine:
    return TorchEngine(*model(shift), slots=slots, device="cpu")


def clip(seed: int = 0) -> np.ndarray:
    return moving_clip(FRAMES, HEIGHT, WIDTH, seed=seed)


def played(engine: TorchEngine, frames: np.ndarray, slot: int = 0) -> np.ndarray:
    return np.stack([engine.step(frame[None], [slot])[0].copy() for frame in frames])


@pytest.mark.parametrize(
    "shift",
    [None, shift_spec("tsm_online"), shift_spec("stsm_joint_online"), TWO_FRAMES, ONE_AND_TWO],
    ids=lambda shift: shift.name if shift else "plain",
)
def test_steps_equal_the_stream_and_the_clip(shift: ShiftSpec | None) -> None:
    network, spec = model(shift)
    frames = torch.from_numpy(clip())[None]
    with torch.no_grad():
        whole = network(frames)[0].numpy()
    logits = played(TorchEngine(network, spec, device="cpu"), clip())

    assert np.abs(whole - whole[0]).max() > 0.1 * np.abs(whole).max()  # the frames differ, so a wrong delay would show
    for expected in (whole, stream(network, frames)[0].numpy()):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_interleaved_slots_equal_each_alone_bit_for_bit() -> None:
    streams = [clip(seed) for seed in (1, 2, 3)]
    alone = [played(open_engine(), frames) for frames in streams]
    engine = open_engine(slots=3)
    for t in range(FRAMES):
        both = engine.step(np.stack([streams[2][t], streams[0][t]]), [2, 0])
        assert np.array_equal(both, [alone[2][t], alone[0][t]])
        # The second stream runs at another pace, so the slots' phases drift apart.
        if t % 3:
            second = t // 3 * 2 + t % 3 - 1
            assert np.array_equal(engine.step(streams[1][second][None], [1])[0], alone[1][second])


def test_a_reset_slot_starts_again_and_the_others_go_on() -> None:
    frames, engine = clip(), open_engine(slots=2)
    expected = played(open_engine(), frames)
    for frame in frames[:4]:
        engine.step(np.stack([frame, frame]))
    engine.reset([1])

    assert np.array_equal(played(engine, frames, slot=1), expected)
    assert np.array_equal(played(engine, frames[4:], slot=0), expected[4:])
    engine.reset()
    assert np.array_equal(played(engine, frames, slot=0), expected)


def test_the_bound_buffers_are_read_and_written_in_place() -> None:
    frames, engine = clip(), open_engine()
    expected = played(open_engine(), frames)
    first = engine.step(frames[:1])
    engine.frames[0] = frames[1]
    second = engine.step(engine.frames)

    assert np.shares_memory(first, second)
    assert np.array_equal(second, expected[1:2])
    # An array that is not contiguous is taken by value.
    assert np.array_equal(engine.step(frames[2:3, ::-1][:, ::-1]), expected[2:3])


def test_the_given_network_is_left_as_it_was() -> None:
    network, spec = model(TWO_FRAMES)
    network.train()
    TorchEngine(network, spec, device="cpu", precision="fp16").step(clip()[:1])

    assert network.training and network.classifier.weight.requires_grad
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_half_precision_is_close_to_single() -> None:
    network, spec = model(TWO_FRAMES)
    engine = TorchEngine(network, spec, device="cpu", precision="fp16")
    expected = played(open_engine(), clip())

    assert {state.dtype for state in engine.manifest.states} == {"float16"}
    difference = np.abs(played(engine, clip()) - expected).max() / np.abs(expected).max()
    assert 0 < difference < 2e-2


def test_the_manifest_says_what_runs() -> None:
    manifest = open_engine(ONE_AND_TWO).manifest

    assert (manifest.runtime, manifest.device, manifest.precision) == ("torch", "cpu", "fp32")
    assert (manifest.input_height, manifest.input_width, manifest.batch) == (HEIGHT, WIDTH, 1)
    assert manifest.labels == WEIGHTS.spec.labels and manifest.shift == ONE_AND_TWO.to_json()
    assert {state.delay for state in manifest.states} == {1, 2}


def test_it_can_be_opened_with_the_manifest_of_another_engine() -> None:
    network, spec = model(TWO_FRAMES)
    first = TorchEngine(network, spec, device="cpu")
    second = TorchEngine(network, first.manifest, device="cpu")

    assert second.manifest == first.manifest
    with pytest.raises(UserError, match="batch of 1, not 2"):
        TorchEngine(network, dataclasses.replace(first.manifest, batch=2), device="cpu")


def test_what_cannot_be_served_is_refused_before_any_step() -> None:
    engine = open_engine(slots=2)
    frames = clip()[:2]
    for wrong, slots in (
        (frames[:1], None),
        (frames, [0]),
        (frames.astype(np.float32), None),
        (frames[:, :-1], None),
        (frames[0], [0]),
        (frames.tolist(), None),
        (frames, [0, 2]),
        (frames, [0, 0]),
    ):
        with pytest.raises(UserError):
            engine.step(wrong, slots)
    assert np.array_equal(engine.step(frames), open_engine(slots=2).step(frames))
    with pytest.raises(UserError, match="later frames"):
        TorchEngine(*model(shift_spec("tsm")), device="cpu")
    with pytest.raises(UserError, match="at least 1"):
        open_engine(slots=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        TorchEngine(*model(TWO_FRAMES))
