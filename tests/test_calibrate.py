"""Calibration records what a live stream shows: the state carried, its first frames and every clip's own start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import write_video
from small_networks import panning, write_model
from torch import nn

from stsm_rt import calibrate as command
from stsm_rt.calibrate import calibrate
from stsm_rt.errors import UserError
from stsm_rt.export import export_engine
from stsm_rt.manifest import manifest_path, sha256_of
from stsm_rt.model import load_model
from stsm_rt.networks import StreamingNetwork
from stsm_rt.ranges import METHODS, Ranges
from stsm_rt.video.sources import open_source

FRAMES = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("weights") / "r8.safetensors")


@pytest.fixture(scope="module")
def engine(weights: Path) -> Path:
    network, spec = load_model(weights)
    path = weights.with_name("r8.onnx")
    export_engine(network, spec, path, weights_sha256=sha256_of(weights))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two clips at the model's own rate and size, so that every frame is a step."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{seed}.mp4", panning(FRAMES, seed=seed), fps=10) for seed in range(2)]


@pytest.fixture(scope="module")
def ranges(engine: Path, videos: list[Path]) -> Ranges:
    return calibrate(engine, videos, data="two clips")


def by_hand(network: StreamingNetwork, videos: list[Path], *, carry: bool = True) -> dict[str, Any]:
    """What enters every convolution of PyTorch's step form, (frames, C, H, W)."""
    seen: dict[str, list[np.ndarray]] = {}
    start = network.initial_state(48, 64)
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].numpy()))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    for video in videos:
        with open_source(video) as source, torch.no_grad():
            state = start
            for frame, _ in source:
                _, *following = network(torch.from_numpy(frame.copy())[None], *state)
                state = following if carry else start
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(steps) for name, steps in seen.items()}


@pytest.fixture(scope="module")
def live(weights: Path, videos: list[Path]) -> dict[str, Any]:
    return by_hand(load_model(weights)[0], videos)


def test_the_extremes_are_those_of_a_live_stream(ranges: Ranges, live: dict[str, Any]) -> None:
    inputs = {name.removesuffix(".input"): name for name in ranges.tensors if name.endswith(".input")}
    assert set(inputs) == set(live) and len(live) == 9
    for module, name in inputs.items():
        low, high = ranges.range(name)
        steps = live[module]
        assert low == pytest.approx(min(steps.min(), 0), rel=1e-4, abs=1e-5)
        assert high == pytest.approx(steps.max(), rel=1e-4)


def test_the_means_are_over_all_frames_and_pixels_by_channel(ranges: Ranges, live: dict[str, Any]) -> None:
    assert set(ranges.means) == set(live)
    for module, steps in live.items():
        np.testing.assert_allclose(ranges.mean(module), steps.mean((0, 2, 3), dtype=np.float64), rtol=1e-3, atol=1e-4)


def test_a_state_that_is_always_zero_would_give_other_ranges(ranges: Ranges, weights: Path, videos: list[Path]) -> None:
    still = by_hand(load_model(weights)[0], videos, carry=False)
    shifted = "backbone.blocks.2.conv1"
    moved = still[shifted].shape[1] // 8
    assert not still[shifted][:, :moved].any()
    assert min(ranges.mean(shifted)[:moved]) >= 0 and max(ranges.mean(shifted)[:moved]) > 0.1
    assert any(abs(ranges.amax(module) / np.abs(steps).max() - 1) > 0.01 for module, steps in still.items())


def test_the_first_frame_of_a_clip_counts_with_its_zero_state(engine: Path, videos: list[Path], tmp_path: Path) -> None:
    one = calibrate(engine, [write_video(tmp_path / "one.mp4", panning(1), fps=10)], data="one frame")
    moved = one.mean("backbone.blocks.0.conv1")[:4]
    assert (one.frames, one.clips, moved) == (1, 1, (0.0,) * 4)


def test_every_clip_starts_from_a_fresh_state(engine: Path, tmp_path: Path) -> None:
    # Stills: in a fresh state the moved channels are zero in one frame of two, in a kept one in one of six.
    still = panning(1)[[0, 0]]
    clips = [write_video(tmp_path / f"{i}.mp4", still, fps=10) for i in range(3)]
    one, three = (calibrate(engine, clips[:count], data="stills") for count in (1, 3))
    assert max(one.mean("backbone.blocks.0.conv1")[:4]) > 0.05
    assert three.means == one.means and three.tensors == one.tensors


def test_the_record_says_what_was_played(ranges: Ranges, engine: Path, weights: Path) -> None:
    assert (ranges.clips, ranges.frames, ranges.data) == (2, 2 * FRAMES, "two clips")
    assert (ranges.network, ranges.shift, ranges.method) == ("r8", "stsm_online", "max")
    assert ranges.weights_sha256 == sha256_of(weights)
    assert all(set(methods) == set(METHODS) for methods in ranges.tensors.values())


def test_a_camera_frame_between_two_steps_does_not_count(engine: Path, tmp_path: Path) -> None:
    # 30 frames/s for a model of 10 steps/s.
    ranges = calibrate(engine, [write_video(tmp_path / "fast.mp4", panning(9), fps=30)], data="fast")
    assert ranges.frames == 3


def test_percentile_and_entropy_lie_within_the_extremes(ranges: Ranges) -> None:
    clipped = 0
    for methods in ranges.tensors.values():
        (low, high), (low_p, high_p), (low_e, high_e) = (methods[method] for method in METHODS)
        assert low <= low_p <= 0 <= high_p <= high
        # One threshold for both signs, cut off where the values end.
        threshold = max(-low_e, high_e)
        assert 0 < threshold <= max(-low, high)
        assert low_e == pytest.approx(max(-threshold, low)) and high_e == pytest.approx(min(threshold, high))
        clipped += (low, high) != (low_p, high_p)
    assert clipped > len(ranges.tensors) / 2


def test_an_outlier_stretches_the_extremes_only() -> None:
    values = np.random.default_rng(0).normal(0, 1, (1, 1, 300, 1000)).astype(np.float32)
    values[0, 0, 0, 0] = 100
    found = histogram(values).ranges()
    assert found["max"][1] == 100
    # Of a normal distribution 5 in 100,000 lie above 3.9; a bin is 0.05 wide.
    assert found["percentile"] == pytest.approx((-3.9, 3.9), abs=0.1)
    assert 3 < found["entropy"][1] < 50


def test_a_tensor_that_is_always_zero_has_a_range() -> None:
    found = histogram(np.zeros((1, 2, 3, 4), np.float32)).ranges()
    assert set(found.values()) == {(0.0, 0.0)}


def test_a_range_holds_zero_though_no_value_is_negative_or_small() -> None:
    found = histogram(np.full((1, 2, 3, 4), 5.0, np.float32)).ranges()
    assert set(found.values()) == {(0.0, 5.0)}


def histogram(values: np.ndarray) -> Any:
    histogram = command._Histogram()
    histogram.widen(values)
    histogram.count(values)
    return histogram


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def test_the_command_writes_what_a_folder_of_clips_shows(
    engine: Path, ranges: Ranges, videos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r8.json"
    folder = videos[0].parent
    assert run("--engine", engine, "--clips", folder, "--method", "percentile", "-o", out) == 0
    assert Ranges.load(out) == dataclasses.replace(ranges, method="percentile", data=folder.name)
    assert f"{2 * FRAMES} steps of {folder.name}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["r8.json"]


@pytest.mark.parametrize("clips", ["empty", "absent", "text among them", "engine absent"])
def test_clips_that_cannot_be_played_are_one_sentence_and_leave_nothing(
    engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], clips: str
) -> None:
    folder, out = tmp_path / "clips", tmp_path / "out.json"
    if clips != "absent":
        folder.mkdir()
    if clips in ("text among them", "engine absent"):
        write_video(folder / "a.mp4", panning(2), fps=10)
    if clips == "text among them":
        (folder / "b.mp4").write_text("this is no video")
    if clips == "engine absent":
        engine = tmp_path / "absent.onnx"
    assert run("--engine", engine, "--clips", folder, "-o", out) == 2
    error = capfd.readouterr().err
    assert error.startswith("stsm-rt: error: ") and error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@pytest.mark.parametrize(
    "fields",
    [{"precision": "int8", "calibration": {"method": "max"}}, {"runtime": "openvino"}, {"runtime": "tensorrt"}],
    ids=str,
)
@pytest.mark.parametrize("content", ["graph", "plan"])
def test_an_engine_that_is_not_fp32_for_onnx_runtime_is_refused(
    engine: Path, videos: list[Path], tmp_path: Path, make_engine: Any, fields: dict[str, Any], content: str
) -> None:
    tiny = make_engine(**fields)
    if content == "plan":
        tiny.path.write_bytes(b"no ONNX")
        dataclasses.replace(tiny.manifest, sha256=sha256_of(tiny.path)).save(tiny.path)
    with pytest.raises(UserError, match="needs an FP32 engine for ONNX Runtime with batch 1"):
        calibrate(tiny.path, videos, data="")


def test_a_batch_is_refused(videos: list[Path], make_engine: Any) -> None:
    with pytest.raises(UserError, match="with batch 2;"):
        calibrate(make_engine(batch=2).path, videos, data="")


def test_no_clip_and_no_such_method_are_refused_before_anything_is_played(engine: Path, videos: list[Path]) -> None:
    with pytest.raises(UserError, match="at least one clip"):
        calibrate(engine, [], data="")
    with pytest.raises(UserError, match="unknown calibration method 'minmax'"):
        calibrate(engine, videos, data="", method="minmax")


def test_an_engine_without_its_manifest_is_refused(engine: Path, videos: list[Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(engine.read_bytes())
    assert not manifest_path(alone).exists()
    with pytest.raises(UserError, match="has no manifest"):
        calibrate(alone, videos, data="")
