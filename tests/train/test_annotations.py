from __future__ import annotations

import json
import shutil

import pytest
from made_videos import CLASSES, number_of, write_dataset, write_frames

from stsm_rt.errors import UserError
from stsm_rt.train.annotations import load_videos
from stsm_rt.train.crops import CentreCrop
from stsm_rt.train.video_clips import Sampling, VideoClips

PARTS = {name: ("train", "test" if name in ("ucf101", "hmdb51") else "validation") for name in CLASSES}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    for name in CLASSES:
        write_dataset(name, folder / name)
    write_dataset("list", folder / "rawframes", extracted=True)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    def copied(name):
        return shutil.copytree(made / name, tmp_path / name)

    return copied


@pytest.mark.parametrize("dataset", CLASSES)
def test_each_published_format_gives_its_parts_labels_and_frames(made, dataset):
    seen = []
    for part in PARTS[dataset]:
        videos = load_videos(dataset, made / dataset, part)
        assert videos.classes == CLASSES[dataset]
        assert [record.label for record in videos.records] == [0, 0, 1, 1, 2, 2]
        assert videos.missing == ()
        clips = VideoClips(videos, Sampling(3), CentreCrop(48, (48, 64)), training=False)
        assert [number_of(frame) for frame in clips[5].frames[0].numpy()] == [2, 6, 10]
        seen.append({record.path for record in videos.records})
    assert not seen[0] & seen[1]


def test_the_classes_of_hmdb51_are_in_the_order_of_their_names(tmp_path):
    for name in ("kick_ball", "kick", "wave"):
        (tmp_path / f"{name}_test_split1.txt").write_text(f"{name}.avi 1\n")
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.avi").touch()
    videos = load_videos("hmdb51", tmp_path, "train")
    assert videos.classes == ("kick", "kick_ball", "wave")
    assert [videos.classes[record.label] for record in videos.records] == [r.path.stem for r in videos.records]


def test_one_is_train_and_two_is_test_in_hmdb51(made):
    for part, prefix in (("train", "train_"), ("test", "validation_")):
        videos = load_videos("hmdb51", made / "hmdb51", part)
        assert all(record.path.name.startswith(prefix) for record in videos.records)


def test_frame_lists_of_tsm_and_mmaction2(made):
    videos = load_videos("list", made / "rawframes", "validation", image_template="img_{:05d}.jpg", frame_rate=25.0)
    record = videos.records[2]
    assert record.path == made / "rawframes/bowling/validation_0"
    assert (record.label, record.frames, record.template, record.frame_rate) == (1, 12, "img_{:05d}.jpg", 25.0)
    clip = VideoClips(videos, Sampling(3), CentreCrop(48, (48, 64)), training=False)[2]
    assert [number_of(frame) for frame in clip.frames[0].numpy()] == [2, 6, 10]


@pytest.mark.parametrize("dataset", ["kinetics400", "ucf101", "hmdb51"])
def test_sets_of_videos_are_read_from_extracted_frames_as_well(made, tmp_path, dataset):
    shutil.copytree(made / dataset, tmp_path / "frames")
    for video in [*(tmp_path / "frames").rglob("*.mp4"), *(tmp_path / "frames").rglob("*.avi")]:
        video.unlink()
        write_frames(video.with_suffix(""), 12, "img_{:05d}.jpg")
    part = PARTS[dataset][1]
    videos = load_videos(dataset, tmp_path / "frames", part, image_template="img_{:05d}.jpg")
    as_videos = load_videos(dataset, made / dataset, part)
    assert [r.path.relative_to(tmp_path / "frames") for r in videos.records] == [
        r.path.relative_to(made / dataset).with_suffix("") for r in as_videos.records
    ]
    assert videos.records[0].template == "img_{:05d}.jpg"


@pytest.mark.parametrize("name", ["{id}.mp4", "{id}_7_17.mkv", "replaced/{id}_000007_000017.mp4"])
def test_kinetics_videos_are_found_under_the_usual_names(copy, name):
    folder = copy("kinetics400")
    for video in list((folder / "train").rglob("*.mp4")):
        target = folder / "train" / name.format(id=video.name[: -len("_000007_000017.mp4")])
        target.parent.mkdir(exist_ok=True)
        video.rename(target)
    assert len(load_videos("kinetics400", folder, "train").records) == 6


def test_annotations_may_be_elsewhere(copy, tmp_path):
    folder = copy("jester")
    (tmp_path / "lists").mkdir()
    for file in folder.glob("*.csv"):
        file.rename(tmp_path / "lists" / file.name)
    frames = folder / "20bn-jester-v1"
    assert len(load_videos("jester", frames, "train", annotations=tmp_path / "lists").records) == 6
    listed = copy("list")
    lists = tmp_path / "mmaction2"
    lists.mkdir()
    (listed / "category.txt").rename(lists / "label_map_k3.txt")
    (listed / "val_videofolder.txt").rename(lists / "k3_val_list_videos.txt")
    (listed / "train_videofolder.txt").rename(lists / "k3_train_list_videos.txt")
    for place in (lists, lists / "k3_val_list_videos.txt"):
        videos = load_videos("list", listed, "validation", annotations=place)
        assert videos.records[5].path == listed / "yoga/validation_1.mp4"
    with pytest.raises(UserError, match="is not the train list by its name"):
        load_videos("list", listed, "train", annotations=lists / "k3_val_list_videos.txt")


def test_a_path_with_spaces_keeps_them(copy):
    folder = copy("list")
    (folder / "archery/train_0.mp4").rename(folder / "archery/by the sea 7.mp4")
    (folder / "train_videofolder.txt").write_text("archery/by the sea 7.mp4 0\nyoga/train_1.mp4 2\n")
    assert [r.path.name for r in load_videos("list", folder, "train").records] == ["by the sea 7.mp4", "train_1.mp4"]


def test_the_answers_of_something_somethings_test_list_are_its_labels(copy):
    folder = copy("something_something_v2")
    with pytest.raises(UserError, match=r"test-answers\.csv"):
        load_videos("something_something_v2", folder, "test")
    (folder / "labels/test-answers.csv").write_text("100;Turning something\n")
    assert [r.label for r in load_videos("something_something_v2", folder, "test").records] == [0]


def test_missing_videos_are_counted_and_listed_up_to_the_limit(copy):
    folder = copy("kinetics400")
    lost = [sorted((folder / "train").rglob("*.mp4"))[index] for index in (1, 4)]
    for video in lost:
        video.unlink()
    with pytest.raises(UserError, match=r"2 of the 6 videos in .*train\.csv are not in .* limit of 1\.00%, the first"):
        load_videos("kinetics400", folder, "train")
    videos = load_videos("kinetics400", folder, "train", missing=0.34)
    assert videos.missing == tuple(video.stem for video in lost)
    assert [record.label for record in videos.records] == [0, 1, 1, 2]


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def no_labels(folder):
    file = folder / "validate.csv"
    file.write_text("\n".join(line.partition(",")[2] for line in file.read_text().splitlines()))


BROKEN = {
    "kinetics400": [
        (lambda f: (f / "train.csv").unlink(), "expected the annotation file train.csv"),
        (lambda f: edit(f / "validate.csv", "zumba", "tango"), "the label 'tango', which is not among the classes"),
        (lambda f: edit(f / "validate.csv", "youtube_id", "id"), "has no column youtube_id"),
        (lambda f: edit(f / "validate.csv", ",7,", ",soon,"), "expected seconds"),
        (lambda f: edit(f / "validate.csv", ",7,", ","), "more or fewer fields"),
        (lambda f: edit(f / "validate.csv", "zumba,", '"zumba,'), "more or fewer fields"),
        (no_labels, "has no column label"),
        (lambda f: (f / "validate.csv").write_text("label,youtube_id,time_start,time_end,split\n"), "lists no video"),
        (lambda f: (f / "validate.csv").write_bytes(b"\xff\xfe\x00"), "expected text in UTF-8"),
    ],
    "something_something_v2": [
        (lambda f: (f / "labels/labels.json").unlink(), r"labels\.json or something"),
        (lambda f: (f / "labels/labels.json").write_text("[]"), "should hold a JSON object"),
        (lambda f: edit(f / "labels/labels.json", '"1"', '"5"'), "should number its templates"),
        (lambda f: (f / "labels/validation.json").write_text("{"), "is not JSON"),
        (lambda f: edit(f / "labels/validation.json", "template", "text"), "should have an id and a template"),
        (lambda f: edit(f / "labels/validation.json", "Turning [", "Eating ["), "the label 'Eating something'"),
    ],
    "jester": [
        (lambda f: (f / "jester-v1-labels.csv").unlink(), r"jester-v1-labels\.csv or"),
        (lambda f: edit(f / "jester-v1-validation.csv", ";No gesture", ";Shrug"), "the label 'Shrug'"),
        (lambda f: edit(f / "jester-v1-validation.csv", ";", ","), "expected lines 'id;label'"),
    ],
    "ucf101": [
        (lambda f: (f / "ucfTrainTestlist/classInd.txt").unlink(), r"classInd\.txt"),
        (lambda f: edit(f / "ucfTrainTestlist/classInd.txt", "2 ", "7 "), "numbered from 1 on"),
        (lambda f: edit(f / "ucfTrainTestlist/testlist01.txt", "YoYo/", "Yo/"), "the label 'Yo'"),
    ],
    "hmdb51": [
        (lambda f: shutil.rmtree(f / "testTrainMulti_7030_splits"), r"such as wave_test_split1\.txt"),
        (lambda f: edit(next(f.glob("*/wave_test*")), " 2", " 3"), "with 0, 1 or 2"),
    ],
    "list": [
        (lambda f: (f / "category.txt").unlink(), "expected one file of class names"),
        (lambda f: (f / "my_val_list.txt").write_text("a 1"), "found my_val_list.txt, val_videofolder.txt"),
        (lambda f: edit(f / "val_videofolder.txt", " 2\n", " 3\n"), "has the label 3, but .* has 3 classes"),
        (lambda f: edit(f / "val_videofolder.txt", " 2\n", " yoga\n"), "expected lines 'path label'"),
    ],
}


@pytest.mark.parametrize(
    ("dataset", "spoil", "sentence"), [(name, *case) for name, cases in BROKEN.items() for case in cases]
)
def test_broken_annotations_are_one_sentence(copy, dataset, spoil, sentence):
    folder = copy(dataset)
    spoil(folder)
    with pytest.raises(UserError, match=sentence) as raised:
        load_videos(dataset, folder, PARTS[dataset][1])
    assert "\n" not in str(raised.value)


def test_what_does_not_exist_is_one_sentence(made, tmp_path):
    for arguments, sentence in [
        (("imagenet", made, "train"), "unknown dataset 'imagenet'; expected one of kinetics400"),
        (("ucf101", made / "ucf101", "validation"), "ucf101 has the parts train, test, not 'validation'"),
        (("ucf101", tmp_path / "none", "train"), "which does not exist"),
        (("list", made / "rawframes", "train"), "say how these are named"),
    ]:
        with pytest.raises(UserError, match=sentence):
            load_videos(*arguments)
    with pytest.raises(UserError, match="splits 1, 2 and 3, not 4"):
        load_videos("hmdb51", made / "hmdb51", "train", split=4)
    with pytest.raises(UserError, match=r"which does not exist"):
        load_videos("jester", made / "jester", "train", annotations=tmp_path / "none")
    for template in ("img.jpg", "img_{}_{}.jpg", "img_{name}.jpg"):
        with pytest.raises(UserError, match="expected a name with a number"):
            load_videos("jester", made / "jester", "train", image_template=template)


def test_a_label_file_may_start_with_a_byte_order_mark(copy):
    folder = copy("something_something_v2")
    file = folder / "labels/labels.json"
    file.write_text(json.dumps(json.loads(file.read_text())), encoding="utf-8-sig")
    assert load_videos("something_something_v2", folder, "train").classes == CLASSES["something_something_v2"]
