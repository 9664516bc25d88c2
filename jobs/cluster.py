"""Cluster the features of a run, or of a folder of .npy files, into balanced clusters.

The result does not depend on the number of workers. One worker without a cluster needs no Ray.

    python jobs/cluster.py --features DIR --num-clusters 256 --out OUT
    python jobs/cluster.py --run quickstart
    python jobs/cluster.py --features NEW --assign-to OUT --out ASSIGNED

With --run, the job makes features, clusters and cluster-sharded tars of that run. With
--assign-to, it makes no clusters, but assigns new features to those of an earlier request.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import interpreter  # noqa: F401 - says which Python to take

from moce_dist.cli import job_parser, quiet_libraries, run_job
from moce_dist.config import Config, checked, load_config, read_resolved
from moce_dist.run.directory import load_run, open_run, resolve_run, set_aside
from moce_dist.run.environment import local_path
from moce_dist.run.lease import hold
from moce_dist.settings import ConfigError

if TYPE_CHECKING:
    from moce_dist.cluster.blocks import FeatureFiles
    from moce_dist.cluster.sweeps import Sweep


def main(argv: Sequence[str]) -> None:
    """Parse and check the request, then cluster."""
    parser = job_parser(
        "Balanced k-means over features; results do not depend on the number of workers.",
        "python jobs/cluster.py --features features/ --num-clusters 256 --out clusters/",
    )
    parser.add_argument("--features", metavar="DIR", help="folder of *.npy, each [n_i, D]")
    parser.add_argument("--num-clusters", metavar="K", type=int, help="cluster.num_clusters")
    parser.add_argument("--balance", choices=("exact", "soft", "off"), help="cluster.balance")
    parser.add_argument("--out", metavar="DIR", help="where the clusters of --features go")
    parser.add_argument(
        "--assign-to",
        metavar="CLUSTERS",
        help="make no clusters, assign --features to these: an earlier --out, or RUN/clusters",
    )
    parser.add_argument(
        "--prices", action="store_true", help="assign under the prices that balanced the clusters"
    )
    arguments = parser.parse_args(argv)
    check_flags(arguments)
    if arguments.run is not None:
        cluster_run(arguments)
    elif arguments.assign_to is not None:
        assign_new(arguments)
    else:
        cluster_folder(arguments)


def check_flags(arguments: Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        ConfigError: naming them.
    """
    if (arguments.features is None) == (arguments.run is None):
        raise ConfigError("--features, --run: exactly one of them must be given")
    if arguments.assign_to is None:
        if arguments.prices:
            raise ConfigError(
                "--prices: is of --assign-to only; clusters are balanced by --balance"
            )
        return
    if arguments.run is not None:
        raise ConfigError("--assign-to: is of --features; a run goes on from another by base_run")
    for flag in ("num_clusters", "balance"):
        if getattr(arguments, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')}: the clusters of --assign-to stay as is")


def given_fields(arguments: Namespace) -> list[str]:
    """Return --set and the flags of this job as overrides."""
    flags = {"num_clusters": arguments.num_clusters, "balance": arguments.balance}
    given = [f"cluster.{name}={value}" for name, value in flags.items() if value is not None]
    return [*arguments.overrides, *given]


def read_config(arguments: Namespace) -> Config:
    """Combine a file, --set and the flags of this job."""
    return load_config(arguments.config, given_fields(arguments))


def cluster_run(arguments: Namespace) -> None:
    """Make features, clusters and shards of a run, with its own configuration."""
    if arguments.out is not None:
        raise ConfigError(f"--out {arguments.out}: the clusters of a run lie in the run")
    if arguments.fresh:
        raise ConfigError("--fresh: would set the whole run aside; remove its clusters instead")
    # read the flags first, so that a wrong flag is reported before a missing run
    root = resolve_run(arguments.run, read_config(arguments))
    load_run(root)
    if arguments.config is not None:
        config = read_config(arguments)
    else:
        config = checked(read_resolved(root / "config.yaml", given_fields(arguments)))
    if arguments.dry_run:
        print(f"run        {root}")
        print(f"features   of {config.cluster.encoder}")
        print(f"clusters   {config.cluster.num_clusters}, balance {config.cluster.balance}")
        print(f"workers    {config.parallel.num_workers}")
        return
    quiet_libraries()
    with hold(root):
        run = open_run(root, config)
        from moce_dist.pipeline import Pipeline

        print_summary(Pipeline(run, config).cluster(), run.clusters)


def read_out(arguments: Namespace) -> Path:
    """Return the folder of the result.

    Raises:
        ConfigError: no folder is named, it is a file, or it holds what is read.
    """
    if arguments.out is None:
        raise ConfigError("--out: must name the folder of the result")
    out = local_path(arguments.out, "--out").resolve()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file, must be a folder")
    for flag, given in (("--features", arguments.features), ("--assign-to", arguments.assign_to)):
        if given is not None and local_path(given, flag).resolve().is_relative_to(out):
            raise ConfigError(f"--out {out}: holds what {flag} names; choose another folder")
    return out


def cluster_folder(arguments: Namespace) -> None:
    """Cluster the features of a folder, without subtracting their mean."""
    out, config = read_out(arguments), read_config(arguments)
    # absolute, because workers run in folders of their own
    features = Path(arguments.features).resolve()
    files = check_folder(features, config)
    if arguments.dry_run:
        print("\n".join(plan_lines(files, out, config)))
        return
    quiet_libraries()
    from moce_dist.cluster.assign import run_clustering
    from moce_dist.launch.actors import hold_actors

    with hold(out), hold_actors(config.parallel) as workers:
        if arguments.fresh:
            set_aside(out)
        summary = run_clustering(
            features,
            out,
            config.cluster,
            seed=config.seed,
            subtract_mean=False,
            workers=workers,
        )
    print_summary(summary, out)


def assign_new(arguments: Namespace) -> None:
    """Assign the features of a folder to existing clusters."""
    out, config = read_out(arguments), read_config(arguments)
    features, named = Path(arguments.features).resolve(), Path(arguments.assign_to)
    from moce_dist.cluster.existing import assign_folder, open_new_features, read_clusters

    clusters = read_clusters(named, with_prices=arguments.prices)
    files = open_new_features(features, clusters)
    if arguments.dry_run:
        print("\n".join(assignment_lines(files, clusters, arguments, config)))
        return
    quiet_libraries()
    from moce_dist.launch.actors import hold_actors

    with hold(out), hold_actors(config.parallel) as workers:
        if arguments.fresh:
            set_aside(out)
        summary = assign_folder(
            features,
            named,
            out,
            block_rows=config.cluster.block_rows,
            with_prices=arguments.prices,
            workers=workers,
        )
    print_summary(summary, out)


def check_folder(features: Path, config: Config) -> "FeatureFiles":
    """Read headers and keys of the features and refuse what cannot be clustered.

    Raises:
        ConfigError: naming the file or field.
    """
    from moce_dist.cluster.blocks import check_count, open_features

    files = open_features(features)
    check_count(files, config.cluster.num_clusters)
    return files


def plan_lines(files: "FeatureFiles", out: Path, config: Config) -> list[str]:
    """Describe what would be done."""
    cluster = config.cluster
    return [
        *work_lines(files, config),
        f"clusters   {cluster.num_clusters} of {files.num_rows / cluster.num_clusters:.1f} rows, "
        f"balance {cluster.balance}, at most {cluster.iterations} iterations",
        f"out        {out}",
    ]


def assignment_lines(
    files: "FeatureFiles", clusters: "Sweep", arguments: Namespace, config: Config
) -> list[str]:
    """Describe what would be assigned to what."""
    rows = "centred and normalised" if clusters.view.normalise else "as they are"
    how = "under their prices" if arguments.prices else "to the nearest centroid"
    return [
        *work_lines(files, config),
        f"clusters   {len(clusters.centroids)} of {Path(arguments.assign_to).resolve()}, {how}; "
        f"rows are taken {rows}",
        f"out        {Path(arguments.out).resolve()}",
    ]


def work_lines(files: "FeatureFiles", config: Config) -> list[str]:
    """Describe the features and who reads them."""
    block_rows = config.cluster.block_rows
    return [
        f"features   {files.num_rows} rows of width {files.dim} in {len(files.paths)} files, "
        f"{files.num_bytes} bytes",
        f"workers    {config.parallel.num_workers}, {len(files.blocks(block_rows))} blocks of "
        f"{block_rows} rows",
    ]


def print_summary(summary: dict[str, object], out: Path) -> None:
    """Print the figures, except lists with a value per cluster; summary.json has those."""
    for name, value in summary.items():
        if not isinstance(value, list):
            print(f"{name:<24} {value}")
    print(f"{'written to':<24} {out}")


if __name__ == "__main__":
    run_job(main)
