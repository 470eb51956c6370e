"""The command ``python -m stsm_rt.export``: weights -> an ONNX graph with its manifest.

The graph is the step form: ``frame`` (uint8 BGR, N x H x W x 3) and the states go in, ``logits`` and the next states
come out. Normalisation is inside. ONNX Runtime and OpenVINO run such a graph as it is; for TensorRT it is what the
device builds its plan of. Before anything is written, the step is compared with what it should be.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from stsm_rt.check_weights import moving_clip
from stsm_rt.engine import Engine
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.engine_manifest import calibration_record, make_manifest
from stsm_rt.errors import UserError, report
from stsm_rt.integer_graph import byte_states, quantize_for
from stsm_rt.manifest import Manifest, manifest_path, sha256_of
from stsm_rt.model import ModelSpec, known_accuracy, load_model
from stsm_rt.networks import StreamingNetwork, stream
from stsm_rt.ranges import Ranges
from stsm_rt.shift_folding import Folding, fold_shifts
from stsm_rt.split_streams import split_streams

Runtime = Literal["onnxruntime", "openvino", "onnx"]
Precision = Literal["fp32", "fp16", "int8"]

# Of the largest logit. INT8 on a processor is held to its own graph: fused integers round otherwise, by about 1e-2;
# sums that overflow were seen to be off by 12e-2.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 5e-2}
_FARTHER = 1.2  # from FP32 than the graph, on average
# A graph for TensorRT is held to PyTorch: what a wrong scale or a lost state would exceed.
_QUANTIZATION_BOUND = 0.25
_OPSET = 20  # ONNX Runtime 1.23, the newest on Python 3.10, reads it


class StepForm(nn.Module):
    """The step as it is exported: logits in FP32 whatever the network's precision, and a batch whose rows may wait.

    Args:
        network: Causal, in evaluation mode.
    """

    def __init__(self, network: StreamingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, frame: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """One step.

        Args:
            frame: uint8 (N, H, W, 3) BGR.
            *rest: With N > 1 first ``active``, bool (N,): the other rows keep their state. Then the states.

        Returns:
            Logits, float32 (N, K), and the next states.
        """
        active, state = (rest[0], rest[1:]) if frame.shape[0] > 1 else (None, rest)
        logits, *following = self.network(frame, *state)
        if active is not None:
            following = [
                torch.where(active.view(-1, *[1] * (old.dim() - 1)), new, old)
                for new, old in zip(following, state, strict=True)
            ]
        return (logits.float(), *following)


def step_inputs(network: StreamingNetwork, height: int, width: int, batch: int) -> tuple[list[str], tuple[Tensor, ...]]:
    """Names and examples of what `StepForm` takes."""
    names = [f"{state.name}_in" for state in network.state_specs(height, width, batch)]
    device = network.classifier.weight.device
    frame = torch.zeros(batch, height, width, 3, dtype=torch.uint8, device=device)
    state = network.initial_state(height, width, batch)
    if batch == 1:
        return ["frame", *names], (frame, *state)
    return ["frame", "active", *names], (frame, torch.ones(batch, dtype=torch.bool, device=device), *state)


def export_onnx(network: StreamingNetwork, path: Path, *, height: int, width: int, batch: int = 1) -> None:
    """Write the step form as an ONNX graph, in the precision of the network's weights.

    Weights keep the names of their modules, batch norms are folded into the convolutions before them.

    Args:
        network: Causal, in evaluation mode, FP32 or FP16.
        path: Target file.
        height: Of the input, pixels.
        width: Of the input, pixels.
        batch: N. With more than one stream the graph has an input ``active``, bool (N,): the others keep their state.

    Raises:
        ShiftError: The network's shift looks ahead.
    """
    names, arguments = step_inputs(network, height, width, batch)
    # One stream in FP32 needs nothing around it, and the shipped engine keeps its bytes.
    plain = batch == 1 and network.classifier.weight.dtype == torch.float32
    with torch.no_grad():
        program = torch.export.export(network if plain else StepForm(network), arguments, strict=False)
        exported = torch.onnx.export(
            program,
            input_names=names,
            output_names=["logits", *(f"{s.name}_out" for s in network.state_specs(height, width, batch))],
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    # The exporter notes where in whose files each node came from: the same weights would give another file elsewhere.
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
        tensor.name = _module_name(tensor.name)
    for node in model.graph.node:
        node.input[:] = [_module_name(name) for name in node.input]
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    onnx.save(model, path)


def _module_name(name: str) -> str:
    """The name of a backbone's weight without the module that was put around the network."""
    return name.removeprefix("network.") if name.startswith("network.backbone.") else name


def export_engine(
    network: StreamingNetwork,
    spec: ModelSpec,
    target: Path,
    *,
    weights_sha256: str,
    runtime: Runtime = "onnxruntime",
    precision: Precision = "fp32",
    batch: int = 1,
    ranges: Ranges | None = None,
    exclude: Sequence[str] = (),
    folding: Folding | None = None,
) -> Manifest:
    """Make a graph for a runtime, prove it and write it with its manifest, both or neither.

    FP32 and FP16 are compared with PyTorch. INT8 is compared with the same graph computed node by node, which shows
    what the processor's integers lose, not what quantization costs; that takes an evaluation.

    Args:
        network: Causal, in evaluation mode, FP32.
        spec: The record of its weights.
        target: The engine file; its manifest lies beside it.
        weights_sha256: Of the file of weights.
        runtime: ``"onnxruntime"``, ``"openvino"``, or ``"onnx"`` for TensorRT's parser.
        precision: ``"fp16"``, FP16 throughout, only for TensorRT; ``"int8"`` for TensorRT is FP16 with int8
            convolutions, else FP32 with int8 convolutions.
        batch: Streams per step.
        ranges: Of the same weights, for ``"int8"``.
        exclude: Patterns of module paths whose convolutions do not become int8.
        folding: The form of the shift; None: what is fastest in this runtime and precision. ``"split"`` is for FP32,
            and leaves a network without ReLU behind its residual sums at ``"depthwise"``.

    Returns:
        The manifest.

    Raises:
        UserError: A shift that looks ahead, ranges of other weights, a precision that the runtime has no use for, a
            missing package, or an engine that disagrees with what it is compared with.
    """
    if precision == "fp16" and runtime != "onnx":
        raise UserError(
            f"FP16 is for TensorRT; on a processor {runtime} is faster in fp32 or int8, choose one of these"
        )
    if precision == "int8":
        ranges = _own_ranges(ranges, weights_sha256)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        draft = Path(folder) / target.name
        folding = _folding(network, runtime, precision, batch) if folding is None else folding
        exported = copy.deepcopy(network)
        if runtime == "onnx" and precision != "fp32":
            exported.half()
        if folding != "none":
            fold_shifts(exported)
        export_onnx(exported, draft, height=spec.height, width=spec.width, batch=batch)
        graph, calibration = onnx.load(draft), None
        if folding == "split":
            graph, whole = split_streams(graph), graph
            folding = "depthwise" if graph == whole else "split"
        if precision == "int8":
            assert ranges is not None
            graph = quantize_for(runtime, graph, ranges, exclude)
            calibration = calibration_record(ranges, exclude)
        onnx.save(graph, draft)
        manifest = make_manifest(
            network,
            spec,
            weights_sha256=weights_sha256,
            runtime=runtime,
            runtime_version=_VERSIONS[runtime](),
            device="any" if runtime == "onnx" else "cpu",
            precision=precision,
            batch=batch,
            calibration=calibration,
        )
        manifest = dataclasses.replace(
            manifest, sha256=sha256_of(draft), folding=folding, states=byte_states(graph, manifest.states)
        )
        manifest.save(draft)
        _prove(network, draft, manifest)
        os.replace(manifest_path(draft), manifest_path(target))
        os.replace(draft, target)
    return manifest


def _folding(network: StreamingNetwork, runtime: Runtime, precision: Precision, batch: int) -> Folding:
    """What was fastest; see benchmarks/RESULTS.md. TensorRT could not be measured, and fuses slices and pads itself."""
    if runtime == "onnx" or not network.hooks:
        return "none"
    return "split" if precision == "fp32" and batch == 1 else "depthwise"


def _own_ranges(ranges: Ranges | None, weights_sha256: str) -> Ranges:
    if ranges is None:
        raise UserError("INT8 needs recorded ranges of activations; give --calibration, a file of stsm-rt calibrate")
    if ranges.weights_sha256 != weights_sha256:
        raise UserError(
            f"the calibration belongs to the weights {ranges.weights_sha256[:12]}..., not to "
            f"{weights_sha256[:12]}...; calibrate these with stsm-rt calibrate"
        )
    return ranges


def _prove(network: StreamingNetwork, draft: Path, manifest: Manifest) -> None:
    graph = OnnxRuntimeEngine(draft, slots=manifest.batch, fused=False) if manifest.precision != "fp32" else None
    if manifest.runtime == "onnx":
        engine: Engine = graph or OnnxRuntimeEngine(draft, slots=manifest.batch)
    else:
        engine = Engine.open(draft, slots=manifest.batch)
    clip = moving_clips(manifest)
    got = _played(engine, clip)
    rows = stream(network, torch.from_numpy(clip).transpose(0, 1))
    exact, reference = rows.transpose(0, 1).numpy(), "PyTorch"
    expected, tolerance = exact, TOLERANCES[manifest.precision]
    if manifest.precision == "int8" and manifest.runtime == "onnx":
        tolerance = _QUANTIZATION_BOUND
    elif manifest.precision == "int8":
        assert graph is not None
        expected, reference = _played(graph, clip), "its own graph, computed node by node,"
        # A deep network can amplify one rounding beyond the tolerance; then the fused sums are as near to FP32 as the
        # graph is, which sums that overflow are not.
        if np.abs(got - exact).mean() <= _FARTHER * np.abs(expected - exact).mean():
            return
    difference = relative_difference(got, expected)
    if difference > tolerance:
        raise UserError(
            f"the engine differs from {reference} by {difference:.1e} of the largest logit, more than "
            f"{tolerance:.0e}; nothing was written"
        )


def moving_clips(manifest: Manifest, frames: int = 8) -> npt.NDArray[np.uint8]:
    """(frames, N, H, W, 3), another clip of blobs and grain in every row."""
    size = (manifest.input_height, manifest.input_width)
    return np.ascontiguousarray(np.stack([moving_clip(frames, *size, seed=row) for row in range(manifest.batch)], 1))


def _played(engine: Engine, clip: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    engine.reset()
    return np.stack([engine.step(frames).copy() for frames in clip])


def relative_difference(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Largest difference of two sets of logits as a share of the largest; infinite if one is not finite."""
    difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    return difference if np.isfinite(difference) else float("inf")


def _openvino_version() -> str:
    from stsm_rt.engine.openvino import load_openvino

    return str(load_openvino().__version__)


_VERSIONS: dict[str, Callable[[], str]] = {
    "onnxruntime": lambda: str(onnxruntime.__version__),
    "openvino": _openvino_version,
    "onnx": lambda: f"opset {_OPSET}",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="stsm-rt export",
        description="Make an ONNX graph from trained weights: in FP32 an engine for ONNX Runtime, in FP16 and INT8 "
        "what a device builds its TensorRT plan of.",
    )
    parser.add_argument("--weights", type=Path, required=True, help="weights that stsm-rt train wrote (.safetensors)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write (.onnx)")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32", help="default: fp32")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="ranges that stsm-rt calibrate recorded")
    parser.add_argument("--exclude-layer", action="append", default=[], metavar="PATTERN", help="leave layers in FP16")
    parser.add_argument("--measured", type=Path, help="report of evaluate --json, for the manifest's accuracy")
    parser.add_argument("--batch", type=int, default=1, help="streams per step (default: 1)")
    options = parser.parse_args(argv)
    try:
        if options.out.suffix != ".onnx":
            raise UserError(f"an ONNX graph ends in .onnx, got {options.out}")
        network, spec = load_model(options.weights)
        digest = sha256_of(options.weights)
        spec = dataclasses.replace(spec, accuracy=known_accuracy(options.measured, digest, options.precision, spec))
        ranges = Ranges.load(options.calibration) if options.calibration else None
        manifest = export_engine(
            network,
            spec,
            options.out,
            weights_sha256=digest,
            runtime="onnxruntime" if options.precision == "fp32" else "onnx",
            precision=options.precision,
            batch=options.batch,
            ranges=ranges,
            exclude=options.exclude_layer or (ranges.exclude.get("onnx", ()) if ranges else ()),
        )
    except UserError as error:
        return report(error)
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {manifest.network} {manifest.precision}, {len(manifest.states)} states, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
