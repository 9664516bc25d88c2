"""The same training without Ray: torchrun gives the same numbers, bit for bit."""


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
