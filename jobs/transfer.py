"""Give a downstream task its own dense ViT and compare it with others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moce_dist.cli import job_parser, quiet_libraries, run_job
from moce_dist.config import Config, load_config
from moce_dist.run import Run, resolve_run
from moce_dist.settings import ConfigError
from moce_dist.transfer.catalog import load_task
from moce_dist.transfer.request import (
    CLASSIFICATION,
    SEGMENTATION,
    Request,
    check_request,
    check_stages,
    open_request_run,
    parse_experts,
    parse_names,
)
from moce_dist.transfer.scenes import Scenes, check_scenes, read_scenes
from moce_dist.transfer.tasks import SEGMENTATION_TASKS, Task, check_images

DEFAULT_RUN = "quickstart"


def parse(argv: Sequence[str]) -> Any:
    """Parse the command line."""
    parser = job_parser(
        "Compare backbones on a downstream task; the MoCE is customised to the task first.",
        "python jobs/transfer.py --run runs/quickstart --task digits --protocol linear,knn",
    )
    parser.add_argument(
        "--task", metavar="NAME", help="digits, silhouettes, climate, imagefolder, ade20k"
    )
    parser.add_argument("--data", metavar="PATH", help="folder of imagefolder and ade20k")
    parser.add_argument(
        "--backbone", metavar="LIST", default="moce,mae", help="moce, mae, random, timm:NAME"
    )
    parser.add_argument("--protocol", metavar="LIST", help="finetune, linear, knn (default: all)")
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="fits of each kind")
    parser.add_argument("--experts", metavar="LIST", help="experts to take, one per MoE layer")
    return parser.parse_args(argv)


def make_request(args: Any, config: Config) -> Request:
    """Read the flags into a request; a recipe's task stands in for `--task`."""
    task = args.task or config.transfer.task
    if not task:
        raise ConfigError("--task: is missing, and the configuration names no transfer.task")
    every = SEGMENTATION if task in SEGMENTATION_TASKS else CLASSIFICATION
    return Request(
        task,
        Path(args.data) if args.data else None,
        parse_names(args.backbone, "--backbone"),
        parse_names(args.protocol, "--protocol") if args.protocol else every,
        args.seeds,
        parse_experts(args.experts),
    )


def list_task(request: Request) -> Task | Scenes:
    """List a task's files, checking their layout."""
    if request.is_segmentation:
        return read_scenes(request.task, request.data)
    return load_task(request.task, request.data)


def scan(task: Task | Scenes, config: Config) -> None:
    """Read all files of a task once, so that a damaged one is known before training."""
    if isinstance(task, Scenes):
        check_scenes(task, threads=config.data.loader_processes)
    else:
        check_images(task, threads=config.data.loader_processes)


def print_plan(request: Request, config: Config, run: Run | None) -> None:
    """Print what would be done."""
    transfer = config.transfer
    print(f"task       {request.task}")
    if request.needs_data and not request.data:
        print("data       --data is not given")
    else:
        task = list_task(request)
        sizes = f"{len(task.train)} training, {len(task.test)} test, {len(task.classes)} classes"
        print(f"data       {request.data or 'own images'}: {sizes}")
    print(f"run        {run.root if run else 'none given: the plan is that of the configuration'}")
    print(f"backbones  {', '.join(request.backbones)}, ViT {tuple(config.model.shape)}")
    print(f"experts    {request.experts or transfer.select}, MoE blocks {config.moe_layers}")
    print(f"protocols  {', '.join(request.protocols)}, {request.num_seeds} seeds")
    if request.is_segmentation:
        print(
            f"budget     {transfer.segment_steps} steps of {transfer.segment_batch_size} crops of "
            f"{transfer.segment_crop} pixels"
        )
    else:
        print(
            f"budget     finetune {transfer.finetune.epochs} epochs of batches of "
            f"{transfer.finetune.batch_size}, linear {transfer.linear_epochs} epochs, "
            f"knn {transfer.knn_k} neighbours"
        )


def print_table(metrics: dict[str, Any]) -> None:
    """Print mean and deviation per backbone and protocol."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{metrics['task']}: {metrics['metric']}")
    for column in ("backbone", "protocol", "mean", "std"):
        table.add_column(column)
    for row in metrics["summary"]:
        table.add_row(row["backbone"], row["protocol"], f"{row['mean']:.4f}", f"{row['std']:.4f}")
    Console().print(table)


def set_aside(folder: Path) -> None:
    """Rename a task's folder, so that a fresh start destroys nothing."""
    import time

    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder.rename(folder.with_name(f"{folder.name}.before-{stamp}"))


def main(argv: Sequence[str]) -> None:
    """Check the request, then carry it out."""
    args = parse(argv)
    config, run = load_config(args.config, args.overrides), None
    if args.run or not args.dry_run:
        root = resolve_run(args.run or DEFAULT_RUN, config)
        run, config = open_request_run(root, args.config, args.overrides)
    request = make_request(args, config)
    check_request(request, config)
    if run is not None:
        check_stages(request, run)
    if args.dry_run or run is None:
        print_plan(request, config, run)
        return
    task = list_task(request)
    scan(task, config)
    if args.fresh and run.transfer(request.task).exists():
        set_aside(run.transfer(request.task))
    quiet_libraries()
    from moce_dist.transfer.compare import Comparison, compare

    print_table(compare(Comparison(request, run, config, task)))


if __name__ == "__main__":
    run_job(main)
