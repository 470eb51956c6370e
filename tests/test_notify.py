"""Events for other machines: a real HTTP server that fails, hangs and recovers, and a real MQTT broker."""

from __future__ import annotations

import json
import math
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from required import required_module, required_program

from stsm_rt import delivery, notify
from stsm_rt.decision import Event
from stsm_rt.delivery import Delivery
from stsm_rt.errors import UserError
from stsm_rt.notify import Mqtt, Webhook

SECRET = "s3cret"
PAHO = "pip install 'stsm-rt[live]'"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_FIRST_DELAY", 0.02)


def event(number: int) -> dict[str, Any]:
    return Event("wäve", float(number), None, 0.9, number).to_record()


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not happen"
        sleep(0.01)


def dead_letters(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody knows, and its key."""
    required_program("openssl", "apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    made = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
    ]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *made, *names], check=True, capture_output=True)
    return certificate, key


class Endpoint:
    """An HTTP server on loopback that answers what it is told to, the last answer for good.

    An answer is a status, a status with headers, ``"cut"`` (the connection is closed without a word) or an event that
    is waited for before 204 is sent.
    """

    def __init__(self, *answers: Any, port: int = 0, certificate: tuple[Path, Path] | None = None) -> None:
        self.answers = list(answers) or [204]
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append((self.path, dict(self.headers), json.loads(body)))
                answer = endpoint.answers.pop(0) if len(endpoint.answers) > 1 else endpoint.answers[0]
                if answer == "cut":
                    self.close_connection = True
                    return
                if isinstance(answer, threading.Event):
                    answer.wait(30)
                    answer = 204
                status, headers = answer if isinstance(answer, tuple) else (answer, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?key={SECRET}"

    def received(self) -> list[Any]:
        return [body for _, _, body in self.requests]


def test_events_arrive_in_order_as_json(tmp_path: Path) -> None:
    with Endpoint() as endpoint, Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl") as hook:
        for number in range(5):
            hook.put(event(number))
        wait_for(lambda: hook.delivered == 5)
    assert endpoint.received() == [event(number) for number in range(5)]
    path, headers, _ = endpoint.requests[0]
    assert path == f"/hook?key={SECRET}" and headers["Content-Type"] == "application/json"
    assert len({headers["Idempotency-Key"] for _, headers, _ in endpoint.requests}) == 5
    assert not (tmp_path / "dead.jsonl").exists()


def test_a_password_in_the_address_is_sent_as_basic_authentication_and_never_said(tmp_path: Path) -> None:
    said: list[str] = []
    with Endpoint(403) as endpoint:
        url = endpoint.url.replace("http://", f"http://me:{SECRET}@")
        with Webhook(url, dead_letters=tmp_path / "dead.jsonl", say=said.append) as hook:
            hook.put(event(1))
            wait_for(lambda: hook.undelivered)
    _, headers, _ = endpoint.requests[0]
    assert headers["Authorization"] == "Basic bWU6czNjcmV0" and SECRET not in headers["Host"]
    assert said and SECRET not in "".join(said) + (tmp_path / "dead.jsonl").read_text()


@pytest.mark.parametrize("failure", [500, 503, 429, 408, "cut"])
def test_what_may_pass_is_tried_again_and_said_once(tmp_path: Path, failure: Any) -> None:
    said: list[str] = []
    with (
        Endpoint(failure, failure, failure, 204) as endpoint,
        Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl", say=said.append) as hook,
    ):
        hook.put(event(1))
        hook.put(event(2))
        wait_for(lambda: hook.delivered == 2)
    assert endpoint.received() == [event(1)] * 4 + [event(2)]
    assert len({headers["Idempotency-Key"] for _, headers, _ in endpoint.requests[:4]}) == 1
    assert len(said) == 2 and "they are kept and tried again" in said[0] and said[1].endswith("takes events again")
    assert dead_letters(tmp_path / "dead.jsonl") == []


@pytest.mark.parametrize("status", [400, 401, 404, 410, 301, 303, 307])
def test_a_refusal_is_not_tried_again(tmp_path: Path, status: int) -> None:
    said: list[str] = []
    with (
        Endpoint((status, {"Location": "/elsewhere"}), 204) as endpoint,
        Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl", say=said.append) as hook,
    ):
        hook.put(event(1))
        hook.put(event(2))
        wait_for(lambda: hook.delivered)
    assert endpoint.received() == [event(1), event(2)]
    (letter,) = dead_letters(tmp_path / "dead.jsonl")
    assert letter["record"] == event(1) and f"HTTP {status}" in letter["reason"] and letter["kind"] == "undelivered"
    assert (hook.delivered, hook.undelivered, hook.lost) == (1, 1, 0)
    assert len(said) == 2 and "refuses events" in said[0]


def test_the_other_side_says_how_long_to_wait(tmp_path: Path) -> None:
    with (
        Endpoint((503, {"Retry-After": "1"}), 204) as endpoint,
        Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl") as hook,
    ):
        hook.put(event(1))
        wait_for(lambda: endpoint.requests)
        begin = monotonic()
        wait_for(lambda: hook.delivered)
    assert monotonic() - begin > 0.8


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("9" * 400, math.inf),
    ],
)
def test_retry_after_is_read_or_ignored(header: str | None, seconds: float | None) -> None:
    assert notify._seconds(header) == seconds


def test_an_endpoint_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_TIMEOUT", 0.3)
    release = threading.Event()
    said: list[str] = []
    with Endpoint(release, 204) as endpoint:
        with Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl", say=said.append) as hook:
            begin = monotonic()
            for number in range(500):
                hook.put(event(number))
            assert monotonic() - begin < 0.3, "whoever puts must not wait"
            wait_for(lambda: hook.delivered >= 10)
        release.set()
    assert "timed out" in said[0]


def test_an_endpoint_comes_back(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    said: list[str] = []
    with Webhook(f"http://127.0.0.1:{port}/", dead_letters=tmp_path / "dead.jsonl", say=said.append) as hook:
        hook.put(event(1))
        wait_for(lambda: said)
        assert "Connection refused" in said[0] and hook.delivered == 0
        with Endpoint(port=port) as endpoint:
            wait_for(lambda: len(said) == 2)
            assert endpoint.received() == [event(1)]
    assert not (tmp_path / "dead.jsonl").exists()


def test_when_too_many_wait_the_oldest_go_to_the_dead_letters(tmp_path: Path) -> None:
    path, release = tmp_path / "dead.jsonl", threading.Event()
    with Endpoint(release, 204) as endpoint, Webhook(endpoint.url, dead_letters=path, capacity=3) as hook:
        hook.put(event(0))
        wait_for(lambda: endpoint.requests)  # the first is under way
        for number in range(1, 7):
            hook.put(event(number))
        release.set()
        wait_for(lambda: hook.delivered + hook.undelivered == 7)
    assert endpoint.received() == [event(number) for number in (0, 4, 5, 6)]
    letters = dead_letters(path)
    assert [letter["record"] for letter in letters] == [event(number) for number in (1, 2, 3)]
    assert all("more than 3 events waited" in letter["reason"] for letter in letters)


def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with Endpoint(500) as endpoint, Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl", patience=0.3) as hook:
        for number in range(3):
            hook.put(event(number))
        wait_for(lambda: hook.undelivered == 3)
    assert [letter["record"] for letter in dead_letters(tmp_path / "dead.jsonl")] == [event(n) for n in range(3)]


@pytest.mark.parametrize("answer", [500, "hangs"])
def test_the_end_of_the_run_waits_a_little_and_loses_nothing(tmp_path: Path, answer: Any) -> None:
    release = threading.Event()
    path = tmp_path / "dead.jsonl"
    with Endpoint(release if answer == "hangs" else answer) as endpoint:
        hook = Webhook(endpoint.url, dead_letters=path)
        for number in range(4):
            hook.put(event(number))
        wait_for(lambda: endpoint.requests)
        begin = monotonic()
        hook.close()
        assert monotonic() - begin < 1.8
        hook.close()
        hook.put(event(4))
        assert [letter["record"] for letter in dead_letters(path)] == [event(number) for number in range(5)]
        release.set()
    assert (hook.delivered, hook.undelivered, hook.lost) == (0, 5, 0)


def test_whoever_cannot_hear_what_is_said_does_not_end_the_delivery(tmp_path: Path) -> None:
    def deaf(line: str) -> None:
        raise OSError(28, "No space left on device")

    with (
        Endpoint(500, 400, 204) as endpoint,
        Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl", say=deaf) as hook,
    ):
        for number in range(3):
            hook.put(event(number))
        wait_for(lambda: hook.delivered == 2)
    assert (hook.undelivered, hook.lost) == (1, 0)


def test_the_end_of_the_run_delivers_what_waits(tmp_path: Path) -> None:
    with Endpoint() as endpoint:
        with Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl") as hook:
            for number in range(20):
                hook.put(event(number))
        assert len(endpoint.requests) == 20 and hook.delivered == 20


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_dead_letters_that_cannot_be_written_are_counted(tmp_path: Path) -> None:
    (tmp_path / "dead.jsonl").symlink_to("/dev/full")
    said: list[str] = []
    with (
        Endpoint(400) as endpoint,
        Webhook(endpoint.url, dead_letters=tmp_path / "dead.jsonl", say=said.append) as hook,
    ):
        hook.put(event(1))
        hook.put(event(2))
        wait_for(lambda: hook.lost == 2)
    assert [line for line in said if "undelivered events are lost" in line and "No space left" in line] == said[1:]


def test_a_webhook_goes_over_tls_to_who_can_show_a_certificate(
    tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with Endpoint(certificate=certificate) as endpoint:
        url = endpoint.url.replace("http://", "https://")
        with Webhook(url, dead_letters=tmp_path / "dead.jsonl", say=said.append) as hook:
            hook.put(event(1))
            wait_for(lambda: said)
        assert "certificate verify failed" in said[0] and endpoint.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with Webhook(url, dead_letters=tmp_path / "dead.jsonl", say=said.append) as hook:
            hook.put(event(2))
            wait_for(lambda: hook.delivered)
    assert endpoint.received() == [event(2)]
    assert [letter["record"] for letter in dead_letters(tmp_path / "dead.jsonl")] == [event(1)]


@pytest.mark.parametrize(
    ("make", "url", "sentence"),
    [
        (Webhook, "ftp://host/x", "begins with http:// or https://"),
        (Webhook, "host/x", "begins with http://"),
        (Webhook, "http:///x", "begins with http://"),
        (Webhook, "http://host:99999/x", "begins with http://"),
        (Webhook, "http://host/a b", "begins with http://"),
        (Mqtt, "http://host/topic", "begins with mqtt:// or mqtts://"),
        (Mqtt, "mqtt://host", "needs a topic"),
        (Mqtt, "mqtt://host/all/%23", "needs a topic without"),
    ],
)
def test_an_address_that_is_none_is_refused(tmp_path: Path, make: type[Delivery], url: str, sentence: str) -> None:
    if make is Mqtt:
        required_module("paho.mqtt.client", PAHO)
    with pytest.raises(UserError, match=sentence):
        make(url.replace("//host", f"//me:{SECRET}@host"), dead_letters=tmp_path / "dead.jsonl")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whose folder cannot be written to"):
        Webhook("http://host/", dead_letters=tmp_path / "absent" / "dead.jsonl")


# MQTT


class Broker:
    """A mosquitto on loopback that wants a password, and what came to a topic of it."""

    def __init__(self, folder: Path, certificate: tuple[Path, Path]) -> None:
        self.folder = folder
        with closing(socket.create_server(("127.0.0.1", 0))) as one, closing(socket.create_server(("", 0))) as other:
            self.port, self.secure_port = one.getsockname()[1], other.getsockname()[1]
        self.url = f"mqtt://me:{SECRET}@127.0.0.1:{self.port}/house/events"
        subprocess.run(["mosquitto_passwd", "-b", "-c", str(folder / "passwords"), "me", SECRET], check=True)
        (folder / "passwords").chmod(0o644)
        owner = "user root\n" if os.geteuid() == 0 else ""
        (folder / "broker.conf").write_text(
            f"{owner}listener {self.port} 127.0.0.1\nallow_anonymous false\npassword_file {folder}/passwords\n"
            f"listener {self.secure_port} 127.0.0.1\ncertfile {certificate[0]}\nkeyfile {certificate[1]}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["mosquitto", "-c", str(self.folder / "broker.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self.answers)

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @contextmanager
    def listening(self) -> Iterator[list[Any]]:
        """Collect what comes to the topic."""
        from paho.mqtt import client as paho

        received: list[Any] = []
        subscribed = threading.Event()
        client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        client.username_pw_set("me", SECRET)
        client.reconnect_delay_set(1, 1)
        client.on_connect = lambda client, *_: client.subscribe("house/events", qos=1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda client, data, message: received.append(json.loads(message.payload))
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        assert subscribed.wait(10)
        try:
            yield received
        finally:
            client.disconnect()
            client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    required_module("paho.mqtt.client", PAHO)
    monkeypatch.setenv("PATH", os.environ["PATH"] + os.pathsep + "/usr/sbin")
    required_program("mosquitto", "apt-get install mosquitto")
    broker = Broker(tmp_path, certificate)
    broker.start()
    yield broker
    broker.stop()


def test_a_broker_gets_the_events(broker: Broker, tmp_path: Path) -> None:
    with broker.listening() as received, Mqtt(broker.url, dead_letters=tmp_path / "dead.jsonl") as mqtt:
        for number in range(10):
            mqtt.put(event(number))
        wait_for(lambda: len(received) == 10)
    assert received == [event(number) for number in range(10)]
    assert mqtt.name == f"mqtt://127.0.0.1:{broker.port}" and mqtt.delivered == 10


def test_a_broker_that_was_killed_gets_the_events_when_it_is_back(broker: Broker, tmp_path: Path) -> None:
    said: list[str] = []
    with Mqtt(broker.url, dead_letters=tmp_path / "dead.jsonl", say=said.append) as mqtt:
        mqtt.put(event(0))
        wait_for(lambda: mqtt.delivered == 1)
        broker.stop()
        for number in range(1, 4):
            mqtt.put(event(number))
        wait_for(lambda: said)
        assert "they are kept and tried again" in said[0] and mqtt.delivered == 1
        broker.start()
        with broker.listening():
            wait_for(lambda: mqtt.delivered == 4)
        wait_for(lambda: len(said) == 2)
    assert said[1].endswith("takes events again")
    assert dead_letters(tmp_path / "dead.jsonl") == []


def test_a_broker_gets_events_over_tls_when_its_certificate_is_known(
    broker: Broker, tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = broker.url.replace("mqtt://", "mqtts://").replace(str(broker.port), str(broker.secure_port))
    said: list[str] = []
    with Mqtt(url, dead_letters=tmp_path / "dead.jsonl", say=said.append):
        wait_for(lambda: said)
    assert "certificate verify failed" in said[0]
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with broker.listening() as received, Mqtt(url, dead_letters=tmp_path / "dead.jsonl") as mqtt:
        mqtt.put(event(1))
        wait_for(lambda: received == [event(1)])
        wait_for(lambda: mqtt.delivered)


def test_a_wrong_password_is_said_without_it(broker: Broker, tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "dead.jsonl"
    with Mqtt(broker.url.replace(SECRET, SECRET + "x"), dead_letters=path, say=said.append) as mqtt:
        wait_for(lambda: said)
        mqtt.put(event(1))
    assert "Not authorized" in said[0] and len(said) == 1 and SECRET not in said[0]
    (letter,) = dead_letters(path)
    assert letter["record"] == event(1) and SECRET not in path.read_text()


def test_a_broker_that_says_nothing_holds_nobody_up(tmp_path: Path) -> None:
    required_module("paho.mqtt.client", PAHO)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        mqtt = Mqtt(f"mqtt://127.0.0.1:{silent.getsockname()[1]}/events", dead_letters=tmp_path / "dead.jsonl")
        mqtt.put(event(1))
        begin = monotonic()
        mqtt.close()
        assert monotonic() - begin < 1.8
    assert [letter["record"] for letter in dead_letters(tmp_path / "dead.jsonl")] == [event(1)]


def test_an_idle_connection_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    required_module("paho.mqtt.client", PAHO)
    monkeypatch.setattr(notify, "_KEEP_ALIVE", 1)
    monkeypatch.setattr(delivery, "_IDLE", 0.1)
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as server,
        Mqtt(f"mqtt://127.0.0.1:{server.getsockname()[1]}/events", dead_letters=tmp_path / "dead.jsonl"),
        closing(server.accept()[0]) as connection,
    ):
        connection.settimeout(10)
        assert connection.recv(1000)[0] >> 4 == 1  # CONNECT
        connection.sendall(b"\x20\x02\0\0")  # CONNACK: welcome
        assert connection.recv(1000) == b"\xc0\0"  # PINGREQ: a broker ends a connection that is silent for too long
