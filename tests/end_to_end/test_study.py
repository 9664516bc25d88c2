"""A whole study: shared stages, two processes beside each other, kills, the page."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from moce_dist.samples import sets

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "studies" / "tiny.yaml"
OWN = {"backbone": "mae", "domains": "own_equal_steps"}
TASKS = [
    {"task": "digits", "domain": "digits"},
    {"task": "imagefolder", "name": "both", "data": "both"},
]
SETS = ("config.data.source=folder:pretrain", f"arms.own={json.dumps(OWN)}")
ARMS = ("control", "moce", "average", "soft", "own")


@pytest.fixture(scope="module")
def data(tmp_path_factory, images):
    """Images of two domains to train on, and a task with three splits that tells them apart."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(images, root / "pretrain")
    for name in ("digits", "silhouettes"):
        items = sets.task(name).test
        for split, start in (("train", 0), ("val", 40), ("test", 60)):
            (root / "both" / split / name).mkdir(parents=True)
            for number in range(start, start + 20):
                path = root / "both" / split / name / f"{number}.png"
                path.write_bytes(items[number].content)
    return root


@pytest.fixture(scope="module")
def arguments(data):
    sets = [x for text in (*SETS, f"tasks={json.dumps(TASKS)}") for x in ("--set", text)]
    return lambda out, *more: ["--config", TINY, "--data", data, "--out", out, *sets, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_job, arguments):
    """A study that nothing interrupted, in one process."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_job("study", *arguments(out)).assert_done()
    return out


def found(out):
    return json.loads((out / "study.json").read_text())


def test_study_fills_its_tables(finished):
    study = found(finished)
    assert study["split"] == "val" and not study["failed"] and not study["left"]
    keys = {(v["arm"], v["seed"], v["task"], v["protocol"]) for v in study["values"]}
    wanted = {
        (arm, seed, task, protocol)
        for arm in ARMS
        for seed in (0, 1)
        for task in (("digits",) if arm == "own" else ("digits", "both"))
        for protocol in ("knn", "logistic10")
    }
    assert keys == wanted and len(study["values"]) == len(wanted)
    assert {v["metric"] for v in study["values"]} == {"accuracy"}
    both = [v for v in study["values"] if v["task"] == "both"]
    assert {v["num_train"] for v in both} == {40} and {v["num_test"] for v in both} == {40}
    for value in study["values"]:
        metrics = finished / "runs" / value["run"] / "transfer" / value["folder"] / "metrics.json"
        rows = json.loads(metrics.read_text())["results"]
        row = next(
            r
            for r in rows
            if (r["backbone"], r["protocol"]) == (value["backbone"], value["protocol"])
        )
        assert row["value"] == value["value"] and row["seed"] == value["seed"]
    # one of the differences, by hand
    cells = {(v["arm"], v["seed"], v["task"], v["protocol"]): v["value"] for v in study["values"]}
    table = next(t for t in study["tables"] if t["protocol"] == "knn")
    pairs = [(s, t) for s in (0, 1) for t in ("digits", "both")]
    gain = sum(cells["moce", s, t, "knn"] - cells["control", s, t, "knn"] for s, t in pairs) / 4
    assert table["arms"]["moce"]["difference"]["mean"]["mean"] == pytest.approx(gain)


def test_arms_share_what_they_have_in_common(finished):
    study = found(finished)
    assert len(study["runs"]) == 6
    (main, *_), (soft, *_) = (study["arms"][arm]["runs"] for arm in ("moce", "soft"))
    assert study["runs"][soft]["stages"]["mae"]["made_by"] == main
    runs = finished / "runs"
    tensors = [next((runs / name / "mae").rglob("*.safetensors")) for name in (main, soft)]
    assert os.path.samefile(*tensors)
    logs = [runs / name / "mae" / "metrics.jsonl" for name in (main, soft)]
    assert not os.path.samefile(*logs) and logs[0].read_text() == logs[1].read_text()
    assert study["arms"]["own"]["cost"]["mae_images"] == 1600
    costs = {arm: study["arms"][arm]["cost"] for arm in ARMS}
    assert costs["control"]["training_flop"] == costs["moce"]["training_flop"]
    assert costs["control"]["clustering_flop"] == 0 < costs["moce"]["clustering_flop"]
    assert costs["moce"]["seconds"] > costs["own"]["seconds"] > 0


def test_finished_study_is_not_started_again(finished, run_job, arguments):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if "runs" in p.parts}
    values = found(finished)["values"]
    result = run_job("study", *arguments(finished)).assert_done()
    assert "starts" not in result.err
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if "runs" in p.parts} == before
    assert found(finished)["values"] == values


def test_page_needs_no_network_and_no_script(finished):
    page = (finished / "study.html").read_text()
    assert not re.search(r'<script|(src|href)="|url\(|@import', page)
    assert "A tiny study" in page and "validation images" in page
    for arm in ARMS:
        assert arm in page


def strike(job, out, moment, sign=signal.SIGKILL):
    """Wait until a stage is under way in some run, then end the study, by default as a crash."""
    patterns = {
        "ingest": "data/*/train-*.tar",
        "mae": "runs/*/mae/checkpoints/step_*",
        "features": "runs/*/features/*.npy",
        "moce": "runs/*/moce/checkpoints/step_*",
        "transfer": "runs/*/transfer/*/results.jsonl",
    }
    job.wait_until(lambda: any(out.glob(patterns[moment])), moment)
    job.process.send_signal(sign)
    result = job.finish()
    job.assert_nothing_stays()
    return result


MOMENTS = ("ingest", "mae", "features", "moce", "transfer")


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(("moce",), id="moce"),
        *(pytest.param((m,), id=m, marks=pytest.mark.long) for m in MOMENTS if m != "moce"),
    ],
)
def test_killed_study_goes_on_to_the_same_figures(moments, start, arguments, finished, tmp_path):
    out = tmp_path / "out"
    for moment in moments:
        strike(start("study", *arguments(out, "--jobs", 2)), out, moment)
    start("study", *arguments(out, "--jobs", 2)).finish().assert_done()
    ours, theirs = found(out), found(finished)
    assert ours["values"] == theirs["values"]
    assert ours["tables"] == theirs["tables"]


def test_terminated_study_ends_with_all_its_processes(start, arguments, finished, tmp_path):
    out = tmp_path / "out"
    # one process extracts features, which ends at once; another one may train, and saves first
    result = strike(start("study", *arguments(out, "--jobs", 2)), out, "features", signal.SIGTERM)
    assert result.status == 143 and "the same command continues" in result.err
    start("study", *arguments(out, "--jobs", 2)).finish().assert_done()
    assert found(out)["values"] == found(finished)["values"]


def test_terminated_study_in_one_process_does_not_finish_its_piece(start, arguments, tmp_path):
    out = tmp_path / "out"
    result = strike(start("study", *arguments(out)), out, "features", signal.SIGTERM)
    assert result.status == 143 and "the same command continues" in result.err
    assert not list(out.glob("runs/*/features/COMPLETE"))


@pytest.mark.long
def test_pieces_go_to_the_nodes_of_a_cluster(start, arguments, finished, tmp_path):
    from ray.cluster_utils import Cluster

    out, cluster = tmp_path / "out", Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        job = start("study", *arguments(out), env={"RAY_ADDRESS": cluster.address})
        job.wait_until(lambda: both_run(out), "two pieces at once")
        job.process.send_signal(signal.SIGTERM)
        result = job.finish()
        assert result.status == 143 and "the pieces that ran are not finished" in result.err
        job = start("study", *arguments(out), env={"RAY_ADDRESS": cluster.address})
        job.finish().assert_done()
    finally:
        cluster.shutdown()
    assert found(out)["values"] == found(finished)["values"]


def both_run(out):
    """Tell whether two stages are under way side by side."""
    return (
        len(list(out.glob("runs/*-seed*/*/inputs.json")))
        - len(list(out.glob("runs/*-seed*/m*/COMPLETE")))
        > 1
    )


def test_two_studies_do_not_share_a_folder(start, run_job, arguments, tmp_path):
    out = tmp_path / "out"
    job = start("study", *arguments(out))
    job.wait_until(lambda: (out / "lock").exists() and (out / "study.yaml").exists(), "lock")
    run_job("study", *arguments(out)).assert_refused(2, "is in use by process")
    job.kill_all()


def test_a_task_that_fails_leaves_the_others(run_job, arguments, data, tmp_path):
    shutil.copytree(data / "both", tmp_path / "both")
    (tmp_path / "both" / "train" / "digits" / "3.png").write_bytes(b"no image")
    (tmp_path / "pretrain").symlink_to(data / "pretrain")
    out = tmp_path / "out"
    arms = "arms={mae: {backbone: mae}, random: {backbone: random}}"
    only = ["seeds=[0]", "reference=mae", arms]
    sets = [x for text in only for x in ("--set", text)]
    result = run_job("study", *arguments(out), *sets, "--data", tmp_path)
    result.assert_refused(1, "1 of 3 pieces failed", "both-val", "3.png: unreadable image")
    assert {v["task"] for v in found(out)["values"]} == {"digits"}
    page = (out / "study.html").read_text()
    assert "3.png: unreadable image" in page and "One seed has no deviation" in page


def test_final_figures_are_of_the_test_images(run_job, arguments, data, tmp_path):
    shutil.copytree(data / "both", tmp_path / "both")
    for name in ("digits", "silhouettes"):
        for number in range(60, 65):
            (tmp_path / "both" / "test" / name / f"{number}.png").unlink()
    (tmp_path / "pretrain").symlink_to(data / "pretrain")
    only = [
        *("seeds=[0]", "reference=random", "arms={random: {backbone: random}}"),
        f"tasks={json.dumps(TASKS[1:])}",
    ]
    sets = [x for text in only for x in ("--set", text)]
    command = (*arguments(tmp_path / "out"), *sets, "--data", tmp_path)
    for flags, split, count in (((), "val", 40), (("--final",), "test", 30)):
        run_job("study", *command, *flags).assert_done()
        study = found(tmp_path / "out")
        assert study["split"] == split and study["values"]
        assert {value["num_test"] for value in study["values"]} == {count}
