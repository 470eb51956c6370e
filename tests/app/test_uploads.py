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
    uploads.leave("anna")
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


def test_what_nobody_comes_back_for_goes_in_the_end(
    choice: EngineChoice, video: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(folder, Limits())
    with uploads.job("anna", video, choice) as job:
        list(job)
    (folder / "hash").mkdir()
    (folder / "hash" / "never-run.mp4").write_bytes(b"a video")
    (folder / "broken-off").write_bytes(b"half of it")
    uploads.clear_out()
    assert job.report.video.is_file() and len(list(folder.iterdir())) == 3
    monkeypatch.setattr("stsm_rt.app.uploads._KEEP", -1.0)
    with uploads.job("bert", video, choice) as running:
        for _ in running:
            uploads.clear_out()
        assert running.report.video.is_file()
    assert not job.report.video.exists() and list(folder.iterdir()) == [running.folder]


def test_a_program_may_run_several_and_all_end_when_it_leaves(choice: EngineChoice, video: Path, folder: Path) -> None:
    uploads = Uploads(folder, Limits())
    with uploads.job("anna/1", video, choice) as one, uploads.job("anna/2", video, choice) as two:
        assert list(one) and list(two)
    with uploads.job("annabel", video, choice) as other:
        list(other)
    assert one.report.video.is_file() and two.report.video.is_file()
    uploads.leave("anna")
    assert list(folder.iterdir()) == [other.folder]


def test_what_was_uploaded_goes_with_its_last_visitor(choice: EngineChoice, video: Path, folder: Path) -> None:
    uploaded = folder / "hash" / "blue.mp4"
    uploaded.parent.mkdir()
    uploaded.write_bytes(video.read_bytes())
    uploads = Uploads(folder, Limits())
    for visitor in ("anna", "bert"):
        with uploads.job(visitor, uploaded, choice) as job:
            list(job)
    uploads.leave("anna")
    assert uploaded.is_file()
    uploads.leave("bert")
    assert not list(folder.iterdir())
    # What does not lie among the uploads, as the sample clip, is not ours to remove.
    with uploads.job("anna", video, choice) as job:
        list(job)
    uploads.leave("anna")
    assert video.is_file() and not list(folder.iterdir())
