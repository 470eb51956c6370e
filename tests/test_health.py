"""Counts of a run, the status line, and a real HTTP server that Prometheus' own parser reads."""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from time import monotonic, sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st
from required import required_module

from stsm_rt.errors import UserError
from stsm_rt.health import HealthServer
from stsm_rt.run_counts import LATENCY_BUCKETS, STATES, Metrics, health, status_line


def ask(server: HealthServer, path: str, **headers: str) -> tuple[int, str, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def server(metrics: Metrics) -> Iterator[HealthServer]:
    required_module("prometheus_client", "pip install 'stsm-rt[live]'")
    with HealthServer(metrics, 0) as server:
        yield server


def test_prometheus_reads_every_count_of_every_camera(metrics: Metrics, server: HealthServer) -> None:
    front, yard = metrics.camera("front"), metrics.camera("yard")
    for dropped in (0, 2, 5):
        front.frame(dropped)
    for latency in (0.004, 0.012, 0.012, 9.0):
        front.step(latency)
    front.reconnected()
    front.reset()
    front.reset()
    yard.state("stalled")
    status, kind, text = ask(server, "/metrics")
    assert status == 200 and kind.startswith("text/plain; version=")
    values = samples(text)

    def value(name: str, camera: str = "front", **labels: str) -> float:
        return values[(name, tuple(sorted({"camera": camera, **labels}.items())))]

    assert value("stsm_frames_total") == 3 and value("stsm_frames_total", "yard") == 0
    assert value("stsm_frames_dropped_total") == 5
    assert value("stsm_steps_total") == 4
    assert value("stsm_reconnects_total") == 1
    assert value("stsm_state_resets_total") == 2
    assert value("stsm_step_latency_seconds_count") == 4
    assert value("stsm_step_latency_seconds_sum") == pytest.approx(9.028)
    assert value("stsm_step_latency_seconds_bucket", le="0.005") == 1
    assert value("stsm_step_latency_seconds_bucket", le="0.02") == 3
    assert value("stsm_step_latency_seconds_bucket", le="5.0") == 3
    assert value("stsm_step_latency_seconds_bucket", le="+Inf") == 4
    assert [state for state in STATES if value("stsm_source_state", "yard", state=state)] == ["stalled"]
    assert 0 <= value("stsm_frame_age_seconds") < 10


def test_names_follow_the_conventions_of_prometheus(metrics: Metrics, server: HealthServer) -> None:
    metrics.camera("a").step(0.1)
    _, _, text = ask(server, "/metrics")
    types = dict(re.findall(r"# TYPE (\S+) (\S+)", text))
    assert set(re.findall(r"# HELP (\S+) \S", text)) == set(types)
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in types.items())
    assert types["stsm_step_latency_seconds"] == "histogram" and types["stsm_frame_age_seconds"] == "gauge"
    _, kind, openmetrics = ask(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text") and openmetrics.endswith("# EOF\n")


def test_secrets_and_endless_names_stay_out_of_labels(metrics: Metrics, server: HealthServer) -> None:
    metrics.camera("rtsp://me:s3cret@10.0.0.7/live?key=s3cret#s3cret").frame()
    metrics.camera("rtsp://me:s3cret@10.0.0.7/live?key=other").frame()
    metrics.camera("x" * 10_000).frame()
    text = ask(server, "/metrics")[2] + ask(server, "/healthz")[2] + status_line(metrics)
    assert "s3cret" not in text and "x" * 100 not in text
    assert samples(ask(server, "/metrics")[2])[("stsm_frames_total", (("camera", "rtsp://***@10.0.0.7/live"),))] == 2


def test_a_camera_that_has_gone_is_forgotten(metrics: Metrics, server: HealthServer) -> None:
    metrics.camera("front").frame()
    metrics.camera("yard").frame()
    metrics.remove("yard")
    metrics.remove("never there")
    assert "yard" not in ask(server, "/metrics")[2]
    metrics.camera("yard")
    assert samples(ask(server, "/metrics")[2])[("stsm_frames_total", (("camera", "yard"),))] == 0


def test_healthz_fails_when_the_frames_of_one_camera_stop(metrics: Metrics) -> None:
    required_module("prometheus_client", "pip install 'stsm-rt[live]'")
    front, yard = metrics.camera("front"), metrics.camera("yard")
    with HealthServer(metrics, 0, stale=0.5) as server:
        front.frame()
        assert ask(server, "/healthz")[0] == 200, "the second camera has half a second for its first frame"
        end = monotonic() + 10
        while ask(server, "/healthz")[0] == 200 and monotonic() < end:
            front.frame()
            sleep(0.02)
        status, kind, body = ask(server, "/healthz")
        report = json.loads(body)
        assert status == 503 and kind == "application/json" and report["healthy"] is False
        assert report["cameras"]["front"]["healthy"] is True and report["cameras"]["yard"]["healthy"] is False
        yard.frame()
        front.frame()
        assert ask(server, "/healthz")[0] == 200


@pytest.mark.parametrize(("state", "well"), [("ended", True), ("failed", False), ("running", True)])
def test_an_end_is_well_and_a_failure_is_not(metrics: Metrics, state: str, well: bool) -> None:
    camera = metrics.camera("front")
    camera.frame()
    camera.state(state)
    assert health(metrics)[0] is well
    assert health(metrics, stale=-1)[0] is (state == "ended"), "a recording that has ended gives no frames"


def test_a_camera_that_has_ended_early_is_not_well(metrics: Metrics) -> None:
    camera = metrics.camera("front")
    camera.frame()
    camera.state("ended", early=True)
    assert not health(metrics)[0]
    camera.state("running")
    assert health(metrics)[0]


def test_a_client_that_resets_the_connection_is_not_worth_a_line(
    metrics: Metrics, server: HealthServer, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics.camera("front").frame()
    handled = threading.Event()
    shut = server._server.shutdown_request
    server._server.shutdown_request = lambda request: (shut(request), handled.set())  # type: ignore[method-assign]
    with closing(socket.create_connection(("127.0.0.1", server.port))) as client:
        client.send(b"GET /healthz HTTP/1.0\r\n")
        sleep(0.1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert handled.wait(10)
    assert capfd.readouterr() == ("", "")
    assert ask(server, "/healthz")[0] == 200


def test_nothing_is_not_healthy(metrics: Metrics, server: HealthServer) -> None:
    assert ask(server, "/healthz")[0] == 503
    assert ask(server, "/metrics")[0] == 200
    assert ask(server, "/")[0] == 404


def test_an_unknown_state_is_a_mistake(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="not asleep"):
        metrics.camera("front").state("asleep")


def test_the_status_line(metrics: Metrics) -> None:
    assert status_line(metrics) == "no camera"
    front = metrics.camera("front")
    assert status_line(metrics) == "front: opening, 0.0 frames/s, 0 steps, 0 dropped"
    for number in range(10):
        front.frame(number)
        front.step(0.02)
        sleep(0.01)
    metrics.camera("yard").reconnected()
    front.reset()
    line = status_line(metrics)
    first, second = line.split(" | ")
    pattern = r"front: running, (\d+\.\d) frames/s, 10 steps, 9 dropped, latency p95 20 ms, reset once"
    found = re.fullmatch(pattern, first)
    assert found is not None and 20 < float(found[1]) < 100 and "\n" not in line
    assert second == "yard: opening, 0.0 frames/s, 0 steps, 0 dropped, reconnected once"


def test_a_count_of_drops_that_begins_anew_is_added(metrics: Metrics) -> None:
    camera = metrics.camera("front")
    for total in (0, 4, 7, 2, 3):
        camera.frame(total)
    assert camera.snapshot()["dropped"] == 10


@given(st.lists(st.floats(0, 100), max_size=30))
def test_each_latency_is_in_the_buckets_from_its_own_on(latencies: list[float]) -> None:
    camera = Metrics().camera("front")
    for latency in latencies:
        camera.step(latency)
    counts = camera.snapshot()["latency_buckets"]
    assert counts[:-1] == [sum(latency <= bound for latency in latencies) for bound in LATENCY_BUCKETS]
    assert counts[-1] == len(latencies)


def test_threads_lose_no_count(metrics: Metrics) -> None:
    def work() -> None:
        for _ in range(500):
            camera = metrics.camera("front")
            camera.frame()
            camera.step(0.01)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = metrics.camera("front").snapshot()
    assert (counts["frames"], counts["steps"], counts["latency_buckets"][-1]) == (2000, 2000, 2000)


def test_a_port_that_is_taken_is_one_sentence(metrics: Metrics, server: HealthServer) -> None:
    with pytest.raises(UserError, match=f"127.0.0.1:{server.port} .*in use.*give another port"):
        HealthServer(metrics, server.port)
    with pytest.raises(UserError, match="no such port"):
        HealthServer(metrics, 70_000)


def test_the_port_is_given_back_at_once_even_to_a_silent_client(metrics: Metrics) -> None:
    required_module("prometheus_client", "pip install 'stsm-rt[live]'")
    server = HealthServer(metrics, 0)
    with closing(socket.create_connection(("127.0.0.1", server.port))):
        sleep(0.05)
        begin = monotonic()
        server.close()
        server.close()
        assert monotonic() - begin < 1
    with HealthServer(metrics, server.port):
        pass
    assert server.url == f"http://127.0.0.1:{server.port}"


def test_without_prometheus_client_it_says_how_to_install_it(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r"pip install 'stsm-rt\[live\]'"):
        HealthServer(metrics, 0)
    metrics.camera("front").frame()
    assert "running" in status_line(metrics)
