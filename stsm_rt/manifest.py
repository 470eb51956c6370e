"""What an engine file is and expects: the JSON record that lies beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stsm_rt.errors import UserError

FORMAT_VERSION = 1

_RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "onnx")
_PRECISIONS = ("fp32", "fp16", "int8")
_FOLDINGS = ("none", "depthwise", "split")
_ADDED = ("zero", "folding", "preprocessing")  # fields that records of earlier exports lack
_STATE_DTYPES = ("float32", "float16", "uint8")
_TYPE_WORDS = {int: "a whole number", float: "a number", str: "a text", dict: "an object"}

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """One state of a network in step form.

    Attributes:
        name: For example ``"state_00"``; the graph's names are ``f"{name}_in"`` and ``f"{name}_out"``.
        shape: Shape of the tensor, batch dimension first.
        dtype: ``"float32"``, ``"float16"``, or ``"uint8"`` in INT8 engines for processors.
        delay: Frames between a write and its read; the engine rotates ``delay + 1`` buffers.
        zero: What stands for 0, of which the state consists at the start of a stream; not 0 for bytes only.

    Raises:
        ValueError: If a value is outside its range.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    delay: int = 1
    zero: int = 0

    def __post_init__(self) -> None:
        _check(self.name != "", "a state's name must not be empty")
        _check(
            len(self.shape) > 0 and min(self.shape) > 0,
            f"the shape of {self.name!r} must hold positive sizes, not {list(self.shape)}",
        )
        _check(
            self.dtype in _STATE_DTYPES,
            f"the dtype of {self.name!r} must be {', '.join(_STATE_DTYPES)}, not {self.dtype!r}",
        )
        _check(
            0 <= self.zero <= (255 if self.dtype == "uint8" else 0),
            f"the zero of {self.name!r} must be 0, or a byte of a state in bytes, not {self.zero}",
        )
        _check(self.delay >= 1, f"the delay of {self.name!r} must be at least 1, not {self.delay}")


@dataclass(frozen=True, kw_only=True)
class DecisionSpec:
    """How logits become a decision; chosen in training, on held-out source groups.

    Attributes:
        smoothing: Steps over which the class probabilities are averaged.
        threshold: Score, 0 to 1, at which an event may start.
        release: Score, 0 to ``threshold``, below which a running event ends.
        min_steps: Consecutive steps at or above the threshold before an event starts.
        temperature: Positive number by which logits are divided before the softmax.

    Raises:
        ValueError: If a value is outside its range.
    """

    smoothing: int
    threshold: float
    release: float
    min_steps: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(self.smoothing >= 1, f"smoothing must be at least 1, not {self.smoothing}")
        _check(self.min_steps >= 1, f"min_steps must be at least 1, not {self.min_steps}")
        _check(0 <= self.threshold <= 1, f"threshold must be between 0 and 1, not {self.threshold}")
        _check(
            0 <= self.release <= self.threshold,
            f"release must be between 0 and the threshold {self.threshold}, not {self.release}",
        )
        _check(
            self.temperature > 0 and math.isfinite(self.temperature),
            f"temperature must be positive, not {self.temperature}",
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an engine file is and expects.

    Attributes:
        format_version: Version of this record, ``FORMAT_VERSION``.
        runtime: Runtime that runs the engine file: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"`` or
            ``"tensorrt-rtx"``; or ``"onnx"``, a graph for TensorRT's parser that runs nowhere until
            ``build_engine`` has made a plan of it on the device.
        runtime_version: Version of the runtime that the engine was built with.
        device: What the engine was built for: ``"cpu"``; compute capabilities, ``"sm_86"``, ``"sm_86,sm_89"`` or, of
            a hardware-compatible plan, ``"sm_80+"``; ``"any"`` of a graph.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        network: Name of the network.
        shift: The shift spec, ``{"name": ..., "groups": [{"fraction": "1/8", "dt": 1, "dh": 0, "dw": 0}]}``.
        input_height: Height of the input in pixels.
        input_width: Width of the input in pixels.
        batch: Rows of the graph's input; more than 1 means that the graph has an input ``active`` too.
        frame_rate: Model steps per second of source time.
        labels: One label per logit.
        background: The label that means "nothing I know", one of ``labels``; None if the network has none.
        states: The states, in the graph's order.
        decision: How logits become a decision.
        sha256: SHA-256 of the engine file, 64 hexadecimal digits.
        weights_sha256: SHA-256 of the weights that the engine was made from.
        calibration: How an INT8 engine was calibrated; None if it was not.
        accuracy: Measured accuracy; None where it is not known.
        folding: The form of the shift in the graph: ``"none"``, slices and pads; ``"depthwise"``, convolutions with
            one-hot kernels (`stsm_rt.shift_folding`); ``"split"``, residual streams kept apart
            (`stsm_rt.split_streams`).
        preprocessing: What the graph itself does to a frame, as the weights expect it: the order of colours, mean and
            standard deviation of each in the units of a frame (0 to 255). None in engines of earlier exports.

    Raises:
        ValueError: If a value is outside its range or the fields contradict each other.
    """

    format_version: int
    runtime: str
    runtime_version: str
    device: str
    precision: str
    network: str
    shift: dict[str, Any]
    input_height: int
    input_width: int
    batch: int
    frame_rate: float
    labels: tuple[str, ...]
    background: str | None
    states: tuple[StateSpec, ...]
    decision: DecisionSpec
    sha256: str
    weights_sha256: str
    calibration: dict[str, Any] | None
    accuracy: dict[str, Any] | None
    folding: str = "none"
    preprocessing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check(
            self.format_version == FORMAT_VERSION,
            f"format version {FORMAT_VERSION} is understood, not {self.format_version}",
        )
        _check(
            self.runtime in _RUNTIMES,
            f"runtime must be {', '.join(_RUNTIMES[:-1])} or {_RUNTIMES[-1]}, not {self.runtime!r}",
        )
        _check(
            self.precision in _PRECISIONS,
            f"precision must be {', '.join(_PRECISIONS[:-1])} or {_PRECISIONS[-1]}, not {self.precision!r}",
        )
        _check(
            self.folding in _FOLDINGS,
            f"folding must be {', '.join(_FOLDINGS)}, not {self.folding!r}",
        )
        groups = self.shift.get("groups")
        _check(
            isinstance(self.shift.get("name"), str)
            and isinstance(groups, list)
            and all(isinstance(group, dict) for group in groups),
            "shift must hold a text 'name' and a list of objects 'groups'",
        )
        for name in ("input_height", "input_width", "batch", "frame_rate"):
            value = getattr(self, name)
            _check(value > 0 and math.isfinite(value), f"{name} must be positive, not {value}")
        _check(len(self.labels) > 0, "labels must not be empty")
        _check(len(set(self.labels)) == len(self.labels), "labels must differ from each other")
        _check(
            self.background is None or self.background in self.labels,
            f"background {self.background!r} must be one of the labels",
        )
        names = [state.name for state in self.states]
        _check(len(set(names)) == len(names), "the names of the states must differ from each other")
        for state in self.states:
            _check(
                state.shape[0] == self.batch,
                f"the shape of {state.name!r} must start with the batch {self.batch}, not {state.shape[0]}",
            )
        for name in ("sha256", "weights_sha256"):
            digest = getattr(self, name)
            _check(
                len(digest) == 64 and set(digest) <= set("0123456789abcdef"),
                f"{name} must be 64 lower-case hexadecimal digits, not {digest!r}",
            )

    def to_json(self) -> str:
        """Return the record as indented JSON that ends with a newline."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read a record from JSON.

        Args:
            text: The JSON text.
            source: Where the text came from, for the error.

        Returns:
            The manifest.

        Raises:
            UserError: If the text is not JSON, has another format version, or a field is missing, unknown,
                mistyped or outside its range.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the manifest {source} is not valid JSON ({error}); export the engine again") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise UserError(
                f"the manifest {source} has format version {version}, this stsm-rt understands "
                f"{FORMAT_VERSION}; export the engine again or install the stsm-rt it was made with"
            )
        try:
            return _record(cls, data, "the record")
        except (ValueError, OverflowError) as error:
            raise UserError(f"the manifest {source} is not usable: {error}; export the engine again") from error

    @classmethod
    def load(cls, engine_path: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of an engine file and check that it belongs to that file.

        Args:
            engine_path: Path of the engine file; the manifest is read from ``f"{engine_path}.json"``.

        Returns:
            The manifest.

        Raises:
            UserError: If the engine file or the manifest is absent or unreadable, the manifest is malformed,
                or its SHA-256 is not the engine file's.
        """
        engine_path, path = Path(engine_path), manifest_path(engine_path)
        if not engine_path.is_file():
            raise UserError(f"there is no engine file {engine_path}; give the path of an engine made by stsm-rt export")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(
                f"the engine {engine_path} has no manifest, {path.name} was expected beside it; "
                "copy both files or export the engine again"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the manifest {path} cannot be read ({error}); export the engine again") from error
        manifest = cls.from_json(text, str(path))
        try:
            digest = sha256_of(engine_path)
        except OSError as error:
            raise UserError(f"the engine {engine_path} cannot be read ({error})") from error
        if digest != manifest.sha256:
            raise UserError(
                f"the engine {engine_path} has SHA-256 {digest[:12]}..., its manifest says "
                f"{manifest.sha256[:12]}...; the file is damaged or the manifest belongs to another engine, "
                "so copy both files again"
            )
        return manifest

    def save(self, engine_path: str | os.PathLike[str]) -> None:
        """Write the manifest beside an engine file, whole or not at all.

        Args:
            engine_path: Path of the engine file; the manifest goes to ``f"{engine_path}.json"``.

        Raises:
            OSError: If the folder cannot be written to.
        """
        path = manifest_path(engine_path)
        text = self.to_json()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def manifest_path(engine_path: str | os.PathLike[str]) -> Path:
    """Return where the manifest of an engine file lies: its path with ``.json`` appended."""
    return Path(f"{os.fspath(engine_path)}.json")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 lower-case hexadecimal digits.

    Raises:
        OSError: If the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _record(kind: type[_T], data: object, where: str) -> _T:
    """Build a dataclass from a JSON object, holding every field to its annotation."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, not {json.dumps(data)[:60]}")
    hints = typing.get_type_hints(kind)
    missing, unknown = [n for n in hints if n not in data and n not in _ADDED], [n for n in data if n not in hints]
    _check(not missing, f"{where} lacks {', '.join(missing)}")
    _check(not unknown, f"{where} has unknown fields {', '.join(unknown)}")
    return kind(**{name: _value(hint, data[name], name) for name, hint in hints.items() if name in data})


def _value(hint: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {json.dumps(value)[:60]}")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast("type[Any]", hint), value, where)
    expected = origin or hint
    accepted = (int, float) if expected is float else expected
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"{where} must be {_TYPE_WORDS[expected]}, not {json.dumps(value)[:60]}")
    return float(value) if expected is float else value
