"""A folder per class as a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import counted, number_of, plain, write_video
from hypothesis import given
from hypothesis import strategies as st

from stsm_rt.errors import UserError
from stsm_rt.own_clips import (
    BACKGROUND,
    OwnClip,
    check_label,
    held_out_parts,
    mirrored_label,
    own_clips,
    read_clip,
    seen_frames,
)


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_per_class_is_a_data_set_and_the_name_without_its_number_a_recording(tmp_path: Path) -> None:
    names = [
        "wave/mon-0002.mp4",
        "wave/mon-0001.mp4",
        "wave/tue-1.mov",
        "clap/20261123-073355-0001.mp4",
        "clap/uncle.avi",
    ]
    lay(tmp_path, *names, "wave/.draft.mp4", "wave/notes.txt", ".cache/x-1.mp4", "README.md")
    (tmp_path / "empty").mkdir()
    found = own_clips(tmp_path)
    assert [(clip.label, clip.path.name, clip.recording) for clip in found] == [
        ("clap", "20261123-073355-0001.mp4", "20261123-073355"),
        ("clap", "uncle.avi", "uncle"),
        ("wave", "mon-0001.mp4", "mon"),
        ("wave", "mon-0002.mp4", "mon"),
        ("wave", "tue-1.mov", "tue"),
    ]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "found none"),
        (["wave/a-1.mp4"], "found only 'wave'"),
        (["wave/a-1.mp4", "nothing/a-1.mp4"], "found only 'wave'"),
        (["wave/a-1.mp4", "Wave/a-1.mp4"], "differ in capitals alone"),
        (["wave/a-1.mp4", "clap/a-1.mp4", "Nothing/a-1.mp4"], "is named 'nothing'; rename 'Nothing'"),
        (["wave/a-1.mp4", "a,b/a-1.mp4"], "not 'a,b'"),
    ],
)
def test_what_is_no_data_set_is_refused_in_a_sentence(tmp_path: Path, names: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        own_clips(lay(tmp_path, *names))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        own_clips(tmp_path / "absent")


@pytest.mark.parametrize(
    "label", ["", ".", "..", "../x", "a/b", "a\\b", " a", "a ", "-a", "_a", "a\n", "a:b", "x" * 61]
)
def test_a_class_name_is_a_harmless_folder_name(label: str) -> None:
    with pytest.raises(UserError, match="a class is named with letters"):
        check_label(label)


@pytest.mark.parametrize("label", ["a", "wave_left", "Tür öffnen", "pull-up", "手を振る", "x" * 60])
def test_class_names_of_every_language_are_taken(label: str) -> None:
    assert check_label(label) == label


def test_a_clip_is_read_with_its_times_and_seen_at_the_models_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", counted(45, (64, 48)))
    frames, times = read_clip(path, (48, 64))
    assert frames.shape == (45, 48, 64, 3) and frames.dtype == np.uint8
    assert times == pytest.approx([i / 30 for i in range(45)], abs=1e-3)
    assert [number_of(frames[i]) for i in seen_frames(times, 10.0)] == list(range(0, 45, 3))
    assert seen_frames(times, 8.0) == list(range(0, 45, 4))


def test_a_clip_of_more_than_a_minute_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", plain("red", 62, (16, 16)), fps=1)
    with pytest.raises(UserError, match="longer than 60 s"):
        read_clip(path, (16, 16))


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", BACKGROUND]), st.integers(0, 6), st.booleans()),
        min_size=4,
        max_size=40,
    ).filter(lambda drawn: {"a", "b"} <= {label for label, _, _ in drawn})
)
def test_parts_divide_the_clips_and_no_recording(drawn: list[tuple[str, int, bool]]) -> None:
    clips = [
        OwnClip(Path(f"{index}.mp4"), label, f"{'' if shared else label}{number}")
        for index, (label, number, shared) in enumerate(drawn)
    ]
    parts = held_out_parts(clips, 5)
    assert sorted(i for part in parts for i in part) == list(range(len(clips)))
    recordings = [{clips[i].recording for i in part} for part in parts]
    assert sum(map(len, recordings)) == len({clip.recording for clip in clips})
    fewest = min(len({c.recording for c in clips if c.label == x}) for x in {c.label for c in clips} - {BACKGROUND})
    assert 1 <= len(parts) <= min(5, fewest)
    if not any(shared for _, _, shared in drawn):
        # Every part asks about every action, and leaves every action something to learn from.
        assert len(parts) == min(5, fewest)
        assert all({"a", "b"} <= {clips[i].label for i in part} for part in parts)


def test_a_class_that_shares_its_recordings_with_others_is_never_held_out_whole() -> None:
    recordings = {"a": ("p1", "p2", "p3", "p4"), "c": ("p1", "p3")}
    clips = [OwnClip(Path(f"{label}-{one}.mp4"), label, one) for label, names in recordings.items() for one in names]
    for part in held_out_parts(clips, 5):
        assert {clip.label for index, clip in enumerate(clips) if index not in part} == {"a", "c"}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("clap", "clap"),
        ("wave_left", "wave_right"),
        ("turn right now", "turn left now"),
        ("leftover", "leftover"),
        ("swipe-left", None),
    ],
)
def test_a_mirror_swaps_left_and_right(label: str, expected: str | None) -> None:
    labels = ("clap", "wave_left", "wave_right", "turn right now", "turn left now", "leftover", "swipe-left")
    assert mirrored_label(label, labels) == expected
