"""The same training without Ray: torchrun gives the same numbers, bit for bit."""

import pytest


def test_both_stages_learn_the_same_as_under_ray(torchrun, arguments, part_of, learned, finished):
    run = part_of("ingested", "features", "clusters", "shards")
    torchrun(2, *arguments(run), "--stage", "mae").assert_done()
    assert learned(run / "mae") == learned(finished / "mae")
    torchrun(2, *arguments(run), "--stage", "moce").assert_done()
    assert learned(run / "moce") == learned(finished / "moce")


def test_data_must_be_there_before(torchrun, arguments, tmp_path):
    result = torchrun(2, *arguments(tmp_path / "run"), "--stage", "mae")
    assert result.status == 1
    assert "under torchrun first make it with jobs/ingest.py" in result.err
    assert not (tmp_path / "run" / "ingested").exists()


def test_wrong_numbers_of_processes_are_refused(torchrun, arguments, tmp_path):
    result = torchrun(1, *arguments(tmp_path / "run"), "--stage", "mae")
    assert result.status == 1
    assert "parallel.num_workers (2) must be the number of processes" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "form", [("--standalone",), (), ("--master-addr=127.0.0.1", "--master-port=29541")]
)
def test_a_killed_rank_is_restarted_and_the_stage_ends_with_the_same_bits(
    form, start_torchrun, arguments, part_of, learned, finished
):
    run = part_of("ingested", "features", "clusters", "shards", "mae")
    command = (*arguments(run), "--stage", "moce")
    job = start_torchrun(2, *command, flags=(*form, "--max-restarts=2"))
    checkpoints = run / "moce" / "checkpoints"
    job.wait_until(lambda: any(checkpoints.glob("step_*")), "a checkpoint")
    ranks = [p for p in job.descendants() if p.environ().get("RANK") == "1"]
    assert ranks, "there was no rank to kill"
    ranks[0].kill()
    result = job.finish().assert_done()
    job.assert_nothing_stays()
    assert "moce: resuming at step" in result.err
    assert learned(run / "moce") == learned(finished / "moce")
