"""Images of predictions: what was found on the left, what is there on the right."""

import numpy as np
import pytest
from PIL import Image

from moce_dist.transfer.detection.finding import draw_preview
from moce_dist.transfer.detection.precision import Detections, pack_mask
from moce_dist.transfer.detection.task import Detection


@pytest.mark.parametrize("has_masks", [True, False])
def test_sure_detections_and_true_objects_are_drawn(coco_folder, tmp_path, has_masks):
    instances = Detection.read("coco", coco_folder)
    some_image = instances.test[0]
    image = some_image.load().image
    mask = np.zeros((some_image.height, some_image.width), bool)
    mask[24:34, 4:20] = True
    found = Detections(
        np.array([[4.0, 24.0, 20.0, 34.0], [40.0, 2.0, 50.0, 12.0]]),
        np.array([0.9, 0.1]),
        np.array([1, 0]),
        [pack_mask(mask), pack_mask(~mask)] if has_masks else None,
    )
    path = tmp_path / "new" / "preview.png"
    if not has_masks:
        instances = type(instances)(**{**vars(instances), "has_masks": False})
    draw_preview(path, image, some_image, found, instances)
    drawn = np.asarray(Image.open(path), int)
    factor = 8
    # images of 56 columns are enlarged eightfold, two of them side by side
    assert drawn.shape == (some_image.height * factor, 2 * 56 * factor, 3)
    plain = np.asarray(image.resize((56 * factor, some_image.height * factor)), int)
    left, right = (drawn[:, : 56 * factor], drawn[:, 56 * factor :])
    changed = np.abs(left - plain).sum(axis=2) > 20
    edge = changed[24 * factor : 34 * factor, 4 * factor]
    assert edge.mean() > 0.9
    # an unsure detection is not drawn
    assert not changed[: 12 * factor, 40 * factor :].any()
    inside = np.abs(left - plain)[28 * factor : 32 * factor, 8 * factor : 16 * factor].mean()
    assert (inside > 5) == has_masks
    x, y, _, height = (int(v) for v in some_image.annotations[0].box)
    truth = np.abs(right - plain).sum(axis=2) > 20
    assert truth[y * factor : (y + height) * factor, x * factor].mean() > 0.8
