"""The engines that the page offers, and what they are in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stsm_rt.engine import Engine, embedded_engine
from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest

_NETWORKS = {
    "r8": "ResNet-8",
    "r18": "ResNet-18",
    "r50": "ResNet-50",
    "mbv2": "MobileNetV2",
    "mbv2_torchvision": "MobileNetV2",
    "lite0": "EfficientNet-Lite0",
}
_RUNTIMES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}
_PRECISIONS = {
    "fp32": "32-bit floating point",
    "fp16": "16-bit floating point",
    "int8": "8-bit integers",
}


@dataclass(frozen=True)
class EngineChoice:
    """An engine that a visitor may choose.

    Attributes:
        path: The engine file.
        title: What the visitor sees, ``"EfficientNet-Lite0, INT8, ONNX Runtime"``; no two choices share it.
        manifest: What the engine is.
    """

    path: Path
    title: str
    manifest: Manifest


def find_engines(folder: Path) -> tuple[EngineChoice, ...]:
    """Find the engines of a folder that open on this machine.

    Graphs for TensorRT's parser are no engines yet, and plans of another device or runtimes that are not installed do
    not open; neither do files that are damaged. They are left out.

    Args:
        folder: The folder, ``engines/``; folders in it are not looked into.

    Returns:
        The embedded engine first, if it is among them, then the others by their titles.

    Raises:
        UserError: If there is no such folder, or no engine in it opens; then the reason of each is said.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} with engines; give one with --engines")
    reasons: list[str] = []
    found = [(path, Manifest.load(path)) for path in _openable(folder, reasons)]
    if not found:
        why = "; ".join(reasons) or "it holds no file with a manifest (FILE.json) beside it"
        raise UserError(f"no engine in {folder} can be opened here: {why}")
    titles = [_title(manifest) for _, manifest in found]
    choices = [
        # Where two are alike, their files' names tell them apart.
        EngineChoice(path, title if titles.count(title) == 1 else f"{title} ({path.name})", manifest)
        for (path, manifest), title in zip(found, titles, strict=True)
    ]
    embedded = embedded_engine()
    return tuple(
        sorted(
            choices, key=lambda choice: (choice.path.resolve() != embedded.resolve(), choice.title, choice.path.name)
        )
    )


def describe(choice: EngineChoice) -> str:
    """Say what an engine is.

    Args:
        choice: The engine.

    Returns:
        Markdown, one paragraph and a list of the actions that it knows.
    """
    manifest = choice.manifest
    actions = [label.replace("_", " ") for label in manifest.labels if label != manifest.background]
    sentences = [
        f"**{choice.title}.** One step of the 2D network {_NETWORKS.get(manifest.network, manifest.network)} for each "
        f"frame that it looks at, {manifest.frame_rate:g} in a second, {manifest.input_width} x "
        f"{manifest.input_height} pixels, in {_PRECISIONS[manifest.precision]}.",
        *_motion(manifest),
        _accuracy(manifest),
        f"A score is the mean of {manifest.decision.smoothing} steps; an action starts at "
        f"{manifest.decision.threshold:.2f} and ends below {manifest.decision.release:.2f}.",
    ]
    return f"{' '.join(sentences)}\n\nIt knows {len(actions)} actions: {', '.join(actions)}."


def _openable(folder: Path, reasons: list[str]) -> Iterator[Path]:
    for path in sorted(folder.glob("*.json")):
        engine = path.with_suffix("")
        if not engine.is_file():
            continue
        try:
            if Manifest.load(engine).runtime == "onnx":
                reasons.append(f"{engine.name} is a graph for TensorRT, from which build_engine makes an engine")
                continue
            Engine.open(engine)
        except UserError as error:
            reasons.append(str(error))
        else:
            yield engine


def _title(manifest: Manifest) -> str:
    network = _NETWORKS.get(manifest.network, manifest.network)
    return f"{network}, {manifest.precision.upper()}, {_RUNTIMES.get(manifest.runtime, manifest.runtime)}"


def _motion(manifest: Manifest) -> list[str]:
    if not any(group["dt"] for group in manifest.shift["groups"]):
        return []
    return [f"Some of its channels come from earlier frames (`{manifest.shift['name']}`): that is how it sees motion."]


def _accuracy(manifest: Manifest) -> str:
    measured = manifest.accuracy or {}
    if not {"top1", "clips", "split"} <= measured.keys():
        return "Its accuracy was not measured."
    return (
        f"Fed frame by frame, it named the right action in {100 * measured['top1']:.1f} % of its "
        f"{measured['clips']} test clips (split {measured['split']}); expect less of other people, rooms and cameras."
    )
