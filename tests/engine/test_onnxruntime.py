"""The ONNX Runtime engine: exact, without copies, and clear about what does not fit."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from stsm_rt.engine import Engine, base, embedded_engine
from stsm_rt.engine.host import physical_cores
from stsm_rt.errors import UserError
from stsm_rt.manifest import manifest_path, sha256_of


def logits_of(engine: Engine, frames: np.ndarray, slot: int = 0) -> np.ndarray:
    return np.stack([engine.step(frame[None], [slot])[0].copy() for frame in frames])


def resigned(tiny: Any, **fields: Any) -> Path:
    """Write a manifest that vouches for the engine file as it is now."""
    dataclasses.replace(tiny.manifest, sha256=sha256_of(tiny.path), **fields).save(tiny.path)
    return Path(tiny.path)


class Bindings:
    """What every IOBinding was given: binding -> graph name -> address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: dict[Any, dict[str, int]] = defaultdict(dict)
        self.outputs: dict[Any, dict[str, int]] = defaultdict(dict)
        for method, into in (("bind_ortvalue_input", self.inputs), ("bind_ortvalue_output", self.outputs)):
            monkeypatch.setattr(ort.IOBinding, method, self._recording(getattr(ort.IOBinding, method), into))

    @staticmethod
    def _recording(original: Any, into: dict[Any, dict[str, int]]) -> Any:
        def bind(binding: ort.IOBinding, name: str, value: ort.OrtValue) -> None:
            into[binding][name] = value.data_ptr()
            original(binding, name, value)

        return bind


@pytest.mark.parametrize("delays", [(1, 1, 1), (1, 1, 2), (2, 1, 3), (3, 3, 3)], ids=str)
def test_steps_equal_the_definition_with_every_delay(make_engine: Any, delays: tuple[int, int, int]) -> None:
    tiny = make_engine(delays=delays)
    frames = tiny.frames(15)
    expected = tiny.reference(frames)
    assert np.allclose(logits_of(Engine.open(tiny.path), frames), expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_the_reference_notices_a_wrong_delay(make_engine: Any) -> None:
    right, wrong = make_engine(delays=(1, 1, 2)), make_engine(delays=(1, 1, 1))
    frames = right.frames(6)
    assert abs(right.reference(frames) - wrong.reference(frames)).max() > 1e-2


def test_interleaved_slots_equal_each_alone_bit_for_bit(tiny_engine: Any) -> None:
    streams = [tiny_engine.frames(9, seed) for seed in (1, 2, 3)]
    alone = [logits_of(Engine.open(tiny_engine.path), stream) for stream in streams]
    engine = Engine.open(tiny_engine.path, slots=3)
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


def test_all_slots_in_order_is_the_default(tiny_engine: Any) -> None:
    frames = tiny_engine.frames(2)
    named = Engine.open(tiny_engine.path, slots=2).step(frames, [0, 1]).copy()
    assert np.array_equal(Engine.open(tiny_engine.path, slots=2).step(frames), named)


@pytest.mark.parametrize("steps_before", range(1, 7))
def test_reset_starts_its_slot_again_and_touches_no_other(tiny_engine: Any, steps_before: int) -> None:
    frames = tiny_engine.frames(12)
    expected = logits_of(Engine.open(tiny_engine.path), frames)
    engine = Engine.open(tiny_engine.path, slots=2)
    for frame in frames[:steps_before]:
        engine.step(np.stack([frame, frame]))
    engine.reset([1])
    assert np.array_equal(logits_of(engine, frames, slot=1), expected)
    assert np.array_equal(logits_of(engine, frames[steps_before:], slot=0), expected[steps_before:])
    engine.reset()
    assert np.array_equal(logits_of(engine, frames, slot=0), expected)
    assert np.array_equal(logits_of(engine, frames, slot=1), expected)


def test_a_non_contiguous_frame_is_read_anew_at_every_step(tiny_engine: Any) -> None:
    wide = np.zeros((1, 12, 32, 3), np.uint8)
    view = wide[:, ::-1, ::2, ::-1]
    assert not view.flags.c_contiguous
    frames = tiny_engine.frames(5)
    engine = Engine.open(tiny_engine.path)
    got = []
    for frame in frames:
        view[0] = frame
        got.append(engine.step(view)[0].copy())
    assert np.array_equal(np.stack(got), logits_of(Engine.open(tiny_engine.path), frames))


def test_no_buffer_is_both_input_and_output_of_a_step(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(monkeypatch)
    Engine.open(make_engine(delays=(1, 2, 3)).path, slots=2)
    assert len(bindings.inputs) == 2 * 12
    for binding, inputs in bindings.inputs.items():
        addresses = [*inputs.values(), *bindings.outputs[binding].values()]
        assert len(inputs) == 4
        assert len(set(addresses)) == len(addresses) == 8


def test_outputs_stay_in_the_arrays_that_were_bound(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(monkeypatch)
    engine = Engine.open(tiny_engine.path)
    addresses = set()
    for frame in tiny_engine.frames(12):
        addresses.add(engine.step(frame[None]).ctypes.data)
    assert len(addresses) == 1
    assert len(bindings.outputs) == 6
    for binding, outputs in bindings.outputs.items():
        assert [value.data_ptr() for value in binding.get_outputs()] == list(outputs.values())
        assert outputs["logits"] in addresses


def test_slots_share_no_state_buffer(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(monkeypatch)
    Engine.open(tiny_engine.path, slots=2)
    first, second = ({a for o in half for n, a in o.items() if n != "logits"} for half in halves(bindings.outputs))
    assert first and second and not first & second


def halves(outputs: dict[Any, dict[str, int]]) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    values = list(outputs.values())
    return values[: len(values) // 2], values[len(values) // 2 :]


def test_the_bound_frames_are_read_in_place(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(monkeypatch)
    engine = Engine.open(tiny_engine.path)
    assert {inputs["frame"] for inputs in bindings.inputs.values()} == {engine.frames.ctypes.data}
    monkeypatch.setattr(np, "copyto", lambda *_: pytest.fail("the bound frames were copied"))
    frames = tiny_engine.frames(4)
    got = []
    for frame in frames:
        engine.frames[0] = frame
        got.append(engine.step(engine.frames)[0].copy())
    monkeypatch.undo()
    assert np.array_equal(np.stack(got), logits_of(Engine.open(tiny_engine.path), frames))


@pytest.mark.parametrize("bound", [True, False])
def test_a_step_allocates_nothing_that_grows_with_the_frame(make_engine: Any, bound: bool) -> None:
    tiny = make_engine(height=96, width=128)
    engine = Engine.open(tiny.path)
    frames = engine.frames if bound else tiny.frames(1)[:, ::-1]
    # In its first hundred or so calls ONNX Runtime 1.23 keeps 100 bytes of each, and then no more.
    for _ in range(300):
        engine.step(frames)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(60):
            engine.step(frames)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 4096 < frames.nbytes
    assert after - before < 1024


def test_the_logits_are_a_view_that_the_next_step_overwrites(tiny_engine: Any) -> None:
    engine = Engine.open(tiny_engine.path)
    first = engine.step(tiny_engine.frames(1))
    kept = first.copy()
    second = engine.step(tiny_engine.frames(1, seed=1))
    assert np.shares_memory(first, second)
    assert not np.array_equal(kept, first)
    assert first.dtype == np.float32 and first.shape == (1, 4)


def test_colours_are_named_with_confidence(tiny_engine: Any) -> None:
    engine = Engine.open(tiny_engine.path)
    for channel, label in ((None, "background"), (0, "blue"), (1, "green"), (2, "red")):
        engine.reset()
        engine.frames[:] = 0
        if channel is not None:
            engine.frames[..., channel] = 255
        for _ in range(6):
            logits = engine.step(engine.frames)[0]
        probabilities = np.exp(logits) / np.exp(logits).sum()
        assert probabilities[tiny_engine.manifest.labels.index(label)] > 0.9


def test_a_batch_serves_its_rows_independently(make_engine: Any) -> None:
    tiny = make_engine(batch=3, delays=(1, 1, 1))
    streams = [tiny.frames(8, seed) for seed in range(3)]
    expected = [tiny.reference(stream) for stream in streams]
    engine = Engine.open(tiny.path, slots=3)
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


def test_a_batch_with_unused_rows_reads_the_bound_frames_in_place(make_engine: Any) -> None:
    tiny = make_engine(batch=2, delays=(1, 1, 1))
    frames = tiny.frames(2)
    engine = Engine.open(tiny.path, slots=2)
    engine.frames[:] = frames
    expected = np.concatenate([tiny.reference(frame[None]) for frame in frames])
    assert np.allclose(engine.step(engine.frames), expected, rtol=0, atol=1e-4)
    engine.reset()
    assert np.allclose(engine.step(engine.frames, [1, 0])[::-1], expected[::-1], rtol=0, atol=1e-4)
    only = Engine.open(tiny.path, slots=1)
    assert np.allclose(only.step(frames[:1]), expected[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "came"),
    [
        (np.zeros((1, 12, 17, 3), np.uint8), r"not uint8 \(1, 12, 17, 3\)"),
        (np.zeros((12, 16, 3), np.uint8), r"not uint8 \(12, 16, 3\)"),
        (np.zeros((1, 12, 16, 3), np.float32), "not float32"),
        ([[0]], "not list"),
        (np.zeros((2, 12, 16, 3), np.uint8), r"2 frame\(s\) for 1 slot"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tiny_engine: Any, frames: Any, came: str) -> None:
    with pytest.raises(UserError, match=came):
        Engine.open(tiny_engine.path).step(frames)


@pytest.mark.parametrize("slots", [[2], [-1], [0, 5], ["a"], [1.0], [0, 0]])
def test_slots_that_do_not_exist_are_refused_before_any_steps(tiny_engine: Any, slots: list[Any]) -> None:
    engine = Engine.open(tiny_engine.path, slots=2)
    frames = tiny_engine.frames(3)
    with pytest.raises(UserError, match="slot"):
        engine.step(frames[: len(slots)], slots)
    with pytest.raises(UserError, match="slot"):
        engine.reset(slots)
    assert np.array_equal(logits_of(engine, frames), logits_of(Engine.open(tiny_engine.path), frames))


@pytest.mark.parametrize("options", [{"slots": 0}, {"threads": 0}, {"slots": -3}])
def test_numbers_below_one_are_refused(tiny_engine: Any, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        Engine.open(tiny_engine.path, **options)


def test_more_slots_than_a_batch_has_rows_are_refused(make_engine: Any) -> None:
    tiny = make_engine(batch=2, delays=(1, 1, 1))
    with pytest.raises(UserError, match="from 1 to 2"):
        Engine.open(tiny.path, slots=3)


def test_a_batch_with_a_longer_delay_is_refused(make_engine: Any) -> None:
    with pytest.raises(UserError, match="export it with batch 1"):
        Engine.open(make_engine(batch=2, delays=(1, 1, 2)).path)


def test_delays_that_hardly_ever_repeat_are_refused(make_engine: Any) -> None:
    with pytest.raises(UserError, match="smaller delays"):
        Engine.open(make_engine(delays=(10, 12, 16)).path)


def test_an_absent_engine_or_manifest_is_said(tmp_path: Path, make_engine: Any) -> None:
    with pytest.raises(UserError, match="there is no engine file"):
        Engine.open(tmp_path / "none.onnx")
    tiny = make_engine()
    manifest_path(tiny.path).unlink()
    with pytest.raises(UserError, match="has no manifest"):
        Engine.open(tiny.path)


def test_a_damaged_file_is_refused_by_its_sum(make_engine: Any) -> None:
    tiny = make_engine()
    tiny.path.write_bytes(tiny.path.read_bytes()[:-40])
    with pytest.raises(UserError, match="SHA-256"):
        Engine.open(tiny.path)


@pytest.mark.parametrize("keep", [0, 1, 100, 400, -40])
def test_a_truncated_graph_is_refused_in_one_line_and_the_log_is_silent(
    make_engine: Any, keep: int, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = make_engine()
    tiny.path.write_bytes(tiny.path.read_bytes()[:keep])
    with pytest.raises(UserError) as raised:
        Engine.open(resigned(tiny))
    assert "export the engine again" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_damaged_weights_are_refused_in_one_line_and_the_log_is_silent(
    make_engine: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = make_engine()
    model = onnx.load(tiny.path)
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    unused = onnx.TensorProto()
    unused.CopyFrom(weights)
    unused.name = "unused"  # ONNX Runtime warns of it before it comes to the damage
    model.graph.initializer.insert(0, unused)
    weights.raw_data = weights.raw_data[:-4]
    onnx.save(model, tiny.path)
    with pytest.raises(UserError, match=r"cannot open the engine .*; export the engine again$"):
        Engine.open(resigned(tiny))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"input_height": 24}, "frame"),
        ({"labels": ("background", "red")}, "logits"),
        ({"states": ()}, "state_00_in"),
    ],
)
def test_a_manifest_that_does_not_match_the_graph_is_refused(
    make_engine: Any, fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(UserError, match=f"'{name}'"):
        Engine.open(resigned(make_engine(), **fields))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"shape": (1, 4)}, "state_02_in"),
        ({"dtype": "float16"}, "state_02_in"),
        ({"name": "state_03"}, "state_03_in"),
    ],
)
def test_a_state_that_does_not_match_the_graph_is_refused(make_engine: Any, change: dict[str, Any], name: str) -> None:
    tiny = make_engine()
    *others, last = tiny.manifest.states
    with pytest.raises(UserError, match=f"'{name}'"):
        Engine.open(resigned(tiny, states=(*others, dataclasses.replace(last, **change))))


@pytest.mark.parametrize("end", ["in", "out"])
def test_a_graph_that_lacks_a_declared_state_is_refused(make_engine: Any, end: str) -> None:
    tiny = make_engine()
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
        Engine.open(resigned(tiny))


def test_threads_and_the_default_of_one_per_physical_core(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    session = ort.InferenceSession

    def recording(path: str, options: ort.SessionOptions, **rest: Any) -> ort.InferenceSession:
        made.append(options.intra_op_num_threads)
        return session(path, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", recording)
    Engine.open(tiny_engine.path, threads=3)
    Engine.open(tiny_engine.path)
    assert made == [3, physical_cores()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's description of the cores")
def test_only_cores_that_the_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}
    monkeypatch.setattr(Path, "read_text", lambda path: siblings[int(path.parts[5][3:])])
    for allowed, expected in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({0, 1}, 2), ({3}, 1)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert physical_cores() == expected


def test_an_absent_embedded_engine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "stsm_rt"
    monkeypatch.setattr(base, "__file__", str(package / "engine" / "base.py"))
    with pytest.raises(UserError, match="embedded engine"):
        Engine.open()
    for folder in (package.parent / "engines", package / "engines"):
        folder.mkdir(parents=True)
        (folder / base._EMBEDDED).touch()
        assert embedded_engine() == folder / base._EMBEDDED


def test_an_engine_runs_without_torch_and_opencv(tiny_engine: Any) -> None:
    code = (
        "import sys; from stsm_rt import Engine; "
        "engine = Engine.open(sys.argv[1]); engine.step(engine.frames); "
        "assert not {'torch', 'cv2', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_engine.path)], check=True, timeout=60)
