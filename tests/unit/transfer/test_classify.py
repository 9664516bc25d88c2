"""Frozen protocols and fine-tuning against independent computations."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from timm.layers import BatchNormAct2d

from moce_dist.config import FinetuneConfig, make_config
from moce_dist.data.images import normalise
from moce_dist.data.kept import KeptImages
from moce_dist.model.customize import customize
from moce_dist.settings import ConfigError
from moce_dist.train.optim import set_learning_rate
from moce_dist.transfer.backbone import Backbone, run_backbone
from moce_dist.transfer.classification import frozen as classify
from moce_dist.transfer.classification.frozen import (
    Features,
    extract,
    fit_linear,
    knn_scores,
    logistic,
)
from moce_dist.transfer.classification.measure import accuracy
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.fit import Kept, Trial, layered_adamw, learning_rate
from moce_dist.transfer.loading import (
    TaskImages,
    TrainingOrder,
    Unread,
    eval_batches,
    machine_of,
)
from moce_dist.transfer.predict import load_model
from moce_dist.transfer.ranks import share_batch_norm
from moce_dist.transfer.tasks import Item

from .conftest import finetune

CPU = torch.device("cpu")


def linear_predict(features: Features, **budget: object) -> torch.Tensor:
    head = fit_linear(features, **budget)
    return head.scores(features.test).argmax(dim=1)


@pytest.fixture(scope="module")
def features() -> Features:
    draws = np.random.default_rng(0)
    centres = draws.normal(0, 1.2, (4, 10))

    def part(n: int) -> tuple[torch.Tensor, torch.Tensor, list[Unread]]:
        labels = draws.integers(0, 4, n)
        rows = centres[labels] + draws.normal(0, 1.5, (n, 10)) + 7
        return torch.from_numpy(rows).float(), torch.from_numpy(labels), []

    return Features(*part(300), *part(200))


def test_accuracy_is_the_share_of_right_predictions():
    predicted, labels = torch.randint(5, (333,)), torch.randint(5, (333,))
    direct = sum(p == q for p, q in zip(predicted.tolist(), labels.tolist(), strict=True)) / 333
    assert accuracy(predicted, labels) == pytest.approx(direct, abs=1e-6)


def test_knn_equals_scikit_learn_with_the_same_weights(features):
    mean = features.train.mean(dim=0)
    train, test = ((f - mean).numpy() for f in (features.train, features.test))

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    reference = KNeighborsClassifier(7, metric="cosine", weights=weights)
    reference.fit(train, features.train_labels.numpy())
    found = knn_scores(features, k=7, num_classes=4, device=CPU).argmax(dim=1).numpy()
    assert (found == reference.predict(test)).mean() > 0.99


def test_knn_in_small_parts_is_the_same(features, monkeypatch):
    whole = knn_scores(features, k=9, num_classes=4, device=CPU)
    monkeypatch.setattr(classify, "_MOST_PAIRS", 7 * 300)
    assert torch.allclose(knn_scores(features, k=9, num_classes=4, device=CPU), whole, atol=1e-6)
    several = torch.nn.functional.one_hot(features.train_labels, 4)
    as_several = features._replace(train_labels=several)
    assert torch.allclose(knn_scores(as_several, k=9, num_classes=4, device=CPU), whole, atol=1e-6)


def test_more_neighbours_than_images_are_all_of_them(features):
    few = features._replace(train=features.train[:3], train_labels=features.train_labels[:3])
    shares = knn_scores(few, k=10, num_classes=4, device=CPU)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(200))


def test_linear_equals_scikit_learns_logistic_regression(features):
    scaler = StandardScaler().fit(features.train)
    reference = LogisticRegression(C=1.0, max_iter=1000)
    reference.fit(scaler.transform(features.train), features.train_labels)
    expected = reference.predict(scaler.transform(features.test))
    found = linear_predict(features, passes=90, num_classes=4, device=CPU)
    assert (found.numpy() == expected).mean() > 0.98


@pytest.fixture
def four(features) -> Classification:
    items = [Item(str(i), b"", int(label)) for i, label in enumerate(features.train_labels)]
    return Classification("four", list("abcd"), items, [])


def test_logistic_equals_the_best_penalty_of_scikit_learn(features, four):
    scaler = StandardScaler().fit(features.train)
    train, test = scaler.transform(features.train), scaler.transform(features.test)
    scores = [
        LogisticRegression(C=10.0**c, max_iter=1000)
        .fit(train, features.train_labels)
        .score(test, features.test_labels)
        for c in range(-4, 3)
    ]
    found = logistic(features, four, None, seed=0)["accuracy"]
    # what the images of validation chose may be next to the best on the test
    assert max(scores) - 0.02 <= found <= max(scores)
    assert found > min(scores) + 0.02


def test_few_labels_of_noise_call_for_a_strong_penalty(four):
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 4
    rows = torch.randn(1200, 100, generator=draws)
    rows += 0.3 * torch.randn(4, 100, generator=draws)[labels]
    few = Features(rows[:200], labels[:200], [], rows[200:], labels[200:], [])
    scaler = StandardScaler().fit(few.train)
    weak = LogisticRegression(C=100, max_iter=1000)
    weak.fit(scaler.transform(few.train), few.train_labels)
    found = logistic(few, four, None, seed=0)["accuracy"]
    assert found > weak.score(scaler.transform(few.test), few.test_labels) + 0.03


def test_logistic_takes_so_many_labels_of_each_class(features, four, monkeypatch):
    seen = []
    fit = classify.fit_logistic

    def watched(rows, labels):
        seen.append((np.bincount(labels).tolist(), rows[:, 0].tolist()))
        return fit(rows, labels)

    monkeypatch.setattr(classify, "fit_logistic", watched)
    first, again = (logistic(features, four, 10, seed=0) for _ in range(2))
    other = logistic(features, four, 10, seed=1)
    assert {tuple(counts) for counts, _ in seen} == {(10, 10, 10, 10)}
    assert first == again and seen[:5] == seen[5:10]
    assert len({tuple(rows) for _, rows in seen}) == 10, "every draw is another one"
    assert first != other
    assert first["accuracy"] < logistic(features, four, None, seed=0)["accuracy"]


def test_a_class_of_two_images_still_fits(features):
    rare = torch.cat([torch.zeros(150), torch.ones(148), torch.full((2,), 2.0)]).long()
    task = Classification("rare", list("abc"), [Item("0", b"", 0)], [])
    of_three = features._replace(train_labels=rare, test_labels=features.test_labels % 3)
    found = logistic(of_three, task, None, seed=0)
    assert 0 <= found["accuracy"] <= 1


def test_one_row_of_a_rare_class_does_not_end_the_choice_of_the_penalty(monkeypatch):
    draws = torch.Generator().manual_seed(0)
    labels = (torch.arange(200) % 4).numpy()
    rows = torch.randn(200, 100, generator=draws).numpy() + 0.3 * labels[:, None]
    penalty = classify.fit_logistic(rows, labels).C
    assert penalty != 1.0
    more = np.concatenate([rows, rows[:1]]), np.append(labels, 4)
    fitted = classify.fit_logistic(*more)
    assert penalty == fitted.C and fitted.classes_.tolist() == [0, 1, 2, 3, 4]


def test_a_single_label_of_a_class_still_fits(features, four):
    assert 0.2 < logistic(features, four, 1, seed=0)["accuracy"] < 1


@pytest.mark.parametrize("count", [1, 3])
def test_images_of_one_class_are_refused_in_words(count, features, four):
    alone = features._replace(
        train=features.train[:count], train_labels=torch.zeros(count, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match=f"{four.name}: logistic regression needs .* two classes"):
        logistic(alone, four, None, seed=0)


def test_shuffled_labels_are_not_learnt(features):
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = features._replace(train_labels=features.train_labels[order])
    found = linear_predict(shuffled, passes=90, num_classes=4, device=CPU)
    assert accuracy(found, features.test_labels) < 0.45
    honest = linear_predict(features, passes=90, num_classes=4, device=CPU)
    assert accuracy(honest, features.test_labels) > 0.6


def test_features_come_in_the_order_of_the_items(config, models, image_folder):
    task = Classification.open("imagefolder", image_folder)
    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    found, labels, faults = extract(backbone, list(task.train), machine_of(config))
    assert not faults
    assert labels.tolist() == [item.label for item in task.train]
    pixels = TaskImages(task.train, backbone, KeptImages(0))[(0, 17)].pixels
    with torch.no_grad():
        expected = models["mae"].features(normalise(torch.from_numpy(pixels)[None]))
    torch.testing.assert_close(found[17:18], expected, rtol=1e-4, atol=1e-5)


def test_every_epoch_uses_every_item_once_in_another_order():
    order = list(TrainingOrder(12, 4, 3, seed=1))
    assert len(order) == len(TrainingOrder(12, 4, 3, seed=1)) == 9
    epochs = [[i for batch in order[e * 3 : e * 3 + 3] for _, i in batch] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [e for batch in order for e, _ in batch] == [0] * 12 + [1] * 12 + [2] * 12
    assert order != list(TrainingOrder(12, 4, 3, seed=2))


def test_augmentation_is_drawn_by_seed_and_epoch(config, models, image_folder):
    task = Classification.open("imagefolder", image_folder)
    backbone = run_backbone("mae", config, None)
    recipe = config.transfer.finetune

    def look(seed: int, epoch: int) -> np.ndarray:
        images = TaskImages(task.train, backbone, KeptImages(0), augment=recipe, seed=seed)
        return images[(epoch, 3)][0]

    assert np.array_equal(look(0, 0), look(0, 0))
    assert not np.array_equal(look(0, 0), look(0, 1))
    assert not np.array_equal(look(0, 0), look(1, 0))


def test_images_are_bytes_between_processes_with_and_without_augmentation(
    config, models, image_folder
):
    task = Classification.open("imagefolder", image_folder)
    backbone, recipe = run_backbone("mae", config, None), config.transfer.finetune
    machine = replace(machine_of(config), loader_processes=1)
    for pixels, *_ in eval_batches(list(task.test), backbone, machine):
        assert pixels.dtype == torch.uint8
    cropped = TaskImages(task.train, backbone, KeptImages(0), augment=recipe)
    for look in machine.load(cropped, batch_sampler=[[(0, 0), (0, 1)]]):
        assert look.pixels.dtype == torch.uint8


def test_kept_images_give_the_same_looks_and_are_read_once(config, tmp_path, image_folder):
    task = Classification.open(
        "imagefolder", Path(shutil.copytree(image_folder, tmp_path / "data"))
    )
    backbone, recipe = run_backbone("random", config, None), config.transfer.finetune
    num_bytes = {"all": 2**20, "some": 3 * 3 * 32 * 32, "none": 0}
    some_images = {name: KeptImages(size) for name, size in num_bytes.items()}

    def looks(name: str) -> list[tuple[np.ndarray, str]]:
        plain = TaskImages(task.train, backbone, some_images[name])
        cropped = TaskImages(task.train, backbone, some_images[name], augment=recipe)
        draws = [(epoch, index) for epoch in range(2) for index in range(len(plain))]
        return [(look.pixels, look.reason) for d in draws for look in (plain[d], cropped[d])]

    read = looks("none")
    for name in some_images:
        for (pixels, reason), (expected, _) in zip(looks(name), read, strict=True):
            assert not reason and np.array_equal(pixels, expected)
    shutil.rmtree(tmp_path / "data")
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(looks("all"), read, strict=True))
    assert 0 < len(some_images["some"]._images) < len(task.train)
    assert TaskImages(task.train, backbone, some_images["none"])[(0, 0)].reason


def test_learning_rate_warms_up_and_falls_to_its_least():
    rates = [learning_rate(s, steps=100, warmup=10, peak=1.0) for s in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3]) and rates[9] == 1.0
    assert rates[55] == pytest.approx(0.5, abs=1e-5)
    assert rates[99] < 0.001 and rates[9:] == sorted(rates[9:], reverse=True)


def test_layers_below_learn_more_slowly(config):
    model = run_backbone("random", config, None).classifier(2, seed=0, drop_path=0.0)
    optimizer = layered_adamw(model, weight_decay=0.05, layer_decay=0.5)
    set_learning_rate(optimizer, 8.0)
    rates = {
        name: group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name, p in model.named_parameters()
        if p is parameter
    }
    assert rates["head.weight"] == 8.0
    assert rates["blocks.3.mlp.fc1.weight"] / rates["blocks.2.mlp.fc1.weight"] == 2
    assert rates["blocks.0.attn.qkv.weight"] > rates["patch_embed.proj.weight"]
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert decay[id(named["head.bias"])] == decay[id(named["cls_token"])] == 0
    assert decay[id(named["blocks.0.mlp.fc1.weight"])] == 0.05


@pytest.mark.parametrize(
    "pooling",
    [
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "fc_norm": True},
        {"global_pool": "token"},
        {"global_pool": "map"},
        {"global_pool": "map", "fc_norm": True},
    ],
    ids=lambda pooling: "-".join(map(str, pooling.values())),
)
def test_layers_below_new_parameters_learn_more_slowly_whatever_a_vit_has_at_its_end(pooling):
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, **size, **pooling)
    new = list(torch.nn.Linear(24, 3).parameters())
    optimizer = layered_adamw(vit, new, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert len(scale) == len([*vit.parameters(), *new])

    def of(beginning: str) -> set[float]:
        named = vit.named_parameters()
        return {scale[id(p)] for name, p in named if name.startswith(beginning)}

    assert [of(f"blocks.{i}.") for i in (3, 2, 1, 0)] == [{0.5}, {0.5**2}, {0.5**3}, {0.5**4}]
    assert of("patch_embed.") == of("pos_embed") == of("cls_token") == {0.5**5}
    assert {scale[id(p)] for p in new} == {1.0}
    # what comes after the blocks learns at the rate of the last one, or of what is new
    assert of("norm.") <= {0.5} and of("fc_norm.") | of("attn_pool.") <= {1.0}


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.0, "cutmix": 0.0}])
def test_finetuning_repeats_itself_for_a_seed(mixing, config, models, image_folder):
    task = Classification.open("imagefolder", image_folder)
    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    recipe = FinetuneConfig(epochs=1, batch_size=16, warmup_epochs=0, **mixing)
    machine = machine_of(config)
    values = [finetune(backbone, task, recipe, machine, seed=3) for _ in range(2)]
    assert values[0] == values[1]


def test_ranks_share_a_batch_and_keep_the_partners_of_mixup_together(config):
    machine = machine_of(config)
    assert machine.rows(6, mirrored=True) == list(range(6))
    ranks = [replace(machine, rank=rank, num_ranks=3) for rank in range(3)]
    assert [rank.rows(10, mirrored=True) for rank in ranks] == [[0, 3, 6, 9], [1, 4, 5, 8], [2, 7]]
    assert [rank.rows(4) for rank in ranks] == [[0, 3], [1], [2]]


def test_micro_batches_of_all_workers_are_shared_out_among_fewer_ranks():
    config = make_config({"parallel": {"num_workers": 4, "micro_batches": 2}})
    assert [machine_of(config, num_ranks=ranks).micro_batches for ranks in (4, 3, 1)] == [2, 3, 8]
    assert machine_of(config, num_ranks=4).parallel.micro_batches_on(4, 8) == 2


def test_a_linear_head_of_a_convolutional_network_is_saved(config, image_folder, tmp_path):
    task = Classification.open("imagefolder", image_folder)
    backbone = Backbone("timm:resnet10t", "resnet10t", {}, 32)
    kept = Kept(tmp_path, "of", 10, None)
    trial = Trial(backbone, config.transfer, machine_of(config), "linear", 0, tmp_path, kept)
    found = classify.fit(task, trial).measures
    model, _ = load_model(tmp_path / "last")
    batches = eval_batches(list(task.test), backbone, machine_of(config))
    with torch.no_grad():
        right = [(model(normalise(x)).argmax(1) == y).float() for x, y, _ in batches]
    assert torch.cat(right).mean().item() == pytest.approx(found["accuracy"])


def test_activations_of_timms_batch_norm_stay(config):
    images = torch.randn(3, 4, 5, 5)
    norm = BatchNormAct2d(4)
    norm.running_mean += 0.5
    expected = norm.eval()(images)
    share_batch_norm(norm)
    assert torch.equal(norm(images), expected) and (expected >= 0).all()
    plain = torch.nn.BatchNorm2d(4).eval()
    expected = plain(images)
    share_batch_norm(plain)
    assert torch.equal(plain(images), expected) and (expected < 0).any()


def test_one_image_cannot_be_finetuned_on(config, models, image_folder):
    task = Classification.open("imagefolder", image_folder).subset(1, 0)
    with pytest.raises(ConfigError, match="fine-tuning needs 2 training images, has 1"):
        backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
        finetune(backbone, task, FinetuneConfig(), machine_of(config), seed=0)


def test_finetuning_learns(config, models, image_folder):
    task = Classification.open("imagefolder", image_folder)
    backbone = run_backbone("mae", config, customize(models["mae"].state_dict(), ()))
    recipe = FinetuneConfig(
        **{"epochs": 12, "batch_size": 16, "warmup_epochs": 2, "mixup": 0.0, "cutmix": 0.0},
        **{"base_lr": 0.03, "crop_scale_min": 0.5, "drop_path": 0.0, "layer_decay": 0.9},
    )
    found = finetune(backbone, task, recipe, machine_of(config), seed=0)
    assert found.measures["accuracy"] > 0.8
