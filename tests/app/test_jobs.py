"""Jobs: what they tell, and that nothing of them outlives whoever wanted them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

pytest.importorskip("av", reason="the page needs PyAV: pip install 'stsm-rt[ui]'")

from uploads_made import acting, command_line, encode, environment, records

from stsm_rt.app.jobs import Job, Limits
from stsm_rt.errors import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", acting())


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty seconds, of which an analysis takes some."""
    return encode(tmp_path_factory.mktemp("long") / "long.mp4", (frame for _ in range(10) for frame in acting()))


def job(video: Path, folder: Path, engine: Any, **options: Any) -> Job:
    return Job(video, folder, engine=engine.path, **{"limits": Limits(), **options})


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_job_tells_its_progress_and_then_has_a_report(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    with job(clip, tmp_path / "out", tiny_engine, threshold=0.5, smoothing=2, name="my clip") as running:
        progress = list(running)
    assert progress[-1].frames == 120 and progress[-1].duration == pytest.approx(4)
    assert [step.frames for step in progress] == sorted(step.frames for step in progress)
    report = running.report
    assert (report.threshold, report.smoothing, report.source.name) == (0.5, 2, "my clip")
    assert [event.label for event in report.events] == ["green"] and report.complete
    assert all(path.is_file() for path in (report.video, report.jsonl, report.csv))
    assert not is_running(running._process.pid)


def test_a_part_of_the_picture_can_be_looked_at(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    with job(clip, tmp_path / "out", tiny_engine, roi=(40, 0, 200, 150)) as running:
        list(running)
    expected = command_line(clip, tmp_path, "--engine", tiny_engine.path, "--roi", "40,0,200,150")
    assert records(running.report.jsonl) == expected


def test_what_can_be_told_without_a_process_is_told_at_once(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    large = tmp_path / "large.mp4"
    large.touch()
    os.truncate(large, 2_000_001)
    os.mkfifo(tmp_path / "pipe.mp4")
    for video, sentence in (
        (empty, "empty.mp4 is empty"),
        (large, "large.mp4 has 2 MB, at most 1 MB are taken"),
        (tmp_path / "absent.mp4", "there is no video absent.mp4"),
        (tmp_path / "pipe.mp4", "there is no video pipe.mp4"),
    ):
        with pytest.raises(UserError, match=sentence):
            job(video, tmp_path / "out", tiny_engine, limits=Limits(megabytes=1))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="must be empty"):
        job(clip, tmp_path, tiny_engine)
    assert empty.exists()


def test_what_is_wrong_is_the_childs_sentence_and_nothing_stays(tiny_engine: Any, tmp_path: Path) -> None:
    video = tmp_path / "text.mp4"
    video.write_text("this is no video")
    with (
        pytest.raises(UserError, match=r"^text\.mp4 is not a video that can be decoded; give a file"),
        job(video, tmp_path / "out", tiny_engine) as running,
    ):
        list(running)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="not complete"):
        _ = running.report


def test_a_video_may_be_too_long(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"clip\.mp4 is longer than 3 seconds"),
        job(clip, tmp_path / "out", tiny_engine, limits=Limits(seconds=3)) as running,
    ):
        list(running)
    assert not (tmp_path / "out").exists()


def test_to_cancel_ends_it_at_once_and_leaves_nothing(tiny_engine: Any, long_clip: Path, tmp_path: Path) -> None:
    with job(long_clip, tmp_path / "out", tiny_engine) as running:
        progress = iter(running)
        assert next(progress).frames < 1200
        assert len(os.listdir(tmp_path / "out")) == 1
        begin = monotonic()
        canceller = threading.Thread(target=running.cancel)
        canceller.start()
        with pytest.raises(UserError, match="was stopped"):
            list(progress)
        canceller.join()
    assert monotonic() - begin < 1
    assert not is_running(running._process.pid) and not (tmp_path / "out").exists()
    running.cancel()  # once more changes nothing


def test_who_leaves_in_the_middle_leaves_nothing(tiny_engine: Any, long_clip: Path, tmp_path: Path) -> None:
    with job(long_clip, tmp_path / "out", tiny_engine) as running:
        for _ in running:
            break
        assert is_running(running._process.pid)
    assert not is_running(running._process.pid) and not (tmp_path / "out").exists()


def test_a_decoder_that_stalls_is_given_up(tiny_engine: Any, long_clip: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"nothing came of long\.mp4 for 2 seconds"),
        job(long_clip, tmp_path / "out", tiny_engine, limits=Limits(stall=2)) as running,
    ):
        for _ in running:
            os.kill(running._process.pid, signal.SIGSTOP)
    assert not is_running(running._process.pid) and not (tmp_path / "out").exists()


def test_what_takes_too_long_is_given_up(tiny_engine: Any, long_clip: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"long\.mp4 took longer than 0\.1 seconds"),
        job(long_clip, tmp_path / "out", tiny_engine, limits=Limits(running=0.1)) as running,
    ):
        list(running)
    assert not is_running(running._process.pid) and not (tmp_path / "out").exists()


def test_a_decoder_that_crashes_takes_nothing_with_it(tiny_engine: Any, long_clip: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"long\.mp4 made its decoder crash"),
        job(long_clip, tmp_path / "out", tiny_engine) as running,
    ):
        for _ in running:
            os.kill(running._process.pid, signal.SIGSEGV)
    assert not (tmp_path / "out").exists()


PARENT = """
import sys
from pathlib import Path
from stsm_rt.app.jobs import Job, Limits

with Job(Path(sys.argv[1]), Path(sys.argv[2]), engine=Path(sys.argv[3]), limits=Limits()) as job:
    for progress in job:
        print(job._process.pid, flush=True)
"""


def test_a_parent_that_is_killed_leaves_no_child(tiny_engine: Any, long_clip: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(long_clip), str(tmp_path / "out"), str(tiny_engine.path)],
        stdout=subprocess.PIPE,
        env=environment(),
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child) and (tmp_path / "out").exists()
        parent.kill()
    end = monotonic() + 5
    while is_running(child) and monotonic() < end:
        sleep(0.02)
    assert not is_running(child) and not (tmp_path / "out").exists()


def test_two_jobs_at_once_do_not_mix(tiny_engine: Any, tmp_path: Path) -> None:
    reports = {}

    def analyse(colour: str, video: Path) -> None:
        with job(video, tmp_path / f"out-{colour}", tiny_engine) as running:
            list(running)
        reports[colour] = running.report

    videos = {colour: encode(tmp_path / f"{colour}.mp4", acting(colour)) for colour in ("red", "blue")}
    threads = [threading.Thread(target=analyse, args=item) for item in videos.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for colour, video in videos.items():
        assert [event.label for event in reports[colour].events] == [colour]
        assert records(reports[colour].jsonl) == command_line(video, tmp_path, "--engine", tiny_engine.path)


def test_it_yields_to_live_visitors(tiny_engine: Any, clip: Path, tmp_path: Path) -> None:
    with job(clip, tmp_path / "out", tiny_engine) as running:
        pid = running._process.pid
        next(iter(running))
        threads = os.listdir(f"/proc/{pid}/task")
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in threads} == {max(own, 10)}
        assert os.getpgid(pid) == pid
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
