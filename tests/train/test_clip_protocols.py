"""Clip protocols on small data sets in every published format; the averages against a reference written out here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from made_videos import CLASSES, write_dataset, write_frames

from stsm_rt import evaluate
from stsm_rt.clip_protocols import PROTOCOLS, evaluate_weights
from stsm_rt.evaluation_set import PARTS, EvaluationSet, as_clips
from stsm_rt.manifest import DecisionSpec, sha256_of
from stsm_rt.model import ModelSpec, load_model, save_model
from stsm_rt.network_cost import clip_flops, count_parameters, step_flops
from stsm_rt.networks import StreamingNetwork
from stsm_rt.playback import play_clip
from stsm_rt.recognizer import Recognizer
from stsm_rt.shift import PRESETS

ROOT = Path(__file__).resolve().parents[2]
SIZE = 42  # pictures of 48 x 64 are resized to 48 for it: not at all


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set in every published format, six videos of three classes to evaluate each."""
    folder = tmp_path_factory.mktemp("sets")
    for name in CLASSES:
        write_dataset(name, folder / name)
    return folder


def write_weights(
    path: Path, labels: tuple[str, ...], shift: str = "tsm", background: str | None = None, **recipe: Any
) -> Path:
    spec = ModelSpec(
        network="r8",
        padding="symmetric",
        shift=PRESETS[shift].to_json(),
        rates=() if shift == "tsm" else (0.5, 0.1),
        changes=False,
        labels=labels,
        background=background,
        height=SIZE,
        width=SIZE + 10,
        frame_rate=10.0,
        decision=DecisionSpec(smoothing=3, threshold=0.5, release=0.3, min_steps=2),
        recipe={"name": "test", **recipe},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = spec.build().eval()
        torch.nn.init.normal_(network.classifier.weight, std=3.0)
    save_model(network, spec, path)
    return path


def report_of(arguments: list, out: Path) -> dict:
    assert evaluate.main([*map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("dataset", CLASSES)
def test_every_published_format_is_evaluated_under_every_protocol(dataset, sets, make_engine, tmp_path, capsys):
    labels = CLASSES[dataset]
    weights = write_weights(tmp_path / "tsm.safetensors", labels)
    engine = make_engine(labels=("background", *labels)).path
    data = ["--data", sets / dataset, "--dataset", dataset]
    for name, views in (("efficient", 1), ("accurate", 6), ("dense", 30)):
        clips = ["--weights", weights, "--protocol", name, "--frames", 3, "--device", "cpu"]
        report = report_of([*clips, *data], tmp_path / "report.json")
        assert (report["clips"], report["dataset"], report["part"]) == (6, dataset, PARTS[dataset])
        assert (report["protocol"], report["shift"]) == (name, "tsm")
        assert report["views"]["clips"] * report["views"]["crops"] == views
        assert report["cost"]["video_flops"] == views * report["cost"]["view_flops"]
        assert report["cost"]["step_flops"] is None
        assert np.sum(report["confusion"]["matrix"], 1).tolist() == [2, 2, 2]
        assert {"top1", "top5", "mean_class_accuracy", "calibration_error"} <= report.keys()
        assert (report["missing"], report["unreadable"]) == ([], [])
        shown = capsys.readouterr().out
        assert f"protocol {name}: " in shown and "GFLOPs a view" in shown and labels[2] in shown
    report = report_of(["--engine", engine, *data], tmp_path / "report.json")
    assert (report["clips"], report["dataset"], report["protocol"]) == (6, dataset, "streaming")
    assert np.sum(report["confusion"]["matrix"], 1).tolist() == [2, 2, 2]
    assert (tmp_path / "report.png").stat().st_size > 0


def reference(weights: Path, folder: Path, starts: list, stride: float, squares: list[tuple[int, int, int]]):
    """The probabilities of one video: logits averaged over frames, then over views, then the softmax."""
    network, _ = load_model(weights)
    pictures = [cv2.imread(str(path)) for path in sorted(folder.iterdir())]
    logits = []
    for start in starts:
        numbers = [int(start + stride * place) % len(pictures) for place in range(4)]
        for x, y, side in squares:
            clip = np.stack([pictures[number][y : y + side, x : x + side] for number in numbers])
            with torch.no_grad():
                logits.append(network(torch.from_numpy(clip)[None])[0].numpy().mean(0))
    exponentials = np.exp(np.mean(logits, 0) - np.mean(logits, 0).max())
    return exponentials / exponentials.sum()


CENTRE, THREE = [(11, 3, SIZE)], [(0, 0, 48), (8, 0, 48), (16, 0, 48)]


@pytest.mark.parametrize(
    ("protocol", "starts", "stride", "squares"),
    [
        # 70 pictures, 4 of them a clip. Uniform: the middle of every quarter; of two clips the start and the middle.
        ("efficient", [70 / 8], 70 / 4, CENTRE),
        ("accurate", [0, 70 / 8], 70 / 4, THREE),
        # Ten windows of 64 pictures that start from 0 to 6, every sixteenth picture.
        ("dense", [int(6 * place / 9) for place in range(10)], 16, THREE),
    ],
)
def test_views_are_averaged_as_written_out_here(protocol, starts, stride, squares, tmp_path: Path):
    data, labels = tmp_path / "jester", CLASSES["jester"]
    data.mkdir()
    write_frames(data / "7", 70, "{:05d}.jpg")
    (data / "jester-v1-labels.csv").write_text("\n".join(labels))
    (data / "jester-v1-validation.csv").write_text(f"7;{labels[1]}\n")
    for shift in ("tsm", "stsm_online"):
        weights = write_weights(tmp_path / f"{shift}.safetensors", labels, shift)
        expected = reference(weights, data / "7", starts, stride, squares)

        report = evaluate_weights(weights, EvaluationSet(data, "jester"), PROTOCOLS[protocol], frames=4)

        best = int(expected.argmax())
        assert report["confusion"]["matrix"][1][best] == 1
        # One clip: the distance of its confidence from what it turned out to be.
        assert report["calibration_error"] == pytest.approx(abs((best == 1) - expected[best]), abs=1e-5)


def test_clips_are_as_long_as_in_training_or_have_8_frames(sets: Path, tmp_path: Path):
    source, recipes = (
        EvaluationSet(sets / "jester", "jester"),
        ({}, {"steps": 3}, {"steps": 3, "video": {"flip": True}}),
    )
    for recipe, expected in zip(recipes, (8, 8, 3), strict=True):
        weights = write_weights(tmp_path / "w.safetensors", CLASSES["jester"], **recipe)
        assert evaluate_weights(weights, source, PROTOCOLS["efficient"])["views"]["frames"] == expected


def test_the_background_is_no_answer_but_keeps_its_share(sets: Path, tmp_path: Path):
    labels = CLASSES["jester"]
    plain = write_weights(tmp_path / "plain.safetensors", (*labels, "nothing"))
    marked = write_weights(tmp_path / "marked.safetensors", (*labels, "nothing"), background="nothing")
    network, spec = load_model(marked)
    network.classifier.bias.data[3] = 100.0  # would always win
    save_model(network, spec, marked)
    source, protocol = EvaluationSet(sets / "jester", "jester"), PROTOCOLS["efficient"]

    report = evaluate_weights(marked, source, protocol)

    assert report["confusion"]["labels"] == list(labels)
    top1 = evaluate_weights(plain, source, protocol)["top1"]
    # The rest of the probability is next to nothing, so confidence is 0 and the error is the accuracy.
    assert report["calibration_error"] == pytest.approx(report["top1"], abs=1e-6)
    assert 0 <= top1 <= 1


@pytest.mark.slow
def test_processes_that_decode_change_nothing(sets: Path, tmp_path: Path):
    weights = write_weights(tmp_path / "w.safetensors", CLASSES["ucf101"])
    source = EvaluationSet(sets / "ucf101", "ucf101")
    alone, helped = (evaluate_weights(weights, source, PROTOCOLS["efficient"], workers=n) for n in (0, 1))
    assert alone == helped


def test_weights_that_look_ahead_cannot_stream_and_causal_ones_stream_as_their_engine(sets, tmp_path, capsys):
    data = ["--data", str(sets / "ucf101"), "--dataset", "ucf101"]
    ahead = write_weights(tmp_path / "ahead.safetensors", CLASSES["ucf101"], "tsm")
    assert evaluate.main(["--weights", str(ahead), *data]) == 2
    assert "cannot run frame by frame" in capsys.readouterr().err
    causal = write_weights(tmp_path / "causal.safetensors", CLASSES["ucf101"], "tsm_online")

    report = report_of(["--weights", causal, *data], tmp_path / "report.json")

    assert report["weights_sha256"] == sha256_of(causal)
    assert report["cost"]["step_flops"] > 0
    recognizer = Recognizer(causal, topk=3)
    clips = as_clips(EvaluationSet(sets / "ucf101", "ucf101").read(CLASSES["ucf101"]))
    right = [play_clip(recognizer, clip).prediction == clip.label for clip in clips]
    assert report["top1"] == pytest.approx(sum(right) / 6)


@pytest.mark.parametrize("protocol", ["streaming", "efficient"])
def test_unreadable_videos_are_listed_up_to_one_in_a_hundred(protocol, sets, make_engine, tmp_path, capsys):
    data, labels = tmp_path / "list", CLASSES["list"]
    write_dataset("list", data, per_class=1)
    (data / "broken.mp4").write_text("no video")
    good = "yoga/validation_0.mp4 2\n"
    (data / "val_videofolder.txt").write_text("broken.mp4 0\n" + 99 * good)
    what = ["--engine", make_engine(labels=("background", *labels)).path]
    if protocol != "streaming":
        weights = write_weights(tmp_path / "w.safetensors", labels)
        what = ["--weights", weights, "--protocol", protocol, "--frames", 2]
    arguments = [*what, "--data", data, "--dataset", "list"]

    report = report_of(arguments, tmp_path / "report.json")

    assert report["clips"] == 99
    (left_out,) = report["unreadable"]
    assert left_out["file"].endswith("broken.mp4") and "broken.mp4" in left_out["reason"]
    assert "left out" in capsys.readouterr().out
    (data / "val_videofolder.txt").write_text(2 * "broken.mp4 0\n" + 97 * good)
    assert evaluate.main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "broken.mp4" in error and error.count("\n") == 1


def test_resnet50_costs_what_is_published():
    """TSM: 33 GFLOPs for 8 frames, counted as multiply-adds, and 24.3 M parameters with 400 classes."""
    with torch.device("meta"):
        network = StreamingNetwork("r50", 400, shift=PRESETS["tsm"]).eval()
    assert clip_flops(network, 8, 224, 224) / 2e9 == pytest.approx(32.9, abs=0.3)
    assert count_parameters(network) == pytest.approx(24.3e6, rel=0.01)
    assert step_flops(network, 224, 224) is None


def test_a_clip_costs_as_much_as_its_steps():
    network = StreamingNetwork("r8", 5, shift=PRESETS["stsm_online"]).eval()
    assert clip_flops(network, 6, 48, 64) == 6 * step_flops(network, 48, 64) > 0


def without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in package.split())
    code = f"import sys; {blocked}from stsm_rt import evaluate; sys.exit(evaluate.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_engines_need_no_torch_and_clip_protocols_say_what_to_install(sets, make_engine, tmp_path):
    engine = make_engine(labels=("background", *CLASSES["jester"])).path
    data = ["--data", str(sets / "jester"), "--dataset", "jester"]
    played = without("torch av safetensors", "--engine", str(engine), *data)
    assert (played.returncode, played.stderr) == (0, "") and "top-1" in played.stdout
    weights = write_weights(tmp_path / "w.safetensors", CLASSES["jester"])
    refused = without("torch", "--weights", str(weights), "--protocol", "dense", *data)
    assert refused.returncode == 2
    assert refused.stderr == (
        "stsm-rt: error: clip protocols need torch, which is not installed; run: pip install 'stsm-rt[train]'\n"
    )
