"""The data sets of a study: ingested once below its folder, or only counted for a dry run."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from moce_dist.config import Config
from moce_dist.data.columns import open_index
from moce_dist.data.shards import INDEX_NAME, Shard
from moce_dist.data.sources import list_folder
from moce_dist.run.artefacts import read_marker
from moce_dist.settings import ConfigError
from moce_dist.study.plan import Source


def _folder(out: Path, name: str, config: Config) -> Path:
    return config.index or out / "data" / name


def _count(shards: Iterable[Shard]) -> int:
    return sum(shard.num_samples for shard in shards)


def make_sources(wanted: Mapping[str, Config], out: Path) -> dict[str, Source]:
    """Ingest the data sets of a study that are not there yet.

    Raises:
        ConfigError: a source is wrong or too damaged.
    """
    from moce_dist.data.ingest import ingest
    from moce_dist.samples import sets

    found: dict[str, Source] = {}
    for name, config in wanted.items():
        folder, source = _folder(out, name, config), config.data.source
        if config.index is not None:
            shards = open_index(folder).shards
        else:
            ledger = out / "faults.jsonl"
            shards = ingest(source, folder, config.data, ledger, mix=sets.pretrain).shards
        found[name] = Source(name, folder, _count(shards))
    return found


def count_sources(
    wanted: Mapping[str, Config], out: Path, assumed: int | None
) -> dict[str, Source]:
    """Count the training images of a study's data sets without reading them.

    A data set that is not available is taken to have `assumed` images.

    Raises:
        ConfigError: a data set is not available, and `assumed` is None.
    """
    found = {}
    for name, config in wanted.items():
        folder, source = _folder(out, name, config), config.data.source
        if read_marker(folder) is not None or (folder / INDEX_NAME).is_file():
            number = _count(open_index(folder).shards)
        elif source.startswith("folder:") and Path(source.removeprefix("folder:")).is_dir():
            files = list_folder(Path(source.removeprefix("folder:"))).files
            number = round(len(files) * (1 - config.data.holdout_fraction))
        elif assumed is not None:
            number = assumed
        else:
            raise ConfigError(f"num_images: is needed, as {source} cannot be counted here")
        found[name] = Source(name, folder, number)
    return found
