from __future__ import annotations

import csv
import dataclasses

import pytest
import torch

from stsm_rt.errors import UserError
from stsm_rt.networks import stream
from stsm_rt.train.loop import Trainer
from stsm_rt.train.memory_clips import BACKGROUND

TRAIN, TEST = torch.arange(0, 96), torch.arange(96, 160)


@pytest.fixture(autouse=True)
def same_threads():
    torch.set_num_threads(1)


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("shift", "low", "high"), [("none", 0.2, 0.8), ("tsm_online", 0.9, 1.0)])
def test_only_a_temporal_shift_tells_left_from_right(moving_squares, small_recipe, shift, low, high):
    recipe = dataclasses.replace(small_recipe, shift=shift, epochs=8)
    trainer = Trainer(recipe, moving_squares, TRAIN)
    trainer.run()
    assert low <= trainer.accuracy(TEST) <= high


def test_the_trained_network_streams_as_it_was_trained(moving_squares, small_recipe):
    trainer = Trainer(dataclasses.replace(small_recipe, shift="stsm_online", epochs=1), moving_squares, TRAIN)
    network = trainer.run()
    clip = moving_squares.frames[TEST[:4]].expand(-1, -1, -1, -1, 3)
    with torch.no_grad():
        expected = network(clip)
    torch.testing.assert_close(stream(network, clip), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(moving_squares, small_recipe, tmp_path):
    recipe = dataclasses.replace(small_recipe, ema=0.9)
    whole = weights(Trainer(recipe, moving_squares, TRAIN).run())

    class Cut(Exception):
        pass

    def cut(epoch, loss):
        if epoch == 2:
            raise Cut

    with pytest.raises(Cut):
        Trainer(recipe, moving_squares, TRAIN, folder=tmp_path, progress=cut).run()
    resumed = weights(Trainer(recipe, moving_squares, TRAIN, folder=tmp_path).run(resume=True))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)
    lines = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [line["epoch"] for line in lines] == ["1", "2", "3", "4"]


def test_a_checkpoint_of_another_recipe_is_refused(moving_squares, small_recipe, tmp_path):
    Trainer(dataclasses.replace(small_recipe, epochs=1), moving_squares, TRAIN, folder=tmp_path).run()
    other = Trainer(dataclasses.replace(small_recipe, epochs=1, lr=1e-3), moving_squares, TRAIN, folder=tmp_path)
    with pytest.raises(UserError, match="another recipe"):
        other.run(resume=True)


def test_a_background_adds_a_class_whose_clips_stand_still(moving_squares, small_recipe):
    recipe = dataclasses.replace(small_recipe, background=1.0)
    trainer = Trainer(recipe, moving_squares, TRAIN)
    assert trainer.classes == ("left", "right", BACKGROUND)
    frames, targets, step_weights = trainer.data.training_batch(TRAIN[:8])
    assert targets.argmax(1).tolist() == [2] * 8
    torch.testing.assert_close(step_weights.sum(1), torch.ones(8))
    squares = frames > 120
    assert (squares[:, 0] == squares[:, -1]).float().mean() > 0.97


def test_steps_beyond_a_short_clip_carry_no_weight(moving_squares, small_recipe):
    short = dataclasses.replace(moving_squares, lengths=torch.full_like(moving_squares.lengths, 3))
    _, _, step_weights = Trainer(small_recipe, short, TRAIN).data.training_batch(TRAIN[:8])
    assert (step_weights[:, 3:] == 0).all()
    torch.testing.assert_close(step_weights.sum(1), torch.ones(8))


def test_the_same_seed_gives_the_same_weights(moving_squares, small_recipe):
    recipe = dataclasses.replace(small_recipe, epochs=1)
    first, second = (weights(Trainer(recipe, moving_squares, TRAIN).run()) for _ in range(2))
    other = weights(Trainer(dataclasses.replace(recipe, seed=1), moving_squares, TRAIN).run())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_a_recipe_that_orders_channels_trains_without_a_shift_too(moving_squares, small_recipe):
    recipe = dataclasses.replace(small_recipe, shift="none", order_channels=True, epochs=1)
    Trainer(recipe, moving_squares, TRAIN[:32]).run()


def test_a_resumed_run_does_not_initialise_again(moving_squares, small_recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(small_recipe, epochs=1)
    Trainer(recipe, moving_squares, TRAIN[:32], folder=tmp_path).run()
    monkeypatch.setattr(Trainer, "_initialise", lambda self: pytest.fail("initialised again"))
    Trainer(recipe, moving_squares, TRAIN[:32], folder=tmp_path).run(resume=True)
