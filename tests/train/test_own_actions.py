"""Own clips in, an engine out: what is learned, what is held out, what is said."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import write_video

from stsm_rt.check_weights import random_weights
from stsm_rt.manifest import DecisionSpec, Manifest
from stsm_rt.model import ModelSpec, load_model, save_model
from stsm_rt.networks import ARCHITECTURES
from stsm_rt.own_clips import BACKGROUND, OwnClip, own_clips, read_clip
from stsm_rt.playback import Clip, play_clip, started_events
from stsm_rt.recognizer import Recognizer
from stsm_rt.shift import shift_spec
from stsm_rt.train.own_actions import main, see
from stsm_rt.train.own_features import FeatureReader, Played, Rows
from stsm_rt.train.own_fit import HeldOut, choose_thresholds, decide, fit, hold_out, interval
from stsm_rt.video.sources import open_source

SIZE = (48, 36)
DECISION = DecisionSpec(smoothing=3, threshold=0.5, release=0.3, min_steps=2)
WAYS = {"fall": (6, 0), "swipe_right": (0, 6), "swipe_left": (0, -6)}


def moving(way: str, seed: int, count: int = 12) -> list[np.ndarray]:
    """A square that goes its way over a dim room, round and round; ``still``: that stays."""
    rng = np.random.default_rng(seed)
    room = rng.integers(0, 60, (SIZE[1], SIZE[0], 3), np.uint8)
    y, x = (int(rng.integers(0, side)) for side in SIZE[::-1])
    dy, dx = WAYS.get(way, (0, 0))
    frames = []
    for t in range(count):
        frame = room.copy()
        rows, columns = (np.arange(10) + y + dy * t) % SIZE[1], (np.arange(10) + x + dx * t) % SIZE[0]
        frame[np.ix_(rows, columns)] = (255, 255, 255)
        frames.append(frame)
    return frames


def lay(folder: Path, label: str, recordings: int, each: int, seed: int = 0) -> None:
    (folder / label).mkdir(parents=True)
    for number in range(recordings * each):
        name = f"day{number // each}-{number % each + 1:04}.mp4"
        write_video(folder / label / name, moving(label, 1000 * seed + number), fps=10)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network whose random features tell ways to move apart."""
    torch.manual_seed(0)
    spec = ModelSpec(
        network="r8",
        padding=ARCHITECTURES["r8"].padding,
        shift=shift_spec("stsm_online").to_json(),
        rates=(0.5, 0.2),
        changes=True,
        labels=("old", BACKGROUND),
        background=BACKGROUND,
        height=SIZE[1],
        width=SIZE[0],
        frame_rate=10.0,
        decision=DECISION,
        recipe={"name": "small", "trained_on": "nothing"},
    )
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_model(spec.build().eval(), spec, path)
    return path


@dataclass(frozen=True)
class Run:
    folder: Path
    out: Path
    code: int
    said: str


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command on two actions of three recordings each, `nothing`, and a file that is no video."""
    folder, out = tmp_path_factory.mktemp("own") / "moves", tmp_path_factory.mktemp("out") / "my run"
    lay(folder, "fall", 3, 3, seed=1)
    lay(folder, "swipe_right", 3, 3, seed=2)
    lay(folder, BACKGROUND, 1, 2, seed=3)
    (folder / "fall" / "day2-0009.mp4").write_text("no video")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        patch.setattr("tqdm.tqdm.write", lambda line, **_: lines.append(line))
        code = main([str(folder), "--weights", str(weights), "--out", str(out)])
    return Run(folder, out, code, "\n".join(lines))


@pytest.mark.slow
def test_the_command_says_what_it_learned_from_what_it_left_out_and_how_to_run_the_engine(run: Run) -> None:
    assert run.code == 0
    assert "fall 10 clips of 3 recordings" in run.said and "nothing 2 clips of 1 recording" in run.said
    assert "left out: " in run.said and "day2-0009.mp4 is not a video" in run.said
    assert "18 clips recognized" in run.said and "3 parts of whole recordings, held out in turn" in run.said
    assert "warning" not in run.said
    assert f"run it:     stsm-rt webcam --engine '{run.out}/moves.onnx'" in run.said
    assert sorted(path.name for path in run.out.iterdir()) == [
        "moves.md",
        "moves.onnx",
        "moves.onnx.json",
        "moves.safetensors",
    ]


@pytest.mark.slow
def test_the_engine_carries_what_is_known_of_it_and_recognizes_other_clips(run: Run, tmp_path: Path) -> None:
    manifest = Manifest.load(run.out / "moves.onnx")
    assert (manifest.labels, manifest.background) == (("fall", "swipe_right", BACKGROUND), BACKGROUND)
    assert manifest.accuracy is not None and manifest.accuracy["clips"] == 18
    assert manifest.accuracy["top1"] >= 0.8 and manifest.accuracy["top1_95"][0] < manifest.accuracy["top1"]
    assert (manifest.decision.smoothing, manifest.decision.min_steps) == (DECISION.smoothing, DECISION.min_steps)
    recognizer = Recognizer(run.out / "moves.onnx", topk=5)
    hits = 0
    for seed, label in enumerate(("fall", "swipe_right") * 4):
        path = write_video(tmp_path / "clip.mp4", moving(label, 77_000 + seed), fps=10)
        hits += play_clip(recognizer, Clip(path, label)).prediction == label
    assert hits >= 7
    still = write_video(tmp_path / "still.mp4", moving("still", 5), fps=10)
    with open_source(still) as source:
        assert started_events(recognizer, source) == []
    card = (run.out / "moves.md").read_text()
    assert "| fall | 9 | 3 |" in card and "| nothing | 2 | 1 | no action |" in card and "stsm-rt webcam" in card


@pytest.mark.slow
def test_the_network_stays_as_it_is_but_for_its_classifier(run: Run, weights: Path) -> None:
    before, after = load_model(weights)[0].state_dict(), load_model(run.out / "moves.safetensors")[0].state_dict()
    changed = {
        key for key in before if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
    }
    assert changed == {"offset", "scale", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", ["r8", "r18", "mbv2", "lite0"])
def test_played_features_are_what_the_network_classifies(name: str, tmp_path: Path) -> None:
    found = random_weights(name, height=SIZE[1], width=SIZE[0])
    network, spec = found.network("stsm_online"), found.spec
    reader = FeatureReader(network, spec.frame_rate, background=1)
    frames, times = read_clip(write_video(tmp_path / "clip.mp4", moving("fall", 1), fps=10), (SIZE[1], SIZE[0]))
    played = reader.play(frames, times)
    assert (played.steps, len(played.features)) == (12, 22)  # and a second of its last picture
    with torch.no_grad():
        expected = network(torch.from_numpy(frames)[None])[0]
        got = network.classify(played.features[:12])
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("mirror", [True, False])
def test_in_the_mirror_left_is_right_and_a_side_without_a_counterpart_is_not_mirrored(
    weights: Path, tmp_path: Path, mirror: bool
) -> None:
    for label in ("swipe_left", "swipe_right", "fall"):
        lay(tmp_path / "three", label, 1, 2)
    network, spec = load_model(weights)
    clips = own_clips(tmp_path / "three")
    labels = ("fall", "swipe_left", "swipe_right", BACKGROUND)
    seen = see(network, spec, clips, labels, mirror=mirror)
    shown = {
        label: {int(x) for x, i in zip(seen.rows.labels, seen.rows.clips, strict=True) if clips[i].label == label}
        for label in labels[:-1]
    }
    assert shown["fall"] == {0, 3}
    assert shown["swipe_left"] == shown["swipe_right"] == {1, 2, 3} if mirror else shown["swipe_left"] == {1, 3}
    pair = [clip for clip in clips if clip.label != "swipe_right"]
    seen = see(network, spec, pair, ("fall", "swipe_left", BACKGROUND), mirror=mirror)
    assert {int(x) for x, i in zip(seen.rows.labels, seen.rows.clips, strict=True) if i >= 2} == {1, 2}


def rows_of(features: Sequence[torch.Tensor], labels: Sequence[int]) -> Rows:
    counts = [len(x) for x in features]
    return Rows(
        torch.cat(list(features)),
        torch.tensor(labels).repeat_interleave(torch.tensor(counts)),
        torch.ones(sum(counts)),
        torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
    )


def test_the_fit_is_the_optimum_of_the_whole_problem_and_classes_count_alike() -> None:
    torch.manual_seed(1)
    features, labels = torch.randn(40, 60), torch.tensor([0] * 30 + [1] * 6 + [2] * 4)
    rows = Rows(features, labels, torch.ones(40), torch.arange(40))
    for strength, found in zip((0.1, 0.01), fit(rows, 3, (0.1, 0.01)), strict=True):
        weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
        standard = (features - features.mean(0)) / features.std(0)
        losses = F.cross_entropy(standard @ weight.T + bias, labels, reduction="none")
        loss = torch.stack([losses[labels == k].mean() for k in range(3)]).mean() + strength * weight.square().sum()
        loss.backward()
        assert float(weight.grad.abs().max()) < 1e-3 and float(bias.grad.abs().max()) < 1e-3  # type: ignore[union-attr]
        assert found.l2 == strength


def test_what_is_held_out_is_not_learned_from() -> None:
    # Each recording has a look of its own and nothing else: who has seen its clips knows them, who has not guesses.
    torch.manual_seed(2)
    looks = 4 * torch.randn(8, 32)
    clips, features, labels = [], [], []
    for recording in range(8):
        for number in range(3):
            label = recording % 2
            clips.append(OwnClip(Path(f"{recording}-{number}"), "ab"[label], f"r{recording}"))
            features.append(looks[recording] + 0.1 * torch.randn(4, 32))
            labels.append(label)

    def recognized(clips: list[OwnClip]) -> float:
        played = [Played(x, len(x)) for x in features]
        answers, pictures = hold_out(rows_of(features, labels), clips, played, [[x] for x in features], 3)
        assert [answer.label for answer in answers] == [clip.label for clip in clips] and len(pictures) == len(clips)
        right = [decide(answer, ("a", "b", BACKGROUND), DECISION, 10.0) for answer in answers]
        return float(np.mean([decided.prediction == decided.label for decided in right]))

    assert recognized(clips) < 0.75
    alone = [OwnClip(clip.path, clip.label, str(clip.path)) for clip in clips]
    assert recognized(alone) == 1.0


def test_the_threshold_lies_between_what_actions_reach_and_what_nothing_reaches() -> None:
    def stream(label: str, score: float) -> HeldOut:
        logits = np.log(np.array([[score, (1 - score) / 2, (1 - score) / 2]] * 12))
        return HeldOut(label, logits, 12)

    streams = [*[stream("a", score) for score in (0.75, 0.8)], *[stream(BACKGROUND, score) for score in (0.45, 0.55)]]
    chosen = choose_thresholds(streams, ("a", "b", BACKGROUND), DECISION, 10.0)
    assert 0.6 < chosen.threshold < 0.7 and chosen.release < chosen.threshold
    assert (chosen.smoothing, chosen.min_steps) == (DECISION.smoothing, DECISION.min_steps)
    assert all(decide(s, ("a", "b", BACKGROUND), chosen, 10.0).right for s in streams)


def test_the_interval_is_wilsons() -> None:
    # Newcombe (1998), Statistics in Medicine 17: 81 of 263 and 15 of 148.
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-3)
    assert interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-3)
    assert interval(24, 24)[1] == 1.0 and 0.8 < interval(24, 24)[0] < 0.9


def test_few_clips_and_single_recordings_are_warned_of_and_single_clips_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stsm_rt.train.own_actions.export_engine", lambda *_, **__: None)
    lay(tmp_path / "few", "fall", 1, 3)
    lay(tmp_path / "few", "swipe_right", 2, 2)
    arguments = [str(tmp_path / "few"), "--weights", str(weights), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "warning: few clips (fall has 3, swipe_right has 4)" in said
    assert "warning: fall: all clips are of one recording" in said and "too good" in said
    for name in ("day0-0002.mp4", "day0-0003.mp4"):
        (tmp_path / "few" / "fall" / name).write_bytes(b"")
    assert main(arguments) == 2
    said, error = capsys.readouterr()
    assert "of 'fall', found 1; record more with stsm-rt record 'fall'" in error and error.count("stsm-rt: error") == 1
    assert said.count("left out") + error.count("left out") == 2


def test_mistakes_are_one_sentence(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path / "one", "fall", 1, 2)
    assert main([str(tmp_path / "one"), "--weights", str(weights)]) == 2
    assert "found only 'fall'" in capsys.readouterr().err
    lay(tmp_path / "one", "swipe_right", 1, 2)
    assert main([str(tmp_path / "one"), "--weights", str(tmp_path / "absent.safetensors")]) == 2
    assert "weights not found" in capsys.readouterr().err
    monkeypatch.setattr("stsm_rt.train.own_actions.shipped_folder", lambda _: tmp_path)
    assert main([str(tmp_path / "one")]) == 2
    assert "give --weights engines/actions_lite0.safetensors of a checkout" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "one"), "--weights", str(weights), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.train
def test_two_actions_of_twelve_real_clips_become_an_engine(
    jhmdb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The shipped network was trained on other clips of these actions, never on these: they are split 1's test list.
    counts: Counter[str] = Counter()
    rest = []
    with (jhmdb / "manifest.csv").open(newline="") as table:
        for row in csv.DictReader(table):
            label = row["class"]
            if label not in ("golf", "pour") or row["split1"] != "test":
                continue
            counts[label] += 1
            if counts[label] > 12:
                rest.append(Clip(jhmdb / row["file"], label))
                continue
            target = tmp_path / "own" / label / f"{row['source_group']}-{counts[label]:04}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(jhmdb / row["file"], target)
    out = tmp_path / "out"
    assert main([str(tmp_path / "own"), "--out", str(out)]) == 0
    assert f"stsm-rt webcam --engine {out}/own.onnx" in capsys.readouterr().out
    accuracy = json.loads((out / "own.onnx.json").read_text())["accuracy"]
    assert accuracy["clips"] == 24 and "whole recordings" in accuracy["on"]
    assert accuracy["top1"] >= 0.9
    recognizer = Recognizer(out / "own.onnx", topk=5)
    assert len(rest) == 4 and all(play_clip(recognizer, clip).prediction == clip.label for clip in rest)
