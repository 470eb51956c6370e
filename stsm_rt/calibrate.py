"""Streaming calibration: the ranges of activations, measured on clips that are played as a camera would be.

Clips run through the recognizer that the webcam uses, frame by frame, with the state carried from step to step and
zero at the start of each clip, so the ranges are those of a live stream, its first frames included. Every clip is
played twice: once for the extremes, once for histograms between them.

The command ``python -m stsm_rt.calibrate`` writes them as a small JSON file, by module path. INT8 builds of the same
weights read it and need no data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from tqdm import tqdm

from stsm_rt.engine.base import Engine
from stsm_rt.errors import UserError, report
from stsm_rt.manifest import Manifest
from stsm_rt.playback import calibration_videos
from stsm_rt.quantize import quantization_points
from stsm_rt.ranges import FORMAT_VERSION, METHODS, Ranges
from stsm_rt.recognizer import Recognizer
from stsm_rt.video.sources import open_source

_BINS = 4096
_QUANTIZED_BINS = 128
_CLIPPED = 1e-4  # share of the values that the method "percentile" cuts off, half of it on each side
_DIGITS, _MEAN_DIGITS = 6, 4

Array = npt.NDArray[np.float32]


class ObservedEngine(Engine):
    """An FP32 graph in step form, run slowly, that shows tensors inside it.

    Args:
        path: Engine file for ONNX Runtime, FP32, batch 1.
        tensors: Names of the tensors to show.

    Attributes:
        observe: Called after each step with the name and the value of each of the tensors.

    Raises:
        UserError: The engine cannot be read, or is not FP32 of batch 1.
    """

    def __init__(self, path: Path, tensors: Iterable[str]) -> None:
        self.manifest = manifest = _fp32_manifest(path)
        self.slots = 1
        self.frames = np.zeros((1, manifest.input_height, manifest.input_width, 3), np.uint8)
        self.observe: Callable[[str, Array], None] = lambda name, array: None
        model = onnx.load(path)
        outputs = {output.name for output in model.graph.output}
        self._tensors = list(dict.fromkeys(tensors))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._tensors if name not in outputs)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._outputs = ["logits", *(f"{state.name}_out" for state in manifest.states), *self._tensors]
        self.reset()

    def step(self, frames: npt.NDArray[np.uint8], slots: Sequence[int] | None = None) -> Array:
        """Run one step; see ``Engine.step``."""
        chosen = self._checked(slots)
        self._check_frames(frames, len(chosen))
        states = self.manifest.states
        feeds = {f"{state.name}_in": kept[0] for state, kept in zip(states, self._kept, strict=True)}
        logits, *rest = self._session.run(self._outputs, {"frame": frames, **feeds})
        for kept, new in zip(self._kept, rest[: len(states)], strict=True):
            kept[:] = [*kept[1:], new]
        for name, array in zip(self._tensors, rest[len(states) :], strict=True):
            self.observe(name, array)
        return np.asarray(logits)

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Set the state to zero; see ``Engine.reset``."""
        self._checked(slots)
        self._kept = [[np.zeros(state.shape, np.float32)] * state.delay for state in self.manifest.states]


def _fp32_manifest(path: Path) -> Manifest:
    manifest = Manifest.load(path)
    if manifest.folding == "split":
        raise UserError(
            f"the residual streams of {path} are split, so its layers are not those of the weights; run "
            "python -m stsm_rt.build_engine --int8 --weights WEIGHTS --calibration CLIPS, which calibrates by itself"
        )
    if (manifest.runtime, manifest.precision, manifest.batch) != ("onnxruntime", "fp32", 1):
        raise UserError(
            f"calibration needs an FP32 engine for ONNX Runtime with batch 1, but {path} is "
            f"{manifest.precision} for {manifest.runtime} with batch {manifest.batch}; make one with stsm-rt export"
        )
    return manifest


def calibrate(engine_path: Path, videos: Sequence[Path], *, data: str, method: str = "max") -> Ranges:
    """Measure the ranges of every tensor that an INT8 graph may quantize.

    Args:
        engine_path: FP32 engine for ONNX Runtime, batch 1.
        videos: Clips; each is a stream of its own.
        data: What the clips are, for people.
        method: The record's default method, one of `ranges.METHODS`.

    Returns:
        The ranges by ``"max"`` (the extremes), ``"percentile"`` (all but 1 in 10,000 values) and ``"entropy"`` (the
        magnitude of least Kullback-Leibler divergence; Migacz, "8-bit inference with TensorRT", GTC 2017).

    Raises:
        UserError: There is no clip, one cannot be read, the engine is not FP32 with batch 1, or the method is unknown.
    """
    if not videos:
        raise UserError("calibration needs at least one clip; name a folder of videos, or a video")
    if method not in METHODS:
        raise UserError(f"unknown calibration method {method!r}; there are {', '.join(METHODS)}")
    _fp32_manifest(engine_path)
    points = quantization_points(onnx.load(engine_path).graph)
    engine = ObservedEngine(engine_path, points.values())
    histograms = {name: _Histogram() for name in points.values()}
    engine.observe = lambda name, array: histograms[name].widen(array)
    frames = _play(engine, videos, "extremes")
    engine.observe = lambda name, array: histograms[name].count(array)
    _play(engine, videos, "histograms")
    found = {name: histogram.ranges() for name, histogram in histograms.items()}
    manifest = engine.manifest
    return Ranges(
        format_version=FORMAT_VERSION,
        network=manifest.network,
        shift=manifest.shift["name"],
        weights_sha256=manifest.weights_sha256,
        data=data,
        clips=len(videos),
        frames=frames,
        method=method,
        tensors={point: found[name] for point, name in points.items()},
        means={
            point.removesuffix(".input"): histograms[name].means()
            for point, name in points.items()
            if point.endswith(".input")
        },
    )


class _Histogram:
    """What was seen of one tensor."""

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf
        self._counts = np.zeros(_BINS)
        self._sums: npt.NDArray[np.float64] | None = None
        self._frames = 0

    def widen(self, array: Array) -> None:
        self._low, self._high = min(self._low, float(array.min())), max(self._high, float(array.max()))

    def count(self, array: Array) -> None:
        # OpenCV counts ten times as fast as NumPy; the upper end of its range is exclusive.
        end = self._magnitude
        counts = cv2.calcHist([array.reshape(1, -1)], [0], None, [_BINS], [-end, np.nextafter(np.float32(end), np.inf)])
        self._counts += counts.reshape(-1)
        means = array.mean((0, 2, 3), dtype=np.float64)
        self._sums = means if self._sums is None else self._sums + means
        self._frames += 1

    @property
    def _magnitude(self) -> float:
        return float(max(-self._low, self._high, float(np.finfo(np.float32).tiny)))

    def means(self) -> tuple[float, ...]:
        assert self._sums is not None
        return tuple(float(f"{mean:.{_MEAN_DIGITS}g}") for mean in self._sums / self._frames)

    def ranges(self) -> dict[str, tuple[float, float]]:
        below = np.cumsum(self._counts) / self._counts.sum()
        edges = np.linspace(-self._magnitude, self._magnitude, _BINS + 1)
        low = edges[np.searchsorted(below, _CLIPPED / 2, "right")]
        high = edges[np.searchsorted(below, 1 - _CLIPPED / 2) + 1]
        threshold = self._magnitude * _least_divergent(self._counts[: _BINS // 2][::-1] + self._counts[_BINS // 2 :])
        return {
            "max": self._within(self._low, self._high),
            "percentile": self._within(low, high),
            "entropy": self._within(-threshold, threshold),
        }

    def _within(self, low: float, high: float) -> tuple[float, float]:
        # Zero must be exact: padding and the first frame's state are zeros.
        low, high = min(max(low, self._low), 0.0), max(min(high, self._high), 0.0)
        return float(f"{low:.{_DIGITS}g}"), float(f"{high:.{_DIGITS}g}")


def _least_divergent(counts: npt.NDArray[np.float64]) -> float:
    """Share of the largest magnitude at which clipping and 8 bits lose the least information."""
    # Zeros are exact whatever the range; the many that a ReLU leaves would hide everything else.
    counts = np.concatenate([[0.0], counts[1:]])
    best, share = np.inf, 1.0
    for kept in range(_QUANTIZED_BINS, len(counts) + 1, _QUANTIZED_BINS // 8):
        clipped = counts[:kept].copy()
        original = clipped.copy()
        original[-1] += counts[kept:].sum()
        group = np.arange(kept) * _QUANTIZED_BINS // kept
        filled = clipped > 0
        members = np.bincount(group, filled, _QUANTIZED_BINS)
        sums = np.bincount(group, clipped, _QUANTIZED_BINS)
        approximated = np.where(filled, (sums / np.maximum(members, 1))[group], 0.0)
        p, q = original / max(original.sum(), 1.0), approximated / max(approximated.sum(), 1.0)
        both = (p > 0) & (q > 0)
        divergence = float((p[both] * np.log(p[both] / q[both])).sum()) if both.any() else np.inf
        if divergence < best:
            best, share = divergence, kept / len(counts)
    return share


def _play(engine: Engine, videos: Sequence[Path], what: str) -> int:
    """Play every clip from a fresh state; returns the number of steps."""
    recognizer = Recognizer(engine)
    steps = 0
    for video in tqdm(videos, f"calibrate: {what}", unit="clip", disable=None):
        with open_source(video) as source:
            found = sum(1 for _ in recognizer.run(source))
        if not found:
            raise UserError(f"the calibration clip {video} holds no frame; take it out of the folder")
        steps += found
    return steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="stsm-rt calibrate", description="Record the activation ranges that INT8 engines need."
    )
    parser.add_argument("--engine", type=Path, required=True, help="FP32 engine for ONNX Runtime (.onnx)")
    parser.add_argument(
        "--clips",
        type=Path,
        required=True,
        metavar="DIR|FILE",
        help="a video, a folder of videos, or a data set with manifest.csv, of whose training list clips are taken",
    )
    parser.add_argument("--split", type=int, default=1, help="of the data set (default: 1)")
    parser.add_argument("--method", choices=METHODS, default="max", help="default of INT8 builds (default: max)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write (.json)")
    options = parser.parse_args(argv)
    try:
        videos, data = calibration_videos(options.clips, options.split)
        ranges = calibrate(options.engine, videos, data=data, method=options.method)
        ranges.save(options.out)
    except UserError as error:
        return report(error)
    print(f"{options.out}: {len(ranges.tensors)} tensors of {ranges.network}, {ranges.frames} steps of {ranges.data}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
