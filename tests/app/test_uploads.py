"""Jobs and results of several visitors."""

from __future__ import annotations

from pathlib import Path

import pytest
from clips import plain, write_video

from stsm_rt.app.engines import EngineChoice
from stsm_rt.app.jobs import Limits
from stsm_rt.app.uploads import Uploads
from stsm_rt.errors import UserError

pytest.importorskip("av", reason="the page needs PyAV: pip install 'stsm-rt[ui]'")


@pytest.fixture
def choice(tiny_engine) -> EngineChoice:
    return EngineChoice(tiny_engine.path, "colours", tiny_engine.manifest)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "blue.mp4", plain("blue", 30, size=(64, 48)), 10.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "results"
    path.mkdir()
    return path


def test_results_stay_until_the_next_job_or_until_the_visitor_leaves(
    choice: EngineChoice, video: Path, folder: Path
) -> None:
    uploads = Uploads(folder, Limits())
    for _ in range(2):
        with uploads.job("anna", video, choice) as job:
            assert list(job)
        assert job.report.video.is_file() and len(list(folder.iterdir())) == 1
    with uploads.job("bert", video, choice) as other:
        assert list(other)
    uploads.forget("anna")
    assert not job.report.video.exists() and other.report.video.is_file()
    uploads.close()
    assert not list(folder.iterdir())


def test_an_error_leaves_nothing(choice: EngineChoice, folder: Path, tmp_path: Path) -> None:
    uploads = Uploads(folder, Limits())
    with pytest.raises(UserError, match="absent"), uploads.job("anna", tmp_path / "absent.mp4", choice) as job:
        list(job)
    assert not list(folder.iterdir())


def test_who_cancels_keeps_nothing(choice: EngineChoice, video: Path, folder: Path) -> None:
    uploads = Uploads(folder, Limits())
    with pytest.raises(UserError, match="stopped"), uploads.job("anna", video, choice) as job:
        uploads.cancel("anna")
        list(job)
    assert not list(folder.iterdir())
    uploads.cancel("anna")  # nothing runs: nothing happens


def test_results_of_who_never_says_goodbye_go_in_the_end(
    choice: EngineChoice, video: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(folder, Limits())
    with uploads.job("anna", video, choice) as job:
        list(job)
    monkeypatch.setattr("stsm_rt.app.uploads._KEEP", -1.0)
    with uploads.job("bert", video, choice) as other:
        list(other)
    assert not job.report.video.exists() and other.report.video.is_file()
