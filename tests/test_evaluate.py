from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from stsm_rt import evaluate
from stsm_rt.confusion import draw_confusion
from stsm_rt.errors import UserError
from stsm_rt.playback import Clip, loop_clip, play_clip, read_clips
from stsm_rt.recognizer import Recognizer

BGR = {"blue": (255, 0, 0), "green": (0, 255, 0), "red": (0, 0, 255), "black": (0, 0, 0)}


def write_video(path: Path, colours: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (64, 48))
    assert writer.isOpened()
    for colour in colours:
        writer.write(np.full((48, 64, 3), BGR[colour], np.uint8))
    writer.release()
    return path


def write_images(folder: Path, colours: list[str]) -> Path:
    folder.mkdir(parents=True)
    for index, colour in enumerate(colours):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((48, 64, 3), BGR[colour], np.uint8))
    return folder


def write_list(data: Path, rows: list[tuple[str, str, str]]) -> Path:
    with (data / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "class", "split1"), *rows])
    return data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three clips that show their class, one that does not, and one of the training list."""
    folder = tmp_path / "data"
    for name in ("blue", "green", "red"):
        write_video(folder / f"{name}.mp4", [name] * 24)
    write_video(folder / "wrong.mp4", ["red"] * 24)
    write_video(folder / "train.mp4", ["black"] * 24)
    rows = [(f"{name}.mp4", name, "test") for name in ("blue", "green", "red")]
    return write_list(folder, [*rows, ("wrong.mp4", "blue", "test"), ("train.mp4", "blue", "train")])


@pytest.fixture
def recognizer(tiny_engine) -> Recognizer:
    return Recognizer(tiny_engine.path, topk=5)


def test_the_report_counts_the_test_clips_of_the_split(tiny_engine, data: Path, tmp_path: Path, capsys):
    out = tmp_path / "report.json"

    code = evaluate.main(["--engine", str(tiny_engine.path), "--data", str(data), "--split", "1", "--json", str(out)])

    assert code == 0
    report = json.loads(out.read_text())
    assert (report["clips"], report["top1"], report["top5"], report["split"]) == (4, 0.75, 1.0, 1)
    assert report["engine_sha256"] == tiny_engine.manifest.sha256
    assert report["per_class"] == {
        "blue": {"clips": 2, "recall": 0.5, "precision": 1.0},
        "green": {"clips": 1, "recall": 1.0, "precision": 1.0},
        "red": {"clips": 1, "recall": 1.0, "precision": 0.5},
    }
    assert report["mean_class_accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert (report["protocol"], report["missing"], report["unreadable"]) == ("streaming", [], [])
    assert report["confusion"] == {
        "labels": ["blue", "green", "red"],
        "matrix": [[1, 0, 1], [0, 1, 0], [0, 0, 1]],
    }
    assert "75.0 %" in capsys.readouterr().out
    picture = cv2.imread(str(out.with_suffix(".png")))
    assert picture is not None and picture.std() > 5
    assert {path.name for path in tmp_path.iterdir()} == {"data", "report.json", "report.png"}


def test_the_calibration_error_is_of_the_scores_that_people_see(tiny_engine, data: Path, recognizer, tmp_path: Path):
    out = tmp_path / "report.json"
    assert evaluate.main(["--engine", str(tiny_engine.path), "--data", str(data), "--json", str(out)]) == 0
    shown = {name: list(recognizer.run(data / f"{name}.mp4"))[-1].score for name in ("blue", "green", "red", "wrong")}
    # All are surer than 14 of 15, so they share the last bin.
    assert min(shown.values()) > 14 / 15
    assert json.loads(out.read_text())["calibration_error"] == pytest.approx(abs(0.75 - np.mean(list(shown.values()))))


def test_the_prediction_is_the_one_at_the_last_frame_and_settles_where_it_last_changed(recognizer, tmp_path: Path):
    clip = Clip(write_images(tmp_path / "clip", ["green"] * 30 + ["red"] * 30), "red")

    outcome = play_clip(recognizer, clip)

    labels = {result.frame: result.label for result in recognizer.run(clip.path)}
    assert outcome.prediction == "red" == labels[max(labels)]
    assert 30 <= outcome.settles < 60 and outcome.settles in labels
    assert all(labels[frame] == "red" for frame in labels if frame >= outcome.settles)
    assert labels[max(frame for frame in labels if frame < outcome.settles)] == "green"
    assert outcome.frames == 60


def test_a_clip_that_never_changes_its_label_settles_at_its_first_frame(recognizer, tmp_path: Path):
    clip = Clip(write_images(tmp_path / "clip", ["green"] * 9), "green")
    assert play_clip(recognizer, clip).settles == 0


def test_a_clip_is_played_from_a_fresh_state(recognizer, tmp_path: Path):
    red, blue = (Clip(write_images(tmp_path / name, [name]), name) for name in ("red", "blue"))
    assert [play_clip(recognizer, clip).prediction for clip in (red, blue, red)] == ["red", "blue", "red"]


def test_the_top_five_hold_the_true_label_or_not(make_engine, tmp_path: Path):
    recognizer = Recognizer(make_engine().path, topk=2)
    clip = Clip(write_images(tmp_path / "clip", ["red"] * 12), "blue")
    ranked = list(recognizer.run(clip.path))[-1].labels
    absent = next(label for label in ("blue", "green") if label not in ranked)

    assert not play_clip(recognizer, Clip(clip.path, absent)).in_top5
    assert play_clip(recognizer, Clip(clip.path, ranked[1])).in_top5


def test_a_looped_clip_lasts_four_seconds_and_raises_its_event(recognizer, tmp_path: Path, monkeypatch):
    clip = Clip(write_images(tmp_path / "clip", ["red"] * 4), "red")
    times = []
    update = recognizer.update
    monkeypatch.setattr(recognizer, "update", lambda frame, time: times.append(time) or update(frame, time))

    events = loop_clip(recognizer, clip, seconds=4.0)

    assert [event.label for event in events] == ["red"]
    assert len(times) == 120 and np.allclose(np.diff(times), 1 / 30)


def test_loop_events_count_only_correctly_classified_clips(tiny_engine, data: Path, tmp_path: Path):
    out = tmp_path / "report.json"
    engine = ["--engine", str(tiny_engine.path)]

    assert evaluate.main([*engine, "--data", str(data), "--loop-events", "--json", str(out)]) == 0

    expected = {"seconds": 4.0, "clips": 3, "own": 3, "other": 0, "share": 1.0}
    assert json.loads(out.read_text())["loop_events"] == expected


def test_loop_events_use_the_thresholds_of_the_manifest(make_engine, data: Path, tmp_path: Path):
    spec = make_engine().manifest.decision
    deaf = make_engine(decision=type(spec)(smoothing=3, threshold=1.0, release=0.4, min_steps=2))
    out = tmp_path / "report.json"

    assert evaluate.main(["--engine", str(deaf.path), "--data", str(data), "--loop-events", "--json", str(out)]) == 0

    assert json.loads(out.read_text())["loop_events"]["own"] == 0


def test_negatives_count_every_event_of_every_video_in_a_folder(tiny_engine, tmp_path: Path):
    write_video(tmp_path / "videos" / "a.mp4", ["black"] * 60)
    write_video(tmp_path / "videos" / "deep" / "b.mp4", (["black"] * 30 + ["red"] * 30) * 2)
    out = tmp_path / "report.json"

    code = evaluate.main(
        ["--engine", str(tiny_engine.path), "--negatives", str(tmp_path / "videos"), "--json", str(out)]
    )

    assert code == 0
    report = json.loads(out.read_text())
    a, b = report["negatives"]["videos"]
    assert (a["file"], a["events"]) == ("a.mp4", [])
    assert [event["label"] for event in b["events"]] == ["red", "red"]
    total = report["negatives"]
    assert total["seconds"] == pytest.approx(59 / 30 + 119 / 30, abs=0.05)
    assert total["events_per_minute"] == pytest.approx(120 / total["seconds"])
    assert "top1" not in report and not out.with_suffix(".png").exists()


def test_rooms_count_events_for_that_many_minutes(make_engine, tmp_path: Path):
    spec = make_engine().manifest.decision
    jumpy = make_engine(background=None, decision=type(spec)(smoothing=1, threshold=0.0, release=0.0, min_steps=1))
    calm = make_engine(decision=type(spec)(smoothing=1, threshold=1.0, release=0.0, min_steps=1))
    out = tmp_path / "report.json"

    rooms = []
    for engine in (jumpy, calm):
        assert evaluate.main(["--engine", str(engine.path), "--rooms", "0.1", "--seed", "3", "--json", str(out)]) == 0
        rooms.append(json.loads(out.read_text())["rooms"])

    assert [room["seconds"] for room in rooms] == [6, 6]
    assert len(rooms[0]["events"]) >= 1 and rooms[1]["events"] == []
    assert rooms[0]["events_per_minute"] == pytest.approx(10 * len(rooms[0]["events"]))


def test_a_class_that_the_engine_does_not_know_is_named(data: Path):
    with pytest.raises(UserError, match="does not know the class 'red'"):
        read_clips(data, 1, ["blue", "green"])


def test_a_recording_in_which_nothing_was_annotated_counts_its_events_as_wrong(tiny_engine, tmp_path: Path):
    write_video(tmp_path / "a.mp4", ["black"] * 30 + ["red"] * 30 + ["black"] * 30)
    write_video(tmp_path / "b.mp4", ["green"] * 30)
    (tmp_path / "actions.csv").write_text("video,label,start,end\na.mp4,red,1,2\nb.mp4,,,\n")
    out = tmp_path / "report.json"
    events = ["--engine", str(tiny_engine.path), "--events", str(tmp_path / "actions.csv"), "--json", str(out)]

    assert evaluate.main(events) == 0

    untrimmed = json.loads(out.read_text())["untrimmed"]
    assert (untrimmed["annotated"], untrimmed["events"]) == (1, 2)
    assert (untrimmed["start"]["precision"], untrimmed["start"]["recall"]) == (0.5, 1.0)
    assert 0 < untrimmed["delay"]["median"] < 0.6
    assert untrimmed["levenshtein"] == {"distance": 1, "accuracy": 0.0}
    assert untrimmed["seconds"] == pytest.approx(89 / 30 + 29 / 30)
    assert evaluate.main([*events, "--tolerance", "0"]) == 0
    assert json.loads(out.read_text())["untrimmed"]["start"]["matched"] == 0


def test_what_cannot_be_used_is_one_sentence_and_leaves_nothing(tiny_engine, data: Path, tmp_path: Path, capsys):
    text = tmp_path / "data" / "blue.mp4"
    text.write_text("this is no video")
    engine, out = ["--engine", str(tiny_engine.path)], tmp_path / "report.json"
    for arguments in (
        [*engine, "--data", str(data)],
        [*engine, "--data", str(data), "--split", "7"],
        [*engine, "--data", str(tmp_path)],
        [*engine, "--negatives", str(text)],
        [*engine, "--negatives", str(tmp_path / "absent.mp4")],
        [*engine, "--events", str(tmp_path / "absent.csv")],
        [*engine, "--data", str(data), "--dataset", "ucf101"],
        ["--engine", str(tmp_path / "absent.onnx"), "--data", str(data)],
    ):
        assert evaluate.main([*arguments, "--json", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("stsm-rt: error: ") and error.count("\n") == 1
    assert evaluate.main([*engine, "--rooms", "0.01", "--json", str(tmp_path / "absent" / "report.json")]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to play"),
        (["--rooms", "0"], "nothing to play"),
        (["--loop-events", "--rooms", "1"], "--loop-events needs --data"),
        (["--dataset", "jester", "--rooms", "1"], "--dataset needs --data"),
        (["--data", "d", "--annotations", "a"], "need --dataset"),
        (["--data", "d", "--frame-rate", "12"], "need --dataset"),
        (["--data", "d", "--protocol", "dense"], "--protocol dense needs --weights and --data"),
        (["--weights", "w", "--rooms", "1", "--protocol", "dense"], "--protocol dense needs --weights and --data"),
        (["--weights", "w", "--data", "d", "--protocol", "dense", "--events", "e"], "events are found with"),
        (["--weights", "w", "--data", "d", "--protocol", "dense", "--loop-events"], "events are found with"),
        (["--weights", "w", "--data", "d", "--protocol", "dense", "--frames", "0"], "--frames must be at least 1"),
        (["--data", "d", "--frames", "8"], "need --protocol efficient, accurate or dense"),
        (["--weights", "w", "--engine", "e", "--data", "d"], "not allowed with"),
        (["--events", "e", "--tolerance", "-1"], "--tolerance must be a number of seconds from 0 on, not -1"),
        (["--events", "e", "--tolerance", "nan"], "--tolerance must be a number of seconds from 0 on, not nan"),
        (["--rooms", "inf"], "--rooms must be a number of minutes from 0 on, not inf"),
        (["--data", "d", "--dataset", "list", "--frame-rate", "-5"], "--frame-rate must be a positive number"),
        (["--data", "d", "--weights", "w", "--protocol", "dense", "--workers", "-1"], "--workers must be at least 0"),
        (["--data", "d", "--dataset", "list", "--missing", "2"], "--missing must be a share from 0 to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_picture_is_darkest_where_the_counts_are():
    def cell(picture: np.ndarray, row: int, column: int) -> float:
        height, width = picture.shape[:2]
        left, top = width - 18 - 86 - 3 * 34, height - 18 - 24 - 3 * 34
        # The lower edge of a cell, where no number is written.
        return float(picture[top + row * 34 + 28, left + column * 34 + 6].mean())

    picture = draw_confusion(["a", "bb", "ccc"], np.array([[9, 0, 1], [0, 10, 0], [0, 10, 0]]), "title")

    assert cell(picture, 2, 1) < cell(picture, 0, 0) < cell(picture, 0, 2) < cell(picture, 0, 1)
    assert cell(picture, 2, 2) == cell(picture, 0, 1)


def test_a_matrix_of_many_classes_is_drawn_as_shades_that_fit_a_screen():
    matrix = np.eye(400, dtype=int) * 50
    matrix[7, 300] = 10_000
    picture = draw_confusion([str(i) for i in range(400)], matrix, "title")

    assert max(picture.shape) < 2000
    cell = picture[18 + 34 :, 18:][::4, ::4].mean(2)[:400, :400]
    assert cell[7, 300] < cell[7, 7] and cell[8, 8] == cell[399, 399] < cell[8, 9] == cell[0, 399]
