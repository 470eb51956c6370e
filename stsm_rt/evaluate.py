"""The command that measures engines and weights: labelled videos, untrimmed videos, videos of something else.

The streaming protocol plays every video frame by frame through the recognizer that the webcam uses; the clip protocols
run weights on clips cut from the videos, as papers do.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stsm_rt.engine import Engine, embedded_engine
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.errors import UserError, report
from stsm_rt.evaluation_report import check_folder, report_lines, write_report
from stsm_rt.evaluation_set import PARTS, EvaluationSet, as_clips
from stsm_rt.event_scores import read_annotations
from stsm_rt.manifest import Manifest, sha256_of
from stsm_rt.recognizer import Recognizer
from stsm_rt.streaming_protocol import (
    LOOP_SECONDS,
    accuracy_record,
    annotated_record,
    loop_record,
    negatives_record,
    play_clips,
    rooms_record,
)

_CLIP_PROTOCOLS = ("efficient", "accurate", "dense")
_STREAMING = "streaming"
_TOLERANCE = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        0, or 2 if something that was given cannot be used.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if problem := _problem(arguments):
        parser.error(problem)
    try:
        if arguments.json:
            check_folder(arguments.json)
        record = _stream(arguments) if arguments.protocol == _STREAMING else _clips(arguments)
        print("\n".join(report_lines(record)))
        if arguments.json:
            write_report(record, arguments.json)
    except UserError as error:
        return report(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stsm-rt evaluate",
        description="Measure an engine, or weights, on labelled videos, on untrimmed videos with annotated actions, "
        "and on videos where nothing should be recognized.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--engine", type=Path, metavar="FILE", help="engine file (default: the embedded engine)")
    what.add_argument("--weights", type=Path, metavar="FILE", help="weights (.safetensors), run by PyTorch")
    parser.add_argument(
        "--protocol",
        choices=(_STREAMING, *_CLIP_PROTOCOLS),
        default=_STREAMING,
        help="streaming: whole videos, frame by frame, decision at the last frame (default); of weights also "
        "efficient: 1 clip, centre crop; accurate: 2 clips x 3 crops; dense: 10 clips x 3 crops of 64-frame windows",
    )
    data = parser.add_argument_group("labelled videos")
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    data.add_argument(
        "--dataset", choices=tuple(PARTS), help="format of its annotations (default: a manifest.csv of ours in DIR)"
    )
    data.add_argument("--split", type=int, default=1, help="split whose videos are played (default: 1)")
    data.add_argument(
        "--part",
        choices=("train", "validation", "test"),
        help="part of the split (default: the one that is published with labels, validation or test)",
    )
    data.add_argument("--annotations", type=Path, metavar="PATH", help="annotations, where not in their usual place")
    data.add_argument("--image-template", metavar="NAME", help="extracted frames are named so, such as img_{:05d}.jpg")
    data.add_argument("--frame-rate", type=float, metavar="FPS", help="frames per second of extracted frames")
    data.add_argument(
        "--missing", type=float, default=0.01, metavar="SHARE", help="of the videos that may be absent (default: 0.01)"
    )
    data.add_argument(
        "--loop-events",
        action="store_true",
        help=f"also loop each correctly classified clip to {LOOP_SECONDS:g} s and count its events",
    )
    clips = parser.add_argument_group("clip protocols")
    clips.add_argument("--frames", type=int, help="frames of a clip (default: as in training, or 8)")
    clips.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    clips.add_argument("--workers", type=int, help="processes that decode (default: 0, this one)")
    streams = parser.add_argument_group("untrimmed videos")
    streams.add_argument(
        "--events",
        type=Path,
        metavar="CSV",
        help="annotated actions in untrimmed videos: columns video, label, start, end (seconds)",
    )
    streams.add_argument(
        "--tolerance",
        type=float,
        default=_TOLERANCE,
        metavar="SECONDS",
        help=f"an event may start this long before or after the annotated start (default: {_TOLERANCE:g})",
    )
    streams.add_argument(
        "--negatives",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="videos that show none of the actions",
    )
    streams.add_argument("--rooms", type=float, default=0, metavar="MINUTES", help="minutes of synthetic still rooms")
    streams.add_argument("--seed", type=int, default=0, help="seed of the still rooms (default: 0)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write the report here, and the confusion matrix beside it as .png",
    )
    return parser


def _problem(arguments: argparse.Namespace) -> str | None:
    """What does not go together, in words."""
    streams = arguments.negatives or arguments.rooms > 0 or arguments.events
    if not arguments.data and not streams:
        return "nothing to play: give --data, --events, --negatives or --rooms"
    if arguments.loop_events and not arguments.data:
        return "--loop-events needs --data"
    if arguments.dataset and not arguments.data:
        return "--dataset needs --data"
    of_dataset = (arguments.annotations, arguments.image_template, arguments.frame_rate)
    if not arguments.dataset and any(option is not None for option in of_dataset):
        return "--annotations, --image-template and --frame-rate need --dataset"
    if not 0 <= arguments.tolerance < math.inf:
        return f"--tolerance must be a number of seconds from 0 on, not {arguments.tolerance:g}"
    if not 0 <= arguments.rooms < math.inf:
        return f"--rooms must be a number of minutes from 0 on, not {arguments.rooms:g}"
    if arguments.frame_rate is not None and not 0 < arguments.frame_rate < math.inf:
        return f"--frame-rate must be a positive number of frames per second, not {arguments.frame_rate:g}"
    if arguments.workers is not None and arguments.workers < 0:
        return f"--workers must be at least 0, not {arguments.workers}"
    if not 0 <= arguments.missing <= 1:
        return f"--missing must be a share from 0 to 1, not {arguments.missing:g}"
    if arguments.protocol == _STREAMING:
        if any(option is not None for option in (arguments.frames, arguments.device, arguments.workers)):
            return f"--frames, --device and --workers need --protocol {', '.join(_CLIP_PROTOCOLS[:-1])} or dense"
        return None
    if not arguments.weights or not arguments.data:
        return f"--protocol {arguments.protocol} needs --weights and --data"
    if streams or arguments.loop_events:
        return f"--protocol {arguments.protocol} cuts clips; events are found with --protocol {_STREAMING}"
    if arguments.frames is not None and arguments.frames < 1:
        return "--frames must be at least 1"
    return None


def _source(arguments: argparse.Namespace) -> EvaluationSet:
    return EvaluationSet(
        arguments.data,
        arguments.dataset,
        arguments.split,
        arguments.part,
        arguments.annotations,
        arguments.image_template,
        arguments.frame_rate,
        arguments.missing,
    )


def _clips(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        import torch

        from stsm_rt.clip_protocols import PROTOCOLS, evaluate_weights
    except ModuleNotFoundError as error:
        raise UserError(
            f"clip protocols need {error.name}, which is not installed; run: pip install 'stsm-rt[train]'"
        ) from error
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here; use --device cpu")
    return evaluate_weights(
        arguments.weights,
        _source(arguments),
        PROTOCOLS[arguments.protocol],
        frames=arguments.frames,
        device=device,
        workers=arguments.workers or 0,
    )


def _stream(arguments: argparse.Namespace) -> dict[str, Any]:
    path = arguments.weights or arguments.engine or embedded_engine()
    engine = _open(path)
    manifest = engine.manifest
    actions = [label for label in manifest.labels if label != manifest.background]
    recognizer = Recognizer(engine, topk=5)
    weights_sha256 = sha256_of(path) if Path(path).suffix == ".safetensors" else manifest.weights_sha256
    record: dict[str, Any] = {
        "engine": Path(path).name,
        "engine_sha256": manifest.sha256 or weights_sha256,
        "weights_sha256": weights_sha256,
        "network": manifest.network,
        "shift": manifest.shift["name"],
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "decision": asdict(manifest.decision),
        **_cost(engine),
    }
    if arguments.data:
        source = _source(arguments)
        videos = source.read(actions)
        outcomes, unreadable = play_clips(recognizer, as_clips(videos))
        record |= {
            **source.to_record(),
            "protocol": _STREAMING,
            "missing": list(videos.missing),
            "unreadable": unreadable,
            **accuracy_record([outcome for _, outcome in outcomes], actions),
        }
        if arguments.loop_events:
            correct = [clip for clip, outcome in outcomes if outcome.prediction == outcome.label]
            record["loop_events"] = loop_record(recognizer, correct)
    if arguments.negatives:
        record["negatives"] = negatives_record(recognizer, arguments.negatives)
    if arguments.rooms > 0:
        record["rooms"] = rooms_record(recognizer, arguments.rooms, arguments.seed)
    if arguments.events:
        annotations = read_annotations(arguments.events, actions)
        record["untrimmed"] = annotated_record(recognizer, annotations, arguments.tolerance)
    return record


def _open(path: Path) -> Engine:
    if path.suffix == ".onnx" and Manifest.load(path).runtime == "onnx":
        print(f"engine   {path.name} is a graph for TensorRT; ONNX Runtime computes it node by node here, slowly")
        return OnnxRuntimeEngine(path, fused=False)
    return Engine.open(path)


def _cost(engine: Engine) -> dict[str, Any]:
    """What weights cost; of other engines nothing is known here, since counting takes PyTorch."""
    if engine.manifest.runtime != "torch":
        return {}
    from stsm_rt.engine.torch import TorchEngine
    from stsm_rt.network_cost import count_parameters, step_flops

    assert isinstance(engine, TorchEngine)
    manifest = engine.manifest
    flops = step_flops(engine.network, manifest.input_height, manifest.input_width)
    return {"cost": {"parameters": count_parameters(engine.network), "step_flops": flops}}


if __name__ == "__main__":
    sys.exit(main())
