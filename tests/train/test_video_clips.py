from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_videos import number_of, write_dataset, write_frames, write_video
from torch.utils.data import DataLoader

from stsm_rt.errors import UserError
from stsm_rt.sampler import Sampler
from stsm_rt.train.annotations import VideoList, VideoRecord, load_videos
from stsm_rt.train.crops import CentreCrop, MultiScaleCrop, ThreeCrops
from stsm_rt.train.video_clips import Sampling, VideoClips, collate, frame_indices, read_batches

counts, segments = st.integers(1, 400), st.sampled_from([1, 4, 8, 16])


def regular(count: int, rate: float = 30.0) -> np.ndarray:
    return np.arange(count) / rate


@settings(max_examples=100, deadline=None)
@given(count=counts, parts=segments)
def test_test_clips_are_tsms(count, parts):
    tick = count / parts
    middle = [int(tick / 2 + tick * part) for part in range(parts)]
    start = [int(tick * part) for part in range(parts)]
    assert frame_indices(Sampling(parts), regular(count), None).tolist() == [middle]
    two = frame_indices(Sampling(parts, views=2), regular(count), None).tolist()
    assert sorted(two) == sorted([middle, start])


@settings(max_examples=100, deadline=None)
@given(count=counts, parts=segments, seed=st.integers(0, 99))
def test_training_clips_have_one_random_frame_of_each_part(count, parts, seed):
    random = np.random.default_rng(seed)
    draws = np.concatenate([frame_indices(Sampling(parts), regular(count), random) for _ in range(50)])
    length = count // parts
    if length == 0:
        assert (draws == frame_indices(Sampling(parts), regular(count), None)).all()
        return
    assert (draws // length == np.arange(parts)).all()
    if 1 < length < 5:
        assert {*(draws[:, 0]).tolist()} == {*range(length)}


@settings(max_examples=100, deadline=None)
@given(count=counts, parts=st.sampled_from([1, 8, 16]), seed=st.integers(0, 99))
def test_dense_clips_are_tsms(count, parts, seed):
    sampling = Sampling(parts, dense_span=64, views=10)
    positions = max(1, 1 + count - 64)
    published = [
        [(index * (64 // parts) + start) % count for index in range(parts)]
        for start in np.linspace(0, positions - 1, num=10, dtype=int).tolist()
    ]
    assert frame_indices(sampling, regular(count), None).tolist() == published
    (clip,) = frame_indices(sampling, regular(count), np.random.default_rng(seed)).tolist()
    assert clip in [[(index * (64 // parts) + start) % count for index in range(parts)] for start in range(positions)]


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.floats(0.01, 0.2), min_size=1, max_size=80),
    rate=st.sampled_from([5.0, 10.0, 12.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_a_stream_is_what_the_recognizer_takes_from_some_frame_on(gaps, rate, seed):
    times = np.cumsum(gaps) - gaps[0]
    for random in (np.random.default_rng(seed), None):
        (clip,) = frame_indices(Sampling(6, frame_rate=rate), times, random).tolist()
        sampler = Sampler(rate)
        taken = [index for index in range(clip[0], len(times)) if sampler.take(times[index])]
        assert clip == (taken + [taken[-1]] * 6)[:6]
        if clip[0]:  # no start that the video is too short for
            assert len({*clip}) == 6


def test_a_stream_of_30_frames_a_second_at_10_takes_every_third_and_starts_anywhere():
    sampling = Sampling(4, frame_rate=10.0)
    random = np.random.default_rng(0)
    draws = np.concatenate([frame_indices(sampling, regular(20), random) for _ in range(300)])
    assert (np.diff(draws) == 3).all()
    assert {*draws[:, 0].tolist()} == {*range(11)}
    views = frame_indices(Sampling(4, frame_rate=10.0, views=3), regular(20), None)
    assert views[:, 0].tolist() == [0, 5, 10]


@pytest.mark.parametrize(
    "wrong",
    [
        {"segments": 0},
        {"segments": 8, "views": 0},
        {"segments": 8, "dense_span": 4},
        {"segments": 8, "dense_span": 64, "frame_rate": 5.0},
    ],
)
def test_an_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=r"frame|view|window"):
        Sampling(**wrong)


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory) -> VideoList:
    return load_videos("kinetics400", write_dataset("kinetics400", tmp_path_factory.mktemp("k"), frames=30), "train")


WHOLE = CentreCrop(48, (48, 64))


def test_a_clip_holds_the_frames_it_chose_with_their_label(kinetics):
    clips = VideoClips(kinetics, Sampling(4, views=2), WHOLE, training=False)
    for index in range(len(clips)):
        clip = clips[index]
        assert clip.frames.shape == (2, 4, 48, 64, 3)
        assert (clip.label, clip.index) == (kinetics.records[index].label, index)
        assert [[number_of(frame) for frame in view.numpy()] for view in clip.frames] == [
            [0, 7, 15, 22],
            [3, 11, 18, 26],
        ]


def test_views_come_before_crops(kinetics):
    clip = VideoClips(kinetics, Sampling(4, views=2), ThreeCrops(24, (24, 24)), training=False)[0]
    assert clip.frames.shape == (6, 4, 24, 24, 3)
    single = VideoClips(kinetics, Sampling(4, views=2), CentreCrop(24, (24, 24)), training=False)[0]
    assert torch.equal(clip.frames[[2, 5]], single.frames)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_clips_depend_on_seed_epoch_and_number_alone(kinetics, workers):
    clips = VideoClips(kinetics, Sampling(4), MultiScaleCrop((24, 24)), training=True, seed=3)
    loader = DataLoader(clips, batch_size=2, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
    seen = []
    for epoch in (0, 1, 0):
        clips.set_epoch(epoch)
        seen.append(torch.cat([batch.frames for batch in read_batches(loader)]))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    again = VideoClips(kinetics, Sampling(4), MultiScaleCrop((24, 24)), training=True, seed=3)
    again.set_epoch(1)
    assert torch.equal(seen[1][4], again[4].frames)
    other = VideoClips(kinetics, Sampling(4), MultiScaleCrop((24, 24)), training=True, seed=4)
    assert not all(torch.equal(seen[0][index], other[index].frames) for index in range(len(other)))


def with_broken(folder, count: int, broken: set[int]) -> VideoList:
    records = []
    for index in range(count):
        path = write_video(folder / f"{index}.mp4", 6)
        if index in broken:
            path.write_bytes(b"nothing")
        records.append(VideoRecord(path, index % 2))
    return VideoList(tuple(records), ("a", "b"))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_videos_are_listed_and_left_out_not_replaced(tmp_path, workers):
    videos, log = with_broken(tmp_path, 8, {2, 4, 5}), tmp_path / "unreadable.jsonl"
    clips = VideoClips(videos, Sampling(2), WHOLE, training=False, unreadable=0.5, unreadable_log=log)
    loader = DataLoader(clips, batch_size=2, collate_fn=collate, num_workers=workers)
    for _ in range(2):
        batches = list(read_batches(loader))
        assert [batch.indices.tolist() for batch in batches] == [[0, 1], [3], [6, 7]]
        assert [batch.labels.tolist() for batch in batches] == [[0, 1], [1], [0, 1]]
    assert clips.unreadable == tuple(tmp_path / f"{index}.mp4" for index in (2, 4, 5))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == [str(path) for path in clips.unreadable]
    assert all("cannot be decoded (Invalid data" in line["reason"] for line in lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_videos_end_the_run_with_one_sentence(tmp_path, workers):
    clips = VideoClips(
        with_broken(tmp_path, 8, {2, 4, 5}),
        Sampling(2),
        WHOLE,
        training=False,
        unreadable=0.25,
        unreadable_log=tmp_path / "unreadable.jsonl",
    )
    loader = DataLoader(clips, batch_size=8, collate_fn=collate, num_workers=workers)
    with pytest.raises(UserError, match=r"of 8 videos cannot be decoded, more than the limit of 25\.00%") as raised:
        list(read_batches(loader))
    assert "\n" not in str(raised.value)
    assert "unreadable.jsonl" in str(raised.value)


def test_a_stream_needs_the_frame_rate_of_extracted_frames(tmp_path):
    folder = write_frames(tmp_path / "1", 24, "{:05d}.jpg")
    sampling = Sampling(4, frame_rate=6.0)
    for rate, numbers in ((12.0, [8, 10, 12, 14]), (None, None)):
        record = VideoRecord(folder, 0, template="{:05d}.jpg", frame_rate=rate)
        clips = VideoClips(VideoList((record,), ("a",)), sampling, WHOLE, training=False)
        if rate is None:
            with pytest.raises(UserError, match="give the data set's frame rate"):
                clips[0]
        else:
            assert [number_of(frame) for frame in clips[0].frames[0].numpy()] == numbers
