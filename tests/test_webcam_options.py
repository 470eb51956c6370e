"""The command line of ``stsm-rt webcam`` and the file of cameras."""

from __future__ import annotations

from pathlib import Path

import pytest

from stsm_rt.errors import UserError
from stsm_rt.webcam_options import CameraOption, parse, read_cameras


def listed(folder: Path, text: str) -> str:
    path = folder / "cameras.txt"
    path.write_text(text, "utf-8")
    return str(path)


def test_a_file_lists_cameras_with_names_and_regions(tmp_path: Path) -> None:
    path = listed(
        tmp_path,
        "# the house\n\nfront door = rtsp://user:pw@host/stream?channel=1&subtype=0\n"
        "  yard [40, 0,320,240]=0  \r\nHinterhof Süd = v4l2src ! videoconvert ! appsink\n",
    )
    assert read_cameras(path) == (
        CameraOption("front door", "rtsp://user:pw@host/stream?channel=1&subtype=0"),
        CameraOption("yard", "0", (40, 0, 320, 240)),
        CameraOption("Hinterhof Süd", "v4l2src ! videoconvert ! appsink"),
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a = 0\nrtsp://user:hush@host/a?b=c\n", r"line 2 of .*cameras.txt must be NAME = SOURCE or NAME \[X,Y,W,H\]"),
        ("a = 0\n\nb =\n", "line 3 of .*must be NAME = SOURCE"),
        ("a = 0\nb = 1\na = 2\n", "line 3 of .* names 'a' once more, which line 1 is"),
        ("a [1,2] = 0\n", "in line 1 of .*, x,y,w,h in whole pixels were expected"),
        ("# nothing\n", "lists no camera; write one a line"),
    ],
)
def test_a_mistake_in_the_file_is_said_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        read_cameras(listed(tmp_path, text))
    assert "hush" not in str(caught.value)


def test_a_file_of_windows_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    for text in ("front = 0\n", "# mine\nfront = 0\n"):
        assert read_cameras(listed(tmp_path, f"\ufeff{text}")) == (CameraOption("front", "0"),)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.txt cannot be read \(No such file"):
        read_cameras(str(tmp_path / "absent.txt"))
    (tmp_path / "picture").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        read_cameras(str(tmp_path / "picture"))


def test_one_source_is_one_camera_and_more_are_several(tmp_path: Path) -> None:
    assert (parse([]).source, parse([]).cameras) == (None, ())
    assert (parse(["--source", "a.mp4"]).source, parse(["--source", "a.mp4"]).cameras) == ("a.mp4", ())
    several = parse(["--source", "a.mp4", "--source", "b.mp4"])
    assert several.source is None
    assert several.cameras == (CameraOption("camera 1", "a.mp4"), CameraOption("camera 2", "b.mp4"))
    assert parse(["--sources", listed(tmp_path, "door = 0")]).cameras == (CameraOption("door", "0"),)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--source", "0", "--sources", "FILE"], "--source cannot be given beside it"),
        (["--sources", "FILE", "--roi", "1,2,3,4"], r"list them in a file for --sources.*NAME \[X,Y,W,H\] = SOURCE"),
        (["--sources", "FILE", "--every-frame"], "the frame rate of one source; leave it out"),
        (["--source", "-", "--source", "-"], "only one source can be -"),
        (["--sources", "FILE", "--save", "b.mp4"], "must be different files"),
        (["--sources", "FILE", "--events", "FILE"], "must be different files"),
        (["--webhook", "http://h", "--events", "stsm-rt-undelivered.jsonl"], "leave what could not be delivered"),
        (["--mqtt", "mqtt://h/t", "--events", "./stsm-rt-undelivered.jsonl"], "give another file to --events"),
        (["--rotate", "1h"], "give one of them"),
        (["--rotate", "often", "--save", "a.mp4"], "a size such as 100MB or a time such as 1h, not 'often'"),
        (["--metrics", "65536"], "a port from 0 to 65535, not 65536"),
        (["--max-frames", "0"], "must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = listed(tmp_path, "a = a.mp4\nb = b.mp4\n")
    with pytest.raises(UserError, match=sentence):
        parse([path if argument == "FILE" else argument for argument in arguments])
