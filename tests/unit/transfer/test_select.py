"""Choice of experts from clusters and gate, with numbers spelt out."""

import numpy as np
import pytest
import torch

from moce_dist.cluster.assign import assign_features
from moce_dist.config import Config, make_config
from moce_dist.settings import ConfigError
from moce_dist.transfer.select import (
    choose_experts,
    expert_mass,
    mix_of,
    task_clusters,
    with_selection,
)

LOG = np.log


def gate_weights(p: list[list[list[float]]]) -> dict[str, torch.Tensor]:
    """Weights of a gate whose probabilities are p (L, K, E): one-hot embeddings of the clusters."""
    table = torch.tensor(p).log()
    weights = {
        "gate.weight": table.transpose(1, 2).contiguous(),
        "gate.cluster_embedding": torch.eye(table.shape[1]),
    }
    for layer in range(table.shape[0]):
        for expert in range(table.shape[2]):
            name = f"blocks.{2 * layer + 1}.mlp.experts.{expert}.fc1.bias"
            weights[name] = torch.zeros(1)
    return weights


# two layers, three clusters, two experts
P = [[[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], [[0.5, 0.5], [0.3, 0.7], [1.0, 1e-9]]]
IDS = np.array([0, 0, 0, 1, 2, 2])


def gate_config(**gate: str) -> Config:
    return make_config({"gate": gate, "moe": {"num_experts": 2}, "cluster": {"num_clusters": 4}})


def chosen(select: str, temperature: float = 1.0, **gate: str) -> dict:
    config = with_selection(gate_config(**gate), select, temperature)
    return choose_experts(IDS, gate_weights(P), config, task="t")


def test_mass_is_the_mean_probability_over_the_images():
    mass = expert_mass(IDS, gate_weights(P), gate_config())
    expected = [
        [(3 * 0.9 + 0.2 + 2 * 0.4) / 6, (3 * 0.1 + 0.8 + 2 * 0.6) / 6],
        [(3 * 0.5 + 0.3 + 2 * 1.0) / 6, (3 * 0.5 + 0.7) / 6],
    ]
    np.testing.assert_allclose(mass, expected, rtol=1e-6)


def test_vote_takes_the_expert_of_greatest_mass_and_tells_the_rest():
    choice = choose_experts(IDS, gate_weights(P), gate_config(), task="t")
    assert [layer["expert"] for layer in choice["layers"]] == [0, 0]
    assert [layer["block"] for layer in choice["layers"]] == [1, 3]
    first = choice["layers"][0]
    assert first["mass"] == pytest.approx(3.7 / 6) and first["runner_up"] == 1
    assert first["runner_up_mass"] == pytest.approx(2.3 / 6)
    assert first["entropy"] == pytest.approx(-3.7 / 6 * LOG(3.7 / 6) - 2.3 / 6 * LOG(2.3 / 6))
    assert choice["clusters"] == {"0": 3, "2": 2, "1": 1} and choice["num_images"] == 6
    assert choice["scale"] is None and choice["select"] == "vote" and choice["warning"] is None


def test_largest_cluster_can_choose_otherwise_than_the_vote():
    ids = np.array([2, 2, 0, 1, 1, 1])
    config = gate_config().model_copy(
        update={"transfer": make_config({"transfer": {"select": "largest_cluster"}}).transfer}
    )
    # cluster 1 is the largest: expert 1 in both layers
    choice = choose_experts(ids, gate_weights(P), config, task="t")
    assert [layer["expert"] for layer in choice["layers"]] == [1, 1]
    by_vote = choose_experts(ids, gate_weights(P), gate_config(), task="t")
    assert [layer["expert"] for layer in by_vote["layers"]] == [1, 0]


def test_merge_weights_experts_by_powers_of_their_mass():
    mass = expert_mass(IDS, gate_weights(P), gate_config())
    choice = chosen("merge")
    assert choice["temperature"] == 1.0 and choice["warning"] is None
    assert [layer["expert"] for layer in choice["layers"]] == [None, None]
    np.testing.assert_allclose(mix_of(choice), mass, rtol=1e-6)
    squares = mass**2 / (mass**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mix_of(chosen("merge", 0.5)), squares, rtol=1e-12)


def test_merge_goes_from_the_vote_to_the_average():
    assert mix_of(chosen("merge", 1e-4)) == mix_of(chosen("vote")) == [0, 0]
    np.testing.assert_allclose(mix_of(chosen("merge", 1e9)), mix_of(chosen("average")), atol=1e-6)
    assert mix_of(chosen("average")) == [[0.5, 0.5], [0.5, 0.5]]


def test_extrapolation_goes_from_the_average_through_the_vote_and_beyond():
    def found(beyond: float) -> list:
        config = make_config({"transfer": {"select": "extrapolate", "extrapolation": beyond}})
        config = gate_config().model_copy(update={"transfer": config.transfer})
        choice = choose_experts(IDS, gate_weights(P), config, task="t")
        assert choice["select"] == "extrapolate" and choice["extrapolation"] == beyond
        return mix_of(choice)

    assert found(0.0) == mix_of(chosen("average"))
    assert found(1.0) == mix_of(chosen("vote")) == [0, 0]
    assert found(1.5) == [[1.25, -0.25]] * 2 == mix_of(chosen("extrapolate"))


@pytest.mark.parametrize("combine", ["prob", "straight_through"])
def test_merge_of_all_mass_on_one_expert_is_the_vote_to_the_bit(combine):
    p = [[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]]
    weights = gate_weights(p)
    weights["gate.weight"] = weights["gate.weight"].clamp_min(-1e4)
    merged, voted = (
        choose_experts(IDS, weights, with_selection(gate_config(combine=combine), select), task="t")
        for select in ("merge", "vote")
    )
    assert mix_of(merged) == mix_of(voted) == [0, 1]
    assert merged["scale"] == voted["scale"]


def test_mismatched_takes_the_expert_of_least_mass():
    assert mix_of(chosen("mismatched")) == [1, 1]


def test_prob_weights_what_is_merged_as_the_images_own_experts():
    # the clusters take experts 0, 1, 1 in layer 0 and 0, 1, 0 in layer 1
    own = [(3 * 0.9 + 0.8 + 2 * 0.6) / 6, (3 * 0.5 + 0.7 + 2 * 1.0) / 6]
    for select in ("merge", "average", "mismatched"):
        assert chosen(select, combine="prob")["scale"] == pytest.approx(own)
        assert chosen(select)["scale"] is None


def test_prob_records_the_mean_probability_of_the_chosen_experts():
    choice = choose_experts(IDS, gate_weights(P), gate_config(combine="prob"), task="t")
    assert choice["scale"] == pytest.approx([3.7 / 6, 3.8 / 6])


def test_balanced_gate_votes_by_the_routing_table():
    # expert 0 is everybody's best; balance sends clusters 2 and 3 to expert 1
    p = [[[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]]
    ids = np.array([2, 2, 2, 3, 0])
    choice = choose_experts(ids, gate_weights(p), gate_config(assign="balanced"), task="t")
    assert choice["layers"][0]["expert"] == 1 and choice["layers"][0]["mass"] == pytest.approx(0.8)
    free = choose_experts(ids, gate_weights(p), gate_config(), task="t")
    assert free["layers"][0]["expert"] == 0


def test_given_experts_override_and_keep_their_mass():
    choice = choose_experts(IDS, gate_weights(P), gate_config(), task="t", given=(1, 0))
    assert [layer["expert"] for layer in choice["layers"]] == [1, 0]
    assert choice["select"] == "given"
    assert choice["layers"][0]["mass"] == pytest.approx(2.3 / 6)
    assert choice["layers"][0]["runner_up"] == 0
    assert "in layers [0]" in choice["warning"]


@pytest.mark.parametrize("select", ["vote", "mismatched"])
def test_prob_weights_given_experts_by_their_own_probability(select):
    config = with_selection(gate_config(combine="prob"), select)
    choice = choose_experts(IDS, gate_weights(P), config, task="t", given=(1, 0))
    assert choice["scale"] == pytest.approx([2.3 / 6, 3.8 / 6])


@pytest.mark.parametrize("given", [(0,), (0, 2), (0, -1), (0, 0, 0)])
def test_given_experts_that_do_not_exist_are_refused(given):
    with pytest.raises(ConfigError, match="must name 2 experts"):
        choose_experts(IDS, gate_weights(P), gate_config(), task="t", given=given)


def test_single_expert_has_no_runner_up():
    choice = choose_experts(np.array([0]), gate_weights([[[1.0]]]), gate_config(), task="t")
    assert choice["layers"][0]["runner_up"] is None
    assert choice["layers"][0]["entropy"] == 0


def test_clusters_are_the_nearest_centroids_of_shifted_unit_features(tmp_path):
    draws = np.random.default_rng(0)
    features = draws.normal(3, 1, (40, 8)).astype(np.float32)
    mean, centroids = features.mean(axis=0), draws.normal(size=(5, 8)).astype(np.float32)
    np.save(tmp_path / "mean.npy", mean)
    np.save(tmp_path / "centroids.npy", centroids)
    found = task_clusters(torch.from_numpy(features), tmp_path)
    unit = (features - mean) / np.linalg.norm(features - mean, axis=1, keepdims=True)
    distances = ((unit[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)
    assert found.tolist() == distances.argmin(axis=1).tolist()
    assert found.tolist() == assign_features(features, centroids, mean=mean)[0].tolist()


def test_shared_groups_vote_by_the_groups_that_clusters_keep():
    # expert 1 is everybody's best, but clusters 0 and 1 were given to the group of expert 0
    groups = {"gate.cluster_group": torch.tensor([0, 0, 1, 1])}
    weights = gate_weights([[[0.1, 0.9]] * 4]) | groups
    shared = {"gate": {"groups": "shared"}, "parallel": {"num_groups": 2}}
    config = make_config({**shared, "moe": {"num_experts": 2}, "cluster": {"num_clusters": 4}})
    ids = np.array([0, 0, 1, 3])
    layer = choose_experts(ids, weights, config, task="t")["layers"][0]
    assert layer["masses"] == [0.75, 0.25] and layer["expert"] == 0
    largest = with_selection(config, "largest_cluster")
    assert choose_experts(ids, weights, largest, task="t")["layers"][0]["expert"] == 0
