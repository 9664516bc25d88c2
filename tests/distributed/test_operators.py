"""What a step launches: with small kernels the host is soon slower than the GPU."""

import pytest

# twelve blocks and eight of the decoder, six of them with experts, as ViT-B has them
SHAPE = ["model.depth=12", "model.decoder_depth=8"]
PRECISIONS = ["parallel.precision=fp32", "parallel.precision=bf16"]


def count(pools, run, ranks, *more, **arguments):
    overrides = [f"parallel.num_workers={ranks}", *SHAPE, *more]
    return max(pools(ranks).run("operators", run=str(run), overrides=overrides, **arguments))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_launches_few_operators(pools, clustered_run, precision):
    one_each = [precision, "moe.num_experts=1", "parallel.num_groups=1"]
    dense = count(pools, clustered_run, 1, precision, "moe.kind=dense")
    own, offsets = (
        count(pools, clustered_run, 1, *one_each, f"moe.shared_base={base}")
        for base in (False, True)
    )
    assert dense <= 900
    # a base adds one sum a layer and, in float32, one copy of its gradients
    assert own < offsets <= 1000


def test_planted_work_on_every_parameter_is_counted(pools, clustered_run):
    dense = ["moe.kind=dense", "moce.optimizer=sgd"]
    fused, planted = (
        count(pools, clustered_run, 1, *dense, planted=planted) for planted in (False, True)
    )
    assert planted > fused + 200


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_exchange_adds_few_operators(pools, clustered_run, precision):
    halves = [precision, "moe.num_experts=2", "parallel.num_groups=2"]
    for base in (False, True):
        more = [*halves, f"moe.shared_base={base}"]
        assert count(pools, clustered_run, 2, *more, placement="scrambled") <= 1150
