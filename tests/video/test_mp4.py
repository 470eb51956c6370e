"""The growing MP4: wherever it is cut off, all whole pieces play."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
from clips import counted, number_of
from hypothesis import given, settings
from hypothesis import strategies as st

from stsm_rt.video.mp4 import DamagedPieceError, GrowingMp4
from stsm_rt.video.result_files import GrowingFile

SIZES = (3, 1, 5, 4)  # frames of each piece


def piece(folder: Path, first: int, count: int, fps: float = 30.0, size: tuple[int, int] = (64, 48)) -> bytes:
    path = folder / "piece.mp4"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    for frame in counted(first + count, size)[first:]:
        writer.write(frame)
    writer.release()
    return path.read_bytes()


def played(path: Path) -> list[int]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    numbers = []
    while True:
        ok, frame = capture.read()
        if not ok:
            return numbers
        numbers.append(number_of(frame))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int], bytes]:
    """An MP4 of several pieces: before it is complete, where its pieces end, and complete."""
    folder = tmp_path_factory.mktemp("grown")
    file = GrowingFile(folder / "out.mp4")
    movie, ends = GrowingMp4(file), []
    for number, count in enumerate(SIZES):
        movie.append(piece(folder, sum(SIZES[:number]), count), count)
        ends.append(file.length)
    before = (folder / "out.mp4").read_bytes()
    assert len(before) == file.length
    assert movie.complete_length >= ends[-1]
    movie.complete()
    movie.complete()
    file.close()
    complete = (folder / "out.mp4").read_bytes()
    assert abs(len(complete) - movie.complete_length) < 1200
    return before, ends, complete


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_wherever_a_kill_cuts_a_piece_off_all_pieces_before_play(
    grown: tuple[bytes, list[int], bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    before, ends, _ = grown
    whole = data.draw(st.integers(1, len(ends) - 1))
    begin = ends[whole - 1]
    assert before[begin + 4 : begin + 8] == b"moof"
    being_written = before[begin : begin + 4] + b"free" + before[begin + 8 : ends[whole]]
    path = tmp_path_factory.mktemp("cut") / "cut.mp4"
    path.write_bytes(before[:begin] + being_written[: data.draw(st.integers(0, len(being_written)))])
    assert played(path) == list(range(sum(SIZES[:whole])))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_wherever_a_kill_cuts_the_index_off_everything_plays(
    grown: tuple[bytes, list[int], bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    before, ends, complete = grown
    index = complete[ends[-1] :]
    assert index[4:8] == b"moov"
    path = tmp_path_factory.mktemp("cut") / "cut.mp4"
    path.write_bytes(before + (index[:4] + b"free" + index[8:])[: data.draw(st.integers(0, len(index)))])
    assert played(path) == list(range(sum(SIZES)))
    path.write_bytes(before + index)
    assert played(path) == list(range(sum(SIZES)))


def test_a_piece_is_of_no_meaning_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = GrowingFile(tmp_path / "out.mp4")
    movie = GrowingMp4(file)
    movie.append(piece(tmp_path, 0, 3), 3)
    length = file.length
    overwritten: list[bytes] = []
    monkeypatch.setattr(file, "overwrite", lambda position, data: overwritten.append(data))  # killed just before
    movie.append(piece(tmp_path, 3, 3), 3)
    assert (tmp_path / "out.mp4").read_bytes()[length + 4 : length + 8] == b"free"
    assert played(tmp_path / "out.mp4") == [0, 1, 2]
    length = file.length
    movie.complete()
    assert (tmp_path / "out.mp4").read_bytes()[length + 4 : length + 8] == b"free"
    assert [data[:4] for data in overwritten[:2]] == [b"moof", b"moov"] and overwritten[2][4:8] == b"mdat"


def test_a_complete_file_is_an_ordinary_mp4(grown: tuple[bytes, list[int], bytes], tmp_path: Path) -> None:
    _, _, complete = grown
    path = tmp_path / "out.mp4"
    path.write_bytes(complete)
    assert played(path) == list(range(sum(SIZES)))
    boxes, position = [], 0
    while position < len(complete):
        length, kind = int.from_bytes(complete[position : position + 4], "big"), complete[position + 4 : position + 8]
        if length == 1:
            length = int.from_bytes(complete[position + 8 : position + 16], "big")
        boxes.append(kind)
        position += length
    assert boxes == [b"ftyp", b"mdat", b"moov"] and position == len(complete)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == sum(SIZES)
    for number in (11, 2, 8, 4):
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        assert number_of(capture.read()[1]) == number


def test_other_readers_agree(grown: tuple[bytes, list[int], bytes], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    before, _, complete = grown
    for name, data in (("growing.mp4", before), ("complete.mp4", complete)):
        (tmp_path / name).write_bytes(data)
        with av.open(str(tmp_path / name)) as container:
            times = [frame.time for frame in container.decode(video=0)]
        assert times == pytest.approx([number / 30 for number in range(sum(SIZES))], abs=1e-4)
    with av.open(str(tmp_path / "complete.mp4")) as container:
        assert container.streams.video[0].frames == sum(SIZES)
        assert container.duration == pytest.approx(sum(SIZES) / 30 * 1e6, abs=2000)


def test_a_piece_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "out.mp4")
    movie = GrowingMp4(file)
    good = piece(tmp_path, 0, 5)
    movie.append(good, 5)
    length = file.length
    for bad in (b"", good[:100], good[:-40], good[: len(good) // 2], b"\0" * 1000):
        with pytest.raises(DamagedPieceError):
            movie.append(bad, 5)
    with pytest.raises(DamagedPieceError, match="5 of 6 frames"):
        movie.append(good, 6)
    for other in (piece(tmp_path, 0, 5, fps=25), piece(tmp_path, 0, 5, size=(80, 48))):
        with pytest.raises(DamagedPieceError, match="another kind"):
            movie.append(other, 5)
    assert file.length == length == (tmp_path / "out.mp4").stat().st_size
    movie.complete()
    file.close()
    assert played(tmp_path / "out.mp4") == list(range(5))
