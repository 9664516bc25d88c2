"""Run directories: identity, completion markers, the ledger of faults."""

import errno
import json
import multiprocessing
from pathlib import Path

import pytest

from moce_dist.config import Config, make_config, read_resolved, to_yaml
from moce_dist.run import directory, lease
from moce_dist.run.artefacts import artefact_id, is_complete, mark_complete
from moce_dist.run.directory import (
    differing_fields,
    load_run,
    open_run,
    read_provenance,
    resolve_run,
    starts_of,
)
from moce_dist.run.files import naming, read_faults, read_jsonl, record_fault, write_atomic
from moce_dist.settings import ConfigError, dump_yaml

SMALL = make_config({"seed": 1})


def artefact(folder, content="weights"):
    folder.mkdir()
    (folder / "a.bin").write_text(content)
    mark_complete(folder, {"source": "abc", "epochs": 3}, [folder / "a.bin"])
    return folder


def test_run_directory_says_what_it_is(tmp_path):
    run = open_run(tmp_path / "run", SMALL)
    assert load_run(run.root) == (run, SMALL)
    provenance = json.loads((run.root / "provenance.json").read_text())
    assert provenance["versions"]["torch"] and provenance["command"] and provenance["time"]


def test_runtime_fields_may_change_between_starts(tmp_path):
    open_run(tmp_path, SMALL)
    again = make_config({"seed": 1, "parallel": {"num_workers": 4}, "logging": {"every_steps": 1}})
    assert load_run(open_run(tmp_path, again).root)[1] == again


def test_another_identity_is_refused_with_the_differing_fields(tmp_path):
    root = tmp_path / "run"
    open_run(root, SMALL)
    other = make_config({"seed": 2, "cluster": {"num_clusters": 8}, "parallel": {"num_workers": 2}})
    with pytest.raises(ConfigError) as caught:
        open_run(root, other)
    message = str(caught.value)
    assert "seed: 1 -> 2" in message and "cluster.num_clusters: 256 -> 8" in message
    assert "num_workers" not in message and "--fresh" in message
    assert (root / "config.yaml").read_text() == to_yaml(SMALL)


def test_fresh_sets_the_old_run_aside(tmp_path):
    root = tmp_path / "run"
    (open_run(root, SMALL).stage("mae")).mkdir()
    open_run(root, make_config({"seed": 2}), fresh=True)
    (aside,) = tmp_path.glob("run.before-*")
    assert (aside / "mae").is_dir() and load_run(aside)[1].seed == 1
    assert not (root / "mae").exists() and load_run(root)[1].seed == 2


def test_two_fresh_starts_in_one_second_lose_nothing(tmp_path):
    root = tmp_path / "run"
    for seed in range(3):
        open_run(root, make_config({"seed": seed}), fresh=True)
    assert {load_run(path)[1].seed for path in tmp_path.iterdir()} == {0, 1, 2}


def test_folder_with_other_files_is_never_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="is not a run directory"):
            open_run(tmp_path, SMALL, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_what_a_second_driver_leaves_while_it_waits_for_the_lock_is_new(tmp_path):
    for name in (lease.LOCK, lease.TAKING, f".{lease.TAKING}.0123.tmp"):
        (tmp_path / name).touch()
    open_run(tmp_path, make_config({}))
    assert (tmp_path / "config.yaml").exists()


def test_under_torchrun_the_first_process_alone_writes_and_the_others_stand_what_is_half_made(
    tmp_path, monkeypatch
):
    root = tmp_path / "run"
    root.mkdir()
    (root / ".config.yaml.tmp").write_text("half")
    monkeypatch.setenv("RANK", "1")
    assert open_run(root, SMALL).root == root
    assert [path.name for path in root.iterdir()] == [".config.yaml.tmp"]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="is not a run directory"):
        open_run(root, SMALL)


def test_run_of_another_version_is_refused_with_the_setting_and_the_file(tmp_path):
    root = open_run(tmp_path / "run", SMALL).root
    resolved = root / "config.yaml"
    resolved.write_text(resolved.read_text() + "gone: {old_setting: 3}\n")
    for read in (lambda: open_run(root, SMALL), lambda: load_run(root)):
        with pytest.raises(ConfigError, match=r"config.yaml: does not fit .*gone = .*unknown key"):
            read()
    assert resolved.read_text().endswith("gone: {old_setting: 3}\n")


def test_missing_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        load_run(tmp_path / "none")


def test_differing_fields_reads_from_the_other_to_mine():
    assert differing_fields(make_config({"seed": 2}), SMALL) == ["seed: 1 -> 2"]


def test_relative_run_lies_in_the_root_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_run("quickstart", SMALL) == tmp_path / "runs" / "quickstart"
    assert resolve_run("runs/quickstart", SMALL) == tmp_path / "runs" / "quickstart"
    assert resolve_run(str(tmp_path / "x"), SMALL) == tmp_path / "x"


def test_submitted_job_refuses_a_relative_run(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="absolute"):
        resolve_run("quickstart", SMALL)
    shared = make_config({"run": {"root": "/mnt/runs"}})
    assert str(resolve_run("quickstart", shared)) == "/mnt/runs/quickstart"


def test_artefact_is_complete_only_with_its_inputs_and_files(tmp_path):
    folder = artefact(tmp_path / "a")
    inputs = {"epochs": 3, "source": "abc"}
    assert is_complete(folder, inputs)
    assert not is_complete(folder, inputs | {"epochs": 4})
    assert not is_complete(tmp_path / "none", inputs)
    (folder / "a.bin").unlink()
    assert not is_complete(folder, inputs)


@pytest.mark.parametrize("marker", ["", "{", '{"inputs": '])
def test_torn_marker_is_no_marker(marker, tmp_path):
    folder = artefact(tmp_path / "a")
    (folder / "COMPLETE").write_text(marker)
    assert not is_complete(folder, {"source": "abc", "epochs": 3})
    with pytest.raises(ConfigError, match="is not complete"):
        artefact_id(folder)


def test_run_of_the_version_that_listed_benchmarks_is_taken_up(tmp_path):
    open_run(tmp_path / "run", Config())
    with (tmp_path / "run" / "config.yaml").open("a") as file:
        file.write("bench: {rounds: 8, warmup_rounds: 2}\n")
    assert load_run(tmp_path / "run")[1] == Config()
    assert open_run(tmp_path / "run", Config()).root == tmp_path / "run"


def test_run_with_the_names_of_version_0_1_is_taken_up(tmp_path):
    open_run(tmp_path / "run", Config())
    tree = Config().model_dump(mode="json")
    tree["transfer"] = Config().transfer.flat() | {"segment_crop": 64, "detect_window": 5}
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(dump_yaml(tree))
    transfer = load_run(tmp_path / "run")[1].transfer
    assert (transfer.segmentation.crop, transfer.detection.window) == (64, 5)
    assert read_resolved(saved, ["transfer.detection.window=7"]).transfer.detection.window == 7
    assert read_resolved(saved, ["transfer.detect_window=7"]).transfer.detection.window == 7
    assert open_run(tmp_path / "run", Config()).root == tmp_path / "run"


def test_run_from_before_experts_shared_a_base_keeps_weights_of_their_own(tmp_path):
    of_before = make_config({"moe": {"shared_base": False}})
    open_run(tmp_path / "run", of_before)
    tree = of_before.model_dump(mode="json")
    del tree["moe"]["shared_base"]
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(tree))
    assert load_run(tmp_path / "run")[1].moe.shared_base is False
    assert open_run(tmp_path / "run", of_before).root == tmp_path / "run"
    with pytest.raises(ConfigError, match=r"moe\.shared_base"):
        open_run(tmp_path / "run", Config())


def test_artefact_id_follows_content_and_inputs(tmp_path):
    first, same = artefact(tmp_path / "a"), artefact(tmp_path / "b")
    other = artefact(tmp_path / "c", content="other weights")
    assert artefact_id(first) == artefact_id(same) != artefact_id(other)


def test_atomic_write_leaves_no_other_file(tmp_path):
    for text in ("one", "two"):
        write_atomic(tmp_path / "deep" / "file.json", text)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.json"]
    assert (tmp_path / "deep" / "file.json").read_text() == "two"


def write_faults(ledger, writer):
    for number in range(200):
        record_fault(ledger, writer=writer, number=number, reason="x" * 300)


def test_ledger_keeps_every_line_of_concurrent_processes(tmp_path):
    ledger = tmp_path / "run" / "faults.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_faults, args=(ledger, n)) for n in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    faults = read_faults(ledger)
    assert sorted((f["writer"], f["number"]) for f in faults) == [
        (writer, number) for writer in range(4) for number in range(200)
    ]


def test_line_cut_off_by_a_kill_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in read_jsonl(file)] == [1, 2]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_an_error_of_writing_names_its_file(tmp_path):
    path = tmp_path / "a.npy"
    full, unknown = (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("8 requested, 0 written"),
    )
    for error, said in (
        (full, f"[Errno 28] No space left on device: '{path}'"),
        (unknown, f"{path}: 8 requested, 0 written"),
        (type("SafetensorError", (Exception,), {})("I/O error"), f"{path}: I/O error"),
    ):
        with pytest.raises(OSError) as caught, naming(path):
            raise error
        assert str(caught.value) == said
    with pytest.raises(KeyError), naming(path):
        raise KeyError("other errors stay what they are")
    message = r"\[Errno 28\] No space left on device: .*a\.npy"
    with (
        Path("/dev/full").open("wb", 0) as device,
        pytest.raises(OSError, match=message),
        naming(path),
    ):
        device.write(b"x")


def test_every_start_is_remembered_with_its_versions(tmp_path, monkeypatch):
    root = tmp_path / "run"
    open_run(root, SMALL)
    path = root / "provenance.json"
    first = read_provenance(root)
    # a file of a version that kept the last start alone
    path.write_text(json.dumps({k: v for k, v in first.items() if k != "starts"}))
    for number in range(120):
        found = {"torch": f"9.{number}"}
        monkeypatch.setattr(directory, "versions", lambda found=found: found)
        open_run(root, SMALL)
        open_run(root, SMALL)
    starts = starts_of(read_provenance(root))
    assert starts[0]["versions"] == first["versions"] and len(starts) == 101
    assert [s["versions"]["torch"] for s in starts[1:]] == [f"9.{n}" for n in range(20, 120)]
    assert read_provenance(root)["versions"] == {"torch": "9.119"}
