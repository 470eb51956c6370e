"""Events against annotated intervals: counted by hand, against every pairing there is, on a video of two actions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stsm_rt import evaluate
from stsm_rt.decision import Event
from stsm_rt.errors import UserError
from stsm_rt.event_scores import Interval, StreamOutcome, event_record, match, read_annotations
from stsm_rt.playback import ended_events
from stsm_rt.recognizer import Recognizer
from stsm_rt.video.sources import open_source


def event(label: str, start: float, end: float) -> Event:
    return Event(label, start, end, 0.9, round(end * 30))


def outcome(intervals: list[tuple], events: list[tuple], name: str = "v", seconds: float = 60.0) -> StreamOutcome:
    return StreamOutcome(
        name, seconds, tuple(Interval(*each) for each in intervals), tuple(event(*each) for each in events)
    )


HAND = outcome(
    [("wave", 1, 3), ("clap", 5, 6), ("wave", 8, 12), ("jump", 20, 21)],
    # Half a second late; twice, the second time too late for the start and not in the interval; two seconds late but
    # while it lasts; a jump where nobody jumps.
    [("wave", 1.5, 3), ("clap", 5.25, 5.75), ("clap", 6.5, 7), ("wave", 10, 12), ("jump", 40, 41)],
)


def test_the_scores_of_a_stream_counted_by_hand():
    record = event_record([HAND], tolerance=1.0)

    assert (record["annotated"], record["events"], record["seconds"]) == (4, 5, 60)
    start = record["start"]
    assert (start["matched"], start["precision"], start["recall"]) == (2, 2 / 5, 2 / 4)
    assert start["f1"] == pytest.approx(2 * (2 / 5) * (2 / 4) / (2 / 5 + 2 / 4))
    # Shared by united: 1.5 / 2, 0.5 / 1, 2 / 4.
    assert record["overlap"]["matched"] == 3
    assert record["delay"] == {"detected": 3, "median": 0.5, "p90": pytest.approx(0.5 + 0.8 * 1.5)}
    # wave clap wave jump against wave clap clap wave jump: one insertion.
    assert record["levenshtein"] == {"distance": 1, "accuracy": 0.75}
    assert record["per_class"]["wave"] == {
        "annotated": 2,
        "events": 2,
        "matched": 1,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
    }
    assert record["per_class"]["jump"]["f1"] == 0


def test_streams_are_counted_together_and_their_labels_apart():
    first, second = outcome([("a", 1, 2)], [("b", 1, 2)]), outcome([("b", 1, 2)], [("a", 1, 2)])
    record = event_record([first, second], 1.0)
    assert record["start"]["matched"] == 0
    assert record["levenshtein"] == {"distance": 2, "accuracy": 0}
    assert event_record([HAND, HAND], 1.0)["start"]["f1"] == event_record([HAND], 1.0)["start"]["f1"]


def test_where_nothing_was_annotated_or_raised_there_is_no_rate():
    silent = event_record([outcome([], [])], 1.0)
    assert silent["start"] == {"tolerance": 1.0, "matched": 0, "precision": None, "recall": None, "f1": None}
    assert silent["levenshtein"]["accuracy"] is None and silent["delay"]["median"] is None
    deaf = event_record([outcome([("a", 1, 2)], [])], 1.0)
    assert (deaf["start"]["precision"], deaf["start"]["recall"], deaf["start"]["f1"]) == (None, 0, 0)
    assert deaf["levenshtein"]["accuracy"] == 0


def test_the_report_of_a_stream_is_json():
    assert json.loads(json.dumps(event_record([HAND], 1.0)))["videos"][0]["intervals"][0]["label"] == "wave"


@st.composite
def streams(draw: st.DrawFn) -> StreamOutcome:
    spans = st.tuples(st.sampled_from("ab"), st.integers(0, 8), st.integers(1, 6))
    intervals, events = (
        sorted(((label, start / 2, (start + length) / 2) for label, start, length in found), key=lambda each: each[1])
        for found in (draw(st.lists(spans, max_size=5)), draw(st.lists(spans, max_size=5)))
    )
    return outcome(intervals, events)


def fits(interval: Interval, event: Event, criterion: str, tolerance: float) -> bool:
    late = event.start - interval.start
    lasts = interval.start <= event.start <= interval.end if criterion == "interval" else False
    return interval.label == event.label and (abs(late) <= tolerance or lasts)


# The first event fits both intervals, the second only the later one.
@example(outcome([("a", 0, 1), ("a", 1, 2)], [("a", 0.5, 1), ("a", 2, 3)]), "start", 1.0)
@given(streams(), st.sampled_from(["start", "interval"]), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_no_pairing_matches_more(stream: StreamOutcome, criterion, tolerance: float):
    pairs = match(stream.intervals, stream.events, criterion, tolerance)

    assert all(fits(*pair, criterion, tolerance) for pair in pairs)
    assert len({id(interval) for interval, _ in pairs}) == len({id(event) for _, event in pairs}) == len(pairs)
    few, many = sorted((stream.intervals, stream.events), key=len)
    best = 0
    for chosen in itertools.permutations(many, len(few)):
        met = [(a, b) if isinstance(a, Interval) else (b, a) for a, b in zip(few, chosen, strict=True)]
        best = max(best, sum(fits(*pair, criterion, tolerance) for pair in met))
    assert len(pairs) == best


@given(streams(), st.randoms(use_true_random=False))
def test_the_order_of_the_streams_does_not_matter_and_more_tolerance_matches_more(stream: StreamOutcome, random):
    others = [stream, HAND, outcome([("a", 1, 2)], [])]
    before = event_record(others, 1.0)
    random.shuffle(others)
    after = event_record(others, 1.0)
    assert {key: before[key] for key in before if key != "videos"} == {
        key: after[key] for key in after if key != "videos"
    }
    assert before["start"]["matched"] <= event_record(others, 2.0)["start"]["matched"]


@given(streams())
def test_events_that_are_the_annotations_are_perfect(stream: StreamOutcome):
    exact = outcome(
        [vars(each).values() for each in stream.intervals], [vars(each).values() for each in stream.intervals]
    )
    record = event_record([exact], 0.0)
    if exact.intervals:
        assert record["start"]["f1"] == record["overlap"]["f1"] == record["levenshtein"]["accuracy"] == 1
        assert record["delay"]["detected"] == len(exact.intervals)


def test_annotations_are_read_by_video_and_start(tmp_path: Path):
    path = tmp_path / "actions.csv"
    path.write_text("video,label,start,end\nday/a.mp4,clap,7.5,9\nday/a.mp4,wave,1,2.25\nb.mp4,,,\n")
    assert read_annotations(path, ["wave", "clap"]) == {
        tmp_path / "day" / "a.mp4": (Interval("wave", 1.0, 2.25), Interval("clap", 7.5, 9.0)),
        tmp_path / "b.mp4": (),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("video,label,start,end\n", "need the columns"),
        ("video,label,begin,end\na.mp4,wave,1,2\n", "need the columns video, label, start, end"),
        ("video,label,start,end\na.mp4,swim,1,2\n", "line 2 of .* has the label 'swim'; the engine knows wave"),
        ("video,label,start,end\na.mp4,wave,1,\n", "line 2 .* needs seconds"),
        ("video,label,start,end\na.mp4,wave,1,2\na.mp4,wave,3,3\n", "line 3 .* ends at 3 s and starts at 3 s"),
        ("video,label,start,end\na.mp4,wave,nan,2\n", "expected 0 <= start < end"),
        ("video,label,start,end\n,wave,1,2\n", "line 2 .* names no video"),
        ("video,label,start,end\na.mp4,wave\n", "needs seconds"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(text: str, message: str, tmp_path: Path):
    path = tmp_path / "actions.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_annotations(path, ["wave"])


# Of the test list of split 1.
TWO = ("08_pour/0330.mp4", "09_pullup/0429.mp4")


@pytest.fixture(scope="module")
def two_actions(jhmdb: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Two clips of J-HMDB in one video, and when the second begins, in seconds."""
    path, lengths = tmp_path_factory.mktemp("untrimmed") / "two.mp4", []
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (320, 240))
    for clip in TWO:
        with open_source(jhmdb / clip) as source:
            frames = [cv2.resize(frame, (320, 240)) for frame, _ in source]
        lengths.append(len(frames))
        for frame in frames:
            writer.write(frame)
    writer.release()
    return path, lengths[0] / 30


def test_two_actions_in_one_video_score_as_counted_by_hand(two_actions: tuple[Path, float], tmp_path: Path, capsys):
    """The shipped engine raises both events and no other; a third action is annotated that nobody does."""
    video, second = two_actions
    annotations, out = video.with_name("actions.csv"), tmp_path / "report.json"
    lines = [("pour", 0, second), ("wave", 0.5, 0.9), ("pullup", second, 2.3)]
    annotations.write_text("video,label,start,end\n" + "".join(f"two.mp4,{a},{b},{c}\n" for a, b, c in lines))
    recognizer, starts = Recognizer(), []
    with open_source(video) as source:
        for frame, time in source:
            result = recognizer.update(frame, time)
            starts += [each for each in result.events if each.end is None] if result else []

    assert evaluate.main(["--events", str(annotations), "--json", str(out)]) == 0

    assert [each.label for each in starts] == ["pour", "pullup"]
    found = json.loads(out.read_text())["untrimmed"]
    assert (found["annotated"], found["events"], found["start"]["matched"]) == (3, 2, 2)
    assert found["start"]["precision"] == 1
    assert found["start"]["recall"] == pytest.approx(2 / 3) and found["start"]["f1"] == pytest.approx(4 / 5)
    assert found["levenshtein"] == {"distance": 1, "accuracy": pytest.approx(2 / 3)}
    late = [starts[0].start - 0, starts[1].start - second]
    assert found["delay"]["detected"] == 2 and found["delay"]["median"] == pytest.approx(sum(late) / 2)
    assert found["per_class"]["wave"]["recall"] == 0 and found["per_class"]["pullup"]["recall"] == 1
    first, last = found["videos"][0]["events"]
    assert first["end"] <= second + 0.1 and last["end"] == pytest.approx(found["videos"][0]["seconds"])
    shown = capsys.readouterr().out
    assert "precision 100.0 %, recall 66.7 %, F1 80.0 %" in shown and "Levenshtein accuracy 66.7 %" in shown


def test_an_event_that_runs_at_the_end_of_a_video_ends_there(tiny_engine, tmp_path: Path):
    recognizer = Recognizer(tiny_engine.path)
    stream = [(np.full((48, 64, 3), (0, 0, 255), np.uint8), index / 30) for index in range(30)]
    (whole,) = ended_events(recognizer, stream)
    assert (whole.label, whole.end) == ("red", stream[-1][1]) and 0 < whole.start < whole.end
