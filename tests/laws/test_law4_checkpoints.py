"""Law 4: a checkpoint loads on any other legal number of ranks, bit-equal; damage is noticed."""

import errno
import json
import time

import numpy as np
import pytest
from comparing import merged
from safetensors.torch import load_file

from moce_dist.run.files import read_jsonl
from moce_dist.settings import ConfigError
from moce_dist.train.checkpoint import damage, latest_checkpoint, load_weights


def overrides(ranks, zero=0, groups=4, base=False):
    return [
        f"parallel.num_workers={ranks}", f"parallel.zero_stage={zero}",
        f"parallel.num_groups={groups}", "moce.epochs=1", f"moe.shared_base={base}",
    ]  # fmt: skip


@pytest.mark.parametrize(("zero_stage", "base"), [(0, False), (0, True), (1, True), (2, False)])
def test_saved_on_4_loads_on_2_and_1_and_back(pools, own_run, tmp_path, zero_stage, base):
    options = overrides(4, zero_stage, base=base)
    pools(4).run("train_to_end", run=str(own_run), overrides=options)
    folder = own_run / "moce" / "checkpoints"
    expected = merged(pools(4).run("saved_state", run=str(own_run), overrides=options), "tensors")
    kinds = {kind for kind, _ in expected}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
    experts = {name for _, name in expected if ".experts." in name}
    assert len(experts) == 2 * 4 * 4  # layers, experts, tensors
    assert len({name for _, name in expected if ".base." in name}) == base * 2 * 4
    for ranks, other_zero in ((2, zero_stage), (1, 0), (4, 1)):
        options = overrides(ranks, other_zero, base=base)
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
        overrides=overrides(2, zero_stage, base=base),
        out=str(tmp_path / "again"),
    )
    before, after = (load_weights(latest_checkpoint(f)) for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.equal(after[name]), name


def flip_byte(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoint_is_passed_over_and_said_so(pools, own_run, caplog):
    pools(1).run("train_to_end", run=str(own_run), overrides=overrides(1))
    folder = own_run / "moce" / "checkpoints"
    newest = latest_checkpoint(folder)
    file = newest / "rank-00000.safetensors"
    flip_byte(file, file.stat().st_size // 2)
    assert "rank-00000.safetensors is damaged" in damage(newest)
    chosen = latest_checkpoint(folder)
    assert chosen is not None and chosen < newest
    assert str(newest) in caplog.text
    result = pools(1).run("saved_state", run=str(own_run), overrides=overrides(1))[0]
    assert result["step"] == int(chosen.name.removeprefix("step_"))


def test_every_tensor_is_written_once_and_every_flipped_byte_is_noticed(pools, own_run):
    pools(4).run("train_to_end", run=str(own_run), overrides=overrides(4, groups=2))
    checkpoint = latest_checkpoint(own_run / "moce" / "checkpoints")
    files = sorted(checkpoint.glob("rank-*.safetensors"))
    assert [file.name for file in files] == [f"rank-{r:05d}.safetensors" for r in range(4)]
    keys = [key for file in files for key in load_file(file)]
    assert len(keys) == len(set(keys))
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1.2 * min(sizes)
    for file in checkpoint.iterdir():
        for position in np.linspace(0, file.stat().st_size - 1, 20, dtype=int):
            flip_byte(file, position)
            assert damage(checkpoint) is not None, f"byte {position} of {file.name}"
            flip_byte(file, position)
    assert damage(checkpoint) is None


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_steps_that_follow_do_not_change_what_is_written(pools, own_run, tmp_path, zero_stage):
    results = pools(2).run(
        "save_while_training",
        run=str(own_run),
        overrides=overrides(2, zero_stage, groups=1),
        out=str(tmp_path),
    )
    assert [r["published_before_release"] for r in results] == [[], []]
    waited, late = (tmp_path / name / "step_00000002" for name in ("waited", "late"))
    assert {f.name: f.read_bytes() for f in late.iterdir()} == {
        f.name: f.read_bytes() for f in waited.iterdir()
    }
    # training did go on, and the next save waited for this one and said so
    after = load_weights(tmp_path / "late" / "step_00000004")
    before = load_weights(late)
    assert any(not tensor.equal(after[name]) for name, tensor in before.items())
    assert f"{late}: is still being written; training waits" in results[0]["log"]


def wait_for(has_come, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not has_come():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def test_killed_while_writing_the_previous_checkpoint_is_the_newest(pools, own_run):
    options, folder = overrides(2), own_run / "moce" / "checkpoints"
    pools(2).start("train_until_disk_hangs", run=str(own_run), overrides=options, at_step=8)
    # both ranks' data of step 8 is there, and training goes on to its end, which saves
    wait_for(lambda: len([*folder.glob(".step_00000008.*.tmp/rank-*")]) == 2)
    metrics = own_run / "moce" / "metrics.jsonl"
    wait_for(lambda: [line["step"] for line in read_jsonl(metrics)][-1:] == [10])
    pools(2).kill()
    assert latest_checkpoint(folder) == folder / "step_00000004"
    assert any(folder.glob(".step_*"))
    pools(2).run("train_to_end", run=str(own_run), overrides=options)
    assert not any(folder.glob(".*"))
    assert damage(folder / "step_00000008") is None
    assert [line["step"] for line in read_jsonl(metrics)] == list(range(11))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_cannot_write_ends_all_with_one_error(pools, own_run, rank):
    options, folder = overrides(2), own_run / "moce" / "checkpoints"
    pools(2).run("train_part", run=str(own_run), overrides=options, stop=7)
    assert [p.name for p in folder.iterdir()] == ["step_00000004"]
    found = pools(2).run("train_with_small_files", run=str(own_run), overrides=options, rank=rank)
    errors, numbers = zip(*found, strict=True)
    # the number tells what is final from storage that may come back
    assert errors[0] == errors[1] and set(numbers) == {errno.EFBIG}
    assert errors[0].startswith(f"{folder}: checkpoint not written: ")
    assert "File too large" in errors[0] and "\n" not in errors[0]
    assert [p.name for p in folder.iterdir()] == ["step_00000004"]
    assert latest_checkpoint(folder) is not None


@pytest.mark.parametrize(("zero_stage", "logged_every"), [(0, 1), (0, 1000), (1, 1), (2, 1)])
@pytest.mark.parametrize("name", ["blocks.1.mlp.experts.fc1.weight", "blocks.0.norm1.bias"])
def test_an_infinite_gradient_of_one_rank_stops_all_before_the_weights_change(
    pools, own_run, zero_stage, logged_every, name
):
    options = [*overrides(2, zero_stage), f"logging.every_steps={logged_every}"]
    found = pools(2).run(
        "train_with_bad_gradient", run=str(own_run), overrides=options, rank=1, parameter=name,
        at_step=5,
    )  # fmt: skip
    for error, is_same, published, last in found:
        assert error.startswith("moce: gradient norm is ") and error.endswith(" at step 5")
        assert is_same
        assert published == ["step_00000004"]
        # the next step, which is finite, is launched before a step that is not logged is read
        assert last == (5 if logged_every == 1 else 6)
    # the same run goes on from what is good, to the end
    pools(2).run("train_to_end", run=str(own_run), overrides=overrides(2, zero_stage))


@pytest.mark.parametrize(("zero_stage", "logged_every"), [(0, 1), (0, 4), (2, 1)])
def test_a_loss_of_one_rank_that_is_nan_stops_all_and_the_same_command_ends_the_same(
    pools, own_run, learned, zero_stage, logged_every
):
    # at a step that is not logged, the next one is launched before the loss is read
    options = [*overrides(2, zero_stage), f"logging.every_steps={logged_every}"]
    found = pools(2).run(
        "train_with_bad_loss", run=str(own_run), overrides=options, rank=1, at_step=9,
        writing_step=8,
    )  # fmt: skip
    for error, is_same, (half_written, published) in found:
        assert error == "moce: loss is nan at step 9"
        assert is_same
        assert half_written.startswith(".step_00000008.") and published == "step_00000004"
    log = own_run / "moce" / "metrics.jsonl"
    assert max(line["step"] for line in read_jsonl(log)) == (8 if logged_every == 1 else 7)
    whole = own_run / "whole"
    whole.mkdir()
    for name in ("shards", "clusters"):
        (whole / name).symlink_to(own_run / name)
    for run in (own_run, whole):
        pools(2).run("train_to_end", run=str(run), overrides=options)
    assert not any((own_run / "moce" / "checkpoints").glob(".*"))
    mine, undisturbed = learned(own_run / "moce"), learned(whole / "moce")
    assert mine["digests"] == undisturbed["digests"]
    # the first step after a start is logged, too
    steps = {line["step"] for line in undisturbed["metrics"]}
    assert [m for m in mine["metrics"] if m["step"] in steps] == undisturbed["metrics"]


def test_weights_that_cannot_be_summed_are_not_published(pools, own_run):
    folder = own_run / "moce" / "checkpoints"
    errors = pools(2).run("train_to_ruin", run=str(own_run), overrides=overrides(2), rank=1)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{folder}: checkpoint not written: weight/blocks.")
    assert errors[0].endswith(" is not finite")
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000004", "step_00000008"]


def test_a_folder_that_cannot_be_made_ends_all_with_one_error(pools, own_run):
    folder = own_run / "moce" / "checkpoints"
    folder.parent.mkdir()
    folder.write_text("in the way")
    found = pools(2).run(
        "train_with_small_files", run=str(own_run), overrides=overrides(2), rank=None
    )
    errors = [text for text, _ in found]
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{folder}: checkpoint not written: ")


def test_unpublished_and_alien_checkpoints_are_not_taken(own_run):
    folder = own_run / "moce" / "checkpoints"
    (folder / "step_00000009").mkdir(parents=True)
    assert latest_checkpoint(folder) is None
    (folder / "step_00000009" / "manifest.json").write_text(json.dumps({"format": "other"}))
    assert "format" in damage(folder / "step_00000009")
    assert latest_checkpoint(folder) is None


def test_a_checkpoint_of_another_version_is_refused_and_not_passed_over(own_run):
    manifest = own_run / "moce" / "checkpoints" / "step_00000009" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"format": "moce_dist.checkpoint.v1", "files": {}}))
    with pytest.raises(ConfigError, match=r"step_00000009: has the format .*\.v1 of another"):
        latest_checkpoint(manifest.parents[1])
