from __future__ import annotations

from pathlib import Path

import pytest

from stsm_rt.errors import UserError
from stsm_rt.shift import PRESETS, ShiftError
from stsm_rt.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = """
name = "x"
dataset = "jhmdb"
network = "r8"
shift = "tsm_online"
height = 32
width = 32
frame_rate = 10
steps = 4
epochs = 1
batch = 2
"""


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    recipe.shift_spec()


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_may_be_overridden_field_by_field(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL), shift="stsm_online", seed=7)
    assert recipe.shift_spec() == PRESETS["stsm_online"]
    assert recipe.seed == 7
    assert recipe.frame_rate == 10.0


def test_no_shift_is_a_plain_network(tmp_path):
    assert load_recipe(write(tmp_path, MINIMAL), shift="none").shift_spec() is None


def test_a_shift_may_be_a_table(tmp_path):
    table = '[shift]\ngroups = [{fraction = "1/8", dt = 1, dh = 1, dw = 0}]\n'
    text = MINIMAL.replace('shift = "tsm_online"\n', "") + table
    (group,) = load_recipe(write(tmp_path, text)).shift_spec().groups
    assert (group.dt, group.dh, group.dw) == (1, 1, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "colour = 3\n", "unknown key 'colour'"),
        (MINIMAL.replace("epochs = 1\n", ""), "'epochs' is missing"),
        (MINIMAL.replace("epochs = 1\n", 'epochs = "many"\n'), "epochs is int"),
        (MINIMAL + "[augmentation]\nflop = true\n", "unknown key 'flop'"),
        (MINIMAL + "[decision]\nsmoothing = 0\nthreshold = 0.5\nrelease = 0.1\nmin_steps = 1\n", "smoothing"),
        ("name = ", "not a recipe in TOML"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as error:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_an_absent_recipe_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="recipe not found"):
        load_recipe(tmp_path / "none.toml")


def test_an_unknown_shift_names_the_presets(tmp_path):
    with pytest.raises(ShiftError, match="tsm_online"):
        load_recipe(write(tmp_path, MINIMAL), shift="sideways").shift_spec()


VIDEO = MINIMAL + '\n[video]\nsampling = "segments"\ncrop_scales = [1, 0.875]\n'


def test_a_set_of_videos_has_a_table_of_its_own(tmp_path):
    recipe = load_recipe(write(tmp_path, VIDEO))
    assert recipe.video.crop_scales == (1, 0.875)
    assert recipe.video.dense_span == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + 'optimiser = "adam"\n', "optimiser is one of adamw, sgd, got 'adam'"),
        (MINIMAL + 'schedule = "steps"\n', "needs milestones"),
        (MINIMAL + 'loss = "last"\n', "loss is one of steps, consensus"),
        (MINIMAL + 'batch_norm = "no"\n', "batch_norm is one of train, partial, frozen"),
        (MINIMAL + "video = 3\n", "expected a table"),
        (VIDEO.replace("segments", "random"), "sampling is one of segments, dense, stream"),
        (VIDEO + "[augmentation]\nflip = false\n", "leave one out"),
        (VIDEO.replace("batch = 2", "batch = 2\nbackground = 0.1"), "held in memory"),
        (MINIMAL + "head_l2 = 0.1\nhead_std = 0.1\n", "not from both"),
        (MINIMAL.replace("batch = 2", "batch = 0"), "batch is at least 1, got 0"),
        (MINIMAL.replace("frame_rate = 10", "frame_rate = 0"), "frame_rate is a positive number, got 0"),
        (MINIMAL + "lr = nan\n", "lr is a positive number, got nan"),
        (MINIMAL + "dropout = 1.0\n", "dropout is at least 0 and below 1, got 1"),
        (MINIMAL + "warmup = 2.0\n", "warmup is a share from 0 to 1, got 2"),
        (MINIMAL + "seed = -1\n", "seed is at least 0, got -1"),
        (MINIMAL + "rates = 0.5\n", "rates is a list of numbers, got 0.5"),
        (MINIMAL + 'milestones = ["a"]\n', "milestones is a list of numbers"),
        (MINIMAL.replace('name = "x"', 'name = "../evil"'), "names of files, got '../evil'"),
        (VIDEO.replace("crop_scales = [1, 0.875]", "crop_scales = []"), "crop_scales are shares"),
        (VIDEO + "short_side = 0\n", "short_side is at least 1"),
        (VIDEO + "unreadable = -1.0\n", "unreadable is a share from 0 to 1"),
    ],
)
def test_values_that_cannot_be_are_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as error:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)
