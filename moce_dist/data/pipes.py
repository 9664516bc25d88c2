"""Tars that shell commands write, as WebDataset's `pipe:` names them.

A pipe can be read once and only forward, whereas training reads samples by range: every command
runs once, and its tar is kept beside the index.

    pipe:curl -s https://host/{00..01}.tar.gz | gunzip     ->     pipe-000000.tar pipe-000001.tar

Commands run only where the configuration allows it. What they need to be let in comes from the
environment (`$TOKEN`), as their text stands in the index, the ledger and the report.
"""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from moce_dist.data.shards import Fault, Shard, scan_shard
from moce_dist.data.sources import PIPE
from moce_dist.data.writer import finished_tar, note_finished
from moce_dist.settings import ConfigError


class PipedTar(NamedTuple):
    """A tar to be written: its file name, and its command behind `pipe:`."""

    name: str
    url: str


def write_piped(out: Path, tar: PipedTar) -> tuple[Shard, list[Fault]]:
    """Run a command, keep what it writes, index it; at once when an earlier attempt did.

    Raises:
        ConfigError: it wrote no tar.
        RuntimeError: it failed; its own words went to standard error.
        OSError: the tar cannot be written.
    """
    if (found := finished_tar(out, tar.name)) is not None:
        return found
    path, temporary = out / tar.name, out / f".{tar.name}.tmp"
    command = ["bash", "-o", "pipefail", "-c", tar.url.removeprefix(PIPE)]
    # through this process: when it is killed the command meets a broken pipe, and ends too
    with (
        temporary.open("wb") as file,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None, "a pipe was asked for"
        shutil.copyfileobj(process.stdout, file, 2**20)
    if process.returncode:
        raise RuntimeError(f"shards:{tar.url}: ended with status {process.returncode}")
    temporary.replace(path)
    try:
        shard, faults = scan_shard(str(path), path=tar.name)
    except ConfigError:
        raise ConfigError(f"shards:{tar.url}: writes no uncompressed tar") from None
    note_finished(out, shard, faults)
    return shard, faults
