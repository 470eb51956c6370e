"""Clips of an own action: the command, its countdown, its review and its files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from camera import PacedCapture
from clips import counted, http_server, number_of, plain, read_all, write_video
from display import virtual_display

import stsm_rt.record
from stsm_rt.own_clips import own_clips
from stsm_rt.record import main
from stsm_rt.video.sources import LiveSource, open_source

ROOT = Path(__file__).resolve().parents[1]
SIZE = (320, 240)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four and a half seconds of numbered frames, 20 per second."""
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", counted(90, SIZE), fps=20)


@contextmanager
def running(folder: Path, *arguments: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "stsm_rt.record", *map(str, arguments)],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def frames_of(path: Path) -> list[int]:
    with open_source(path) as source:
        return [number_of(frame) for frame in read_all(source)[0]]


def clips_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_without_a_display_it_counts_down_on_the_console_and_keeps_every_clip(film: Path, tmp_path: Path) -> None:
    arguments = ("wave_left", "--source", film, "--clips", 2, "--seconds", 1, "--countdown", 1)
    with running(tmp_path, *arguments) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "no display" in out and "headless" in out and "not mirrored" in out
    assert "wave_left: clip 1 of 2: 1 go" in out and "wave_left: clip 2 of 2: 1 go" in out
    assert "2 clips recorded, actions/wave_left now holds 2" in out and "stsm-rt train actions" in out
    first, second = clips_in(tmp_path / "actions" / "wave_left")
    assert re.fullmatch(r"\d{8}-\d{6}-0001\.mp4", first.name) and second.name == first.name.replace("0001", "0002")
    # A second of countdown, a second of clip, and so on; the frame that ends a countdown is in neither.
    assert frames_of(first) == list(range(21, 41)) and frames_of(second) == list(range(62, 82))


def test_each_run_is_a_recording_of_its_own(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stsm_rt.record, "strftime", lambda _: "20261123-073355")
    usual = ["--folder", str(tmp_path), "--source", str(film), "--clips", "2", "--seconds", "0.5", "--countdown", "0"]
    for label in ("wave", "wave", "clap"):
        assert main([label, *usual, "--headless"]) == 0
    assert [(clip.label, clip.recording) for clip in own_clips(tmp_path)] == [
        *[("clap", "20261123-073355")] * 2,
        *[("wave", "20261123-073355")] * 2,
        *[("wave", "20261123-073355.2")] * 2,
    ]
    assert "now holds 4" in capsys.readouterr().out


def test_a_clip_that_the_source_does_not_fill_is_not_kept(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--folder", str(tmp_path), "--source", str(film), "--seconds", "1.5", "--countdown", "0", "--headless"]
    assert main(["wave", *usual]) == 0
    assert "the source ended before the clip was whole" in capsys.readouterr().out
    assert [len(frames_of(path)) for path in clips_in(tmp_path / "wave")] == [30, 30, 30]
    # A source that ends in a countdown is an end, too.
    assert main(["wave", "--source", str(film), "--countdown", "9", "--headless", "--folder", str(tmp_path)]) == 0
    assert "9 8 7 6 5 the source ended" in capsys.readouterr().out
    assert len(clips_in(tmp_path / "wave")) == 3


def test_a_live_clip_is_as_long_as_it_was_and_one_with_a_gap_is_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Jumping(LiveSource):
        def __next__(self) -> tuple[np.ndarray, float]:
            frame, time = super().__next__()
            return frame, time + 5 * (number_of(frame) >= 8)

    def opened(spec: str) -> LiveSource:
        if not spec.isdecimal():
            return open_source(spec)  # type: ignore[return-value]
        return Jumping(PacedCapture(counted(60, (64, 48)), 20), "a camera")  # type: ignore[arg-type]

    monkeypatch.setattr(stsm_rt.record, "open_source", opened)
    usual = ["--folder", str(tmp_path), "--clips", "1", "--seconds", "1", "--countdown", "0", "--headless"]
    assert main(["wave", *usual]) == 0
    assert "the picture stopped" in capsys.readouterr().out
    (clip,) = clips_in(tmp_path / "wave")
    numbers = frames_of(clip)
    assert numbers[0] >= 8 and 18 <= len(numbers) <= 22


def test_the_picture_is_not_mirrored(tmp_path: Path) -> None:
    frames = plain("black", 20, SIZE)
    for frame in frames:
        frame[:, :100] = (0, 0, 255)
    film = write_video(tmp_path / "film.mp4", frames)
    usual = ["--folder", str(tmp_path), "--clips", "1", "--seconds", "0.5", "--countdown", "0", "--headless"]
    assert main(["wave", "--source", str(film), *usual]) == 0
    with open_source(clips_in(tmp_path / "wave")[0]) as source:
        frame, _ = next(source)
    assert frame[120, 50, 2] > 200 and frame[120, 270, 2] < 50


def test_in_a_window_a_clip_is_reviewed_and_kept_recorded_again_or_deleted(film: Path, tmp_path: Path) -> None:
    arguments = ("wave", "--clips", 3, "--seconds", 0.5, "--countdown", 1)
    with (
        virtual_display(tmp_path) as display,
        http_server(frames=counted(1200, SIZE), fps=30) as url,
        running(tmp_path, *arguments, "--source", f"{url}/camera", DISPLAY=display.name) as process,
    ):
        assert process.stdout is not None
        told = ""

        def wait_for(*words: str) -> None:
            nonlocal told
            for word in words:
                while word not in told:
                    letter = process.stdout.read(1) if process.stdout else ""
                    assert letter, told
                    told += letter
                told = told.split(word, 1)[1]

        def kept() -> int:
            return sum(not path.name.startswith(".") for path in clips_in(tmp_path / "actions" / "wave"))

        wait_for("clip 1 of 3: 1", "go", "k keeps it")
        assert kept() == 0  # not before somebody has said so
        display.press("a")
        wait_for("clip 1 of 3: again", "clip 1 of 3: 1", "k keeps it")
        display.press("k")
        wait_for("0001.mp4", "clip 2 of 3: 1", "k keeps it")
        assert kept() == 1
        display.press("d")
        wait_for("clip 2 of 3: deleted", "clip 3 of 3: 1", "k keeps it")
        display.press("q")
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "") and "1 clip recorded" in out
    assert [path.name[-9:] for path in clips_in(tmp_path / "actions" / "wave")] == ["-0001.mp4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_clips_alone(tmp_path: Path, number: int) -> None:
    with (
        http_server(frames=counted(600, (64, 48)), fps=60) as url,
        running(tmp_path, "wave", "--source", f"{url}/camera", "--seconds", 1, "--countdown", 0) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if "clip 2 of 12: go" in line:
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    (clip,) = clips_in(tmp_path / "actions" / "wave")
    assert len(frames_of(clip)) > 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["../wave"], "a class is named with letters"),
        (["wave", "--clips", "0"], "--clips must be at least 1"),
        (["wave", "--seconds", "0.1"], "--seconds must be between 0.5 and 60"),
        (["wave", "--seconds", "nan"], "--seconds must be between 0.5 and 60"),
        (["wave", "--countdown", "-1"], "--countdown must be between 0 and 60"),
        (["wave", "--source", "absent.mp4"], "there is no video absent.mp4"),
        (["wave", "--source", "http://me:hush@127.0.0.1:1/x"], "http://***@127.0.0.1:1/x"),
        (["wave", "--folder", "film.mp4"], "cannot be made"),
        ([], "the following arguments are required: LABEL"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    film: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("film.mp4").write_bytes(film.read_bytes())
    source = [] if "--source" in arguments else ["--source", "film.mp4"]
    assert main([*arguments, *source, "--headless"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("stsm-rt: error: ") and err.count("\n") == 1 and sentence in err and "hush" not in out + err
    assert os.listdir(tmp_path) == ["film.mp4"]


@pytest.mark.parametrize("size", [(160, 120), (320, 240), (1280, 720), (480, 640)])
def test_the_screens_show_what_they_say_and_leave_the_picture_alone(size: tuple[int, int]) -> None:
    from stsm_rt.record_screen import countdown_screen, recording_screen, review_screen

    picture = plain("blue", 1, size)[0]
    before = picture.copy()
    title = "a rather long name of an action: clip 12 of 12"
    two, one = countdown_screen(picture, title, 2), countdown_screen(picture, title, 1)
    assert two.shape == picture.shape and np.abs(two.astype(int) - one).sum() > 0
    early, late = recording_screen(picture, title, 0.1), recording_screen(picture, title, 0.9)
    red = [int((cv2.inRange(s, (0, 0, 200), (120, 120, 255)) > 0).sum()) for s in (early, late)]
    assert red[0] < red[1]
    review = review_screen(picture, title, 0.5)
    assert review[-size[1] // 20 :].mean() < picture.mean()
    assert (picture == before).all()
