"""The OpenVINO engine: exact, bound once, and clear about what does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from stsm_rt.engine import Engine, embedded_engine
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.engine.openvino import OpenVINOEngine
from stsm_rt.errors import UserError
from stsm_rt.manifest import manifest_path, sha256_of


@pytest.fixture(autouse=True)
def _openvino() -> None:
    if find_spec("openvino") is None:
        message = "OpenVINO is not installed: pip install 'stsm-rt[openvino]'"
        if os.environ.get("CI") == "true" and find_spec("torch") is not None:
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture
def tiny(make_engine: Any) -> Any:
    return make_engine(runtime="openvino")


def logits_of(engine: Engine, frames: np.ndarray, slot: int = 0) -> np.ndarray:
    return np.stack([engine.step(frame[None], [slot])[0].copy() for frame in frames])


def resigned(tiny: Any, **fields: Any) -> Path:
    """Write a manifest that vouches for the engine file as it is now."""
    dataclasses.replace(tiny.manifest, sha256=sha256_of(tiny.path), **fields).save(tiny.path)
    return Path(tiny.path)


@pytest.mark.parametrize("delays", [(1, 1, 1), (1, 1, 2), (2, 1, 3), (3, 3, 3)], ids=str)
def test_steps_equal_the_definition_with_every_delay(make_engine: Any, delays: tuple[int, int, int]) -> None:
    tiny = make_engine(runtime="openvino", delays=delays)
    frames = tiny.frames(15)
    expected = tiny.reference(frames)
    assert np.allclose(logits_of(OpenVINOEngine(tiny.path), frames), expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_the_shipped_network_equals_onnx_runtime(tmp_path: Path) -> None:
    path = tmp_path / "actions.onnx"
    path.write_bytes(embedded_engine().read_bytes())
    theirs = OnnxRuntimeEngine(embedded_engine())
    dataclasses.replace(theirs.manifest, runtime="openvino").save(path)
    ours = OpenVINOEngine(path)
    frames = np.random.default_rng(0).integers(0, 256, (8, *ours.frames.shape[1:]), np.uint8)
    expected = logits_of(theirs, frames)
    assert abs(logits_of(ours, frames) - expected).max() <= 1e-4 * abs(expected).max()


def test_interleaved_slots_equal_each_alone_bit_for_bit(tiny: Any) -> None:
    streams = [tiny.frames(9, seed) for seed in (1, 2, 3)]
    alone = [logits_of(OpenVINOEngine(tiny.path), stream) for stream in streams]
    engine = OpenVINOEngine(tiny.path, slots=3)
    together = [np.empty_like(logits) for logits in alone]
    for t in range(9):
        both = engine.step(np.stack([streams[2][t], streams[0][t]]), [2, 0])
        together[2][t], together[0][t] = both
        # The second stream runs at another pace, so the slots' phases drift apart.
        if t % 2:
            together[1][t // 2] = engine.step(streams[1][t // 2][None], [1])[0]
    assert np.array_equal(together[0], alone[0])
    assert np.array_equal(together[1][:4], alone[1][:4])
    assert np.array_equal(together[2], alone[2])


def test_all_slots_in_order_is_the_default(tiny: Any) -> None:
    frames = tiny.frames(2)
    named = OpenVINOEngine(tiny.path, slots=2).step(frames, [0, 1]).copy()
    assert np.array_equal(OpenVINOEngine(tiny.path, slots=2).step(frames), named)


@pytest.mark.parametrize("steps_before", range(1, 7))
def test_reset_starts_its_slot_again_and_touches_no_other(tiny: Any, steps_before: int) -> None:
    frames = tiny.frames(12)
    expected = logits_of(OpenVINOEngine(tiny.path), frames)
    engine = OpenVINOEngine(tiny.path, slots=2)
    for frame in frames[:steps_before]:
        engine.step(np.stack([frame, frame]))
    engine.reset([1])
    assert np.array_equal(logits_of(engine, frames, slot=1), expected)
    assert np.array_equal(logits_of(engine, frames[steps_before:], slot=0), expected[steps_before:])
    engine.reset()
    assert np.array_equal(logits_of(engine, frames, slot=0), expected)
    assert np.array_equal(logits_of(engine, frames, slot=1), expected)


def test_a_non_contiguous_frame_is_read_anew_at_every_step(tiny: Any) -> None:
    wide = np.zeros((1, 12, 32, 3), np.uint8)
    view = wide[:, ::-1, ::2, ::-1]
    assert not view.flags.c_contiguous
    frames = tiny.frames(5)
    engine = OpenVINOEngine(tiny.path)
    got = []
    for frame in frames:
        view[0] = frame
        got.append(engine.step(view)[0].copy())
    assert np.array_equal(np.stack(got), logits_of(OpenVINOEngine(tiny.path), frames))


def test_no_buffer_is_both_input_and_output_of_a_step(make_engine: Any) -> None:
    tiny = make_engine(runtime="openvino", delays=(1, 2, 3))
    engine = OpenVINOEngine(tiny.path, slots=2)
    states = [state.name for state in tiny.manifest.states]
    written = []
    for rings in engine._rings:
        assert len(rings.steps) == 12
        for step in rings.steps:
            (request,) = step.args
            inputs = {request.get_tensor(name).data.ctypes.data for name in ("frame", *(f"{s}_in" for s in states))}
            outputs = {request.get_tensor(f"{s}_out").data.ctypes.data for s in states}
            assert len(inputs | outputs | {request.get_tensor("logits").data.ctypes.data}) == 8
            written.append(outputs)
    assert not set.union(*written[:12]) & set.union(*written[12:])


def test_states_are_written_where_they_were_bound(tiny: Any) -> None:
    engine = OpenVINOEngine(tiny.path)
    (rings,) = engine._rings
    for frame in tiny.frames(4):
        phase = rings.phase
        engine.step(frame[None])
        ring = rings.buffers["state_00"]
        assert np.allclose(ring[phase % len(ring)][0], frame / np.float32(255), rtol=0, atol=1e-6)


def test_the_bound_frames_are_read_in_place(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OpenVINOEngine(tiny.path)
    frames = tiny.frames(3)
    expected = logits_of(OpenVINOEngine(tiny.path), frames)

    def refused(*arguments: Any) -> None:
        raise AssertionError("a copy was made")

    monkeypatch.setattr(np, "copyto", refused)
    for frame, logits in zip(frames, expected, strict=True):
        engine.frames[0] = frame
        assert np.array_equal(engine.step(engine.frames)[0], logits)


@pytest.mark.parametrize("bound", [True, False])
def test_a_step_allocates_nothing_that_grows_with_the_frame(make_engine: Any, bound: bool) -> None:
    tiny = make_engine(runtime="openvino", height=96, width=128)
    engine = OpenVINOEngine(tiny.path)
    frames = engine.frames if bound else tiny.frames(1)[:, ::-1]
    for _ in range(12):
        engine.step(frames)
    peaks, kept = [], []
    tracemalloc.start()
    try:
        # Several times: now and then some small objects of OpenVINO's wrapper wait in a pool, which stops growing.
        for _ in range(5):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            for _ in range(60):
                engine.step(frames)
            after, peak = tracemalloc.get_traced_memory()
            peaks.append(peak - before)
            kept.append(after - before)
    finally:
        tracemalloc.stop()
    assert min(peaks) < 4096 and max(peaks) < frames.nbytes
    assert min(kept) < 1024


def test_the_logits_are_a_view_that_the_next_step_overwrites(tiny: Any) -> None:
    engine = OpenVINOEngine(tiny.path)
    first = engine.step(tiny.frames(1))
    kept = first.copy()
    second = engine.step(tiny.frames(1, seed=1))
    assert np.shares_memory(first, second)
    assert not np.array_equal(kept, first)
    assert first.dtype == np.float32 and first.shape == (1, 4)


def test_a_batch_serves_its_rows_independently(make_engine: Any) -> None:
    tiny = make_engine(runtime="openvino", batch=3, delays=(1, 1, 1))
    streams = [tiny.frames(8, seed) for seed in range(3)]
    expected = [tiny.reference(stream) for stream in streams]
    engine = OpenVINOEngine(tiny.path, slots=3)
    steps = [0, 0, 0]
    for t in range(8):
        chosen = [[2, 0, 1], [1], [0, 2], [0, 1, 2]][t % 4]
        if t == 5:
            engine.reset([2])
            steps[2] = 0
        logits = engine.step(np.stack([streams[slot][steps[slot]] for slot in chosen]), chosen)
        for row, slot in zip(logits, chosen, strict=True):
            assert np.allclose(row, expected[slot][steps[slot]], rtol=0, atol=1e-4)
            steps[slot] += 1
    assert steps == [6, 6, 2]


def test_an_idle_row_cannot_reach_the_other_whatever_lies_in_its_memory(make_engine: Any) -> None:
    tiny = make_engine(runtime="openvino", batch=2, delays=(1, 1, 1))
    streams = [tiny.frames(12, seed) for seed in (1, 2)]
    alone = [logits_of(OpenVINOEngine(tiny.path, slots=2), stream, slot) for slot, stream in enumerate(streams)]
    noise = np.random.default_rng(0)
    engine = OpenVINOEngine(tiny.path, slots=2)
    (rings,) = engine._rings
    steps = [0, 0]
    for t in range(16):
        slot = (t // 3) % 2
        engine.frames[1 - slot] = noise.integers(0, 256, engine.frames.shape[1:], np.uint8)
        for ring in rings.buffers.values():
            ring[rings.phase % len(ring)][:] = np.nan  # about to be written
        logits = engine.step(streams[slot][steps[slot]][None], [slot])
        assert np.array_equal(logits[0], alone[slot][steps[slot]])
        steps[slot] += 1
    assert steps == [9, 7]
    engine.reset([0])
    assert np.array_equal(logits_of(engine, streams[0], slot=0), alone[0])
    assert np.array_equal(logits_of(engine, streams[1][7:], slot=1), alone[1][7:])


def test_a_batch_with_unused_rows_reads_the_bound_frames_in_place(make_engine: Any) -> None:
    tiny = make_engine(runtime="openvino", batch=2, delays=(1, 1, 1))
    frames = tiny.frames(2)
    engine = OpenVINOEngine(tiny.path, slots=2)
    engine.frames[:] = frames
    expected = np.concatenate([tiny.reference(frame[None]) for frame in frames])
    assert np.allclose(engine.step(engine.frames), expected, rtol=0, atol=1e-4)
    engine.reset()
    assert np.allclose(engine.step(engine.frames, [1, 0])[::-1], expected[::-1], rtol=0, atol=1e-4)
    only = OpenVINOEngine(tiny.path, slots=1)
    assert np.allclose(only.step(frames[:1]), expected[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "came"),
    [
        (np.zeros((1, 12, 17, 3), np.uint8), r"not uint8 \(1, 12, 17, 3\)"),
        (np.zeros((1, 12, 16, 3), np.float32), "not float32"),
        ([[0]], "not list"),
        (np.zeros((2, 12, 16, 3), np.uint8), r"2 frame\(s\) for 1 slot"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tiny: Any, frames: Any, came: str) -> None:
    with pytest.raises(UserError, match=came):
        OpenVINOEngine(tiny.path).step(frames)


@pytest.mark.parametrize("slots", [[2], [-1], [0, 5], ["a"], [0, 0]])
def test_slots_that_do_not_exist_are_refused_before_any_steps(tiny: Any, slots: list[Any]) -> None:
    engine = OpenVINOEngine(tiny.path, slots=2)
    frames = tiny.frames(3)
    with pytest.raises(UserError, match="slot"):
        engine.step(frames[: len(slots)], slots)
    with pytest.raises(UserError, match="slot"):
        engine.reset(slots)
    assert np.array_equal(logits_of(engine, frames), logits_of(OpenVINOEngine(tiny.path), frames))


@pytest.mark.parametrize("options", [{"slots": 0}, {"threads": 0}, {"slots": -3}])
def test_numbers_below_one_are_refused(tiny: Any, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        OpenVINOEngine(tiny.path, **options)


def test_more_slots_than_a_batch_has_rows_are_refused(make_engine: Any) -> None:
    tiny = make_engine(runtime="openvino", batch=2, delays=(1, 1, 1))
    with pytest.raises(UserError, match="from 1 to 2"):
        OpenVINOEngine(tiny.path, slots=3)


def test_a_batch_with_a_longer_delay_is_refused(make_engine: Any) -> None:
    with pytest.raises(UserError, match="export it with batch 1"):
        OpenVINOEngine(make_engine(runtime="openvino", batch=2, delays=(1, 1, 2)).path)


def test_delays_that_hardly_ever_repeat_are_refused(make_engine: Any) -> None:
    with pytest.raises(UserError, match="smaller delays"):
        OpenVINOEngine(make_engine(runtime="openvino", delays=(10, 12, 16)).path)


def test_an_absent_engine_or_manifest_is_said(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(UserError, match="there is no engine file"):
        OpenVINOEngine(tmp_path / "none.onnx")
    manifest_path(tiny.path).unlink()
    with pytest.raises(UserError, match="has no manifest"):
        OpenVINOEngine(tiny.path)


def test_a_damaged_file_is_refused_by_its_sum(tiny: Any) -> None:
    tiny.path.write_bytes(tiny.path.read_bytes()[:-40])
    with pytest.raises(UserError, match="SHA-256"):
        OpenVINOEngine(tiny.path)


@pytest.mark.parametrize("keep", [0, 1, 100, 400, -40])
def test_a_truncated_graph_is_refused_in_one_line_and_the_log_is_silent(
    tiny: Any, keep: int, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.path.write_bytes(tiny.path.read_bytes()[:keep])
    with pytest.raises(UserError) as raised:
        OpenVINOEngine(resigned(tiny))
    assert "export the engine again" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"input_height": 24}, "frame"),
        ({"labels": ("background", "red")}, "logits"),
        ({"states": ()}, "state_00_in"),
    ],
)
def test_a_manifest_that_does_not_match_the_graph_is_refused(tiny: Any, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'"):
        OpenVINOEngine(resigned(tiny, **fields))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"shape": (1, 4)}, "state_02_in"),
        ({"dtype": "float16"}, "state_02_in"),
        ({"name": "state_03"}, "state_03_in"),
    ],
)
def test_a_state_that_does_not_match_the_graph_is_refused(tiny: Any, change: dict[str, Any], name: str) -> None:
    *others, last = tiny.manifest.states
    with pytest.raises(UserError, match=f"'{name}'"):
        OpenVINOEngine(resigned(tiny, states=(*others, dataclasses.replace(last, **change))))


@pytest.mark.parametrize("end", ["in", "out"])
def test_a_graph_that_lacks_a_declared_state_is_refused(tiny: Any, end: str) -> None:
    model = onnx.load(tiny.path)
    nodes = model.graph.node
    if end == "out":
        nodes.remove(next(node for node in nodes if node.output[0] == "state_02_out"))
        model.graph.output.pop()
    else:
        next(node for node in nodes if node.op_type == "Concat").input[3] = "mean"
        model.graph.input.pop()
    onnx.save(model, tiny.path)
    with pytest.raises(UserError, match=f"'state_02_{end}'.* is absent"):
        OpenVINOEngine(resigned(tiny))


def test_full_precision_and_the_threads_that_were_asked_for(tiny: Any) -> None:
    compiled = OpenVINOEngine(tiny.path, threads=1)._compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("NUM_STREAMS") == 1


def test_a_missing_package_is_said(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'stsm-rt\[openvino\]'$"):
        OpenVINOEngine(tiny.path)


def test_an_engine_runs_without_torch_and_opencv(tiny: Any) -> None:
    code = (
        "import sys; from stsm_rt.engine.openvino import OpenVINOEngine; "
        "engine = OpenVINOEngine(sys.argv[1]); engine.step(engine.frames); "
        "assert not {'torch', 'cv2', 'onnx', 'nncf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny.path)], check=True, timeout=60)


def test_the_manifest_names_the_runtime(tiny: Any) -> None:
    assert json.loads(manifest_path(tiny.path).read_text())["runtime"] == "openvino"
    assert OpenVINOEngine(tiny.path).manifest.runtime == "openvino"
