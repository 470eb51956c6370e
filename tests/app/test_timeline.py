"""The timeline: where things are, that they are safe to show, and that it works in a browser."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from clips import counted, number_of

from stsm_rt.app.report import EngineFacts, Latency, Report, Scores, SourceFacts, Span
from stsm_rt.app.timeline import events_table, timeline

SCRIPT = Path(__file__).parents[2] / "stsm_rt" / "app" / "static" / "timeline.js"


def report(duration: float = 10.0, **changes: Any) -> Report:
    times = tuple(duration * index / 100 for index in range(100))
    usual = Report(
        format=1,
        engine=EngineFacts("lite0", "fp32", "onnxruntime", "0" * 64),
        source=SourceFacts("clip.mp4", 320, 240, 30.0, round(30 * duration), duration, duration),
        complete=True,
        steps=100,
        threshold=0.6,
        smoothing=3,
        latency=Latency(0.01, 0.02),
        events=(Span("climb_stairs", 1.0, 3.5, 0.93), Span("wave", 0.72 * duration, 0.8 * duration, 0.7)),
        scores=Scores(times, {"climb_stairs": (0.9,) * 100, "wave": (0.25,) * 100}),
        files={"video": "video.mp4", "jsonl": "events.jsonl", "csv": "events.csv"},
        folder=Path("folder"),
    )
    return dataclasses.replace(usual, **changes)


def parse(html: str) -> ElementTree.Element:
    """The fragment as a tree; what is not escaped is no XML."""
    return ElementTree.fromstring(html)


def style(element: ElementTree.Element) -> dict[str, str]:
    return dict(part.split(":", 1) for part in element.attrib["style"].split(";"))


def test_spans_are_buttons_where_the_events_are() -> None:
    tree = parse(timeline(report()))
    climbing, waving = tree.iter("button")
    assert (climbing.text, waving.text) == ("climb stairs", "wave")
    assert (style(climbing)["left"], style(climbing)["width"]) == ("10.000%", "25.000%")
    assert (climbing.attrib["data-time"], waving.attrib["data-time"]) == ("1.000", "7.200")
    assert climbing.attrib["title"] == "climb stairs, 0:01.00 to 0:03.50, best score 0.93"
    assert climbing.attrib["aria-label"].startswith("climb stairs, 0:01.00")
    assert tree.attrib["data-duration"] == "10.000"
    assert tree.attrib["aria-label"] == "Timeline of clip.mp4: 2 events in 10.0 seconds"


def test_a_click_on_an_event_never_shows_the_frame_before_it() -> None:
    start = 1 + 1 / 3
    (button,) = parse(timeline(report(events=(Span("wave", start, 2.0, 0.7),)))).iter("button")
    assert start <= float(button.attrib["data-time"]) < start + 0.0011


def test_curves_have_the_colours_of_their_spans_and_a_legend() -> None:
    tree = parse(timeline(report()))
    svg = tree.find(".//svg")
    assert svg is not None and svg.attrib["role"] == "img" and svg.attrib["viewBox"] == "0 0 1000 100"
    assert svg.attrib["aria-label"] == "Scores over time of climb stairs, wave"
    curves = [path for path in svg.iter("path") if path.attrib["class"] == "stsm-curve"]
    colours = [style(curve)["--stsm-colour"] for curve in curves]
    assert colours == [style(button)["--stsm-colour"] for button in tree.iter("button")] and len(set(colours)) == 2
    points = re.findall(r"([\d.]+) ([\d.]+)", curves[0].attrib["d"])
    assert len(points) == 100 and points[50] == ("500.0", "10.00")
    (threshold,) = (path for path in svg.iter("path") if path.attrib["class"] == "stsm-threshold")
    assert threshold.attrib["d"] == "M0 40.00H1000"
    caption = tree.find("figcaption")
    assert caption is not None and "".join(caption.itertext()) == "climb stairswave"


def test_labels_without_a_curve_have_a_colour_of_their_own() -> None:
    events = tuple(Span(f"action {index}", index, index + 0.5, 0.7) for index in range(8))
    scores = Scores((0.0,), {f"action {index}": (0.5,) for index in range(6)})
    tree = parse(timeline(report(events=events, scores=scores)))
    colours = [style(button)["--stsm-colour"] for button in tree.iter("button")]
    assert len(set(colours)) == 7 and colours[6] == colours[7]


def test_names_and_labels_are_text_whatever_they_hold() -> None:
    nasty = "\"><script>alert(1)</script>&'"
    source = dataclasses.replace(report().source, name=nasty)
    html = timeline(report(source=source, events=(Span(nasty, 1.0, 2.0, 0.7),), scores=Scores((0.0,), {nasty: (0.5,)})))
    tree = parse(html)
    assert "<script" not in html and not list(tree.iter("script"))
    assert [button.text for button in tree.iter("button")] == [nasty]


def test_without_events_it_says_so() -> None:
    tree = parse(timeline(report(events=())))
    assert not list(tree.iter("button"))
    assert "No action was certain enough to start an event (threshold 0.60)." in "".join(tree.itertext())
    assert "no events" in tree.attrib["aria-label"]


@pytest.mark.parametrize(
    ("duration", "labels"),
    [
        (0.033, ["0.0 s"]),
        (1.4, ["0.0 s", "0.5 s", "1.0 s"]),
        (10.0, ["0 s", "2 s", "4 s", "6 s", "8 s", "10 s"]),
        (59.0, ["0 s", "10 s", "20 s", "30 s", "40 s", "50 s"]),
        (600.0, ["0:00", "2:00", "4:00", "6:00", "8:00", "10:00"]),
    ],
)
def test_the_axis_has_few_round_times(duration: float, labels: list[str]) -> None:
    axis = parse(timeline(report(duration))).find(".//div[@class='stsm-axis']")
    assert axis is not None
    assert [tick.text for tick in axis] == labels
    assert all(float(style(tick)["left"].rstrip("%")) <= 100 for tick in axis)


def test_the_table_is_for_people() -> None:
    long = report(700.0, events=(Span("climb_stairs", 61.239, 124.0, 0.934),))
    assert events_table(long) == [["climb stairs", "1:01.24", "2:04.00", "62.76 s", "0.93"]]
    assert events_table(report(events=())) == []


@pytest.mark.slow
def test_in_a_browser_it_seeks_and_follows(browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the page needs PyAV: pip install 'stsm-rt[ui]'")
    from stsm_rt.app.browser_video import BrowserVideoSink

    with BrowserVideoSink(tmp_path / "video.mp4", (320, 240), 25) as sink:
        for index, frame in enumerate(counted(250, (320, 240))):
            sink.write(frame, index / 25)
    (tmp_path / "page.html").write_text(
        f"<!doctype html><meta charset=utf-8><script>{SCRIPT.read_text()}</script>"
        '<div id="result-video"><video src="video.mp4" muted></video></div>'
        f'<main style="width:320px">{timeline(report())}</main>'
    )
    page = browser.new_page(viewport={"width": 360, "height": 700})
    page.goto(f"file://{tmp_path}/page.html")
    page.wait_for_function("document.querySelector('video').readyState > 1")

    def now() -> float:
        page.wait_for_function("!document.querySelector('video').seeking")
        return page.evaluate("document.querySelector('video').currentTime")

    def cursor() -> float:
        box, track = page.locator(".stsm-cursor").bounding_box(), page.locator(".stsm-track").bounding_box()
        return (box["x"] + box["width"] / 2 - track["x"]) / track["width"]

    page.locator("button", has_text="wave").click()
    assert now() == pytest.approx(7.2) and cursor() == pytest.approx(0.72, abs=0.01)
    for key, label, time in (("Enter", "climb stairs", 1.0), ("Space", "wave", 7.2)):
        page.locator("button", has_text=label).focus()
        page.keyboard.press(key)
        assert now() == pytest.approx(time)
    plot = page.locator(".stsm-plot").bounding_box()
    page.mouse.click(plot["x"] + plot["width"] / 2, plot["y"] + 20)
    assert now() == pytest.approx(5, abs=0.05) and cursor() == pytest.approx(0.5, abs=0.01)
    # What is seen is what was there at that time.
    picture = page.evaluate(
        "() => { const v = document.querySelector('video'), c = document.createElement('canvas');"
        "c.width = 320; c.height = 240; c.getContext('2d').drawImage(v, 0, 0);"
        "try { return Array.from(c.getContext('2d').getImageData(0, 120, 320, 1).data); } catch { return null; } }"
    )
    if picture is not None:  # a page from a file may not look into its video everywhere
        import numpy as np

        row = np.array(picture, np.uint8).reshape(1, 320, 4)[:, :, :3]
        assert number_of(row) in (124, 125, 126)

    page.evaluate("document.querySelector('video').play()")
    page.wait_for_function("document.querySelector('video').currentTime > 5.6")
    page.evaluate("document.querySelector('video').pause()")
    assert cursor() == pytest.approx(now() / 10, abs=0.01)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
