"""The process that analyses an upload: the command line's results, for whatever people upload."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import wave
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from clips import counted, plain, read_all

av = pytest.importorskip("av", reason="the page needs PyAV: pip install 'stsm-rt[ui]'")

from uploads_made import SIZE, acting, command_line, encode, environment, records  # noqa: E402

from stsm_rt.app.container import Container, hold_opencv_to, read_container  # noqa: E402
from stsm_rt.app.report import Report, Span  # noqa: E402
from stsm_rt.app.score_curves import ScoreCurves  # noqa: E402
from stsm_rt.errors import UserError  # noqa: E402
from stsm_rt.result import Result  # noqa: E402
from stsm_rt.video.sources import open_source  # noqa: E402

FILES = ["events.csv", "events.jsonl", "report.json", "video.mp4"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", acting())


def run(video: Path, engine: Any, out: Path, *options: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "stsm_rt.app.analyse", video, "--engine", engine.path, "--out", out, *options]
    done = subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def analyse(video: Path, engine: Any, out: Path, *options: object) -> Report:
    code, _, errors = run(video, engine, out, *options)
    assert (code, errors) == (0, "") and sorted(os.listdir(out)) == FILES
    return Report.load(out)


def times_of(video: Path) -> list[float]:
    with av.open(str(video)) as container:
        return [frame.time for frame in container.decode(video=0)]


def test_the_results_are_those_of_the_command_line(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    report = analyse(clip, tiny_engine, tmp_path / "out")
    expected = command_line(clip, tmp_path, "--engine", tiny_engine.path)
    assert records(report.jsonl) == expected
    ended = [line for line in expected if line["kind"] == "event" and line["end"] is not None]
    fields = ("label", "start", "end", "peak")
    assert list(report.events) == [Span(*(line[field] for field in fields)) for line in ended]
    assert [event.label for event in report.events] == ["green"]
    with report.csv.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(fields)
    assert [Span(row[0], *map(float, row[1:])) for row in rows] == list(report.events)


def test_options_reach_the_recognizer_as_they_do_on_the_command_line(
    tiny_engine: Any, clip: Path, tmp_path: Path
) -> None:
    options = ("--threshold", 0.8, "--smoothing", 6)
    report = analyse(clip, tiny_engine, tmp_path / "out", *options, "--roi", 40, 0, 200, 150)
    expected = command_line(clip, tmp_path, "--engine", tiny_engine.path, *options, "--roi", "40,0,200,150")
    assert records(report.jsonl) == expected
    assert (report.threshold, report.smoothing) == (0.8, 6)
    assert expected != command_line(clip, tmp_path, "--engine", tiny_engine.path)


def test_a_real_clip_and_the_shipped_engine(jhmdb: Path, tmp_path: Path) -> None:
    from stsm_rt.engine import embedded_engine
    from stsm_rt.playback import read_clips

    clip = next(clip for clip in read_clips(jhmdb, 1) if clip.label == "golf").path
    engine = SimpleNamespace(path=embedded_engine())
    report = analyse(clip, engine, tmp_path / "out", "--name", "mine & yours")
    assert records(report.jsonl) == command_line(clip, tmp_path)
    assert report.source.name == "mine & yours" and report.engine.network == "lite0" and report.complete
    assert "golf" in report.scores.labels and len(report.scores.labels) <= 6


def test_the_report_says_what_was_done(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    report = analyse(clip, tiny_engine, tmp_path / "out")
    manifest = tiny_engine.manifest
    facts = (report.engine.network, report.engine.precision, report.engine.runtime, report.engine.sha256)
    assert facts == (manifest.network, manifest.precision, manifest.runtime, manifest.sha256)
    source = report.source
    assert (source.name, source.width, source.height, source.frames) == ("clip.mp4", *SIZE, 120)
    assert (source.frame_rate, source.duration, source.declared_duration) == pytest.approx((30, 4, 4), abs=1e-6)
    assert (report.complete, report.steps, report.threshold, report.smoothing) == (True, 40, 0.6, 3)
    assert 0 < report.latency.median <= report.latency.p95 < 5
    lines = [line for line in records(report.jsonl) if line["kind"] == "result"]
    assert list(report.scores.time) == pytest.approx([line["time"] for line in lines], abs=1e-3)
    assert next(iter(report.scores.labels)) == "green"
    for label, curve in report.scores.labels.items():
        scores = [dict(zip(line["labels"], line["scores"], strict=True))[label] for line in lines]
        assert list(curve) == pytest.approx(scores, abs=1e-4)
    assert json.loads((report.folder / "report.json").read_text()) == json.loads(json.dumps(report.to_record()))


def test_the_video_is_the_source_with_the_overlay(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    report = analyse(clip, tiny_engine, tmp_path / "out")
    assert times_of(report.video) == pytest.approx(times_of(clip), abs=1e-4)
    with open_source(report.video) as source, open_source(clip) as original:
        pairs = list(zip(read_all(source)[0], read_all(original)[0], strict=True))
    changes = [np.abs(annotated.astype(int) - picture) for annotated, picture in pairs]
    assert min(change[150:230, 10:120].mean() for change in changes) > 5
    assert changes[75][100:140, 200:300].mean() < 3


def test_progress_is_told_while_it_runs(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    code, out, _ = run(clip, tiny_engine, tmp_path / "out")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and all(set(line) == {"frames", "time", "duration", "label", "score"} for line in lines)
    assert lines[0]["frames"] <= 30 and lines[-1]["frames"] == 120 and lines[-1]["duration"] == pytest.approx(4)
    assert all(a["frames"] <= b["frames"] and a["time"] <= b["time"] for a, b in pairwise(lines))


def unusable(folder: Path) -> dict[str, str]:
    """Files that are no videos, and what is said of them."""
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(100_000))
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    cv2.imwrite(str(folder / "picture.png"), plain("red", 1)[0])
    (folder / "picture.png").rename(folder / "picture.mp4")
    whole = encode(folder / "whole.mp4", plain("red", 30)).read_bytes()
    (folder / "index-only.mp4").write_bytes(whole[: whole.index(b"mdat") + 8])
    secret = encode(folder / "secret.ts", plain("red", 30), file_format="mpegts")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
    (folder / "hls.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXTINF:1,\n{secret.name}\n#EXT-X-ENDLIST\n"
    )
    return {
        "text.mp4": "is not a video",
        "empty.mp4": "is not a video",
        "noise.mp4": "is not a video",
        "sound.wav": "holds no moving picture",
        "concat.mp4": "(is a picture or a list of files|is not a video)",
        "hls.mp4": "(is a picture or a list of files|is not a video)",
        "picture.mp4": "is a picture or a list of files",
        "index-only.mp4": "holds no frame that can be decoded",
    }


def test_what_is_no_video_is_one_sentence_without_a_path(tiny_engine: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, sentence in unusable(tmp_path / "in").items():
        code, out, errors = run(tmp_path / "in" / name, tiny_engine, tmp_path / "out", "--name", f"my {name}")
        assert (code, out) == (2, ""), name
        assert re.fullmatch(f"stsm-rt: error: my {re.escape(name)} {sentence}[^\n]*\n", errors), errors
        assert str(tmp_path) not in errors and not os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--threshold", 2), "the threshold must be between 0 and 1"),
        (("--smoothing", 0), "the smoothing must be at least 1"),
        (("--roi", 300, 0, 100, 100), "does not lie inside the frame"),
        (("--max-seconds", 3), "clip.mp4 is longer than 3 seconds"),
        (("--engine", "absent.onnx"), "there is no engine file"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    tiny_engine: Any, clip: Path, tmp_path: Path, options: tuple[object, ...], sentence: str
) -> None:
    code, _, errors = run(clip, tiny_engine, tmp_path / "out", *options)
    assert code == 2 and errors.startswith("stsm-rt: error: ") and errors.count("\n") == 1 and sentence in errors
    assert not os.listdir(tmp_path / "out")


def test_a_video_that_does_not_say_how_long_it_is_ends_at_the_limit(tiny_engine: Any, tmp_path: Path) -> None:
    video = encode(tmp_path / "endless.h264", acting(), file_format="h264")
    code, out, errors = run(video, tiny_engine, tmp_path / "out", "--max-seconds", 2)
    assert code == 2 and "endless.h264 is longer than 2 seconds" in errors
    assert json.loads(out.splitlines()[0])["duration"] is None
    assert not os.listdir(tmp_path / "out")
    assert analyse(video, tiny_engine, tmp_path / "out", "--max-seconds", 5).complete


def test_a_4k_video_is_made_small_enough_to_play(tiny_engine: Any, tmp_path: Path) -> None:
    video = encode(tmp_path / "4k.mp4", plain("green", 20, (3840, 2160)))
    report = analyse(video, tiny_engine, tmp_path / "out")
    assert (report.source.width, report.source.height) == (3840, 2160)
    assert [event.label for event in report.events] == ["green"]
    with open_source(report.video) as source:
        assert source.size == (1280, 720) and len(read_all(source)[0]) == 20


def test_a_phone_held_upright_stays_upright(tiny_engine: Any, tmp_path: Path) -> None:
    pictures = plain("black", 40, SIZE)
    for picture in pictures:
        picture[:, : SIZE[0] // 3] = (0, 0, 255)  # the left third is red; turned clockwise it is the upper one
    lying = encode(tmp_path / "lying.mp4", pictures)
    video = encode(tmp_path / "upright.mp4", pictures, rotation=-90)
    report = analyse(video, tiny_engine, tmp_path / "out")
    assert (report.source.width, report.source.height) == (SIZE[1], SIZE[0])
    assert records(report.jsonl) == command_line(video, tmp_path, "--engine", tiny_engine.path)
    assert records(report.jsonl) != command_line(lying, tmp_path, "--engine", tiny_engine.path)
    with av.open(str(report.video)) as container:
        frame = next(container.decode(video=0))
        assert frame.rotation == 0 and (frame.width, frame.height) == (SIZE[1], SIZE[0])
    with open_source(report.video) as source:
        picture = read_all(source)[0][20]
    assert picture[80, 120, 2] > 200 and picture[170, 230, 2] < 60


def test_a_variable_frame_rate_is_kept(tiny_engine: Any, tmp_path: Path) -> None:
    steps = np.random.default_rng(1).uniform(0.01, 0.12, 80)
    times = [0.0, *np.cumsum(steps).tolist()]
    video = encode(tmp_path / "phone.mp4", plain("black", 30, SIZE) + plain("red", 51, SIZE), times=times)
    report = analyse(video, tiny_engine, tmp_path / "out")
    assert times_of(report.video) == pytest.approx(times, abs=1e-4)
    assert records(report.jsonl) == command_line(video, tmp_path, "--engine", tiny_engine.path)
    event = report.events[0]
    assert event.label == "red" and times[30] < event.start < times[30] + 0.8 and report.complete


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_a_video_that_breaks_off_is_analysed_as_far_as_it_goes(tiny_engine: Any, tmp_path: Path, name: str) -> None:
    # Grain makes all frames about equally large in the file.
    noise = np.random.default_rng(0).integers(0, 60, (120, SIZE[1], SIZE[0], 3), np.uint8)
    pictures = [cv2.absdiff(picture, grain) for picture, grain in zip(acting(), noise, strict=True)]
    whole = encode(tmp_path / f"whole-{name}", pictures)
    assert analyse(whole, tiny_engine, tmp_path / "whole").complete
    cut = tmp_path / name
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    report = analyse(cut, tiny_engine, tmp_path / "cut")
    assert 30 < report.source.frames < 90 and report.steps == len(times_of(report.video)[::3])
    assert records(report.jsonl) == command_line(cut, tmp_path, "--engine", tiny_engine.path)
    # A transport stream declares nothing that could be missed.
    assert report.complete == (name == "a.ts")
    assert [event.label for event in report.events] == ["green"]


def test_opencv_opens_what_was_looked_at_and_nothing_else(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "")
    hold_opencv_to(read_container(clip, "clip.mp4"))
    with open_source(clip) as source:
        assert len(read_all(source)[0]) == 120
    hold_opencv_to(Container("matroska,webm", None, None))
    with pytest.raises(UserError, match="not a video"):
        open_source(clip)


def test_when_a_video_is_complete() -> None:
    declared = Container("mov", frames=100, duration=10.0)
    assert declared.is_complete(100, 10.0) and declared.is_complete(97, 9.7) and declared.is_complete(50, 9.6)
    assert declared.is_complete(99, 5.0), "the last frame stands for five seconds"
    assert not declared.is_complete(90, 9.0)
    assert not Container("mov", 100, None).is_complete(90, 10.0)
    assert not Container("mov", None, 10.0).is_complete(1000, 9.0)
    assert Container("h264", None, None).is_complete(1, 0.1)


def result(time: float, scores: dict[str, float]) -> Result:
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    labels, values = zip(*ranked, strict=True)
    return Result(time, 0, labels, values, 0.0, 0, False, (), None)


def test_curves_keep_their_maxima_however_long_they_get() -> None:
    curves = ScoreCurves(["a", "b", "c"])
    scores = np.random.default_rng(0).uniform(0, 0.6, (9001, 3))
    scores[4321] = (0.1, 0.99, 0.2)
    for step, row in enumerate(scores):
        curves.add(result(step / 10, dict(zip("abc", row, strict=True))))
    chosen = curves.choose({"c"})
    assert next(iter(chosen.labels)) == "c" and set(chosen.labels) == {"a", "b", "c"}
    assert 1000 <= len(chosen.time) <= 2000 and all(a < b for a, b in pairwise(chosen.time))
    assert len({len(values) for values in chosen.labels.values()} | {len(chosen.time)}) == 1
    bounds = [round(10 * time) for time in chosen.time] + [len(scores)]
    for column, label in enumerate("abc"):
        maxima = [scores[a:b, column].max() for a, b in pairwise(bounds)]
        assert chosen.labels[label] == pytest.approx(maxima, abs=1e-4)


def test_the_top_labels_are_those_of_events_and_those_that_were_best() -> None:
    names = "abcdefghij"
    curves = ScoreCurves(names)
    for step, best in enumerate("abcdefgh"):
        curves.add(result(step / 10, {name: (0.3 + step / 100 if name == best else 0.05) for name in names}))
    assert list(curves.choose({"b", "j"}).labels) == ["b", "j", "h", "g", "f", "e"]


def peak_memory(video: Path, engine: Any, out: Path) -> float:
    """Megabytes of memory that the process takes at most."""
    command = [sys.executable, "-m", "stsm_rt.app.analyse", video, "--engine", engine.path, "--out", out]
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment()
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tiny_engine: Any, tmp_path: Path) -> None:
    scene = counted(64, SIZE)
    peaks = []
    for repeats in (8, 32):
        video = encode(tmp_path / f"{repeats}.mp4", (frame for _ in range(repeats) for frame in scene))
        peaks.append(peak_memory(video, tiny_engine, tmp_path / f"out-{repeats}"))
    short, long = peaks
    # 1500 frames more would be 350 MB.
    assert long < short + 25
