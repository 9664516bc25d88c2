"""The gate's decisions and losses on numbers that can be checked by hand."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from moce_dist.config import GateConfig
from moce_dist.model.gate import (
    Gate,
    NoiseSchedule,
    balance_loss,
    confidence_loss,
    output_scales,
    routing_table,
    shared_groups,
    standardise,
)

LOGITS = torch.tensor([[[3.0, 1, 0], [2, 1, 0], [1, 0, 0], [0, 0, 1]]])  # L = 1, K = 4, E = 3


def test_argmax_takes_the_best_expert():
    assert routing_table(LOGITS, GateConfig()).tolist() == [[0, 0, 0, 2]]


def test_balanced_gives_equal_loads_at_the_greatest_logits():
    logits = torch.tensor([[[9.0, 0], [8, 0], [7, 6], [6, 0]]])
    table = routing_table(logits, GateConfig(assign="balanced"))
    # two clusters an expert: cluster 2 loses least by moving, then cluster 3
    assert np.bincount(table[0]).tolist() == [2, 2]
    assert table.tolist() == [[0, 0, 1, 1]]


def test_shared_keeps_a_cluster_in_one_group_in_all_layers():
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 8, 4, generator=draws)
    table = routing_table(logits, GateConfig(groups="shared"), num_groups=2)
    groups = table // 2
    assert (groups == groups[0]).all()
    assert np.bincount(groups[0]).tolist() == [4, 4]
    assert (groups[0] == shared_groups(logits.double().numpy(), 2)).all()


def test_decided_groups_hold_against_any_noise():
    draws = torch.Generator().manual_seed(0)
    logits, decided = torch.randn(5, 8, 4, generator=draws), torch.tensor([1, 1, 0, 0, 1, 0, 1, 0])
    gate, tables = GateConfig(groups="shared"), []
    for _ in range(5):
        noise = 10 * torch.randn(5, 8, 4, generator=draws)
        tables.append(routing_table(logits, gate, noise=noise, num_groups=2, cluster_group=decided))
        assert (tables[-1] // 2 == decided.numpy()).all()
    assert any((table != tables[0]).any() for table in tables)
    undecided = torch.full((8,), -1)
    chosen = routing_table(logits, gate, num_groups=2, cluster_group=undecided)
    assert (chosen == routing_table(logits, gate, num_groups=2)).all()


def test_noise_is_keyed_and_falls_to_zero():
    schedule = NoiseSchedule(seed=1, relative_std=1.0, steps=10)
    shape = (2, 4, 3)
    assert schedule.sample(3, shape).equal(schedule.sample(3, shape))
    assert not schedule.sample(3, shape).equal(schedule.sample(4, shape))
    assert not schedule.sample(3, shape)[0].equal(schedule.sample(3, shape)[1])
    # clusters have their own draws: fewer clusters see the same ones
    assert schedule.sample(3, (2, 2, 3)).equal(schedule.sample(3, shape)[:, :2])
    assert (schedule.sample(10, shape) == 0).all()
    assert schedule.sample(5, (1, 4000, 8)).std().item() == pytest.approx(0.5, rel=0.05)


def greatest_correlation(sequences):
    """The greatest correlation of any two of the sequences (N, T) at any circular shift."""
    spectra = torch.fft.fft((sequences - sequences.mean(1, keepdim=True)).double())
    pairs = torch.fft.ifft(spectra[:, None] * spectra[None].conj()).real
    pairs /= sequences.shape[1] * sequences.var()
    pairs[range(len(pairs)), range(len(pairs)), 0] = 0  # a sequence with itself, not shifted
    return pairs.max().item()


def test_noise_is_normal_and_comes_back_in_no_layer_or_step():
    schedule = NoiseSchedule(seed=1, relative_std=1.0, steps=10)
    draws = torch.cat([schedule.sample(step, (6, 256, 8)).flatten(1) for step in (0, 1)])
    assert greatest_correlation(draws) < 0.15
    planted = torch.cat([draws, draws[3:4].roll(700)])
    assert greatest_correlation(planted) > 0.9
    noise = schedule.sample(0, (1, 65_537, 3))
    assert scipy.stats.kstest(noise.numpy().ravel(), "norm").pvalue > 0.01
    assert noise.shape == (1, 65_537, 3) and noise.abs().max() > 4


def test_noise_counts_in_spreads_of_the_logits():
    noise = torch.zeros(1, 4, 3)
    noise[0, 0, 1] = 3
    table = routing_table(LOGITS, GateConfig(), noise=noise)
    assert table[0, 0] == 1  # 1 + 3 * 0.95 > 3
    assert routing_table(LOGITS, GateConfig(), noise=noise / 3)[0, 0] == 0


def test_balance_loss_is_the_squared_coefficient_of_variation():
    p = torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
    # importance: 3 images of cluster 0, 1 of cluster 1 -> (2.5, 1.5)
    expected = 0.5**2 / 2**2
    assert balance_loss(p, torch.tensor([3, 1])).item() == pytest.approx(expected)
    assert balance_loss(p, torch.tensor([2, 2])).item() == pytest.approx(0)


def test_confidence_loss_is_the_mean_entropy_of_the_images():
    p = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    assert confidence_loss(p, torch.tensor([3, 1])).item() == pytest.approx(0.75 * np.log(2))


def test_output_scales_carry_the_gradient_of_p():
    weight = torch.tensor([0.2], requires_grad=True)
    log_p = torch.stack([weight, 1 - weight], dim=-1)[None].log()  # L = 1, K = 1, E = 2
    experts, ids = torch.tensor([[1]]), torch.tensor([0, 0])
    assert output_scales(log_p, experts, ids, "prob").tolist() == [[pytest.approx(0.8)] * 2]
    scales = output_scales(log_p, experts, ids, "straight_through")
    assert scales.tolist() == [[1, 1]]
    scales.sum().backward()
    assert weight.grad.item() == pytest.approx(-2 / 0.8)


@pytest.mark.parametrize("gap", [20.0, 90.0, 120.0])
def test_an_expert_that_a_sharp_gate_gave_up_keeps_the_step_finite(gap):
    logits = torch.tensor([[[gap, 0.0]]], requires_grad=True)
    scales = output_scales(
        logits.log_softmax(-1), torch.tensor([[1]]), torch.tensor([0]), "straight_through"
    )
    scales.sum().backward()
    assert scales.tolist() == [[1]]
    assert logits.grad.flatten().tolist() == [pytest.approx(-1), pytest.approx(1)]


def test_standardised_embeddings_have_no_common_direction():
    draws = torch.Generator().manual_seed(0)
    centroids = torch.randn(16, 8, generator=draws) * 0.01 + 5
    embedding = standardise(centroids)
    assert embedding.mean(dim=0).abs().max() < 1e-3
    assert torch.allclose(embedding.std(dim=0, correction=0), torch.ones(8), atol=1e-4)


def test_gate_starts_equal_for_equal_seeds_whatever_was_drawn_before():
    centroids = torch.randn(4, 8)
    first = Gate(2, 3, centroids, seed=1).weight
    torch.randn(100)
    assert first.equal(Gate(2, 3, centroids, seed=1).weight)
    assert not first.equal(Gate(2, 3, centroids, seed=2).weight)


def test_a_fixed_gate_gives_similar_clusters_one_expert_in_all_layers():
    draws = torch.Generator().manual_seed(0)
    kinds = torch.randperm(12, generator=draws) % 4
    centroids = torch.randn(4, 16, generator=draws)[kinds]
    centroids += 0.1 * torch.randn(12, 16, generator=draws)
    gate = Gate(3, 4, centroids, seed=1, is_fixed=True)
    table = routing_table(gate.logits(), GateConfig(assign="fixed"))
    assert (table == table[0]).all()
    # three clusters an expert, those of one kind
    assert np.bincount(table[0], minlength=4).tolist() == [3] * 4
    assert len(set(zip(kinds.tolist(), table[0].tolist(), strict=True))) == 4
    again = Gate(3, 4, centroids, seed=1, is_fixed=True)
    assert gate.weight.equal(again.weight)
    # planted: logits drawn at random keep them apart
    drawn = routing_table(Gate(3, 4, centroids, seed=1).logits(), GateConfig(assign="fixed"))
    assert len(set(zip(kinds.tolist(), drawn[0].tolist(), strict=True))) > 4


def test_a_fixed_gate_is_at_least_as_near_as_any_exchange_of_two_clusters():
    points = torch.randn(12, 6, generator=torch.Generator().manual_seed(3))
    gate = Gate(1, 3, points, seed=0, is_fixed=True)
    table = routing_table(gate.logits(), GateConfig(assign="fixed"))[0]
    embedding = gate.cluster_embedding.double().numpy()
    means = np.stack([embedding[table == e].mean(axis=0) for e in range(3)])
    np.testing.assert_allclose(gate.weight[0].detach().numpy(), means, atol=1e-5)
    distances = ((embedding[:, None] - means) ** 2).sum(axis=2)
    for one, other in itertools.combinations(range(12), 2):
        swapped = table.copy()
        swapped[[one, other]] = table[[other, one]]
        rows = np.arange(12)
        assert distances[rows, table].sum() <= distances[rows, swapped].sum() + 1e-4
