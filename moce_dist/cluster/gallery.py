"""Image sheets that show what a cluster looks like, from its centre to its edge.

    gallery/cluster-00007.jpg     | nearest to the centroid ........ | farthest from it ... |

The images are cropped to their centre and carry no labels; the file name gives the cluster. With
more than 256 clusters, 256 of them, evenly spaced, get a sheet.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from moce_dist.arrays import Float32, Int64
from moce_dist.cluster.assignments import read_rows, rows_by_key
from moce_dist.config import DataConfig
from moce_dist.data.cache import SampleRange
from moce_dist.data.decoders import ImageError
from moce_dist.data.images import open_image
from moce_dist.data.ranges import Content, RangeReader
from moce_dist.data.shards import ShardIndex
from moce_dist.features.extract import feature_names
from moce_dist.run.names import as_text

GALLERY = "gallery"
NUM_NEAREST, NUM_FARTHEST = 10, 4
SIDE = 64
_GAP = 12
_MAX_SHEETS = 256
_WHITE, _MISSING = (255, 255, 255), (208, 213, 221)


def sheet_name(cluster: int) -> str:
    """Return the file name of a cluster's sheet."""
    return f"cluster-{cluster:05d}.jpg"


def write_gallery(index: ShardIndex, clusters: Path, data: DataConfig) -> list[Path]:
    """Write the sheets of a clustering into `clusters/gallery`; return their paths.

    An image that cannot be read is shown as a grey square.
    """
    path = clusters / "assignments.parquet"
    table = pq.read_table(path, columns=["cluster", "distance"])
    labels, distances = (table[name].to_numpy() for name in ("cluster", "distance"))
    shown = shown_clusters(int(labels.max()) + 1)
    members = {c: extremes(np.flatnonzero(labels == c), distances) for c in shown}
    wanted = np.unique(np.concatenate(list(members.values())))
    contents = dict(zip(wanted.tolist(), _read(index, read_rows(path, wanted), data), strict=True))
    (clusters / GALLERY).mkdir(exist_ok=True)
    written = []
    for cluster, rows in members.items():
        path = clusters / GALLERY / sheet_name(cluster)
        sheet([contents[row] for row in rows.tolist()]).save(path, quality=85)
        written.append(path)
    return written


def shown_clusters(num_clusters: int) -> list[int]:
    """List the clusters that get a sheet: all, or some of them evenly spaced."""
    count = min(num_clusters, _MAX_SHEETS)
    return [i * num_clusters // count for i in range(count)]


def extremes(rows: Int64, distances: Float32) -> Int64:
    """Return the rows nearest to the centroid, then the farthest, without repeats, ties by row."""
    ordered = rows[np.argsort(distances[rows], kind="stable")]
    if len(ordered) <= NUM_NEAREST + NUM_FARTHEST:
        return ordered
    return np.concatenate([ordered[:NUM_NEAREST], ordered[-NUM_FARTHEST:]])


def _read(
    index: ShardIndex, samples: list[tuple[str, str]], data: DataConfig
) -> list[Content | None]:
    """Read the images of samples, (name of the shard's features, key); None: not in the index."""
    shards = dict(zip(map(as_text, feature_names(index)), index.shards, strict=True))
    wanted: list[SampleRange | None] = []
    opened, rows = "", dict[str, int]()
    for name, key in samples:
        if name != opened:
            opened, rows = name, rows_by_key(shards[name]) if name in shards else {}
        shard, row = shards.get(name), rows.get(key)
        if shard is None or row is None:
            wanted.append(None)
        else:
            wanted.append(SampleRange(index.url(shard), shard.offsets[row], shard.sizes[row]))
    with closing(RangeReader(data.read_timeout_s, data.read_deadline_s)) as reader:
        contents = reader.read_in_turn([place for place in wanted if place is not None])
        return [None if place is None else next(contents) for place in wanted]


def sheet(contents: Sequence[Content | None]) -> Image.Image:
    """Put images side by side, `SIDE` pixels each, with a gap before the farthest."""
    width = len(contents) * (SIDE + 2) + (_GAP if len(contents) > NUM_NEAREST else 0)
    canvas = Image.new("RGB", (max(1, width), SIDE), _WHITE)
    for number, content in enumerate(contents):
        left = number * (SIDE + 2) + (_GAP if number >= NUM_NEAREST else 0)
        canvas.paste(_square(content), (left, 0))
    return canvas


def _square(content: Content | None) -> Image.Image:
    try:
        if content is None or isinstance(content, OSError):
            raise ImageError("no bytes")
        return ImageOps.fit(open_image(content), (SIDE, SIDE), Image.Resampling.BICUBIC)
    except ImageError:
        return Image.new("RGB", (SIDE, SIDE), _MISSING)
