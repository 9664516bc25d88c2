"""Sheets of images per cluster: nearest first, farthest last, and no image stops them."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moce_dist.cluster.gallery import (
    GALLERY,
    NUM_FARTHEST,
    NUM_NEAREST,
    SIDE,
    extremes,
    shown_clusters,
    write_gallery,
)
from moce_dist.config import DataConfig
from moce_dist.data.shards import write_index
from moce_dist.data.writer import ShardWriter


def plain(grey):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def clustered(tmp_path):
    """40 images, grey level 5 i, in 2 clusters; the distance of an image is its grey level."""
    writer = ShardWriter(tmp_path, "train-000000.tar")
    for number in range(40):
        content = b"no image" if number == 2 else plain(5 * number)
        writer.add(f"a/{number:02d}", {"png": content})
    index = write_index(tmp_path, [writer.close()])
    table = {
        "key": pa.array([f"a/{n:02d}" for n in range(40)]),
        "shard": pa.array(["train-000000"] * 40).dictionary_encode(),
        "cluster": pa.array([n % 2 for n in range(40)], pa.int32()),
        "distance": pa.array([5.0 * n for n in range(40)], pa.float32()),
    }
    pq.write_table(pa.table(table), tmp_path / "assignments.parquet")
    return index, tmp_path


def greys(path):
    pixels = np.asarray(Image.open(path).convert("L"))
    count = NUM_NEAREST + NUM_FARTHEST
    gap = pixels.shape[1] - count * (SIDE + 2)
    lefts = [i * (SIDE + 2) + (gap if i >= NUM_NEAREST else 0) for i in range(count)]
    return [int(pixels[SIDE // 2, left + SIDE // 2]) for left in lefts]


def test_sheets_show_nearest_and_farthest_of_each_cluster(clustered):
    index, folder = clustered
    files = write_gallery(index, folder, DataConfig())
    assert [path.name for path in files] == ["cluster-00000.jpg", "cluster-00001.jpg"]
    assert all(path.parent == folder / GALLERY for path in files)
    wanted = [*range(NUM_NEAREST), *range(20 - NUM_FARTHEST, 20)]
    np.testing.assert_allclose(greys(files[1]), [5 * (2 * i + 1) for i in wanted], atol=2)
    even = greys(files[0])
    # an image that cannot be read is a grey square, the others keep their places
    assert 200 < even.pop(1) < 225
    np.testing.assert_allclose(even, [5 * 2 * i for i in wanted if i != 1], atol=2)


def test_few_images_stand_once_in_order():
    distances = np.array([3, 1, 2, 1], np.float32)
    assert extremes(np.array([0, 1, 2, 3]), distances).tolist() == [1, 3, 2, 0]


def test_of_very_many_clusters_some_are_shown():
    assert shown_clusters(5) == [0, 1, 2, 3, 4]
    some = shown_clusters(65536)
    assert len(some) == len(set(some)) == 256 and some[0] == 0 and some[-1] == 65280
