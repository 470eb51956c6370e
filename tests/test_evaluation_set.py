"""Which videos an evaluation plays, and under which labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from stsm_rt.errors import UserError
from stsm_rt.evaluation_set import EvaluationSet, as_clips, relabel
from stsm_rt.playback import Clip
from stsm_rt.train.annotations import VideoList, VideoRecord


def videos(classes: tuple[str, ...], *labels: int) -> VideoList:
    return VideoList(tuple(VideoRecord(Path(f"{i}.mp4"), label) for i, label in enumerate(labels)), classes)


def numbers(found: VideoList) -> list[int]:
    return [record.label for record in found.records]


def test_classes_are_found_by_name_however_they_are_spelled():
    found = relabel(videos(("brush_hair", "wave", "ride_bike"), 0, 1, 2, 1), ["Ride bike", "Brush hair", "WAVE"])
    assert numbers(found) == [1, 2, 0, 2] and found.classes == ("Ride bike", "Brush hair", "WAVE")


def test_an_exact_name_goes_before_one_that_only_has_the_same_letters():
    assert numbers(relabel(videos(("a-b", "ab"), 0, 1), ["ab", "a-b"])) == [1, 0]
    with pytest.raises(UserError, match=r"does not know 1 of the 1 classes .* 'a b'"):
        relabel(videos(("a b",), 0), ["ab", "a-b"])


def test_numbers_in_place_of_names_decide_by_themselves():
    assert numbers(relabel(videos(("wave", "clap"), 0, 1, 0), ["0", "1"])) == [0, 1, 0]
    assert numbers(relabel(videos(("0", "1", "2"), 2, 0), ["clap", "wave", "jump"])) == [2, 0]
    with pytest.raises(UserError, match="does not know"):
        relabel(videos(("wave", "clap"), 0), ["0", "1", "2"])  # of another data set
    with pytest.raises(UserError, match="does not know"):
        relabel(videos(("0", "1", "2"), 2), ["clap", "wave"])


def test_a_class_without_a_video_may_be_unknown_one_with_a_video_is_named():
    assert numbers(relabel(videos(("wave", "swim"), 0), ["wave"])) == [0]
    with pytest.raises(UserError, match=r"does not know 1 of the 2 classes .* 'swim'; give an engine or weights"):
        relabel(videos(("wave", "swim"), 0, 1), ["wave"])


def test_a_manifest_of_ours_is_read_by_split_and_part(tmp_path: Path):
    rows = "file,class,split1,split2\na.mp4,wave,test,train\nb.mp4,clap,train,test\n"
    (tmp_path / "manifest.csv").write_text(rows)
    labels = ["clap", "wave"]
    assert numbers(EvaluationSet(tmp_path).read(labels)) == [1]
    assert numbers(EvaluationSet(tmp_path, split=2).read(labels)) == [0]
    assert numbers(EvaluationSet(tmp_path, part="train").read(labels)) == [0]
    assert EvaluationSet(tmp_path, split=2).to_record() == {"split": 2}
    assert EvaluationSet(tmp_path, "jester").to_record() == {"split": 1, "dataset": "jester", "part": "validation"}


def test_extracted_frames_keep_their_names_and_their_rate():
    record = VideoRecord(Path("7"), 0, 12, "{:05d}.jpg", 12.0)
    assert as_clips(VideoList((record,), ("wave",))) == [Clip(Path("7"), "wave", "{:05d}.jpg", 12.0)]
