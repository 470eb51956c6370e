"""``Engine.open`` finds the runtime that an engine needs, or says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stsm_rt.engine import Engine, embedded_engine
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.errors import UserError

WEIGHTS = Path(__file__).parents[2] / "engines" / "actions_lite0.safetensors"


def test_an_onnx_runtime_engine_is_run_by_onnx_runtime(tiny_engine: Any) -> None:
    engine = Engine.open(tiny_engine.path, slots=3, threads=1)
    assert type(engine) is OnnxRuntimeEngine
    assert engine.slots == 3


def test_a_path_may_be_a_text(tiny_engine: Any) -> None:
    assert Engine.open(str(tiny_engine.path)).manifest == tiny_engine.manifest


def test_without_a_path_it_is_the_embedded_engine() -> None:
    assert Engine.open().manifest == Engine.open(embedded_engine()).manifest


def test_an_openvino_engine_is_run_by_openvino(make_engine: Any) -> None:
    if find_spec("openvino") is None:
        if os.environ.get("CI") == "true" and find_spec("torch") is not None:
            pytest.fail("OpenVINO is not installed: pip install 'stsm-rt[openvino]'")
        pytest.skip("OpenVINO is not installed")
    tiny = make_engine(runtime="openvino")
    engine = Engine.open(tiny.path, slots=2, threads=1)
    assert type(engine).__name__ == "OpenVINOEngine"
    assert engine.slots == 2
    frames = tiny.frames(2)
    logits = np.stack([engine.step(frame[None], [1])[0].copy() for frame in frames])
    np.testing.assert_allclose(logits, tiny.reference(frames), atol=1e-3)


@pytest.mark.parametrize(("runtime", "package"), [("openvino", "openvino"), ("tensorrt", "tensorrt")])
def test_a_runtime_that_is_not_installed_is_said(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, runtime: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    tiny = make_engine(runtime=runtime, device="cpu" if runtime == "openvino" else "sm_86")
    with pytest.raises(UserError, match=r"(?i)not installed|pip install") as raised:
        Engine.open(tiny.path)
    assert "\n" not in str(raised.value)


def test_a_graph_for_tensorrt_is_no_engine_yet_and_the_command_is_named(make_engine: Any) -> None:
    tiny = make_engine(runtime="onnx", device="any")
    with pytest.raises(UserError, match="no engine yet") as raised:
        Engine.open(tiny.path)
    assert str(raised.value).endswith(f"python -m stsm_rt.build_engine {tiny.path}")


def test_a_runtime_that_nobody_knows_is_refused(make_engine: Any) -> None:
    tiny = make_engine()
    manifest = tiny.path.with_name(f"{tiny.path.name}.json")
    manifest.write_text(manifest.read_text().replace('"onnxruntime"', '"tflite"'))
    with pytest.raises(UserError, match="tflite"):
        Engine.open(tiny.path)


def test_an_absent_engine_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no engine file .*absent\.onnx"):
        Engine.open(tmp_path / "absent.onnx")


def test_weights_are_run_by_pytorch() -> None:
    pytest.importorskip("torch")
    engine = Engine.open(WEIGHTS, slots=2)
    embedded = Engine.open()
    assert engine.manifest.runtime == "torch"
    assert (engine.slots, engine.manifest.labels) == (2, embedded.manifest.labels)
    frame = np.random.default_rng(0).integers(0, 256, embedded.frames.shape, np.uint8)
    expected = embedded.step(frame).copy()
    np.testing.assert_allclose(engine.step(frame, [1]), expected, atol=1e-2 * np.abs(expected).max())


def test_weights_without_pytorch_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("stsm_rt.engine.torch", "stsm_rt.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=r"torch is not installed; run: pip install 'stsm-rt\[train\]'"):
        Engine.open(WEIGHTS)


def test_weights_that_are_none_are_said(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="weights not found"):
        Engine.open(tmp_path / "absent.safetensors")
    shutil.copy(__file__, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match=r"not a readable \.safetensors file"):
        Engine.open(tmp_path / "text.safetensors")


def test_opening_an_engine_imports_no_other_runtime(tiny_engine: Any) -> None:
    code = (
        "import sys; from stsm_rt.engine import Engine; "
        f"Engine.open({str(tiny_engine.path)!r}); "
        "print(*({'torch', 'openvino', 'tensorrt', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
