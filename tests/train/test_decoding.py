from __future__ import annotations

import gc
import weakref
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_videos import FAST_VP9, number_of, numbered_frame, write_frames, write_video

from stsm_rt.errors import UserError
from stsm_rt.train import decoding
from stsm_rt.train.decoding import FrameFolder, UnreadableVideo, VideoFile

FRAMES = 40
B_FRAMES = {"bf": "3", "g": "12"}
UNEVEN = [2 * number + number * number % 2 for number in range(FRAMES)]
VIDEOS = {
    "b_frames.mp4": {"codec": "libx264", "options": B_FRAMES},
    "open_groups.mkv": {
        "codec": "libx264",
        "options": {"x264-params": "keyint=12:bframes=3:open-gop=1:b-pyramid=normal"},
    },
    "groups_of_two.mp4": {
        "codec": "libx264",
        "options": {"x264-params": "keyint=2:min-keyint=1:bframes=2:scenecut=0"},
    },
    "uneven_times.mp4": {"codec": "libx264", "options": B_FRAMES, "times": UNEVEN},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:bframes=3:open-gop=1:log-level=none"}},
    "hidden_frames.webm": {"codec": "libvpx-vp9", "options": {**FAST_VP9, "g": "12", "auto-alt-ref": "1"}},
    "vp8.webm": {"codec": "libvpx", "options": {**FAST_VP9, "g": "12"}},
    "stamps_guessed.avi": {"codec": "libx264", "options": B_FRAMES},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "transport_stream.ts": {"codec": "libx264", "options": B_FRAMES},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, how in VIDEOS.items():
        write_video(folder / name, FRAMES, **how)
    return folder


@cache
def all_frames(path: Path) -> np.ndarray:
    """Every frame in the order of showing, decoded from the start."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", VIDEOS)
@settings(max_examples=12, deadline=None)
@given(wanted=st.lists(st.lists(st.integers(0, FRAMES - 1), min_size=1, max_size=8), min_size=1, max_size=3))
def test_any_frames_in_any_order_are_those_of_a_full_decode(videos, name, wanted):
    with VideoFile(videos / name) as video:
        assert len(video.times) == FRAMES
        for indices in wanted:
            frames = video.read(indices)
            assert [number_of(frame) for frame in frames] == indices
            assert np.array_equal(frames, all_frames(videos / name)[indices])


def test_times_are_those_of_the_container(videos):
    with VideoFile(videos / "uneven_times.mp4") as video:
        assert np.allclose(video.times, (np.array(UNEVEN) - UNEVEN[0]) / 30)


@pytest.mark.parametrize("name", ["b_frames.mp4", "open_groups.mkv", "hidden_frames.webm", "uneven_times.mp4"])
def test_a_late_frame_costs_at_most_a_group_of_pictures(videos, name, monkeypatch):
    decoded = []
    monkeypatch.setattr(decoding, "_guarded", lambda items, path: (decoded.append(item) or item for item in items))
    with VideoFile(videos / name) as video:
        assert not any(isinstance(item, av.VideoFrame) for item in decoded)
        video.read([FRAMES - 2])
    # One group of 12; after an open group's key frame the frames before it come, too.
    assert sum(isinstance(item, av.VideoFrame) for item in decoded) <= 2 * 12


def test_a_jump_that_lands_too_late_is_made_up_for(videos, monkeypatch):
    jump = VideoFile._decode_from
    monkeypatch.setattr(VideoFile, "_decode_from", lambda self, stamp: jump(self, self._keys[-1]))
    with VideoFile(videos / "b_frames.mp4") as video:
        assert [number_of(frame) for frame in video.read([7, 20, FRAMES - 1])] == [7, 20, FRAMES - 1]


def test_frames_that_an_edit_list_hides_are_not_counted(videos, tmp_path):
    path = tmp_path / "cut.mp4"
    with (
        av.open(str(videos / "b_frames.mp4")) as source,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = int(5 / 30 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    with VideoFile(path) as video:
        assert len(video.times) == FRAMES - 5
        assert [number_of(frame) for frame in video.read([0, 1, 20, FRAMES - 6])] == [5, 6, 25, FRAMES - 1]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_phones_video_is_upright_as_opencv_shows_it(tmp_path, rotation):
    path = write_video(tmp_path / "phone.mp4", 2, rotation=rotation)
    with VideoFile(path) as video:
        ours = video.read([0])[0]
    theirs = cv2.VideoCapture(str(path)).read()[1]
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).mean() < 2


@pytest.mark.parametrize("name", ["b_frames.mp4", "mpeg4.avi"])
def test_nothing_of_a_file_is_left_to_the_garbage_collector(videos, name):
    # A process that is forked while a decoder's threads wait to be freed hangs when it frees them.
    with VideoFile(videos / name) as video:
        video.read([3, 17])
    gone = weakref.ref(video)
    gc.disable()
    try:
        del video
        assert gone() is None
    finally:
        gc.enable()


def damaged(folder: Path, kind: str) -> Path:
    path = folder / "damaged.mp4"
    if kind == "missing":
        return path
    if kind == "sound alone":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path
    whole = write_video(path, FRAMES, options=B_FRAMES).read_bytes()
    path.write_bytes({"empty": b"", "text": b"not a video", "cut off": whole[: len(whole) // 2]}[kind])
    return path


def test_a_title_in_another_encoding_says_nothing_about_the_pictures(tmp_path):
    path = tmp_path / "title.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "cafeX!"
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="bgr24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"cafeX!", b"caf\xe9!!"))
    with VideoFile(path) as video:
        assert video.read([0]).shape == (1, 48, 64, 3)
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"QQQQ"))
    with pytest.raises(UnreadableVideo, match="its codec is unknown"), VideoFile(path):
        pass


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut off", "sound alone"])
def test_what_is_no_video_is_one_sentence_with_the_reason(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(UnreadableVideo, match=r"damaged\.mp4 cannot be decoded \(.+\)") as raised, VideoFile(path):
        pass
    assert isinstance(raised.value, UserError)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("seekable", [True, False])
def test_a_frame_that_the_decoder_does_not_give_is_refused_not_replaced(videos, seekable):
    with VideoFile(videos / ("b_frames.mp4" if seekable else "mpeg4.avi")) as video:
        assert video._seekable == seekable
        video._pts.append(video._pts[-1] + 7)
        with pytest.raises(UnreadableVideo, match=f"frame {FRAMES} of {FRAMES + 1} does not come"):
            video.read([0, FRAMES])


def test_the_rest_of_a_file_that_was_cut_off_keeps_its_numbers(videos, tmp_path):
    path = tmp_path / "cut_off.mkv"
    path.write_bytes((videos / "open_groups.mkv").read_bytes()[:2500])
    with VideoFile(path) as video:
        assert 4 < len(video.times) < FRAMES
        for index in range(len(video.times) - 4):
            assert number_of(video.read([index])[0]) == index


@pytest.mark.parametrize(("first", "told"), [(1, None), (0, None), (1, 6)])
def test_extracted_frames_are_numbered_from_their_first(tmp_path, first, told):
    folder = write_frames(tmp_path / "frames", 6, "img_{:05d}.png", first=first)
    write_frames(folder, 3, "flow_{:05d}.png")
    with FrameFolder(folder, "img_{:05d}.png", frames=told, frame_rate=12.0) as video:
        assert np.allclose(video.times, np.arange(6) / 12)
        frames = video.read([5, 0, 5, 2])
    assert np.array_equal(frames, np.stack([numbered_frame(n) for n in (5, 0, 5, 2)]))


def test_extracted_frames_that_are_missing_or_damaged_are_unreadable(tmp_path):
    folder = write_frames(tmp_path / "frames", 4, "{:05d}.jpg")
    (folder / "00002.jpg").write_bytes(b"no picture")
    cv2.imwrite(str(folder / "00003.jpg"), numbered_frame(2, (24, 32)))
    with FrameFolder(folder, "{:05d}.jpg", frames=5, frame_rate=None) as video:
        assert np.isnan(video.times[1:]).all()
        for indices, reason in (([1], "cannot be decoded"), ([0, 4], "cannot be read"), ([0, 2], "differ in size")):
            with pytest.raises(UnreadableVideo, match=reason):
                video.read(indices)
    with pytest.raises(UnreadableVideo, match="holds no frame"):
        FrameFolder(folder, "img_{:05d}.jpg", frames=None, frame_rate=None)
    with pytest.raises(UnreadableVideo, match="cannot be read"):
        FrameFolder(tmp_path / "nothing", "img_{:05d}.jpg", frames=None, frame_rate=None)
