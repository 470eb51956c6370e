"""What INT8 costs and brings: measured on labelled clips, said in words, and mended by leaving layers out."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from clips import write_video
from small_networks import panning, small_model

from stsm_rt import build_engine, precision_report
from stsm_rt.bench import Comparison
from stsm_rt.calibrate import calibrate
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.export import export_engine
from stsm_rt.manifest import Manifest, sha256_of
from stsm_rt.model import ModelSpec, save_model
from stsm_rt.networks import StreamingNetwork
from stsm_rt.playback import Clip, read_clips
from stsm_rt.precision_report import Accuracy, LayerErrors, PrecisionReport, accuracy, report_precision
from stsm_rt.quantize import convolutions
from stsm_rt.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class Small:
    """A tiny network on disk in FP32 and FP16, its ranges, and labelled clips."""

    network: StreamingNetwork
    spec: ModelSpec
    folder: Path
    ranges: Ranges
    layers: list[str]

    @property
    def weights(self) -> Path:
        return self.folder / "r8.safetensors"

    @property
    def fp32(self) -> Path:
        return self.folder / "fp32.onnx"

    @property
    def fp16(self) -> Path:
        return self.folder / "fp16.onnx"

    @property
    def data(self) -> Path:
        return self.folder / "data"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    network, spec = small_model()
    save_model(network, spec, folder / "r8.safetensors")
    digest = sha256_of(folder / "r8.safetensors")
    export_engine(network, spec, folder / "fp32.onnx", weights_sha256=digest)
    export_engine(network, spec, folder / "fp16.onnx", weights_sha256=digest, runtime="onnx", precision="fp16")
    (folder / "data").mkdir()
    videos = [write_video(folder / "data" / f"{seed}.mp4", panning(6, seed=seed), fps=10) for seed in range(5)]
    # FP32 is right by definition, but for the last clip of the test list.
    fp32 = Engine.open(folder / "fp32.onnx")
    decisions = accuracy(fp32, [Clip(video, "clap") for video in videos[:4]], "FP32").decisions
    other = {"clap": "wave", "wave": "clap"}
    classes = [*decisions[:3], other[decisions[3]]]
    with (folder / "data" / "manifest.csv").open("w", newline="") as file:
        rows = [(video.name, label, "test") for video, label in zip(videos, classes, strict=False)]
        csv.writer(file).writerows([("file", "class", "split1"), *rows, ("4.mp4", "clap", "train")])
    ranges = calibrate(folder / "fp32.onnx", videos[4:], data="one clip")
    ranges.save(folder / "r8.json")
    return Small(network, spec, folder, ranges, convolutions(onnx.load(folder / "fp32.onnx").graph))


@pytest.fixture(autouse=True)
def one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is compared, but not for long."""
    monkeypatch.setattr(precision_report, "PAIRS", 1)


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say how many of ten clips INT8 has wrong at each build, the last number for all that follow; FP32 has none."""

    def losing(*wrong: int) -> None:
        builds = itertools.chain(wrong, itertools.repeat(wrong[-1]))

        def measured(engine: Any, clips: Any, name: str) -> Accuracy:
            return result(name, next(builds) if name == "INT8" else 0)

        monkeypatch.setattr(precision_report, "accuracy", measured)

    return losing


def result(name: str, wrong: int, clips: int = 10) -> Accuracy:
    correct = tuple(clip >= wrong for clip in range(clips))
    return Accuracy(name=name, correct=correct, decisions=tuple("clap" if each else "wave" for each in correct))


def report(wrong: int = 0, ratio: float | None = 0.5, clips: int = 10, **fields: Any) -> PrecisionReport:
    speed = Comparison("FP32", "int8.onnx", ratio, ratio, ratio, 12) if ratio else None
    known: dict[str, Any] = {
        "accuracies": (result("FP32", 0, clips), result("FP16", 0, clips), result("INT8", wrong, clips)),
        "layers": tuple((f"backbone.{index}", 0.2 - index / 100) for index in range(7)),
        "sizes": {"FP32": 13_600_000, "FP16": 6_900_000, "INT8": 4_200_000},
        "speed": speed,
        "excluded": (),
    }
    return PrecisionReport(**(known | fields))


# In words.


def test_a_good_engine_has_its_numbers_and_no_warning() -> None:
    assert list(report().lines()) == [
        "top-1       FP32: 100.0 % of 10 clips",
        "top-1       FP16: 100.0 % of 10 clips, decides 0 otherwise than FP32",
        "top-1       INT8: 100.0 % of 10 clips, decides 0 otherwise than FP32",
        "size        FP32: 13.6 MB",
        "size        FP16: 6.9 MB",
        "size        INT8: 4.2 MB",
        "speed       2.00 times FP32 on this machine (2.00 to 2.00 over 12 pairs)",
        *(f"layer       backbone.{i}: {20 - i}.0 % error of the logits when it alone is INT8" for i in range(5)),
    ]


def test_a_loss_over_one_point_is_a_warning_that_names_the_layers() -> None:
    assert report(wrong=2, clips=200).loss == pytest.approx(1)
    assert not list(report(wrong=2, clips=200).warnings())
    (warning,) = report(wrong=3, clips=200).warnings()
    assert warning.startswith("warning     INT8 loses 1.5 points of top-1; build with --exclude-layer backbone.0 ")
    assert warning.endswith("--exclude-layer backbone.4, or with --auto-exclude 1")
    assert list(report(wrong=3, clips=200).lines())[-1] == warning
    (warning,) = report(wrong=3, clips=200, excluded=("backbone.0",)).warnings()
    assert "backbone.0" not in warning and "--exclude-layer backbone.5" in warning


@pytest.mark.parametrize(("ratio", "warned"), [(0.99, False), (1.0, True), (1.3, True), (None, False)])
def test_int8_that_is_not_faster_is_a_warning(ratio: float | None, warned: bool) -> None:
    lines = list(report(ratio=ratio).lines())
    assert any(line.startswith("warning     INT8 is not faster than FP32") for line in lines) == warned
    assert any(line.startswith("speed") for line in lines) == (ratio is not None)


def test_what_was_left_out_is_said() -> None:
    assert "excluded    backbone.0, backbone.1" in report(excluded=("backbone.0", "backbone.1")).lines()


# Measured.


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "onnx"])
def test_the_report_of_real_engines_on_real_clips(small: Small, tmp_path: Path, runtime: str) -> None:
    fp32 = small.fp32
    if runtime == "openvino":
        pytest.importorskip("openvino")
        fp32 = tmp_path / "fp32_openvino.onnx"
        fp32.write_bytes(small.fp32.read_bytes())
        dataclasses.replace(Manifest.load(small.fp32), runtime="openvino").save(fp32)
    found = report_precision(fp32, small.fp16, small.ranges, runtime, small.data, 1)
    assert [each.name for each in found.accuracies] == ["FP32", "FP16", "INT8"]
    assert found.accuracies[0].correct == (True, True, True, False)
    assert found.accuracies[1].decisions == found.accuracies[0].decisions
    assert found.loss == 100 * (0.75 - found.accuracies[2].top1)
    assert found.sizes["FP32"] == fp32.stat().st_size > found.sizes["FP16"] > found.sizes["INT8"] > 0
    assert (found.speed is None) == (runtime == "onnx")
    assert found.speed is None or (found.speed.pairs == 1 and found.speed.ratio_median > 0)
    errors = [error for _, error in found.layers]
    assert sorted(layer for layer, _ in found.layers) == sorted(small.layers)
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] <= errors[0] < 0.5
    assert found.excluded == ()


def test_the_layer_that_int8_hurts_most_is_ranked_first(small: Small) -> None:
    fp32 = Engine.open(small.fp32)
    errors = LayerErrors(fp32, read_clips(small.data, 1))
    offsets = {"good": 0.0, "worse": 0.1, "worst": -0.3}

    class Shifted:
        def __init__(self, layer: str) -> None:
            self.offset, self.reset = offsets[layer], fp32.reset

        def step(self, *arguments: Any) -> Any:
            return fp32.step(*arguments) + self.offset

    ranked = errors.rank(list(offsets), Shifted)  # type: ignore[arg-type]
    assert [layer for layer, _ in ranked] == ["worst", "worse", "good"]
    # Relative to the logits: the errors are to each other as the offsets, and nothing is none.
    assert ranked[0][1] == pytest.approx(3 * ranked[1][1], rel=1e-4) and ranked[2][1] == 0


def test_patterns_are_left_out_and_not_ranked(small: Small, lose: Callable[..., None]) -> None:
    lose(0)
    found = report_precision(
        small.fp32, small.fp16, small.ranges, "onnxruntime", small.data, 1, exclude=["backbone.blocks.*"]
    )
    assert found.excluded == ("backbone.blocks.*",)
    assert [layer for layer, _ in found.layers] == ["backbone.stem.0"]


def test_layers_are_left_out_until_the_loss_is_small_enough(
    small: Small, lose: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    lose(3, 2, 1)
    arguments = (small.fp32, small.fp16, small.ranges, "onnxruntime", small.data, 1)
    found = report_precision(*arguments, most=10)
    assert found.excluded == tuple(layer for layer, _ in found.layers[:2])
    assert found.loss == pytest.approx(10)
    assert capsys.readouterr().out.splitlines() == [
        f"excluded    0 of {len(small.layers)} layers: INT8 loses 30.0 points",
        f"excluded    1 of {len(small.layers)} layers: INT8 loses 20.0 points",
    ]
    lose(3)
    assert report_precision(*arguments).excluded == ()


def test_a_loss_that_cannot_be_mended_is_one_sentence(small: Small, lose: Callable[..., None]) -> None:
    lose(4)
    with pytest.raises(UserError, match="more than 1 points even with half of the layers in floating point; calibr"):
        report_precision(small.fp32, small.fp16, small.ranges, "onnxruntime", small.data, 1, most=1)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (("0.mp4", "swim", "test"), "does not know the class 'swim' of .*; it knows clap, wave$"),
        (("0.mp4", "clap", "train"), "has no test clip in split1"),
        (("absent.mp4", "clap", "test"), r"absent\.mp4"),
    ],
    ids=["unknown class", "no test clip", "no such clip"],
)
def test_clips_that_cannot_be_used_are_one_sentence(
    small: Small, tmp_path: Path, row: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "0.mp4").write_bytes((small.data / "0.mp4").read_bytes())
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "class", "split1"), row])
    with pytest.raises(UserError, match=sentence):
        report_precision(small.fp32, small.fp16, small.ranges, "onnxruntime", tmp_path, 1)


# Through the command.


def build(small: Small, out: Path, *options: object) -> int:
    arguments = ["--weights", small.weights, "--runtime", "onnxruntime", "--int8", "--data", small.data, "-o", out]
    arguments += ["--calibration", small.folder / "r8.json", *options]
    return build_engine.main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_command_prints_the_report_and_the_engine_is_the_reported_one(
    small: Small, tmp_path: Path, lose: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    lose(3, 1)
    out = tmp_path / "int8.onnx"
    assert build(small, out, "--auto-exclude", "10") == 0
    printed = capsys.readouterr().out
    assert f"excluded    0 of {len(small.layers)} layers: INT8 loses 30.0 points" in printed
    assert "top-1       INT8: 90.0 % of 10 clips, decides 1 otherwise than FP32" in printed
    assert "warning     INT8 loses 10.0 points of top-1" in printed
    calibration = Manifest.load(out).calibration
    assert calibration is not None
    (worst,) = calibration["excluded"]
    assert worst in small.layers and f"excluded    {worst}\n" in printed
    weights = {node.input[1] for node in onnx.load(out).graph.node if node.op_type == "Conv"}
    quantized = {layer for layer in small.layers if f"{layer}.weight_dequantized" in weights}
    assert quantized == set(small.layers) - {worst}


@pytest.mark.slow
def test_the_command_leaves_nothing_where_the_loss_cannot_be_mended(
    small: Small, tmp_path: Path, lose: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    lose(4)
    assert build(small, tmp_path / "int8.onnx", "--auto-exclude", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith("stsm-rt: error: INT8 loses more than 1 points") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
