"""The panel in real Chromium, whose camera plays clips of ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import cv2
import numpy as np
import pytest
from clips import plain

from stsm_rt.app.visitors import Visitors
from stsm_rt.engine import embedded_engine
from stsm_rt.playback import read_clips
from stsm_rt.recognizer import Recognizer
from stsm_rt.video.sources import open_source

_NEEDED = "the tests with a browser need `apt-get install chromium` and `pip install playwright 'stsm-rt[ui]'`"
try:
    import av
    from live_server import choice, eventually, live_server
    from playwright.sync_api import Browser, Page, expect
except ModuleNotFoundError as missing:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(f"{_NEEDED} ({missing.name} is missing)", allow_module_level=True)

pytestmark = pytest.mark.slow

SIZE = (640, 360)
TIMEOUT = 30_000  # milliseconds

Frames = Sequence[np.ndarray]
OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(launch: Callable[..., Browser], tmp_path: Path) -> Iterator[OpenPage]:
    """A function that opens an address in a browser of its own, whose camera plays these frames over and over."""
    browsers: list[Browser] = []

    def open_page(address: str, frames: Frames | None = None, **context: Any) -> Page:
        arguments = ["--use-fake-device-for-media-stream"]
        if frames is not None:
            clip = write_mjpeg(tmp_path / f"camera{len(browsers)}.mjpeg", frames)
            arguments += ["--use-fake-ui-for-media-stream", f"--use-file-for-fake-video-capture={clip}"]
        browsers.append(launch(*arguments))
        page = browsers[-1].new_page(**context)
        page.set_default_timeout(TIMEOUT)
        page.goto(address)
        return page

    yield open_page
    for browser in browsers:
        browser.close()


def write_mjpeg(path: Path, frames: Frames) -> Path:
    """Write what Chromium's fake camera plays, at 30 frames per second."""
    with av.open(str(path), "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuvj420p"
        stream.bit_rate = 40_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode())
    return path


def clip_of(jhmdb: Path, label: str) -> list[np.ndarray]:
    """A test clip of an action in the middle of the camera's picture, there and back so that nothing jumps."""
    clip = [clip for clip in read_clips(jhmdb, 1) if clip.label == label][1]
    frames = []
    with open_source(clip.path) as source:
        for frame, _ in source:
            width = round(frame.shape[1] * SIZE[1] / frame.shape[0])
            picture = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
            left = (SIZE[0] - width) // 2
            picture[:, left : left + width] = cv2.resize(frame, (width, SIZE[1]))
            frames.append(picture)
    return frames + frames[-2:0:-1]


def of_default_engine(most: int = 2, idle: float = 60.0) -> Visitors:
    return Visitors([choice(embedded_engine(), "default")], most=most, idle=idle)


def of_colours(engine: Any, most: int = 2, idle: float = 60.0) -> Visitors:
    return Visitors([choice(engine)], most=most, idle=idle)


def label_is(page: Page, label: str) -> None:
    page.wait_for_selector(f"#live-label[data-label='{label}']")


def number(page: Page, name: str) -> float:
    text = page.locator(f"#live-{name}").inner_text().split()[0]
    return float(text) if text[0].isdigit() else float("nan")


def test_what_the_camera_shows_is_named(open_page: OpenPage, jhmdb: Path) -> None:
    with live_server(of_default_engine()) as address:
        page = open_page(address, clip_of(jhmdb, "brush_hair"))
        page.click("#live-start")
        label_is(page, "brush_hair")
        expect(page.locator("#live-events li").first).to_contain_text("brush hair")
        expect(page.locator("#live-state")).to_have_text("watching")
        expect(page.locator("#live-announcement")).to_have_text("brush hair started")
        eventually(lambda: number(page, "fps") > 0 and number(page, "steps") > 0 and number(page, "latency") > 0)
        print(
            *(f"{name} {page.locator(f'#live-{name}').inner_text()}" for name in ("fps", "steps", "latency", "dropped"))
        )
        page.click("#live-stop")
        expect(page.locator("#live-events li[data-end]").first).to_be_visible()
        expect(page.locator("#live-start")).to_be_focused()


def test_two_browsers_do_not_mix_and_the_one_that_leaves_frees_its_slot(open_page: OpenPage, jhmdb: Path) -> None:
    visitors = of_default_engine()
    with live_server(visitors) as address:
        pages = {label: open_page(address, clip_of(jhmdb, label)) for label in ("brush_hair", "golf")}
        for page in pages.values():
            page.click("#live-start")
        for label, page in pages.items():
            label_is(page, label)
            page.wait_for_selector(f"#live-events li[data-label='{label}']")
        sleep(3)
        for label, page in pages.items():
            seen = page.eval_on_selector_all("#live-events li", "items => items.map((item) => item.dataset.label)")
            assert set(seen) == {label}
        assert visitors.status.slots == 2
        pages["golf"].close()
        eventually(lambda: visitors.status.slots == 1)
        expect(pages["brush_hair"].locator("#live-state")).to_have_text("watching")


def test_the_network_sees_what_the_camera_sees_and_only_the_preview_is_a_mirror(
    tiny_engine: Any, open_page: OpenPage, monkeypatch: Any
) -> None:
    seen: list[np.ndarray] = []
    prepare = Recognizer.prepare

    def record(self: Recognizer, frame: Any, *rest: Any, **options: Any) -> Any:
        if frame is not None:
            seen.append(frame)
        return prepare(self, frame, *rest, **options)

    monkeypatch.setattr(Recognizer, "prepare", record)
    picture = np.concatenate([plain("red", 1, (320, 360))[0], plain("blue", 1, (320, 360))[0]], axis=1)
    with live_server(of_colours(tiny_engine)) as address:
        page = open_page(address, [picture] * 30)
        page.click("#live-start")
        eventually(lambda: len(seen) > 5, 30)
        transform = "getComputedStyle(document.querySelector('#live-video')).transform"
        assert page.evaluate(transform) == "matrix(-1, 0, 0, 1, 0, 0)"
        page.uncheck("#live-mirror")
        assert page.evaluate(transform) == "none"
    for frame in seen:
        assert frame.shape == (360, 640, 3)
        left, right = frame[:, :300].mean((0, 1)), frame[:, 340:].mean((0, 1))
        assert left[2] > 200 > 60 > left[0] and right[0] > 200 > 60 > right[2]


def test_a_slow_network_gets_the_newest_frame_and_the_others_are_counted(
    tiny_engine: Any, open_page: OpenPage, monkeypatch: Any
) -> None:
    conclude = Recognizer.conclude
    monkeypatch.setattr(Recognizer, "conclude", lambda self, prepared: sleep(0.3) or conclude(self, prepared))
    with live_server(of_colours(tiny_engine)) as address:
        page = open_page(address, plain("red", 30, SIZE))
        page.click("#live-start")
        label_is(page, "red")
        sleep(6)
        # 30 frames a second come and about three are answered; each is new when it is sent.
        assert 1 < number(page, "fps") < 5
        assert 300 <= number(page, "latency") < 700
        assert number(page, "dropped") > 50


def test_who_waits_is_told_and_enters_when_another_leaves(tiny_engine: Any, open_page: OpenPage) -> None:
    visitors = of_colours(tiny_engine, most=1)
    with live_server(visitors) as address:
        first, second = open_page(address, plain("red", 30, SIZE)), open_page(address, plain("blue", 30, SIZE))
        first.click("#live-start")
        label_is(first, "red")
        second.click("#live-start")
        expect(second.locator("#live-state")).to_have_text("waiting, you are next")
        expect(second.locator("#live-announcement")).to_have_text("waiting, you are next")
        first.close()
        label_is(second, "blue")


def test_a_refused_camera_is_a_sentence(tiny_engine: Any, open_page: OpenPage) -> None:
    with live_server(of_colours(tiny_engine)) as address:
        page = open_page(address)  # headless Chromium refuses where nobody can be asked
        page.click("#live-start")
        expect(page.locator("#live-state")).to_contain_text("Camera refused")
        expect(page.locator("#live-announcement")).to_contain_text("Camera refused")
        expect(page.locator("#live-start")).to_be_enabled()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("NotFoundError", "No camera found"),
        ("NotReadableError", "cannot be read"),
        ("SomethingError", "cannot be opened (it rained)"),
    ],
)
def test_every_failure_of_a_camera_is_a_sentence(
    tiny_engine: Any, open_page: OpenPage, name: str, sentence: str
) -> None:
    with live_server(of_colours(tiny_engine)) as address:
        page = open_page(address)
        fail = "async () => { throw new DOMException('it rained', name); }"
        page.evaluate(f"name => {{ navigator.mediaDevices.getUserMedia = {fail}; }}", name)
        page.click("#live-start")
        expect(page.locator("#live-state")).to_contain_text(sentence)


def test_a_page_without_https_says_what_is_missing(tiny_engine: Any, open_page: OpenPage) -> None:
    with live_server(of_colours(tiny_engine)) as address:
        page = open_page(address)
        page.evaluate("Object.defineProperty(window, 'isSecureContext', { value: false })")
        page.click("#live-start")
        expect(page.locator("#live-state")).to_contain_text("https://")


def test_a_lost_connection_is_said_and_start_begins_again(tiny_engine: Any, open_page: OpenPage) -> None:
    visitors = of_colours(tiny_engine)
    with live_server(visitors) as address:
        page = open_page(address, plain("red", 30, SIZE))
        page.click("#live-start")
        label_is(page, "red")
        page.evaluate("document.querySelector('stsm-live').socket.close()")
        expect(page.locator("#live-state")).to_contain_text("connection was lost")
        eventually(lambda: visitors.status.slots == 0)
        page.click("#live-start")
        label_is(page, "red")


def test_changed_settings_are_followed(tiny_engine: Any, open_page: OpenPage) -> None:
    visitors = of_colours(tiny_engine)
    with live_server(visitors) as address:
        page = open_page(address, plain("red", 30, SIZE))
        page.evaluate("window.stsmSettings = { engine: 'colours', threshold: 1, smoothing: 2 }")
        page.click("#live-start")
        label_is(page, "red")
        expect(page.locator("#live-state")).to_have_text("watching")
        assert page.locator("#live-events li").count() == 0
        page.evaluate("window.stsmSettings = { engine: 'colours', threshold: 0.5, smoothing: 2 }")
        page.wait_for_selector("#live-events li[data-label='red']")
        assert visitors.status.slots == 1


def test_the_keyboard_is_enough_and_every_control_has_a_name(tiny_engine: Any, open_page: OpenPage) -> None:
    with live_server(of_colours(tiny_engine)) as address:
        page = open_page(address, plain("red", 30, SIZE))
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        label_is(page, "red")
        expect(page.get_by_role("button", name="Stop")).to_be_focused()
        page.keyboard.press("Tab")
        expect(page.get_by_role("checkbox", name="Mirror preview")).to_be_focused()
        page.keyboard.press("Space")
        expect(page.get_by_role("checkbox", name="Mirror preview")).not_to_be_checked()
        page.get_by_role("button", name="Stop").press("Space")
        expect(page.locator("#live-state")).to_contain_text("Stopped")


def test_on_a_phone_nothing_is_cut_off(tiny_engine: Any, open_page: OpenPage) -> None:
    with live_server(of_colours(tiny_engine)) as address:
        page = open_page(address, plain("red", 30, SIZE), viewport={"width": 360, "height": 740})
        page.click("#live-start")
        label_is(page, "red")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for name in ("video", "start", "mirror", "fps", "dropped", "label", "bars", "events"):
            box = page.locator(f"#live-{name}").bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360
