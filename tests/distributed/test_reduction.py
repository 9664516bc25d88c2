"""Gradients are summed in buckets while the backward pass runs, once a step, in one order."""

import numpy as np
import pytest
from comparing import merged
from ranks import fresh_run

ONE_PIECE = 2**30
SMALL = 4096


def reductions(pools, run, *extra, ranks=2, bucket_bytes=SMALL):
    overrides = [f"parallel.num_workers={ranks}", "parallel.num_groups=2", *extra]
    return pools(ranks).run(
        "reductions", run=str(run), overrides=overrides, bucket_bytes=bucket_bytes
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_buckets_but_the_last_ones_travel_during_the_backward_pass(pools, clustered_run, ranks):
    results = reductions(pools, clustered_run, ranks=ranks)
    for result in results:
        assert result["buckets"] == len(result["sums"]) > 10
        # every bucket is complete by the end of the backward pass
        assert result["begun_in_backward"] == [result["buckets"]]
        assert result["sums"] == results[0]["sums"], "one order on all ranks"
        # the norm, the loss and who was asked to stop
        assert result["waited_for"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buckets_travel_while_earlier_blocks_compute(pools, clustered_run, precision):
    result, _ = reductions(pools, clustered_run, f"parallel.precision={precision}")
    (begun,) = result["begun_before_first_block"]
    assert begun > result["buckets"] / 2


def test_size_of_buckets_changes_no_gradient(pools, clustered_run):
    small, one_piece = (
        merged(reductions(pools, clustered_run, bucket_bytes=size), "gradients")
        for size in (SMALL, ONE_PIECE)
    )
    for name, gradient in small.items():
        np.testing.assert_array_equal(one_piece[name], gradient, err_msg=name)


def test_micro_batches_are_summed_once(pools, clustered_run):
    result, _ = reductions(pools, clustered_run, "parallel.micro_batches=2")
    assert len(result["sums"]) == result["buckets"]
    assert result["begun_in_backward"] == [result["buckets"]]


def test_bfloat16_halves_what_travels_at_a_bounded_error(pools, clustered_run):
    full = reductions(pools, clustered_run, ranks=4)
    half = reductions(pools, clustered_run, "parallel.reduce_dtype=bf16", ranks=4)
    assert half[0]["bytes"] * 2 == full[0]["bytes"]
    exact, rounded = merged(full, "gradients"), merged(half, "gradients")
    norm = np.sqrt(sum((gradient**2).sum() for gradient in exact.values()))
    error = np.sqrt(sum(((rounded[n] - gradient) ** 2).sum() for n, gradient in exact.items()))
    # eight bits of mantissa, rounded when sent and after each of the sums
    assert 0 < error <= 1e-2 * norm


@pytest.mark.parametrize("zero", [0, 2])
def test_a_finished_stage_leaves_no_model_behind(pools, tmp_path, clustered_run, zero):
    run = fresh_run(clustered_run, tmp_path / "run")
    overrides = ["parallel.num_workers=1", "parallel.num_groups=1", f"parallel.zero_stage={zero}"]
    (left,) = pools(1).run(
        "models_left", run=str(run), overrides=[*overrides, "moce.epochs=0.2"], times=3
    )
    # what earlier tests of the process left is the same after every time
    assert left == left[:1] * 3
