"""Sources: files lose nothing, live ones keep the newest frame, and what cannot be opened is said."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep

import cv2
import numpy as np
import pytest
from camera import camera
from clips import counted, http_server, number_of, plain, read_all, write_video

from stsm_rt.errors import UserError
from stsm_rt.sampler import Sampler
from stsm_rt.video.source import Reading, SourceState, StateChange
from stsm_rt.video.sources import LiveSource, open_source


@pytest.mark.parametrize("fps", [7.5, 12.5, 25, 29.97, 30, 60])
@pytest.mark.parametrize("size", [(64, 48), (66, 50), (75, 51), (48, 96)])
def test_a_file_gives_every_frame_in_order_with_its_time(tmp_path: Path, fps: float, size: tuple[int, int]) -> None:
    path = write_video(tmp_path / "clip.mp4", counted(40, size), fps)
    with open_source(path) as source:
        assert (source.live, source.frame_count, source.name) == (False, 40, str(path))
        assert source.frame_rate == pytest.approx(fps, rel=1e-3)
        # The encoder leaves out the last column or row of an odd size.
        assert source.size == (size[0] // 2 * 2, size[1] // 2 * 2)
        frames, times = read_all(source)
        assert source.dropped == 0
    assert [number_of(frame) for frame in frames] == list(range(40))
    assert times == pytest.approx([i / fps for i in range(40)], abs=2e-3)
    assert all(frame.dtype == np.uint8 and frame.shape[1::-1] == source.size for frame in frames)


def test_frames_belong_to_the_caller(tmp_path: Path) -> None:
    with open_source(write_video(tmp_path / "clip.mp4", counted(10))) as source:
        frames, _ = read_all(source)
    assert [number_of(frame) for frame in frames] == list(range(10))


def test_a_stream_without_times_gets_them_from_its_frame_rate(tmp_path: Path) -> None:
    path = tmp_path / "raw.mjpeg"
    path.write_bytes(b"".join(cv2.imencode(".jpg", frame)[1].tobytes() for frame in counted(12)))
    with open_source(path) as source:
        frames, times = read_all(source)
    assert len(frames) == 12
    assert times[0] == 0 and all(later > earlier for earlier, later in pairwise(times))


def test_names_that_look_like_protocols_or_patterns_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "clip%03d.mp4", "7.mp4", "with space.mp4", "wow ! cool.mp4"):
        write_video(tmp_path / "clip.mp4", counted(5)).rename(tmp_path / name)
        with open_source(name) as source:
            assert len(read_all(source)[0]) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_text_are_refused_where_opencv_would_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = os.fsdecode(b"\xff")
    (tmp_path / strange).mkdir()
    video = write_video(tmp_path / "clip.mp4", counted(3)).rename(tmp_path / strange / "clip.mp4")
    for spec in (video, str(video), f"rtsp://127.0.0.1:9/{strange}", f"/dev/{strange}", f"{strange} ! appsink"):
        for wait in (False, True):
            with pytest.raises(UserError, match=r"udcff.* is no UTF-8 text, which OpenCV needs; rename it"):
                open_source(spec, wait=wait)
    monkeypatch.chdir(tmp_path / strange)
    with pytest.raises(UserError, match="is no UTF-8 text"):
        open_source("clip.mp4")
    os.remove("clip.mp4")
    cv2.imwrite("1.png", counted(1)[0])
    with open_source(str(tmp_path / strange)) as source:
        assert len(read_all(source)[0]) == 1
    with pytest.raises(UserError, match="there is no video"):
        open_source("a\0b")


def test_a_folder_of_images_is_sorted_naturally(tmp_path: Path) -> None:
    for index, frame in enumerate(counted(12)):
        cv2.imwrite(str(tmp_path / f"frame{index}.{'PNG' if index % 2 else 'bmp'}"), frame)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    with open_source(tmp_path) as source:
        assert (source.live, source.frame_count, source.frame_rate, source.size) == (False, 12, 30, (64, 48))
        frames, times = read_all(source)
    assert [number_of(frame) for frame in frames] == list(range(12))
    assert times == pytest.approx([i / 30 for i in range(12)])


def test_a_live_source_keeps_the_newest_frame_and_counts_the_others() -> None:
    with http_server(frames=counted(60), fps=50) as url, open_source(f"{url}/camera", max_retries=0) as source:
        assert isinstance(source, LiveSource) and source.live
        assert (source.frame_count, source.size, source.name) == (None, (64, 48), f"{url}/camera")
        seen, times, arrived = [], [], []
        for frame, time in source:
            seen.append(number_of(frame))
            times.append(time)
            arrived.append(monotonic())
            sleep(0.1)
        dropped = source.dropped
    # FFmpeg may keep the first frames while it looks what the stream is.
    assert seen[0] <= 5 and seen[-1] == 59
    assert 5 <= len(seen) <= 20
    assert 55 <= len(seen) + dropped <= 60
    assert all(later > earlier for earlier, later in pairwise(seen))
    # The time is that of arrival: frame i comes i/50 s after the first, or a little later.
    for number, time in zip(seen, times, strict=True):
        assert (number - seen[0]) / 50 - 0.1 <= time <= (number - seen[0]) / 50 + 1.5


def test_a_fast_consumer_loses_nothing_of_a_live_source() -> None:
    with http_server(frames=counted(30), fps=25) as url, open_source(f"{url}/camera", max_retries=0) as source:
        frames, times = read_all(source)
        assert 25 <= source.dropped + len(frames) <= 30
    assert len(frames) >= 22
    assert times == sorted(times)


def test_a_recording_on_a_server_is_played_like_a_file(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", counted(40), 25)
    with http_server(files=tmp_path) as url, open_source(f"{url}/clip.mp4") as source:
        assert (source.live, source.frame_count) == (False, 40)
        frames, times = read_all(source)
    assert [number_of(frame) for frame in frames] == list(range(40))
    assert times == pytest.approx([i / 25 for i in range(40)], abs=1e-3)


def test_a_recording_on_a_server_is_refused_where_a_live_stream_is_waited_for(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", counted(40), 25)
    changes: list[StateChange] = []
    with (
        http_server(files=tmp_path) as url,
        open_source(
            f"{url.replace('//', '//user:hush@')}/clip.mp4", wait=True, max_retries=2, on_change=changes.append
        ) as source,
    ):
        with pytest.raises(UserError) as error:
            source.read()
        assert source.state is SourceState.FAILED
    shown = f"{url.replace('//', '//***@')}/clip.mp4"
    assert str(error.value) == f"{shown} is a recording where a live stream was expected; download it and give the file"
    assert [(change.state.value, change.attempt) for change in changes] == [("opening", 0), ("failed", 0)]


def test_a_frame_rate_that_is_made_up_is_not_declared(tmp_path: Path) -> None:
    """FFmpeg says 25 of every motion JPEG camera."""
    with http_server(frames=counted(20), fps=15) as url, open_source(f"{url}/camera", max_retries=0) as source:
        assert source.frame_rate is None


OPENING = """
import sys
from stsm_rt.video.sources import open_source
print("opening", flush=True)
try:
    open_source(sys.argv[1], open_timeout=60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGINT to send")
def test_an_interrupt_is_heard_while_a_server_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/camera"
        with subprocess.Popen(
            [sys.executable, "-c", OPENING, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "opening\n"
            with silent.accept()[0]:
                process.send_signal(signal.SIGINT)
                out, error = process.communicate(timeout=20)
    assert (process.returncode, out, error) == (0, "interrupted\n", "")


def test_credentials_are_used_but_never_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with http_server(frames=counted(5), password="hush") as url:
        address = url.replace("//", "//user:hush@")
        with open_source(f"{address}/camera", max_retries=0) as source:
            assert source.name == f"{url.replace('//', '//***@')}/camera"
            assert len(read_all(source)[0]) >= 1
        for wrong in (f"{address}/nothing", address.replace("http", "ftp"), "http://user:hush@127.0.0.1:1/x"):
            with pytest.raises(UserError) as error:
                open_source(wrong)
            assert "hush" not in str(error.value) and "***@" in str(error.value)
    assert "hush" not in "".join(capfd.readouterr())


def test_pictures_that_are_not_wanted_are_left_out_and_the_times_stay(tmp_path: Path) -> None:
    for index, frame in enumerate(counted(20)):
        cv2.imwrite(str(tmp_path / f"{index}.png"), frame)
    for path in (write_video(tmp_path / "clip.mp4", counted(20)), tmp_path):
        with open_source(path) as source:
            _, times = read_all(source)
        with open_source(path) as source:
            readings = list(iter(lambda source=source: source.read(lambda time: round(time * 30) % 3 == 1), None))
        assert [reading.time for reading in readings] == times
        seen = [None if reading.frame is None else number_of(reading.frame) for reading in readings]
        # A file's first frame has been decoded when it is opened.
        assert seen[1:] == [index if index % 3 == 1 else None for index in range(1, 20)]
        arrivals = [reading.arrived for reading in readings]
        assert arrivals == sorted(arrivals)


def test_a_live_picture_that_nobody_wants_is_not_made() -> None:
    source, capture = camera(counted(90), 100)
    sampler, seen = Sampler(10), []
    with source:
        while (reading := source.read(sampler.wants)) is not None:
            if sampler.take(reading.time):
                assert reading.frame is not None
                seen.append(number_of(reading.frame))
                # A frame is never earlier than the camera gives it.
                assert reading.time >= seen[-1] / 100 - 1e-3
    assert 4 <= len(seen) <= 11
    assert len(seen) <= len(capture.converted) < capture.given


def test_while_nobody_waits_pictures_are_made_for_whoever_comes() -> None:
    source, capture = camera(counted(1000), 100)
    with source:
        next(source)
        assert source.read(lambda _: False) is not None
        made = len(capture.converted)
        end = monotonic() + 20
        while len(capture.converted) <= made:
            assert monotonic() < end
            sleep(0.005)


def test_a_frame_that_was_left_out_for_another_is_not_given_to_who_wants_it() -> None:
    source, _ = camera(counted(10), 20)
    with source:
        source._newest = Reading(None, 0.0, 0.0)
        assert next(source)[0].shape == (48, 64, 3)


def test_a_live_frame_arrives_when_it_is_captured_not_when_its_picture_is_made() -> None:
    source, capture = camera(counted(6), 20, conversion=0.03)
    with source:
        readings = list(iter(source.read, None))
    for reading in readings[1:]:
        assert reading.frame is not None
        assert reading.arrived <= capture.converted[number_of(reading.frame)]
        assert reading.arrived - reading.time == pytest.approx(readings[0].arrived)


@pytest.mark.parametrize("live", [True, False])
def test_stop_ends_the_iteration(tmp_path: Path, live: bool) -> None:
    with http_server(frames=[*counted(2), *plain("black", 1)] * 3, fps=0.9) as url:
        path = write_video(tmp_path / "clip.mp4", counted(200))
        with open_source(f"{url}/camera" if live else path) as source:
            begin = monotonic()
            threading.Timer(0.3, source.stop).start()
            for _ in source:
                sleep(0.01)
            assert source.stopped
            assert monotonic() - begin < 1.0


def test_leaving_the_block_ends_the_reader() -> None:
    with http_server(frames=counted(100), fps=50) as url:
        with open_source(f"{url}/camera") as source:
            next(source)
        assert not any(thread.name == "stsm-rt reader" for thread in threading.enumerate())
        assert list(source) == []


def test_what_cannot_be_opened_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    whole = write_video(tmp_path / "whole.mp4", counted(30)).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("this is no image")
    for spec, sentence in (
        (tmp_path / "absent.mp4", "there is no video .*absent.mp4"),
        (str(tmp_path / "absent.mp4"), "there is no video"),
        ("-1", "there is no video -1"),
        (tmp_path / "text.mp4", "text.mp4 is not a video"),
        (tmp_path / "half.mp4", "half.mp4 is not a video"),
        (tmp_path / "empty.mp4", "empty.mp4 is not a video"),
        (tmp_path / "empty", "empty holds no images"),
        (tmp_path / "broken", r"a.png cannot be decoded"),
        (97, "camera 97 cannot be opened"),
        ("97", "camera 97 cannot be opened"),
        ("http://127.0.0.1:1/camera", "refuses the connection; check that the camera serves on port 1"),
        ("udp://127.0.0.1:1", "has the scheme udp"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_source(spec)
    assert capfd.readouterr() == ("", "")


def test_an_image_that_breaks_off_in_a_folder_is_named(tmp_path: Path) -> None:
    for index, frame in enumerate(counted(3)):
        cv2.imwrite(str(tmp_path / f"{index}.png"), frame)
    (tmp_path / "1.png").write_bytes(b"")
    with open_source(tmp_path) as source, pytest.raises(UserError, match=r"1\.png cannot be decoded"):
        read_all(source)


def test_an_image_that_says_it_is_huge_is_named(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0))
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"1\.png cannot be decoded; replace it"):
        open_source(tmp_path)
