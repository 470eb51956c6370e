"""A served page, Chromium to look at it with, and a clip in which somebody walks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import needed, serving


@pytest.fixture(scope="session")
def browser_type() -> Iterator[Any]:
    """Playwright's Chromium, whose ``launch`` takes Debian's."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        needed(False, "the browser's tests need Playwright: pip install playwright")
    needed(shutil.which("chromium"), "the browser's tests need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium


@pytest.fixture(scope="session")
def launch(browser_type: Any) -> Callable[..., Any]:
    """A function that starts Chromium with further arguments."""

    def start(*arguments: str) -> Any:
        return browser_type.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", *arguments])

    return start


@pytest.fixture(scope="session")
def browser(launch: Callable[..., Any]) -> Iterator[Any]:
    """A Chromium for pages that need no camera."""
    chromium = launch()
    yield chromium
    chromium.close()


@pytest.fixture(scope="session")
def page_address() -> Iterator[str]:
    """The page with the shipped engines."""
    with serving() as address:
        yield address


@pytest.fixture(scope="session")
def walking_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of the sample clip in which a woman walks, H.264 at the clip's times."""
    import av

    from stsm_rt.errors import UserError
    from stsm_rt.video.sample import sample_clip
    from stsm_rt.video.sources import open_source

    try:
        clip = sample_clip()
    except UserError as error:
        needed(False, str(error))
    path = tmp_path_factory.mktemp("walking") / "walking.mp4"
    x, y, width, height = clip.roi
    with open_source(clip.path) as source, av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(source.frame_rate or 30), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        for frame, _ in source:
            part = frame[y : y + stream.height, x : x + stream.width].copy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="bgr24")))
        container.mux(stream.encode())
    return path
