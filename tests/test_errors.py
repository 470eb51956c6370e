"""Messages for people never hold a password."""

from __future__ import annotations

import pytest

from stsm_rt.errors import UserError, redact, report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot open rtsp://me:secret@10.0.0.5:554/live", "cannot open rtsp://***@10.0.0.5:554/live"),
        ("'http://token@host/x' and rtsp://a:b@c", "'http://***@host/x' and rtsp://***@c"),
        ("rtsp://me:se@cret@host/", "rtsp://***@host/"),
        ("rtsp://me:se/cret@host/live", "rtsp://***@host/live"),
        ("rtsp://me:se#cr?et@host", "rtsp://***@host"),
        ("http://host:8080/a@b.mp4", "http://host:8080/a@b.mp4"),
        ("http://host/a@b.mp4", "http://host/a@b.mp4"),
        ("mail me@host, key: a@b", "mail me@host, key: a@b"),
    ],
)
def test_credentials_in_urls_are_redacted(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert str(UserError(text)) == expected


def test_a_report_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(UserError("no such file")) == 2
    assert capsys.readouterr() == ("", "stsm-rt: error: no such file\n")


@pytest.mark.parametrize(
    ("pipeline", "shown"),
    [
        ("rtspsrc user-pw=hush ! appsink", "rtspsrc user-pw=*** ! appsink"),
        ('rtspsrc user-id="some one" user-pw = "hu sh"!x', "rtspsrc user-id=*** user-pw = ***!x"),
        ("rtspsrc location=rtsp://u:hush@h/1 proxy-pw=hush", "rtspsrc location=rtsp://***@h/1 proxy-pw=***"),
        ("rtspsrc name=user-pw ! x", "rtspsrc name=user-pw ! x"),
    ],
)
def test_credentials_of_pipelines_are_redacted(pipeline: str, shown: str) -> None:
    assert redact(pipeline) == shown
