"""What an engine is built of: a network, its weights and their recorded ranges. Needs torch."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stsm_rt.calibrate import calibrate
from stsm_rt.check_weights import random_weights, weights_sha256
from stsm_rt.engine.base import shipped_folder
from stsm_rt.errors import UserError
from stsm_rt.export import Precision, Runtime, export_engine
from stsm_rt.manifest import Manifest, sha256_of
from stsm_rt.model import ModelSpec, known_accuracy, load_model
from stsm_rt.networks import StreamingNetwork
from stsm_rt.playback import calibration_videos
from stsm_rt.ranges import Ranges
from stsm_rt.shift_folding import Folding

DEFAULT_WEIGHTS = "actions_lite0"
_RANDOM_SHIFT = "stsm_online"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an engine is built of.

    Attributes:
        name: For file names.
        network: FP32, in evaluation mode.
        spec: The record of its weights.
        weights_sha256: Of the weights.
        ranges: Recorded activation ranges, for INT8.
    """

    name: str
    network: StreamingNetwork
    spec: ModelSpec
    weights_sha256: str
    ranges: Ranges | None = None

    def export(
        self,
        target: Path,
        runtime: Runtime,
        precision: Precision,
        *,
        batch: int = 1,
        exclude: Sequence[str] = (),
        folding: Folding | None = None,
    ) -> Manifest:
        """Write a graph for a runtime; see `stsm_rt.export.export_engine`.

        Raises:
            UserError: As there, or the file cannot be written.
        """
        try:
            return export_engine(
                self.network,
                self.spec,
                target,
                weights_sha256=self.weights_sha256,
                runtime=runtime,
                precision=precision,
                batch=batch,
                ranges=self.ranges if precision == "int8" else None,
                exclude=exclude if precision == "int8" else (),
                folding=folding,
            )
        except OSError as error:
            raise UserError(f"the engine {target} cannot be written ({error}); choose another file with -o") from error


def load_source(options: argparse.Namespace) -> Source:
    """The network that the options of ``build_engine`` name, with its ranges if the precision is int8.

    Raises:
        UserError: Weights or a calibration that cannot be read, or options that contradict them.
    """
    path = options.weights or _shipped_weights(options.network)
    source = _random(options) if path is None else _trained(options, path)
    accuracy = known_accuracy(options.measured, source.weights_sha256, options.precision, source.spec)
    source = dataclasses.replace(source, spec=dataclasses.replace(source.spec, accuracy=accuracy))
    if options.precision != "int8":
        return source
    return dataclasses.replace(source, ranges=_ranges(options, source))


def _random(options: argparse.Namespace) -> Source:
    height, width = options.size or (224, 224)
    weights = random_weights(options.network, height=height, width=width)
    print(f"weights     {weights.source}: the engine is good for timing, it recognizes nothing")
    network = weights.network(_RANDOM_SHIFT)
    assert network.shift is not None
    return Source(
        name=options.network,
        network=network,
        spec=dataclasses.replace(weights.spec, shift=network.shift.to_json()),
        weights_sha256=weights_sha256(weights),
    )


def _trained(options: argparse.Namespace, path: Path) -> Source:
    network, spec = load_model(path)
    if options.network not in (None, spec.network):
        raise UserError(f"{path} holds a {spec.network}, not a {options.network}; leave --network out")
    if options.size not in (None, (spec.height, spec.width)):
        raise UserError(f"{path} was trained for {spec.height}x{spec.width} pixels; leave --size out")
    print(f"weights     {path.name}")
    return Source(name=path.stem, network=network, spec=spec, weights_sha256=sha256_of(path))


def _shipped_weights(network: str | None) -> Path | None:
    folder = shipped_folder("engines")
    for path in sorted(folder.glob("*.safetensors")) if folder else []:
        if path.stem == DEFAULT_WEIGHTS if network is None else load_model(path)[1].network == network:
            return path
    if network is None:
        raise UserError(f"the shipped weights {DEFAULT_WEIGHTS}.safetensors are not here; give --weights or --network")
    return None


def _ranges(options: argparse.Namespace, source: Source) -> Ranges:
    if options.calibration is None:
        path = _recorded(source)
        print(f"calibration {path.name}: recorded for these weights")
        ranges = Ranges.load(path)
    elif options.calibration.suffix == ".json":
        ranges = Ranges.load(options.calibration)
    else:
        videos, data = calibration_videos(options.calibration, options.split)
        print(f"calibration {data}: {len(videos)} clip{'s' if len(videos) > 1 else ''}, played as streams")
        with tempfile.TemporaryDirectory() as folder:
            engine = Path(folder) / "fp32.onnx"
            source.export(engine, "onnxruntime", "fp32", folding="none")
            ranges = calibrate(engine, videos, data=data)
    return ranges.with_method(options.calibration_method or ranges.method)


def _recorded(source: Source) -> Path:
    folder = shipped_folder("calibration")
    for path in sorted(folder.glob("*.json")) if folder else []:
        if Ranges.load(path).weights_sha256 == source.weights_sha256:
            return path
    raise UserError(
        f"no calibration is recorded for the weights of {source.name}; give --calibration a folder with clips of what "
        "the camera will see"
    )
