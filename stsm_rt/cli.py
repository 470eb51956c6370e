"""The command ``stsm-rt``: one door to all commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from stsm_rt.errors import UserError, report

COMMANDS = {
    "webcam": ("stsm_rt.webcam", "recognize actions on a camera, a video, a folder of images or a URL"),
    "app": ("stsm_rt.app.__main__", "serve a page for uploads and cameras (needs the extra 'ui')"),
    "evaluate": ("stsm_rt.evaluate", "measure accuracy on labelled videos, and events in untrimmed ones"),
    "inspect": ("stsm_rt.inspect", "print what an engine is: its network, labels, states and thresholds"),
    "bench": ("stsm_rt.bench", "time the steps of engines, side by side"),
    "record": ("stsm_rt.record", "record clips of your own action from the camera, for stsm-rt train"),
    "train": (
        "stsm_rt.train.command",
        "train a network from a recipe, or on a folder of your own clips (needs the extra 'train')",
    ),
    "download": ("stsm_rt.download", "get a public checkpoint, verified by its SHA-256"),
    "convert": (
        "stsm_rt.convert",
        "turn a checkpoint of torchvision, TSM or mmaction2 into weights (needs the extra 'build')",
    ),
    "export": ("stsm_rt.export", "make an ONNX graph from trained weights (needs the extra 'build')"),
    "calibrate": ("stsm_rt.calibrate", "record the ranges that INT8 engines need (needs the extra 'build')"),
    "build-engine": ("stsm_rt.build_engine", "build an engine for this machine: TensorRT, ONNX Runtime or OpenVINO"),
}
_EXTRAS = {"train": "train", "convert": "build", "export": "build", "calibrate": "build"}
_USAGE = "usage: stsm-rt COMMAND [OPTIONS]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command and its arguments; None means those of the process.

    Returns:
        The command's exit code: 0 if all went well, 2 after an error of the person at the keyboard.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:<14}{purpose}" for command, (_, purpose) in COMMANDS.items()]
        print("\n".join([_USAGE, "", *lines, "", "stsm-rt COMMAND --help tells a command's options."]))
        return 0
    try:
        if name not in COMMANDS:
            raise UserError(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
        return int(_module(name).main(rest))
    except UserError as error:
        return report(error)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if name not in _EXTRAS or (error.name or "").startswith("stsm_rt"):
            raise
        raise UserError(
            f"stsm-rt {name} needs {error.name}, which is not installed; run: pip install 'stsm-rt[{_EXTRAS[name]}]'"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
