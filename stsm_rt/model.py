"""A trained model: weights with the record of what they are, in one safetensors file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stsm_rt.checkpoints import load_weights, save_weights
from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec
from stsm_rt.networks import StreamingNetwork
from stsm_rt.shift import ShiftSpec


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a file of weights is; kept in the file's own header.

    Attributes:
        network: One of `networks.ARCHITECTURES`.
        padding: Of strided convolutions, "symmetric" or "same".
        shift: The shift spec as JSON, None for the plain network.
        rates: Of the classifier's running averages, fastest first.
        changes: Whether the classifier sees the running average of absolute changes.
        labels: One per logit.
        background: The label that means "nothing I know", or None.
        height: Of the input, pixels.
        width: Of the input, pixels.
        frame_rate: Steps per second of source time.
        decision: How logits become a decision.
        recipe: What the weights were trained with, as data.
        accuracy: Measured accuracy, or None.
    """

    network: str
    padding: str
    shift: dict[str, Any] | None
    rates: tuple[float, ...]
    changes: bool
    labels: tuple[str, ...]
    background: str | None
    height: int
    width: int
    frame_rate: float
    decision: DecisionSpec
    recipe: dict[str, Any]
    accuracy: dict[str, Any] | None = None

    def build(self) -> StreamingNetwork:
        """The network, untrained.

        Raises:
            UserError: Unknown network, or a shift that does not fit it.
        """
        return StreamingNetwork(
            self.network,
            len(self.labels),
            shift=ShiftSpec.from_json(self.shift) if self.shift is not None else None,
            rates=self.rates,
            changes=self.changes,
            padding="same" if self.padding == "same" else "symmetric",
        )


def save_model(network: StreamingNetwork, spec: ModelSpec, path: str | Path) -> None:
    """Write weights and record, whole or not at all."""
    save_weights(network, path, {"stsm_rt": json.dumps(dataclasses.asdict(spec))})


def load_model(path: str | Path) -> tuple[StreamingNetwork, ModelSpec]:
    """Read what `save_model` wrote; the network is in evaluation mode.

    Raises:
        UserError: No such file, no weights of this project, or weights that do not fit their record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights not found: expected a .safetensors file, got {path}")
    try:
        with safe_open(path, "pt") as file:
            record = (file.metadata() or {}).get("stsm_rt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable .safetensors file; expected weights that stsm-rt train wrote"
        ) from error
    if record is None:
        raise UserError(f"{path} has no record of a network; expected weights that stsm-rt train wrote")
    try:
        data = json.loads(record)
        data |= {"rates": tuple(data["rates"]), "labels": tuple(data["labels"])}
        spec = ModelSpec(**{**data, "decision": DecisionSpec(**data["decision"])})
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} holds a record that this version cannot read: {error}") from error
    network = spec.build()
    load_weights(network, path)
    return network.eval(), spec


def known_accuracy(
    measured: Path | None, weights_sha256: str, precision: str, spec: ModelSpec
) -> dict[str, Any] | None:
    """What is known of an engine: a report of its precision, or for FP32 what was measured in training.

    Raises:
        UserError: See `read_accuracy`.
    """
    if measured is not None:
        return read_accuracy(measured, weights_sha256, precision)
    return spec.accuracy if precision == "fp32" else None


def read_accuracy(report_path: Path, weights_sha256: str, precision: str = "fp32") -> dict[str, Any]:
    """The headline numbers of a report that ``evaluate --json`` wrote.

    Raises:
        UserError: No such report, or it was measured with other weights or in another precision.
    """
    try:
        report_data = json.loads(report_path.read_text())
        if report_data["weights_sha256"] != weights_sha256:
            raise UserError(f"{report_path} was measured with other weights; evaluate an engine of these first")
        if report_data["precision"] != precision:
            raise UserError(f"{report_path} was measured in {report_data['precision']}; evaluate that of {precision}")
        return {key: report_data[key] for key in ("split", "clips", "top1", "top5")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report_path} is not a report that stsm-rt evaluate --data wrote") from error
