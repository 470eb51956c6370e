"""Messages for people never hold a password."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from stsm_rt.errors import UserError, redact, report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot open rtsp://me:secret@10.0.0.5:554/live", "cannot open rtsp://***@10.0.0.5:554/live"),
        ("'http://token@host/x' and rtsp://a:b@c", "'http://***@host/x' and rtsp://***@c"),
        ("rtsp://me:se@cret@host/", "rtsp://***@host/"),
        ("rtsp://me:se/cret@host/live", "rtsp://***@host/live"),
        ("rtsp://me:se#cr?et@host", "rtsp://***@host"),
        ("rtsp://me:pa'ss@host/x or rtsp://me:a\"<b>@host", "rtsp://***@host/x or rtsp://***@host"),
        ("rtsp://me:se'cr/et@host/live", "rtsp://***@host/live"),
        ("http://cam/x.cgi?user=a&pwd=secret&size=2 is away", "http://cam/x.cgi?user=***&pwd=***&size=2 is away"),
        ("rtsp://h/user=admin&password=secret&channel=1", "rtsp://h/user=***&password=***&channel=1"),
        ("rtsp://h/user=admin_password=secret_stream=0.sdp?real", "rtsp://h/user=***"),
        (
            "http://me:x@cam/a?LoginPas=a'b#c;d&access_token=e&x-Key=f",
            "http://***@cam/a?LoginPas=***&access_token=***&x-Key=***",
        ),
        ("/data/user=anna/a.mp4 has no key=value; tokens: 3", "/data/user=anna/a.mp4 has no key=value; tokens: 3"),
        ("http://h/monkey=1/realmonitor?channel=1&subtype=0", "http://h/monkey=1/realmonitor?channel=1&subtype=0"),
        ("'http://h:80/x' wants a user; write user:password@", "'http://h:80/x' wants a user; write user:password@"),
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
        ("rtspsrc user-pw='hu sh' ! x", "rtspsrc user-pw=*** ! x"),
        ("rtspsrc user-pw='hu\\' sh' ! x", "rtspsrc user-pw=*** ! x"),
        ('rtspsrc user-pw="hu\\" sh" ! x', "rtspsrc user-pw=*** ! x"),
        ("rtspsrc user-pw='hu sh", "rtspsrc user-pw=***"),
        ("rtspsrc user-pw=hu\\ sh!ush ! x", "rtspsrc user-pw=*** ! x"),
        ("rtspsrc name=user-pw ! x", "rtspsrc name=user-pw ! x"),
    ],
)
def test_credentials_of_pipelines_are_redacted(pipeline: str, shown: str) -> None:
    assert redact(pipeline) == shown


printable = st.text(st.characters(codec="utf-8").filter(lambda sign: sign.isprintable() and sign != " "), min_size=1)


@given(user=printable, password=printable)
@example("admin", "pa'ss")
@example("admin", 'a"b<c>d')
@example("admin", "a@b")
def test_no_password_that_a_url_can_hold_is_shown(user: str, password: str) -> None:
    url = f"rtsp://{user}:{password}@host:554/x"
    try:
        parts = urlsplit(url)
        assume(parts.hostname == "host" and parts.port == 554)
    except ValueError:
        assume(False)
    assert redact(f"camera {url} is away") == "camera rtsp://***@host:554/x is away"


@given(key=st.sampled_from(["pwd", "password", "passwd", "psw", "token", "api_key", "key"]), password=printable)
@example("pwd", "a'b;c/d#e,f")
def test_no_password_in_a_query_is_shown(key: str, password: str) -> None:
    assume(not {"&", "@"} & {*password})
    assert redact(f"camera http://host/x?{key}={password}&n=1 is away") == f"camera http://host/x?{key}=***&n=1 is away"
