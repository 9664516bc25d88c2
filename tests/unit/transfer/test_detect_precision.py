"""Average precision: what the evaluator is given, against hand-made cases and the definition."""

import math

import numpy as np
import pytest
from pycocotools import mask as run_lengths

from moce_dist.transfer.detection.coco_json import Annotation, BoxedImage
from moce_dist.transfer.detection.precision import (
    FIGURES,
    Detections,
    average_precision,
    ground_truth,
    pack_mask,
    results_of,
)
from moce_dist.transfer.detection.task import Detection

CATEGORY_IDS = (3, 90)
HEIGHT, WIDTH = 200, 300
IOUS = np.linspace(0.5, 0.95, 10)
RANGES = {
    "AP": (0, 1e10),
    "AP small": (0, 32**2),
    "AP medium": (32**2, 96**2),
    "AP large": (96**2, 1e10),
}


def outline(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def truth(category, box, *, crowd=False):
    return Annotation(category, box, float(box[2] * box[3]), crowd, outline(box))


def task(images):
    made = [
        BoxedImage(f"val/{i}", None, 1000 - i, WIDTH, HEIGHT, objects)
        for i, objects in enumerate(images)
    ]
    return Detection("coco", ("a", "b"), made, made, "box AP", CATEGORY_IDS, has_masks=True)


def found(*rows):
    """Detections from rows (label, score, x, y, w, h), with rectangles as masks."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    corners = np.concatenate([table[:, 2:4], table[:, 2:4] + table[:, 4:6]], axis=1)
    masks = []
    for left, upper, right, lower in corners.round().astype(int):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[upper:lower, left:right] = True
        masks.append(pack_mask(mask))
    return Detections(corners, table[:, 1], table[:, 0].astype(np.int64), masks)


def figures(instances, detections, kind="bbox"):
    results = [
        entry
        for image, each in zip(instances.test, detections, strict=True)
        for entry in results_of(image, each, CATEGORY_IDS, kind)
    ]
    return average_precision(ground_truth(instances.test, instances), results, kind)


def iou(one, other, crowd):
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    union = one[2] * one[3] + (0 if crowd else other[2] * other[3] - shared)
    return shared / union if union else 0.0


def matches(rows, objects, threshold, low, high):
    """One image and class: (score, is right, is ignored) per detection."""
    ignored = [o.is_crowd or not low <= o.area <= high for o in objects]
    taken: set[int] = set()
    out = []
    for score, box in rows:
        best, chosen = threshold, None
        # objects that count go before those that do not
        for g in sorted(range(len(objects)), key=lambda g: ignored[g]):
            if g in taken and not objects[g].is_crowd:
                continue
            if chosen is not None and not ignored[chosen] and ignored[g]:
                break
            overlap = iou(box, objects[g].box, objects[g].is_crowd)
            if overlap >= min(best, 1 - 1e-10):
                best, chosen = overlap, g
        if chosen is None:
            out.append((score, False, not low <= box[2] * box[3] <= high))
        else:
            taken.add(chosen)
            out.append((score, not ignored[chosen], ignored[chosen]))
    return out, sum(not i for i in ignored)


def by_definition(instances, detections, thresholds, low, high):
    """Mean over classes and thresholds of the precision at 101 recalls, written from the paper."""
    values = []
    for label, category in enumerate(CATEGORY_IDS):
        for threshold in thresholds:
            every, positives = [], 0
            for image, each in sorted(
                zip(instances.test, detections, strict=True), key=lambda pair: pair[0].id
            ):
                objects = [a for a in image.annotations if a.category == category]
                corners = np.concatenate(
                    [each.boxes[:, :2], each.boxes[:, 2:] - each.boxes[:, :2]], axis=1
                )
                rows = [
                    (s, b)
                    for s, b, c in zip(each.scores, corners, each.labels, strict=True)
                    if c == label
                ]
                rows = sorted(rows, key=lambda row: -row[0])[:100]
                some, count = matches(rows, objects, threshold, low, high)
                every += some
                positives += count
            if not positives:
                continue
            every.sort(key=lambda row: -row[0])
            right = np.array([r for _, r, i in every if not i], bool)
            hits = right.cumsum()
            recall, precision = hits / positives, hits / np.arange(1, len(right) + 1)
            values += [
                max((p for p, r in zip(precision, recall, strict=True) if r >= level), default=0.0)
                for level in np.linspace(0, 1, 101)
            ]
    return float(np.mean(values)) if values else math.nan


def check(instances, detections, kind="bbox"):
    measured = figures(instances, detections, kind)
    assert tuple(measured) == FIGURES
    for name, (low, high) in RANGES.items():
        expected = by_definition(instances, detections, IOUS, low, high)
        assert measured[name] == pytest.approx(expected, abs=1e-6, nan_ok=True), name
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        expected = by_definition(instances, detections, [threshold], 0, 1e10)
        assert measured[name] == pytest.approx(expected, abs=1e-6, nan_ok=True), name
    return measured


def test_forms_of_a_image_are_spelt_out():
    image = task([[]]).test[0]
    one = found((1, 0.25, 10, 20, 30, 40))
    (box,) = results_of(image, one, CATEGORY_IDS, "bbox")
    assert box == {
        **{"image_id": 1000, "category_id": 90, "score": 0.25},
        **{"bbox": [10.0, 20.0, 30.0, 40.0], "area": 1200.0},
    }
    (mask,) = results_of(image, one, CATEGORY_IDS, "segm")
    assert mask["bbox"] == [10.0, 20.0, 30.0, 40.0] and mask["area"] == 1200.0
    assert run_lengths.decode(mask["segmentation"])[20:60, 10:40].all()
    assert (mask["image_id"], mask["category_id"], mask["score"]) == (1000, 90, 0.25)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_cases_by_hand(kind):
    objects = [truth(3, (10, 10, 40, 40)), truth(3, (100, 100, 40, 40))]
    right = [(0, 0.9, 10, 10, 40, 40), (0, 0.8, 100, 100, 40, 40)]
    wrong = (0, 0.95, 200, 20, 40, 40)

    def ap(*rows):
        return figures(task([objects]), [found(*rows)], kind)["AP"]

    assert ap(*right) == pytest.approx(1)
    assert ap() == 0
    # half of the recall levels (0 to 0.5: 51 of 101) are reached
    assert ap(right[0]) == pytest.approx(51 / 101)
    # a wrong one before both: precision 1/2, then 2/3, of which the best at or beyond a recall
    assert ap(wrong, *right) == pytest.approx(2 / 3)
    # the same behind both costs nothing, a second detection of one object is wrong
    assert ap(*right, (0, 0.1, 200, 20, 40, 40)) == pytest.approx(1)
    assert ap((0, 0.95, 10, 10, 40, 40), *right) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # the other class, and nothing of its own to find, counts in no mean
    assert ap(*right, (1, 0.99, 10, 10, 40, 40)) == pytest.approx(1)
    # shifted by 10 of 40 columns the overlap is 3/5: right at 0.5, 0.55 and 0.6
    assert ap(*((0, s, x + 10, y, w, h) for _, s, x, y, w, h in right)) == pytest.approx(3 / 10)


def test_crowd_neither_helps_nor_harms():
    objects = [truth(3, (10, 10, 40, 40)), truth(3, (100, 50, 150, 150), crowd=True)]
    right = (0, 0.5, 10, 10, 40, 40)
    inside = [(0, 0.9, 110, 60, 30, 30), (0, 0.8, 150, 90, 30, 30)]
    assert check(task([objects]), [found(right, *inside)])["AP"] == pytest.approx(1)
    alone = figures(task([objects[1:]]), [found(*inside)])
    assert all(math.isnan(value) for value in alone.values())


def test_sizes_go_by_the_truths_area_and_by_masks_for_masks():
    # 40 x 40 is medium as a box; its outline covers half, 800 pixels, which is small
    x, y, w, h = box = (10, 10, 40, 40)
    triangle = [[x, y, x + w, y, x, y + h]]
    instances = task([[Annotation(3, box, 800.0, False, triangle)]])
    mask = np.tril(np.ones((40, 40), bool))[::-1]
    full = np.zeros((HEIGHT, WIDTH), bool)
    full[y : y + h, x : x + w] = mask
    one = found((0, 0.9, *box))._replace(masks=[pack_mask(full)])
    measured = figures(instances, [one], "segm")
    assert measured["AP small"] > 0.8 and math.isnan(measured["AP medium"])
    # a wrong detection of the same outline, ranked first, is small as well and costs half
    first = found((0, 0.95, 100, 100, 40, 40), (0, 0.9, *box))
    moved = np.roll(full, (90, 90), axis=(0, 1))
    two = first._replace(masks=[pack_mask(moved), pack_mask(full)])
    halved = figures(instances, [two], "segm")
    assert halved["AP small"] == pytest.approx(measured["AP small"] / 2)


def test_ids_of_images_and_classes_are_not_mixed_up():
    images = [[truth(3, (10, 10, 40, 40))], [truth(90, (100, 100, 40, 40))]]
    right = [found((0, 0.9, 10, 10, 40, 40)), found((1, 0.9, 100, 100, 40, 40))]
    assert figures(task(images), right)["AP"] == pytest.approx(1)
    assert figures(task(images), right[::-1])["AP"] == 0
    swapped = [each._replace(labels=1 - each.labels) for each in right]
    assert figures(task(images), swapped)["AP"] == 0


def random_case(seed, *, kind):
    draws = np.random.default_rng(seed)
    images, detections = [], []
    for _ in range(6):
        objects, rows = [], []
        for _ in range(int(draws.integers(0, 6))):
            side = int(draws.choice([12, 40, 110]))
            box = tuple(
                int(v) for v in (*draws.integers(0, 90, 2), *(side + draws.integers(-3, 4, 2)))
            )
            objects.append(truth(int(draws.choice(CATEGORY_IDS)), box, crowd=draws.random() < 0.15))
            for _ in range(int(draws.integers(0, 4))):
                shift = draws.integers(-6, 7, 4) * (draws.random(4) < 0.5)
                label = (
                    int(draws.random() < 0.5)
                    if draws.random() < 0.2
                    else (CATEGORY_IDS.index(objects[-1].category))
                )
                x, y, w, h = np.maximum(np.array(box) + shift, (0, 0, 1, 1)).tolist()
                # few different scores, so that many are equal
                rows.append((label, float(draws.integers(1, 8)) / 8, x, y, w, h))
        images.append(objects)
        detections.append(found(*rows))
    return task(images), detections


@pytest.mark.parametrize("seed", range(8))
def test_random_predictions_score_as_the_definition_says(seed):
    instances, detections = random_case(seed, kind="bbox")
    check(instances, detections)


@pytest.mark.parametrize("seed", range(3))
def test_rectangular_masks_score_as_their_boxes_do(seed):
    instances, detections = random_case(seed, kind="segm")
    check(instances, detections, "segm")


ADVERSARIAL = {
    "nothing found": [()],
    "more than a hundred": [[(0, 0.9, 250, 10, 5, 5)] * 120 + [(0, 0.1, 10, 10, 40, 40)]],
    "all of one score": [[(0, 0.5, 10, 10, 40, 40), (0, 0.5, 60, 10, 40, 40)]],
    "no area": [[(0, 0.9, 10, 10, 0, 0), (0, 0.8, 10, 10, 40, 40)]],
    "outside of the image": [[(0, 0.9, 280, 180, 100, 100), (0, 0.8, 10, 10, 40, 40)]],
    "everything twice": [[(0, 0.9, 10, 10, 40, 40), (0, 0.9, 10, 10, 40, 40)]],
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_predictions_score_as_the_definition_says(name):
    instances = task([[truth(3, (10, 10, 40, 40)), truth(90, (70, 10, 9, 9))]])
    check(instances, [found(*ADVERSARIAL[name][0])])


def test_best_hundred_of_a_class_and_image_count():
    instances = task([[truth(3, (10, 10, 40, 40))]])
    rows = [(0, 0.5, 200, 100, 20, 20)] * 100
    assert figures(instances, [found(*rows, (0, 0.1, 10, 10, 40, 40))])["AP"] == 0
    assert figures(instances, [found(*rows, (0, 0.9, 10, 10, 40, 40))])["AP"] == pytest.approx(1)
