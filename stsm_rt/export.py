"""The command ``python -m stsm_rt.export``: weights -> an ONNX engine with its manifest.

The graph is the step form: ``frame`` (uint8 BGR, N x H x W x 3) and the states go in, ``logits`` and the next states
come out. Normalisation is inside. Before anything is written, ONNX Runtime's step is compared with PyTorch's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from stsm_rt.engine import Engine
from stsm_rt.errors import UserError, report
from stsm_rt.manifest import FORMAT_VERSION, Manifest, manifest_path, sha256_of
from stsm_rt.model import ModelSpec, load_model
from stsm_rt.networks import StreamingNetwork, stream

TOLERANCE = 1e-4  # of the largest logit, FP32
_OPSET = 20  # ONNX Runtime 1.23, the newest on Python 3.10, reads it


class _Batched(nn.Module):
    """The step of N streams of which only the active ones move."""

    def __init__(self, network: StreamingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, frame: Tensor, active: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, *following = self.network(frame, *state)
        kept = (
            torch.where(active.view(-1, *[1] * (old.dim() - 1)), new, old)
            for new, old in zip(following, state, strict=True)
        )
        return (logits, *kept)


def export_onnx(network: StreamingNetwork, path: Path, *, height: int, width: int, batch: int = 1) -> None:
    """Write the step form as an ONNX graph.

    Args:
        network: Causal, in evaluation mode.
        path: Target file.
        height: Of the input, pixels.
        width: Of the input, pixels.
        batch: N. With more than one stream the graph has an input ``active``, bool (N,): the others keep their state.

    Raises:
        ShiftError: The network's shift looks ahead.
    """
    specs = network.state_specs(height, width, batch)
    frame = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
    active = [torch.ones(batch, dtype=torch.bool)] if batch > 1 else []
    arguments = (frame, *active, *network.initial_state(height, width, batch))
    with torch.no_grad():
        program = torch.export.export(_Batched(network) if batch > 1 else network, arguments, strict=False)
        exported = torch.onnx.export(
            program,
            input_names=["frame", *["active"] * len(active), *(f"{s.name}_in" for s in specs)],
            output_names=["logits", *(f"{s.name}_out" for s in specs)],
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
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    onnx.save(model, path)


def export_engine(weights: Path, target: Path, *, batch: int = 1, measured: Path | None = None) -> Manifest:
    """Make an FP32 engine for ONNX Runtime, prove it against PyTorch and write it with its manifest.

    Args:
        weights: What `train` wrote.
        target: The engine file; its manifest lies beside it.
        batch: Streams per step.
        measured: What ``evaluate --json`` wrote of an engine of the same weights; its accuracy goes into the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: Weights that cannot be read, a shift that looks ahead, an engine that disagrees with PyTorch, or
            a report of other weights.
    """
    network, spec = load_model(weights)
    if measured is not None:
        spec = dataclasses.replace(spec, accuracy=read_accuracy(measured, sha256_of(weights)))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        draft = Path(folder) / target.name
        export_onnx(network, draft, height=spec.height, width=spec.width, batch=batch)
        manifest = _manifest(network, spec, draft, sha256_of(weights), batch)
        manifest.save(draft)
        difference = compare(network, draft)
        if difference > TOLERANCE:
            raise UserError(
                f"the engine differs from PyTorch by {difference:.1e} of the largest logit, more than {TOLERANCE:.0e}; "
                "nothing was written"
            )
        os.replace(manifest_path(draft), manifest_path(target))
        os.replace(draft, target)
    return manifest


def read_accuracy(report_path: Path, weights_sha256: str) -> dict[str, Any]:
    """The headline numbers of a report that ``evaluate --json`` wrote.

    Raises:
        UserError: No such report, or it was measured with other weights.
    """
    try:
        report_data = json.loads(report_path.read_text())
        if report_data["weights_sha256"] != weights_sha256:
            raise UserError(f"{report_path} was measured with other weights; evaluate an engine of these first")
        return {key: report_data[key] for key in ("split", "clips", "top1", "top5")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report_path} is not a report that stsm-rt evaluate --data wrote") from error


def _manifest(network: StreamingNetwork, spec: ModelSpec, draft: Path, weights_sha256: str, batch: int) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        runtime="onnxruntime",
        runtime_version=onnxruntime.__version__,
        device="cpu",
        precision="fp32",
        network=spec.network,
        shift=spec.shift or {"name": "none", "groups": []},
        input_height=spec.height,
        input_width=spec.width,
        batch=batch,
        frame_rate=spec.frame_rate,
        labels=spec.labels,
        background=spec.background,
        states=network.state_specs(spec.height, spec.width, batch),
        decision=spec.decision,
        sha256=sha256_of(draft),
        weights_sha256=weights_sha256,
        calibration=None,
        accuracy=spec.accuracy,
    )


def compare(network: StreamingNetwork, engine_path: Path, frames: int = 8) -> float:
    """Largest difference between an engine's and PyTorch's logits over a clip of noise, as a share of the largest."""
    manifest = Manifest.load(engine_path)
    engine = Engine.open(engine_path, slots=manifest.batch)
    shape = (frames, manifest.batch, manifest.input_height, manifest.input_width, 3)
    clip = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = stream(network, torch.from_numpy(clip).transpose(0, 1)).transpose(0, 1).numpy()
    got = np.stack([engine.step(frame).copy() for frame in clip])
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="stsm-rt export", description="Make an ONNX engine from trained weights.")
    parser.add_argument("--weights", type=Path, required=True, help="weights that stsm-rt train wrote (.safetensors)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="engine file to write (.onnx)")
    parser.add_argument("--measured", type=Path, help="report of evaluate --json, for the manifest's accuracy")
    parser.add_argument("--batch", type=int, default=1, help="streams per step (default: 1)")
    options = parser.parse_args(argv)
    try:
        if options.out.suffix != ".onnx":
            raise UserError(f"an engine for ONNX Runtime ends in .onnx, got {options.out}")
        manifest = export_engine(options.weights, options.out, batch=options.batch, measured=options.measured)
    except UserError as error:
        return report(error)
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {manifest.network} {manifest.precision}, {len(manifest.states)} states, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
