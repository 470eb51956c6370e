"""Frames on standard input: YUV4MPEG2 streams as other programs write them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import av
import cv2
import numpy as np
import pytest
from clips import counted, number_of, read_all
from hypothesis import given, settings
from hypothesis import strategies as st

from stsm_rt.errors import UserError
from stsm_rt.video.source import SourceState
from stsm_rt.video.standard_input import StandardInput

CHROMA = {"420jpeg": "yuv420p", "422": "yuv422p", "444": "yuv444p", "mono": "gray"}


@contextmanager
def piped(data: bytes, *, close: bool = True) -> Iterator[int]:
    """A pipe into which a thread writes these bytes; yields its reading end."""
    reading, writing = os.pipe()

    def write() -> None:
        try:
            with open(writing, "wb", closefd=close) as pipe:
                pipe.write(data)
        except BrokenPipeError:
            pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join()
        if not close:
            os.close(writing)


def y4m(path: Path, frames: list[np.ndarray], rate: int = 25, pixels: str = "yuv420p") -> bytes:
    """What FFmpeg writes."""
    with av.open(str(path), "w", format="yuv4mpegpipe") as container:
        stream = container.add_stream("wrapped_avframe", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "bgr24").reformat(format=pixels)))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p", "gray"])
@pytest.mark.parametrize("size", [(64, 48), (66, 50)])
def test_what_ffmpeg_writes_is_read_frame_by_frame(tmp_path: Path, pixels: str, size: tuple[int, int]) -> None:
    data = y4m(tmp_path / "a.y4m", counted(30, size), 12, pixels)
    with piped(data) as descriptor, StandardInput(descriptor) as source:
        assert (source.live, source.size, source.frame_rate, source.frame_count) == (False, size, 12, None)
        frames, times = read_all(source)
        assert source.state is SourceState.ENDED
    assert [number_of(frame) for frame in frames] == list(range(30))
    assert times == pytest.approx([i / 12 for i in range(30)])


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 19),
    height=st.integers(1, 19),
    chroma=st.sampled_from(list(CHROMA)),
    full=st.booleans(),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
)
def test_any_size_and_colour_comes_back(
    width: int, height: int, chroma: str, full: bool, colour: tuple[int, int, int]
) -> None:
    """One colour by the formulas of BT.601, in planes whose odd last rows and columns count."""
    blue, green, red = colour
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    u, v = (blue - y) / 1.772, (red - y) / 1.402
    scaled = (y, u + 128, v + 128) if full else (16 + y * 219 / 255, 128 + u * 224 / 255, 128 + v * 224 / 255)
    rows, columns = {"420jpeg": (2, 2), "422": (1, 2), "444": (1, 1), "mono": (0, 0)}[chroma]
    area = -(-height // rows) * -(-width // columns) if rows else 0
    values = [round(min(255, max(0, value))) for value in scaled]
    planes = bytes([values[0]]) * (width * height) + bytes([values[1]]) * area + bytes([values[2]]) * area
    head = f"YUV4MPEG2 W{width} H{height} F30000:1001 Ip A1:1 C{chroma}" + " XCOLORRANGE=FULL" * full
    with piped(head.encode() + b"\nFRAME\n" + planes + b"FRAME Ip\n" + planes) as descriptor:
        source = StandardInput(descriptor)
        frames, times = read_all(source)
    assert len(frames) == 2 and times[1] == pytest.approx(1001 / 30000)
    expected = (y, y, y) if chroma == "mono" else colour
    assert frames[0].shape == (height, width, 3)
    assert np.abs(frames[0].astype(int) - np.round(expected).astype(int)).max() <= 4


def test_a_frame_that_breaks_off_is_not_given(tmp_path: Path) -> None:
    changes = []
    data = y4m(tmp_path / "a.y4m", counted(5))
    with piped(data[:-10]) as descriptor, StandardInput(descriptor, on_change=changes.append) as source:
        assert len(read_all(source)[0]) == 4
    assert [(change.state.value, change.reason) for change in changes] == [
        ("running", ""),
        ("ended", "it broke off in the middle of a frame"),
    ]


def test_pictures_that_nobody_wants_are_not_made(tmp_path: Path) -> None:
    with piped(y4m(tmp_path / "a.y4m", counted(9))) as descriptor, StandardInput(descriptor) as source:
        readings = list(iter(lambda: source.read(lambda time: round(25 * time) % 3 == 0), None))
    assert [None if reading.frame is None else number_of(reading.frame) for reading in readings][1:] == [
        *(None, None, 3, None, None, 6, None, None)
    ]


HEADER = b"YUV4MPEG2 W16 H16 F25:1 C420\n"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "must be a YUV4MPEG2 stream with a size and a frame rate, not b''"),
        (b"\x89PNG\r\n\x1a\n" * 10, "must be a YUV4MPEG2 stream"),
        (bytes(100_000), "must be a YUV4MPEG2 stream"),
        (HEADER.replace(b"W16", b"W"), "must be a YUV4MPEG2 stream"),
        (HEADER.replace(b"F25:1 ", b""), "must be a YUV4MPEG2 stream"),
        (HEADER.replace(b"25:1", b"25:0"), "must be a YUV4MPEG2 stream"),
        (HEADER.replace(b"25", b"9" * 400), "must be a YUV4MPEG2 stream"),
        (HEADER.replace(b":1", b":1" + b"0" * 300), "must be a YUV4MPEG2 stream"),
        (HEADER.replace(b"W16", b"W999999999"), "must be a YUV4MPEG2 stream"),
        (HEADER.replace(b"420", b"420p10"), "pixel format C420p10 on standard input cannot be read"),
        (HEADER, "ended before its first frame"),
        (HEADER + b"FRAME\n" + bytes(100), "ended before its first frame"),
        (HEADER + b"GARBAGE\n" + bytes(1000), "is damaged: a frame was expected, b'GARBAGE' came"),
    ],
)
def test_what_is_no_such_stream_is_said(data: bytes, sentence: str) -> None:
    with piped(data) as descriptor, pytest.raises(UserError, match=sentence):
        StandardInput(descriptor)


def test_a_stop_does_not_wait_for_the_program_before(tmp_path: Path) -> None:
    data = y4m(tmp_path / "a.y4m", counted(3))
    with piped(data, close=False) as descriptor, StandardInput(descriptor) as source:
        threading.Timer(0.3, source.stop).start()
        begin = monotonic()
        assert len(read_all(source)[0]) == 3
        assert monotonic() - begin < 2


def test_a_terminal_is_refused() -> None:
    pty = pytest.importorskip("pty")
    other, terminal = pty.openpty()
    try:
        with pytest.raises(UserError, match=r"standard input is a terminal.*pipe one in, for example ffmpeg"):
            StandardInput(terminal)
    finally:
        os.close(other)
        os.close(terminal)


def test_a_dash_is_standard_input(tmp_path: Path) -> None:
    program = "from stsm_rt import open_source\nwith open_source('-') as s: print(len(list(s)), s.size, s.name)"
    for data, out in (
        (y4m(tmp_path / "a.y4m", counted(20)), "20 (64, 48) standard input\n"),
        (b"nothing of the kind", "must be a YUV4MPEG2 stream"),
    ):
        done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=False)
        assert out in (done.stdout + done.stderr).decode()


def test_a_closed_standard_input_is_said() -> None:
    program = "from stsm_rt.errors import UserError\nfrom stsm_rt import open_source\n"
    program += "try: open_source('-')\nexcept UserError as error: print(error)"
    command = 'exec "$0" "$@" <&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.startswith(b"standard input is closed, where a YUV4MPEG2 stream was expected; for example")


def test_colours_are_those_of_opencv() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    frame = cv2.GaussianBlur(frame, (0, 0), 4)
    planes = cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)
    with piped(b"YUV4MPEG2 W64 H48 F25:1\nFRAME\n" + planes.tobytes()) as descriptor:
        frames, _ = read_all(StandardInput(descriptor))
    np.testing.assert_array_equal(frames[0], cv2.cvtColor(planes, cv2.COLOR_YUV2BGR_I420))
