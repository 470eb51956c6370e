"""The annotated video: every frame at its rate, playable whatever ends the run, and in whole files when it rotates."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from clips import counted, number_of, plain, read_all

from stsm_rt.errors import UserError
from stsm_rt.video.recording import VideoSink
from stsm_rt.video.result_files import Rotation
from stsm_rt.video.sources import open_source


def numbers(path: Path) -> list[int]:
    """The frames of ``counted`` that a video plays."""
    with open_source(path) as source:
        return [number_of(frame) for frame in read_all(source)[0]]


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


@pytest.mark.parametrize("count", [1, 11, 12, 13, 24, 100])
def test_a_complete_video_declares_its_frames(tmp_path: Path, count: int) -> None:
    with VideoSink(tmp_path / "out.mp4", (64, 48), 15) as sink:
        for frame in counted(count):
            sink.write(frame)
    with open_source(tmp_path / "out.mp4") as source:
        assert source.frame_count == count
    assert numbers(tmp_path / "out.mp4") == list(range(count))


def test_without_a_frame_there_is_no_video(tmp_path: Path) -> None:
    for live in (True, False):
        VideoSink(tmp_path / "out.mp4", (64, 48), 30, live=live).close()
    assert os.listdir(tmp_path) == []


def test_a_live_recording_plays_while_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoSink(path, (64, 48), 10, live=True) as sink:
        for number, frame in enumerate(counted(40), 1):
            sink.write(frame)
            if number % 10 == 0:
                assert numbers(path) == list(range(number // 9 * 9)), "all but the piece that is being made"
    assert numbers(path) == list(range(40)) and os.listdir(tmp_path) == ["out.mp4"]


KILLED = """
import sys
from time import sleep
from clips import counted
from stsm_rt.video.recording import VideoSink

sink = VideoSink(sys.argv[1], (64, 48), 30, live=sys.argv[2] == "live")
for number, frame in enumerate(counted(200)):
    sink.write(frame)
    print(number, flush=True)
    sleep(0.002)
sleep(60)
"""


@pytest.mark.parametrize("live", ["live", "recorded"])
def test_after_a_kill_the_video_plays_up_to_its_last_second(tmp_path: Path, live: str) -> None:
    path = tmp_path / "out.mp4"
    search = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), live],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    ) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 130:
            pass
        process.send_signal(signal.SIGKILL)
        written = 131 + len(process.stdout.readlines())
    rest = path if live == "live" else tmp_path / f"out.partial-{process.pid}.mp4"
    assert os.listdir(tmp_path) == [rest.name]
    found = numbers(rest)
    assert found == list(range(len(found))) and len(found) >= written - 30
    said: list[str] = []
    with VideoSink(path, (64, 48), 30, live=live == "live", say=said.append) as sink:
        sink.write(counted(1)[0])
    assert len(said) == 1 and numbers(path) == [0]
    (aside,) = set(tmp_path.iterdir()) - {path}
    assert numbers(aside) == found and aside.name in said[0]


def test_an_error_keeps_what_a_live_source_gave(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), VideoSink(tmp_path / "out.mp4", (64, 48), 30, live=True) as sink:
        for frame in counted(50):
            sink.write(frame)
        1 / 0  # noqa: B018
    assert numbers(tmp_path / "out.mp4") == list(range(50))


@pytest.mark.parametrize("rotation", [Rotation(size=6_000), Rotation(seconds=0.0001)])
def test_rotation_gives_whole_videos_and_loses_no_frame(tmp_path: Path, rotation: Rotation) -> None:
    path = tmp_path / "out.mp4"
    with VideoSink(path, (64, 48), 30, live=True, rotate=rotation) as sink:
        for frame in counted(200):
            sink.write(frame)
    files = [*tmp_path.glob("out-*.mp4"), path]
    assert len(files) > 2 and all(re.fullmatch(r"out(-\d{8}-\d{6}(-\d+)?)?\.mp4", file.name) for file in files)
    parts = [numbers(file) for file in files]
    assert all(part == list(range(part[0], part[0] + len(part))) for part in parts)
    assert sorted(number for part in parts for number in part) == list(range(200))
    if rotation.size is not None:
        assert max(file.stat().st_size for file in files) <= rotation.size


def test_nothing_else_is_left_in_the_folder_while_it_grows(tmp_path: Path) -> None:
    with VideoSink(tmp_path / "out.mp4", (64, 48), 30) as sink:
        sink.write(counted(1)[0])
        assert os.listdir(tmp_path) == [f"out.partial-{os.getpid()}.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    """OpenCV would end the process."""
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    with pytest.raises(UserError, match=r"is no UTF-8 text, which OpenCV needs; rename it"):
        VideoSink(folder / "out.mp4", (64, 48), 30)
    assert not any(folder.iterdir())
