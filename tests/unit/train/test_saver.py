"""Who writes which tensor, which checkpoints stay, and at which priority they are written."""

import os
import sys
from functools import partial

import pytest
import torch

from moce_dist.parallel.groups import Topology
from moce_dist.train.checkpoint import complete_checkpoints, step_folder
from moce_dist.train.saver import Background, Shares, publish

EXPERTS = "blocks.1.mlp.experts.fc1.weight"


def writers(ranks, groups, tensors):
    """Ranks that write each tensor, from what every rank says for itself."""
    shares = [Shares(Topology(ranks, groups), rank) for rank in range(ranks)]
    return [
        [rank for rank, share in enumerate(shares) if share.is_mine(name, torch.empty(size))]
        for name, size in tensors
    ]


def test_shared_tensors_go_to_whom_has_least():
    tensors = [("a", 8), ("b", 2), ("c", 3), ("d", 1), ("e", 4)]
    assert writers(3, 1, tensors) == [[0], [1], [2], [1], [1]]


def test_experts_are_written_once_in_every_place():
    # places {0, 1} and {2, 3}; the shared tensor before them was rank 0's
    tensors = [("a", 4), (EXPERTS, 4), (EXPERTS, 4), ("b", 1)]
    assert writers(4, 2, tensors) == [[0], [1, 2], [0, 3], [1]]


@pytest.mark.parametrize(("ranks", "groups"), [(1, 4), (2, 4), (8, 4), (8, 2)])
def test_every_rank_has_a_share_of_equal_size(ranks, groups):
    sizes = torch.randint(1, 100, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    tensors = [(EXPERTS if i % 3 else f"shared.{i}", size) for i, size in enumerate(sizes)]
    written, places = [0] * ranks, min(ranks, groups)
    for (name, size), by in zip(tensors, writers(ranks, groups, tensors), strict=True):
        assert len(by) == (places if name == EXPERTS else 1)
        for rank in by:
            written[rank] += size
    assert max(written) - min(written) <= 100


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_does_not_displace_the_new_one(tmp_path, keep):
    for step in (50, 200, 100, 150):
        temporary = tmp_path / "new"
        temporary.mkdir()
        publish(temporary, step_folder(tmp_path, step), {"step": step}, keep=keep)
    # after 200 the run went on from an earlier step: that one was damaged
    kept = [path.name for path in complete_checkpoints(tmp_path)]
    assert kept == [*["step_00000150", "step_00000100"][:keep], "step_00000050"]


def test_a_process_whose_folder_was_removed_meanwhile_damages_no_other_checkpoint(tmp_path):
    for step in (4, 8, 12):
        (tmp_path / "new").mkdir()
        publish(tmp_path / "new", step_folder(tmp_path, step), {"step": step}, keep=9)
    manifest = {"step": 8, "files": {"rank-00000.safetensors": "0" * 64}}
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "late", step_folder(tmp_path, 8), manifest, keep=9)
    assert len(complete_checkpoints(tmp_path)) == 3 and not (tmp_path / "late").exists()


def test_the_oldest_checkpoint_of_a_stage_stays_besides_the_newest(tmp_path):
    kept = []
    for step in range(10, 70, 10):
        (tmp_path / "new").mkdir()
        publish(tmp_path / "new", step_folder(tmp_path, step), {"step": step}, keep=2)
        kept.append([int(path.name[-2:]) for path in complete_checkpoints(tmp_path)])
    assert kept == [[10], [20, 10], [30, 20, 10], [40, 30, 10], [50, 40, 10], [60, 50, 10]]


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_a_checkpoint_is_written_at_the_lowest_priority_and_training_keeps_its_own():
    ask = partial(os.getpriority, os.PRIO_PROCESS, 0)
    before, task = ask(), Background(ask)
    task.join()
    assert (task.result, ask()) == (19, before)
