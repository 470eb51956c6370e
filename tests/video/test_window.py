"""Snapshots that overwrite nothing, and real windows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import cv2
import pytest
from clips import counted
from display import virtual_display

from stsm_rt.errors import UserError
from stsm_rt.video.window import save_snapshot, trial_window


def test_snapshots_overwrite_nothing(tmp_path: Path) -> None:
    (tmp_path / "snapshot-0002.png").write_text("mine")
    frames = counted(3)
    paths = [save_snapshot(frame, tmp_path) for frame in frames]
    assert [path.name for path in paths] == ["snapshot-0001.png", "snapshot-0003.png", "snapshot-0004.png"]
    assert (tmp_path / "snapshot-0002.png").read_text() == "mine"
    for path, frame in zip(paths, frames, strict=True):
        assert (cv2.imread(str(path)) == frame).all()
    with pytest.raises(UserError, match="cannot be written"):
        save_snapshot(frames[0], tmp_path / "absent")


def test_without_a_display_there_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with trial_window() as reason:
        assert "neither DISPLAY nor WAYLAND_DISPLAY" in (reason or "")


def test_a_display_that_does_not_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":9753")
    with trial_window() as reason:
        assert "does not answer" in (reason or "")


SHOWN = """
import sys
import numpy as np
from stsm_rt.video.window import Window, trial_window

with trial_window() as reason:
    assert reason is None, reason
    opened = Window("test", (320, 240))
with opened as window:
    while window.show(np.full((240, 320, 3), (10, 20, 200), np.uint8), 0.05) is None:
        pass
"""


def test_a_window_shows_the_picture(tmp_path: Path) -> None:
    with virtual_display(tmp_path) as display:
        # OpenCV connects to one display per process, so the window gets a process of its own.
        variables = {**os.environ, "DISPLAY": display.name}
        with subprocess.Popen([sys.executable, "-c", SHOWN], env=variables) as process:
            shown, begin = 0, monotonic()
            while shown <= 300 * 200 and process.poll() is None and monotonic() - begin < 60:
                sleep(0.1)
                shown = (display.screenshot() == (10, 20, 200)).all(axis=2).sum()
            process.kill()
        assert shown > 300 * 200
