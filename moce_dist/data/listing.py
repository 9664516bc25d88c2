"""The only code that lists image files: for ingest, class folders, ADE20K's layout, predict, sets.

taken      files with the extension of a format that can be opened, in upper or lower case
skipped    hidden files and folders (names with a leading dot, or left by desktops and disks)
followed   linked folders, after all others; links to folders that were listed before, and links
           to the listed folder or a folder above it, are skipped
reported   skipped files by extension, and broken links, pipes and folders that cannot be read
"""

import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from moce_dist.data.decoders import image_endings
from moce_dist.run.names import and_more
from moce_dist.settings import ConfigError

logger = logging.getLogger(__name__)

_LEFT_BEHIND = frozenset(
    ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found")
) | {"system volume information"}


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder of this name is hidden, and therefore skipped."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def ending(name: str) -> str:
    """Return the extension of a file's name, lower case, without the dot; "" if there is none."""
    return os.path.splitext(name)[1][1:].lower()


def counted(things: Counter[str]) -> str:
    """Return the counts as text, largest first."""
    found = sorted(things.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{number} {what}" for what, number in found)


class Listed(NamedTuple):
    """An image file and its size in bytes."""

    path: Path
    size: int


class Listing(NamedTuple):
    """The image files of a folder tree, sorted by path, and everything else that was found."""

    root: Path
    files: list[Listed]
    unusable: list[tuple[Path, str]]
    """Paths that cannot be read, each with the reason."""
    left_out: Counter[str]
    """Number of skipped files and folders by kind; a kind is an extension with its dot, or text."""

    def rest(self) -> str:
        """Return the counts of what is left out as text, largest first; "" if nothing is."""
        return counted(self.left_out)

    def usable(self) -> list[Path]:
        """Return the files of a folder in which all must be readable; log what is left out.

        Raises:
            ConfigError: naming the first path that cannot be read, and how many there are.
        """
        if self.unusable:
            path, reason = self.unusable[0]
            raise ConfigError(f"{path}: {reason}{and_more(self.unusable)}")
        if self.left_out:
            logger.warning("%s: left out: %s", self.root, self.rest())
        return [file.path for file in self.files]


def list_images(root: Path, endings: Collection[str] | None = None) -> Listing:
    """List the image files below a folder; `endings` defaults to all formats that can be opened."""
    taken = image_endings() if endings is None else endings
    listing = Listing(root, [], [], Counter())
    for folder, names in _walk(listing):
        for name in names:
            kind = ending(name)
            if is_hidden(name):
                listing.left_out["hidden"] += 1
            elif kind not in taken:
                listing.left_out[f".{kind}" if kind else "without an ending"] += 1
            else:
                _take(Path(folder, name), listing)
    listing.files.sort()
    return listing


def list_folders(root: Path) -> list[str]:
    """Return the sorted names of the folders directly in a folder, including linked ones."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))


def _take(path: Path, listing: Listing) -> None:
    try:
        status = path.stat()
    except OSError as error:
        listing.unusable.append((path, f"cannot be read: {error.strerror}"))
        return
    if stat.S_ISREG(status.st_mode):
        listing.files.append(Listed(path, status.st_size))
    else:
        listing.unusable.append((path, "is not a regular file"))


def _walk(listing: Listing) -> Iterator[tuple[str, list[str]]]:
    """Yield folders with the names of their files, each folder once, linked folders last."""
    seen: set[tuple[int, int]] = set()

    def unlisted(error: OSError) -> None:
        reason = f"cannot be listed: {error.strerror}"
        listing.unusable.append((Path(str(error.filename)), reason))

    tops = deque([str(listing.root)])
    inside = os.path.realpath(listing.root)
    while tops:
        top = tops.popleft()
        real = os.path.realpath(top)
        if seen and os.path.commonpath([inside, real]) == real:
            listing.left_out["linked folder that leads above"] += 1
            continue
        for folder, folders, names in os.walk(top, onerror=unlisted):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                listing.left_out["linked folder met before"] += 1
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            visible = sorted(name for name in folders if not is_hidden(name))
            if len(visible) < len(folders):
                listing.left_out["hidden"] += len(folders) - len(visible)
            links = {name for name in visible if os.path.islink(os.path.join(folder, name))}
            tops.extend(os.path.join(folder, name) for name in visible if name in links)
            folders[:] = [name for name in visible if name not in links]
            yield folder, names
