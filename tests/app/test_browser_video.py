"""Annotated videos: times, sizes and codec are what a browser needs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import counted, number_of, plain, read_all

av = pytest.importorskip("av", reason="the page needs PyAV: pip install 'stsm-rt[ui]'")

from stsm_rt.app.browser_video import BrowserVideoSink, browser_size  # noqa: E402
from stsm_rt.errors import UserError  # noqa: E402
from stsm_rt.video.sources import open_source  # noqa: E402

IRREGULAR = [0.0, 0.1, 0.11, 0.2, 0.5, 0.6, 3.25, 3.26, 3.2612345]


def test_every_frame_keeps_its_own_time(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with BrowserVideoSink(path, (64, 48), 10) as sink:
        for frame, time in zip(counted(len(IRREGULAR)), IRREGULAR, strict=True):
            sink.write(frame, time)
    with open_source(path) as source:
        frames, times = read_all(source)
    assert [number_of(frame) for frame in frames] == list(range(len(IRREGULAR)))
    assert times == pytest.approx(IRREGULAR, abs=1e-4)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        # The last frame lasts as long as one does at the source's rate.
        assert float(stream.duration * stream.time_base) == pytest.approx(IRREGULAR[-1] + 0.1, abs=1e-3)


def level(stream: Any) -> int:
    """The level of H.264, 31 for 3.1, as the file declares it (ISO/IEC 14496-15, AVCDecoderConfigurationRecord)."""
    return int(stream.codec_context.extradata[3])


def test_the_clock_is_the_sources_although_its_first_frame_comes_late(tmp_path: Path) -> None:
    with BrowserVideoSink(tmp_path / "out.mp4", (64, 48), 10) as sink:
        for frame, time in zip(counted(3), (0.7, 0.8, 0.9), strict=True):
            sink.write(frame, time)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx([0, 0.8, 0.9])


def test_browsers_can_play_it_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with BrowserVideoSink(path, (320, 240), 29.97) as sink:
        for index, frame in enumerate(plain("green", 150, (320, 240))):
            sink.write(frame, index / 29.97)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert level(stream) <= 31  # of H.264, here what 320x240 needs and no more
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert all(packet.pts == packet.dts for packet in packets)
        keys = [float(packet.pts * packet.time_base) for packet in packets if packet.is_keyframe]
    assert max(b - a for a, b in pairwise(keys)) < 2.1
    with open_source(path) as source:
        picture = read_all(source)[0][-1]
    assert np.abs(picture.astype(int) - (0, 255, 0)).max() < 8


@pytest.mark.parametrize("rate", [1, 7.3, 24, 60, 240, 1000])
def test_any_frame_rate_can_be_played(tmp_path: Path, rate: float) -> None:
    with BrowserVideoSink(tmp_path / "out.mp4", (64, 48), rate) as sink:
        for index, frame in enumerate(counted(20)):
            sink.write(frame, index / rate)
    with av.open(str(tmp_path / "out.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert level(container.streams.video[0]) <= 52
    assert times == pytest.approx([index / rate for index in range(20)], abs=1e-4)


@pytest.mark.parametrize(
    ("size", "becomes"),
    [
        ((640, 360), (640, 360)),
        ((3840, 2160), (1280, 720)),
        ((2160, 3840), (720, 1280)),
        ((1280, 721), (1280, 720)),
        ((65, 47), (64, 46)),
        ((1, 1), (2, 2)),
        ((5000, 30), (1280, 6)),
    ],
)
def test_sizes_are_even_and_not_larger_than_a_page(tmp_path: Path, size: tuple[int, int], becomes: Any) -> None:
    assert browser_size(size) == becomes
    with BrowserVideoSink(tmp_path / "out.mp4", size, 30) as sink:
        for index, frame in enumerate(plain("red", 3, size)):
            sink.write(frame, index / 30)
    with open_source(tmp_path / "out.mp4") as source:
        frames = read_all(source)[0]
    assert len(frames) == 3 and (frames[0].shape[1], frames[0].shape[0]) == becomes
    assert frames[0][:, :, 2].mean() > 200


def test_frames_of_another_size_are_fitted_in(tmp_path: Path) -> None:
    with BrowserVideoSink(tmp_path / "out.mp4", (64, 48), 30) as sink:
        for index, frame in enumerate(plain("green", 3) + plain("green", 3, (20, 90))):
            sink.write(frame, index / 30)
    with open_source(tmp_path / "out.mp4") as source:
        tall = read_all(source)[0][-1][:, :, 1]
    assert tall[:, 32].min() > 150 and tall[:, 5].max() < 60


def test_a_full_disk_is_one_sentence() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 240, 320, 3), np.uint8)
    with (
        pytest.raises(UserError, match=r"cannot be written \(.+\); look whether the disk is full"),
        BrowserVideoSink(Path("/dev/full"), (320, 240), 30) as sink,
    ):
        for index, frame in enumerate(noise):
            sink.write(frame, index / 30)
