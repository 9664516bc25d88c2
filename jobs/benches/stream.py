"""Compare streams from tars to batches with other libraries, and measure reading alone.

All streams use the same number of loader processes and end with a batch in the training process.
webdataset uses Pillow, torchvision and its shuffle buffer. litdata (if it is installed) uses the
same transform on its own format. Ours reads by plan and normalises in the training process.
`planned_samples` is our public data set in a pipeline of webdataset, with the transform of ours.

Reading alone is measured without page cache. `sequential_read` reads every tar from its first to
its last byte; `planned_read` reads the samples of the same tars in the order of the plan.
`random_read` is what the disk gives to any program that reads single samples in random order: it
announces many ranges at a time, and does nothing else.
"""

import itertools
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import webdataset

from benches.decode import reference_pipeline
from benches.harness import Report, interleave
from benches.photographs import photographs
from benches.s3_server import COUNTS_PATH, s3_server
from benches.settings import BenchConfig
from moce_dist.arrays import Int64, Pixels
from moce_dist.data.batches import stream
from moce_dist.data.columns import open_index
from moce_dist.data.dataset import PlannedSamples
from moce_dist.data.images import SampleDraws, draw_cut, normalise, open_croppable
from moce_dist.data.plan import Plan
from moce_dist.data.shards import ShardIndex, write_index
from moce_dist.data.stream import PlannedStep, PlannedStream, Readers, StreamSpec
from moce_dist.data.table import SampleTable, sample_table
from moce_dist.data.writer import ShardWriter

_CLUSTERS, _TARS_OF_CLUSTER = 8, 2
_EPOCH_TARS, _SMALL = 64, (32, 32)
_READ_BYTES = 2**20
_CHUNK_BYTES = 64 * 2**20
_LATENCY_S = 0.03
_S3_SAMPLES, _S3_USED = 4000, 1000


def run(config: BenchConfig) -> Report:
    """Measure streams, readers, a resume inside a long epoch, and reading from S3."""
    torch.set_num_threads(1)
    report, bench = Report("stream", config), config.bench
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        folder = Path(temporary)
        contents = photographs(config, 500, 375, bench.images)
        index = make_shards(folder / "photographs", contents, bench.samples)
        spec = stream_spec(config, index, folder)
        streams = stream_variants(spec, config, index)
        streams["planned_samples"] = planned_variant(config, index)
        if find_spec("litdata"):
            streams["litdata"] = litdata_variant(config, contents, folder / "litdata")
        else:
            report.skipped["litdata"] = "is not installed (pip install litdata)"
        measured = {**streams, **reader_variants(spec, index)}
        seconds = interleave(measured, rounds=bench.rounds, warmup=bench.warmup_rounds)
        images = bench.batches * spec.plan.batch_size
        amounts = {
            **dict.fromkeys(streams, images),
            "sequential_read": sum(shard.bytes for shard in index.shards) / 2**20,
            "planned_read": int(spec.plan.table.size.sum()) / 2**20,
            "random_read": int(spec.plan.table.size.sum()) / 2**20,
        }
        rates = {name: [amounts[name] / s for s in series] for name, series in seconds.items()}
        for name, values in rates.items():
            unit = "images/s" if name in streams else "MiB/s"
            report.add_variants({name: values}, unit=unit)
        for baseline in streams.keys() - {"moce_dist", "planned_samples"}:
            report.add_ratio("moce_dist", baseline)
        report.add_ratio("planned_samples", "moce_dist")
        report.add_ratio("planned_read", "sequential_read")
        report.add_ratio("random_read", "sequential_read")
        report.add_ratio("planned_read", "random_read")
        report.figures["resume_first_batch_s"] = resume_first_batch(config, folder / "small")
        _add_s3(report, config, make_shards(folder / "s3", contents, _S3_SAMPLES))
    return report


def make_shards(folder: Path, contents: list[bytes], samples: int) -> ShardIndex:
    """Write `samples` samples, which repeat the contents, as clusters of tars, and flush them."""
    shards, tars = [], _CLUSTERS * _TARS_OF_CLUSTER
    for tar, numbers in enumerate(np.array_split(np.arange(samples), tars)):
        writer = ShardWriter(folder, f"tar-{tar:03d}.tar", cluster=tar // _TARS_OF_CLUSTER)
        for number in numbers:
            members = {"jpg": contents[number % len(contents)], "cls": b"0"}
            writer.add(f"{number:08d}", members)
        shards.append(writer.close())
    os.sync()
    return write_index(folder, shards)


def stream_spec(config: BenchConfig, index: ShardIndex, folder: Path) -> StreamSpec:
    """Describe the stream of one rank that reads everything."""
    plan = Plan(sample_table(index), config.mae.batch_size, config.seed)
    ledger = folder / "faults.jsonl"
    return StreamSpec(plan, config.data, config.num_patches, 1, 0, ledger, "mae")


def one_group(clusters: Int64) -> Int64:
    """Let group 0 read everything."""
    return np.zeros(len(clusters), np.int64)


def stream_variants(
    spec: StreamSpec, config: BenchConfig, index: ShardIndex
) -> dict[str, Callable[[], None]]:
    """Make both streams; a call starts the loader processes and takes `bench.batches` batches."""
    batches, size = config.bench.batches, spec.plan.batch_size

    def ours() -> None:
        for batch in stream(spec, one_group, start=0, stop=batches):
            assert normalise(batch.images).shape[0] == size and batch.weights.all()

    def theirs() -> None:
        urls = [index.url(shard) for shard in index.shards]
        data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=config.seed)
        data = data.shuffle(1000).to_tuple("jpg").map_tuple(reference_pipeline(config)).repeat()
        processes = spec.data.loader_processes
        loader = torch.utils.data.DataLoader(data, size, num_workers=processes)
        for _, (images,) in zip(range(batches), loader, strict=False):
            assert images.shape[0] == size

    return {"webdataset": theirs, "moce_dist": ours}


def planned_variant(config: BenchConfig, index: ShardIndex) -> Callable[[], None]:
    """Make a pipeline of webdataset that begins with `PlannedSamples`; a call is as of the others.

    A loader process makes the same pixels as ours, and they are normalised after it as ours are.
    """
    data, size = config.data, config.mae.batch_size
    samples = PlannedSamples(
        index.root, batch_size=size, seed=config.seed, rank=0, num_ranks=1, drop_last=True
    )
    generators = SampleDraws()

    def pixels(sample: dict[str, Any]) -> Pixels:
        draws = generators.of(config.seed, 0, sample["__key__"])
        image = open_croppable(sample["jpg"])
        cut = draw_cut(image, scale_min=data.crop_scale_min, hflip=data.hflip, draws=draws)
        return cut.pixels(data.image_size).copy()

    pipeline = webdataset.DataPipeline(samples, webdataset.map(pixels))

    def batches() -> Iterator[torch.Tensor]:
        for epoch in itertools.count():
            samples.set_epoch(epoch)
            yield from webdataset.WebLoader(
                pipeline, batch_size=size, num_workers=data.loader_processes
            )

    def ours() -> None:
        for images in itertools.islice(batches(), config.bench.batches):
            assert normalise(images.permute(0, 3, 1, 2)).shape[0] == size

    return ours


def litdata_variant(config: BenchConfig, contents: list[bytes], folder: Path) -> Callable[[], None]:
    """Write the samples in litdata's format; a call takes as many batches as the other streams."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=_CHUNK_BYTES)
    for number in range(config.bench.samples):
        writer[number] = {"jpg": contents[number % len(contents)]}
    writer.done()
    writer.merge()
    transform, size = reference_pipeline(config), config.mae.batch_size

    def theirs() -> None:
        data = StreamingDataset(
            str(folder), shuffle=True, seed=config.seed, transform=lambda row: transform(row["jpg"])
        )
        loader = StreamingDataLoader(
            data, batch_size=size, num_workers=config.data.loader_processes, drop_last=True
        )
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        for images in itertools.islice(epochs, config.bench.batches):
            assert images.shape[0] == size

    return theirs


def planned(spec: StreamSpec, steps: int) -> Iterator[PlannedStep]:
    """Yield the first steps of a plan with the bytes of their samples, read in this process."""
    return PlannedStream(spec, 0, [[Readers(steps, one_group)]]).steps()


def reader_variants(spec: StreamSpec, index: ShardIndex) -> dict[str, Callable[[], float]]:
    """Make functions that read all samples once in this process and return the seconds."""
    paths = [index.url(shard) for shard in index.shards]

    def sequential() -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.read(_READ_BYTES):
                    pass

    def by_plan() -> None:
        for step in planned(spec, spec.plan.steps_per_epoch):
            assert not any(isinstance(content, OSError) for content in step.contents)

    table = spec.plan.table
    order = np.random.default_rng(spec.plan.seed).permutation(table.num_samples)

    def at_random() -> None:
        files = [os.open(path, os.O_RDONLY) for path in paths]
        ahead = max(1, int(spec.data.read_ahead_bytes * table.num_samples / table.num_bytes))
        portions = [order[i : i + ahead] for i in range(0, len(order), ahead)]
        for current, coming in zip([None, *portions], [*portions, None], strict=True):
            if coming is not None:
                for file, offset, size in _places(table, files, coming):
                    os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
            if current is not None:
                for file, offset, size in _places(table, files, current):
                    os.pread(file, size, offset)
        for file in files:
            os.close(file)

    return {
        "sequential_read": lambda: _uncached(paths, sequential),
        "planned_read": lambda: _uncached(paths, by_plan),
        "random_read": lambda: _uncached(paths, at_random),
    }


def _places(table: SampleTable, files: list[int], rows: Int64) -> Iterator[tuple[int, int, int]]:
    # open file, offset and size of each sample
    columns = (table.shard[rows].tolist(), table.offset[rows].tolist(), table.size[rows].tolist())
    return ((files[shard], offset, size) for shard, offset, size in zip(*columns, strict=True))


def _uncached(paths: list[str], read: Callable[[], None]) -> float:
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    begin = time.perf_counter()
    read()
    return time.perf_counter() - begin


def resume_first_batch(config: BenchConfig, folder: Path) -> float:
    """Measure the seconds from the index of a long epoch to the first batch in its middle.

    The tars are one real tar under 64 names, so every sample can be read where the index says.
    """
    index = make_long_epoch(config, folder)
    begin = time.perf_counter()
    spec = stream_spec(config, open_index(index.root), folder)
    middle = spec.plan.steps_per_epoch // 2
    batches = stream(spec, one_group, start=middle, stop=middle + 64)
    assert next(batches).weights.all()
    return time.perf_counter() - begin


def make_long_epoch(config: BenchConfig, folder: Path) -> ShardIndex:
    """Write one tar of small photographs, and an index with it under 64 names and unique keys."""
    contents = photographs(config, *_SMALL, config.bench.images)
    writer = ShardWriter(folder, "tar-000.tar", cluster=0)
    for number in range(config.bench.epoch_samples // _EPOCH_TARS):
        writer.add(f"{number:08d}", {"jpg": contents[number % len(contents)]})
    first, shards = writer.close(), []
    for tar in range(_EPOCH_TARS):
        path = f"tar-{tar:03d}.tar"
        if tar:
            os.link(folder / first.path, folder / path)
        keys = [f"{tar:03d}/{key}" for key in first.keys]
        shards.append(replace(first, path=path, cluster=tar // _CLUSTERS, keys=keys))
    return write_index(folder, shards)


def _add_s3(report: Report, config: BenchConfig, index: ShardIndex) -> None:
    try:
        counted = read_from_s3(config, index)
    except ModuleNotFoundError as error:
        report.skipped["s3_bytes_read_over_used"] = f"{error.name} is not installed"
        return
    report.figures.update(counted)


def read_from_s3(config: BenchConfig, index: ShardIndex) -> dict[str, float]:
    """Read the first 1,000 samples of a plan from an S3 server with 30 ms of latency."""
    import s3fs

    with (
        s3_server(_LATENCY_S) as url,
        patch.dict(
            os.environ,
            {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
            },
        ),
    ):
        # file systems are cached by their arguments, which are the same for every server
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.mkdir("bench")
        for shard in index.shards:
            store.put_file(index.url(shard), f"bench/{shard.path}")
        remote = replace(index, root="s3://bench")
        spec = stream_spec(config, remote, Path(index.root))
        steps = _S3_USED // spec.plan.batch_size
        before, used, samples = _counts(url), 0, 0
        begin = time.perf_counter()
        for step in planned(spec, steps):
            used += sum(len(c) for c in step.contents if isinstance(c, memoryview))
            samples += len(step.ids)
        seconds = time.perf_counter() - begin
        requests, read = (b - a for a, b in zip(before, _counts(url), strict=True))
    return {
        "s3_bytes_read_over_used": read / used,
        "s3_requests_per_1000_samples": 1000 * requests / samples,
        "s3_samples_per_s": samples / seconds,
    }


def _counts(url: str) -> tuple[int, int]:
    with urllib.request.urlopen(url + COUNTS_PATH) as answer:  # noqa: S310
        requests, read = map(int, answer.read().split())
    return requests, read
