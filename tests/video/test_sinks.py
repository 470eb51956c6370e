"""Sinks: whole files or none, videos that play, snapshots that overwrite nothing, and real windows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep

import cv2
import pytest
from clips import counted, number_of, plain, read_all
from display import virtual_display

from stsm_rt.errors import UserError
from stsm_rt.video.sinks import JsonLinesSink, VideoSink, save_snapshot, trial_window
from stsm_rt.video.sources import open_source


def test_json_lines_take_their_name_when_they_are_complete(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("old\n")
    with JsonLinesSink(path) as sink:
        sink.write({"kind": "result", "label": "wäve", "score": 0.5})
        sink.write({"kind": "event", "end": None})
        assert path.read_text() == "old\n"
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"kind": "result", "label": "wäve", "score": 0.5},
        {"kind": "event", "end": None},
    ]
    assert os.listdir(tmp_path) == ["events.jsonl"]


def test_an_error_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("old\n")
    with (
        pytest.raises(ZeroDivisionError),
        JsonLinesSink(tmp_path / "events.jsonl") as lines,
        VideoSink(tmp_path / "out.mp4", (64, 48), 30) as video,
    ):
        lines.write({"a": 1})
        video.write(counted(1)[0])
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["events.jsonl"]
    assert (tmp_path / "events.jsonl").read_text() == "old\n"


def test_json_lines_go_into_a_pipe_as_they_come(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    lines: list[str] = []
    first = threading.Event()

    def read() -> None:
        with open(pipe) as file:
            lines.append(file.readline())
            first.set()
            lines.extend(file)

    reader = threading.Thread(target=read)
    reader.start()
    with JsonLinesSink(pipe) as sink:
        sink.write({"a": 1})
        assert first.wait(10)
        sink.write({"a": 2})
    reader.join(10)
    assert [json.loads(line)["a"] for line in lines] == [1, 2]
    assert pipe.is_fifo()


def test_json_that_nobody_could_parse_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"), JsonLinesSink(tmp_path / "a.jsonl") as sink:
        sink.write({"score": math.nan})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fps", [1, 7.3, 25, 29.97, 30, 59.94, 60, 90.123, 119.8812, 240, 1000])
def test_a_video_plays_with_every_frame_at_its_rate(tmp_path: Path, fps: float) -> None:
    path = tmp_path / "out.mp4"
    with VideoSink(path, (64, 48), fps) as sink:
        for frame in counted(20):
            sink.write(frame)
        assert not path.exists()
    with open_source(path) as source:
        assert source.frame_rate == pytest.approx(fps, rel=1e-3)
        assert [number_of(frame) for frame in read_all(source)[0]] == list(range(20))
    assert os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("size", [(65, 47), (2, 2), (214, 160), (99, 301)])
def test_a_video_of_any_size_plays(tmp_path: Path, size: tuple[int, int]) -> None:
    with VideoSink(tmp_path / "out.mp4", size, 30) as sink:
        for frame in plain("green", 5, size):
            sink.write(frame)
    with open_source(tmp_path / "out.mp4") as source:
        frames = read_all(source)[0]
    assert len(frames) == 5 and frames[0][:, :, 1].mean() > 200


def test_frames_of_another_size_are_fitted_in(tmp_path: Path) -> None:
    with VideoSink(tmp_path / "out.mp4", (64, 48), 30) as sink:
        for frame in plain("green", 3) + plain("green", 3, (200, 40)) + plain("green", 3, (20, 90)):
            sink.write(frame)
    with open_source(tmp_path / "out.mp4") as source:
        frames = read_all(source)[0]
    assert len(frames) == 9
    wide, tall = frames[5][:, :, 1], frames[8][:, :, 1]
    assert wide[24].min() > 150 and wide[2].max() < 60
    assert tall[:, 32].min() > 150 and tall[:, 5].max() < 60


def test_with_times_a_video_plays_at_the_speed_of_its_source(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.11, 0.2, 0.5, 0.6, 100.0, 100.1]
    with VideoSink(tmp_path / "out.mp4", (64, 48), 10) as sink:
        for frame, time in zip(counted(8), times, strict=True):
            sink.write(frame, 5 + time)
    with open_source(tmp_path / "out.mp4") as source:
        numbers = [number_of(frame) for frame in read_all(source)[0]]
    # 0.11 s comes too soon after 0.1 s, 0.5 s fills the gap before it, the pause of 99 s is cut out.
    assert numbers == [0, 1, 3, 4, 4, 4, 5, 6, 7]


def test_a_video_that_is_incomplete_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = VideoSink(tmp_path / "out.mp4", (64, 48), 30)
    for frame in counted(3):
        sink.write(frame)
    sink.frame_count += 1
    with pytest.raises(UserError, match="could not be written completely"):
        sink.close()
    assert os.listdir(tmp_path) == []


def test_targets_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for make in (JsonLinesSink, lambda path: VideoSink(path, (64, 48), 30)):
        with pytest.raises(UserError, match="there is no folder"):
            make(tmp_path / "absent" / "out.mp4")
        (tmp_path / "folder.mp4").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is a folder"):
            make(tmp_path / "folder.mp4")
    with pytest.raises(UserError, match=r"must end in \.mp4"):
        VideoSink(tmp_path / "out.avi", (64, 48), 30)
    with pytest.raises(UserError, match="0x0 pixels"):
        VideoSink(tmp_path / "out.mp4", (0, 0), 30)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_snapshots_overwrite_nothing(tmp_path: Path) -> None:
    (tmp_path / "snapshot-0002.png").write_text("mine")
    frames = counted(3)
    paths = [save_snapshot(frame, tmp_path) for frame in frames]
    assert [path.name for path in paths] == ["snapshot-0001.png", "snapshot-0003.png", "snapshot-0004.png"]
    assert (tmp_path / "snapshot-0002.png").read_text() == "mine"
    for path, frame in zip(paths, frames, strict=True):
        assert (cv2.imread(str(path)) == frame).all()
    with pytest.raises(UserError, match="cannot be written"):
        save_snapshot(frames[0], tmp_path / "absent")


def test_without_a_display_there_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with trial_window() as reason:
        assert "neither DISPLAY nor WAYLAND_DISPLAY" in (reason or "")


def test_a_display_that_does_not_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":9753")
    with trial_window() as reason:
        assert "does not answer" in (reason or "")


SHOWN = """
import sys
import numpy as np
from stsm_rt.video.sinks import Window, trial_window

with trial_window() as reason:
    assert reason is None, reason
    opened = Window("test", (320, 240))
with opened as window:
    while window.show(np.full((240, 320, 3), (10, 20, 200), np.uint8), 0.05) is None:
        pass
"""


def test_a_window_shows_the_picture(tmp_path: Path) -> None:
    with virtual_display(tmp_path) as display:
        # OpenCV connects to one display per process, so the window gets a process of its own.
        variables = {**os.environ, "DISPLAY": display.name}
        with subprocess.Popen([sys.executable, "-c", SHOWN], env=variables) as process:
            shown, begin = 0, monotonic()
            while shown <= 300 * 200 and process.poll() is None and monotonic() - begin < 60:
                sleep(0.1)
                shown = (display.screenshot() == (10, 20, 200)).all(axis=2).sum()
            process.kill()
        assert shown > 300 * 200
