"""The command ``python -m stsm_rt.build_engine``: weights -> an engine for the machine that it will run on.

Without options it takes the shipped network and the best runtime that is installed: TensorRT on a Jetson or a machine
with an NVIDIA GPU, else ONNX Runtime. On a device without torch it builds a plan of a graph that was exported on
another machine. What it chose is said, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stsm_rt.engine.base import shipped_folder
from stsm_rt.errors import UserError, report
from stsm_rt.inspect import describe
from stsm_rt.manifest import Manifest, manifest_path, sha256_of
from stsm_rt.tensorrt_build import BuildOptions, Plan, build_plan
from stsm_rt.tensorrt_library import load_tensorrt, plan_device

if TYPE_CHECKING:
    from stsm_rt.build_source import Source
    from stsm_rt.shift_folding import Folding

RUNTIMES = ("tensorrt", "tensorrt-rtx", "onnxruntime", "openvino")
_TENSORRT = ("tensorrt", "tensorrt-rtx")
_SHIPPED_GRAPH = "actions_lite0_{precision}_tensorrt.onnx"
_SUFFIXES = {"tensorrt": ".engine", "tensorrt-rtx": ".engine", "onnxruntime": ".onnx", "openvino": "_openvino.onnx"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        0, or 2 if something that was given cannot be used or the engine cannot be built.
    """
    options = _parser().parse_args(argv)
    options.precision = options.precision or ("fp16" if options.fp16 else "int8" if options.int8 else None)
    try:
        target = _build(options)
        print("\n" + describe(Manifest.load(target), target, target.stat().st_size))
    except UserError as error:
        return report(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stsm-rt build-engine", description="Build an engine for the machine that it will run on."
    )
    add = parser.add_argument
    add("graph", nargs="?", type=Path, help="graph for TensorRT that stsm-rt export wrote; needs no torch")
    add("--network", help="take the shipped weights of this network, or random ones to time it (default: lite0)")
    add("--weights", type=Path, help="weights that stsm-rt train wrote (.safetensors)")
    add("--runtime", choices=RUNTIMES, help="default: TensorRT if it is installed, else ONNX Runtime")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), help="default: fp16 for TensorRT, else fp32"
    )
    precision.add_argument("--fp16", action="store_true", help="the same as --precision fp16")
    precision.add_argument("--int8", action="store_true", help="the same as --precision int8")
    add("--frontend", choices=("auto", "torch-tensorrt", "onnx"), default="auto", help="of TensorRT (default: auto)")
    add("--batch", type=int, default=1, help="streams per step (default: 1)")
    add("--size", type=_size, metavar="HxW", help="of random weights' input, or one number (default: 224)")
    add("--calibration", type=Path, metavar="DIR|FILE", help="recorded ranges (.json), a video or a folder of videos")
    add("--calibration-method", choices=("max", "percentile", "entropy"), help="default: the recorded one")
    add(
        "--exclude-layer",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave layers out of INT8 (default: as recorded)",
    )
    add("--auto-exclude", type=float, metavar="POINTS", help="leave layers out until INT8 loses no more top-1 (--data)")
    add("--data", type=Path, metavar="DIR", help="labelled clips: report what the precision costs and brings")
    add("--split", type=int, default=1, help="of the labelled clips (default: 1)")
    add("--compute-capability", default="", metavar="8.6,8.9", help="what a plan of TensorRT-RTX is for")
    add("--hardware-compatible", action="store_true", help="a TensorRT plan for all GPUs since Ampere, if slower")
    add("--workspace", type=int, metavar="MIB", help="memory that TensorRT's layers may use for a moment")
    add("--dla", type=int, metavar="CORE", help="use this DLA core (Jetson)")
    add("--timing-cache", type=Path, metavar="FILE", help="makes the next TensorRT build faster")
    add("--measured", type=Path, metavar="FILE", help="report of evaluate --json, for the manifest's accuracy")
    add("-o", "--out", type=Path, help="engine file (default: engines/NAME_PRECISION.engine, or .onnx)")
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or int(match[1]) < 32 or int(match[2] or 32) < 32:
        raise argparse.ArgumentTypeError(f"height x width of at least 32 pixels, like 224 or 224x288, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _source(options: argparse.Namespace) -> Source:
    if options.precision != "int8":
        _refuse_int8_options(options)
    try:
        from stsm_rt.build_source import load_source
    except ModuleNotFoundError as error:
        raise UserError(
            f"building from weights needs {error.name}, which is not installed; run pip install 'stsm-rt[build]' (only "
            "TensorRT builds without it, of a graph that stsm-rt export wrote)"
        ) from error
    return load_source(options)


def _build(options: argparse.Namespace) -> Path:
    if options.batch < 1:
        raise UserError(f"the batch must be at least 1, not {options.batch}")
    if options.auto_exclude is not None and not options.data:
        raise UserError("--auto-exclude measures accuracy; give labelled clips with --data")
    runtime, reason = _choose_runtime(options)
    print(f"runtime     {runtime}: {reason}")
    _check_suffix(options, runtime)
    if runtime not in _TENSORRT:
        _refuse_tensorrt_options(options, runtime)
        options.precision = options.precision or "fp32"
        return _build_for_processor(options, runtime, _source(options))
    if options.graph is None:
        options.precision = options.precision or "fp16"
        options.graph = _graph_without_torch(options)
    # Before calibration has played every clip.
    plan_device(load_tensorrt(runtime), _compute_capabilities(options), options.hardware_compatible)
    return _build_of_graph(options, runtime, options.graph) if options.graph else _build_of_source(options, runtime)


def _choose_runtime(options: argparse.Namespace) -> tuple[str, str]:
    if options.runtime:
        return options.runtime, "as asked"
    for runtime, package in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        loaded = sys.modules.get(package)
        # Torch-TensorRT for RTX registers tensorrt_rtx under the name tensorrt.
        if importlib.util.find_spec(package) and (loaded is None or loaded.__package__ == package):
            return runtime, f"the package {package} is installed"
    if options.graph:
        raise UserError(
            f"{options.graph} is a graph for TensorRT, and neither tensorrt nor tensorrt_rtx is installed here; build "
            "on the device, or give --weights to build for a processor"
        )
    return "onnxruntime", "neither tensorrt nor tensorrt_rtx is installed"


def _refuse_tensorrt_options(options: argparse.Namespace, runtime: str) -> None:
    given = {
        "a graph": options.graph,
        "--frontend": options.frontend != "auto",
        "--compute-capability": options.compute_capability,
        "--hardware-compatible": options.hardware_compatible,
        "--workspace": options.workspace is not None,
        "--dla": options.dla is not None,
        "--timing-cache": options.timing_cache,
    }
    for name, value in given.items():
        if value:
            raise UserError(f"{name} is for TensorRT, not for {runtime}; leave it out or choose --runtime tensorrt")


def _refuse_int8_options(options: argparse.Namespace) -> None:
    if options.data:
        raise UserError("--data compares INT8 with FP32; add --int8, or measure an engine with stsm-rt evaluate")
    given = {
        "--calibration": options.calibration,
        "--calibration-method": options.calibration_method,
        "--exclude-layer": options.exclude_layer,
    }
    for name, value in given.items():
        if value:
            raise UserError(f"{name} is for INT8, not for {options.precision}; add --int8, or leave it out")


def _check_suffix(options: argparse.Namespace, runtime: str) -> None:
    wanted = Path(_SUFFIXES[runtime]).suffix or _SUFFIXES[runtime]
    if options.out and options.out.suffix != wanted:
        raise UserError(f"an engine for {runtime} ends in {wanted}, got {options.out}; choose another file with -o")


def _target(options: argparse.Namespace, name: str, runtime: str) -> Path:
    if options.out:
        return Path(options.out)
    folder = Path("engines") if Path("engines").is_dir() else Path()
    return folder / f"{name}_{options.precision}{_SUFFIXES[runtime]}"


def _build_for_processor(options: argparse.Namespace, runtime: Any, source: Source) -> Path:
    target = _target(options, source.name, runtime)
    exclude = _excluded(options, runtime, source)
    source.export(target, runtime, options.precision, batch=options.batch, exclude=exclude)
    return target


def _excluded(options: argparse.Namespace, runtime: Any, source: Source) -> list[str]:
    """The layers to leave out of INT8; with labelled clips, what INT8 costs and brings is said."""
    recorded = source.ranges.exclude.get(runtime, ()) if source.ranges else ()
    exclude: list[str] = options.exclude_layer or list(recorded)
    if exclude:
        print(f"excluded    {', '.join(exclude)}: {'as asked' if options.exclude_layer else 'as recorded'}")
    if options.data is None:
        return exclude
    from stsm_rt.precision_report import report_precision

    assert source.ranges is not None
    with tempfile.TemporaryDirectory() as folder:
        fp32, fp16 = Path(folder) / "fp32.onnx", Path(folder) / "fp16.onnx"
        # INT8 is made of a graph in which every layer is whole.
        whole: Folding = "none" if runtime == "onnx" else "depthwise"
        source.export(fp32, "onnxruntime" if runtime == "onnx" else runtime, "fp32", folding=whole)
        source.export(fp16, "onnx", "fp16")
        found = report_precision(
            fp32,
            fp16,
            source.ranges,
            runtime,
            options.data,
            options.split,
            exclude=exclude,
            most=options.auto_exclude,
        )
    print("\n".join(found.lines()))
    return list(found.excluded)


def _graph_without_torch(options: argparse.Namespace) -> Path | None:
    """The shipped graph, where torch is not installed and no other weights are asked for."""
    if importlib.util.find_spec("torch") or options.weights or options.network not in (None, "lite0"):
        return None
    folder = shipped_folder("engines")
    graph = folder / _SHIPPED_GRAPH.format(precision=options.precision) if folder else None
    if graph is None or not graph.is_file():
        raise UserError(
            f"torch is not installed here and no {options.precision} graph is shipped; export one on another machine "
            "with stsm-rt export, and give it to this command"
        )
    print(f"graph       {graph.name}: torch is not installed, and this one is shipped")
    return graph


def _build_of_graph(options: argparse.Namespace, runtime: str, graph: Path) -> Path:
    """A plan of a graph that was exported before."""
    manifest = Manifest.load(graph)
    if manifest.runtime != "onnx":
        raise UserError(
            f"{graph} is an engine for {manifest.runtime}, not a graph for TensorRT; export one with "
            "stsm-rt export --precision fp16"
        )
    if options.frontend == "torch-tensorrt":
        raise UserError("a graph goes through TensorRT's parser; leave --frontend out, or give --weights")
    made = {
        "--weights": options.weights,
        "--network": options.network not in (None, manifest.network),
        "--size": options.size not in (None, (manifest.input_height, manifest.input_width)),
        "--batch": options.batch not in (1, manifest.batch),
        "--exclude-layer": options.exclude_layer,
        "--calibration": options.calibration,
        "--calibration-method": options.calibration_method,
        "--data": options.data,
        "--measured": options.measured,
    }
    for name, value in made.items():
        if value:
            raise UserError(f"{name} cannot change a graph that is made already; export the graph again with it")
    if options.precision not in (None, manifest.precision):
        raise UserError(f"{graph} is {manifest.precision}; ask for no other precision, or export another graph")
    options.precision = manifest.precision
    print(f"frontend    onnx: {graph.name} needs no torch")
    target = _target(options, re.sub(r"_(fp32|fp16|int8)(_tensorrt)?$", "", graph.stem), runtime)
    return _parse_and_write(options, runtime, graph, target)


def _parse_and_write(options: argparse.Namespace, runtime: str, graph: Path, target: Path) -> Path:
    tensorrt = load_tensorrt(runtime)
    with _ProgressBar() as progress:
        plan = build_plan(tensorrt, graph, _build_options(options, progress))
    manifest = Manifest.load(graph)
    _write(
        plan,
        dataclasses.replace(manifest, runtime=runtime, runtime_version=tensorrt.version, device=plan.device),
        target,
    )
    return target


def _build_of_source(options: argparse.Namespace, runtime: str) -> Path:
    source = _source(options)
    frontend, reason = _choose_frontend(options)
    print(f"frontend    {frontend}: {reason}")
    target = _target(options, source.name, runtime)
    exclude = _excluded(options, "onnx", source)
    if frontend == "onnx":
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "graph.onnx"
            source.export(graph, "onnx", options.precision, batch=options.batch, exclude=exclude)
            return _parse_and_write(options, runtime, graph, target)
    from stsm_rt.engine_manifest import calibration_record, make_manifest
    from stsm_rt.torch_tensorrt_frontend import build_plan_from_network, torch_tensorrt_library

    tensorrt = torch_tensorrt_library()
    if tensorrt.runtime != runtime:
        raise UserError(
            f"the installed Torch-TensorRT builds for {tensorrt.runtime}, not for {runtime}; choose --frontend onnx"
        )
    with _ProgressBar() as progress:
        plan = build_plan_from_network(
            source.network,
            source.spec.height,
            source.spec.width,
            batch=options.batch,
            precision=options.precision,
            ranges=source.ranges,
            exclude=exclude,
            options=_build_options(options, progress),
        )
    manifest = make_manifest(
        source.network,
        source.spec,
        weights_sha256=source.weights_sha256,
        runtime=runtime,
        runtime_version=tensorrt.version,
        device=plan.device,
        precision=options.precision,
        batch=options.batch,
        calibration=calibration_record(source.ranges, exclude) if source.ranges else None,
    )
    _write(plan, manifest, target)
    return target


def _choose_frontend(options: argparse.Namespace) -> tuple[str, str]:
    if options.frontend != "auto":
        return options.frontend, "as asked"
    if not importlib.util.find_spec("torch_tensorrt"):
        return "onnx", "torch_tensorrt is not installed"
    if options.precision == "int8" and not importlib.util.find_spec("modelopt"):
        return "onnx", "INT8 through Torch-TensorRT needs nvidia-modelopt, which is not installed"
    return "torch-tensorrt", "torch_tensorrt is installed"


def _compute_capabilities(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(part.strip() for part in options.compute_capability.split(",") if part.strip())


def _build_options(options: argparse.Namespace, progress: _ProgressBar) -> BuildOptions:
    return BuildOptions(
        workspace_mib=options.workspace,
        compute_capabilities=_compute_capabilities(options),
        hardware_compatible=options.hardware_compatible,
        dla=options.dla,
        timing_cache=options.timing_cache,
        progress=progress,
    )


def _write(plan: Plan, manifest: Manifest, target: Path) -> None:
    """The plan and its manifest, both or neither."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
            draft = Path(folder) / target.name
            draft.write_bytes(plan.data)
            dataclasses.replace(manifest, sha256=sha256_of(draft)).save(draft)
            os.replace(manifest_path(draft), manifest_path(target))
            os.replace(draft, target)
    except OSError as error:
        raise UserError(f"the engine {target} cannot be written ({error}); choose another file with -o") from error


class _ProgressBar:
    """TensorRT's progress on a terminal, in a file nothing."""

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")

    def __call__(self, phase: str, fraction: float) -> None:
        if sys.stderr.isatty():
            done = round(30 * fraction)
            sys.stderr.write(f"\r\x1b[K[{'#' * done}{'.' * (30 - done)}] {100 * fraction:3.0f} % {phase[:40]}")
            sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
