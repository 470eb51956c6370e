from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stsm_rt.networks import ARCHITECTURES
from stsm_rt.sampler import Sampler
from stsm_rt.train.annotation_formats import FORMATS
from stsm_rt.train.recipe import load_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parents[2] / "recipes"
DATASETS = ("kinetics400", "something_something_v2", "jester")
FILES = {"offline": "tsm_{}.toml", "online": "tsm_online_{}.toml"}
SHIFTS = {"offline": ("tsm", "stsm"), "online": ("tsm_online", "stsm_online")}
# Whatever decides what a run produces is written down in the file, not left to a default that may change.
NAMED = {
    *("name", "dataset", "network", "shift", "height", "width", "frame_rate", "steps", "epochs", "batch", "pretrained"),
    *("batch_norm", "loss", "optimiser", "momentum", "lr", "head_lr", "head_bias_lr", "weight_decay", "head_std"),
    *("warmup", "schedule", "milestones", "lr_decay", "label_smoothing", "dropout", "max_grad_norm", "seed", "video"),
    "decision",
}


def path_of(dataset: str, kind: str) -> Path:
    return RECIPES / FILES[kind].format(dataset)


@pytest.mark.parametrize(
    ("dataset", "kind", "shift"), [(d, kind, shift) for d in DATASETS for kind in FILES for shift in SHIFTS[kind]]
)
def test_every_variant_loads_and_only_online_ones_can_stream(dataset, kind, shift):
    path = path_of(dataset, kind)
    plain = load_recipe(path)
    assert plain.name == path.stem
    assert plain.shift == SHIFTS[kind][0]
    recipe = load_recipe(path, shift=shift)
    assert recipe.dataset in FORMATS
    assert recipe.network in ARCHITECTURES
    spec = recipe.shift_spec()
    assert spec.name == shift
    assert all(group.dt >= 0 for group in spec.groups) == (kind == "online")
    assert recipe.video.sampling == ("stream" if kind == "online" else "segments")
    assert recipe.loss == ("steps" if kind == "online" else "consensus")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_numbers_are_those_that_tsm_published_and_all_are_in_the_file(dataset, kind):
    path = path_of(dataset, kind)
    assert set(tomllib.loads(path.read_text())) == NAMED
    recipe = load_recipe(path)
    lr, batch, decay = {"kinetics400": (0.02, 128, 1e-4)}.get(dataset, (0.01, 64, 5e-4))
    if recipe.network == "mbv2_torchvision":
        decay = 2e-5
    assert (recipe.optimiser, recipe.momentum, recipe.lr, recipe.batch) == ("sgd", 0.9, lr, batch)
    assert recipe.weight_decay == decay
    assert (recipe.epochs, recipe.schedule, recipe.milestones, recipe.lr_decay) == (50, "steps", (20, 40), 0.1)
    assert recipe.head_lr == pytest.approx(5 * lr)
    assert recipe.head_bias_lr == pytest.approx(10 * lr)
    assert (recipe.dropout, recipe.max_grad_norm, recipe.label_smoothing, recipe.warmup) == (0.5, 20.0, 0.0, 0.0)
    assert (recipe.height, recipe.width, recipe.video.short_side) == (224, 224, 256)
    assert recipe.video.crop_scales == (1.0, 0.875, 0.75, 0.66)
    assert recipe.video.flip == (dataset == "kinetics400")
    assert recipe.batch_norm == "train"
    assert recipe.pretrained


@pytest.mark.parametrize(("dataset", "rate", "seconds"), [("something_something_v2", 12, 4.0), ("jester", 12, 3.0)])
def test_a_stream_of_the_data_sets_own_rate_gives_the_model_its_rate_and_most_of_a_clip(dataset, rate, seconds):
    recipe = load_recipe(path_of(dataset, "online"))
    stride = Sampler.stride(rate, recipe.frame_rate)
    assert rate / stride == recipe.frame_rate
    assert 0.8 * seconds < recipe.steps / recipe.frame_rate <= seconds
