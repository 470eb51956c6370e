"""Which clips of a data set or a folder are played."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from stsm_rt.errors import UserError
from stsm_rt.playback import Clip, UnreadableVideo, calibration_videos, frames_of, read_clips, videos_in


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes: `jump` has nine training clips and one test clip, `wave` two and one."""
    rows = [f"jump{i}.avi,jump,train,test" for i in range(9)]
    rows += ["jump9.avi,jump,test,train", "wave0.avi,wave,train,train", "wave1.avi,wave,train,train"]
    rows += ["wave2.avi,wave,test,test"]
    folder = tmp_path / "actions"
    folder.mkdir()
    (folder / "manifest.csv").write_text("\n".join(["file,class,split1,split2", *rows, ""]))
    return folder


def test_a_part_of_a_split_is_its_own_clips(data: Path) -> None:
    assert [clip.path.name for clip in read_clips(data, 1)] == ["jump9.avi", "wave2.avi"]
    assert len(read_clips(data, 1, part="train")) == 11
    assert [clip.label for clip in read_clips(data, 2, part="train")] == ["jump", "wave", "wave"]


def test_classes_are_held_to_the_labels_only_where_labels_are_given(data: Path) -> None:
    assert read_clips(data, 1, None)
    assert read_clips(data, 1, ["jump", "wave"])
    with pytest.raises(UserError, match="does not know the class 'wave'"):
        read_clips(data, 1, ["jump"])
    with pytest.raises(UserError, match="does not know the class 'jump'"):
        read_clips(data, 1, [])


def test_a_split_without_such_clips_is_said(data: Path) -> None:
    with pytest.raises(UserError, match="no validation clip in split1"):
        read_clips(data, 1, part="validation")


def test_of_a_data_set_every_class_gives_training_clips_evenly_spread(data: Path) -> None:
    videos, what = calibration_videos(data)
    assert [video.name for video in videos] == ["jump0.avi", "jump3.avi", "jump6.avi", "wave0.avi", "wave1.avi"]
    assert all(video.parent == data for video in videos)
    assert what == "actions, training list of split 1"


def test_of_a_data_set_the_split_decides(data: Path) -> None:
    videos, what = calibration_videos(data, 2)
    assert [video.name for video in videos] == ["jump9.avi", "wave0.avi", "wave1.avi"]
    assert what == "actions, training list of split 2"
    with pytest.raises(UserError, match="split7"):
        calibration_videos(data, 7)


def test_a_folder_gives_its_videos_also_from_below_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.mp4", "A.MOV", "deep/er/c.webm", "notes.txt", "picture.jpg", "mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ("A.MOV", "b.mp4", "deep/er/c.webm")]
    assert videos_in(tmp_path) == expected
    assert calibration_videos(tmp_path) == (expected, tmp_path.name)


def test_a_video_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    assert calibration_videos(tmp_path / "a.mp4") == ([tmp_path / "a.mp4"], "a.mp4")


def test_the_folder_that_one_stands_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").touch()
    monkeypatch.chdir(tmp_path)
    assert calibration_videos(Path("."))[1] == tmp_path.name


def test_no_videos_and_no_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no video"):
        calibration_videos(tmp_path)
    with pytest.raises(UserError, match="there is no calibration clip or folder"):
        calibration_videos(tmp_path / "absent")


def write_image(path: Path, value: int) -> None:
    assert cv2.imwrite(str(path), np.full((8, 8, 3), value, np.uint8))


def test_extracted_frames_are_played_by_their_numbers_at_their_rate_and_others_left_alone(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 100):
        write_image(tmp_path / f"img_{number}.png", number)
    write_image(tmp_path / "flow_x_1.png", 255)
    played = list(frames_of(Clip(tmp_path, "wave", "img_{:d}.png", 12.0)))
    assert [int(frame.mean()) for frame, _ in played] == [1, 2, 9, 10, 100]
    assert [time for _, time in played] == pytest.approx([0, 1 / 12, 2 / 12, 3 / 12, 4 / 12])
    assert len(list(frames_of(Clip(tmp_path, "wave")))) == 6


def test_extracted_frames_that_are_not_there_or_damaged_are_unreadable(tmp_path: Path) -> None:
    for clip in (
        Clip(tmp_path, "wave", "{:05d}.jpg"),
        Clip(tmp_path / "no", "wave", "{:05d}.jpg"),
        Clip(tmp_path, "a"),
    ):
        with pytest.raises(UnreadableVideo):
            list(frames_of(clip))
    (tmp_path / "00001.jpg").write_text("no picture")
    with pytest.raises(UnreadableVideo, match=r"00001\.jpg cannot be decoded"):
        list(frames_of(Clip(tmp_path, "wave", "{:05d}.jpg")))
