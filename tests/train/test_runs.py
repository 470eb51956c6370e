from __future__ import annotations

import csv
import dataclasses
import sys

import pytest
import torch
from made_videos import CLASSES, write_dataset
from two_processes import RECIPE, noise

from stsm_rt.errors import UserError
from stsm_rt.model import load_model
from stsm_rt.train import own_actions
from stsm_rt.train.annotations import load_videos
from stsm_rt.train.command import main
from stsm_rt.train.loop import Trainer
from stsm_rt.train.processes import make_fabric
from stsm_rt.train.recipe import VideoInput
from stsm_rt.train.video_set import VideoSet

VIDEO_RECIPE = """
name = "small"
dataset = "kinetics400"
network = "r8"
shift = "tsm"
height = 24
width = 24
frame_rate = 10.0
steps = 4
epochs = 1
batch = 3
pretrained = false
optimiser = "sgd"
momentum = 0.9
lr = 0.02
head_lr = 0.1
head_bias_lr = 0.2
head_std = 0.001
weight_decay = 1e-4
warmup = 0.0
schedule = "steps"
milestones = [20, 40]
loss = "consensus"
label_smoothing = 0.0
dropout = 0.5
max_grad_norm = 20.0

[video]
sampling = "segments"
short_side = 32
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(folder, *options, recipe=VIDEO_RECIPE):
    path = folder.parent / "small.toml"
    path.write_text(recipe)
    common = ["--data", str(folder), "--out", str(folder.parent / "runs"), "--device", "cpu", "--workers", "0"]
    return main([str(path), *common, *options])


@pytest.mark.parametrize("dataset", CLASSES)
def test_each_data_set_trains_an_epoch(tmp_path, capsys, dataset):
    data = write_dataset(dataset, tmp_path / "data", frames=5)
    last = dataset in ("ucf101", "hmdb51")  # no list to validate with, so the test list at the end
    assert train(data, "--dataset", dataset, *(["--report-test"] if last else [])) == 0
    run = tmp_path / "runs" / "small-tsm-split1-seed0"
    said = capsys.readouterr().out
    assert "small-tsm-split1-seed0: 6 clips, 1 epochs on the CPU" in said
    assert f"of 6 clips ({'test' if last else 'validation'} list)" in said
    network, record = load_model(run / "small.safetensors")
    assert record.labels == CLASSES[dataset]
    assert record.accuracy["dataset"] == dataset
    assert network.classifier.out_features == 3
    with (run / "log.csv").open() as log:
        (row,) = csv.DictReader(log)
    assert ("validation_top1" in row) is not last
    assert (run / "small-best.safetensors").exists() is not last


def test_extracted_frames_and_lists_of_ones_own_train_an_epoch(tmp_path):
    data = write_dataset("list", tmp_path / "data", frames=5, extracted=True)
    lists = (data / "train_videofolder.txt").rename(data / "mine.txt"), data / "val_videofolder.txt"
    options = ["--dataset", "list", "--image-template", "img_{:05d}.jpg", "--annotations", str(lists[0])]
    assert train(data, *options, "--validation", str(lists[1])) == 0


@pytest.mark.parametrize("sampling", ["dense", "stream"])
def test_videos_train_with_each_sampling(tmp_path, sampling):
    data = write_dataset("list", tmp_path / "data", frames=5)
    recipe = VIDEO_RECIPE.replace('"segments"', f'"{sampling}"').replace('"consensus"', '"steps"')
    assert train(data, "--dataset", "list", recipe=recipe.replace('"tsm"', '"tsm_online"')) == 0


def test_workers_decode_the_same_clips(tmp_path):
    videos = load_videos("list", write_dataset("list", tmp_path / "data", frames=5), "train")
    recipe = dataclasses.replace(RECIPE, batch=3, video=VideoInput("segments"))
    fabric = make_fabric("cpu")
    found = []
    for workers in (0, 2):
        data = VideoSet(recipe, videos, workers=workers)
        found.append([step.parts[0] for epoch in range(2) for step in data.steps(epoch, fabric, 1)])
    assert len(found[0]) == 4
    assert not torch.equal(found[0][0].frames, found[0][2].frames)
    for alone, helped in zip(*found, strict=True):
        assert torch.equal(alone.frames, helped.frames)
        assert torch.equal(alone.targets, helped.targets)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_too_many_unreadable_videos_end_the_run_with_one_sentence(tmp_path, capsys, workers):
    data = write_dataset("list", tmp_path / "data", frames=5)
    for path in data.rglob("train_*.mp4"):
        path.write_bytes(b"no video")
    assert train(data, "--dataset", "list", "--workers", workers) == 2
    error = capsys.readouterr().err
    assert "videos cannot be decoded" in error
    assert error.splitlines()[-1].startswith("stsm-rt: error: ")
    assert "Traceback" not in error
    assert (tmp_path / "runs" / "small-tsm-split1-seed0" / "unreadable.jsonl").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hold-out", "0/3"], "--hold-out is for jhmdb and shrec17"),
        (["--report-test"], "run stsm-rt evaluate"),
        (["--accumulate", "4"], "cannot be divided over 1 processes and 4 accumulation steps"),
        (["--dataset", "jhmdb"], "jhmdb"),
        (["--device", "tpu"], "cpu, cuda or cuda:N"),
        (["--precision", "16-mixed"], "16-mixed needs a GPU"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(tmp_path, capsys, options, words):
    data = write_dataset("list", tmp_path / "data", frames=5)
    assert train(data, "--dataset", "list", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error


@pytest.mark.parametrize("option", ["--accumulate", "--devices", "--nodes"])
def test_numbers_below_one_are_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as end:
        train(tmp_path, option, "0")
    assert end.value.code == 2
    assert "expected a whole number from 1 on, got '0'" in capsys.readouterr().err


def test_a_device_without_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("stsm_rt.train.command.load_recipe", full)
    assert train(tmp_path / "data") == 2
    assert "give a larger --accumulate" in capsys.readouterr().err


def test_a_folder_in_place_of_a_recipe_trains_on_own_actions(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(own_actions, "main", lambda argv: seen.append(argv) or 0)
    assert main([str(tmp_path), "--anything"]) == 0
    assert seen == [[str(tmp_path), "--anything"]]


def test_a_run_that_diverges_ends_with_one_sentence():
    recipe = dataclasses.replace(RECIPE, optimiser="sgd", lr=1e30, head_lr=1e30, max_grad_norm=1e30, warmup=0.0)
    with pytest.raises(UserError, match="diverged in epoch 1; lower lr in the recipe"):
        Trainer(recipe, noise()).run()


def test_the_best_epoch_is_kept_and_remembered(tmp_path, monkeypatch):
    scores = iter([0.5, 0.4, 0.6, 0.6])
    monkeypatch.setattr(Trainer, "accuracy", lambda self, *_: next(scores))
    kept = []

    def run(epochs, resume):
        # The schedule's length is part of a recipe, so the run is cut off, not shortened.
        def cut(epoch, loss):
            if epoch == epochs:
                raise KeyboardInterrupt

        recipe = dataclasses.replace(RECIPE, epochs=4)
        trainer = Trainer(recipe, noise(), held_out=torch.arange(4), folder=tmp_path, progress=cut)
        trainer.save_best = lambda network, top1: kept.append((trainer.epoch, top1))
        with pytest.raises(KeyboardInterrupt):
            trainer.run(resume=resume)

    run(1, False)
    run(4, True)
    assert kept == [(1, 0.5), (3, 0.6)]


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    Trainer(recipe, noise(), folder=tmp_path).run()
    path = tmp_path / "last.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "classes": [*state["classes"][:-1], "another"]}, path)
    with pytest.raises(UserError, match="was trained on other classes"):
        Trainer(recipe, noise(), folder=tmp_path).run(resume=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is neither a recipe nor a folder of own actions"),
        (["--epochs", "1", "."], "the folder of own actions comes first: stsm-rt train ."),
        (["recipe.toml"], "give --data FOLDER, the data set that recipe.toml names"),
    ],
)
def test_what_to_train_on_is_asked_for(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(VIDEO_RECIPE)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    Trainer(dataclasses.replace(RECIPE, epochs=1), noise(), folder=tmp_path).run()
    path = tmp_path / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint that can be read"):
        Trainer(dataclasses.replace(RECIPE, epochs=1), noise(), folder=tmp_path).run(resume=True)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_whole(tmp_path):
    def block(epoch, loss):
        (tmp_path / "last.pt.part").mkdir()

    with pytest.raises(UserError, match=r"cannot write .*last\.pt"):
        Trainer(RECIPE, noise(), folder=tmp_path, progress=block).run()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1


def test_tensorboard_reads_the_curves(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = dataclasses.replace(RECIPE, epochs=2)
    Trainer(recipe, noise(), folder=tmp_path, held_out=torch.arange(8)).run()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "epoch/loss", "epoch/lr", "epoch/validation_top1"} <= set(events.Tags()["scalars"])
    with (tmp_path / "log.csv").open() as log:
        logged = [float(row["loss"]) for row in csv.DictReader(log)]
    assert [event.value for event in events.Scalars("epoch/loss")] == pytest.approx(logged)


def test_without_tensorboard_the_log_is_enough(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = write_dataset("list", tmp_path / "data", frames=5)
    assert train(data, "--dataset", "list") == 0
    assert "for its curves: pip install tensorboard" in capsys.readouterr().out
    assert not list((tmp_path / "runs").rglob("tensorboard"))


def test_videos_that_are_not_there_are_listed_up_to_a_limit(tmp_path, capsys):
    data = write_dataset("list", tmp_path / "data", frames=5)
    gone = sorted(data.rglob("train_*.mp4"))[0]
    gone.unlink()
    assert train(data, "--dataset", "list") == 2
    assert "raise the limit with --missing" in capsys.readouterr().err
    assert train(data, "--dataset", "list", "--missing", "0.5") == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "missing.txt").read_text().splitlines()[0].endswith(gone.name)
    assert "videos of the annotations that are absent: 1;" in capsys.readouterr().out
