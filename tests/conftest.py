"""Shared fixtures: a small streaming engine whose answers can be computed by hand, the data folder, TensorRT-RTX."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from stsm_rt.errors import UserError
from stsm_rt.manifest import FORMAT_VERSION, DecisionSpec, Manifest, StateSpec, sha256_of

COLOURS = ("blue", "green", "red")
LABELS = ("background", *COLOURS)


@dataclass(frozen=True, kw_only=True)
class TinyEngine:
    """A streaming engine on disk that names the colour of what it sees.

    Its states: the picture ``delays[0]`` steps ago (a feature map), a running average of the mean colour, and
    the mean colour ``delays[2]`` steps ago. All of them reach the logits. A few pure blue, green or red
    frames give that label a probability above 0.9, black frames give it to the background.
    """

    path: Path
    manifest: Manifest
    weights: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def frames(self, count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
        """Frames of one scene under heavy noise, (count, H, W, 3)."""
        shape = (count, self.manifest.input_height, self.manifest.input_width, 3)
        scene = np.linspace(0, 160, shape[2], dtype=np.uint8)[None, None, :, None]
        return scene + np.random.default_rng(seed).integers(0, 96, shape, np.uint8)

    def reference(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """The logits (T, classes) of frames (T, H, W, 3) since a reset, computed without buffers."""
        pictures = frames.astype(np.float32) / 255
        means = pictures.mean(axis=(1, 2))
        delays = [state.delay for state in self.manifest.states]
        averages: list[npt.NDArray[np.float32]] = []
        features = []
        for t in range(len(frames)):
            before = pictures[t - delays[0]] if t >= delays[0] else np.zeros_like(pictures[0])
            average = averages[t - delays[1]] if t >= delays[1] else np.zeros(3, np.float32)
            averages.append(average * np.float32(0.5) + means[t] * np.float32(0.5))
            earlier = means[t - delays[2]] if t >= delays[2] else np.zeros(3, np.float32)
            change = np.abs(pictures[t] - before).mean(axis=(0, 1))
            features.append(np.concatenate([means[t], change, averages[t], earlier]))
        return (np.stack(features) @ self.weights + self.bias).astype(np.float32)


MakeEngine = Callable[..., TinyEngine]


@pytest.fixture(scope="session")
def make_engine(tmp_path_factory: pytest.TempPathFactory) -> MakeEngine:
    """A function that makes a new ``TinyEngine``.

    Options: ``height``, ``width``, ``batch``, ``delays`` (of the three states), any field of the manifest.
    """

    def make(
        *,
        height: int = 12,
        width: int = 16,
        batch: int = 1,
        delays: tuple[int, int, int] = (1, 1, 2),
        **fields: Any,
    ) -> TinyEngine:
        weights = np.random.default_rng(7).normal(0, 0.2, (12, 4)).astype(np.float32)
        for channel in range(3):
            weights[6 + channel, 1 + channel] += 12
        bias = np.array([4, 0, 0, 0], np.float32)
        shapes = ((batch, height, width, 3), (batch, 3), (batch, 3))
        states = tuple(
            StateSpec(name=f"state_{i:02}", shape=shape, delay=delay)
            for i, (shape, delay) in enumerate(zip(shapes, delays, strict=True))
        )
        path = tmp_path_factory.mktemp("engine") / "colours.onnx"
        onnx.save(_graph(height, width, batch, states, weights, bias), path)
        known: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "runtime": "onnxruntime",
            "runtime_version": onnxruntime.__version__,
            "device": "cpu",
            "precision": "fp32",
            "network": "colours",
            "shift": {"name": "tsm_online", "groups": [{"fraction": "1/8", "dt": 1, "dh": 0, "dw": 0}]},
            "input_height": height,
            "input_width": width,
            "batch": batch,
            "frame_rate": 10.0,
            "labels": LABELS,
            "background": "background",
            "states": states,
            "decision": DecisionSpec(smoothing=3, threshold=0.6, release=0.4, min_steps=2),
            "sha256": sha256_of(path),
            "weights_sha256": "0" * 64,
            "calibration": None,
            "accuracy": {"jhmdb_split1_top1": 61.0},
        }
        manifest = Manifest(**(known | fields))
        manifest.save(path)
        return TinyEngine(path=path, manifest=manifest, weights=weights, bias=bias)

    return make


@pytest.fixture(scope="session")
def tiny_engine(make_engine: MakeEngine) -> TinyEngine:
    """A ``TinyEngine`` with its defaults, shared by all tests: do not write to its files."""
    return make_engine()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where STSM_RTX=1, only what needs TensorRT-RTX is run: the other environment runs the rest."""
    if os.environ.get("STSM_RTX") == "1":
        kept = [item for item in items if {"rtx", "torch_rtx"} & set(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT-RTX, which builds plans without a GPU; where STSM_RTX=1 says that it is there, it must be."""
    from stsm_rt.tensorrt_library import load_tensorrt

    return _required(lambda: load_tensorrt("tensorrt-rtx"))


@pytest.fixture(scope="session")
def torch_rtx() -> Any:
    """The same, as Torch-TensorRT uses it."""
    from stsm_rt.torch_tensorrt_frontend import torch_tensorrt_library

    return _required(torch_tensorrt_library)


def _required(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError as error:
        if os.environ.get("STSM_RTX") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def jhmdb() -> Path:
    """The J-HMDB folder, from STSM_DATA or from ``shared/data`` beside the checkout."""
    data = os.environ.get("STSM_DATA")
    root = Path(data) if data else Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = root / "jhmdb"
    if not (folder / "manifest.csv").is_file():
        message = f"J-HMDB is not at {folder}: set STSM_DATA to the folder that holds jhmdb/manifest.csv"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


def _graph(
    height: int,
    width: int,
    batch: int,
    states: tuple[StateSpec, ...],
    weights: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> onnx.ModelProto:
    def tensor(name: str, array: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(array), name)

    constants = [
        tensor("full", np.float32(255)),
        tensor("half", np.float32(0.5)),
        tensor("weights", weights),
        tensor("bias", bias),
    ]
    nexts = ("picture", "average", "mean")
    nodes = [
        helper.make_node("Cast", ["frame"], ["raw"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["raw", "full"], ["picture"]),
        helper.make_node("ReduceMean", ["picture"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Sub", ["picture", "state_00_in"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["distance"]),
        helper.make_node("ReduceMean", ["distance"], ["change"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["state_01_in", "half"], ["old"]),
        helper.make_node("Mul", ["mean", "half"], ["new"]),
        helper.make_node("Add", ["old", "new"], ["average"]),
        helper.make_node("Concat", ["mean", "change", "average", "state_02_in"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("frame", TensorProto.UINT8, (batch, height, width, 3))]
    if batch > 1:
        inputs.append(helper.make_tensor_value_info("active", TensorProto.BOOL, (batch,)))
        constants.append(tensor("column", np.array([batch, 1], np.int64)))
        constants.append(tensor("column4", np.array([batch, 1, 1, 1], np.int64)))
        nodes += [
            helper.make_node("Reshape", ["active", "column"], ["rows"]),
            helper.make_node("Reshape", ["active", "column4"], ["rows4"]),
        ]
    for state, value in zip(states, nexts, strict=True):
        if batch > 1:
            rows = "rows4" if len(state.shape) == 4 else "rows"
            nodes.append(helper.make_node("Where", [rows, value, f"{state.name}_in"], [f"{state.name}_out"]))
        else:
            nodes.append(helper.make_node("Identity", [value], [f"{state.name}_out"]))
    floats = {f"{state.name}_{end}": state.shape for state in states for end in ("in", "out")}
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in floats.items()}
    inputs += [info for name, info in infos.items() if name.endswith("_in")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (batch, len(bias)))]
    outputs += [info for name, info in infos.items() if name.endswith("_out")]
    graph = helper.make_graph(nodes, "colours", inputs, outputs, constants)
    # An old format, so that the oldest ONNX Runtime that stsm-rt supports can read it.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
