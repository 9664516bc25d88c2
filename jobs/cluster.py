"""Cluster features into balanced clusters: those of a run, or a folder of .npy files.

Without Ray for one worker; the result is the same on any number of them.

    python jobs/cluster.py --features DIR --num-clusters 256 --out OUT
    python jobs/cluster.py --run quickstart

With --run: features, clusters and cluster-sharded tars of that run.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moce_dist.cli import job_parser, quiet_libraries, run_job
from moce_dist.config import Config, load_config
from moce_dist.run import load_run, open_run, resolve_run, set_aside
from moce_dist.settings import ConfigError

if TYPE_CHECKING:
    from moce_dist.cluster.blocks import FeatureFiles


def main(argv: Sequence[str]) -> None:
    """Parse the request, check it, cluster."""
    parser = job_parser(
        "Balanced k-means over features; results do not depend on the number of workers.",
        "python jobs/cluster.py --features features/ --num-clusters 256 --out clusters/",
    )
    parser.add_argument("--features", metavar="DIR", help="folder of *.npy, each [n_i, D]")
    parser.add_argument("--num-clusters", metavar="K", type=int, help="cluster.num_clusters")
    parser.add_argument("--balance", choices=("exact", "soft", "off"), help="cluster.balance")
    parser.add_argument("--out", metavar="DIR", help="where the clusters of --features go")
    arguments = parser.parse_args(argv)
    if (arguments.features is None) == (arguments.run is None):
        raise ConfigError("--features, --run: exactly one of them must be given")
    if arguments.run is not None:
        cluster_run(arguments)
    else:
        cluster_folder(arguments)


def read_config(arguments: Namespace, base: str | Path | None) -> Config:
    """Combine a file, --set and the flags of this job."""
    flags = {"num_clusters": arguments.num_clusters, "balance": arguments.balance}
    # quoted, for YAML reads a bare `off` as false
    given = [
        f"cluster.{name}={json.dumps(value)}" for name, value in flags.items() if value is not None
    ]
    return load_config(base, [*arguments.overrides, *given])


def cluster_run(arguments: Namespace) -> None:
    """Make features, clusters and shards of a run, with its own configuration."""
    if arguments.out is not None:
        raise ConfigError(f"--out {arguments.out}: the clusters of a run lie in the run")
    if arguments.fresh:
        raise ConfigError("--fresh: would set the whole run aside; remove its clusters instead")
    # the flags are checked before the run is looked for: both mistakes are the request's
    root = resolve_run(arguments.run, read_config(arguments, arguments.config))
    load_run(root)
    config = read_config(arguments, arguments.config or root / "config.yaml")
    if arguments.dry_run:
        print(f"run        {root}")
        print(f"clusters   {config.cluster.num_clusters}, balance {config.cluster.balance}")
        print(f"workers    {config.parallel.num_workers}")
        return
    quiet_libraries()
    run = open_run(root, config)
    from moce_dist.pipeline import Pipeline

    print_summary(Pipeline(run, config).cluster(), run.clusters)


def cluster_folder(arguments: Namespace) -> None:
    """Cluster anyone's features, taken as they are."""
    if arguments.out is None:
        raise ConfigError("--out: must name the folder of the result")
    config, out = read_config(arguments, arguments.config), Path(arguments.out).resolve()
    files = check_folder(Path(arguments.features), out, config)
    if arguments.dry_run:
        print("\n".join(plan_lines(files, out, config)))
        return
    quiet_libraries()
    if arguments.fresh and out.exists():
        set_aside(out)
    from moce_dist.cluster.assign import run_clustering
    from moce_dist.crew import hold_crew

    with hold_crew(config.parallel, gpu=True) as workers:
        summary = run_clustering(
            Path(arguments.features),
            out,
            config.cluster,
            seed=config.seed,
            subtract_mean=False,
            workers=workers,
        )
    print_summary(summary, out)


def check_folder(features: Path, out: Path, config: Config) -> "FeatureFiles":
    """Read the headers of the features and refuse what cannot be clustered.

    Raises:
        ConfigError: naming the file or field.
    """
    from moce_dist.cluster.blocks import check_count, open_features

    files = open_features(features)
    check_count(files, config.cluster.num_clusters)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file, must be a folder")
    return files


def plan_lines(files: "FeatureFiles", out: Path, config: Config) -> list[str]:
    """Describe what would be done."""
    cluster = config.cluster
    blocks = len(files.blocks(cluster.block_rows))
    return [
        f"features   {files.num_rows} rows of width {files.dim} in {len(files.paths)} files, "
        f"{files.num_bytes} bytes",
        f"clusters   {cluster.num_clusters} of {files.num_rows / cluster.num_clusters:.1f} rows, "
        f"balance {cluster.balance}, at most {cluster.iterations} iterations",
        f"workers    {config.parallel.num_workers}, {blocks} blocks of {cluster.block_rows} rows",
        f"out        {out}",
    ]


def print_summary(summary: dict[str, object], out: Path) -> None:
    """Show the figures; what there is of every cluster stays in summary.json."""
    for name, value in summary.items():
        if not isinstance(value, list):
            print(f"{name:<24} {value}")
    print(f"{'written to':<24} {out}")


if __name__ == "__main__":
    run_job(main)
