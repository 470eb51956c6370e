"""The live half of the page: a WebSocket that takes a camera's frames and answers with what is recognized.

The page fetches a ticket, ``GET live/ticket`` -> ``{"ticket": ...}``, and opens the WebSocket ``live``. It sends one
text message, ``{"ticket", "engine", "threshold", "smoothing"}``, where null means the default, and is told in text
messages

- ``{"kind": "waiting", "position"}`` where all places are taken: 1 for who comes next. It enters by itself;
- ``{"kind": "opening"}`` when it has a place, and once the engine is open
- ``{"kind": "ready", "threshold", "aspect"}``: the score at which events start, and width divided by height of the part
  in the middle of each frame that the network sees.

From then on it sends frames, each a binary message: the time of capture in seconds (float64), how many frames it has
dropped so far (uint32) and 4 bytes of zero, little-endian, then a JPEG picture that is not mirrored. The answer is

- ``{"kind": "result", ..., "events": [...]}``: ``Result.to_record()`` and the records of the events, or
- ``{"kind": "skipped"}`` for a frame that the network need not see to keep to the model's frame rate.

A browser sends its next frame when it has the answer. Of one that does not wait the newest frame is taken, the others
count as dropped and are not answered. Before the server closes the connection it says why, in
``{"kind": "ended", "sentence"}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse

from stsm_rt.app.visitors import Visit, Visitors
from stsm_rt.errors import UserError
from stsm_rt.result import Result
from stsm_rt.video.source import Frame

_HEADER = struct.Struct("<dI4x")
_MOST_BYTES = 2 << 20
_LONGER_SIDE, _SHORTER_SIDE = 1920, 1080
_HELLO_SECONDS = 10.0
_POLICY_VIOLATION = 1008
# What begins a JPEG's frame, by which the decoder allocates: SOF0 to SOF15 without DHT, JPG and DAC.
_START_OF_FRAME = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers that no length follows, and what fills up: none stands before the frame in what a browser encodes, and a
# decoder would read on where we do not.
_WITHOUT_LENGTH = {0x01, 0xFF, *range(0xD0, 0xDA)}
_MOST_SMOOTHING = 100

_log = logging.getLogger(__name__)


def add_live(app: FastAPI, visitors: Visitors, guard: Callable[[Request], bool] | None = None) -> None:
    """Add the WebSocket ``/live`` and ``/live/ticket``, which hands out the tickets for it.

    Args:
        app: The app that serves the page.
        visitors: Who lets visitors in.
        guard: Whether somebody may have a ticket; None means everybody.
    """

    def ticket(request: Request) -> JSONResponse:
        if guard is not None and not guard(request):
            return JSONResponse({"detail": "log in first"}, status_code=401)
        try:
            return JSONResponse({"ticket": visitors.ticket()}, headers={"Cache-Control": "no-store"})
        except UserError as error:
            return JSONResponse({"detail": str(error)}, status_code=503)

    async def live(socket: WebSocket) -> None:
        if _is_foreign(socket):
            await socket.close(_POLICY_VIOLATION)
            return
        await socket.accept()
        await _serve(socket, visitors)

    app.add_api_route("/live/ticket", ticket, include_in_schema=False)
    app.add_api_websocket_route("/live", live)


def _is_foreign(socket: WebSocket) -> bool:
    """Whether a page of another host opened the connection; who is not a browser says nothing about that."""
    origin = socket.headers.get("origin")
    # A proxy may give its own name as the host; a page cannot set either header.
    hosts = (socket.headers.get("host"), socket.headers.get("x-forwarded-host"))
    return origin is not None and urlsplit(origin).hostname not in {
        urlsplit(f"//{host}").hostname for host in hosts if host
    }


async def _serve(socket: WebSocket, visitors: Visitors) -> None:
    """Serve an open connection, and say why it is closed where that is not the browser's own doing."""
    try:
        await _receive_visitor(socket, visitors)
    except WebSocketDisconnect:
        return
    except UserError as error:
        sentence = str(error)
    except Exception:
        _log.exception("a live visit failed")
        sentence = "something went wrong on the server; press Start to try again"
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await socket.send_json({"kind": "ended", "sentence": sentence})
        await socket.close(_POLICY_VIOLATION)


async def _receive_visitor(socket: WebSocket, visitors: Visitors) -> None:
    hello = await _Hello.receive(socket)
    if not visitors.redeem(hello.ticket):
        raise UserError("this ticket is used up or too old; reload the page")
    loop, moved = asyncio.get_running_loop(), asyncio.Event()
    visit = visitors.enter(
        hello.engine,
        threshold=hello.threshold,
        smoothing=hello.smoothing,
        moved=lambda: loop.call_soon_threadsafe(moved.set),
    )
    inbox = _Inbox()
    tasks = [
        asyncio.create_task(inbox.fill(socket)),
        asyncio.create_task(_answer(socket, visit, inbox, moved, visitors.idle)),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        visit.leave()
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        # A disconnection comes first, for answers fail after it.
        if isinstance(outcome, Exception):
            raise outcome


async def _answer(socket: WebSocket, visit: Visit, inbox: _Inbox, moved: asyncio.Event, idle: float) -> None:
    await _wait_in_line(socket, visit, moved)
    await socket.send_json({"kind": "opening"})
    await asyncio.to_thread(visit.open)
    await socket.send_json({"kind": "ready", "threshold": visit.threshold, "aspect": visit.aspect})
    while True:
        try:
            picture = await asyncio.wait_for(inbox.take(), idle)
        except asyncio.TimeoutError:
            raise UserError(f"no frame came for {idle:g} s, so the place was given up; press Start to go on") from None
        result = await asyncio.to_thread(_look, visit, picture)
        await socket.send_json({"kind": "skipped"} if result is None else _record(result))


async def _wait_in_line(socket: WebSocket, visit: Visit, moved: asyncio.Event) -> None:
    told = 0
    while True:
        moved.clear()
        position = visit.waiting
        if not position:
            return
        if position != told:
            await socket.send_json({"kind": "waiting", "position": position})
            told = position
        await moved.wait()


def _record(result: Result) -> dict[str, Any]:
    return result.to_record() | {"events": [event.to_record() for event in result.events]}


class _Picture(NamedTuple):
    """A frame that has arrived; ``dropped`` counts those before it that were not looked at."""

    jpeg: bytes
    time: float
    dropped: int
    arrived: float

    @classmethod
    def parse(cls, message: bytes | None) -> _Picture:
        if message is None:
            raise UserError("after its first message a browser sends frames, binary messages; this one was text")
        if len(message) > _MOST_BYTES:
            raise UserError(
                f"a frame may have up to {_MOST_BYTES >> 20} MB; this one has {len(message) / 2**20:.1f} MB"
            )
        if message[_HEADER.size : _HEADER.size + 3] != b"\xff\xd8\xff":
            raise UserError("a frame must be 16 bytes of header and a JPEG picture; this one is not")
        time, dropped = _HEADER.unpack_from(message)
        return cls(message[_HEADER.size :], time, dropped, perf_counter())


class _Inbox:
    """What has arrived and was not looked at: the newest frame only, so that nothing piles up."""

    def __init__(self) -> None:
        self._newest: _Picture | None = None
        self._arrival = asyncio.Event()
        self._dropped = 0

    async def fill(self, socket: WebSocket) -> None:
        """Read until the connection ends, which is raised."""
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            picture = _Picture.parse(message.get("bytes"))
            self._dropped += self._newest is not None
            self._newest = picture
            self._arrival.set()

    async def take(self) -> _Picture:
        """Wait for a frame, and take the newest."""
        await self._arrival.wait()
        self._arrival.clear()
        newest, self._newest = self._newest, None
        assert newest is not None
        return newest._replace(dropped=newest.dropped + self._dropped)


@dataclass(frozen=True)
class _Hello:
    """The first message of a browser."""

    ticket: str
    engine: str | None
    threshold: float | None
    smoothing: int | None

    @classmethod
    async def receive(cls, socket: WebSocket) -> _Hello:
        try:
            message = await asyncio.wait_for(socket.receive(), _HELLO_SECONDS)
        except asyncio.TimeoutError:
            raise UserError(f"no ticket came within {_HELLO_SECONDS:g} s; reload the page") from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"])
        try:
            data = json.loads(message.get("text") or "")
            ticket, engine = data["ticket"], data.get("engine")
            threshold, smoothing = data.get("threshold"), data.get("smoothing")
            if smoothing is not None and int(smoothing) > _MOST_SMOOTHING:
                raise ValueError
            if not isinstance(ticket, str) or not (engine is None or isinstance(engine, str)):
                raise TypeError
            return cls(
                ticket,
                engine,
                None if threshold is None else float(threshold),
                None if smoothing is None else int(smoothing),
            )
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            raise UserError(
                "the first message must be JSON with the ticket and the settings; reload the page"
            ) from None


def _look(visit: Visit, picture: _Picture) -> Result | None:
    """Show a frame to the recognizer; a picture that it need not see is not decoded."""
    frame = _decode(picture.jpeg) if visit.wants(picture.time) else None
    return visit.update(frame, picture.time, arrived=picture.arrived, dropped=picture.dropped)


def _decode(jpeg: bytes) -> Frame:
    """Decode a picture, uint8 (H, W, 3), BGR, after a look at how large it says it is."""
    size = _declared_size(jpeg)
    if size is not None and (max(size) > _LONGER_SIDE or min(size) > _SHORTER_SIDE):
        raise UserError(
            f"a frame may have up to {_LONGER_SIDE}x{_SHORTER_SIDE} pixels, this one has {size[0]}x{size[1]}; "
            "send smaller ones"
        )
    image = None
    if size is not None:
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise UserError("a frame is not a JPEG picture that can be decoded; reload the page")
    return np.asarray(image, np.uint8)


def _declared_size(jpeg: bytes) -> tuple[int, int] | None:
    """Width and height in pixels as a JPEG's header has them (ITU-T T.81, B.2.2), or None."""
    at = 2
    while at + 9 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] not in _WITHOUT_LENGTH:
        length, _, height, width = struct.unpack_from(">HBHH", jpeg, at + 2)
        if jpeg[at + 1] in _START_OF_FRAME:
            return width, height
        at += 2 + length
    return None
