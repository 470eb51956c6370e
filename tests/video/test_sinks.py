"""Sinks: whole files or none of a recording, all that a live source gave, and failures that stay where they are."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import sleep
from typing import Any

import cv2
import pytest
from clips import counted

from stsm_rt.errors import UserError
from stsm_rt.video.recording import VideoSink
from stsm_rt.video.result_files import Rotation
from stsm_rt.video.sinks import Guarded, JsonLinesSink

STAMP = r"-\d{8}-\d{6}(-\d+)?"


def numbers(path: Path) -> list[int]:
    """What is in a file of ``{"n": 1}`` lines, each of which must be whole."""
    text = path.read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line)["n"] for line in text.splitlines()]


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


def test_lines_of_a_live_source_are_there_at_once_under_their_own_name(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with pytest.raises(ZeroDivisionError), JsonLinesSink(path, live=True) as sink:
        for number in range(3):
            sink.write({"n": number})
            assert numbers(path) == list(range(number + 1))
        1 / 0  # noqa: B018
    assert numbers(path) == [0, 1, 2] and os.listdir(tmp_path) == ["events.jsonl"]


def test_a_live_source_overwrites_no_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    said: list[str] = []
    for number in range(3):
        with JsonLinesSink(path, live=True, say=said.append) as sink:
            sink.write({"n": number})
    asides = sorted(tmp_path.glob("events-*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert [numbers(aside) for aside in asides] == [[0], [1]] and numbers(path) == [2]
    assert all(re.fullmatch(f"events{STAMP}.jsonl", aside.name) for aside in asides)
    assert len(said) == 2 and asides[0].name in said[0]
    path.write_text("")
    JsonLinesSink(path, live=True).close()
    assert len(os.listdir(tmp_path)) == 3, "an empty file is not worth a name of its own"


KILLED = """
import sys
from stsm_rt.video.sinks import JsonLinesSink

sink = JsonLinesSink(sys.argv[1], live=sys.argv[2] == "live")
number = 0
while True:
    sink.write({"n": number, "text": "x" * 300})
    number += 1
    if number == 1000:
        print(flush=True)
"""


@pytest.mark.parametrize("live", ["live", "recorded"])
def test_after_a_kill_every_line_is_whole(tmp_path: Path, live: str) -> None:
    path = tmp_path / "events.jsonl"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path), live], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    rest = path if live == "live" else tmp_path / f"events.partial-{process.pid}.jsonl"
    assert os.listdir(tmp_path) == [rest.name]
    found = numbers(rest)
    assert len(found) >= 1000 and found == list(range(len(found)))
    said: list[str] = []
    with JsonLinesSink(path, live=live == "live", say=said.append) as sink:
        sink.write({"n": 0})
    assert len(said) == 1 and len(os.listdir(tmp_path)) == 2 and numbers(path) == [0]
    if live == "recorded":
        assert rest.name in said[0] and numbers(rest) == found


def test_rotation_by_size_splits_no_line_and_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonLinesSink(path, live=True, rotate=Rotation(size=200)) as sink:
        for number in range(100):
            sink.write({"n": number})
        sink.write({"n": 100, "text": "x" * 500})
        sink.write({"n": 101})
    files = [*tmp_path.glob("events-*.jsonl"), path]
    sizes = [file.stat().st_size for file in files]
    assert len(files) > 5 and sorted(sizes)[-2] <= 200 and max(sizes) > 500
    assert sorted(number for file in files for number in numbers(file)) == list(range(102))
    assert all(numbers(file) == sorted(numbers(file)) for file in files)


def test_rotation_by_time(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "events.jsonl", live=True, rotate=Rotation(seconds=0.2)) as sink:
        sink.write({"n": 0})
        sleep(0.25)
        sink.write({"n": 1})
        sink.write({"n": 2})
    (aside,) = tmp_path.glob("events-*.jsonl")
    assert numbers(aside) == [0] and numbers(tmp_path / "events.jsonl")[0] == 1


@pytest.mark.parametrize(
    ("text", "rotation"),
    [
        ("100MB", Rotation(size=100_000_000)),
        ("1.5 gb", Rotation(size=1_500_000_000)),
        ("64kb", Rotation(size=64_000)),
        ("1h", Rotation(seconds=3600)),
        ("30min", Rotation(seconds=1800)),
        ("90s", Rotation(seconds=90)),
        ("1d", Rotation(seconds=86400)),
    ],
)
def test_a_rotation_is_read(text: str, rotation: Rotation) -> None:
    assert Rotation.parse(text) == rotation


@pytest.mark.parametrize(
    "text",
    [
        "",
        "100",
        "0h",
        "0.0MB",
        "-1h",
        "1 fortnight",
        "MB",
        "1e3MB",
        "1h30",
        "0.0001kb",
        "0.5s",
        "9" * 400 + "MB",
        "9" * 400 + "h",
    ],
)
def test_what_is_no_rotation_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="a size such as 100MB or a time such as 1h"):
        Rotation.parse(text)


def test_a_recording_is_not_rotated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="camera or a live stream"):
        JsonLinesSink(tmp_path / "events.jsonl", rotate=Rotation(size=1000))


# A disk that is full, for one process: no file may exceed 20 kB.
FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
from clips import counted
from stsm_rt.video.recording import VideoSink
from stsm_rt.video.sinks import Guarded, JsonLinesSink

live = sys.argv[2] == "live"
frames = counted(30, (320, 240))
with (
    Guarded(JsonLinesSink(sys.argv[1] + "/events.jsonl", live=live), print) as lines,
    Guarded(VideoSink(sys.argv[1] + "/out.mp4", (320, 240), 10, live=live), print) as video,
):
    for number in range(1000):
        lines.write({"n": number, "text": "x" * 100})
        video.write(frames[number % 30])
print("went on", lines.failed, video.failed)
"""


@pytest.mark.parametrize("live", ["live", "recorded"])
def test_a_full_disk_ends_the_sink_with_one_line_and_nothing_else(tmp_path: Path, live: str) -> None:
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), live],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert lines[-1] == "went on True True" and len(lines) == 3
    assert sum("events.jsonl is given up, the rest goes on" in line for line in lines) == 1
    assert sum("out.mp4 is given up, the rest goes on" in line for line in lines) == 1
    if live == "recorded":
        assert os.listdir(tmp_path) == []
        return
    assert sorted(os.listdir(tmp_path)) == ["events.jsonl", "out.mp4"]
    found = numbers(tmp_path / "events.jsonl")
    assert len(found) > 100 and found == list(range(len(found)))
    video, count = cv2.VideoCapture(str(tmp_path / "out.mp4"), cv2.CAP_FFMPEG), 0
    while video.read()[0]:
        count += 1
    assert count >= 9 and count % 9 == 0, "all pieces but the one for which there was no room"


def test_a_broken_pipe_ends_the_sink_and_nothing_else(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: subprocess.run(["head", "-n", "1", str(pipe)], capture_output=True))
    reader.start()
    said: list[str] = []
    with Guarded(JsonLinesSink(pipe), said.append) as sink:
        sink.write({"n": 0})
        reader.join(10)
        for number in range(1, 100):
            sink.write({"n": number})
            sleep(0.001)
    assert said == [f"{pipe} is given up, the rest goes on: whoever read it has gone"]
    assert sink.failed


def test_the_standard_output_of_the_process_is_a_pipe_too(tmp_path: Path) -> None:
    script = "from stsm_rt.video.sinks import JsonLinesSink\nwith JsonLinesSink('/dev/stdout') as s: s.write({'n': 1})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == '{"n": 1}\n', run.stderr


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    said: list[str] = []
    with Guarded(JsonLinesSink(tmp_path / "a.jsonl", live=True), said.append) as sink:

        def write(first: int) -> None:
            for number in range(200):
                sink.write({"n": first + number})

        threads: list[Any] = [threading.Thread(target=write, args=(1000 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(numbers(tmp_path / "a.jsonl")) == sorted(1000 * i + n for i in range(4) for n in range(200))
