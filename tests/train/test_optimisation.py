from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from two_processes import RECIPE, RUNS, noise, weights

from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.batch_norm import SynchronisedBatchNorm2d, hold_parameters, norm_layers, train_mode
from stsm_rt.train.batches import Batch
from stsm_rt.train.loop import Trainer
from stsm_rt.train.optimisation import Objective, Opaque, make_optimiser, make_schedule
from stsm_rt.train.processes import make_fabric
from stsm_rt.train.recipe import Recipe

TSM = dataclasses.replace(
    RECIPE,
    optimiser="sgd",
    lr=0.02,
    head_lr=0.1,
    head_bias_lr=0.2,
    weight_decay=1e-4,
    head_std=0.001,
    schedule="steps",
    milestones=(20, 40),
    warmup=0.0,
    epochs=50,
    loss="consensus",
    label_smoothing=0.0,
    dropout=0.0,
    ema=0.0,
)


def network(recipe: Recipe, classes: int = 3) -> StreamingNetwork:
    torch.manual_seed(0)
    return StreamingNetwork(recipe.network, classes, shift=recipe.shift_spec())


def batch(count: int = 3, classes: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (count, 4, 16, 16, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % classes
    return Batch(frames, F.one_hot(labels, classes).float(), torch.full((count, 4), 0.25), torch.arange(count))


def loss_of(recipe: Recipe, clips: Batch, net: StreamingNetwork) -> torch.Tensor:
    return Objective(net.eval(), recipe)(Opaque(clips, None, 1.0, train_backbone=True))


def test_the_consensus_is_the_cross_entropy_of_the_mean_logits():
    net, clips = network(TSM), batch()
    expected = F.cross_entropy(net.eval()(clips.frames).mean(1), clips.targets.argmax(1), reduction="sum")
    torch.testing.assert_close(loss_of(TSM, clips, net), expected)


def test_the_loss_of_steps_weighs_each_steps_cross_entropy():
    net, clips = network(TSM), batch()
    clips.weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(3, 4)
    logits = net.eval()(clips.frames)
    labels = clips.targets.argmax(1)
    expected = sum(w * F.cross_entropy(logits[:, t], labels, reduction="sum") for t, w in enumerate(clips.weights[0]))
    torch.testing.assert_close(loss_of(dataclasses.replace(TSM, loss="steps"), clips, net), expected)


@pytest.mark.parametrize("loss", ["steps", "consensus"])
def test_a_clip_without_weight_changes_neither_loss_nor_gradient(loss):
    recipe, whole = dataclasses.replace(TSM, loss=loss), batch(4)
    whole.weights[3] = 0
    whole.targets[3] = 0
    part = Batch(whole.frames[:3], whole.targets[:3], whole.weights[:3], whole.places[:3])
    found = []
    for clips in (whole, part):
        net = network(recipe)
        value = loss_of(recipe, clips, net)
        value.backward()
        found.append((value.detach(), net.classifier.weight.grad))
    torch.testing.assert_close(found[0], found[1])


def test_the_classifier_has_rates_of_its_own_and_biases_no_decay():
    optimiser = make_optimiser(TSM, network(TSM))
    assert isinstance(optimiser, torch.optim.SGD)
    found = [(group["lr"], group["weight_decay"], group["momentum"]) for group in optimiser.param_groups]
    assert found == [(0.02, 1e-4, 0.9), (0.02, 0.0, 0.9), (0.1, 1e-4, 0.9), (0.2, 0.0, 0.9)]
    assert all(p.dim() == 1 for p in optimiser.param_groups[1]["params"])


def test_the_rate_falls_to_a_tenth_at_each_milestone():
    optimiser = make_optimiser(TSM, network(TSM))
    schedule = make_schedule(TSM, optimiser, steps_per_epoch=2)
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0])
        for _ in range(2):
            optimiser.step()
            schedule.step()
    assert rates == pytest.approx([0.02] * 20 + [0.002] * 20 + [0.0002] * 10)


def test_partial_batch_norm_trains_the_first_layer_alone():
    net = network(TSM)
    hold_parameters(net, "partial")
    train_mode(net, "partial")
    first, *others = norm_layers(net)
    assert first.training
    assert first.weight.requires_grad
    assert others
    assert not any(layer.training or layer.weight.requires_grad or layer.bias.requires_grad for layer in others)
    before = [(layer.running_mean.clone(), layer.num_batches_tracked.clone()) for layer in (first, *others)]
    net(batch().frames)
    after = [layer.running_mean for layer in (first, *others)]
    assert not torch.equal(before[0][0], after[0])
    assert all(torch.equal(old[0], new) for old, new in zip(before[1:], after[1:], strict=True))


def test_frozen_batch_norm_keeps_its_statistics():
    net = network(TSM)
    train_mode(net, "frozen")
    assert net.training
    assert not any(layer.training for layer in norm_layers(net))
    assert all(layer.weight.requires_grad for layer in norm_layers(net))


def test_tsms_classifier_starts_near_zero():
    net = Trainer(TSM, noise()).network
    assert 0 < float(net.classifier.weight.detach().std()) < 0.0015
    assert torch.equal(net.classifier.bias, torch.zeros(3))


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulation_gives_the_weights_of_the_whole_batch(accumulate):
    # Frozen batch norm: otherwise each pass would have statistics of its own. Double precision, as in test_distributed.
    recipe = dataclasses.replace(RUNS["sgd, frozen batch norm, frozen backbone at first"], ema=0.9)
    whole, parts = (weights(recipe, noise(), make_fabric("cpu", precision="64-true"), n) for n in (1, accumulate))
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-10


def test_gradients_are_clipped():
    # In double precision: an update this small would be lost in single precision.
    recipe = dataclasses.replace(TSM, epochs=1, max_grad_norm=1e-9, weight_decay=0.0, batch_norm="frozen")
    trainer = Trainer(recipe, noise(), fabric=make_fabric("cpu", precision="64-true"))
    before = [p.detach().clone() for p in trainer.network.parameters()]
    after = [p.detach() for p in trainer.run().parameters()]
    assert 0 < sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)) < 1e-16


def test_mixed_precision_rounds_neither_frames_nor_weights_and_resumes(tmp_path):
    class Cut(Exception):
        pass

    def cut(epoch, loss):
        if epoch == 1:
            raise Cut

    def trainer(folder=None, **options):
        fabric = make_fabric("cpu", precision="bf16-mixed")
        return Trainer(RECIPE, noise(16), fabric=fabric, folder=folder, **options)

    whole = trainer()
    seen, features = [], whole.network.clip_features

    def look(frames):
        seen.append((frames.dtype, torch.is_autocast_enabled("cpu")))
        return features(frames)

    whole.network.clip_features = look
    expected = whole.run().state_dict()
    assert set(seen) == {(torch.float32, True)}
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32, torch.int64}
    with pytest.raises(Cut):
        trainer(tmp_path, progress=cut).run()
    resumed = trainer(tmp_path).run(resume=True).state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_blocks_that_a_network_does_not_have_cannot_be_frozen():
    recipe = dataclasses.replace(TSM, frozen_blocks=3)
    with pytest.raises(UserError, match="frozen_blocks counts the blocks of mbv2 and lite0, r8 has none"):
        make_optimiser(recipe, network(recipe))


def test_synchronised_batch_norm_counts_in_single_precision():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layers = nn.BatchNorm2d(3).train(), SynchronisedBatchNorm2d.of(nn.BatchNorm2d(3)).train()
        x = torch.randn(8, 3, 40, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
        expected, found = layers[0](x.float()), layers[1](x)
    finally:
        dist.destroy_process_group()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(layers[1].running_var, layers[0].running_var, rtol=1e-5, atol=1e-6)
