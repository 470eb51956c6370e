"""The TensorRT engine against a stand-in driver: what it computes, what it frees and what it says.

Nothing here has run on a GPU; ``tests/gpu/test_tensorrt.py`` has what does.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standin_tensorrt import (
    CapturableContext,
    Capture,
    Cuda,
    DataType,
    Plan,
    Runtime,
    TensorIOMode,
    TensorRT,
    cudaError_t,
)

from stsm_rt.engine import host
from stsm_rt.engine import tensorrt as engine_module
from stsm_rt.engine.cuda import Gpu
from stsm_rt.engine.tensorrt import TensorRTEngine
from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest, sha256_of

PLAN = {"runtime": "tensorrt", "runtime_version": "10.3.0", "device": "sm_86"}
AGAIN = (
    r"; build it again on this device with python -m stsm_rt.build_engine "
    r"--network colours --runtime tensorrt --precision fp32$"
)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A GPU; whatever a test does, nothing may be left on it and nothing may have gone wrong."""
    cuda = Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    yield cuda
    gc.collect()
    assert not cuda.faults
    assert not cuda.blocks and not cuda.handles


@pytest.fixture
def library(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    library = TensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    return library


@pytest.fixture(params=[Capture.WORKS, Capture.REFUSED], ids=["graphs", "plain"])
def capture(library: TensorRT, request: pytest.FixtureRequest) -> Capture:
    """Both ways to execute."""
    library.capture = request.param
    return library.capture


def logits_of(engine: TensorRTEngine, frames: np.ndarray, slot: int = 0) -> np.ndarray:
    return np.stack([engine.step(frame[None], [slot])[0].copy() for frame in frames])


def alone(tiny: Any, frames: np.ndarray, slot: int = 0) -> np.ndarray:
    return logits_of(TensorRTEngine(tiny.path, slots=slot + 1), frames, slot)


def resigned(tiny: Any, **fields: Any) -> Path:
    """Write a manifest that vouches for the engine file as it is now."""
    dataclasses.replace(tiny.manifest, sha256=sha256_of(tiny.path), **fields).save(tiny.path)
    return Path(tiny.path)


def refusal(tiny: Any, **options: Any) -> str:
    """The one line in which the engine is refused; nothing is left on the GPU then."""
    with pytest.raises(UserError) as raised:
        TensorRTEngine(tiny.path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("delays", [(1, 1, 1), (1, 1, 2), (2, 1, 3), (3, 3, 3)], ids=str)
def test_steps_equal_the_definition_with_every_delay(make_engine: Any, capture: Capture, delays: Any) -> None:
    tiny = make_engine(delays=delays, **PLAN)
    frames = tiny.frames(15)
    engine = TensorRTEngine(tiny.path)
    expected = tiny.reference(frames)

    assert engine.cuda_graphs is (capture is Capture.WORKS)
    assert np.allclose(logits_of(engine, frames), expected, rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(("delays", "stride"), [((1, 1, 1), 3), ((1, 1, 2), 2), ((2, 1, 1), 3)], ids=str)
def test_an_engine_with_a_stride_equals_as_many_engines_fed_in_turn(
    make_engine: Any, capture: Capture, delays: Any, stride: int
) -> None:
    tiny = make_engine(delays=delays, **PLAN)
    frames = tiny.frames(20)
    engine = TensorRTEngine(tiny.path, stride=stride)
    several = [TensorRTEngine(tiny.path) for _ in range(stride)]
    for t, frame in enumerate(frames):
        if t == 7:
            for each in (engine, *several):
                each.reset()
        assert np.array_equal(engine.step(frame[None]), several[t % stride].step(frame[None]))

    assert engine.stride == stride
    assert engine.cuda_graphs is (capture is Capture.WORKS)


def test_a_batch_has_no_stride(make_engine: Any, library: TensorRT) -> None:
    assert "build it with batch 1" in refusal(make_engine(batch=2, delays=(1, 1, 1), **PLAN), stride=2)


def test_tensorrt_rtx_runs_its_own_plans(make_engine: Any, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", TensorRT(cuda, "1.7.1.116", rtx=True))
    tiny = make_engine(runtime="tensorrt-rtx", runtime_version="1.7.1.116", device="sm_80+")
    frames = tiny.frames(6)

    assert np.allclose(alone(tiny, frames), tiny.reference(frames), rtol=0, atol=1e-4)


def test_interleaved_slots_equal_each_alone_bit_for_bit(make_engine: Any, capture: Capture) -> None:
    tiny = make_engine(**PLAN)
    streams = [tiny.frames(9, seed) for seed in (1, 2, 3)]
    expected = [alone(tiny, stream) for stream in streams]
    engine = TensorRTEngine(tiny.path, slots=3)
    together = [np.empty_like(logits) for logits in expected]
    for t in range(9):
        both = engine.step(np.stack([streams[2][t], streams[0][t]]), [2, 0])
        together[2][t], together[0][t] = both
        # The second stream runs at another pace, so the slots' phases drift apart.
        if t % 2:
            together[1][t // 2] = engine.step(streams[1][t // 2][None], [1])[0]

    assert np.array_equal(together[0], expected[0])
    assert np.array_equal(together[1][:4], expected[1][:4])
    assert np.array_equal(together[2], expected[2])


@pytest.mark.parametrize("steps_before", range(1, 7))
def test_reset_starts_its_slot_again_and_touches_no_other(
    make_engine: Any, capture: Capture, steps_before: int
) -> None:
    tiny = make_engine(**PLAN)
    frames = tiny.frames(12)
    expected = alone(tiny, frames)
    engine = TensorRTEngine(tiny.path, slots=2)
    for frame in frames[:steps_before]:
        engine.step(np.stack([frame, frame]))
    engine.reset([1])

    assert np.array_equal(logits_of(engine, frames, slot=1), expected)
    assert np.array_equal(logits_of(engine, frames[steps_before:], slot=0), expected[steps_before:])
    engine.reset()
    assert np.array_equal(logits_of(engine, frames, slot=0), expected)
    assert np.array_equal(logits_of(engine, frames, slot=1), expected)


def test_nan_in_buffers_that_a_step_does_not_read_never_comes_out(
    make_engine: Any, cuda: Cuda, capture: Capture
) -> None:
    tiny = make_engine(delays=(1, 2, 3), **PLAN)
    frames = tiny.frames(20)
    expected = alone(tiny, frames)
    engine = TensorRTEngine(tiny.path, slots=2)
    for t, frame in enumerate(frames):
        rings = engine._rings[0]
        addresses = rings.phases[rings.phase]
        for state in tiny.manifest.states:
            size = 4 * int(np.prod(state.shape))
            cuda.memory(addresses[f"{state.name}_out"], size, "device")[:] = 0xFF
            for address in [engine._rings[1].phases[0][f"{state.name}_{end}"] for end in ("in", "out")]:
                cuda.memory(address, size, "device")[:] = 0xFF
        cuda.memory(addresses["frame"], frame.nbytes, "device")[:] = 0xFF
        cuda.memory(addresses["logits"], expected[0].nbytes, "device")[:] = 0xFF

        assert np.array_equal(engine.step(frame[None], [0])[0], expected[t])
    engine.reset([1])
    assert np.array_equal(logits_of(engine, frames, slot=1), expected)


def test_the_rows_of_a_batch_equal_each_alone_bit_for_bit(make_engine: Any, cuda: Cuda, capture: Capture) -> None:
    tiny = make_engine(batch=2, delays=(1, 1, 1), **PLAN)
    streams = [tiny.frames(12, seed) for seed in range(2)]
    expected = []
    for slot, stream in enumerate(streams):
        engine = TensorRTEngine(tiny.path, slots=2)
        expected.append(logits_of(engine, stream, slot))
        assert np.allclose(expected[slot], tiny.reference(stream), rtol=0, atol=1e-4)
    engine = TensorRTEngine(tiny.path, slots=2)
    steps = [0, 0]
    for t in range(12):
        chosen = [[1, 0], [1], [0], [0, 1]][t % 4]
        if t == 6:
            engine.reset([1])
            steps[1] = 0
        idle = [slot for slot in range(2) if slot not in chosen]
        engine.frames[idle] = np.random.default_rng(t).integers(0, 256, engine.frames[idle].shape)
        logits = engine.step(np.stack([streams[slot][steps[slot]] for slot in chosen]), chosen)
        for row, slot in zip(logits, chosen, strict=True):
            assert np.array_equal(row, expected[slot][steps[slot]])
            steps[slot] += 1
    assert steps == [9, 4]


def test_nan_in_an_idle_row_stays_there_until_its_reset(make_engine: Any, cuda: Cuda, capture: Capture) -> None:
    tiny = make_engine(batch=2, delays=(1, 1, 1), **PLAN)
    frames = tiny.frames(6)
    expected = logits_of(TensorRTEngine(tiny.path, slots=2), frames, 0)
    engine = TensorRTEngine(tiny.path, slots=2)
    cuda.poison()
    engine.reset([0])
    assert np.array_equal(logits_of(engine, frames, 0), expected)
    assert np.isnan(engine.step(frames[:1], [1])).any()
    engine.reset([1])
    assert np.allclose(logits_of(engine, frames, 1), expected, rtol=0, atol=1e-4)


def test_a_batch_with_unused_rows_reads_the_bound_frames_in_place(make_engine: Any, library: TensorRT) -> None:
    tiny = make_engine(batch=2, delays=(1, 1, 1), **PLAN)
    frames = tiny.frames(2)
    engine = TensorRTEngine(tiny.path, slots=2)
    engine.frames[:] = frames
    expected = np.concatenate([tiny.reference(frame[None]) for frame in frames])
    assert np.allclose(engine.step(engine.frames), expected, rtol=0, atol=1e-4)
    engine.reset()
    assert np.allclose(engine.step(engine.frames, [1, 0])[::-1], expected[::-1], rtol=0, atol=1e-4)


def test_a_frame_is_read_at_its_step_and_never_later(make_engine: Any, capture: Capture) -> None:
    tiny = make_engine(**PLAN)
    frames = tiny.frames(6)
    expected = alone(tiny, frames)
    engine = TensorRTEngine(tiny.path)
    for t, frame in enumerate(frames):
        given = engine.frames if t % 2 else np.ascontiguousarray(frame[::-1])[None, ::-1]  # or a strided view
        given[0] = frame
        logits = engine.step(given)[0].copy()
        given[...] = 255
        engine.frames[...] = 0
        assert np.array_equal(logits, expected[t])


def test_the_logits_are_a_view_that_the_next_step_overwrites(make_engine: Any, library: TensorRT) -> None:
    tiny = make_engine(**PLAN)
    engine = TensorRTEngine(tiny.path)
    first = engine.step(tiny.frames(1))
    kept = first.copy()
    second = engine.step(tiny.frames(1, seed=1))

    assert np.shares_memory(first, second)
    assert not np.array_equal(kept, first)
    assert first.dtype == np.float32 and first.shape == (1, 4)


@pytest.mark.parametrize("bound", [True, False])
def test_a_step_allocates_nothing(make_engine: Any, cuda: Cuda, library: TensorRT, bound: bool) -> None:
    tiny = make_engine(height=96, width=128, **PLAN)
    engine = TensorRTEngine(tiny.path, slots=2)
    frames = engine.frames if bound else tiny.frames(1)[:, ::-1]
    for _ in range(12):
        engine.step(frames, [0])
    calls, graphs = cuda.calls.copy(), cuda.live("executable")
    tracemalloc.start()
    try:
        for _ in range(60):
            engine.step(frames, [0])
        ours = [tracemalloc.Filter(True, module.__file__) for module in (engine_module, host)]
        kept = tracemalloc.take_snapshot().filter_traces(ours)
    finally:
        tracemalloc.stop()

    assert cuda.calls - calls == {"cudaGraphLaunch": 60, "cudaStreamSynchronize": 60}
    assert graphs == 2 * 6
    assert sum(trace.size for trace in kept.traces) < 1024


def test_a_plain_step_is_one_upload_and_one_download(make_engine: Any, cuda: Cuda, library: TensorRT) -> None:
    library.capture = Capture.REFUSED
    tiny = make_engine(**PLAN)
    engine = TensorRTEngine(tiny.path)
    calls = cuda.calls.copy()
    engine.step(engine.frames)

    assert cuda.calls - calls == {"cudaMemcpyAsync": 2, "cudaStreamSynchronize": 1}


@pytest.mark.parametrize("capture", [Capture.REFUSED, Capture.INVALIDATED, Capture.EMPTY, Capture.STALE])
def test_graphs_that_cannot_be_had_or_trusted_are_not_used(
    make_engine: Any, library: TensorRT, capture: Capture
) -> None:
    library.capture = capture
    tiny = make_engine(**PLAN)
    frames = tiny.frames(8)
    engine = TensorRTEngine(tiny.path)

    assert not engine.cuda_graphs
    assert np.allclose(logits_of(engine, frames), tiny.reference(frames), rtol=0, atol=1e-4)


@pytest.mark.parametrize("function", ["cudaStreamBeginCapture", "cudaGraphInstantiate", "cudaGraphLaunch"])
@pytest.mark.parametrize("which", [1, 3])
def test_a_capture_that_cuda_refuses_leaves_plain_execution(
    make_engine: Any, cuda: Cuda, library: TensorRT, function: str, which: int
) -> None:
    code = cudaError_t.cudaErrorStreamCaptureUnsupported
    cuda.failing[function] = lambda count: code if count >= which else None
    tiny = make_engine(**PLAN)
    frames = tiny.frames(8)
    engine = TensorRTEngine(tiny.path)

    assert not engine.cuda_graphs
    assert not cuda.live("graph")
    assert np.allclose(logits_of(engine, frames), tiny.reference(frames), rtol=0, atol=1e-4)


def test_tensorrt_rtx_is_asked_before_it_is_captured(
    make_engine: Any, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = TensorRT(cuda, "1.7.1.116", rtx=True)
    library.capture = Capture.REFUSED
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    tiny = make_engine(runtime="tensorrt-rtx", runtime_version="1.7.1.116", device="sm_86")

    assert not TensorRTEngine(tiny.path).cuda_graphs
    assert not cuda.calls["cudaStreamBeginCapture"]


def test_more_graphs_than_reasonable_are_not_made(make_engine: Any, cuda: Cuda, library: TensorRT) -> None:
    tiny = make_engine(delays=(1, 1, 1), **PLAN)
    assert TensorRTEngine(tiny.path, slots=64).cuda_graphs
    assert not TensorRTEngine(tiny.path, slots=65).cuda_graphs


def test_what_was_rehearsed_leaves_no_trace(make_engine: Any, cuda: Cuda, capture: Capture) -> None:
    tiny = make_engine(**PLAN)
    engine = TensorRTEngine(tiny.path, slots=2)

    assert not engine.frames.any()
    for rings in engine._rings:
        for ring, size in zip(rings.buffers.values(), rings.row_sizes, strict=True):
            assert not any(cuda.memory(address, size, "device").any() for address in ring)


def test_close_frees_the_gpu_and_a_closed_engine_says_so(
    make_engine: Any, cuda: Cuda, library: TensorRT, capture: Capture
) -> None:
    tiny = make_engine(**PLAN)
    engine = TensorRTEngine(tiny.path, slots=2)
    frames, logits = engine.frames, engine.step(tiny.frames(2))
    kept = logits.copy()
    engine.reset()  # work that nobody has waited for
    engine.close()
    engine.close()

    assert {block.kind for block in cuda.blocks.values()} == {"host"} and not cuda.handles
    assert not library.contexts
    with pytest.raises(UserError, match="was closed; open it again"):
        engine.step(frames, [0])
    with pytest.raises(UserError, match="was closed; open it again"):
        engine.reset()
    assert np.array_equal(logits, kept)


def test_frames_and_logits_outlive_their_engine(make_engine: Any, cuda: Cuda, library: TensorRT) -> None:
    tiny = make_engine(**PLAN)
    frame = tiny.frames(1)
    logits = TensorRTEngine(tiny.path).step(frame)
    frames = TensorRTEngine(tiny.path).frames
    gc.collect()
    assert cuda.live("device") == 0 and cuda.live("host") == 2
    frames[...] = 255

    assert np.allclose(logits, tiny.reference(frame), rtol=0, atol=1e-4)
    del logits, frames
    assert not cuda.live("host")


def test_a_plan_of_another_version_is_refused(make_engine: Any, cuda: Cuda, library: TensorRT) -> None:
    library.__version__ = "10.16.1.11"
    tiny = make_engine(**PLAN)
    with pytest.raises(UserError, match=r"version 10\.3\.0, but TensorRT 10\.16\.1\.11 is installed" + AGAIN):
        TensorRTEngine(tiny.path)
    assert not library.opened and not cuda.calls


@pytest.mark.parametrize("device", ["sm_86", "sm_75,sm_87", "sm_89+", "cpu", "any", "sm_", "sm_8x"])
def test_a_plan_for_another_gpu_is_refused_before_it_is_opened(
    make_engine: Any, cuda: Cuda, library: TensorRT, device: str
) -> None:
    cuda.compute_capability = 88
    tiny = make_engine(**PLAN | {"device": device})
    with pytest.raises(UserError, match=f"built for {device.replace('+', '.')}, but this GPU is sm_88{AGAIN}"):
        TensorRTEngine(tiny.path)
    assert not library.opened


@pytest.mark.parametrize(
    ("device", "compute_capability"),
    [("sm_86", 86), ("sm_86,sm_89", 89), ("sm_80+", 80), ("sm_80+", 120), ("sm_120", 120), ("sm_75,sm_80+", 87)],
)
def test_a_plan_for_this_gpu_is_opened(
    make_engine: Any, cuda: Cuda, library: TensorRT, device: str, compute_capability: int
) -> None:
    cuda.compute_capability = compute_capability
    TensorRTEngine(make_engine(**PLAN | {"device": device}).path)


def test_a_damaged_plan_is_refused_by_its_sum_before_it_is_opened(make_engine: Any, library: TensorRT) -> None:
    tiny = make_engine(**PLAN)
    tiny.path.write_bytes(tiny.path.read_bytes()[:-40])
    assert "SHA-256" in refusal(tiny)
    assert not library.opened


def test_a_plan_that_is_exchanged_while_it_is_opened_is_refused(
    make_engine: Any, library: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_engine(**PLAN)
    load = Manifest.load

    def exchanging(path: Path) -> Manifest:
        manifest = load(path)
        path.write_bytes(b"another plan")
        return manifest

    monkeypatch.setattr(Manifest, "load", exchanging)
    assert "changed while it was opened" in refusal(tiny)
    assert not library.opened


def test_a_plan_that_tensorrt_cannot_open_is_refused_with_its_reason(make_engine: Any, library: TensorRT) -> None:
    tiny = make_engine(**PLAN)
    tiny.path.write_bytes(tiny.path.read_bytes()[:-40])
    resigned(tiny)
    with pytest.raises(UserError, match=r"^TensorRT 10\.3\.0 cannot open the engine \S+: the plan is damaged" + AGAIN):
        TensorRTEngine(tiny.path)


def test_a_runtime_that_cannot_be_made_is_said(
    make_engine: Any, library: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(library, "Runtime", failing, raising=False)
    assert "factory function returned nullptr" in refusal(make_engine(**PLAN))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"input_height": 24}, "frame"),
        ({"labels": ("background", "red")}, "logits"),
        ({"states": ()}, "state_00_in"),
    ],
)
def test_a_manifest_that_does_not_match_the_plan_is_refused(
    make_engine: Any, library: TensorRT, fields: dict[str, Any], name: str
) -> None:
    tiny = make_engine(**PLAN)
    resigned(tiny, **fields)
    assert f"the tensor '{name}' of the engine" in refusal(tiny)


@pytest.mark.parametrize(
    ("change", "should", "came"),
    [
        ({"shape": (1, 4)}, r"an input, float32 \[1, 4\]", r"an input, float32 \[1, 3\]"),
        ({"dtype": "float16"}, r"an input, float16 \[1, 3\]", r"an input, float32 \[1, 3\]"),
        ({"name": "state_03"}, r"an input, float32 \[1, 3\]", "absent"),
    ],
)
def test_a_state_that_does_not_match_the_plan_is_refused(
    make_engine: Any, library: TensorRT, change: dict[str, Any], should: str, came: str
) -> None:
    tiny = make_engine(**PLAN)
    *others, last = tiny.manifest.states
    resigned(tiny, states=(*others, dataclasses.replace(last, **change)))
    with pytest.raises(UserError, match=f"should be {should} by its manifest but is {came}{AGAIN}"):
        TensorRTEngine(tiny.path)


def test_a_plan_without_the_input_active_is_no_batch(make_engine: Any, library: TensorRT) -> None:
    tiny = make_engine(delays=(1, 1, 1), **PLAN)
    states = tuple(dataclasses.replace(state, shape=(2, *state.shape[1:])) for state in tiny.manifest.states)
    resigned(tiny, batch=2, states=states)
    assert "the tensor" in refusal(tiny)


def test_a_missing_package_is_said_with_what_to_install(
    make_engine: Any, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_engine(**PLAN)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "pip install tensorrt" in refusal(tiny)
    monkeypatch.setitem(sys.modules, "tensorrt", TensorRT(cuda))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert "pip install 'cuda-bindings==12.*'" in refusal(tiny)


@pytest.mark.parametrize("code", [cudaError_t.cudaErrorNoDevice, cudaError_t.cudaErrorInsufficientDriver])
def test_a_missing_gpu_is_said(make_engine: Any, cuda: Cuda, library: TensorRT, code: cudaError_t) -> None:
    cuda.failing["cudaGetDeviceCount"] = lambda count: code
    refused = refusal(make_engine(**PLAN))
    assert refused.startswith("TensorRT engines need an NVIDIA GPU") and code.name in refused
    assert not library.opened


@pytest.mark.parametrize(("function", "count"), [("cudaMalloc", 2 + 2 * 7), ("cudaHostAlloc", 3)])
def test_every_allocation_that_fails_frees_the_ones_before(
    make_engine: Any, cuda: Cuda, library: TensorRT, function: str, count: int
) -> None:
    tiny = make_engine(**PLAN)
    TensorRTEngine(tiny.path, slots=2)
    assert cuda.calls[function] == count
    for failing in range(1, count + 1):
        cuda.calls.clear()
        cuda.failing[function] = lambda n, at=failing: cudaError_t.cudaErrorMemoryAllocation if n == at else None
        assert "not enough memory for the engine on the GPU" in refusal(tiny, slots=2)
        gc.collect()
        assert not cuda.blocks and not cuda.handles and not library.contexts


@pytest.mark.parametrize(
    "function", ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaStreamCreateWithFlags", "cudaMemsetAsync"]
)
def test_any_other_error_while_opening_is_said_and_frees_everything(
    make_engine: Any, cuda: Cuda, library: TensorRT, function: str
) -> None:
    cuda.failing[function] = lambda count: cudaError_t.cudaErrorIllegalAddress
    assert f"the GPU cannot go on ({function}: cudaErrorIllegalAddress, " in refusal(make_engine(**PLAN))
    assert not cuda.live("device") and not cuda.handles


def test_a_context_that_cannot_be_made_is_said(make_engine: Any, cuda: Cuda, library: TensorRT) -> None:
    library.makes_contexts = False
    refused = refusal(make_engine(**PLAN))
    assert "cannot prepare the engine" in refused and "no memory for activations" in refused
    assert not cuda.live("device") and not cuda.handles


def test_an_execution_that_fails_while_opening_is_said(make_engine: Any, cuda: Cuda, library: TensorRT) -> None:
    library.executes = False
    refused = refusal(make_engine(**PLAN))
    assert "TensorRT 10.3.0 cannot run the engine" in refused and ": enqueueV3 failed; " in refused
    assert not cuda.live("device") and not cuda.handles


def test_a_step_that_fails_is_said_and_can_be_repeated(make_engine: Any, cuda: Cuda, library: TensorRT) -> None:
    library.capture = Capture.REFUSED
    tiny = make_engine(**PLAN)
    frames = tiny.frames(6)
    expected = alone(tiny, frames)
    engine = TensorRTEngine(tiny.path)
    got = []
    for frame in frames:
        library.executes = False
        with pytest.raises(UserError, match=r"^TensorRT 10\.3\.0 cannot run the engine \S+: enqueueV3 failed"):
            engine.step(255 - frame[None])
        library.executes = True
        got.append(engine.step(frame[None])[0].copy())

    assert np.array_equal(np.stack(got), expected)


@pytest.mark.parametrize("function", ["cudaGraphLaunch", "cudaStreamSynchronize"])
def test_a_gpu_that_fails_in_a_step_is_said_and_freed(
    make_engine: Any, cuda: Cuda, library: TensorRT, function: str
) -> None:
    tiny = make_engine(**PLAN)
    engine = TensorRTEngine(tiny.path)
    cuda.failing[function] = lambda count: cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(UserError, match=rf"the GPU cannot go on \({function}: cudaErrorIllegalAddress, illegaladdress"):
        engine.step(tiny.frames(1))
    cuda.failing.clear()
    engine.close()
    assert not cuda.live("device")


@pytest.mark.parametrize("slots", [[2], [-1], [0, 5], ["a"], [0, 0]])
def test_slots_that_do_not_exist_are_refused_before_any_steps(
    make_engine: Any, library: TensorRT, slots: list[Any]
) -> None:
    tiny = make_engine(**PLAN)
    engine = TensorRTEngine(tiny.path, slots=2)
    frames = tiny.frames(3)
    with pytest.raises(UserError, match="slot"):
        engine.step(frames[: len(slots)], slots)
    with pytest.raises(UserError, match="slot"):
        engine.reset(slots)
    assert np.array_equal(logits_of(engine, frames), alone(tiny, frames))


@pytest.mark.parametrize(
    ("options", "slots", "said"),
    [
        ({}, 0, "at least 1, not 0"),
        ({"batch": 2, "delays": (1, 1, 1)}, 3, "from 1 to 2, the engine's batch, not 3"),
        ({"batch": 2, "delays": (1, 1, 2)}, 1, "build it with batch 1"),
        ({"delays": (10, 12, 16)}, 1, "smaller delays"),
    ],
)
def test_slots_and_delays_that_cannot_be_served_are_refused(
    make_engine: Any, options: dict[str, Any], slots: int, said: str
) -> None:
    assert said in refusal(make_engine(**options, **PLAN), slots=slots)


def test_the_module_imports_neither_torch_nor_tensorrt_nor_cuda() -> None:
    code = (
        "import sys; import stsm_rt.engine.tensorrt; "
        "assert not {'torch', 'onnx', 'cv2', 'tensorrt', 'cuda'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_real_cuda_bindings_take_and_give_what_the_stand_in_does() -> None:
    """Holds the stand-in to NVIDIA's package, where that is installed."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for kind in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr"):
        for member in getattr(Cuda, kind):
            assert getattr(getattr(runtime, kind), member.name).value == member.value
    assert runtime.cudaHostAllocDefault == Cuda.cudaHostAllocDefault
    assert runtime.cudaStreamNonBlocking == Cuda.cudaStreamNonBlocking
    for name, standin in inspect.getmembers(Cuda, inspect.isfunction):
        if name.startswith("cuda"):
            parameters = list(inspect.signature(standin).parameters)[1:]
            assert len(inspect.signature(getattr(runtime, name)).parameters) == len(parameters), name


def test_the_real_cuda_bindings_give_errors_as_tuples() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("these calls are safe only where there is no GPU")
    stream, graph, executable = runtime.cudaStream_t(0), runtime.cudaGraph_t(0), runtime.cudaGraphExec_t(0)
    calls = {
        "cudaGetDeviceCount": (),
        "cudaGetDevice": (),
        "cudaDeviceGetAttribute": (runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, 0),
        "cudaMalloc": (16,),
        "cudaHostAlloc": (16, runtime.cudaHostAllocDefault),
        "cudaFree": (4096,),
        "cudaFreeHost": (4096,),
        "cudaMemcpyAsync": (4096, 8192, 4, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, stream),
        "cudaMemsetAsync": (4096, 0, 4, stream),
        "cudaStreamCreateWithFlags": (runtime.cudaStreamNonBlocking,),
        "cudaStreamDestroy": (stream,),
        "cudaStreamSynchronize": (stream,),
        "cudaStreamBeginCapture": (stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
        "cudaStreamEndCapture": (stream,),
        "cudaGraphInstantiate": (graph, 0),
        "cudaGraphLaunch": (executable, stream),
        "cudaGraphDestroy": (graph,),
        "cudaGraphExecDestroy": (executable,),
    }
    functions = {name for name, _ in inspect.getmembers(Cuda, inspect.isfunction) if name.startswith("cuda")}
    assert functions == {*calls, "cudaGetErrorString"}
    for name, arguments in calls.items():
        code, *values = getattr(runtime, name)(*arguments)
        assert isinstance(code, runtime.cudaError_t) and code != runtime.cudaError_t.cudaSuccess, name
        assert len(values) == (name in Cuda.GIVING), name
    assert runtime.cudaGetErrorString(runtime.cudaError_t.cudaErrorMemoryAllocation)[1] == b"out of memory"
    assert int(stream) == 0


def test_the_real_cuda_bindings_without_a_gpu_end_in_one_sentence() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"^TensorRT engines need an NVIDIA GPU [^\n]+$"):
        Gpu()


def test_the_real_tensorrt_has_everything_that_the_stand_in_has() -> None:
    """Holds the stand-in to the bindings of TensorRT-RTX, which are those of TensorRT, where they are installed."""
    trt = pytest.importorskip("tensorrt_rtx")
    for standin, real in ((Runtime, trt.Runtime), (Plan, trt.ICudaEngine), (CapturableContext, trt.IExecutionContext)):
        for name in {name for name, _ in inspect.getmembers(standin, inspect.isfunction)} - {"__init__", "compute"}:
            assert name.startswith("_") or callable(getattr(real, name)), name
    assert isinstance(trt.ICudaEngine.num_io_tensors, property)
    for kind in (DataType, TensorIOMode):
        assert {member.name for member in kind} <= set(getattr(trt, kind.__name__).__members__)
