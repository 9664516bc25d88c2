"""Turn a folder of images, tars, or images of installed packages into shards and an index."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import interpreter  # noqa: F401 - says which Python to take

from moce_dist.cli import job_parser, quiet_libraries, run_job
from moce_dist.config import Config, load_config
from moce_dist.data.columns import open_index
from moce_dist.data.ingest import ingest
from moce_dist.data.shards import HOLDOUT, INDEX_NAME, ShardIndex, domain_of
from moce_dist.data.sources import (
    COMPOSITED,
    PIPE,
    PRETRAIN,
    SAMPLE_SETS,
    SEGMENTATION,
    TREES,
    expand_shards,
    list_folder,
    parse_source,
)
from moce_dist.run.artefacts import COMPLETE, read_marker
from moce_dist.run.directory import open_run, resolve_run, set_aside
from moce_dist.run.environment import local_path
from moce_dist.run.files import read_faults, record_fault, write_jsonl
from moce_dist.run.lease import hold
from moce_dist.run.names import as_text
from moce_dist.settings import ConfigError

COPIES = "copies.jsonl"
_MAX_DOMAINS_SHOWN = 12


def parse(argv: Sequence[str]) -> Any:
    """Parse the command line."""
    parser = job_parser(
        "Make the shards that training reads; sample:TASK writes a downstream task as folders.",
        "python jobs/ingest.py --source folder:/data/imagenet/train --out /data/shards",
    )
    parser.add_argument(
        "--source",
        metavar="KIND:REST",
        type=as_text,
        help=f"folder:PATH, shards:PATTERN, or sample:NAME ({', '.join(SAMPLE_SETS)}); "
        "default data.source",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write; default RUN/ingested")
    parser.add_argument(
        "--verify", action="store_true", help="then read and decode every image; name what is bad"
    )
    parser.add_argument(
        "--against",
        metavar="DIR",
        help="then look for images of DIR, a downstream set, that stand in the data too",
    )
    return parser.parse_args(argv)


def plan(source: str, *, allow_pipes: bool) -> tuple[str, str, int]:
    """Say what would be read, what would be left out of a folder, and count files or tars.

    Raises:
        ConfigError: the source is wrong.
    """
    kind, rest = parse_source(source)
    if kind == "folder":
        folder = list_folder(Path(rest))
        taken = f"{len(folder.files)} images, {folder.num_bytes} bytes"
        number = len(folder.files) + len(folder.faults)
        return f"{taken}, {len(folder.faults)} unusable files", folder.left_out, number
    if kind == "shards":
        urls = expand_shards(rest, allow_pipes=allow_pipes)
        pipes = [url for url in urls if url.startswith(PIPE)]
        local = sum(os.path.getsize(url) for url in urls if "://" not in url and url not in pipes)
        stored = f"; {len(pipes)} more that commands write, stored" if pipes else ""
        lying = f"{len(urls) - len(pipes)} shards, {local} bytes on local disks"
        return f"{lying}, indexed where they lie{stored}", "", len(urls)
    from moce_dist.samples import carriers, desktop

    (desktop if rest == COMPOSITED else carriers).check_installed()
    return "images of installed packages", "", 0


def place(args: Any, config: Config) -> tuple[Path, Path | None]:
    """Decide the output folder, and the run if there is one.

    Raises:
        ConfigError: neither --out nor --run says where.
    """
    if args.out and "://" in args.out:
        raise ConfigError(f"--out {args.out}: must be a local folder; copy it afterwards")
    if args.run:
        root = resolve_run(args.run, config)
        return local_path(args.out, "--out") if args.out else root / "ingested", root
    if not args.out:
        raise ConfigError("--out: is missing; name a folder, or a run with --run")
    return local_path(args.out, "--out"), None


def check_outside(kind: str, name: str, folder: Path) -> None:
    """Refuse to set a folder aside that holds the source itself.

    Raises:
        ConfigError: naming the file or folder.
    """
    # pipes were expanded before, and other sources lie elsewhere
    urls = expand_shards(name, allow_pipes=True) if kind == "shards" else [name]
    for url in urls if kind in ("shards", "folder") else ():
        if "://" not in url and Path(url).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"--fresh: {folder} holds the source {url}; name another --out")


@contextmanager
def held(args: Any, config: Config, out: Path, root: Path | None) -> Iterator[None]:
    """Lock the run and the output folder; with --fresh, set their earlier content aside."""
    with hold(*([root] if root else [])):
        if root:
            open_run(root, config, fresh=args.fresh)
        with hold(out):
            # what lies in the run has been moved with it
            if args.fresh and (out / COMPLETE).exists():
                set_aside(out)
            yield


def write_task(name: str, out: Path) -> None:
    """Write a downstream task of a sample set as folders, and print how many images it has."""
    from moce_dist.samples import detection, sets

    if name == SEGMENTATION:
        sets.write_climate_segmentation(out)
    elif name in (TREES, COMPOSITED):
        (detection.write_trees if name == TREES else detection.write_composited)(out)
    else:
        sets.write_task(name, out)
    images = Counter(path.relative_to(out).parts[-2] for path in out.glob("images/*/*")) or Counter(
        path.relative_to(out).parts[0]
        for path in [*out.glob("*/*/*.png"), *out.glob("*2017/*.jpg")]
    )
    print(f"images   {', '.join(f'{part} {number}' for part, number in sorted(images.items()))}")
    print(f"path     {out}")


def held_out(out: Path) -> list[ShardIndex]:
    """Read the index of the held-out images, if there are any."""
    return [open_index(out / HOLDOUT)] if (out / HOLDOUT / INDEX_NAME).is_file() else []


def summarise(indices: Sequence[ShardIndex], out: Path, num_faults: int, left_out: str) -> None:
    """Print what the data set consists of: images for training, then those held out."""
    index, *holdout = indices
    num_shards = sum(len(part.shards) for part in indices)
    num_bytes = sum(shard.bytes for part in indices for shard in part.shards)
    held = sum(part.num_samples for part in holdout)
    domains = Counter(
        domain_of(key) or "(no folder)"
        for part in indices
        for shard in part.shards
        for key in shard.keys
    )
    shown = ", ".join(f"{name} {n}" for name, n in domains.most_common(_MAX_DOMAINS_SHOWN))
    more = ", ..." if len(domains) > _MAX_DOMAINS_SHOWN else ""
    print(f"images   {index.num_samples} for training, {held} held out")
    print(f"shards   {num_shards}, {num_bytes} bytes")
    print(f"domains  {len(domains)}: {shown}{more}")
    print(f"faults   {num_faults}")
    if left_out:
        print(f"left out {left_out}")
    print(f"path     {out / INDEX_NAME}")


def verify_all(indices: Sequence[ShardIndex], ledger: Path, config: Config) -> None:
    """Read and decode every image, and write a line for each bad one into the ledger.

    Raises:
        RuntimeError: more than `data.max_fault_fraction` of the images are bad.
    """
    from moce_dist.data.audit import verify
    from moce_dist.launch.tasks import map_tasks

    ledgered = {
        stage: {(f["shard"], f["key"]) for f in read_faults(ledger) if f["stage"] == stage}
        for stage in ("ingest", "verify")
    }
    num_faults, tasks = 0, partial(map_tasks, config.parallel)
    for index in indices:
        for fault in verify(index, config.data, tasks, ledgered["ingest"]):
            num_faults += 1
            if (fault.shard, fault.key) not in ledgered["verify"]:
                record_fault(ledger, stage="verify", **fault._asdict())
    total = sum(index.num_samples for index in indices)
    named = f"; each is named in {ledger}" if num_faults else ""
    print(f"verified {total} images, {num_faults} faults{named}")
    if num_faults > config.data.max_fault_fraction * total:
        limit = f"data.max_fault_fraction = {config.data.max_fault_fraction}"
        raise RuntimeError(f"{num_faults} faults in {total} images, over {limit}{named}")


def compare_with(folder: Path, indices: Sequence[ShardIndex], out: Path, config: Config) -> None:
    """Find images of a downstream set in the data, and list them in its `copies.jsonl`."""
    from moce_dist.data.audit import find_copies
    from moce_dist.launch.tasks import map_tasks

    copies = list(find_copies(indices, folder, config.data, partial(map_tasks, config.parallel)))
    write_jsonl(out / COPIES, (copy._asdict() for copy in copies))
    kinds = Counter(copy.kind for copy in copies)
    images = len({copy.file for copy in copies})
    print(
        f"copies   {kinds['exact']} exact, {kinds['near']} near, of {images} images of "
        f"{folder}; listed in {out / COPIES}"
    )


def main(argv: Sequence[str]) -> None:
    """Run the job."""
    args = parse(argv)
    quiet_libraries()
    named = [f"data.source={json.dumps(args.source)}"] if args.source is not None else []
    config = load_config(args.config, [*args.overrides, *named])
    source = config.data.source
    kind, name = parse_source(source)
    is_task = kind == "sample" and name != PRETRAIN
    against = local_path(args.against, "--against") if args.against else None
    if against and not against.is_dir():
        raise ConfigError(f"--against {args.against}: is not a folder")
    args.against = against
    if is_task and (args.verify or against):
        raise ConfigError(f"--verify, --against: are for pre-training data, not for {source}")
    reads, left_out, listed = plan(source, allow_pipes=config.data.allow_pipes)
    out, root = place(args, config)
    ledger = (root or out) / "faults.jsonl"
    if args.dry_run:
        form = "class folders" if is_task else f"tars of {config.data.shard_bytes} bytes"
        print(f"reads    {source}: {reads}")
        if left_out:
            print(f"left out {left_out}")
        print(f"writes   {out}, {form if kind != 'shards' else 'an index'}")
        print(f"holdout  {0 if is_task else config.data.holdout_fraction}")
        print(f"faults   {ledger}")
        return
    if args.fresh:
        check_outside(kind, name, root or out)
    with held(args, config, out, root):
        if is_task:
            write_task(name, out)
        else:
            make_shards(args, config, out, ledger, left_out)
            # data that were complete before hold what the source had then
            before = (read_marker(out) or {}).get("listed", listed)
            if before != listed:
                logging.getLogger(__name__).warning(
                    "%s: was made from %d files of %s, which has %d now; --fresh makes it anew",
                    *(out, before, source, listed),
                )


def make_shards(args: Any, config: Config, out: Path, ledger: Path, left_out: str) -> None:
    """Make the shards and print a summary; then compare and verify them, if requested."""
    from moce_dist.launch.tasks import map_tasks
    from moce_dist.samples import sets

    source, tasks = config.data.source, partial(map_tasks, config.parallel)
    index = ingest(source, out, config.data, ledger, tasks, mix=sets.pretrain)
    faults = [fault for fault in read_faults(ledger) if fault["stage"] == "ingest"]
    indices = [index, *held_out(out)]
    summarise(indices, out, len(faults), left_out)
    if args.against:
        compare_with(args.against, indices, out, config)
    if args.verify:
        verify_all(indices, ledger, config)


if __name__ == "__main__":
    run_job(main)
