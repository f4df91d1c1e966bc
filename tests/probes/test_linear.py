import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2_eq.distributed import get_rank, get_world_size
from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.probes.linear import LEARNING_RATES, GridTraining, HeadGrid
from tests.processes import run_ranks

DIM, CLASSES, STEPS, BATCH = 4, 3, 12, 32


def data(steps=STEPS):
    """[steps, B, 5 * D] block features and [steps, B] labels that they hold in part."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (steps, BATCH), generator=generator)
    centres = torch.randn(CLASSES, 5 * DIM, generator=generator)
    return centres[labels] + torch.randn(steps, BATCH, 5 * DIM, generator=generator), labels


def train(features, labels, first=0, training=None, total=STEPS, **grid):
    if training is None:
        training = GridTraining(HeadGrid(DIM, CLASSES, **grid), BATCH, total)
    for step in range(first, len(features)):
        training.update(features[step], labels[step])
    return training


def heads(grid):
    """Weight and bias of each head by its name."""
    weights = [weight for stack in grid.weights for weight in stack]
    biases = [bias for stack in grid.biases for bias in stack]
    return {spec.name: pair for spec, *pair in zip(grid.specs, weights, biases, strict=True)}


def test_the_grid_is_dinov2s_and_no_name_occurs_twice():
    grid = HeadGrid(DIM, CLASSES)
    assert len(grid.specs) == len({spec.name for spec in grid.specs}) == 52
    assert [(spec.num_blocks, spec.avgpool) for spec in grid.specs[::13]] == [
        (1, False),
        (1, True),
        (4, False),
        (4, True),
    ]
    assert [spec.learning_rate for spec in grid.specs[:13]] == list(LEARNING_RATES)
    assert grid.specs[0].name == "classifier_1_blocks_avgpool_False_lr_1e-05"
    assert HeadGrid(DIM, CLASSES, [0.1, 0.1, 0.2]).rates == [0.1, 0.2]
    weight = HeadGrid(64, 1000, [0.1], [1]).weights[0]
    assert weight.std().item() == pytest.approx(0.01, rel=0.01) and abs(weight.mean().item()) < 1e-4


def test_each_head_reads_the_blocks_it_should():
    """The oracle is the concatenation in DINOv2."""
    features = torch.randn(6, 5 * DIM)
    *cls_tokens, mean_patch = features.split(DIM, dim=1)  # of the last 4 blocks in order of depth
    grid = HeadGrid(DIM, CLASSES)
    scores = dict(zip([spec.name for spec in grid.specs], grid(features).unbind(1), strict=True))
    for spec in grid.specs:
        read = torch.cat([*cls_tokens[-spec.num_blocks :], *([mean_patch] if spec.avgpool else [])], dim=1)
        weight, bias = heads(grid)[spec.name]
        torch.testing.assert_close(scores[spec.name], F.linear(read, weight, bias))


def test_a_head_is_the_same_alone_and_in_the_grid():
    batches = data()
    grid = heads(train(*batches).grid)
    for rate in (1e-5, 0.1):
        for blocks in (1, 4):
            features = batches[0] if blocks == 4 else batches[0][..., 3 * DIM :]
            alone = heads(train(features, batches[1], learning_rates=[rate], num_blocks=[blocks]).grid)
            assert len(alone) == 2
            for name, (weight, bias) in alone.items():
                torch.testing.assert_close(weight, grid[name][0], rtol=0, atol=1e-6)
                torch.testing.assert_close(bias, grid[name][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [1e-3, 0.1])
def test_equals_torchs_own_training_of_one_layer(rate):
    features, labels = data()
    training = train(features, labels, learning_rates=[rate])
    layer = nn.Linear(DIM, CLASSES)
    start = HeadGrid(DIM, CLASSES, [rate])
    layer.load_state_dict({"weight": start.weights[0][0].data, "bias": start.biases[0][0].data})
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate * BATCH / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0)
    for x, y in zip(features, labels, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(layer(x[:, 3 * DIM : 4 * DIM]), y).backward()
        optimizer.step()
        schedule.step()
    weight, bias = heads(training.grid)[f"classifier_1_blocks_avgpool_False_lr_{rate}"]
    torch.testing.assert_close(weight, layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, layer.bias, rtol=1e-5, atol=1e-6)


def test_separable_data_reach_100_percent():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (60, BATCH), generator=generator)
    features = torch.eye(CLASSES, 5 * DIM)[labels].repeat(1, 1, 1) * 3
    features[..., 3 * DIM :] = torch.eye(CLASSES, 2 * DIM)[labels] * 3
    training = train(features, labels, total=60, learning_rates=[0.1, 1.0])
    hits = training.grid.score(features[0], labels[0])
    assert hits.top1_percent("mean_accuracy").max() == 100


def test_answers_chosen_from_some_classes():
    features, labels = data(1)
    grid = HeadGrid(DIM, CLASSES, seed=1)
    chosen = torch.tensor([2, 0])  # label 0 is class 2, label 1 class 0
    kept = features[0][labels[0] != 1]
    meaning = labels[0][labels[0] != 1]
    answers = grid(kept)[:, :, chosen].argmax(dim=2)  # [n, H]
    hits = grid.score(kept, (meaning == 0).long(), chosen)
    right = (chosen[answers] == meaning[:, None]).double()
    assert torch.equal(hits.top1.sum(dim=1), right.sum(dim=0)) and hits.total.tolist() == [
        (meaning == 2).sum(),
        (meaning == 0).sum(),
    ]
    assert (grid(kept).argmax(dim=2) == 1).any()  # that answer is wrong with all classes and cannot be given here


def test_shuffled_labels_give_chance():
    features, labels = data(100)
    shuffled = labels.flatten()[torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(2))]
    for found, reached in ((shuffled.view_as(labels), (28, 39)), (labels, (90, 100))):
        grid = train(features[:60], found[:60], total=60).grid
        hits = grid.score(features[60:].flatten(0, 1), found[60:].flatten())
        assert reached[0] < hits.top1_percent("mean_accuracy").max() <= reached[1]


def test_resume_equals_no_stop():
    features, labels = data()
    whole = train(features, labels)
    stopped, buffer = train(features[:5], labels[:5]), io.BytesIO()
    torch.save(stopped.state_dict(), buffer)
    buffer.seek(0)
    resumed = GridTraining(HeadGrid(DIM, CLASSES, seed=3), BATCH, STEPS)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.step == 5
    train(features, labels, 5, resumed)
    for name, pair in heads(whole.grid).items():
        assert all(torch.equal(one, other) for one, other in zip(pair, heads(resumed.grid)[name], strict=True))


def test_a_head_that_diverges_leaves_the_others_alone():
    features, labels = data()
    grid = train(features * 1e3, labels, learning_rates=[1e-3, 1e38]).grid
    assert {name.rpartition("_")[2] for name in grid.diverged()} == {"1e+38"} and len(grid.diverged()) == 4
    alone = heads(train(features * 1e3, labels, learning_rates=[1e-3]).grid)
    for name, (weight, _) in alone.items():
        torch.testing.assert_close(weight, heads(grid)[name][0], rtol=1e-6, atol=1e-6)


def train_a_share():
    with process_group(find_launch(), torch.device("cpu"), 30):
        features, labels = (batches.chunk(get_world_size(), dim=1)[get_rank()] for batches in data())
        grid = train(features, labels).grid
        hits = grid.score(features.flatten(0, 1), labels.flatten()).summed()
        return {name: tensor.numpy() for name, tensor in grid.state_dict().items()}, hits.top1.numpy()


def test_two_processes_equal_one():
    features, labels = data()
    whole = train(features, labels).grid
    hits = whole.score(features.flatten(0, 1), labels.flatten())
    for state, top1 in run_ranks(train_a_share, 2):
        for name, tensor in whole.state_dict().items():
            assert state[name] == pytest.approx(tensor.numpy(), rel=0, abs=1e-5)
        assert top1 == pytest.approx(hits.top1.numpy(), abs=1)
