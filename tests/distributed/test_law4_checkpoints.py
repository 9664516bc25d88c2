"""Law 4: a checkpoint loads on any other legal number of ranks, bit-equal; damage is noticed."""

import json

import numpy as np
import pytest
from comparing import merged

from moce_dist.train.checkpoint import damage, latest_checkpoint, load_weights


def overrides(ranks, zero=0, groups=4):
    return [
        f"parallel.num_workers={ranks}", f"parallel.zero_stage={zero}",
        f"parallel.num_groups={groups}", "moce.epochs=1",
    ]  # fmt: skip


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_saved_on_4_loads_on_2_and_1_and_back(pools, own_run, tmp_path, zero_stage):
    pools(4).run("train_to_end", run=str(own_run), overrides=overrides(4, zero_stage))
    folder = own_run / "moce" / "checkpoints"
    expected = merged(
        pools(4).run("saved_state", run=str(own_run), overrides=overrides(4, zero_stage)), "tensors"
    )
    kinds = {kind for kind, _ in expected}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
    experts = {name for _, name in expected if ".experts." in name}
    assert len(experts) == 2 * 4 * 4  # layers, experts, tensors
    for ranks, other_zero in ((2, zero_stage), (1, 0), (4, 1)):
        options = overrides(ranks, other_zero)
        loaded = merged(
            pools(ranks).run("saved_state", run=str(own_run), overrides=options), "tensors"
        )
        assert loaded.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=str(name))
    # and what 2 ranks write again, 4 read as what it was
    pools(2).run(
        "save_again",
        run=str(own_run),
        overrides=overrides(2, zero_stage),
        out=str(tmp_path / "again"),
    )
    before, after = (load_weights(latest_checkpoint(f)) for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.equal(after[name]), name


def test_damaged_checkpoint_is_passed_over_and_said_so(pools, own_run, caplog):
    pools(1).run("train_to_end", run=str(own_run), overrides=overrides(1))
    folder = own_run / "moce" / "checkpoints"
    newest = latest_checkpoint(folder)
    file = newest / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "rank-00000.safetensors is damaged" in damage(newest)
    chosen = latest_checkpoint(folder)
    assert chosen is not None and chosen < newest
    assert str(newest) in caplog.text
    result = pools(1).run("saved_state", run=str(own_run), overrides=overrides(1))[0]
    assert result["step"] == int(chosen.name.removeprefix("step_"))


def test_unpublished_and_alien_checkpoints_are_not_taken(own_run):
    folder = own_run / "moce" / "checkpoints"
    (folder / "step_00000009").mkdir(parents=True)
    assert latest_checkpoint(folder) is None
    (folder / "step_00000009" / "manifest.json").write_text(json.dumps({"format": "other"}))
    assert "format" in damage(folder / "step_00000009")
    assert latest_checkpoint(folder) is None
