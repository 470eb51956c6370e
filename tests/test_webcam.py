"""The command: what it prints, what it writes, how it ends."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from clips import http_server, plain, read_all, write_video
from command import ROOT, SIZE, Lines, environment, press_until, records, running, webcam
from display import virtual_display
from onnx import numpy_helper

from stsm_rt.manifest import manifest_path, sha256_of
from stsm_rt.video.sources import RecordedSource, open_source
from stsm_rt.webcam import main


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds: black, green from 1 to 3 s, black."""
    frames = plain("black", 30, SIZE) + plain("green", 60, SIZE) + plain("black", 30, SIZE)
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames)


def test_it_says_what_happens_and_writes_the_video_and_the_lines(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    code, out, err = webcam(
        tmp_path, "--engine", tiny_engine.path, "--source", clip, "--save", "out.mp4", "--events",
        "out.jsonl", "--topk", 2,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "no display" in out and "headless" in out
    told = [line.split() for line in out.splitlines() if " green " in line]
    assert [words[2:4] for words in told] == [["green", "starts"], ["green", "ends"]]
    assert 1.0 <= float(told[0][0]) <= 1.5 and 3.0 <= float(told[1][0]) <= 3.6
    assert "120 frames, 40 steps, 1 event in" in out
    assert "annotated video: out.mp4" in out and "results and events: out.jsonl" in out
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.mp4"]

    lines = records(tmp_path / "out.jsonl")
    results = [line for line in lines if line["kind"] == "result"]
    events = [line for line in lines if line["kind"] == "event"]
    assert [line["frame"] for line in results] == list(range(0, 120, 3))
    assert [len(line["labels"]) for line in results] == [2] * 40
    assert (results[20]["label"], results[20]["active"], results[20]["dropped"]) == ("green", "green", 0)
    started, ended = events
    assert (started["label"], started["end"], ended["start"]) == ("green", None, started["start"])
    assert ended["end"] == ended["time"] > started["time"] and ended["peak"] == ended["score"] > 0.9
    # An event's line follows the line of the step at which it was raised.
    assert lines[lines.index(started) - 1]["time"] == started["time"]

    with open_source(tmp_path / "out.mp4") as source, open_source(clip) as original:
        assert (source.frame_rate, source.size) == (30, SIZE)
        pairs = list(zip(read_all(source)[0], read_all(original)[0], strict=True))
    changes = [np.abs(annotated.astype(int) - plain_frame) for annotated, plain_frame in pairs]
    assert len(changes) == 120
    # The panel is on every frame, the flash only where the event starts, the rest is the video.
    assert min(change[150:230, 10:120].mean() for change in changes) > 5
    flashes = [change[100, 0].max() > 60 for change in changes]
    begin = started["frame"]
    assert not any(flashes[: begin - 1]) and all(flashes[begin : begin + 10]) and not any(flashes[begin + 40 :])
    assert changes[60][100:140, 200:300].mean() < 3


def test_a_running_event_is_ended_at_the_end(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    code, out, _ = webcam(
        tmp_path, "--engine", tiny_engine.path, "--source", clip, "--events", "a.jsonl", "--max-frames", 61
    )
    assert code == 0 and "61 frames, 21 steps, 1 event in" in out
    last = records(tmp_path / "a.jsonl")[-1]
    assert (last["kind"], last["label"], last["frame"], last["end"]) == ("event", "green", 60, last["time"])


def test_options_reach_the_recognizer(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    usual = ("--engine", tiny_engine.path)
    _, out, _ = webcam(tmp_path, *usual, "--source", clip, "--headless", "--threshold", "1")
    assert "0 events in" in out and "headless" not in out
    frames = plain("black", 60, SIZE)
    for frame in frames:
        frame[100:200, 150:300] = (0, 0, 255)
    write_video(tmp_path / "corner.mp4", frames)
    assert " red " not in webcam(tmp_path, *usual, "--source", "corner.mp4")[1]
    assert " red starts" in webcam(tmp_path, *usual, "--source", "corner.mp4", "--roi", "150,100,150,100")[1]


def test_every_frame_is_decided_on_if_asked_for(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    usual = ("--engine", tiny_engine.path, "--source", clip, "--events", "a.jsonl")
    code, out, err = webcam(tmp_path, *usual, "--every-frame")
    assert (code, err) == (0, "") and "120 frames, 120 steps, 1 event in" in out
    found = records(tmp_path / "a.jsonl")
    assert [line["frame"] for line in found if line["kind"] == "result"] == list(range(120))
    started, ended = (line for line in found if line["kind"] == "event")
    webcam(tmp_path, *usual)
    seldom = [line for line in records(tmp_path / "a.jsonl") if line["kind"] == "event"]
    # The same spans of time, seen more often.
    assert (started["time"], ended["time"]) == pytest.approx([line["time"] for line in seldom], abs=0.2)


def test_every_frame_of_a_source_without_a_frame_rate_is_refused(
    tiny_engine: Any, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RecordedSource, "frame_rate", property(lambda _: None, lambda *_: None), raising=False)
    arguments = ["--engine", str(tiny_engine.path), "--source", str(clip), "--headless"]
    assert main([*arguments, "--every-frame"]) == 2
    assert f"--every-frame needs the frame rate of {clip}, which declares none; leave it out" in capsys.readouterr().err
    assert main(arguments) == 0


def test_a_folder_of_images_is_a_source(tiny_engine: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, frame in enumerate(plain("blue", 30, SIZE)):
        cv2.imwrite(str(tmp_path / "images" / f"{index}.jpg"), frame)
    code, out, _ = webcam(tmp_path, "--engine", tiny_engine.path, "--source", "images")
    assert code == 0 and " blue starts" in out and "30 frames, 10 steps, 1 event" in out


@pytest.fixture
def fake_sample(tmp_path: Path, clip: Path) -> Path:
    """A folder to import from that holds a package like sports2d, with a clip of our own."""
    folder = tmp_path / "packages" / "Sports2D" / "Demo"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    with open_source(clip) as source:
        frames = [np.full((994, 1768, 3), frame[5, 5], np.uint8) for frame in read_all(source)[0][20:60]]
    write_video(folder / "demo.mp4", frames)
    return tmp_path / "packages"


@pytest.mark.skipif(Path("/dev/video0").exists(), reason="there is a camera, so the sample clip is not needed")
def test_without_a_camera_and_a_source_it_plays_the_sample_clip(
    tiny_engine: Any, tmp_path: Path, fake_sample: Path
) -> None:
    code, out, err = webcam(
        tmp_path, "--engine", tiny_engine.path, "--save", "out.mp4", PYTHONPATH=f"{ROOT}:{fake_sample}"
    )
    assert (code, err) == (0, "")
    assert "no camera was found, so the sample clip is played" in out and " green starts" in out
    assert "failed" not in out and "again" not in out, "the clip has not"
    with open_source(tmp_path / "out.mp4") as source:
        assert source.frame_count == 40 and source.size == (1768, 994)


def test_a_camera_on_the_network_is_watched_and_its_password_kept(tiny_engine: Any, tmp_path: Path) -> None:
    frames = plain("black", 10, SIZE) + plain("red", 30, SIZE)
    with http_server(frames=frames, fps=10, password="hush") as url:
        address = url.replace("//", "//user:hush@") + "/camera"
        code, out, err = webcam(
            tmp_path,
            "--engine",
            tiny_engine.path,
            "--source",
            address,
            "--save",
            "a.mp4",
            "--events",
            "a.jsonl",
            "--max-retries",
            0,
        )
        assert (code, err) == (0, "")
        assert " red starts" in out and "frames dropped" in out and "watching http://***@127.0.0.1" in out
        assert re.search(r"from a frame's arrival to its result: median \d+\.\d ms, p95 \d+\.\d ms", out)
        written = (tmp_path / "a.jsonl").read_text() + (tmp_path / "a.mp4").read_bytes().decode("latin-1")
        assert "hush" not in out + written
        with open_source(tmp_path / "a.mp4") as source:
            # As long as the stream was, although FFmpeg takes any such stream for one of 25 frames/s.
            assert source.frame_count and source.frame_rate
            assert 3.0 < source.frame_count / source.frame_rate < 5.5
        wrong = address.replace("/camera", "/nothing")
        for arguments in (("--source", wrong), ("--sorce", address), (address,), ("--roi", address)):
            code, out, err = webcam(tmp_path, "--engine", tiny_engine.path, *arguments)
            assert code == 2 and "***@" in err and "hush" not in out + err


def test_an_engine_that_gives_no_numbers_ends_it_with_a_sentence_and_no_result(
    make_engine: Any, clip: Path, tmp_path: Path
) -> None:
    engine = make_engine()
    graph = onnx.load(engine.path)
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(4, np.nan, np.float32), "bias"))
    onnx.save(graph, engine.path)
    dataclasses.replace(engine.manifest, sha256=sha256_of(engine.path)).save(engine.path)
    # A pipe keeps what was written, though a run on a recording that fails leaves no file.
    for sources in (["--source", clip], ["--source", clip, "--source", clip]):
        code, out, err = webcam(tmp_path, "--engine", engine.path, *sources, "--headless", "--events", "/dev/stdout")
        assert code == 2 and err.count("\n") == 1
        assert "failed at 5 steps in a row, the last time with: the engine gave logits that are not finite" in err
        assert '"kind": "source"' in out and '"kind": "result"' not in out


def test_what_a_recording_does_is_in_the_lines(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    webcam(tmp_path, "--engine", tiny_engine.path, "--source", clip, "--events", "a.jsonl", "--headless")
    found = records(tmp_path / "a.jsonl")
    assert [(line["state"], line["reason"]) for line in found if line["kind"] == "source"] == [
        ("running", ""),
        ("ended", ""),
    ]
    assert not any("camera" in line for line in found)
    for sources in (["--source", clip], ["--source", clip, "--source", clip]):
        _, out, _ = webcam(
            tmp_path, "--engine", tiny_engine.path, *sources, "--events", "a.jsonl", "--headless", "--max-frames", 10
        )
        ends = [line for line in records(tmp_path / "a.jsonl") if line.get("state") == "ended"]
        assert [(line["time"], line["reason"]) for line in ends] == [
            (pytest.approx(0.3), "it was closed") for _ in sources[::2]
        ]
        assert "has ended" not in out, "somebody wanted it"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_completes_the_files(tiny_engine: Any, tmp_path: Path, number: int) -> None:
    outputs = ("--save", "a.mp4", "--events", "a.jsonl")
    with (
        http_server(frames=plain("blue", 3000, SIZE), fps=30) as url,
        running(tmp_path, "--engine", tiny_engine.path, "--source", f"{url}/camera", *outputs) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if "blue starts" in line:
                break
        sleep(0.5)
        begin = monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, "")
        assert monotonic() - begin < 5
    assert "blue ends" in out and "annotated video: a.mp4" in out
    assert records(tmp_path / "a.jsonl")[-1]["end"] is not None
    with open_source(tmp_path / "a.mp4") as source:
        assert len(read_all(source)[0]) == source.frame_count


def test_a_reader_that_goes_away_is_no_traceback(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--engine", tiny_engine.path, "--source", clip, "--save", "a.mp4") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.wait(20)
    assert process.returncode == 1 and err == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_under_standard_output_does_not_end_the_recognition(
    tiny_engine: Any, clip: Path, tmp_path: Path, buffered: bool
) -> None:
    words = ["--engine", tiny_engine.path, "--source", clip, "--headless", "--events", "a.jsonl"]
    # Of a record that is not taken the thread that delivers has to say something too.
    words += ["--webhook", "http://127.0.0.1:9/"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, str(ROOT / "demo" / "webcam.py"), *map(str, words)],
            cwd=tmp_path,
            env=environment(PYTHONUNBUFFERED="" if buffered else "1"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert run.returncode == 1
    assert run.stderr == "stsm-rt: standard output cannot be written (No space left on device); the rest goes on\n"
    assert [line["kind"] for line in records(tmp_path / "a.jsonl")].count("result") == 40
    assert len(records(tmp_path / "stsm-rt-undelivered.jsonl")) == 2


def test_events_that_did_not_get_there_are_counted_at_the_end(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    words = ["--engine", tiny_engine.path, "--source", clip, "--headless", "--webhook", "http://me:hush@127.0.0.1:9/x"]
    _, out, _ = webcam(tmp_path, *words)
    assert out.endswith("2 event records for http://127.0.0.1:9 did not get there: stsm-rt-undelivered.jsonl\n")
    os.remove(tmp_path / "stsm-rt-undelivered.jsonl")
    os.mkdir(tmp_path / "stsm-rt-undelivered.jsonl")
    _, out, _ = webcam(tmp_path, *words)
    assert "did not get there" not in out
    assert out.endswith("2 event records for http://127.0.0.1:9 lost: stsm-rt-undelivered.jsonl could not take them\n")


def test_a_recording_that_breaks_off_is_said(tiny_engine: Any, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.avi", plain("green", 60, SIZE)).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    for name, count in (("whole", 0), ("cut", 1)):
        _, out, _ = webcam(tmp_path, "--engine", tiny_engine.path, "--source", f"{name}.avi", "--headless")
        assert len(re.findall(r"\d s  \w+\.avi has ended: it broke off after \d+ of 60 frames", out)) == count, out


def mistakes() -> Iterator[Any]:
    """Arguments that are wrong, and what the sentence must say."""
    yield ["--source", "absent.mp4"], "there is no video absent.mp4"
    yield ["--source", "text.mp4"], "text.mp4 is not a video"
    yield ["--source", "98"], "camera 98 cannot be opened"
    yield ["--source", "clip.mp4", "--source", "absent.mp4"], "there is no video absent.mp4"
    yield ["--source", "clip.mp4", "--sources", "absent.txt"], "--source cannot be given beside it"
    yield ["--read-timeout", "0"], "the read timeout must be more than 0 s"
    yield ["--max-retries", "-1"], "must be at least 0, not -1"
    yield ["--webhook", "host"], "--webhook"
    yield ["--mqtt", "http://host/topic"], "--mqtt"
    yield ["--rotate", "1h"], "is for files that record a camera or a live stream"
    yield ["--engine", "absent.onnx"], "there is no engine file absent.onnx"
    yield ["--engine", "truncated.onnx"], "truncated.onnx"
    yield ["--engine", "lonely.onnx"], "has no manifest"
    yield ["--engine", "mismatch.onnx"], "the manifest belongs to another engine"
    yield ["--roi", "1,2,3"], "x,y,w,h in whole pixels were expected"
    yield ["--roi", "300,0,100,100"], "does not lie inside the frame of 320x240"
    yield ["--roi", "0,0,0,0"], "does not lie inside the frame of 320x240"
    yield ["--topk", "0"], "topk must be at least 1"
    yield ["--topk", "x"], "invalid int value"
    yield ["--threshold", "7"], "between 0 and 1"
    yield ["--threshold", "nan"], "between 0 and 1"
    yield ["--smoothing", "0"], "smoothing must be at least 1 step"
    yield ["--max-frames", "0"], "--max-frames must be at least 1"
    yield ["--save", "out.avi"], "must end in .mp4"
    yield ["--save", "absent/out.mp4"], "there is no folder"
    yield ["--save", "clip.mp4"], "must be different files"
    yield ["--events", "./out.mp4"], "must be different files"
    yield ["--nonsense"], "unrecognized arguments"


@pytest.mark.parametrize(("arguments", "sentence"), list(mistakes()))
def test_a_mistake_is_one_sentence_and_nothing_is_half_written(
    tiny_engine: Any, clip: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    shutil.copy(clip, tmp_path / "clip.mp4")
    (tmp_path / "text.mp4").write_text("this is no video")
    data = tiny_engine.path.read_bytes()
    for name in ("truncated.onnx", "lonely.onnx", "mismatch.onnx"):
        (tmp_path / name).write_bytes(data)
        if name != "lonely.onnx":
            shutil.copy(manifest_path(tiny_engine.path), manifest_path(tmp_path / name))
    (tmp_path / "mismatch.onnx").write_bytes(data + b"\0")
    (tmp_path / "truncated.onnx").write_bytes(data[: len(data) // 2])
    digest = hashlib.sha256(data[: len(data) // 2]).hexdigest()
    dataclasses.replace(tiny_engine.manifest, sha256=digest).save(tmp_path / "truncated.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    usual = ["--engine", tiny_engine.path, "--save", "out.mp4", "--events", "out.jsonl"]
    usual += [] if "--source" in arguments else ["--source", "clip.mp4"]
    code, out, err = webcam(tmp_path, *usual, *arguments)
    assert code == 2
    assert err.startswith("stsm-rt: error: ") and err.count("\n") == 1 and sentence in err
    assert "Traceback" not in out + err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_help_names_every_option(tmp_path: Path) -> None:
    code, out, _ = webcam(tmp_path, "--help")
    assert code == 0
    for option in (
        "engine",
        "source",
        "roi",
        "headless",
        "save",
        "events",
        "topk",
        "threshold",
        "smoothing",
        "every-frame",
        "max-frames",
        "sources",
        "rotate",
        "max-retries",
        "read-timeout",
        "metrics",
        "webhook",
        "mqtt",
    ):
        assert f"--{option}" in out


def test_the_window_shows_the_video_at_its_own_speed(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "screen").mkdir()
    with virtual_display(tmp_path / "screen") as display:
        begin = monotonic()
        with running(tmp_path, "--engine", tiny_engine.path, "--source", clip, DISPLAY=display.name) as process:
            greenest = 0
            while process.poll() is None:
                picture = display.screenshot().astype(int)
                green = (picture[:, :, 1] > 200) & (picture[:, :, [0, 2]].max(axis=2) < 80)
                greenest = max(greenest, int(green.sum()))
                sleep(0.1)
            out, _ = process.communicate()
    assert process.returncode == 0
    assert "headless" not in out and "q quits" in out and "120 frames" in out
    assert greenest > SIZE[0] * SIZE[1] // 2
    assert monotonic() - begin > 3.9


def test_keys_pause_reset_take_snapshots_and_quit(tiny_engine: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "long.mp4", plain("blue", 900, SIZE))
    (tmp_path / "screen").mkdir()
    arguments = ("--engine", tiny_engine.path, "--source", "long.mp4", "--events", "a.jsonl")
    with (
        virtual_display(tmp_path / "screen") as display,
        running(tmp_path, *arguments, DISPLAY=display.name) as process,
    ):
        lines = Lines(process)
        lines.wait_for("blue starts")
        press_until(display, "r", lines, "reset")
        lines.wait_for("blue starts")
        press_until(display, "s", lines, "snapshot: snapshot-0001.png")
        sleep(2.0)
        playing = display.screenshot().copy()
        display.press("space")
        sleep(1.0)
        still = display.screenshot().copy()
        # The numbers and a word changed, not the whole panel, as it would if it were drawn twice.
        assert 0 < (still != playing).any(axis=2).sum() < 3000
        sleep(0.5)
        assert (display.screenshot() == still).all()
        display.press("space")
        sleep(0.5)
        display.press("q")
        process.wait(20)
    assert process.returncode == 0
    snapshot = cv2.imread(str(tmp_path / "snapshot-0001.png"))
    assert snapshot.shape == (240, 320, 3) and (snapshot[:, :, 0] > 200).mean() > 0.4
    ends = [line for line in records(tmp_path / "a.jsonl") if line["kind"] == "event"]
    assert [line["end"] is None for line in ends] == [True, False] * (len(ends) // 2) and len(ends) >= 4


def test_a_pause_holds_a_camera(tiny_engine: Any, tmp_path: Path) -> None:
    (tmp_path / "screen").mkdir()
    with (
        virtual_display(tmp_path / "screen") as display,
        http_server(frames=plain("blue", 600, SIZE), fps=30) as url,
        running(
            tmp_path, "--engine", tiny_engine.path, "--source", f"{url}/camera", "--events", "a.jsonl",
            DISPLAY=display.name,
        ) as process,
    ):  # fmt: skip
        lines = Lines(process)
        lines.wait_for("blue starts")
        # A snapshot shows that the window has the keyboard.
        press_until(display, "s", lines, "snapshot")
        display.press("space")
        sleep(2.5)
        display.press("space")
        sleep(1.0)
        display.press("q")
        process.wait(20)
    assert process.returncode == 0
    times = [line["time"] for line in records(tmp_path / "a.jsonl") if line["kind"] == "result"]
    # Nothing was looked at meanwhile.
    assert max(np.diff(times)) > 2
