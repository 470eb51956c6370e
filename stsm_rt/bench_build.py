"""Engines that the bench builds for itself: a shifted network and what it is compared with. Needs torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from stsm_rt.bench_run import Contender, Group
from stsm_rt.build_source import Source
from stsm_rt.calibrate import calibrate
from stsm_rt.check_weights import Weights, moving_clip, random_weights, shipped_weights, weights_sha256
from stsm_rt.engine.base import shipped_folder
from stsm_rt.errors import UserError
from stsm_rt.export import Precision, Runtime
from stsm_rt.manifest import Manifest, sha256_of
from stsm_rt.model import load_model
from stsm_rt.playback import calibration_videos
from stsm_rt.ranges import Ranges
from stsm_rt.shift import shift_spec
from stsm_rt.shift_folding import Folding

_RUNTIMES = ("onnxruntime", "openvino")
_CALIBRATION_FRAMES = 16
_RANDOM_SIZE = (224, 224)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is built, and what it is compared with.

    Attributes:
        weights: Of one network.
        runtime: ``"onnxruntime"`` or ``"openvino"``.
        precision: ``"fp32"`` or ``"int8"``.
        shift: The shift spec as JSON.
        calibration: A video or a folder of videos, for ``"int8"``; None: the ranges recorded for these weights, else
            those of a moving picture from a seed.
        exclude: Patterns of module paths whose convolutions do not become int8; none: as recorded.
        engine: The engine of the shifted network where it is built already.
    """

    weights: Weights
    runtime: Runtime
    precision: Precision
    shift: dict[str, Any]
    calibration: Path | None = None
    exclude: Sequence[str] = ()
    engine: Path | None = None

    def group(self, against: Sequence[str], folder: Path) -> Group:
        """Build the engines of one run.

        Args:
            against: What to compare with: ``"plain"``, the network without the shift; ``"naive"``, the shift as slices
                and pads; ``"self"``, the shifted network again.
            folder: Where to build.

        Raises:
            UserError: What cannot be built, and why; see `stsm_rt.export.export_engine`.
        """
        common = f"{self.weights.spec.network} {self.precision} {self.runtime}"
        shifted = f"{common} {self.shift['name']}"
        builder = _Builder(self, folder)
        naive = []
        if "naive" in against:
            path = builder.build(self.shift, "naive", folding="none")
            naive = [Contender(name=f"{shifted} naive", path=path)]
        # Neighbours are compared best: the plain network stands beside the shifted one.
        plain = []
        if "plain" in against:
            plain = [Contender(name=f"{common} plain", path=builder.build(None, "plain"), plain=True)]
        own = [Contender(name=shifted, path=self.engine or builder.build(self.shift, "shifted"))]
        again = [Contender(name=f"{shifted} again", path=own[0].path)] if "self" in against else []
        contenders = (*naive, *plain, *own, *again)
        pairs = [(plain, own), (naive, own), (plain, naive), (own, again)]
        compared = ((contenders.index(a), contenders.index(b)) for left, right in pairs for a in left for b in right)
        return Group(contenders=contenders, compared=tuple(compared), subject=contenders.index(own[0]))


class _Builder:
    """Builds the engines of one subject; INT8 takes the same ranges for all, so that they differ in nothing else."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self._subject, self._folder = subject, folder

    def build(self, shift: dict[str, Any] | None, name: str, *, folding: Folding | None = None) -> Path:
        """The engine of the network with a shift, or without one; by default in the form that is fastest."""
        subject, source = self._subject, self._source(shift)
        exclude = subject.exclude
        if subject.precision == "int8":
            source = dataclasses.replace(source, ranges=self._ranges)
            exclude = exclude or self._ranges.exclude.get(subject.runtime, ())
        path = self._folder / name / "engine.onnx"
        source.export(path, subject.runtime, subject.precision, exclude=exclude, folding=folding)
        return path

    def _source(self, shift: dict[str, Any] | None) -> Source:
        weights = self._subject.weights
        spec = dataclasses.replace(weights.spec, shift=shift)
        network = spec.build()
        network.load_state_dict(weights.tensors)
        digest = weights_sha256(weights)
        return Source(name=spec.network, network=network.eval(), spec=spec, weights_sha256=digest)

    @functools.cached_property
    def _ranges(self) -> Ranges:
        source, given = self._source(self._subject.shift), self._subject.calibration
        recorded = _recorded_ranges(source.weights_sha256) if given is None else None
        if recorded is not None:
            return recorded
        fp32 = self._folder / "fp32" / "engine.onnx"
        source.export(fp32, "onnxruntime", "fp32", folding="none")
        videos, data = calibration_videos(given) if given else ([self._clip()], "a moving picture")
        return calibrate(fp32, videos, data=data)

    def _clip(self) -> Path:
        spec, path = self._subject.weights.spec, self._folder / "clip.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), spec.frame_rate, (spec.width, spec.height))
        for frame in moving_clip(_CALIBRATION_FRAMES, spec.height, spec.width, seed=0):
            writer.write(frame)
        writer.release()
        return path


def _recorded_ranges(sha256: str) -> Ranges | None:
    """The shipped ranges of these weights."""
    folder = shipped_folder("calibration")
    found = map(Ranges.load, sorted(folder.glob("*.json")) if folder else [])
    return next((ranges for ranges in found if ranges.weights_sha256 == sha256), None)


def subject_of_network(
    network: str | None,
    *,
    runtime: Runtime,
    precision: Precision,
    shift: str,
    size: tuple[int, int] | None = None,
    weights: Path | None = None,
    calibration: Path | None = None,
    exclude: Sequence[str] = (),
) -> Subject:
    """A network by its name, with trained weights where there are some, else random ones.

    Args:
        network: One of `stsm_rt.networks.ARCHITECTURES`; None: that of the weights.
        runtime: As in `Subject`.
        precision: Likewise.
        shift: Name of a preset.
        size: Height and width of the input of random weights.
        weights: Trained weights; None: the shipped ones of this network, unless a size is given, else random ones.
        calibration: As in `Subject`.
        exclude: Likewise.

    Raises:
        UserError: Unknown network or shift, or options that contradict each other.
    """
    if weights is not None:
        found = _read(weights)
        if network not in (None, found.spec.network):
            raise UserError(f"{weights} holds a {found.spec.network}, not a {network}; leave --network out")
        if size not in (None, (found.spec.height, found.spec.width)):
            raise UserError(f"{weights} was trained for {found.spec.height}x{found.spec.width}; leave --size out")
    else:
        assert network is not None
        height, width = size or _RANDOM_SIZE
        shipped = shipped_weights(network) if size is None else None
        found = shipped or random_weights(network, height=height, width=width)
    return Subject(
        weights=found,
        runtime=runtime,
        precision=precision,
        shift=shift_spec(shift).to_json(),
        calibration=calibration,
        exclude=exclude,
    )


def subject_of_engine(path: Path, *, weights: Path | None = None) -> Subject:
    """The network of an engine, with the weights that its manifest names.

    Args:
        path: The engine file.
        weights: A file of weights; None: the shipped ones, or the random ones of ``build_engine``.

    Raises:
        UserError: Its weights are not at hand, it has no shift, or it is for a runtime that is not built for here.
    """
    manifest = Manifest.load(path)
    if manifest.runtime not in _RUNTIMES or manifest.batch != 1:
        raise UserError(
            f"{path} is for {manifest.runtime} with batch {manifest.batch}; networks to compare with are built for "
            f"{' and '.join(_RUNTIMES)} with batch 1"
        )
    if not manifest.shift["groups"]:
        raise UserError(f"{path} has no shift, so there is no plain network to compare it with; leave --against out")
    given = _read(weights) if weights is not None else shipped_weights(manifest.network)
    size = manifest.input_height, manifest.input_width
    for found in (given, random_weights(manifest.network, height=size[0], width=size[1]) if weights is None else None):
        if found is not None and weights_sha256(found) == manifest.weights_sha256:
            return Subject(
                weights=found,
                runtime="openvino" if manifest.runtime == "openvino" else "onnxruntime",
                precision="int8" if manifest.precision == "int8" else "fp32",
                shift=manifest.shift,
                exclude=manifest.calibration["excluded"] if manifest.calibration else (),
                engine=path,
            )
    raise UserError(
        f"the weights of {path} ({manifest.weights_sha256[:12]}...) are not at hand; give the file with --weights"
    )


def _read(path: Path) -> Weights:
    network, spec = load_model(path)
    return Weights(path.name, sha256_of(path), spec, network.state_dict())
