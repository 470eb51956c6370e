"""What a precision costs and brings: accuracy, speed, size, and which layers are to blame.

An INT8 engine that is slower than FP32 or has lost its accuracy looks like any other; this says so.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from tqdm import tqdm

from stsm_rt.bench import Comparison, compare, time_engines
from stsm_rt.engine import Engine
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.errors import UserError
from stsm_rt.integer_graph import byte_states, quantize_for
from stsm_rt.manifest import Manifest, sha256_of
from stsm_rt.playback import Clip, play_clip, read_clips
from stsm_rt.quantize import convolutions
from stsm_rt.ranges import Ranges
from stsm_rt.recognizer import Recognizer
from stsm_rt.video.sources import open_source

PAIRS = 12
_SHOWN_LAYERS = 5
_CLIPS_FOR_LAYERS = 8

Frames = list[npt.NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How an engine does on labelled clips.

    Attributes:
        name: Of the engine, for people.
        correct: For each clip, whether the decision at its last frame was right.
        decisions: For each clip, that decision.
    """

    name: str
    correct: tuple[bool, ...]
    decisions: tuple[str, ...]

    @property
    def top1(self) -> float:
        """Share of the clips that were right."""
        return sum(self.correct) / len(self.correct)

    def changed(self, other: Accuracy) -> int:
        """Number of clips that another engine decided otherwise."""
        return sum(a != b for a, b in zip(self.decisions, other.decisions, strict=True))


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """FP32 beside another precision.

    Attributes:
        accuracies: FP32 first, the reported engine last; empty where there were no labelled clips.
        layers: The layers that are worst for the logits, worst first: module path and the error of the logits when
            that layer alone is INT8, as root mean square relative to the logits'.
        sizes: Engine files in bytes by name.
        speed: Time of a step against FP32, in pairs of blocks; None where it was not timed.
        excluded: Layers that were left out of INT8.
    """

    accuracies: tuple[Accuracy, ...]
    layers: tuple[tuple[str, float], ...]
    sizes: dict[str, int]
    speed: Comparison | None
    excluded: tuple[str, ...]

    @property
    def loss(self) -> float | None:
        """Points of top-1 that are lost against FP32."""
        if not self.accuracies:
            return None
        right = [sum(each.correct) for each in (self.accuracies[0], self.accuracies[-1])]
        return 100 * (right[0] - right[1]) / len(self.accuracies[0].correct)

    def lines(self) -> Iterator[str]:
        """The report for people, warnings last."""
        for accuracy in self.accuracies:
            count = len(accuracy.correct)
            differ = accuracy.changed(self.accuracies[0])
            others = "" if accuracy is self.accuracies[0] else f", decides {differ} otherwise than FP32"
            yield f"top-1       {accuracy.name}: {100 * accuracy.top1:.1f} % of {count} clips{others}"
        for name, size in self.sizes.items():
            yield f"size        {name}: {size / 1e6:.1f} MB"
        if self.speed is not None:
            yield (
                f"speed       {1 / self.speed.ratio_median:.2f} times FP32 on this machine "
                f"({1 / self.speed.ratio_max:.2f} to {1 / self.speed.ratio_min:.2f} over {self.speed.pairs} pairs)"
            )
        for path, error in self.layers[:_SHOWN_LAYERS]:
            yield f"layer       {path}: {100 * error:.1f} % error of the logits when it alone is INT8"
        if self.excluded:
            yield f"excluded    {', '.join(self.excluded)}"
        yield from self.warnings()

    def warnings(self) -> Iterator[str]:
        """What speaks against the engine."""
        if self.speed is not None and self.speed.ratio_median >= 1:
            yield "warning     INT8 is not faster than FP32 on this machine; use FP32 here"
        if self.loss is not None and self.loss > 1:
            left = [path for path, _ in self.layers if path not in self.excluded]
            worst = " ".join(f"--exclude-layer {path}" for path in left[:_SHOWN_LAYERS])
            yield (
                f"warning     INT8 loses {self.loss:.1f} points of top-1; build with {worst}, or with --auto-exclude 1"
            )


def report_precision(
    fp32: Path,
    fp16: Path,
    ranges: Ranges,
    runtime: str,
    data: Path,
    split: int,
    *,
    exclude: Sequence[str] = (),
    most: float | None = None,
) -> PrecisionReport:
    """Compare INT8 with FP32, and leave layers out until it is good enough.

    Args:
        fp32: Engine of batch 1 for ONNX Runtime or OpenVINO, whose streams are not split.
        fp16: The same network as a graph for TensorRT, which ONNX Runtime computes node by node here.
        ranges: Of the same weights.
        runtime: Whose form of INT8, one of `quantize.FORMS`. That of ``"onnx"``, for TensorRT, is computed by ONNX
            Runtime, node by node, and not timed.
        data: Folder with ``manifest.csv`` and labelled clips.
        split: Whose test list is played.
        exclude: Patterns of layers that do not become int8 in any case.
        most: Points of top-1 that INT8 may lose: the layers that are worst alone are left out, one, two, three, four,
            five, six, eight ... of them, until it loses no more. None: no layer is added.

    Raises:
        UserError: A clip cannot be read or shows what the network does not know, or even with half of the layers in
            floating point more is lost.
    """
    manifest = Manifest.load(fp32)
    clips = read_clips(data, split, [label for label in manifest.labels if label != manifest.background])
    graph = onnx.load(fp32)
    layers = convolutions(graph.graph)
    chosen = [layer for layer in layers if not any(fnmatchcase(layer, pattern) for pattern in exclude)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "int8.onnx"

        def int8(excluded: Sequence[str]) -> Engine:
            quantized = quantize_for(runtime, graph, ranges, excluded)
            onnx.save(quantized, file)
            states = byte_states(quantized, manifest.states)
            dataclasses.replace(manifest, precision="int8", sha256=sha256_of(file), states=states).save(file)
            return OnnxRuntimeEngine(file, fused=False) if runtime == "onnx" else Engine.open(file)

        engine = Engine.open(fp32)
        accuracies = [accuracy(engine, clips, "FP32")]
        accuracies.append(accuracy(OnnxRuntimeEngine(fp16, fused=False), clips, "FP16"))
        ranked = LayerErrors(engine, clips).rank(
            chosen, lambda layer: int8([other for other in layers if other != layer])
        )
        for count in _counts(len(chosen)):
            excluded = [*exclude, *(layer for layer, _ in ranked[:count])]
            found = PrecisionReport(
                accuracies=(*accuracies, accuracy(int8(excluded), clips, "INT8")),
                layers=ranked,
                sizes={"FP32": fp32.stat().st_size, "FP16": fp16.stat().st_size, "INT8": file.stat().st_size},
                speed=time_ratio(fp32, file) if runtime != "onnx" else None,
                excluded=tuple(excluded),
            )
            assert found.loss is not None
            if most is None or found.loss <= most:
                return found
            print(f"excluded    {count} of {len(chosen)} layers: INT8 loses {found.loss:.1f} points")
        raise UserError(
            f"INT8 loses more than {most:g} points even with half of the layers in floating point; calibrate with "
            "clips that are more like the camera's"
        )


def _counts(layers: int) -> Iterator[int]:
    count = 0
    while count <= layers // 2:
        yield count
        count += max(1, count // 3)


def accuracy(engine: Engine, clips: Sequence[Clip], name: str) -> Accuracy:
    """Play labelled clips through the recognizer that the webcam uses, as ``stsm-rt evaluate`` does.

    Args:
        engine: Open; slot 0 is used.
        clips: The clips.
        name: Of the engine, for people.

    Raises:
        UserError: A clip cannot be read.
    """
    recognizer = Recognizer(engine, topk=5)
    outcomes = [play_clip(recognizer, clip) for clip in tqdm(clips, f"top-1 of {name}", unit="clip", disable=None)]
    return Accuracy(
        name=name,
        correct=tuple(outcome.prediction == outcome.label for outcome in outcomes),
        decisions=tuple(outcome.prediction for outcome in outcomes),
    )


def time_ratio(fp32: Path, other: Path) -> Comparison:
    """Time two engines in turns, in one process."""
    engines = [Engine.open(path, slots=Manifest.load(path).batch) for path in (fp32, other)]
    runs = time_engines(engines, ["FP32", other.name], PAIRS)
    return compare(*runs)


class LayerErrors:
    """Which layers INT8 hurts most: each one alone is quantized, and the logits compared with FP32's.

    Args:
        fp32: Open FP32 engine, batch 1.
        clips: Of which a few, evenly spread, are played.

    Raises:
        UserError: A clip cannot be read.
    """

    def __init__(self, fp32: Engine, clips: Sequence[Clip]) -> None:
        step = max(len(clips) // _CLIPS_FOR_LAYERS, 1)
        self._streams = [self._frames(fp32, clip) for clip in clips[::step][:_CLIPS_FOR_LAYERS]]
        self._expected = self._logits(fp32)

    def rank(self, layers: Sequence[str], build: Callable[[str], Engine]) -> tuple[tuple[str, float], ...]:
        """Errors of the logits by layer, largest first.

        Args:
            layers: Module paths.
            build: Makes the engine in which only that layer is INT8.
        """
        scale = float(np.sqrt((self._expected**2).mean()))
        errors = []
        for layer in tqdm(layers, "error by layer", unit="layer", disable=None):
            difference = self._logits(build(layer)) - self._expected
            errors.append((layer, float(np.sqrt((difference**2).mean())) / scale))
        return tuple(sorted(errors, key=lambda item: -item[1]))

    def _frames(self, engine: Engine, clip: Clip) -> Frames:
        """The network's input at every step of a clip."""
        recognizer = Recognizer(engine)
        with open_source(clip.path) as source:
            return [engine.frames.copy() for frame, time in source if recognizer.update(frame, time)]

    def _logits(self, engine: Engine) -> npt.NDArray[np.float32]:
        logits = []
        for stream in self._streams:
            engine.reset()
            logits += [engine.step(frame, [0]).copy() for frame in stream]
        return np.concatenate(logits)
