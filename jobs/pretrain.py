"""Run the stages: MAE, features, clusters, cluster-sharded tars, experts, control.

python jobs/pretrain.py                                  the quickstart, on real images, no GPU
python jobs/pretrain.py --config configs/pretrain/vit_base.yaml --run base
python jobs/pretrain.py --run base                       go on with a run, with its own settings
python jobs/pretrain.py --fork runs/base --at 12000 --run lower --set mae.base_lr=5e-5
torchrun --nproc-per-node 8 -- jobs/pretrain.py --stage moce --config ... --run ...
"""

import json
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import interpreter  # noqa: F401 - says which Python to take

from moce_dist.cli import job_parser, quiet_libraries, run_job
from moce_dist.config import Config, DataConfig, ParallelConfig, checked, load_config, read_resolved
from moce_dist.cost import sizes
from moce_dist.cost.budget import budget, budget_lines
from moce_dist.data.columns import open_index
from moce_dist.data.shards import INDEX_NAME
from moce_dist.data.sources import expand_shards, list_folder, parse_source
from moce_dist.run.artefacts import COMPLETE
from moce_dist.run.directory import (
    Run,
    base_control,
    base_of,
    check_base,
    check_identity,
    open_run,
    resolve_run,
    set_aside,
)
from moce_dist.run.environment import is_first_process, local_path
from moce_dist.run.lease import hold
from moce_dist.run.names import one_line
from moce_dist.run.rows import fewer_text, steps_fewer
from moce_dist.settings import ConfigError
from moce_dist.train.fork import SHARED, Fork, fork_config, known_fork, make_fork, plan_fork
from moce_dist.train.trackers import check_trackers

STAGES = ("all", "mae", "cluster", "moce", "control")
TRAINED = ("mae", "moce", "control")
log = logging.getLogger(__name__)
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def main(argv: Sequence[str]) -> None:
    """Parse and check the request, then run the stages."""
    parser = job_parser(
        "Pre-train MoCE: mae -> features -> cluster -> reshard -> moce (-> control).",
        "python jobs/pretrain.py --config configs/quickstart.yaml --run quickstart",
    )
    parser.add_argument("--stage", choices=STAGES, default="all", help="run one stage only")
    parser.add_argument(
        "--fork", metavar="RUN", help="go on from a checkpoint of RUN, with its settings and --set"
    )
    parser.add_argument("--at", metavar="STEP", type=int, help="the step of that checkpoint")
    arguments = parser.parse_args(argv)
    check_fork_flags(arguments)
    root, config, fork = resolve(arguments)
    check_request(config, arguments.stage)
    check_base(config, root)
    if fork is None:
        check_init(config, root, arguments.stage, fresh=arguments.fresh)
    if arguments.fresh and "RANK" in os.environ:
        raise ConfigError("--fresh: not under torchrun, whose processes would all set it aside")
    is_new = fork is not None and (arguments.fresh or not (root / "config.yaml").is_file())
    if is_first_process() and not arguments.fresh and not is_new:
        check_identity(root, config)
    # the data of a fork that is not made yet are those of the other run
    data_root = Path(fork.run) if fork is not None and is_new else root
    if arguments.dry_run:
        plan = plan_lines(config, root, arguments.stage)
        print("\n".join([*plan, *fork_lines(fork), *missing_lines(config.data, data_root)]))
        return
    check_source(config.data, data_root)
    check_own_gpu(config.parallel)
    quiet_libraries()
    if is_first_process():
        log.info("run %s", root)
    from moce_dist.pipeline import Pipeline

    with hold(root):
        if fork is not None:
            if arguments.fresh and (root / "config.yaml").exists():
                set_aside(root)
            make_fork(fork, config, root)
        run = open_run(root, config, fresh=arguments.fresh and fork is None)
        what = "pretrain" if arguments.stage == "all" else arguments.stage
        getattr(Pipeline(run, config), what)()
    if os.environ.get("RANK", "0") == "0":
        print("\n".join([*loss_lines(run), f"done: {root}"]))


def resolve(arguments: Namespace) -> tuple[Path, Config, Fork | None]:
    """Return the run directory, its settings, and what it is forked from.

    Settings are those of --config, of the run that --run names, or of the run to fork. Without any
    of these, they are the quickstart's.

    Raises:
        ConfigError: there is no such run, or its settings are wrong.
    """
    # without a file, the overrides alone say where runs lie
    places = load_config(None, [o for o in arguments.overrides if o.startswith("run.root=")])
    if arguments.fork:
        root = resolve_run(arguments.run, places)
        source = resolve_run(arguments.fork, places, "--fork")
        fork = None if arguments.fresh else known_fork(source, arguments.at, root)
        config = fork_config(root if fork else source, arguments.overrides)
        if fork is None:
            fork = plan_fork(source, arguments.at, arguments.stage, config, root)
        return root, config, fork
    if arguments.run and not arguments.config:
        root = resolve_run(arguments.run, places)
        if (root / "config.yaml").is_file():
            config = checked(read_resolved(root / "config.yaml", arguments.overrides))
            return root, config, None
    path = Path(arguments.config or QUICKSTART)
    config = load_config(path, arguments.overrides)
    root = resolve_run(arguments.run or path.stem, config)
    if not arguments.config and root.name != QUICKSTART.stem:
        raise ConfigError(
            f"--run {arguments.run}: there is no run {root}; name --config to begin one, or "
            "--set run.root=DIR if it lies elsewhere"
        )
    return root, config, None


def check_fork_flags(arguments: Namespace) -> None:
    """Refuse flags that do not go together."""
    if (arguments.fork is None) != (arguments.at is None):
        raise ConfigError("--fork RUN and --at STEP go together")
    if arguments.fork and arguments.config:
        raise ConfigError("--config: not with --fork, which takes the settings of RUN and --set")
    if arguments.fork and not arguments.run:
        raise ConfigError("--run: a fork needs a folder of its own")


def fork_lines(fork: Fork | None) -> list[str]:
    """Describe what a fork takes from another run."""
    if fork is None:
        return []
    changed = "; ".join(fork.changed) or "no setting"
    return [
        f"forked     from {fork.checkpoint}: shares {', '.join(SHARED[fork.stage])}; "
        f"changes {changed}"
    ]


def check_request(config: Config, stage: str) -> None:
    """Refuse what is wrong before anything heavy is imported or written."""
    if not config.data.source:
        raise ConfigError("data.source = '': must name images, e.g. --set data.source=folder:PATH")
    for name, given in (("mae", config.mae), ("moce", config.moce)):
        if 0 < given.epochs < given.warmup_epochs:
            log.warning(
                "%s.warmup_epochs (%g): more than %s.epochs (%g), so the peak rate is not reached",
                *(name, given.warmup_epochs, name, given.epochs),
            )
    world_size = os.environ.get("WORLD_SIZE")
    if "RANK" in os.environ and world_size is not None:
        if stage not in TRAINED:
            raise ConfigError(f"--stage {stage}: under torchrun only {', '.join(TRAINED)}")
        batch_size = (config.mae if stage == "mae" else config.moce).batch_size
        legal = config.parallel.worker_counts(batch_size)
        if int(world_size) not in legal:
            raise ConfigError(
                f"parallel.num_workers ({config.parallel.num_workers}) must be the number of "
                f"processes that torchrun started ({world_size}); legal here: {legal}"
            )
    check_trackers(config.logging)
    if stage in ("all", "cluster") and config.cluster.encoder != "mae":
        # only the library of an encoder knows its names
        from moce_dist.train.encoder import check_encoder

        check_encoder(config)


def check_own_gpu(parallel: ParallelConfig) -> None:
    """Refuse to train in this process without the GPU that was asked for."""
    # the workers of a cluster check theirs
    is_local = parallel.num_workers == 1 and not os.environ.get("RAY_ADDRESS")
    if parallel.use_gpu is True and is_local:
        from moce_dist.model.device import check_gpu

        check_gpu(parallel)


def check_init(config: Config, root: Path, stage: str, *, fresh: bool) -> None:
    """Check the weights that stage mae is to start from, unless it has a checkpoint.

    Raises:
        ConfigError: there are none, or they do not fit the configured model.
    """
    begun = is_done(root, "mae") or any(root.glob("mae/checkpoints/step_*/manifest.json"))
    if config.model.init is None or stage not in ("all", "mae") or (begun and not fresh):
        return
    from moce_dist.train.pretrained import initial_weights

    initial_weights(config)


def is_done(root: Path, stage: str) -> bool:
    """Tell whether a stage of a run is finished, whatever it was made from."""
    return (root / stage / COMPLETE).exists()


def check_source(data: DataConfig, root: Path) -> None:
    """Refuse a source that holds nothing to train on, unless it was ingested before."""
    if is_done(root, "ingested"):
        return
    kind, _, rest = data.source.partition(":")
    if kind == "index":
        open_index(local_path(rest, "data.source = index:"))
        return
    kind, rest = parse_source(data.source)
    if kind == "folder":
        list_folder(Path(rest))
    if kind == "shards":
        expand_shards(rest, allow_pipes=data.allow_pipes)


def missing_lines(data: DataConfig, root: Path) -> list[str]:
    """Say what of local data is not here: a plan may be made on another machine than the run."""
    if "://" in data.source:
        return []
    try:
        check_source(data, root)
    except (ConfigError, OSError) as error:
        return [f"not here   {one_line(error)}"]
    return []


_CLUSTERS = {"features": "", "random": "drawn at random; ", "folder": "the first folders; "}


def plan_lines(config: Config, root: Path, stage: str) -> list[str]:
    """Describe what would run: stages, shapes, ranks, groups, bytes, and the budget of a step."""
    shape, parallel = config.model.shape, config.parallel
    ep_size = min(parallel.num_workers, parallel.num_groups)
    per_rank = f", {config.moe.num_experts // ep_size} experts of a layer on each rank"
    is_elastic = parallel.fewest_workers < parallel.num_workers
    fewest = f" (at least {parallel.fewest_workers})" if is_elastic else ""
    mae = "mae" if config.mae.epochs else f"mae (no step, the weights of {config.model.init})"
    every = ", ".join([mae, "cluster", "moce", *(["control"] if config.control else [])])
    return [
        f"run        {root}",
        f"stages     {every if stage == 'all' else mae if stage == 'mae' else stage}",
        *base_lines(config),
        *control_lines(config, stage),
        f"data       {config.data.source}, {config.data.image_size} px",
        f"encoder    width {shape.width}, depth {shape.depth}, heads {shape.num_heads}, "
        f"{sizes.num_visible(config)} of {config.num_patches + 1} tokens visible",
        expert_line(config),
        f"clusters   {config.cluster.num_clusters}, {_CLUSTERS[config.cluster.source]}"
        f"balance {config.cluster.balance}, features of {config.cluster.encoder}",
        f"ranks      {parallel.num_workers}{fewest} in {ep_size} places, "
        f"{parallel.num_groups} groups{per_rank if config.moe_layers else ''}",
        f"batch      mae {config.mae.batch_size}, moce {config.moce.batch_size}; "
        f"{config.moce.batch_size // parallel.num_workers} images a rank",
        f"state      about {budget(config).state().value:.2f} GiB a rank (weights, gradients "
        "with their copies, moments)",
        f"exchange   {sizes.image_bytes(config)} bytes an image and transfer",
        *budget_lines(config, num_images(Run(root).data(config))),
    ]


def num_images(index: Path) -> int | None:
    """Count the images of an index; None before they are ingested."""
    if not (index / INDEX_NAME).exists():
        return None
    return sum(shard.num_samples for shard in open_index(index).shards)


def base_lines(config: Config) -> list[str]:
    """Describe what is taken from the run that is continued, if there is one."""
    base = base_of(config)
    if base is None:
        return []
    is_priced = config.cluster.with_prices and (base.clusters / "prices.npy").is_file()
    how = "under their prices" if is_priced else "to the nearest centroid"
    return [
        f"goes on    from {base.root}: its encoder (stage mae trains nothing), its "
        f"{config.cluster.num_clusters} clusters (images are assigned {how}), its experts and gate",
    ]


def expert_line(config: Config) -> str:
    """Describe the experts of stage moce, and what chooses them."""
    if not config.moe_layers:
        return "experts    none (moe.kind dense)"
    chosen = "clusters" if config.moe.kind == "cluster" else "tokens, with DeepSpeed's own layer"
    blocks = list(config.moe_layers)
    return f"experts    {config.moe.num_experts} in each of blocks {blocks}, chosen by {chosen}"


def control_lines(config: Config, stage: str) -> list[str]:
    """Describe stage control, if it is requested."""
    if stage != "control" and not (stage == "all" and config.control):
        return []
    if config.moe.kind == "dense":
        return ["control    stage moce of a run without experts is the control itself"]
    base = base_of(config)
    folder = base_control(base)
    origin = "the MAE" if folder is None else str(folder)
    missing = f"; {base.root} has no control" if base is not None and folder is None else ""
    return [
        f"control    from {origin}{missing}: no experts, else the images, steps and schedule of "
        "stage moce"
    ]


def loss_lines(run: Run) -> list[str]:
    """List the held-out losses of the finished stages in one line; no line without a loss."""
    files = {stage: run.stage(stage) / "holdout.json" for stage in TRAINED}
    found = {stage: json.loads(f.read_text()) for stage, f in files.items() if f.exists()}
    fewer = steps_fewer({stage: holdout.get("steps") for stage, holdout in found.items()})
    losses = ", ".join(
        f"{stage} {holdout['loss']:.4f}{fewer_text(fewer.get(stage))}"
        for stage, holdout in found.items()
    )
    return [f"held-out loss: {losses}"] if found else []


if __name__ == "__main__":
    run_job(main)
