"""Stage features in one process: what it depends on, what a restart makes again, what it says."""

import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from in_process import run_here
from PIL import Image

from moce_dist.cluster.assign import read_summary
from moce_dist.cluster.existing import assign_group
from moce_dist.config import make_config
from moce_dist.data.columns import open_index, write_columns
from moce_dist.data.ingest import ingest
from moce_dist.data.shards import read_index, write_index
from moce_dist.launch import actors
from moce_dist.model.mae import MaskedAutoencoder
from moce_dist.pipeline import Pipeline, data_id
from moce_dist.run.artefacts import COMPLETE, fingerprint, mark_complete, read_marker
from moce_dist.run.directory import open_run
from moce_dist.run.tasks import map_here
from moce_dist.settings import ConfigError

TIMM = "timm:test_vit.r160_in1k"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 noisy images in two folders, too big for one shard of 64 KiB."""
    root, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(60):
        pixels = draws.integers(0, 256, (48, 48, 3), dtype=np.uint8) // (1 + number % 2)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        folder = root / f"class-{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes(buffer.getvalue())
    return root


def config_of(images, encoder):
    return make_config(
        {
            "data": {
                **{"source": f"folder:{images}", "image_size": 32, "shard_bytes": 2**16},
                **{"holdout_fraction": 0.1, "loader_processes": 0},
            },
            "model": {
                **{"width": 24, "depth": 2, "num_heads": 2, "patch_size": 8},
                **{"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
            },
            "moe": {"num_experts": 2},
            "cluster": {"num_clusters": 4, "batch_size": 8, "encoder": str(encoder)},
        }
    )


@pytest.fixture
def pipeline(tmp_path, images):
    def make(encoder):
        config = config_of(images, encoder)
        return Pipeline(open_run(tmp_path / "run", config), config)

    return make


@pytest.fixture
def publish(tmp_path, images):
    def write(seed):
        torch.manual_seed(seed)
        model = MaskedAutoencoder(config_of(images, "mae"))
        torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
        return tmp_path / "published.pth"

    return write


def digests(folder):
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_ino)
        for p in [*folder.rglob("*.npy"), *folder.rglob("*.keys.json")]
    }


@pytest.mark.usefixtures("timm_offline")
def test_features_of_timm_are_clustered_without_an_mae(pipeline):
    made = pipeline(TIMM)
    summary = made.cluster()
    assert not made.run.stage("mae").exists()
    inputs = read_marker(made.run.features)["inputs"]
    assert inputs.keys() == {"encoder", "data"} and inputs["encoder"].startswith(TIMM)
    assert summary["dim"] == 64 and summary == read_summary(made.run.clusters)
    index = read_index(made.data)
    assert len(index.shards) > 2
    files = {p.stem: np.load(p) for p in made.run.features.glob("*.npy")}
    assert sum(map(len, files.values())) == index.num_samples
    assert all((np.abs(rows).sum(axis=1) > 0).all() for rows in files.values())
    assert (made.run.features / "holdout").is_dir()


@pytest.mark.usefixtures("timm_offline")
@pytest.mark.parametrize(("block_rows", "is_shared"), [(4, True), (5, False)])
def test_held_out_images_of_more_than_a_block_are_assigned_by_workers(
    pipeline, monkeypatch, block_rows, is_shared
):
    made = pipeline(TIMM)
    made.features()
    made.clusters()
    assert open_index(made.data / "holdout").num_samples == 5
    asked = []

    def noted(function, shared, items):
        asked.append(function)
        return map_here(function, shared, items)

    monkeypatch.setattr(actors, "map_here", noted)
    parts = {"cluster": made.config.cluster.model_copy(update={"block_rows": block_rows})}
    replace(made, config=made.config.model_copy(update=parts)).reshard()
    assert pq.read_table(made.run.holdout_clusters).num_rows == 5
    assert (assign_group in asked) == is_shared


@pytest.mark.usefixtures("timm_offline")
def test_weights_of_an_encoder_that_are_missing_are_found_before_the_mae_is_trained(pipeline):
    made = pipeline("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    with pytest.raises(ConfigError, match=r"cluster\.encoder"):
        made.pretrain()
    assert not made.run.stage("mae").exists()


@pytest.mark.usefixtures("timm_offline")
def test_another_encoder_than_the_bases_is_refused_before_features_are_made(tmp_path, images):
    config = config_of(images, TIMM)
    base = open_run(tmp_path / "base", config)
    for name in ("mae", "clusters", "moce"):
        mark_complete(base.root / name, {}, [])
    mark_complete(base.features, {"encoder": f"{TIMM}, other weights"}, [])
    config = config.model_copy(update={"base_run": str(base.root)})
    run = open_run(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=r"^cluster\.encoder .*is not what"):
        Pipeline(run, config).pretrain()
    assert not run.features.exists()


def test_restart_makes_the_files_that_are_missing_and_no_others(pipeline, publish, caplog):
    caplog.set_level("INFO")
    made = pipeline(publish(0))
    made.features()
    whole = digests(made.run.features)
    count = len(read_index(made.data).shards)
    marker = (made.run.features / COMPLETE).read_text()
    victim = min(made.run.features.glob("*.npy"))
    lost = np.load(victim)
    victim.unlink()
    caplog.clear()
    made.features()
    said = rf"features: encoding {len(lost)} images in 1 of {count} shards of .* with /.*\.pth"
    assert re.search(said, caplog.text) and "images/s" in caplog.text
    after = digests(made.run.features)
    assert {n: d for n, (d, _) in after.items()} == {n: d for n, (d, _) in whole.items()}
    # the file and its keys were written anew, at other places of the disk
    moved = {name for name in whole if whole[name] != after[name]}
    assert moved <= {victim.name, f"{victim.stem}.keys.json"}
    assert (made.run.features / COMPLETE).read_text() == marker
    caplog.clear()
    made.features()
    assert "features: complete" in caplog.text


def test_features_are_made_again_from_other_weights(pipeline, publish):
    made = pipeline(publish(0))
    made.features()
    first = digests(made.run.features)
    publish(1)
    made.features()
    second = digests(made.run.features)
    assert first.keys() == second.keys()
    changed = {name for name in first if first[name][0] != second[name][0]}
    assert changed == {name for name in first if name.endswith(".npy")}


class StoppedHereError(Exception):
    pass


def test_other_weights_under_the_same_name_begin_the_stage_anew(pipeline, publish):
    made = pipeline("mae")
    model = made.config.model.model_copy(update={"init": str(publish(0))})
    made = Pipeline(made.run, made.config.model_copy(update={"model": model}))
    inputs = made.run.stage("mae") / "inputs.json"

    def begin():
        def stop(job):
            raise StoppedHereError

        with pytest.raises(StoppedHereError):
            made.mae(stop)
        return json.loads(inputs.read_text())

    first = begin()
    assert first["init"] == hashlib.sha256(Path(model.init).read_bytes()).hexdigest()
    assert begin() == first
    publish(1)
    assert begin()["init"] != first["init"]
    # a stage that an earlier version began did not note it, and goes on
    inputs.write_text(json.dumps({"data": first["data"]}, sort_keys=True))
    assert begin() == {"data": first["data"]}


def test_features_of_the_mae_need_a_trained_one(pipeline):
    with pytest.raises(ConfigError, match="mae: is not complete"):
        pipeline("mae").features()


def test_a_run_goes_on_with_its_own_settings(pipeline):
    root, words = pipeline("mae").run.root, ("--dry-run", "--set", "parallel.micro_batches=2")
    done = run_here("pretrain", "--run", root, *words)
    assert done.returncode == 0 and "encoder    width 24, depth 2, heads 2" in done.stdout
    # a fresh start too, and a name that is no run starts nothing
    done = run_here("pretrain", "--run", root, "--fresh", "--dry-run")
    assert done.returncode == 0 and "width 24" in done.stdout
    absent = run_here("pretrain", "--run", root.parent / "absent", "--dry-run")
    assert absent.returncode == 2 and "there is no run" in absent.stderr
    there = run_here("pretrain", "--run", root.parent / "quickstart", "--dry-run")
    assert there.returncode == 0 and "sample:pretrain" in there.stdout
    # legal for this run's batch of 4,096, not for the quickstart's of 256
    large = ("--set", "parallel.micro_batches=512")
    done = run_here("pretrain", "--run", root, "--dry-run", *large)
    assert done.returncode == 0, done.stderr
    assert run_here("pretrain", "--dry-run", *large).returncode == 2
    for plan in ([], ["--dry-run"]):
        refused = run_here("pretrain", "--run", root, "--set", "seed=1", *plan)
        assert refused.returncode == 2 and "belongs to another run: seed" in refused.stderr


def test_a_plan_says_what_of_the_data_is_not_here(tmp_path):
    words = "--set", f"data.source=folder:{tmp_path}/absent", "--run", tmp_path / "quickstart"
    planned = run_here("pretrain", *words, "--dry-run")
    assert planned.returncode == 0 and re.search("not here .*absent", planned.stdout)
    assert run_here("pretrain", *words).returncode == 2
    # what lies on a server is not asked for
    bucket = "--set", "data.source=shards:s3://absent/a-*.tar", "--run", tmp_path / "quickstart"
    assert run_here("pretrain", *bucket, "--dry-run").returncode == 0


def test_a_run_belongs_to_its_encoder(pipeline, publish):
    pipeline(publish(0))
    with pytest.raises(ConfigError, match=r"belongs to another run: cluster\.encoder"):
        pipeline("mae")


def test_data_with_other_samples_are_other_data(tmp_path, images):
    data, out = config_of(images, "mae").data, tmp_path / "data"
    index = ingest(data.source, out, data, tmp_path / "faults.jsonl")
    whole = data_id(out)
    fewer = [shard.take(range(shard.num_samples - 1)) for shard in index.shards]
    write_columns(write_index(out, fewer))
    assert [s.sha256 for s in open_index(out).shards] == [s.sha256 for s in index.shards]
    assert data_id(out) != whole
    write_columns(write_index(out, index.shards))
    assert data_id(out) == whole
    # as an earlier version marked them, whose runs go on
    marker = json.loads((out / COMPLETE).read_text())
    assert marker.pop("samples") == index.num_samples
    (out / COMPLETE).write_text(json.dumps(marker))
    assert data_id(out) == fingerprint([shard.sha256 for shard in index.shards])
