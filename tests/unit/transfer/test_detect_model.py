"""The detector: windows, pyramid, and the job from flags to metrics.json and to predictions."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moce_dist.model.customize import customize
from moce_dist.run.directory import Run
from moce_dist.settings import ConfigError
from moce_dist.transfer.backbone import Backbone, run_backbone
from moce_dist.transfer.commands import predict
from moce_dist.transfer.detection.vitdet import (
    WindowAttention,
    global_blocks,
    make_detector,
    make_optimizer,
    prepare_vit,
)
from moce_dist.transfer.fit import stepped_rate

from .conftest import write_coco

ROOT = Path(__file__).parents[3]


@pytest.fixture
def backbone(config, models) -> Backbone:
    return run_backbone("mae", config, customize(models["mae"].state_dict(), ()))


def build(backbone: Backbone, config: Any, **changes: Any) -> Any:
    recipe = config.transfer.detection.model_copy(update=changes)
    vit = backbone.dense_model(recipe.size, seed=0, drop_path=0.0)
    return make_detector(
        vit,
        backbone,
        recipe,
        num_classes=2,
        has_masks=True,
        autocast=contextlib.nullcontext,
    )


class Mean(torch.nn.Module):
    """Stands in for attention: every token becomes the mean of those that it is given with."""

    def forward(self, tokens, **options):
        return tokens.mean(dim=1, keepdim=True).expand_as(tokens)


def test_attention_stays_inside_its_window():
    # 5 x 5 patches in windows of 3: the grid is padded to 6 x 6 with zeros
    tokens = torch.arange(25.0).reshape(1, 25, 1)
    mixed = WindowAttention(Mean(), 5, 3)(tokens).reshape(5, 5)
    grid = torch.nn.functional.pad(torch.arange(25.0).reshape(5, 5), (0, 1, 0, 1))
    for row in (0, 3):
        for column in (0, 3):
            expected = grid[row : row + 3, column : column + 3].mean()
            assert (mixed[row : row + 3, column : column + 3] - expected).abs().max() < 1e-5


def test_window_of_the_whole_grid_is_plain_attention(backbone):
    attention = backbone.dense_model(64, seed=0, drop_path=0.0).blocks[0].attn
    tokens = torch.randn(2, 16 * 16, 24)
    torch.testing.assert_close(WindowAttention(attention, 16, 16)(tokens), attention(tokens))


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, {2, 5, 8, 11}), (24, {5, 11, 17, 23}), (6, {0, 2, 3, 5})]
)
def test_four_blocks_see_the_whole_image(depth, blocks):
    assert global_blocks(depth) == blocks


def test_prepared_vit_has_no_class_token_and_starts_from_the_backbone(backbone, models):
    vit = backbone.dense_model(64, seed=0, drop_path=0.0)
    before = vit.pos_embed.clone()
    prepare_vit(vit, 5)
    assert vit.cls_token is None and torch.equal(vit.pos_embed, before[:, 1:])
    # of a ViT of four blocks all see everything
    assert not any(isinstance(b.attn, WindowAttention) for b in vit.blocks)
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, models["mae"].blocks[1].mlp.fc1.weight)
    (last,) = vit.forward_intermediates(
        torch.randn(1, 3, 64, 64), indices=1, intermediates_only=True
    )
    assert last.shape == (1, 24, 16, 16)


def test_levels_have_their_strides_whatever_image_comes_first(backbone, config):
    model = build(backbone, config).eval()
    maps = model.backbone(torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps.values()] == [16, 8, 4, 2, 1]
    with torch.no_grad():
        model([torch.rand(3, 20, 60)])
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_anchors_grow_with_the_strides(backbone, config):
    model = build(backbone, config, anchor_strides=4)
    sizes = model.rpn.anchor_generator.sizes
    assert sizes == ((16,), (32,), (64,), (128,), (256,))
    assert config.transfer.detection.anchor_strides * 4 == 32


@pytest.mark.parametrize(("patch", "sides"), [(16, [16, 8, 4, 2, 1]), (8, [16, 8, 4, 2, 1])])
def test_pyramid_of_other_patches(patch, sides, config):
    changes = {"data": {"image_size": 32}, "model": {"width": 24, "depth": 5, "patch_size": patch}}
    other = config.model_validate(
        {**config.model_dump(), **{k: {**config.model_dump()[k], **v} for k, v in changes.items()}}
    )
    model = build(run_backbone("random", other, None), config, window=2)
    assert [m.shape[-1] for m in model.backbone(torch.zeros(1, 3, 64, 64)).values()] == sides
    windows = [isinstance(b.attn, WindowAttention) for b in model.backbone.vit.blocks]
    assert windows == [i not in global_blocks(5) for i in range(5)]


def test_patch_that_is_no_power_of_two_is_refused(config):
    other = config.model_validate(
        {
            **config.model_dump(),
            "data": {**config.data.model_dump(), "image_size": 28},
            "model": {**config.model.model_dump(), "patch_size": 14},
        }
    )
    with pytest.raises(ConfigError, match="has patches of 14 pixels"):
        build(run_backbone("random", other, None), config, size=56)


@pytest.mark.parametrize(
    "architecture",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_little_patch16_reg1_gap_256"],
)
def test_plain_vits_of_timm_with_and_without_tokens_beside_the_patches(architecture, config):
    model = build(Backbone("timm:x", architecture, {}, 224), config, window=2)
    assert model.backbone(torch.zeros(1, 3, 64, 64))["2"].shape == (1, 8, 4, 4)


def test_other_models_of_timm_are_refused(config):
    with pytest.raises(ConfigError, match="must be a plain ViT"):
        build(Backbone("timm:x", "eva02_tiny_patch14_224", {}, 224), config, size=56)


def test_image_is_fitted_and_boxes_come_back_in_its_own_pixels(backbone, config):
    model = build(backbone, config).eval()
    images, _ = model.transform([torch.rand(3, 30, 90)])
    assert images.tensors.shape == (1, 3, 64, 64) and images.image_sizes == [(21, 64)]
    assert images.tensors[0, :, 21:].abs().max() == 0
    boxes = torch.tensor([[0.0, 0.0, 64.0, 21.0]])
    (back,) = model.transform.postprocess([{"boxes": boxes}], images.image_sizes, [(30, 90)])
    torch.testing.assert_close(back["boxes"], torch.tensor([[0.0, 0.0, 90.0, 30.0]]))


def test_every_weight_is_optimised_once_and_deeper_blocks_slower(backbone, config):
    model = build(backbone, config)
    optimizer = make_optimizer(model, 0.5)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    blocks = [scale[id(b.mlp.fc1.weight)] for b in model.backbone.vit.blocks]
    assert blocks == pytest.approx([0.5**n for n in (4, 3, 2, 1)])
    assert scale[id(model.rpn.head.cls_logits.weight)] == 1
    assert scale[id(model.backbone.vit.pos_embed)] == pytest.approx(0.5**5)


def test_rate_rises_stays_and_falls_twice():
    rates = [stepped_rate(step, steps=2700, warmup=250, peak=1.0) for step in range(2700)]
    assert rates[:250] == pytest.approx([(i + 1) / 250 for i in range(250)])
    assert set(rates[250:2400]) == {1.0}
    assert rates[2400:2600] == pytest.approx([0.1] * 200)
    assert rates[2600:] == pytest.approx([0.01] * 100)
    assert stepped_rate(0, steps=1, warmup=1, peak=1.0) == 1.0


def metrics_of(run: Run) -> dict[str, Any]:
    return json.loads((run.transfer("coco") / "metrics.json").read_text())


def test_job_compares_backbones_on_masks_and_boxes(run, coco_folder, job, tmp_path, capsys):
    flags = ["--task", "coco", "--run", str(run.root), "--backbone", "moce,mae,random"]
    job.main([*flags, "--data", str(coco_folder)])
    metrics = metrics_of(run)
    assert (metrics["task"], metrics["metric"]) == ("coco", "box AP")
    assert [(r["backbone"], r["protocol"]) for r in metrics["results"]] == [
        (name, "finetune") for name in ("moce", "mae", "random")
    ]
    for row in metrics["results"]:
        assert row["value"] == row["box"]["AP"] and "AP50" in row["mask"]
        assert (row["num_train"], row["num_test"]) == (6, 3)
    written = {p.name for p in (run.transfer("coco") / "predictions" / "moce-0").iterdir()}
    assert written == {"scores.json", *(f"{i:012d}.png" for i in range(3))}
    capsys.readouterr()
    predict([str(run.transfer("coco")), str(coco_folder / "val2017")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.keys() for line in lines] == 3 * [{"image", "objects"}]

    # another budget repeats the fits; without outlines only boxes are compared
    data = Path(shutil.copytree(coco_folder, tmp_path / "boxes"))
    for path in (data / "annotations").iterdir():
        tree = json.loads(path.read_text())
        for annotation in tree["annotations"]:
            del annotation["segmentation"], annotation["area"], annotation["iscrowd"]
        path.write_text(json.dumps(tree))
    job.main([*flags[:-1], "mae", "--data", str(data), "--set", "transfer.detection.steps=2"])
    (row,) = metrics_of(run)["results"]
    assert "mask" not in row and row["box"]["AP"] == row["value"]


def test_the_controls_own_steps_need_no_choice_by_evidence(clustered, coco_folder, job):
    flags = ["--task", "coco", "--run", str(clustered.root), "--data", str(coco_folder)]
    settings = (
        "transfer.select=validate", "transfer.continued.batch_size=8", "logging.tensorboard=false",
        "transfer.detection.steps=2",
    )  # fmt: skip
    more = [word for setting in settings for word in ("--set", setting)]
    job.main([*flags, "--backbone", "control+own", "--continue-images", "16", *more])
    (row,) = metrics_of(clustered)["results"]
    assert row["backbone"] == "control+own" and row["cost"]["images"] == 16
    folder = clustered.transfer("coco")
    assert (folder / "clusters.json").exists() and not [*folder.glob("choice*.json")]


def test_cocos_80_categories_run_through_the_full_size_recipe(run, job, tmp_path, capsys):
    # COCO's ids run to 90 with ten gaps
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    names = {i: f"class {i}" for i in range(1, 91) if i not in gaps}
    data = write_coco(tmp_path / "coco80", categories=names, counts={"train2017": 41, "val2017": 5})
    recipe = ["--config", str(ROOT / "configs" / "transfer" / "coco.yaml"), "--data", str(data)]
    job.main([*recipe, "--dry-run"])
    assert "41 training, 5 test, 80 classes" in capsys.readouterr().out
    small = {"size": 64, "steps": 3, "batch_size": 4, "channels": 8, "rois": 8, "window": 5}
    changes = [f"transfer.detection.{name}={value}" for name, value in small.items()]
    changes += ["parallel.micro_batches=2", "data.loader_processes=0", "transfer.max_train=6"]
    flags = [part for change in changes for part in ("--set", change)]
    job.main([*recipe, *flags, "--run", str(run.root), "--backbone", "mae"])
    (row,) = metrics_of(run)["results"]
    assert row["num_train"] == 6 and 0 <= row["value"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol", "knn"], "must be one of finetune for coco"),
        (
            ["--set", "transfer.detection.size=48"],
            r"transfer.detection.size \(48\) must be a multiple",
        ),
        ([], "--task coco: needs --data; expected DATA/annotations"),
    ],
)
def test_wrong_request_is_refused(flags, message, run, job):
    with pytest.raises(ConfigError, match=message):
        job.main(["--task", "coco", "--run", str(run.root), *flags])


def test_plan_names_images_and_budget(coco_folder, job, capsys):
    job.main(["--task", "coco", "--data", str(coco_folder), "--dry-run"])
    plan = capsys.readouterr().out
    assert "6 training, 3 test, 2 classes" in plan
    assert "184375 steps of 64 squares of 1024 pixels, windows of 14 patches" in plan
