"""Recorded activation ranges: what calibration found, by module, so that INT8 builds need no data."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from stsm_rt.errors import UserError

FORMAT_VERSION = 1
METHODS = ("max", "percentile", "entropy")


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Ranges of the tensors that enter and leave the modules of a network, measured on streams.

    Attributes:
        format_version: Version of this record, ``FORMAT_VERSION``.
        network: Name of the network.
        shift: Name of its shift.
        weights_sha256: SHA-256 of the weights that the ranges belong to.
        data: What was played, for people.
        clips: Number of streams.
        frames: Number of frames, first frames of a stream included.
        method: The method to use where none is asked for, one of `METHODS`.
        tensors: For each tensor and method the lowest and highest value to represent. A tensor is named by a module's
            path and what it is to it: ``.input`` enters it, ``.output`` leaves it and its activation, ``.sum`` is the
            residual sum that its output goes into, after the activation.
        means: For each module the mean of what enters it, by channel; bias correction needs it.
        exclude: For each form of INT8 (`quantize.FORMS`) patterns of the layers that are better left out of it; what a
            build leaves out where nothing else is asked for.

    Raises:
        ValueError: If a value is outside its range.
    """

    format_version: int
    network: str
    shift: str
    weights_sha256: str
    data: str
    clips: int
    frames: int
    method: str
    tensors: dict[str, dict[str, tuple[float, float]]]
    means: dict[str, tuple[float, ...]]
    exclude: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {FORMAT_VERSION} is understood, not {self.format_version}")
        for name in ("network", "shift", "weights_sha256", "data"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text")
        if not (isinstance(self.clips, int) and isinstance(self.frames, int)):
            raise ValueError("clips and frames must be numbers")
        if self.method not in METHODS:
            raise ValueError(f"the method must be {', '.join(METHODS[:-1])} or {METHODS[-1]}, not {self.method!r}")
        for tensor, methods in self.tensors.items():
            for method, (low, high) in methods.items():
                if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high):
                    raise ValueError(f"the range of {tensor} by {method} must hold 0, not be [{low}, {high}]")
        for module, mean in self.means.items():
            if not all(map(math.isfinite, mean)):
                raise ValueError(f"the means of {module} must be finite")
        for form, patterns in self.exclude.items():
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"the layers that {form} leaves out must be texts")

    def range(self, tensor: str) -> tuple[float, float]:
        """Lowest and highest value of a tensor, by the record's method.

        Raises:
            UserError: The tensor was not calibrated.
        """
        try:
            return self.tensors[tensor][self.method]
        except KeyError:
            raise UserError(
                f"the calibration holds no range of {tensor}; it belongs to another network, calibrate this one"
            ) from None

    def mean(self, module: str) -> tuple[float, ...]:
        """Mean of what enters a module, one number for each channel.

        Raises:
            UserError: The module was not calibrated.
        """
        if module not in self.means:
            raise UserError(
                f"the calibration holds no means of {module}; it belongs to another network, calibrate this one"
            )
        return self.means[module]

    def amax(self, module: str) -> float:
        """Largest magnitude of what enters a module: the range of symmetric quantization.

        Raises:
            UserError: The module was not calibrated.
        """
        low, high = self.range(f"{module}.input")
        return max(-low, high)

    def with_method(self, method: str) -> Ranges:
        """The same record, read by another method.

        Raises:
            UserError: There is no such method.
        """
        if method not in METHODS:
            raise UserError(f"unknown calibration method {method!r}; there are {', '.join(METHODS)}")
        return dataclasses.replace(self, method=method)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON, whole or not at all.

        Raises:
            UserError: The file cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(_to_json(self), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"the calibration {path} cannot be written ({error}); choose another file") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranges:
        """Read a record.

        Raises:
            UserError: It is missing, or no record of this project.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            tensors = {
                tensor: {method: (float(low), float(high)) for method, (low, high) in methods.items()}
                for tensor, methods in data["tensors"].items()
            }
            means = {module: tuple(map(float, mean)) for module, mean in data["means"].items()}
            exclude = {form: tuple(patterns) for form, patterns in data.get("exclude", {}).items()}
            return cls(**{**data, "tensors": tensors, "means": means, "exclude": exclude})
        except OSError as error:
            raise UserError(f"the calibration {path} cannot be read ({error}); give a file that exists") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a calibration that stsm-rt calibrate wrote ({error}); calibrate again"
            ) from error


def _to_json(ranges: Ranges) -> str:
    """One line for each tensor and module, so that a difference can be read."""
    data = dataclasses.asdict(ranges)
    lists = {name: data.pop(name) for name in ("tensors", "means")}
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in data.items())
    parts = [
        f'  "{name}": {{\n'
        + ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        + "\n  }"
        for name, entries in lists.items()
    ]
    return "{\n" + head + ",\n".join(parts) + "\n}\n"
