"""The page in a real browser: what is uploaded, seen and taken home is what the command line gives."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT, serving

pytestmark = pytest.mark.slow

_PATIENCE = 90_000  # milliseconds: CI runs other things beside


@pytest.fixture
def page(browser: Any, page_address: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(_PATIENCE)
    page.goto(page_address)
    yield page
    context.close()


def upload(page: Any, path: Path) -> None:
    page.locator("#upload-file input[type=file]").set_input_files(str(path))


def command_line(clip: Path, folder: Path, *options: str) -> list[dict[str, Any]]:
    """The results and events that the command line writes for a clip, without what differs from run to run."""
    out = folder / "cli.jsonl"
    command = [sys.executable, str(ROOT / "demo" / "webcam.py"), "--headless", "--source", str(clip)]
    subprocess.run([*command, "--events", str(out), *options], check=True, capture_output=True)
    return [record for record in records(out) if record["kind"] != "source"]


def records(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "latency"} for line in lines]


def ended(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "event" and line["end"] is not None]


def download(page: Any, name: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"#download-{name}").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def analyses(address: str) -> str:
    """The processes in which this server analyses videos."""
    port = address.rstrip("/").rpartition(":")[2]
    server = subprocess.run(["pgrep", "-f", f"app.py --port {port}"], capture_output=True, text=True, check=True)
    found = ["pgrep", "-P", server.stdout.split()[0], "-f", "stsm_rt.app.analyse"]
    return subprocess.run(found, capture_output=True, text=True).stdout


def test_an_upload_gives_what_the_command_line_gives(page: Any, walking_clip: Path, tmp_path: Path) -> None:
    expected = command_line(walking_clip, tmp_path)
    events = ended(expected)
    assert [event["label"] for event in events] == ["walk"]
    upload(page, walking_clip)
    page.locator("#result-video video").wait_for()
    row = page.locator("#upload-events tbody tr").first.inner_text()
    for part in ("walk", f"0:0{events[0]['start']:.2f}", f"0:0{events[0]['end']:.2f}", f"{events[0]['peak']:.2f}"):
        assert part in row
    assert "1 event" in page.locator("#upload-status").inner_text()

    assert records(download(page, "jsonl", tmp_path)) == expected
    with download(page, "csv", tmp_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], float(row["start"]), float(row["end"])) for row in rows] == [
        (event["label"], pytest.approx(event["start"]), pytest.approx(event["end"])) for event in events
    ]
    video = download(page, "video", tmp_path)
    assert video.suffix == ".mp4"
    # It plays in this browser, at the source's length.
    length = page.eval_on_selector("#result-video video", "v => new Promise(r => v.readyState ? r(v.duration) : "
                                   "v.onloadedmetadata = () => r(v.duration))")  # fmt: skip
    assert length == pytest.approx(expected[-1]["time"], abs=0.5)

    # A click on the event's span seeks the video.
    page.locator("#upload-timeline [data-time]").first.click()
    page.wait_for_function(
        "t => Math.abs(document.querySelector('#result-video video').currentTime - t) < 0.2", arg=events[0]["start"]
    )


def test_settings_reach_the_network(page: Any, walking_clip: Path, tmp_path: Path) -> None:
    page.locator("#settings button").first.click()
    page.locator("#setting-threshold input[type=number]").fill("0.9")
    page.locator("#setting-threshold input[type=number]").press("Enter")
    page.locator("#setting-engine input").click()
    page.get_by_role("option", name=re.compile("INT8")).click()
    page.locator("#setting-about").get_by_text("8-bit integers").wait_for()
    threshold = page.locator("#setting-threshold input[type=number]")
    assert threshold.input_value() == "0.36"  # that of the engine that was just chosen
    threshold.fill("0.2")
    threshold.press("Enter")
    upload(page, walking_clip)
    page.locator("#result-video video").wait_for()
    expected = command_line(
        walking_clip, tmp_path, "--engine", str(ROOT / "engines" / "actions_lite0_int8.onnx"), "--threshold", "0.2"
    )
    assert records(download(page, "jsonl", tmp_path)) == expected


def test_the_sample_clip_is_one_click_away(page: Any) -> None:
    page.locator("#upload-sample").click()
    page.locator("#result-video video").wait_for()
    assert "walk" in page.locator("#upload-events").inner_text()


@pytest.mark.parametrize(("content", "sentence"), [(b"this is no video", "not a video"), (b"", "is empty")])
def test_what_is_no_video_is_one_sentence(page: Any, tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "holiday.mp4"
    path.write_bytes(content)
    upload(page, path)
    message = page.locator("#upload-status [role=alert]")
    message.wait_for()
    assert "holiday.mp4" in message.inner_text() and sentence in message.inner_text()
    assert str(tmp_path) not in message.inner_text() and "/" not in message.inner_text()


def test_stop_ends_it_at_once_and_keeps_nothing(page: Any, page_address: str, walking_clip: Path) -> None:
    upload(page, walking_clip)
    page.locator("#upload-stop").wait_for()
    assert analyses(page_address)
    page.locator("#upload-stop").click()
    page.locator("#upload-status").get_by_text("stopped").wait_for()
    assert not page.locator("#upload-results").is_visible()
    assert not analyses(page_address)


def test_who_leaves_ends_their_job(browser: Any, page_address: str, walking_clip: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(page_address)
    upload(page, walking_clip)
    page.locator("#upload-stop").wait_for(timeout=_PATIENCE)
    assert analyses(page_address)
    context.close()
    for _ in range(100):
        if not analyses(page_address):
            return
        time.sleep(0.2)
    pytest.fail("the job runs on although nobody waits for it")


def test_a_program_gets_the_same(page_address: str, walking_clip: Path, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(page_address, verbose=False, download_files=str(tmp_path))
    report, video, jsonl, table = client.predict(handle_file(str(walking_clip)), api_name="/recognize")
    expected = command_line(walking_clip, tmp_path)
    assert records(Path(jsonl)) == expected
    assert [event["label"] for event in report["events"]] == ["walk"]
    assert Path(video).stat().st_size and Path(table).stat().st_size


def test_a_program_may_send_several_at_once(page_address: str, walking_clip: Path, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(page_address, verbose=False, download_files=str(tmp_path))
    jobs = [client.submit(handle_file(str(walking_clip)), api_name="/recognize") for _ in range(3)]
    reports = [job.result(timeout=120)[0] for job in jobs]
    assert [[event["label"] for event in report["events"]] for report in reports] == [["walk"]] * 3


def test_the_server_fetches_nothing(page_address: str) -> None:
    from gradio_client import Client

    client = Client(page_address, verbose=False)
    address = {"path": "http://example.org/clip.mp4", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="give the file itself"):
        client.predict(address, api_name="/recognize")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{page_address}gradio_api/file=http://example.org/clip.mp4", timeout=10)


def test_nobody_goes_round_the_queue(page_address: str) -> None:
    request = urllib.request.Request(
        f"{page_address}gradio_api/run/recognize", b'{"data": [null]}', {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code in (401, 403, 404)


def test_while_it_runs_nothing_else_can_be_started(page: Any, walking_clip: Path) -> None:
    upload(page, walking_clip)
    page.locator("#upload-stop").wait_for()
    assert page.locator("#upload-run").is_disabled() and page.locator("#upload-sample").is_disabled()
    assert not page.locator("#upload-file input[type=file]").count()
    page.locator("#result-video video").wait_for()
    assert page.locator("#upload-run").is_enabled() and not page.locator("#upload-stop").is_visible()
    page.locator("#upload-run").click()
    page.locator("#upload-stop").wait_for()
    page.locator("#result-video video").wait_for()


def test_uploads_of_who_leaves_are_removed(browser: Any, walking_clip: Path, tmp_path: Path) -> None:
    with serving(temporary=tmp_path) as address:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(_PATIENCE)
        page.goto(address)
        upload(page, walking_clip)
        page.locator("#result-video video").wait_for()
        assert list(tmp_path.rglob("walking.mp4")) and list(tmp_path.rglob("report.json"))
        context.close()
        for _ in range(100):
            if not list(tmp_path.rglob("*.mp4")):
                break
            time.sleep(0.1)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
def test_other_containers_are_taken(page: Any, walking_clip: Path, tmp_path: Path, suffix: str) -> None:
    import av

    path = tmp_path / f"walking{suffix}"
    with av.open(str(walking_clip)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    upload(page, path)
    page.locator("#result-video video").wait_for()
    assert "walk" in page.locator("#upload-events").inner_text()


def test_no_file_of_the_server_is_reachable(page_address: str) -> None:
    for path in (ROOT / "pyproject.toml", ROOT / "engines" / "actions_lite0_fp32.onnx", Path("/etc/passwd")):
        for route in ("gradio_api/file=", "file=", "static/"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{page_address}{route}{path}", timeout=10)
            assert refused.value.code in (403, 404)


def test_who_has_no_password_sees_nothing(browser: Any, tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("anna:secret\n")
    with serving("--auth", users) as address:
        for path in ("config", "gradio_api/info", "live/ticket"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(address + path, timeout=10)
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(_PATIENCE)
        page.goto(address)
        page.locator("input").nth(0).fill("anna")
        page.locator("input[type=password]").fill("secret")
        page.get_by_role("button", name="Login").click()
        page.locator("#heading").wait_for()
        assert page.request.get(address + "live/ticket").json()["ticket"]
        context.close()
