"""Live sources: cameras that drop, stall and come back, with real servers that are killed and stopped."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import cv2
import pytest
from camera import PacedCapture
from clips import counted, number_of, write_video
from hypothesis import given
from hypothesis import strategies as st
from live_servers import StreamServer

from stsm_rt.errors import UserError
from stsm_rt.pipeline import Pipeline
from stsm_rt.recognizer import Recognizer
from stsm_rt.video import sources
from stsm_rt.video.live import LiveSource
from stsm_rt.video.patience import Patience
from stsm_rt.video.probe import explain
from stsm_rt.video.source import Reading, Source, SourceState, StateChange
from stsm_rt.video.sources import open_source

Connect = Callable[[], Any]
QUICK: dict[str, float] = {"first_delay": 0.1, "longest_delay": 0.2, "healthy_after": 0.5}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sources try anew after tenths of a second."""
    monkeypatch.setattr(sources, "Patience", partial(Patience, **QUICK))


class Follower:
    """Reads a source in a thread and keeps what came."""

    def __init__(self, source: Source) -> None:
        self.readings: list[Reading] = []
        self.error: UserError | None = None
        self._source = source
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while (reading := self._source.read()) is not None:
                self.readings.append(reading)
        except UserError as error:
            self.error = error

    @property
    def streams(self) -> list[int]:
        """The numbers of the streams, in the order in which they came."""
        return list(dict.fromkeys(reading.stream for reading in self.readings))


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end
        sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http", "rtsp"])
def test_a_camera_that_is_killed_or_stalls_is_resumed_as_another_stream(
    kind: str, impatient: None, tiny_engine: Any
) -> None:
    changes: list[StateChange] = []
    with StreamServer(kind) as server:
        url = server.url()
        with open_source(url, open_timeout=4, read_timeout=1, on_change=changes.append) as source:
            follower = Follower(source)
            until(lambda: len(follower.readings) > 10)
            assert (source.live, source.state, source.reconnects) == (True, SourceState.RUNNING, 0)

            server.kill()
            sleep(3)
            assert source.state is SourceState.RECONNECTING and not source.healthy
            server.start()
            until(lambda: source.reconnects == 1 and len(follower.readings) > 0 and follower.readings[-1].stream == 1)
            assert source.state is SourceState.RUNNING
            until(lambda: source.healthy)

            server.pause()
            until(lambda: any(change.state is SourceState.STALLED for change in changes))
            server.resume()
            until(lambda: source.reconnects == 2 and follower.readings[-1].stream == 2)
        follower.thread.join(5)
        assert follower.error is None and not follower.thread.is_alive()
    assert follower.streams == [0, 1, 2]
    times = [reading.time for reading in follower.readings]
    assert times == sorted(times)
    # The clock went on while the camera was away.
    back = next(i for i, reading in enumerate(follower.readings) if reading.stream == 1)
    assert times[back] - times[back - 1] > 1.0
    states = [change.state.value for change in changes]
    once = [state for state, before in zip(states, ["", *states], strict=False) if state != before]
    assert once == [
        "opening",
        *["running", "reconnecting"],
        *["running", "stalled", "reconnecting"],
        "running",
        "ended",
    ]
    tries = [change for change in changes if change.state is SourceState.RECONNECTING]
    assert tries[0].reason == f"the connection to {url} ended" and tries[0].attempt == 1
    assert "refuses the connection" in tries[1].reason
    assert [change.time for change in changes] == sorted(change.time for change in changes)


def test_whoever_comes_back_is_looked_at_as_for_the_first_time(impatient: None, tiny_engine: Any) -> None:
    """The state of the network, and what was decided of it, end with the connection."""
    with StreamServer("http", still=True) as server, open_source(server.url(), read_timeout=1) as source:
        recognizer = Recognizer(tiny_engine.path)
        results = []
        with Pipeline(recognizer, source, frames=False) as pipeline:
            for output in pipeline:
                assert output.result is not None
                results.append(output.result)
                if len(results) == 8:
                    server.kill()
                    server.start()
                if len(results) > 8 and not results[-1].warming_up:
                    break
    warming = [result.warming_up for result in results]
    assert warming[0] and not warming[7] and not warming[-1]
    # It warmed up anew, for as many steps as the first time.
    assert warming[8:].count(True) == warming[:8].count(True)
    assert [result.frame for result in results if result.warming_up].count(0) == 2


SENTENCES = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from stsm_rt.errors import UserError
from stsm_rt.video.sources import open_source
for url in sys.argv[1:]:
    try:
        open_source(url, open_timeout=3, read_timeout=1).close()
        print("opened")
    except UserError as error:
        print("sentence:", error)
"""


def sentences(*urls: str) -> list[str]:
    """What a process says that opens these, and that none of all it writes is the password."""
    command = [sys.executable, "-c", SENTENCES, *urls]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert "hush" not in done.stdout + done.stderr and "s%20cret" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    said = [line.removeprefix("sentence: ") for line in done.stdout.splitlines()]
    assert len(said) == len(urls)
    return said


@pytest.mark.parametrize("options", [{"kind": "http"}, {"kind": "http", "digest": True}], ids=["basic", "digest"])
def test_why_a_camera_on_the_web_cannot_be_opened_is_said(options: dict[str, Any]) -> None:
    with StreamServer(**options, user="user", password="hush") as server:
        user = "user:hush"
        closed = server.url(user=user).replace(str(server.port), "1")
        said = sentences(
            server.url(user=user),
            server.url(user="user:hush-hush"),
            server.url(),
            server.url("/nothing", user=user),
            server.url("/forbidden", user=user),
            server.url("/page", user=user),
            server.url("/video", user=user),
            closed,
            server.url(user=user).replace("127.0.0.1", "camera.invalid"),
            server.url(user=user).replace("http", "https"),
        )
    shown = f"http://***@127.0.0.1:{server.port}"
    # FFmpeg answers a digest challenge like a basic one.
    assert said[0] == "opened"
    assert said[1] == (
        f"{shown}/camera refuses this user or password; check them, and percent-encode signs such as @ : / # in them"
    )
    assert said[2].startswith(f"http://127.0.0.1:{server.port}/camera wants a user and a password")
    assert said[3] == f"{shown}/nothing does not exist on this server (404); check the path of the stream"
    assert said[4].startswith(f"{shown}/forbidden forbids it (403)")
    assert said[5] == f"{shown}/page is not a video but text/html; give the address of the stream itself"
    assert said[6].startswith(f"{shown}/video gives no video that can be decoded")
    assert said[7] == "http://***@127.0.0.1:1/camera refuses the connection; check that the camera serves on port 1"
    assert "camera.invalid" in said[8] and " names an unknown host; check the spelling" in said[8]
    assert " cannot be reached (" in said[9]
    assert len(set(said)) == len(said)
    # It needs nobody to redact it.
    assert explain(closed, timeout=1) == said[7]


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_a_challenge_without_a_value_is_said(scheme: str) -> None:
    answer = f'{scheme.upper()}/1.0 401 No\r\nWWW-Authenticate: Digest realm="x", nonce="y", opaque=\r\n\r\n'

    def serve() -> None:
        with server.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(answer.encode())

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}/x"
        said = explain(f"{scheme}://user:hush@{address}", timeout=5)
        thread.join()
    assert (
        said == f"{scheme}://***@{address} asks for a user and a password in words that are damaged; check the server"
    )


@pytest.mark.parametrize("basic", [False, True], ids=["digest", "basic"])
def test_why_an_rtsp_camera_cannot_be_opened_is_said(basic: bool) -> None:
    with StreamServer("rtsp", user="user", password="hush", **({"basic": True} if basic else {})) as server:
        user = "user:hush"
        said = sentences(
            server.url(user=user),
            server.url(user="user:s%20cret"),
            server.url(),
            server.url("/nothing", user=user),
            server.url("/sound", user=user),
            server.url(user=user).replace(str(server.port), "1"),
            server.url(user=user).replace("127.0.0.1", "camera.invalid"),
        )
    shown = f"rtsp://***@127.0.0.1:{server.port}"
    assert said[0] == "opened"
    assert said[1].startswith(f"{shown}/camera refuses this user or password")
    assert said[2].startswith(f"rtsp://127.0.0.1:{server.port}/camera wants a user and a password")
    assert said[3] == f"{shown}/nothing does not exist on this server (404); check the path of the stream"
    assert said[4].startswith(f"{shown}/sound is not a video but a stream without a picture")
    assert said[5] == "rtsp://***@127.0.0.1:1/camera refuses the connection; check that the camera serves on port 1"
    assert " names an unknown host" in said[6]


def test_a_server_that_is_silent_or_speaks_another_language_is_told_apart() -> None:
    with StreamServer("http") as server:
        as_rtsp = server.url().replace("http", "rtsp")
        server.pause()
        begin = monotonic()
        with pytest.raises(UserError, match=r"does not answer within 0\.5 s; check that 127\.0\.0\.1 is on"):
            open_source(server.url(), open_timeout=0.5)
        assert monotonic() - begin < 8
        server.resume()
        with pytest.raises(UserError, match=r"^rtsp://.*/camera cannot be reached \(it does not speak RTSP\)"):
            open_source(as_rtsp, open_timeout=2)


def test_a_picture_that_broke_off_with_its_connection_is_not_filled_up() -> None:
    size = (640, 480)
    whole = counted(256, size)
    with (
        StreamServer("http", width=size[0], height=size[1]) as server,
        open_source(server.url("/cut"), max_retries=0) as source,
    ):
        frames = [frame for frame, _ in source]
    assert frames and all(abs(int(frame.mean()) - int(whole[number_of(frame)].mean())) < 3 for frame in frames)
    for frame in frames:
        assert number_of(frame[-3:]) == number_of(frame[:3]) <= 20


def test_a_camera_that_is_away_holds_up_no_other() -> None:
    with StreamServer("http") as away, StreamServer("http") as there:
        away.pause()
        with open_source(away.url(), open_timeout=5, wait=True):
            sleep(0.3)
            begin = monotonic()
            with open_source(there.url()) as source:
                next(source)
            assert monotonic() - begin < 3


class Script:
    """Connections of a made-up camera, one after another: what each gives, or how it fails."""

    def __init__(self, *connections: Any) -> None:
        self.made: list[Any] = []
        self._connections = iter(connections)

    def __call__(self) -> Any:
        connection = next(self._connections, UserError("the camera is away; plug it in"))
        if isinstance(connection, UserError):
            raise connection
        self.made.append(connection)
        return connection


class BlockedCapture(PacedCapture):
    """A device whose driver blocks after some frames, until it is let go."""

    def __init__(self, count: int) -> None:
        super().__init__(counted(256), 100)
        self.let_go = threading.Event()
        self._count = count

    def grab(self) -> bool:
        if self.given == self._count:
            self.let_go.wait(60)
            if self.given == self._count:
                return False
        return super().grab()


def live(*connections: Any, wait: bool = False, **patience: Any) -> tuple[LiveSource, Script, list[StateChange]]:
    script, changes = Script(*connections), []
    options = {"read_timeout": 0.4, **QUICK, **patience}
    source = LiveSource(
        None, "a camera", connect=script, patience=Patience(**options), wait=wait, on_change=changes.append
    )
    return source, script, changes


def paced(count: int, fps: float = 100) -> PacedCapture:
    return PacedCapture(counted(count), fps)


def test_a_reader_that_blocks_is_left_behind_and_its_late_frames_are_nobodys() -> None:
    blocked = BlockedCapture(5)
    source, script, changes = live(blocked, paced(200))
    with source:
        follower = Follower(source)
        until(lambda: source.reconnects == 1 and len(follower.readings) > 10)
        blocked._count = 200
        blocked.let_go.set()
        until(lambda: blocked.released)
        until(lambda: len(follower.readings) > 30)
    follower.thread.join(5)
    assert [change.state.value for change in changes][:4] == ["opening", "running", "stalled", "reconnecting"]
    assert changes[2].reason == "a camera gave no frame for 0.4 s"
    assert follower.streams == [0, 1]
    second = [number_of(reading.frame) for reading in follower.readings if reading.stream == 1]
    assert second == sorted(second)
    assert script.made[1].released


def test_connections_that_block_for_good_are_not_piled_up() -> None:
    blocked = [BlockedCapture(1) for _ in range(8)]
    source, script, changes = live(*blocked, read_timeout=0.1, first_delay=0.01, longest_delay=0.02)
    try:
        until(lambda: any("still blocks 4 earlier connections" in change.reason for change in changes))
        assert len(script.made) == 4
        before = threading.active_count()
        sleep(0.3)
        assert len(script.made) == 4 and threading.active_count() <= before + 1
        # One of them gives up: there is room for another.
        blocked[0].let_go.set()
        until(lambda: len(script.made) == 5)
        begin = monotonic()
        source.close()
        assert monotonic() - begin < 1.9
        assert source.state is SourceState.ENDED
    finally:
        source.close()
        for capture in blocked:
            capture.let_go.set()


def test_whatever_goes_wrong_in_a_connection_is_its_trouble() -> None:
    def fail() -> Any:
        raise ValueError("rtsp://user:hush@camera")

    broken = paced(5)
    broken.retrieve = fail  # type: ignore[method-assign]
    source, _, changes = live(broken, paced(50), wait=True)
    with source:
        assert source.read() is not None
    reason = "a camera cannot be read (ValueError: rtsp://***@camera)"
    assert (changes[1].reason, changes[1].attempt) == (reason, 1)
    broken.given = 0
    source, _, _ = live(broken, wait=True, max_retries=0)
    with source, pytest.raises(UserError) as error:
        source.read()
    assert str(error.value) == reason


def test_closing_or_stopping_does_not_wait_for_a_driver() -> None:
    blocked = BlockedCapture(2)
    source, _, _ = live(blocked, read_timeout=30)
    source.read()  # not twice: the newest of the two frames wins
    threading.Timer(0.2, source.stop).start()
    begin = monotonic()
    list(iter(source.read, None))
    source.close()
    assert monotonic() - begin < 1.9
    blocked.let_go.set()


def test_after_the_last_retry_it_has_failed_and_says_why() -> None:
    source, _, changes = live(paced(5), max_retries=2)
    with source:
        readings = []
        with pytest.raises(UserError) as error:
            readings += iter(source.read, None)
        assert str(error.value) == (
            "a camera was given up after 2 attempts to come back; the last one said: the camera is away; plug it in"
        )
        assert [change.attempt for change in changes if change.state is SourceState.RECONNECTING] == [1, 2]
        assert source.state is SourceState.FAILED
        with pytest.raises(UserError):
            source.read()
    assert source.state is SourceState.FAILED


def test_without_retries_it_ends_where_its_connection_does_and_fails_where_that_stalls() -> None:
    source, _, changes = live(paced(30, 200), max_retries=0)
    with source:
        assert len(list(source)) >= 1
        assert (source.state, changes[-1].reason) == (SourceState.ENDED, "the connection to a camera ended")
    blocked = BlockedCapture(3)
    source, _, _ = live(blocked, max_retries=0)
    with source, pytest.raises(UserError, match=r"^a camera gave no frame for 0\.4 s$"):
        list(source)
    blocked.let_go.set()


def test_attempts_are_forgotten_only_after_it_has_been_healthy() -> None:
    flaps = [paced(3) for _ in range(3)]
    source, _, changes = live(*flaps, paced(150), paced(3), max_retries=4, healthy_after=1.0)
    with source, pytest.raises(UserError, match="was given up after 4 attempts"):
        list(iter(source.read, None))
    attempts = [change.attempt for change in changes if change.state is SourceState.RECONNECTING]
    assert attempts == [1, 2, 3, 1, 2, 3, 4]
    assert source.reconnects == 4


def test_by_default_the_first_attempt_decides() -> None:
    with pytest.raises(UserError, match=r"^the camera is away; plug it in$"):
        live(UserError("the camera is away; plug it in"), paced(5))
    with pytest.raises(UserError, match=r"^a camera was opened but gives no frame; check that nothing else uses it$"):
        live(paced(0), paced(5))
    blocked = BlockedCapture(0)
    with pytest.raises(UserError, match="opened but gives no frame"):
        live(blocked, paced(5))
    blocked.let_go.set()


def test_what_does_not_open_in_time_is_left_behind() -> None:
    let_go = threading.Event()

    def blocks() -> Any:
        let_go.wait(60)
        raise UserError("too late")

    begin = monotonic()
    with pytest.raises(UserError, match=r"^a camera does not open within 0\.3 s; check that it is on and free$"):
        LiveSource(None, "a camera", connect=blocks, patience=Patience(open_timeout=0.3))
    assert monotonic() - begin < 5
    let_go.set()


def test_a_camera_that_is_not_there_yet_can_be_waited_for() -> None:
    away = UserError("the camera is away; plug it in")
    source, _, changes = live(away, away, paced(50), wait=True)
    with source:
        assert (source.state, source.size, source.frame_rate) == (SourceState.OPENING, (0, 0), None)
        reading = source.read()
        assert reading is not None and (source.size, source.frame_rate) == ((64, 48), 100)
        # Its time began when it was asked for.
        assert 0.1 < reading.time < 5 and reading.stream == 0
        assert source.reconnects == 0
    assert [(change.state.value, change.attempt) for change in changes][:4] == [
        ("opening", 0),
        ("opening", 1),
        ("opening", 2),
        ("running", 2),
    ]
    assert changes[1].reason == str(away)
    source, _, _ = live(away, wait=True, max_retries=1)
    with source, pytest.raises(UserError, match=r"given up after 1 attempts?.*the camera is away"):
        source.read()
    source, _, _ = live(wait=True)
    threading.Timer(0.3, source.stop).start()
    with source:
        assert source.read() is None


LEAVING = """
import sys, threading, time
from stsm_rt.video.sources import open_source
with open_source(sys.argv[1]) as source:
    source.read()
    print("opened", flush=True)
    sys.stdin.readline()
    begin = time.monotonic()
print(time.monotonic() - begin < 1.9, any(thread.name == "stsm-rt reader" for thread in threading.enumerate()))
"""


def test_a_process_leaves_a_stream_that_has_stalled(tmp_path: Path) -> None:
    with StreamServer("http") as server:
        process = subprocess.Popen(
            [sys.executable, "-c", LEAVING, server.url()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "opened\n"
        server.pause()
        sleep(0.2)
        out, error = process.communicate("\n", timeout=8)
        # The reader still blocks in the decoder, and the process ends all the same.
        assert (process.returncode, out, error) == (0, "True True\n", "")


class DamagedCapture(PacedCapture):
    """A capture of which some frames cannot be decoded, and which knows the kinds of its pictures."""

    def __init__(self, kinds: str) -> None:
        super().__init__(counted(len(kinds)), 400)
        self._kinds = kinds

    def grab(self) -> bool:
        return super().grab() and self._kinds[self.given - 1] != "x"

    def get(self, what: int) -> float:
        return ord(self._kinds[self.given - 1]) if what == cv2.CAP_PROP_FRAME_TYPE else super().get(what)


def test_after_a_frame_that_was_not_decoded_the_next_picture_that_stands_alone_is_waited_for() -> None:
    capture = DamagedCapture("IPPxPPPIPPPxxIxPP?P")
    with LiveSource(capture, "a camera", patience=Patience(**QUICK)) as source:  # type: ignore[arg-type]
        seen = [number_of(frame) for frame, _ in source]
        dropped = source.dropped
    assert set(seen) <= {0, 1, 2, 7, 8, 9, 10, 13, 17, 18}
    assert seen[-1] == 18 and len(seen) + dropped == 19
    source, script, _ = live(DamagedCapture("I" + "x" * 200), paced(100))
    with source:
        until(lambda: source.reconnects == 1)
    assert script.made[0].released


@given(
    attempt=st.integers(1, 2000),
    first=st.floats(0.01, 5),
    longest=st.floats(5, 100),
)
def test_the_delay_doubles_up_to_its_cap_with_jitter(attempt: int, first: float, longest: float) -> None:
    patience = Patience(first_delay=first, longest_delay=longest)
    expected = min(longest, first * 2 ** min(attempt - 1, 60))
    delays = [patience.delay(attempt) for _ in range(5)]
    assert all(0.499 * expected <= delay <= 1.001 * expected for delay in delays)
    assert len(set(delays)) > 1


BOUNDS = r"must be more than 0 s and at most a day \(86400 s\)"


def test_numbers_out_of_range_are_refused() -> None:
    for options, sentence in (
        ({"read_timeout": 0}, f"the read timeout {BOUNDS}, not 0"),
        ({"open_timeout": -1}, f"the open timeout {BOUNDS}, not -1"),
        ({"open_timeout": float("nan")}, f"the open timeout {BOUNDS}, not nan"),
        ({"read_timeout": float("inf")}, f"the read timeout {BOUNDS}, not inf"),
        ({"open_timeout": 86401}, f"the open timeout {BOUNDS}, not 86401"),
        ({"max_retries": -1}, "the number of retries must be at least 0, not -1"),
    ):
        with pytest.raises(UserError, match=f"^{sentence}$"):
            open_source(0, **options)  # type: ignore[arg-type]
    assert Patience(open_timeout=86400, read_timeout=86400).read_timeout == 86400


def test_every_change_is_logged_and_a_record(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, "stsm_rt.source"):
        source, _, changes = live(paced(3), paced(50))
        with source:
            until(lambda: source.reconnects == 1)
    assert [record.getMessage().split(" at ")[0] for record in caplog.records] == [
        f"a camera: {change.state.value}" for change in changes
    ]
    levels = {record.levelname for record in caplog.records if "reconnecting" in record.getMessage()}
    assert levels == {"WARNING"}
    change = StateChange(SourceState.STALLED, 12.5, "rtsp://user:hush@camera/1 gave no frame", 2)
    assert change.to_record() == {
        "kind": "source",
        "state": "stalled",
        "time": 12.5,
        "reason": "rtsp://***@camera/1 gave no frame",
        "attempt": 2,
    }


def test_a_recording_runs_and_ends(tmp_path: Path) -> None:
    changes: list[StateChange] = []
    with open_source(write_video(tmp_path / "a.mp4", counted(10), 10), on_change=changes.append) as source:
        assert source.state is SourceState.RUNNING and source.healthy
        list(source)
        assert source.state is SourceState.ENDED and not source.healthy
        assert source.read() is None
    assert [(change.state.value, change.time) for change in changes] == [
        ("running", 0.0),
        ("ended", pytest.approx(0.9)),
    ]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    until(lambda: not any(thread.name.startswith("stsm-rt") for thread in threading.enumerate()))


def test_devices_and_pipelines_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no camera /dev/v4l/by-id/usb-none; check that it is connected"):
        open_source("/dev/v4l/by-id/usb-none")
    with pytest.raises(UserError, match="camera /dev/null cannot be opened"):
        open_source("/dev/null")
    if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        for pipeline in ("videotestsrc ! videoconvert ! appsink", "gstreamer:videotestsrc!appsink"):
            with pytest.raises(UserError, match="this OpenCV was built without GStreamer"):
                open_source(pipeline)


PIPELINE = """
import json, sys
from stsm_rt.errors import UserError
from stsm_rt.video.sources import open_source
with open_source(sys.argv[1], max_retries=0) as source:
    readings = list(iter(source.read, None))
print(json.dumps([source.size, source.frame_rate, source.dropped, [reading.time for reading in readings]]))
try:
    open_source("nonsense user-pw=hush ! appsink")
except UserError as error:
    print(error)
"""


def test_a_pipeline_is_played_where_opencv_has_gstreamer() -> None:
    """Debian's own Python has such an OpenCV where python3-opencv is installed."""
    check = "import cv2; assert cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER)"
    python = "/usr/bin/python3"
    if not os.path.exists(python) or subprocess.run([python, "-c", check], capture_output=True, check=False).returncode:
        pytest.skip("no OpenCV with GStreamer: install python3-opencv")
    pipeline = (
        "videotestsrc is-live=true num-buffers=20 ! video/x-raw,width=64,height=48,framerate=20/1 ! videoconvert ! "
        "video/x-raw,format=BGR ! appsink drop=true max-buffers=1"
    )
    root = Path(sources.__file__).parents[2]
    done = subprocess.run(
        [python, "-c", PIPELINE, pipeline], capture_output=True, text=True, check=True, timeout=60, cwd=root
    )
    played, refused = done.stdout.splitlines()
    size, rate, dropped, times = json.loads(played)
    assert (size, rate) == ([64, 48], 20) and 18 <= len(times) + dropped <= 20
    assert times == sorted(times) and times[-1] < 10
    assert "user-pw=***" in refused and "gives no video; try it with gst-launch-1.0" in refused
    assert "hush" not in done.stdout + done.stderr


def test_times_of_a_network_camera_are_those_of_its_frames() -> None:
    with StreamServer("rtsp", rate=20) as server, open_source(server.url(), open_timeout=5) as source:
        readings = [reading for _ in range(20) if (reading := source.read()) is not None]
    steps = [later.time - earlier.time for earlier, later in pairwise(readings)]
    # Whole periods of the camera, however the frames arrived.
    assert all(abs(20 * step - round(20 * step)) < 0.02 and step > 0.04 for step in steps[2:])
    assert {reading.stream for reading in readings} == {0}
