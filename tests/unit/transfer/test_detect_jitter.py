"""Training squares: objects stay where their pixels are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moce_dist.data.decoders import ImageError
from moce_dist.data.images import sample_generator
from moce_dist.transfer.detection.coco_json import Annotation, BoxedImage
from moce_dist.transfer.detection.jitter import (
    Placing,
    decode_mask,
    place_mask,
    to_runs,
    training_square,
)
from moce_dist.transfer.detection.task import Detection

SIZE = 64


@pytest.fixture(scope="module")
def some_image(coco_folder: Path) -> BoxedImage:
    return Detection.read("coco", coco_folder).train[0]


def squares(some_image, **options):
    for epoch in range(80):
        draws = sample_generator(0, epoch, some_image.key)
        yield training_square(some_image, SIZE, (0.4, 2.0), draws=draws, **options)


def bright(pixels):
    return pixels[0] > 150


@pytest.mark.parametrize("has_masks", [True, False])
def test_bright_objects_fill_their_boxes_and_nothing_else_is_bright(some_image, has_masks):
    # the outlines of even categories are triangles, so only rectangles are compared
    rectangles = [a._replace(segmentation=rectangle(a)) for a in some_image.annotations]
    counts = []
    for sample in squares(some_image._replace(annotations=rectangles), has_masks=has_masks):
        assert sample.pixels.shape == (3, SIZE, SIZE) and sample.pixels.dtype == np.uint8
        covered = np.zeros((SIZE, SIZE), bool)
        for left, upper, right, lower in sample.boxes.round().astype(int):
            covered[upper:lower, left:right] = True
        # resizing blurs an edge by a pixel or so on each side
        disagreeing = (covered != bright(sample.pixels)).mean()
        assert disagreeing < 0.08, sample.boxes
        assert (sample.boxes >= 0).all() and (sample.boxes <= SIZE).all()
        assert set(sample.categories.tolist()) <= {3, 8}
        counts.append(len(sample.boxes))
    assert set(counts) >= {1, 2}


def rectangle(annotation):
    x, y, width, height = annotation.box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def test_masks_lie_on_bright_pixels_and_fill_their_boxes(some_image):
    for sample in squares(some_image, has_masks=True):
        assert sample.masks is not None and sample.masks.shape[1:] == (SIZE, SIZE)
        for mask, box in zip(sample.masks, sample.boxes.astype(int), strict=True):
            rows, columns = np.nonzero(mask)
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert around == box.tolist()
            # of a sliver at the border the blurred edge is a large part
            assert mask.sum() < 100 or bright(sample.pixels)[mask == 1].mean() > 0.85


def test_same_draw_gives_the_same_square(some_image):
    first, second = (next(squares(some_image, has_masks=True)) for _ in range(2))
    assert (first.pixels == second.pixels).all() and (first.boxes == second.boxes).all()


def test_objects_outside_of_the_window_are_left_out(some_image):
    far = Annotation(3, (0.0, 0.0, 3.0, 3.0), 9.0, False, None)
    for epoch in range(200):
        sample = training_square(
            some_image._replace(annotations=[far]),
            SIZE,
            (1.0, 2.0),
            has_masks=False,
            draws=sample_generator(1, epoch, "x"),
        )
        if not len(sample.boxes):
            assert sample.boxes.shape == (0, 4) and sample.categories.shape == (0,)
            return
    raise AssertionError("no window without the object")


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_polygons_and_run_lengths_come_to_lie_alike(some_image, is_mirrored):
    polygon = [[10.0, 5.0, 40.0, 9.0, 30.0, 33.0]]
    packed = to_runs(polygon, some_image.height, some_image.width)
    mask = decode_mask(polygon, some_image.height, some_image.width)
    # counted down the columns, as COCO writes crowds
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    edges = np.flatnonzero(np.diff(flat)).tolist()
    unpacked = {
        "size": [some_image.height, some_image.width],
        "counts": np.diff([0, *edges, mask.size]).tolist(),
    }
    packed = {**packed, "counts": packed["counts"].decode()}
    width, height = 2 * some_image.width, 2 * some_image.height
    placing = Placing((width, height), 15, 7, is_mirrored, SIZE)
    placed = [place_mask(outline, placing, some_image) for outline in (polygon, packed, unpacked)]
    assert (placed[1] == placed[2]).all() and placed[0].any()
    assert (placed[0] != placed[1]).sum() < 0.06 * placed[0].sum()


def test_padding_has_no_mask_and_the_colour_that_normalises_to_zero(some_image):
    placing = Placing((28, 20), 0, 0, False, SIZE)
    whole = place_mask([[0, 0, 999, 0, 999, 999, 0, 999]], placing, some_image)
    assert whole[:20, :28].all() and whole.sum() == 20 * 28
    small = training_square(
        some_image, 4 * SIZE, (0.1, 1.0), has_masks=False, draws=np.random.default_rng(0)
    )
    assert small.pixels[:, -1, -1].tolist() == [124, 116, 104]


def test_image_of_another_size_than_annotated_is_no_sample(some_image, tmp_path):
    path = tmp_path / "other.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    with pytest.raises(ImageError, match="it has 9 x 9 pixels, its annotations are for 56 x"):
        next(squares(some_image._replace(image=path), has_masks=True))
