"""Labelled images in tars of one's own, as WebDataset writes them.

    DATA/train-*.tar    DATA/test-*.tar (or DATA/val-*.tar)    KEY.jpg + KEY.cls, a class number
    DATA/classes.txt    optional: one name a line; else the classes are called by their numbers

Images stay in their tars and are read by their byte ranges.

Source: WebDataset's naming rule and its `cls` member, see `moce_dist.data.tarscan`.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from moce_dist.data.shards import read_range
from moce_dist.data.tarscan import TarSample, scan_tar
from moce_dist.run.names import as_text, read_names
from moce_dist.settings import ConfigError
from moce_dist.transfer.tasks import FilePart, Item, Splits

# more classes than that are a mistake, whose list would not fit in memory
_LABEL_DIGITS = 7
_LAYOUT = "expected DATA/train-*.tar and DATA/test-*.tar (or DATA/val-*.tar)"


def tar_task(name: str, data: Path | None) -> Splits:
    """Read the labels of all samples and where their images lie.

    Raises:
        ConfigError: tars are missing or damaged, or a sample has no image or no proper label.
    """
    if data is None:
        raise ConfigError(f"--task {name}: needs --data; {_LAYOUT}")
    if not data.is_dir():
        raise ConfigError(f"--data {data}: is not a folder; {_LAYOUT}")
    tars = {split: sorted(data.glob(f"{split}-*.tar")) for split in ("train", "test", "val")}
    tested = tars["test"] or tars["val"]
    for split, found in (("train", tars["train"]), ("test or val", tested)):
        if not found:
            raise ConfigError(f"--data {data}: has no tars of {split}; {_LAYOUT}")
    train, test = ([i for tar in part for i in _items(tar)] for part in (tars["train"], tested))
    return Splits(_classes(data, [*train, *test]), train, test)


def _items(tar: Path) -> Iterator[Item]:
    try:
        with tar.open("rb") as file:
            scan = scan_tar(file)
    except tarfile.ReadError as error:
        raise ConfigError(f"{tar}: is not an uncompressed tar file ({error})") from None
    if scan.problems or not scan.samples:
        raise ConfigError(f"{tar}: {scan.problems[0] if scan.problems else 'holds no samples'}")
    if lost := [problem for sample in scan.samples for problem in sample.problems()]:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise ConfigError(f"{tar}: {lost[0].key}: {lost[0].reason}{more}")
    for sample in scan.samples:
        image = sample.image
        assert image is not None, "a sample without problems has an image"
        content = FilePart(tar, image.offset_data, image.size)
        yield Item(f"{as_text(tar.name)}/{sample.key}", content, _label(tar, sample))


def _label(tar: Path, sample: TarSample) -> int:
    member = sample.members.get("cls")
    if member is None:
        raise ConfigError(f"{tar}: sample {sample.key} has no label (a member {sample.key}.cls)")
    text = read_range(str(tar), member.offset_data, member.size).decode("utf-8", "replace").strip()
    if not text.isascii() or not text.isdigit() or len(text) > _LABEL_DIGITS:
        raise ConfigError(f"{tar}: {sample.key}.cls = {text[:40]!r}: must be a class number")
    return int(text)


def _classes(data: Path, items: list[Item]) -> list[str]:
    most, listed = max((i.label, i.key) for i in items), data / "classes.txt"
    assert isinstance(most[0], int)
    has_list = listed.is_file()
    names = read_names(listed) if has_list else [str(i) for i in range(most[0] + 1)]
    if most[0] >= len(names):
        raise ConfigError(f"{most[1]}.cls = {most[0]}: {listed} lists {len(names)} classes")
    if len(names) < 2:
        raise ConfigError(f"--data {data}: has {len(names)} classes, needs two or more")
    return names
