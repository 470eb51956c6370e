"""The command that builds engines: what it makes and says, and that a failure is one sentence and leaves nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import io
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from clips import write_video
from small_networks import panning, write_model

from stsm_rt import build_engine, build_source, export, inspect, tensorrt_library
from stsm_rt.calibrate import calibrate
from stsm_rt.check_weights import random_weights
from stsm_rt.engine import Engine
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.export import export_engine, moving_clips, relative_difference
from stsm_rt.manifest import Manifest, manifest_path, sha256_of
from stsm_rt.model import load_model
from stsm_rt.ranges import Ranges
from stsm_rt.tensorrt_build import Plan

ROOT = Path(__file__).resolve().parents[1]
FRONTENDS = ("onnx", "torch-tensorrt")
RTX = ("--runtime", "tensorrt-rtx")


def run(*arguments: object) -> int:
    return build_engine.main([str(argument) for argument in arguments])


def build(*arguments: object) -> str:
    """Build an engine; returns what was printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(*arguments) == 0
    return out.getvalue()


def files(folder: Path) -> list[Path]:
    """Everything in a folder, temporary files and folders too."""
    return sorted(folder.rglob("*"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, other weights, recorded ranges of the first, and a folder of clips."""
    folder = tmp_path_factory.mktemp("work")
    write_model(folder / "r8.safetensors")
    write_model(folder / "other.safetensors", "r8", None)
    (folder / "clips").mkdir()
    videos = [write_video(folder / "clips" / f"{seed}.mp4", panning(6, seed=seed), fps=10) for seed in range(2)]
    network, spec = load_model(folder / "r8.safetensors")
    fp32 = folder / "r8_fp32.onnx"
    export_engine(network, spec, fp32, weights_sha256=sha256_of(folder / "r8.safetensors"))
    calibrate(fp32, videos, data="two clips").save(folder / "r8.json")
    return folder


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command in an empty folder; it must end with exit code 2, one line on stderr and no new file."""
    monkeypatch.chdir(tmp_path)

    def fail(*arguments: object) -> str:
        before = files(tmp_path)
        assert run(*arguments) == 2
        error = capfd.readouterr().err
        assert error.startswith("stsm-rt: error: ")
        assert error.count("\n") == 1
        assert files(tmp_path) == before
        return error

    return fail


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Packages are not installed."""

    def hidden(*packages: str) -> None:
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return hidden


@pytest.fixture
def no_tensorrt(hide: Callable[..., None]) -> None:
    hide("tensorrt", "tensorrt_rtx")


def exported(folder: Path, precision: str, *options: object) -> Path:
    """A graph for TensorRT of the small network, made by the command ``export``."""
    graph = folder / f"small_{precision}_tensorrt.onnx"
    arguments = ["--weights", folder / "r8.safetensors", "-o", graph, "--precision", precision, *options]
    if precision == "int8":
        arguments += ["--calibration", folder / "r8.json"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert export.main([str(argument) for argument in arguments]) == 0
    return graph


@pytest.fixture(scope="module")
def graph(work: Path) -> Path:
    return exported(work, "fp16")


# Engines for processors.


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_for_a_processor_is_what_its_manifest_and_the_summary_say(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, runtime: str, precision: str
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    calibration = ("--calibration", work / "r8.json") if precision == "int8" else ()
    options = ("--runtime", runtime, "--precision", precision, *calibration)
    printed = build("--weights", work / "r8.safetensors", *options)

    path = Path({"onnxruntime": f"r8_{precision}.onnx", "openvino": f"r8_{precision}_openvino.onnx"}[runtime])
    assert files(Path()) == [path, manifest_path(path)]
    manifest = Manifest.load(path)
    assert (manifest.runtime, manifest.precision, manifest.device, manifest.batch) == (runtime, precision, "cpu", 1)
    assert manifest.weights_sha256 == sha256_of(work / "r8.safetensors")
    assert (manifest.calibration is None) == (precision == "fp32")
    assert f"runtime     {runtime}: as asked" in printed
    assert inspect.main([str(path)]) == 0
    assert printed.endswith("\n\n" + capsys.readouterr().out)

    engine = Engine.open(path)
    clip = moving_clips(manifest)
    expected = played(Engine.open(work / "r8_fp32.onnx"), clip)
    difference = relative_difference(played(engine, clip), expected)
    assert difference < 1e-4 if precision == "fp32" else 1e-4 < difference < 0.2


def played(engine: Engine, clip: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    engine.reset()
    return np.stack([engine.step(frames).copy() for frames in clip])


def test_a_name_of_ones_own_and_the_folder_engines(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engines").mkdir()
    options = ("--weights", work / "r8.safetensors", "--runtime", "onnxruntime")
    build(*options)
    assert Manifest.load("engines/r8_fp32.onnx").network == "r8"
    build(*options, "-o", "new/deep/mine.onnx")
    assert Manifest.load("new/deep/mine.onnx").sha256 == Manifest.load("engines/r8_fp32.onnx").sha256


def test_a_batch_of_two_serves_two_streams(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    build("--weights", work / "r8.safetensors", "--runtime", "onnxruntime", "--batch", "2", "-o", path)
    manifest = Manifest.load(path)
    assert manifest.batch == 2
    clip = moving_clips(manifest)
    both, alone = Engine.open(path, slots=2), Engine.open(work / "r8_fp32.onnx")
    for row in range(2):
        assert relative_difference(played(both, clip)[:, row], played(alone, clip[:, row : row + 1])[:, 0]) < 1e-4


def test_clips_calibrate_and_their_record_is_in_the_manifest(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "r8.onnx"
    options = ("--int8", "--calibration", work / "clips", "--calibration-method", "percentile")
    options += ("--exclude-layer", "backbone.stem.*")
    printed = build("--weights", work / "r8.safetensors", "--runtime", "onnxruntime", *options, "-o", path)
    assert "calibration clips: 2 clips, played as streams" in printed
    assert Manifest.load(path).calibration == {
        "method": "percentile",
        "data": "clips",
        "clips": 2,
        "frames": 12,
        "excluded": ["backbone.stem.*"],
    }
    integers = [node.name for node in onnx.load(path).graph.node if node.op_type == "DequantizeLinear"]
    assert integers and not any("stem.0.weight" in name for name in integers)


def test_what_the_calibration_leaves_out_is_left_out_unless_something_else_is_asked_for(
    work: Path, tmp_path: Path
) -> None:
    recorded = dataclasses.replace(Ranges.load(work / "r8.json"), exclude={"onnxruntime": ("backbone.stem.*",)})
    recorded.save(tmp_path / "r8.json")
    options = ("--weights", work / "r8.safetensors", "--runtime", "onnxruntime", "--int8")
    options += ("--calibration", tmp_path / "r8.json", "-o", tmp_path / "r8.onnx")
    for more, patterns, why in (
        ((), ["backbone.stem.*"], "as recorded"),
        (("--exclude-layer", "*.conv2"), ["*.conv2"], "as asked"),
    ):
        assert f"excluded    {patterns[0]}: {why}" in build(*options, *more)
        calibration = Manifest.load(tmp_path / "r8.onnx").calibration
        assert calibration is not None and calibration["excluded"] == patterns


def test_recorded_ranges_are_found_by_the_weights_they_belong_to(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    recorded = tmp_path / "calibration"
    recorded.mkdir()
    ranges = Ranges.load(work / "r8.json")
    dataclasses.replace(ranges, weights_sha256="1" * 64, data="of others").save(recorded / "a.json")
    ranges.save(recorded / "b.json")
    monkeypatch.setattr(build_source, "shipped_folder", lambda name: tmp_path / name)
    options = ("--runtime", "onnxruntime", "--int8", "-o", "r8.onnx")
    assert "no calibration is recorded for the weights of other" in refused(
        "--weights", work / "other.safetensors", *options
    )
    assert "calibration b.json: recorded for these weights" in build("--weights", work / "r8.safetensors", *options)
    calibration = Manifest.load("r8.onnx").calibration
    assert calibration is not None and calibration["data"] == "two clips"


def test_random_weights_are_called_so_and_take_a_size(tmp_path: Path) -> None:
    path = tmp_path / "r8.onnx"
    printed = build("--network", "r8", "--size", "48x64", "--runtime", "onnxruntime", "-o", path)
    assert re.search(r"weights     random, seed 0: .*for timing, it recognizes nothing", printed)
    manifest = Manifest.load(path)
    assert (manifest.network, manifest.input_height, manifest.input_width) == ("r8", 48, 64)
    assert manifest.shift["name"] == "stsm_online"
    assert manifest.weights_sha256 == build_source.weights_sha256(random_weights("r8", height=48, width=64))


def test_without_tensorrt_onnx_runtime_is_chosen_and_the_reason_said(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tensorrt: None
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = build("--weights", work / "r8.safetensors")
    assert "runtime     onnxruntime: neither tensorrt nor tensorrt_rtx is installed" in printed
    assert Manifest.load("r8_fp32.onnx").runtime == "onnxruntime"


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_an_installed_tensorrt_is_chosen_and_the_reason_said(
    monkeypatch: pytest.MonkeyPatch, no_tensorrt: None, package: str
) -> None:
    module = types.ModuleType(package)
    module.__spec__, module.__package__ = importlib.machinery.ModuleSpec(package, None), package
    monkeypatch.setitem(sys.modules, package, module)
    options = build_engine._parser().parse_args([])
    runtime = package.replace("_", "-")
    assert build_engine._choose_runtime(options) == (runtime, f"the package {package} is installed")


def test_tensorrt_rtx_under_the_name_of_tensorrt_is_not_chosen_as_tensorrt(
    monkeypatch: pytest.MonkeyPatch, no_tensorrt: None
) -> None:
    module = types.ModuleType("tensorrt_rtx")
    module.__spec__, module.__package__ = importlib.machinery.ModuleSpec("tensorrt_rtx", None), "tensorrt_rtx"
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, module)
    assert build_engine._choose_runtime(build_engine._parser().parse_args([]))[0] == "tensorrt-rtx"


@pytest.mark.parametrize(
    ("absent", "precision", "frontend"),
    [
        ((), "int8", "torch-tensorrt"),
        (("modelopt",), "fp16", "torch-tensorrt"),
        (("modelopt",), "int8", "onnx"),
        (("torch_tensorrt",), "fp16", "onnx"),
    ],
)
def test_the_frontend_is_chosen_by_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, hide: Callable[..., None], absent: tuple[str, ...], precision: str, frontend: str
) -> None:
    for package in ("torch_tensorrt", "modelopt"):
        module = types.ModuleType(package)
        module.__spec__ = importlib.machinery.ModuleSpec(package, None)
        monkeypatch.setitem(sys.modules, package, module)
    hide(*absent)
    options = build_engine._parser().parse_args(["--precision", precision])
    chosen, reason = build_engine._choose_frontend(options)
    assert chosen == frontend
    assert all(package in reason for package in absent if frontend == "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["r50", "the default network"])
def test_int8_means_on_this_processor_what_its_graph_says(work: Path, tmp_path: Path, network: str) -> None:
    path = tmp_path / "int8.onnx"
    # Random r50 on a small picture; the default network with the shipped weights, size and calibration.
    random = ("--network", "r50", "--size", "64")
    options = ("--runtime", "onnxruntime", *(random if network == "r50" else ()))
    build(*options, "--int8", *(("--calibration", work / "clips") if network == "r50" else ()), "-o", path)
    clip = moving_clips(Manifest.load(path), frames=12)
    written, fused = (played(OnnxRuntimeEngine(path, fused=each), clip) for each in (False, True))
    if network != "r50":
        assert relative_difference(fused, written) < 5e-2
        return
    # A random deep network amplifies one rounding to a tenth of the largest logit, so the two are held to FP32, from
    # which sums that overflow would take the fused one much farther away.
    build(*options, "-o", tmp_path / "fp32.onnx")
    exact = played(Engine.open(tmp_path / "fp32.onnx"), clip)
    assert np.abs(fused - exact).mean() < 1.2 * np.abs(written - exact).mean()


# What cannot be built.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch", "0"], "the batch must be at least 1, not 0"),
        (["--int8", "--auto-exclude", "1"], "--auto-exclude measures accuracy; give labelled clips with --data"),
        (["-o", "r8.engine"], r"onnxruntime ends in \.onnx, got r8\.engine; .*-o"),
        (["--fp16"], "FP16 is for TensorRT"),
        (["--data", "clips"], "--data compares INT8 with FP32; add --int8"),
        (["--calibration", "clips"], "--calibration is for INT8, not for fp32; add --int8"),
        (["--exclude-layer", "*"], "--exclude-layer is for INT8, not for fp32; add --int8"),
        (["--frontend", "onnx"], "--frontend is for TensorRT, not for onnxruntime"),
        (["--compute-capability", "8.6"], "--compute-capability is for TensorRT"),
        (["--hardware-compatible"], "--hardware-compatible is for TensorRT"),
        (["--workspace", "0"], "--workspace is for TensorRT"),
        (["--dla", "0"], "--dla is for TensorRT"),
        (["--timing-cache", "kernels"], "--timing-cache is for TensorRT"),
        (["--network", "r18"], r"r8\.safetensors holds a r8, not a r18; leave --network out"),
        (["--size", "64"], "was trained for 48x64 pixels; leave --size out"),
        (["--measured", "absent.json"], r"absent\.json is not a report that stsm-rt evaluate"),
        (["--int8", "--calibration", "absent"], "there is no calibration clip or folder absent"),
        (["--int8", "--calibration", "absent.json"], r"the calibration absent\.json cannot be read"),
        (["-o", "file/r8.onnx"], r"the engine file/r8\.onnx cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_met_is_one_sentence(
    work: Path, tmp_path: Path, refused: Callable[..., str], arguments: list[str], sentence: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "clips").mkdir()
    assert re.search(sentence, refused("--weights", work / "r8.safetensors", "--runtime", "onnxruntime", *arguments))


@pytest.mark.parametrize("size", ["0", "31", "64x", "64x16", "big"])
def test_a_size_that_is_none_is_told_with_the_usage(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("--network", "r8", "--size", size)
    assert exit.value.code == 2
    assert f"like 224 or 224x288, not '{size}'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["absent", "damaged", "unknown network"])
def test_weights_that_cannot_be_used(work: Path, tmp_path: Path, refused: Callable[..., str], kind: str) -> None:
    weights = tmp_path / "r8.safetensors"
    if kind == "damaged":
        weights.write_bytes((work / "r8.safetensors").read_bytes()[:-100])
    given = ("--network", "r9") if kind == "unknown network" else ("--weights", weights)
    error = refused(*given, "--runtime", "onnxruntime")
    assert ("unknown network 'r9'" if kind == "unknown network" else "r8.safetensors") in error


@pytest.mark.parametrize("kind", ["empty", "text among them", "of other weights", "no calibration"])
def test_a_calibration_that_cannot_be_used(work: Path, tmp_path: Path, refused: Callable[..., str], kind: str) -> None:
    clips, calibration = tmp_path / "clips", tmp_path / "r8.json"
    clips.mkdir()
    given, sentence = clips, "holds no video to calibrate with"
    if kind == "text among them":
        write_video(clips / "a.mp4", panning(2), fps=10)
        (clips / "b.mp4").write_text("this is no video")
        sentence = r"b\.mp4"
    if kind == "of other weights":
        ranges = dataclasses.replace(Ranges.load(work / "r8.json"), weights_sha256="1" * 64)
        ranges.save(calibration)
        given, sentence = calibration, r"the calibration belongs to the weights 111111111111\.\.\., not to"
    if kind == "no calibration":
        calibration.write_text(json.dumps({"format_version": 1}))
        given, sentence = calibration, "is not a calibration that stsm-rt calibrate wrote"
    options = ("--runtime", "onnxruntime", "--int8", "--calibration", given)
    assert re.search(sentence, refused("--weights", work / "r8.safetensors", *options))


def test_a_graph_needs_tensorrt(graph: Path, refused: Callable[..., str], no_tensorrt: None) -> None:
    error = refused(graph)
    assert "is a graph for TensorRT, and neither tensorrt nor tensorrt_rtx is installed here" in error
    assert "a graph is for TensorRT, not for onnxruntime" in refused(graph, "--runtime", "onnxruntime")
    assert "tensorrt_rtx is not installed" in refused(graph, *RTX)


def test_tensorrt_that_is_not_installed_is_missed_before_anything_is_calibrated(
    work: Path, refused: Callable[..., str], no_tensorrt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_source, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    options = ("--weights", work / "r8.safetensors", "--int8", "--calibration", work / "clips")
    assert "the Python package tensorrt_rtx is not installed" in refused(*options, *RTX)
    assert "the Python package tensorrt is not installed" in refused(*options, "--runtime", "tensorrt")


def test_tensorrt_without_a_gpu_is_one_sentence(
    work: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("tensorrt")
    module.__package__, module.__version__ = "tensorrt", "10.3.0"  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(tensorrt_library, "device_compute_capability", lambda: None)
    error = refused("--weights", work / "r8.safetensors")
    assert "TensorRT 10.3.0 builds a plan on the GPU that will run it, and this machine has none" in error


def test_without_torch_the_sentence_says_what_to_install(work: Path, tmp_path: Path) -> None:
    done = without_torch("--weights", work / "r8.safetensors", "--runtime", "onnxruntime", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("stsm-rt: error: ") and done.stderr.count("\n") == 1
    assert "which is not installed; run pip install 'stsm-rt[build]'" in done.stderr
    assert files(tmp_path) == []


# Plans of TensorRT-RTX, which builds them without a GPU.


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that are written, with the definitions they were made of."""
    seen: list[Plan] = []
    write = build_engine._write

    def see(plan: Plan, manifest: Manifest, target: Path) -> None:
        seen.append(plan)
        write(plan, manifest, target)

    monkeypatch.setattr(build_engine, "_write", see)
    return seen


def check_plan(
    path: Path, plan: Plan, printed: str, capsys: Any, *, precision: str, device: str = "sm_80+"
) -> Manifest:
    """Plan, definition, manifest and the summary say the same."""
    assert path.read_bytes() == plan.data
    manifest = Manifest.load(path)
    version = tensorrt_library.load_tensorrt("tensorrt-rtx").version
    assert (manifest.runtime, manifest.runtime_version) == ("tensorrt-rtx", version)
    assert (manifest.precision, manifest.device, manifest.sha256) == (precision, device, sha256_of(path))
    dtype = "float32" if precision == "fp32" else "float16"
    assert {state.dtype for state in manifest.states} == {dtype}
    frame, *states = (tensor for tensor in plan.definition.inputs if tensor.name != "active")
    assert frame.shape == (manifest.batch, manifest.input_height, manifest.input_width, 3)
    expected = [(f"{state.name}_in", state.dtype, state.shape) for state in manifest.states]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in states] == expected
    logits, *states = plan.definition.outputs
    assert (logits.dtype, logits.shape) == ("float32", (manifest.batch, len(manifest.labels)))
    expected = [(f"{state.name}_out", state.dtype, state.shape) for state in manifest.states]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in states] == expected
    assert (manifest.calibration is not None) == (precision == "int8")
    assert (plan.definition.quantize_layers > 0) == (plan.definition.dequantize_layers > 0) == (precision == "int8")
    capsys.readouterr()
    assert inspect.main([str(path)]) == 0
    assert printed.endswith("\n\n" + capsys.readouterr().out)
    assert not [each for each in files(path.parent) if each not in (path, manifest_path(path))]
    return manifest


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_plan_of_the_small_network_for_named_targets(
    torch_rtx: Any, work: Path, tmp_path: Path, capsys: Any, plans: list[Plan], frontend: str, precision: str
) -> None:
    path = tmp_path / "r8.engine"
    options = ["--precision", precision, "--frontend", frontend, "--compute-capability", "8.6, 8.9"]
    if precision == "int8":
        options += ["--calibration", str(work / "r8.json")]
    printed = build("--weights", work / "r8.safetensors", *RTX, *options, "-o", path)
    assert f"frontend    {frontend}: as asked" in printed
    manifest = check_plan(path, plans[0], printed, capsys, precision=precision, device="sm_86,sm_89")
    assert manifest.weights_sha256 == sha256_of(work / "r8.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_layers_that_are_left_out_have_no_pairs_and_are_in_the_manifest(
    torch_rtx: Any, work: Path, tmp_path: Path, plans: list[Plan], frontend: str
) -> None:
    common = ("--weights", work / "r8.safetensors", *RTX, "--frontend", frontend)
    options = (*common, "--int8", "--batch", "2", "--calibration", work / "r8.json")
    build(*options, "-o", tmp_path / "all.engine")
    build(*options, "--exclude-layer", "backbone.stem.*", "-o", tmp_path / "most.engine")
    every, most = (plan.definition for plan in plans)
    pairs = 2 if frontend == "torch-tensorrt" else 1  # the parser's weights are stored as integers
    assert most.quantize_layers == every.quantize_layers - pairs
    assert most.dequantize_layers == every.dequantize_layers - 2
    manifest = Manifest.load(tmp_path / "most.engine")
    assert manifest.batch == 2
    assert manifest.calibration is not None and manifest.calibration["excluded"] == ["backbone.stem.*"]
    assert manifest.calibration["data"] == "two clips"
    assert [tensor.name for tensor in most.inputs][:2] == ["frame", "active"]


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("network", ["r50", "the default network"])
def test_plans_of_real_networks_through_both_frontends(
    torch_rtx: Any,
    work: Path,
    tmp_path: Path,
    capsys: Any,
    plans: list[Plan],
    network: str,
    precision: str,
    frontend: str,
) -> None:
    path = tmp_path / "real.engine"
    options: list[object] = ["--precision", precision, "--frontend", frontend]
    if network == "r50":
        options += ["--network", "r50", "--size", "64"]
        options += ["--calibration", work / "clips"] if precision == "int8" else []
    printed = build(*RTX, *options, "-o", path)
    manifest = check_plan(path, plans[0], printed, capsys, precision=precision)
    assert len(manifest.states) == (16 if network == "r50" else 9) + 3
    if network != "r50":
        assert manifest.weights_sha256 == sha256_of(ROOT / "engines/actions_lite0.safetensors")
        assert len(manifest.labels) == 22 and "weights     actions_lite0.safetensors" in printed
    if precision == "int8":
        assert manifest.calibration is not None
        # Of lite0's 49 convolutions the record leaves out the first and the 16 depthwise ones.
        recorded = Ranges.load(ROOT / "calibration/actions_lite0.json").exclude["onnx"]
        assert manifest.calibration["excluded"] == ([] if network == "r50" else list(recorded))
        assert plans[0].definition.dequantize_layers == 2 * (53 if network == "r50" else 32)
        assert (manifest.calibration["clips"] == 2) == (network == "r50")


def test_the_frontend_and_the_runtime_choose_themselves(
    torch_rtx: Any, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_engine, "_build_of_source", lambda options, runtime: pytest.fail(runtime))
    with pytest.raises(pytest.fail.Exception, match="tensorrt-rtx"):
        run("--weights", work / "r8.safetensors")
    options = build_engine._parser().parse_args(["--int8"])
    assert build_engine._choose_frontend(options) == ("torch-tensorrt", "torch_tensorrt is installed")


WITHOUT = """
import sys
for name in ("torch", "torchvision", "onnx", "onnxruntime", "safetensors", "cv2", "tqdm"):
    sys.modules[name] = None
from pathlib import Path
from stsm_rt import build_engine
folder = sys.argv[1]
if folder:
    build_engine.shipped_folder = lambda name: Path(folder) / name
sys.exit(build_engine.main(sys.argv[2:]))
"""


def without_torch(*arguments: object, shipped: Path | str = "", cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that has numpy and TensorRT, and neither torch nor ONNX nor ONNX Runtime."""
    command = [sys.executable, "-c", WITHOUT, str(shipped), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_exported_graph_becomes_a_plan_without_torch(rtx: Any, work: Path, tmp_path: Path, precision: str) -> None:
    graph = exported(work, precision)
    done = without_torch(graph, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    # The name says no longer that it is a graph for TensorRT.
    path = tmp_path / f"small_{precision}.engine"
    assert files(tmp_path) == [path, manifest_path(path)]
    made, source = Manifest.load(path), Manifest.load(graph)
    version = tensorrt_library.load_tensorrt("tensorrt-rtx").version
    assert made == dataclasses.replace(
        source, runtime="tensorrt-rtx", runtime_version=version, device="sm_80+", sha256=sha256_of(path)
    )
    assert {state.dtype for state in made.states} == {"float16"}
    assert "runtime     tensorrt-rtx: the package tensorrt_rtx is installed" in done.stdout
    assert "frontend    onnx" in done.stdout and made.sha256 in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_without_torch_the_shipped_graph_is_taken(rtx: Any, work: Path, tmp_path: Path, precision: str) -> None:
    engines = tmp_path / "installed" / "engines"
    engines.mkdir(parents=True)
    for source in (graph := exported(work, precision), manifest_path(graph)):
        name = source.name.replace("small", "actions_lite0")
        (engines / name).write_bytes(source.read_bytes())
    (tmp_path / "device").mkdir()
    done = without_torch(f"--{precision}", shipped=engines.parent, cwd=tmp_path / "device")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"graph       actions_lite0_{precision}_tensorrt.onnx: torch is not installed" in done.stdout
    path = tmp_path / "device" / f"actions_lite0_{precision}.engine"
    assert files(path.parent) == [path, manifest_path(path)]
    assert Manifest.load(path).precision == precision


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--precision", "fp32"], "no fp32 graph is shipped; export one on another machine"),
        (["--network", "r50"], "needs [a-z_0-9]+, which is not installed; run pip install"),
    ],
)
def test_without_torch_what_is_not_shipped_is_one_sentence(
    rtx: Any, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    done = without_torch(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("stsm-rt: error: ") and done.stderr.count("\n") == 1
    assert re.search(sentence, done.stderr)
    assert files(tmp_path) == []


@pytest.mark.parametrize("kind", ["absent", "damaged", "without manifest", "manifest of another", "an engine"])
def test_a_graph_that_cannot_be_used(
    rtx: Any, work: Path, graph: Path, tmp_path: Path, refused: Callable[..., str], kind: str
) -> None:
    given = tmp_path / "given.onnx"
    if kind != "absent":
        given.write_bytes(graph.read_bytes())
        manifest_path(given).write_bytes(manifest_path(graph).read_bytes())
    sentence = "its manifest says"
    if kind == "absent":
        sentence = "there is no engine file"
    elif kind == "damaged":
        given.write_bytes(given.read_bytes()[:-100])
    elif kind == "without manifest":
        manifest_path(given).unlink()
        sentence = "has no manifest"
    elif kind == "manifest of another":
        manifest_path(given).write_bytes(manifest_path(work / "r8_fp32.onnx").read_bytes())
    else:
        given.write_bytes((work / "r8_fp32.onnx").read_bytes())
        manifest_path(given).write_bytes(manifest_path(work / "r8_fp32.onnx").read_bytes())
        sentence = "is an engine for onnxruntime, not a graph for TensorRT"
    assert sentence in refused(given, *RTX)


def test_a_graph_that_tensorrt_cannot_read_is_one_sentence(
    rtx: Any, graph: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    given = tmp_path / "given.onnx"
    given.write_bytes(graph.read_bytes()[:-1000])
    dataclasses.replace(Manifest.load(graph), sha256=sha256_of(given)).save(given)
    assert "is damaged or no ONNX file; export it again" in refused(given, *RTX)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--weights", "w.safetensors"], "--weights cannot change a graph"),
        (["--network", "r50"], "--network cannot change a graph"),
        (["--size", "64"], "--size cannot change a graph"),
        (["--batch", "2"], "--batch cannot change a graph"),
        (["--calibration", "clips"], "--calibration cannot change a graph"),
        (["--calibration-method", "max"], "--calibration-method cannot change a graph"),
        (["--exclude-layer", "*"], "--exclude-layer cannot change a graph"),
        (["--data", "clips"], "--data cannot change a graph"),
        (["--measured", "report.json"], "--measured cannot change a graph"),
        (["--int8"], "is fp16; ask for no other precision"),
        (["--frontend", "torch-tensorrt"], "goes through TensorRT's parser"),
        (["--compute-capability", "8.7"], "builds for the compute capabilities 7.5, .*not '8.7'"),
        (["--hardware-compatible"], "no hardware-compatible plans"),
        (["--dla", "0"], "DLA core 0 was asked for, this device has none"),
        (["--timing-cache", "kernels"], "has no timing cache"),
        (["--workspace", "0"], "at least 1 MiB, not 0"),
        (["-o", "plan.onnx"], r"tensorrt-rtx ends in \.engine, got plan\.onnx"),
        (["-o", "file/plan.engine"], r"the engine file/plan\.engine cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_a_graph_cannot_meet_are_one_sentence(
    rtx: Any, graph: Path, tmp_path: Path, refused: Callable[..., str], arguments: list[str], sentence: str
) -> None:
    (tmp_path / "file").touch()
    assert re.search(sentence, refused(graph, *RTX, *arguments))


def test_a_target_that_tensorrt_rtx_cannot_build_for_is_refused_before_anything_is_calibrated(
    rtx: Any, work: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_source, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    options = ("--int8", "--calibration", work / "clips", "--compute-capability", "8.7")
    assert "not '8.7'" in refused("--weights", work / "r8.safetensors", *RTX, *options)


def test_a_torch_tensorrt_for_another_runtime_is_one_sentence(
    torch_rtx: Any, work: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(torch_rtx, runtime="tensorrt", version="10.3.0")
    monkeypatch.setattr(build_engine, "load_tensorrt", lambda runtime: other)
    monkeypatch.setattr(build_engine, "plan_device", lambda *_: "sm_87")
    error = refused("--weights", work / "r8.safetensors", "--runtime", "tensorrt", "--frontend", "torch-tensorrt")
    assert "Torch-TensorRT builds for tensorrt-rtx, not for tensorrt; choose --frontend onnx" in error


@pytest.mark.slow
def test_the_command_is_a_module_that_can_be_run(work: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stsm_rt.build_engine", "--weights", str(work / "r8.safetensors")]
    command += ["--runtime", "onnxruntime"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert Manifest.load(tmp_path / "r8_fp32.onnx").sha256 in done.stdout
    failed = subprocess.run([*command, "--fp16"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "Traceback" not in failed.stderr
