"""A server of the live half alone, and a page with nothing but its panel."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

import stsm_rt.app
from stsm_rt.app.engines import EngineChoice
from stsm_rt.app.live import add_live
from stsm_rt.app.visitors import Visitors
from stsm_rt.manifest import Manifest

_STATIC = Path(stsm_rt.app.__file__).parent / "static"


def choice(engine: Any, title: str = "colours") -> EngineChoice:
    """An engine on disk, as the page finds it."""
    path = Path(getattr(engine, "path", engine))
    return EngineChoice(path, title, Manifest.load(path))


@contextmanager
def live_server(visitors: Visitors, guard: Callable[[Request], bool] | None = None) -> Iterator[str]:
    """Serve the panel; yields the address with a slash at its end."""
    app = FastAPI()
    add_live(app, visitors, guard)
    app.add_api_route("/", _page, response_class=HTMLResponse)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def ticket(address: str) -> str:
    with urllib.request.urlopen(f"{address}live/ticket") as answer:
        return str(json.load(answer)["ticket"])


def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until something is so."""
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, f"not within {seconds} s"
        sleep(0.01)


def _page() -> str:
    html, css, js = ((_STATIC / f"live.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>live</title><style>:root {{ color-scheme: light dark; font-family: sans-serif }}{css}</style>"
        f"<body>{html}<script>{js}</script></body></html>"
    )
