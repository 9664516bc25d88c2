"""The published classification sets of the paper, in the folder layout of their publishers.

    --task       DATA/                              training        test         metric
    aircraft     fgvc-aircraft-2013b/               trainval        test         mean per class
    caltech101   caltech101/101_ObjectCategories/   30 a class      the others   mean per class
    cars         stanford_cars/                     train           test         accuracy
    cifar10      cifar-10-batches-bin/              5 batches       test_batch   accuracy
    cifar100     cifar-100-binary/                  train           test         accuracy
    dtd          dtd/dtd/                           train1 + val1   test1        accuracy
    flowers102   flowers-102/                       trnid + valid   tstid        mean per class
    food101      food-101/                          train           test         accuracy
    pets         oxford-iiit-pet/                   trainval        test         mean per class
    sun397       SUN397/                            Training_01     Testing_01   accuracy
    voc2007      VOCdevkit/VOC2007/                 trainval        test         mAP

Most lists are read by torchvision's dataset classes, all images by this package. Nothing is
downloaded, and nothing is unpickled: CIFAR is read in its binary version. Caltech-101 has no
official split; 30 images of every class are drawn by their names (half of a class that has no
more than 30).

Source: torchvision.datasets for the layouts; splits and metrics as in Ericsson et al. 2021, arXiv
2011.13377, appendix A, whose suite the MoCE paper uses (they hold out parts of the training sets
for validation; here these parts belong to training).
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from moce_dist.data.listing import list_folders, list_images
from moce_dist.data.packing import share
from moce_dist.run.names import as_text, read_names, typed
from moce_dist.settings import ConfigError
from moce_dist.transfer.tasks import Item, Splits, data_folder

_CALTECH_TRAIN, _CALTECH_BACKGROUND = 30, "BACKGROUND_Google"
_CIFAR_SIDE = 32
_VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)

Labelled = tuple[Path, int | tuple[int, ...]]


class Official(NamedTuple):
    """A published set: its reader, its metric, and what must lie below DATA."""

    read: Callable[[Path], Splits]
    metric: str
    needs: Sequence[str]


OFFICIAL: dict[str, Official] = {}
"""The sets by their names in `--task`."""


def _official(
    name: str, metric: str, folder: str, *needs: str
) -> Callable[[Callable[[Path], Splits]], Callable[[Path], Splits]]:
    """Register a reader in `OFFICIAL`; `needs` are the paths required below DATA/`folder`."""

    def enter(read: Callable[[Path], Splits]) -> Callable[[Path], Splits]:
        OFFICIAL[name] = Official(read, metric, [f"{folder}/{path}" for path in needs])
        return read

    return enter


def _listed(pairs: Iterable[Labelled], data: Path) -> list[Item]:
    """Make items of files and labels; the key of an item is its path relative to DATA.

    Raises:
        ConfigError: naming the first missing file, and how many there are.
    """
    listed = list(pairs)
    if lacking := [path for path, _ in listed if not path.is_file()]:
        raise ConfigError(f"{lacking[0]}: is listed but missing ({len(lacking)} such)")
    return [Item(as_text(path.relative_to(data)), path, label) for path, label in listed]


def _pairs(dataset: Any, files: str = "_image_files") -> list[Labelled]:
    paths = getattr(dataset, files)
    return [(Path(p), int(y)) for p, y in zip(paths, dataset._labels, strict=True)]


@_official(
    *("aircraft", "mean_class_accuracy", "fgvc-aircraft-2013b/data"),
    *("images", "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"),
)
def _aircraft(data: Path) -> Splits:
    from torchvision.datasets import FGVCAircraft

    train, test = (FGVCAircraft(data, split) for split in ("trainval", "test"))
    return Splits(train.classes, *(_listed(_pairs(part), data) for part in (train, test)))


@_official("caltech101", "mean_class_accuracy", "caltech101", "101_ObjectCategories")
def _caltech(data: Path) -> Splits:
    # not read by torchvision, for which any stray file in a folder is an image
    folder = data / "caltech101" / "101_ObjectCategories"
    classes = [name for name in list_folders(folder) if name != _CALTECH_BACKGROUND]
    train: list[Item] = []
    test: list[Item] = []
    for label, name in enumerate(classes):
        items = _listed(((path, label) for path in list_images(folder / name).usable()), data)
        count = _CALTECH_TRAIN if len(items) > _CALTECH_TRAIN else len(items) // 2
        # drawn by name, so that a missing file moves at most one other, of its own class
        # (by another name than validation draws them)
        order = sorted(items, key=lambda item: share(f"train {item.key}"))
        drawn = {item.key for item in order[:count]}
        train += [item for item in items if item.key in drawn]
        test += [item for item in items if item.key not in drawn]
    return Splits(classes, train, test)


@_official(
    *("cars", "accuracy", "stanford_cars", "cars_train", "cars_test"),
    *("devkit/cars_train_annos.mat", "devkit/cars_meta.mat", "cars_test_annos_withlabels.mat"),
)
def _cars(data: Path) -> Splits:
    from torchvision.datasets import StanfordCars

    parts = [StanfordCars(data, split) for split in ("train", "test")]
    pairs = ([(Path(path), int(y)) for path, y in part._samples] for part in parts)
    return Splits(list(parts[0].classes), *(_listed(part, data) for part in pairs))


def _cifar(folder: Path, names: str, train: Sequence[str], test: str) -> Splits:
    """Read records of one label, or of two (the last one counts), and 3 x 32 x 32 pixels."""
    num_labels = 2 if test == "test.bin" else 1
    length, splits = num_labels + 3 * _CIFAR_SIDE**2, []
    for files in (train, [test]):
        items = []
        for path in (folder / file for file in files):
            content = np.fromfile(path, np.uint8)
            if len(content) == 0 or len(content) % length:
                raise ConfigError(
                    f"{path}: has {len(content)} bytes, must be a multiple of {length} (the binary "
                    "version of CIFAR)"
                )
            for i, row in enumerate(content.reshape(-1, length)):
                pixels = row[num_labels:].reshape(3, -1).T.tobytes()
                # a PPM is a header line and raw pixels, so nothing has to be compressed
                ppm = f"P6 {_CIFAR_SIDE} {_CIFAR_SIDE} 255\n".encode() + pixels
                items.append(Item(f"{path.name}/{i}", ppm, int(row[num_labels - 1])))
        splits.append(items)
    return Splits(read_names(folder / names), *splits)


_CIFAR10 = ("cifar-10-batches-bin", "batches.meta.txt")
_CIFAR10_TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]


@_official("cifar10", "accuracy", *_CIFAR10, *_CIFAR10_TRAIN, "test_batch.bin")
def _cifar10(data: Path) -> Splits:
    folder, names = _CIFAR10
    return _cifar(data / folder, names, _CIFAR10_TRAIN, "test_batch.bin")


_CIFAR100 = ("cifar-100-binary", "fine_label_names.txt")


@_official("cifar100", "accuracy", *_CIFAR100, "train.bin", "test.bin")
def _cifar100(data: Path) -> Splits:
    folder, names = _CIFAR100
    return _cifar(data / folder, names, ["train.bin"], "test.bin")


def _joined(dataset: Any, data: Path, train: Sequence[str]) -> list[list[Item]]:
    made = [[_pairs(dataset(data, split)) for split in part] for part in (train, ["test"])]
    return [_listed([pair for pairs in part for pair in pairs], data) for part in made]


@_official(
    *("dtd", "accuracy", "dtd/dtd", "images"),
    *("labels/train1.txt", "labels/val1.txt", "labels/test1.txt"),
)
def _dtd(data: Path) -> Splits:
    from torchvision.datasets import DTD

    return Splits(DTD(data, "train").classes, *_joined(DTD, data, ["train", "val"]))


@_official(
    *("flowers102", "mean_class_accuracy", "flowers-102"), *("jpg", "imagelabels.mat", "setid.mat")
)
def _flowers(data: Path) -> Splits:
    from torchvision.datasets import Flowers102

    class Flowers(Flowers102):  # type: ignore[misc]
        """Flowers102 without its test of checksums, so that a part of the set can be read."""

        def _check_integrity(self) -> bool:
            return True

    return Splits(Flowers102.classes, *_joined(Flowers, data, ["train", "val"]))


@_official("food101", "accuracy", "food-101", "images", "meta/train.json", "meta/test.json")
def _food(data: Path) -> Splits:
    from torchvision.datasets import Food101

    return Splits(Food101(data, "train").classes, *_joined(Food101, data, ["train"]))


@_official(
    *("pets", "mean_class_accuracy", "oxford-iiit-pet"),
    *("images", "annotations/trainval.txt", "annotations/test.txt"),
)
def _pets(data: Path) -> Splits:
    from torchvision.datasets import OxfordIIITPet

    train, test = (OxfordIIITPet(data, split) for split in ("trainval", "test"))
    parts = (_listed(_pairs(part, "_images"), data) for part in (train, test))
    return Splits(train.classes, *parts)


@_official("sun397", "accuracy", "SUN397", "ClassName.txt", "Training_01.txt", "Testing_01.txt")
def _sun(data: Path) -> Splits:
    # not read by torchvision, which searches all folders and fails at a stray image
    folder = data / "SUN397"
    # /a/abbey is the class abbey
    classes = [line.lstrip("/").partition("/")[2] for line in read_names(folder / "ClassName.txt")]
    label_of = {name: label for label, name in enumerate(classes)}
    parts = []
    for name in ("Training_01.txt", "Testing_01.txt"):
        files = [line.lstrip("/") for line in read_names(folder / name)]
        labels = [label_of.get("/".join(file.split("/")[1:-1])) for file in files]
        pairs = [(folder / f, y) for f, y in zip(files, labels, strict=True) if y is not None]
        if len(pairs) < len(files):
            odd = folder / files[labels.index(None)]
            raise ConfigError(f"{odd}: is of no class of ClassName.txt")
        parts.append(_listed(pairs, data))
    return Splits(classes, *parts)


def _voc_label(annotation: Path) -> tuple[int, ...]:
    """Read the classes of an image: 1 present, 0 absent, -1 if all objects are difficult.

    Source: the devkit's ImageSets/Main/CLASS_SPLIT.txt, which say the same.
    """
    labels = dict.fromkeys(_VOC_CLASSES, 0)
    # expat bounds what entities may grow to
    for found in ElementTree.parse(annotation).getroot().iter("object"):  # noqa: S314
        name, difficult = found.findtext("name", "").strip(), found.findtext("difficult", "0")
        if name not in labels:
            raise ConfigError(f"{annotation}: object {name!r} is no class of VOC2007")
        if difficult.strip() != "1":
            labels[name] = 1
        elif labels[name] == 0:
            labels[name] = -1
    return tuple(labels.values())


@_official(
    *("voc2007", "mAP", "VOCdevkit/VOC2007"),
    *("JPEGImages", "Annotations", "ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt"),
)
def _voc(data: Path) -> Splits:
    from torchvision.datasets import VOCDetection

    parts = []
    for split in ("trainval", "test"):
        found = VOCDetection(data, "2007", split)
        labels = [_voc_label(Path(path)) for path in found.annotations]
        parts.append(_listed(zip(map(Path, found.images), labels, strict=True), data))
    return Splits(_VOC_CLASSES, *parts)


def official_task(name: str, data: Path | None) -> Splits:
    """Read a published set: class names and the official splits.

    Raises:
        ConfigError: a file or folder of the layout is missing, a list names a missing file, or a
            list cannot be read.
    """
    official = OFFICIAL[name]
    data = data_folder(name, data, f"expected DATA/{official.needs[0]}")
    if lacking := [path for path in official.needs if not (data / path).exists()]:
        pickled = "; the pickled version is not read" if name.startswith("cifar") else ""
        raise ConfigError(
            f"--data {data}: --task {name} expects {', '.join(lacking)} there{pickled}"
        )
    try:
        found = official.read(data)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the readers of lists and .mat files meet
        said = f"--data {data}: --task {name} cannot be read: {typed(error)}"
        raise ConfigError(said) from None
    for split, items in (("training", found.train), ("test", found.test)):
        if not items:
            raise ConfigError(f"--data {data}: --task {name} lists no {split} images")
        for item in items:
            if isinstance(item.label, int) and not 0 <= item.label < len(found.classes):
                raise ConfigError(
                    f"{item.key}: label {item.label}, must be below {len(found.classes)} (classes)"
                )
    return found._replace(classes=list(found.classes))
