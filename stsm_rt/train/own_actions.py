"""The command ``python -m stsm_rt.train FOLDER``: own clips in, an engine for the webcam out, on a processor.

The shipped network stays as it is; a classifier of its features is fitted to the clips, held still, mirrored, played
faster and slower. What it is worth is measured on recordings that were held out whole, one part after another; then all
clips are fitted to.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from stsm_rt.build_source import DEFAULT_WEIGHTS
from stsm_rt.engine.base import shipped_folder
from stsm_rt.errors import UserError, report
from stsm_rt.export import export_engine
from stsm_rt.manifest import sha256_of
from stsm_rt.model import ModelSpec, load_model, save_model
from stsm_rt.networks import StreamingNetwork
from stsm_rt.own_clips import BACKGROUND, OwnClip, mirrored_label, own_clips, read_clip
from stsm_rt.train.own_features import FeatureReader, Played, Rows, join
from stsm_rt.train.own_fit import Classifier, choose_and_fit, choose_thresholds, decide, hold_out
from stsm_rt.train.own_report import card, lines, measure, overview, recordings

_COPIES = 240  # varied copies of clips, about, but one or two of each
_FEW = 8  # clips of a class, below which a warning is due


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="stsm-rt train",
        description="Teach the shipped network your own actions, from a folder of clips per class.",
    )
    parser.add_argument("folder", type=Path, help="holds a folder of clips for each class, as stsm-rt record fills it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the engine goes (default: runs/own-FOLDER)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="network to start from (default: the shipped one)")
    parser.add_argument(
        "--no-mirror",
        action="store_true",
        help="do not learn from mirrored copies: for turns, letters, one-sided rooms",
    )
    options = parser.parse_args(argv)
    try:
        train(options.folder, options.out, options.weights or shipped_weights(), mirror=not options.no_mirror)
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    return 0


def shipped_weights() -> Path:
    """The weights of the default engine.

    Raises:
        UserError: They are not in this installation.
    """
    folder = shipped_folder("engines")
    path = (folder or Path()) / f"{DEFAULT_WEIGHTS}.safetensors"
    if not path.is_file():
        raise UserError(
            f"the shipped weights are not here, only engines; give --weights engines/{path.name} of a checkout"
        )
    return path


def train(folder: Path, out: Path | None, weights: Path, *, mirror: bool) -> Path:
    """Do what the command does, and say it.

    Args:
        folder: Of own clips.
        out: Folder for the results; None: ``runs/own-`` and the folder's name.
        weights: Of the network to start from.
        mirror: Whether mirrored copies show the same, but for sides in the labels.

    Returns:
        The engine.

    Raises:
        UserError: Clips, weights or the target cannot be used.
    """
    name = folder.resolve().name
    listed = own_clips(folder)
    start, spec = load_model(weights)
    labels = (*dict.fromkeys(clip.label for clip in listed if clip.label != BACKGROUND), BACKGROUND)
    out = out or Path("runs") / f"own-{name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made ({error.strerror}); choose another --out") from error
    print(f"{name}: {overview(listed)}; the network is {weights.name}, which stays as it is")
    seen = see(start, spec, listed, labels, mirror=mirror)
    _check(seen.clips, labels)
    print("holding out recordings, fitting and choosing on what is left, asking about what was held out")
    answers, pictures = hold_out(seen.rows, seen.clips, seen.played, seen.held, len(labels))
    decision = choose_thresholds([*answers, *pictures], labels, spec.decision, spec.frame_rate)
    accuracy = measure(
        seen.clips,
        [decide(a, labels, decision, spec.frame_rate) for a in answers],
        [decide(p, labels, decision, spec.frame_rate) for p in pictures],
        name,
    )
    classifier = choose_and_fit(seen.rows, seen.clips, len(labels), range(len(seen.clips)))
    new = dataclasses.replace(
        spec,
        labels=labels,
        background=BACKGROUND,
        decision=decision,
        accuracy=accuracy,
        recipe={
            "name": name,
            "trained_on": f"the CPU, PyTorch {torch.__version__}",
            "start": weights.name,
            "start_sha256": sha256_of(weights),
            "clips": dict(Counter(clip.label for clip in seen.clips)),
            "recordings": recordings(seen.clips),
            "mirror": mirror,
            "l2": classifier.l2,
        },
    )
    print("\n".join(lines(accuracy, decision)))
    try:
        return _write(start, new, classifier, out / name)
    except OSError as error:
        raise UserError(f"{out} cannot be written to ({error.strerror}); choose another --out") from error


@dataclass(frozen=True)
class Seen:
    """Clips that could be read, and what the network makes of them.

    Attributes:
        clips: The clips.
        rows: Examples for the classifier, of varied copies.
        played: Features of each clip.
        held: Features of held pictures, for each clip.
    """

    clips: list[OwnClip]
    rows: Rows
    played: list[Played]
    held: list[list[Tensor]]


def see(
    network: StreamingNetwork, spec: ModelSpec, listed: Sequence[OwnClip], labels: Sequence[str], *, mirror: bool
) -> Seen:
    """Play every clip and copies of it through the network; clips that cannot be read are listed and left out.

    Args:
        network: In evaluation mode.
        spec: Its record.
        listed: The clips.
        labels: Of the new classifier, the background last.
        mirror: Whether to mirror every other copy.

    Raises:
        UserError: No clip can be read.
    """
    reader = FeatureReader(network, spec.frame_rate, background=len(labels) - 1)
    copies = min(2, max(1, _COPIES // len(listed)))
    seen = Seen([], Rows(*(torch.empty(0) for _ in range(4))), [], [])
    rows = []
    for clip in tqdm(listed, unit="clip"):
        try:
            frames, times = read_clip(clip.path, (spec.height, spec.width))
        except UserError as error:
            tqdm.write(f"left out: {error}")
            continue
        number = len(seen.clips)
        seen.clips.append(clip)
        seen.played.append(reader.play(frames, times))
        seen.held.append([])
        for index in range(copies):
            in_mirror = mirrored_label(clip.label, labels) if mirror and (number + index) % 2 else None
            examples, held = reader.vary(
                frames,
                times,
                clip=number,
                label=labels.index(in_mirror or clip.label),
                mirrored=in_mirror is not None,
                follows=(number // 2 + index) % 2 == 0,
            )
            rows.append(examples)
            seen.held[-1].append(held)
    if not rows:
        raise UserError("no clip can be read; record them again with stsm-rt record, or convert them to MP4")
    return dataclasses.replace(seen, rows=join(rows))


def _check(clips: Sequence[OwnClip], labels: Sequence[str]) -> None:
    """Refuse what nothing can be learned from, and warn of what little can be said about."""
    counts, of_each = Counter(clip.label for clip in clips), recordings(clips)
    for label in labels[:-1]:
        if counts[label] < 2:
            raise UserError(
                f"two clips or more that can be read were expected of {label!r}, found {counts[label]}; record more "
                f"with stsm-rt record {label!r}"
            )
    few = [f"{label} has {counts[label]}" for label in labels[:-1] if counts[label] < _FEW]
    if few:
        print(f"warning: few clips ({', '.join(few)}): {_FEW} or more of each class make the number worth something")
    single = [label for label in labels[:-1] if of_each[label] < 2]
    if single:
        print(
            f"warning: {', '.join(single)}: all clips are of one recording, so single clips are held out instead of "
            "recordings and the number will be too good; record another session, in other clothes or another place"
        )


def _write(start: StreamingNetwork, spec: ModelSpec, classifier: Classifier, stem: Path) -> Path:
    network = spec.build()
    network.backbone.load_state_dict(start.backbone.state_dict())
    with torch.no_grad():
        network.offset.copy_(classifier.offset)
        network.scale.copy_(classifier.scale)
        network.classifier.weight.copy_(classifier.weight)
        network.classifier.bias.copy_(classifier.bias)
    network.eval()
    weights, engine, text = (stem.with_name(stem.name + end) for end in (".safetensors", ".onnx", ".md"))
    save_model(network, spec, weights)
    print("making the engine and comparing it with the network, step by step")
    export_engine(network, spec, engine, weights_sha256=sha256_of(weights))
    partial = text.with_name(f".{text.name}.part")
    partial.write_text(card(spec, engine.name), encoding="utf-8")
    os.replace(partial, text)
    print(f"weights:    {weights}\nengine:     {engine}\ncard:       {text}")
    print(f"run it:     stsm-rt webcam --engine {shlex.quote(str(engine))}")
    return engine


if __name__ == "__main__":
    raise SystemExit(main())
