"""What is done with a finished transfer: list and export routes, predict, export to ONNX."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from moce_dist.__main__ import main
from moce_dist.cluster.assignments import write_assignments
from moce_dist.cluster.blocks import open_features
from moce_dist.data.images import normalise
from moce_dist.features.decoding import framed_image
from moce_dist.model.customize import customize, routes
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import run_backbone
from moce_dist.transfer.predict import averages, load_model
from moce_dist.transfer.segmentation.task import Segmentation

from .conftest import NUM_CLUSTERS, SIZE, by_global_name, png

SIZES = [5, 0, 7, 1, 2, 4]


@pytest.fixture
def assigned(run: Run) -> Run:
    """A run whose assignments say that cluster c has SIZES[c] images."""
    return assign(run, np.repeat(np.arange(NUM_CLUSTERS), SIZES))


def assign(run: Run, labels: np.ndarray) -> Run:
    run.features.mkdir(exist_ok=True)
    np.save(run.features / "train.npy", np.zeros((len(labels), 24), np.float32))
    keys = [f"k{i}" for i in range(len(labels))]
    (run.features / "train.keys.json").write_text(json.dumps(keys))
    table = run.clusters / "assignments.parquet"
    write_assignments(table, open_features(run.features), labels, np.zeros(len(labels)))
    return run


@pytest.fixture
def task(run: Run, image_folder: Path, job) -> Path:
    """A finished transfer to a classification task."""
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--run", str(run.root)]
    job.main([*flags, "--backbone", "moce,mae", "--protocol", "finetune,linear,knn"])
    return run.transfer("imagefolder")


@pytest.fixture
def scenes_task(run: Run, scene_folder: Path, job) -> Path:
    """A finished transfer to a segmentation task."""
    job.main(["--task", "ade20k", "--data", str(scene_folder), "--run", str(run.root)])
    return run.transfer("ade20k")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    capsys.readouterr()
    main(words)
    return capsys.readouterr().out.splitlines()


def test_routes_are_listed_with_their_clusters_and_images(assigned, config, models, capsys):
    head, *rows = said(capsys, "routes", str(assigned.root))
    assert head.split() == ["experts", "images", "share", "clusters", "(images)"]
    table = routes(by_global_name(models["moce"], config), config.gate)
    listed = {}
    for row in rows:
        experts, images, share, rest = row.split(None, 3)
        clusters = {int(c.split()[0]): int(c.split("(")[1][:-1]) for c in rest[2:].split(", ")}
        assert sum(clusters.values()) == int(images)
        listed |= dict.fromkeys(clusters, experts)
        assert all(clusters[c] == SIZES[c] for c in clusters) and "%" in row, share
    expected = {k: ",".join(map(str, table[:, k].tolist())) for k in range(NUM_CLUSTERS)}
    assert listed == expected
    counts = [int(row.split()[1]) for row in rows]
    assert counts == sorted(counts, reverse=True) and sum(counts) == sum(SIZES)


@pytest.mark.parametrize("combine", ["straight_through", "prob"])
def test_any_route_is_exported_as_timm_loads_it(
    combine, assigned, config, models, tmp_path, capsys
):
    text = (assigned.root / "config.yaml").read_text()
    assert "combine: straight_through" in text
    text = text.replace("combine: straight_through", f"combine: {combine}")
    (assigned.root / "config.yaml").write_text(text)
    weights = by_global_name(models["moce"], config)
    taken = {tuple(r) for r in routes(weights, config.gate).T.tolist()}
    free = next((a, b) for a in range(3) for b in range(3) if (a, b) not in taken)
    for experts in (min(taken), free):
        out, given = tmp_path / f"{experts}", ",".join(map(str, experts))
        files = said(capsys, "routes", str(assigned.root), "--experts", given, "--out", str(out))
        assert {Path(f).name for f in files} == {"model.safetensors", "config.json", "README.md"}
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        dense = customize(weights, experts)
        backbone = run_backbone("moce", config, dense)
        images = torch.randn(2, 3, SIZE, SIZE)
        with torch.no_grad():
            same = torch.allclose(model(images), backbone.features_model(0)(images), atol=1e-5)
        assert same == (combine == "straight_through")
        card = (out / "README.md").read_text()
        assert f"# Dense ViT: route {given}" in card
        assert ("no image takes this route" in card) == (experts == free)


@pytest.mark.parametrize("stage", ["mae", "control"])
def test_the_vit_of_a_stage_without_experts_is_exported(
    stage, assigned, config, models, tmp_path, capsys
):
    shutil.copytree(assigned.stage("mae"), assigned.stage("control"), dirs_exist_ok=True)
    out = tmp_path / "vit"
    files = said(capsys, "routes", str(assigned.root), "--dense", stage, "--out", str(out))
    assert {Path(f).name for f in files} == {"model.safetensors", "config.json", "README.md"}
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    weights = customize(models["mae"].state_dict(), ())
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = run_backbone("mae", config, weights).features_model(0)(images)
    torch.testing.assert_close(model(images), expected)
    card = (out / "README.md").read_text()
    assert f"# Dense ViT: {stage}" in card and f"- checkpoint: {stage}/" in card


def test_route_of_empty_clusters_alone_is_exported_with_the_figures_of_all_images(
    run, config, models, tmp_path, capsys
):
    path = run.root / "config.yaml"
    path.write_text(path.read_text().replace("combine: straight_through", "combine: prob"))
    table = routes(by_global_name(models["moce"], config), config.gate)
    experts = table[:, 1]
    assign(run, np.repeat([k for k in range(NUM_CLUSTERS) if (table[:, k] != experts).any()], 3))
    given, out = ",".join(map(str, experts.tolist())), tmp_path / "vit"
    said(capsys, "routes", str(run.root), "--experts", given, "--out", str(out))
    card = (out / "README.md").read_text()
    assert "no image takes this route" in card and "nan" not in card
    assert all(t.isfinite().all() for t in load_file(out / "model.safetensors").values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", "0,9", "--out", "x"], "--experts 0,9: must name 2 experts"),
        (["--experts", "0", "--out", "x"], "must name 2 experts"),
        (["--experts", "0,1"], "name one of the first two and --out"),
        (["--out", "x"], "name one of the first two and --out"),
        (["--dense", "mae", "--experts", "0,1", "--out", "x"], "name one of the first two"),
        (["--dense", "control", "--out", "x"], "control/checkpoints: holds no whole checkpoint"),
    ],
)
def test_wrong_routes_are_refused(flags, message, assigned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        main(["routes", str(assigned.root), *flags])
    assert not (tmp_path / "x").exists()


def test_routes_of_no_run_or_without_assignments_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        main(["routes", str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=r"assignments\.parquet: is no readable table"):
        main(["routes", str(run.root)])


def test_predictions_are_those_of_the_measured_model(task, image_folder, capsys):
    """The share of right predictions is the accuracy that metrics.json reports."""
    rows = json.loads((task / "metrics.json").read_text())["results"]
    for backbone, protocol in (("moce", "finetune"), ("mae", "linear")):
        flags = ["--backbone", backbone, "--protocol", protocol, "--top", "1"]
        found = said(capsys, "predict", str(task), str(image_folder / "test"), *flags)
        lines = [json.loads(line) for line in found]
        right = [line["classes"][0]["name"] == Path(line["image"]).parent.name for line in lines]
        (row,) = (r for r in rows if (r["backbone"], r["protocol"]) == (backbone, protocol))
        assert sum(right) / 24 == pytest.approx(row["value"], abs=1e-6)


def test_probabilities_add_up_and_are_sorted(task, image_folder, capsys):
    (line,) = said(capsys, "predict", str(task), str(image_folder / "test" / "rows" / "000.png"))
    classes = json.loads(line)["classes"]
    assert {c["name"] for c in classes} == {"rows", "columns"}
    values = [c["probability"] for c in classes]
    assert sum(values) == pytest.approx(1, abs=1e-5) and values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", ["mine", "a-mine-c", "a-mine-1x"])
def test_a_folder_that_no_fit_made_is_no_model(name, task, image_folder, capsys):
    copied = Path(shutil.copytree(task / "models" / "moce-finetune-0", task / "models" / name))
    try:
        said(capsys, "predict", str(task), str(image_folder / "test" / "rows" / "000.png"))
        with pytest.raises(ConfigError, match=r"has no model of .*mine.*, only .*-0$"):
            main(["predict", str(task), "x.png", "--backbone", "mine"])
    finally:
        shutil.rmtree(copied)


def test_classifier_is_loaded_by_timm_alone(task):
    folder = task / "models" / "moce-finetune-0" / "last"
    ours, spec = load_model(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert list(spec.classes) == theirs.pretrained_cfg.get("label_names", list(spec.classes))
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images))


def test_unreadable_image_has_a_line_and_the_others_go_on(task, image_folder, tmp_path, capsys):
    data = Path(shutil.copytree(image_folder / "test" / "rows", tmp_path / "rows"))
    (data / "005.png").write_bytes(b"nothing")
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="1 of 12 images could not be read"):
        main(["predict", str(task), str(data), "--batch-size", "4"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [("error" in line) for line in lines] == [i == 5 for i in range(12)]
    assert [Path(line["image"]).name for line in lines] == [f"{i:03d}.png" for i in range(12)]


def test_masks_are_painted_in_the_size_of_the_images(scenes_task, scene_folder, tmp_path, capsys):
    some_images = scene_folder / "images" / "validation"
    flags = ["--out", str(tmp_path / "masks")]
    lines = [
        json.loads(x) for x in said(capsys, "predict", str(scenes_task), str(some_images), *flags)
    ]
    assert len(lines) == 3
    for line, scene in zip(lines, Segmentation.read("ade20k", scene_folder).test, strict=True):
        with Image.open(line["mask"]) as mask, Image.open(scene.image) as some_image:
            assert mask.mode == "RGB" and mask.size == some_image.size
        assert sum(c["share"] for c in line["classes"]) == pytest.approx(1, abs=1e-4)
    # the same model as measured: its masks are those of the comparison
    preview = np.asarray(Image.open(scenes_task / "predictions" / "moce-0" / "1.png"))
    painted = np.asarray(Image.open(tmp_path / "masks" / "1.png"))
    assert np.array_equal(preview[:, 48:96], painted)


def onnx_outputs(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(found)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["finetune", "linear", "backbone"])
def test_onnx_computes_the_same_for_any_batch(kind, task, tmp_path, capsys):
    folder = task / "backbone" if kind == "backbone" else task
    flags = [] if kind == "backbone" else ["--protocol", kind]
    said(capsys, "onnx", str(folder), "--out", str(tmp_path / "m.onnx"), *flags)
    model, spec = load_model(
        folder if kind == "backbone" else task / "models" / f"moce-{kind}-0" / "last"
    )
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, SIZE, SIZE)
        found = onnx_outputs(tmp_path / "m.onnx", images)
        assert found.shape == (batch, 24 if kind == "backbone" else 2)
        assert float((found - model(images)).abs().max()) <= 1e-4
    about = json.loads((tmp_path / "m.json").read_text())
    assert about["classes"] == list(spec.classes) and about["image_size"] == SIZE


@torch.no_grad()
def test_onnx_segments_the_same(scenes_task, tmp_path, capsys):
    said(capsys, "onnx", str(scenes_task), "--out", str(tmp_path / "m.onnx"))
    model, _ = load_model(scenes_task / "models" / "moce-finetune-0" / "last")
    images = torch.randn(3, 3, 32, 32)
    found, expected = onnx_outputs(tmp_path / "m.onnx", images), model(images)
    assert found.shape == (3, 3, 32, 32)
    assert float((found - expected).abs().max()) <= 1e-4


def test_onnx_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"moce-dist\[onnx\]"):
        main(["onnx", str(tmp_path), "--out", str(tmp_path / "m.onnx")])


@pytest.mark.parametrize(("length", "size"), [(16, 6), (4, 6), (12, 3), (7, 1), (5, 2)])
def test_pooling_by_matrices_is_adaptive_pooling(length, size):
    x = torch.randn(2, 3, length)
    torch.testing.assert_close(x @ averages(length, size).T, nn.AdaptiveAvgPool1d(size)(x))


def test_model_that_is_not_there_is_named_with_those_that_are(task, tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    for words, message in (
        ([str(tmp_path), str(image)], "holds no last model.* made without it need --fresh"),
        ([str(task), str(image), "--best"], "holds no best model"),
        ([str(task), str(image), "--seed", "7"], "only mae-finetune-0, mae-linear-0, moce-fine"),
        ([str(task), str(tmp_path / "b.png")], "b.png: is neither a file nor a folder"),
        ([str(task), str(task / "models")], "holds no images"),
        ([str(task), str(image), "--top", "0"], "--top 0"),
        ([str(task), str(image), "--min-score", "0.3"], "--min-score 0.3: .* is no detector"),
        ([str(task / "backbone"), str(image)], "is a backbone without classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(["predict", *words])
    with pytest.raises(ConfigError, match=r"must end in \.onnx"):
        main(["onnx", str(task), "--out", str(tmp_path / "m.bin")])


def test_damaged_model_is_named(task, image_folder):
    folder = task / "models" / "moce-finetune-0" / "last"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors: "):
        main(["predict", str(task), str(image_folder)])
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no model of moce_dist"):
        main(["predict", str(task), str(image_folder)])


def test_wrong_command_line_ends_with_one_line_and_status_2(tmp_path):
    for words in (["predict"], ["routes", "nowhere"], ["onnx", "nowhere", "--out", "a.onnx"]):
        done = subprocess.run(
            [sys.executable, "-m", "moce_dist", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_masks_of_equal_names_are_refused(scenes_task, scene_folder, tmp_path):
    files = [str(scene_folder / "images" / split / "0.jpg") for split in ("training", "validation")]
    with pytest.raises(ConfigError, match=r"0\.png: would be drawn from two images"):
        main(["predict", str(scenes_task), *files, "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="--out: name a folder"):
        main(["predict", str(scenes_task), files[0]])


def test_pixels_are_prepared_as_for_the_fit(task, image_folder, capsys):
    file = image_folder / "test" / "rows" / "003.png"
    (line,) = said(capsys, "predict", str(task), str(file))
    model, spec = load_model(task / "models" / "moce-finetune-0" / "last")
    pixels = torch.from_numpy(framed_image(file.read_bytes(), SIZE, None))
    with torch.no_grad():
        expected = model(normalise(pixels[None])).softmax(1)[0]
    found = {c["name"]: c["probability"] for c in json.loads(line)["classes"]}
    assert [found[name] for name in spec.classes] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_viewed_fit_keeps_its_best_model_and_one_that_saves_none_keeps_none(
    run, image_folder, job, tmp_path, capsys
):
    flags = ["--task", "imagefolder", "--data", str(image_folder), "--run", str(run.root)]
    flags += ["--backbone", "mae", "--protocol", "finetune"]
    job.main([*flags, "--set", "transfer.view_every_steps=2"])
    folder = run.transfer("imagefolder")
    views = (folder / "models" / "mae-finetune-0" / "views.jsonl").read_text().splitlines()
    # 48 images of 16 over two epochs
    assert [json.loads(line)["step"] for line in views] == [2, 4, 6]
    image = next((image_folder / "test").rglob("*.png"))
    (line,) = said(capsys, "predict", str(folder), str(image), "--best")
    assert json.loads(line)["image"] == str(image)
    job.main([*flags, "--set", "transfer.save_models=false", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "imagefolder" / "metrics.json").exists()
    assert not list((tmp_path / "out").glob("*/models/*/last"))
