"""The WebSocket of the live half: results like a recognizer's, no backlog, and a civil end of every visit."""

from __future__ import annotations

import json
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import cv2
import numpy as np
import pytest
from clips import counted, number_of, plain

from stsm_rt.app.visitors import Visitors
from stsm_rt.recognizer import Recognizer

try:
    from live_server import choice, eventually, live_server, ticket
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import ClientConnection, connect

    from stsm_rt.app import live
except ModuleNotFoundError as missing:
    pytest.skip(f"pip install 'stsm-rt[ui]' ({missing.name} is missing)", allow_module_level=True)


@pytest.fixture
def visitors(tiny_engine: Any) -> Visitors:
    return Visitors([choice(tiny_engine)], most=2, idle=30.0)


@pytest.fixture
def address(visitors: Visitors) -> Iterator[str]:
    with live_server(visitors) as url:
        yield url


def jpeg(frame: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def message(picture: np.ndarray | bytes, time: float, dropped: int = 0) -> bytes:
    data = picture if isinstance(picture, bytes) else jpeg(picture)
    return struct.pack("<dI4x", time, dropped) + data


def hear(socket: ClientConnection) -> dict[str, Any]:
    return json.loads(socket.recv(timeout=10))


@contextmanager
def knock(address: str, **hello: Any) -> Iterator[ClientConnection]:
    """Come with a ticket and these settings."""
    with connect(f"ws{address[4:]}live", compression=None) as socket:
        socket.send(json.dumps({"ticket": ticket(address), "engine": None} | hello))
        yield socket


@contextmanager
def visit(address: str, **hello: Any) -> Iterator[ClientConnection]:
    """Come in."""
    with knock(address, **hello) as socket:
        assert hear(socket) == {"kind": "opening"}
        assert hear(socket)["kind"] == "ready"
        yield socket


def last_words(socket: ClientConnection) -> str:
    """What the server says before it closes the connection."""
    while (heard := hear(socket))["kind"] != "ended":
        pass
    with pytest.raises(ConnectionClosed):
        socket.recv(timeout=10)
    return str(heard["sentence"])


def test_the_answers_are_those_of_a_recognizer(tiny_engine: Any, address: str) -> None:
    frames = plain("black", 12) + plain("green", 20) + plain("black", 20)
    recognizer = Recognizer(tiny_engine.path, topk=5, threshold=0.5, smoothing=4)
    kinds = []
    with visit(address, engine="colours", threshold=0.5, smoothing=4) as socket:
        for i, frame in enumerate(frames):
            socket.send(message(frame, i / 20))
            answer, expected = (
                hear(socket),
                recognizer.update(cv2.imdecode(np.frombuffer(jpeg(frame), np.uint8), 1), i / 20),
            )
            if expected is None:
                assert answer == {"kind": "skipped"}
                continue
            assert 0 < answer.pop("latency") < 5
            record = expected.to_record() | {"events": [event.to_record() for event in expected.events]}
            del record["latency"]
            assert answer == json.loads(json.dumps(record))
            kinds += [(event["label"], event["end"] is None) for event in answer["events"]]
    assert kinds == [("green", True), ("green", False)]


def test_a_frame_that_the_network_need_not_see_is_not_decoded(address: str, monkeypatch: Any) -> None:
    decoded: list[int] = []
    decode = live._decode
    monkeypatch.setattr(live, "_decode", lambda data: decoded.append(number_of(decode(data))) or decode(data))
    with visit(address) as socket:
        for i, frame in enumerate(counted(9)):
            socket.send(message(frame, i / 30))
            hear(socket)
    assert decoded == [0, 3, 6]


def test_of_a_flood_the_newest_frame_wins_and_the_others_are_counted(address: str, monkeypatch: Any) -> None:
    seen: list[int] = []
    begun, go_on = threading.Event(), threading.Event()
    decode = live._decode

    def slow(data: bytes) -> np.ndarray:
        frame = decode(data)
        seen.append(number_of(frame))
        begun.set()
        assert go_on.wait(10)
        return frame

    monkeypatch.setattr(live, "_decode", slow)
    with visit(address) as socket:
        frames = counted(200)
        socket.send(message(frames[0], 0.0, dropped=5))
        assert begun.wait(10)
        for i in range(1, 200):
            socket.send(message(frames[i], i / 10, dropped=5))
        # A ping is answered when all before it has arrived.
        assert socket.ping().wait(10)
        sleep(0.3)
        go_on.set()
        first, second = hear(socket), hear(socket)
        assert (first["dropped"], second["dropped"]) == (5, 5 + 198)
        assert second["time"] == 19.9 and seen == [0, 199]
        with pytest.raises(TimeoutError):
            socket.recv(timeout=0.2)


def test_leaving_frees_the_slot(visitors: Visitors, address: str) -> None:
    with visit(address) as socket, visit(address):
        socket.send(message(plain("red", 1)[0], 0.0))
        hear(socket)
        assert visitors.status.slots == 2
    eventually(lambda: (visitors.status.slots, visitors.status.inside) == (0, 0))


def test_a_connection_that_breaks_during_a_step_frees_the_slot(
    visitors: Visitors, address: str, monkeypatch: Any
) -> None:
    begun = threading.Event()
    conclude = Recognizer.conclude
    monkeypatch.setattr(
        Recognizer, "conclude", lambda self, prepared: begun.set() or sleep(0.5) or conclude(self, prepared)
    )
    with visit(address) as socket:
        socket.send(message(plain("red", 1)[0], 0.0))
        assert begun.wait(10)
        socket.socket.close()
        assert visitors.status.slots == 1
        eventually(lambda: (visitors.status.slots, visitors.status.inside) == (0, 0))


def test_who_waits_is_told_the_place_and_enters_without_asking(visitors: Visitors, address: str) -> None:
    with visit(address) as first, visit(address) as second, knock(address) as third:
        assert hear(third) == {"kind": "waiting", "position": 1}
        with knock(address) as fourth:
            assert hear(fourth) == {"kind": "waiting", "position": 2}
            with knock(address) as fifth:
                assert hear(fifth) == {"kind": "waiting", "position": 3}
                fourth.close()
                assert hear(fifth) == {"kind": "waiting", "position": 2}
                first.close()
                assert [hear(third)["kind"] for _ in range(2)] == ["opening", "ready"]
                assert hear(fifth) == {"kind": "waiting", "position": 1}
                second.close()
                assert [hear(fifth)["kind"] for _ in range(2)] == ["opening", "ready"]
    eventually(lambda: (visitors.status.inside, visitors.status.waiting) == (0, 0))


def test_who_sends_nothing_gives_up_the_place(tiny_engine: Any) -> None:
    visitors = Visitors([choice(tiny_engine)], most=1, idle=0.3)
    with live_server(visitors) as address, visit(address) as socket:
        begin = monotonic()
        assert "no frame came for 0.3 s" in last_words(socket)
        assert 0.2 < monotonic() - begin < 5
        eventually(lambda: visitors.status.inside == 0)


def test_a_ticket_is_needed_and_good_once(address: str) -> None:
    used = ticket(address)
    with visit(address, ticket=used):
        pass
    for bad in (used, "made up"):
        with knock(address, ticket=bad) as socket:
            assert "used up or too old" in last_words(socket)


def test_tickets_are_for_those_whom_the_guard_lets_in(visitors: Visitors) -> None:
    with live_server(visitors, lambda request: request.cookies.get("name") == "alice") as address:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ticket(address)
        request = urllib.request.Request(f"{address}live/ticket", headers={"Cookie": "name=alice"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["ticket"] and answer.headers["Cache-Control"] == "no-store"


def test_pages_of_other_hosts_are_refused(address: str) -> None:
    url = f"ws{address[4:]}live"
    with pytest.raises(InvalidStatus, match="403"), connect(url, origin="https://elsewhere.example"):  # type: ignore[arg-type]
        pass
    with connect(url, origin=address.rstrip("/")):  # type: ignore[arg-type]
        pass
    behind_proxy = {"X-Forwarded-Host": "watch.example:8443"}
    with connect(url, origin="https://watch.example", additional_headers=behind_proxy):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    "hello",
    ["", "not JSON", "[]", "null", "{}", '{"ticket": 1}', '{"ticket": "a", "threshold": []}', b"\x00", "[" * 99999],
)
def test_a_first_message_without_sense_is_refused(visitors: Visitors, address: str, hello: str | bytes) -> None:
    with connect(f"ws{address[4:]}live") as socket:
        socket.send(hello)
        assert "first message" in last_words(socket)
    assert visitors.status.inside == 0


def test_who_never_shows_a_ticket_is_sent_away(address: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(live, "_HELLO_SECONDS", 0.2)
    with connect(f"ws{address[4:]}live") as socket:
        assert "no ticket came" in last_words(socket)


@pytest.mark.parametrize(
    ("hello", "sentence"),
    [
        ({"engine": "colors"}, "no engine 'colors'"),
        ({"threshold": 2}, "threshold must be between 0 and 1"),
        ({"smoothing": 0}, "smoothing must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    visitors: Visitors, address: str, hello: dict[str, Any], sentence: str
) -> None:
    with knock(address, **hello) as socket:
        assert sentence in last_words(socket)
    eventually(lambda: (visitors.status.slots, visitors.status.inside) == (0, 0))


def large(width: int, height: int) -> bytes:
    """A small picture that says it is larger."""
    data = jpeg(plain("red", 1)[0])
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


BAD: dict[str, tuple[Callable[[], str | bytes], str]] = {
    "text": (lambda: "a frame", "this one was text"),
    "empty": (lambda: b"", "this one is not"),
    "only a header": (lambda: message(b"", 0.0), "this one is not"),
    "PNG": (lambda: message(cv2.imencode(".png", plain("red", 1)[0])[1].tobytes(), 0.0), "this one is not"),
    "only the first bytes of a JPEG": (lambda: message(b"\xff\xd8\xff", 0.0), "can be decoded"),
    "headers without an end": (lambda: message(b"\xff\xd8" + b"\xff\xe0\x00\x00" * 9, 0.0), "can be decoded"),
    "noise after a good beginning": (lambda: message(jpeg(plain("red", 1)[0])[:200] + b"\xff\xd9", 0.0), "decoded"),
    "too many bytes": (lambda: message(jpeg(plain("red", 1)[0]) + bytes(2 << 20), 0.0), "up to 2 MB"),
    "too wide": (lambda: message(large(1921, 1080), 0.0), "up to 1920x1080 pixels, this one has 1921x1080"),
    "a bomb": (lambda: message(large(65000, 65000), 0.0), "up to 1920x1080 pixels"),
    "a size hidden from us": (
        lambda: message(b"\xff\xd8\xff\xd0" + jpeg(plain("red", 1)[0])[2:], 0.0),
        "can be decoded",
    ),
    "no time": (lambda: message(plain("red", 1)[0], float("nan")), "finite number of seconds"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_ends_the_visit_with_a_sentence(visitors: Visitors, address: str, kind: str) -> None:
    make, sentence = BAD[kind]
    with visit(address) as socket:
        socket.send(make())
        assert sentence in last_words(socket)
    eventually(lambda: (visitors.status.slots, visitors.status.inside) == (0, 0))


def test_a_portrait_of_a_phone_is_not_too_high(address: str) -> None:
    with visit(address) as socket:
        socket.send(message(plain("red", 1, (1080, 1920))[0], 0.0))
        assert hear(socket)["label"] == "red"


def test_what_nobody_expected_is_no_riddle_to_the_visitor(visitors: Visitors, address: str, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Recognizer, "conclude", fail)
    with visit(address) as socket:
        socket.send(message(plain("red", 1)[0], 0.0))
        sentence = last_words(socket)
    assert "something went wrong on the server" in sentence and "secret" not in sentence
    eventually(lambda: (visitors.status.slots, visitors.status.inside) == (0, 0))


def test_two_visitors_at_once_do_not_mix(tiny_engine: Any, address: str) -> None:
    got: dict[str, list[Any]] = {}

    def watch(colour: str) -> None:
        with visit(address) as socket:
            got[colour] = []
            for i in range(40):
                socket.send(message(plain(colour, 1)[0], i / 10))
                got[colour].append(hear(socket))

    threads = [threading.Thread(target=watch, args=(colour,)) for colour in ("blue", "red")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for colour in ("blue", "red"):
        recognizer = Recognizer(tiny_engine.path)
        frame = cv2.imdecode(np.frombuffer(jpeg(plain(colour, 1)[0]), np.uint8), 1)
        expected = [recognizer.update(frame, i / 10) for i in range(40)]
        assert [answer["scores"][:3] for answer in got[colour]] == [
            list(result.scores) for result in expected if result
        ]
        assert [event["label"] for answer in got[colour] for event in answer["events"]] == [colour]
