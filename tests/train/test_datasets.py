from __future__ import annotations

import dataclasses

import pytest
import torch

from stsm_rt.errors import UserError
from stsm_rt.train.datasets import hold_out, load_jhmdb, load_shrec17, sample_indices


def test_a_held_out_part_shares_no_group_with_the_rest(moving_squares):
    indices = torch.arange(0, 120)
    held = []
    for fold in range(3):
        split = hold_out(moving_squares, indices, fold, 3)
        groups = [{moving_squares.groups[i] for i in side.tolist()} for side in (split.train, split.test)]
        assert not groups[0] & groups[1]
        assert sorted([*split.train.tolist(), *split.test.tolist()]) == indices.tolist()
        held += split.test.tolist()
    assert sorted(held) == indices.tolist()


def test_a_group_of_two_classes_stays_whole(moving_squares):
    clips = dataclasses.replace(moving_squares, groups=("one",) * 8 + moving_squares.groups[8:])
    split = hold_out(clips, torch.arange(40), 0, 2)
    inside = [i for i in range(8) if i in split.test.tolist()]
    assert inside in ([], list(range(8)))


def test_whole_clips_are_sampled_at_the_models_rate():
    indices, valid = sample_indices([40, 15], 3.0, 14)
    assert indices[0].tolist() == list(range(0, 40, 3))
    assert valid[0].all()
    assert valid[1].sum() == 5
    assert indices[1].max() == 14


@pytest.mark.slow
def test_jhmdb_is_read_whole_and_its_first_split_shares_no_source(jhmdb):
    clips, split = load_jhmdb(jhmdb, 1)
    assert clips.frames.shape == (928, 40, 160, 214, 3)
    assert (len(split.train), len(split.test)) == (660, 268)
    assert len(clips.classes) == 21
    # A film may give clips of several actions, but never of one action to both sides.
    sources = [(clips.groups[i], int(clips.labels[i])) for i in range(len(clips.labels))]
    sides = [{sources[i] for i in side.tolist()} for side in (split.train, split.test)]
    assert not sides[0] & sides[1]


def test_shrec17_has_other_people_in_its_test_list(jhmdb):
    clips, split = load_shrec17(jhmdb.parent / "shrec17")
    assert (len(split.train), len(split.test)) == (1960, 840)
    sides = [{clips.groups[i] for i in side.tolist()} for side in (split.train, split.test)]
    assert sides[1] == {f"person_{n}" for n in (1, 5, 6, 17, 18, 23, 24, 28)}
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("load", [lambda folder: load_jhmdb(folder, 1), load_shrec17])
def test_a_folder_without_the_data_is_one_sentence(tmp_path, load):
    with pytest.raises(UserError, match="found none"):
        load(tmp_path)
