"""What the manifest of an engine says, from the network and the record of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from stsm_rt.manifest import FORMAT_VERSION, Manifest
from stsm_rt.model import ModelSpec
from stsm_rt.networks import ARCHITECTURES, StreamingNetwork
from stsm_rt.ranges import Ranges


def calibration_record(ranges: Ranges, exclude: Sequence[str]) -> dict[str, Any]:
    """What a manifest says of the calibration."""
    return {
        "method": ranges.method,
        "data": ranges.data,
        "clips": ranges.clips,
        "frames": ranges.frames,
        "excluded": list(exclude),
    }


def make_manifest(
    network: StreamingNetwork,
    spec: ModelSpec,
    *,
    weights_sha256: str,
    runtime: str,
    runtime_version: str,
    device: str,
    precision: str,
    batch: int,
    calibration: dict[str, Any] | None,
) -> Manifest:
    """The manifest of an engine whose file is not written yet; its ``sha256`` is zeros.

    Args:
        network: FP32.
        spec: The record of its weights.
        weights_sha256: Of the file of weights.
        runtime: As `Manifest` says it, and so on.
        runtime_version: Likewise.
        device: Likewise.
        precision: Likewise.
        batch: Likewise.
        calibration: Likewise.
    """
    half = precision != "fp32" and runtime not in ("onnxruntime", "openvino")
    states = network.state_specs(spec.height, spec.width, batch)
    architecture = ARCHITECTURES[spec.network]
    return Manifest(
        format_version=FORMAT_VERSION,
        runtime=runtime,
        runtime_version=runtime_version,
        device=device,
        precision=precision,
        network=spec.network,
        shift=spec.shift or {"name": "none", "groups": []},
        input_height=spec.height,
        input_width=spec.width,
        batch=batch,
        frame_rate=spec.frame_rate,
        labels=spec.labels,
        background=spec.background,
        states=tuple(dataclasses.replace(state, dtype="float16") for state in states) if half else states,
        decision=spec.decision,
        sha256="0" * 64,
        weights_sha256=weights_sha256,
        preprocessing={"colour": "RGB", "mean": list(architecture.mean), "std": list(architecture.std)},
        calibration=calibration,
        accuracy=spec.accuracy,
    )
