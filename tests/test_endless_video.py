from __future__ import annotations

from pathlib import Path
from time import perf_counter

import cv2
import numpy as np
import pytest
from clips import counted, number_of, write_video

from stsm_rt.endless_video import EndlessCapture
from stsm_rt.errors import UserError
from stsm_rt.video.sources import RecordedSource


def test_a_file_is_played_again_and_again(tmp_path: Path):
    capture = EndlessCapture(write_video(tmp_path / "clip.mp4", counted(5)), frames=12)

    with RecordedSource(capture, "clip") as source:  # type: ignore[arg-type]
        frames = list(source)

    assert [number_of(frame) for frame, _ in frames] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert np.all(np.diff([time for _, time in frames]) > 0)


def test_a_camera_gives_its_frames_when_they_are_due(tmp_path: Path):
    capture = EndlessCapture(write_video(tmp_path / "clip.mp4", counted(5)), frames=10, rate=50.0)

    begin = perf_counter()
    while capture.grab():
        pass

    assert perf_counter() - begin >= 9 / 50
    assert capture.get(cv2.CAP_PROP_FPS) == 50.0
    capture.release()


def test_what_is_absent_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="there is no video"):
        EndlessCapture(tmp_path / "no.mp4", frames=1)
