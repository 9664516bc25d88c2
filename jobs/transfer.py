"""Give a downstream task its own dense ViT and compare it with others."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import interpreter  # noqa: F401 - says which Python to take

from moce_dist.cli import job_parser, quiet_libraries, run_job
from moce_dist.config import Config, ParallelConfig, SuiteEntry, load_config
from moce_dist.run.directory import Run, resolve_run
from moce_dist.run.environment import check_writable, local_path
from moce_dist.run.lease import hold
from moce_dist.run.names import typed
from moce_dist.run.rows import backbone_texts, value_text
from moce_dist.settings import ConfigError
from moce_dist.train.job import Job
from moce_dist.transfer.kinds import kind_of, task_names
from moce_dist.transfer.request import (
    Request,
    check_ranks,
    check_request,
    check_stages,
    check_suite,
    default_backbones,
    experts_of,
    open_request_run,
    parse_experts,
    parse_names,
)
from moce_dist.transfer.suite import (
    ALL,
    Order,
    TaskOutcome,
    attempt,
    carry_out,
    carry_out_away,
    collect,
    list_task,
    prepare,
)

DEFAULT_RUN = "quickstart"


def parse(argv: Sequence[str]) -> Any:
    """Parse the command line."""
    parser = job_parser(
        "Compare backbones on a downstream task; the MoCE is customised to the task first.",
        "python jobs/transfer.py --run runs/quickstart --task digits --protocol linear,knn",
    )
    parser.add_argument(
        "--task",
        metavar="NAME",
        help=f"{', '.join(task_names())}; all: the tasks of transfer.suite",
    )
    parser.add_argument(
        "--data", metavar="PATH", help="folder of a task's images; of those of a suite without one"
    )
    parser.add_argument(
        "--backbone",
        metavar="LIST",
        help="moce, moce:SELECT (as transfer.select), control, mae, random, timm:NAME (default: "
        "moce, and the control or, where the run has none, mae); with --continue-images also "
        "moce, control or mae +own or +train, and control or mae +all",
    )
    parser.add_argument(
        "--continue-images",
        metavar="N",
        type=int,
        help="train dense models on, on N images: +own of the task's clusters, +train of its "
        "training images alone, +all of all data",
    )
    parser.add_argument(
        "--protocol",
        metavar="LIST",
        help="finetune, linear, knn (default: these that the task takes); for classes also "
        "logistic, and logisticN with N labels per class",
    )
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="fits of each kind")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the task's folder, in place of RUN/transfer"
    )
    parser.add_argument("--experts", metavar="LIST", help="experts to take, one per MoE layer")
    return parser.parse_args(argv)


def make_request(args: Any, run: Run | None, config: Config) -> Request:
    """Make a request from the flags; without `--task`, take `transfer.task`."""
    task = args.task or config.transfer.task
    if not task:
        raise ConfigError("--task: is missing, and the configuration names no transfer.task")
    protocols = parse_names(args.protocol, "--protocol") if args.protocol else None
    return Request(
        task,
        # absolute, because workers run in folders of their own
        local_path(args.data, "--data").absolute() if args.data else None,
        parse_names(args.backbone, "--backbone")
        if args.backbone
        else default_backbones(run, config, continues=args.continue_images is not None),
        protocols or tuple(kind_of(task).protocols),
        args.seeds,
        parse_experts(args.experts),
        continue_images=args.continue_images,
    )


def open_configured(args: Any, overrides: Sequence[str] = ()) -> tuple[Run | None, Config]:
    """Read the configuration; if there is a run, lay it over the run's own."""
    every = [*args.overrides, *overrides]
    config = load_config(args.config, every)
    if args.run or not args.dry_run:
        root = resolve_run(args.run or DEFAULT_RUN, config)
        run, config = open_request_run(root, args.config, every)
        return (
            replace(run, out=local_path(args.out, "--out").resolve()) if args.out else run
        ), config
    return None, config


def make_orders(args: Any, run: Run | None, config: Config) -> list[Order]:
    """Make checked orders from the entries of a suite, or from the flags."""
    if (args.task or config.transfer.task) != ALL:
        orders = [Order(make_request(args, run, config), config, args.fresh)]
        if "RANK" not in os.environ:
            check_ranks(orders[0].request, config)
    else:
        check_suite(config.transfer.suite)
        orders = [suite_order(args, entry) for entry in config.transfer.suite]
    for order in orders:
        check_request(order.request, order.config)
    return orders


def suite_order(args: Any, entry: SuiteEntry) -> Order:
    """Make the order of one entry of a suite; its fields override the flags."""
    run, config = open_configured(args, entry.set)
    given = entry.data or (args.data if kind_of(entry.task).needs_data(entry.task) else None)
    flags = {**vars(args), "task": entry.task, "data": given}
    if entry.protocol:
        flags["protocol"] = ",".join(entry.protocol)
    elif args.protocol:
        # such as logistic regression, where this one task has several labels
        kind, names = kind_of(entry.task), parse_names(args.protocol, "--protocol")
        left = [name for name in names if kind.takes(name, entry.task) or not kind.takes(name, "")]
        flags["protocol"] = ",".join(left or names)
    request = make_request(Namespace(**flags), run, config)
    return Order(replace(request, name=entry.name), config, args.fresh)


def print_plan(request: Request, config: Config, run: Run | None) -> None:
    """Print what would be done."""
    transfer, kind = config.transfer, kind_of(request.task)
    print(f"task       {request.task}{f', called {request.name}' if request.name else ''}")
    if kind.needs_data(request.task) and not request.data:
        print("data       --data is not given")
    else:
        task = list_task(request, config)
        sizes = f"{len(task.train)} training, {len(task.test)} {transfer.evaluate}"
        print(f"data       {request.data or 'own images'}: {sizes}, {len(task.classes)} classes")
    print(f"run        {run.root if run else 'none given: the plan is that of the configuration'}")
    print(f"backbones  {', '.join(request.backbones)}, ViT {tuple(config.model.shape)}")
    select = transfer.select if config.moe.kind == "cluster" else experts_of(config)
    print(f"experts    {request.experts or select}, MoE blocks {config.moe_layers}")
    print(f"clusters   features of cluster.encoder {config.cluster.encoder}")
    if request.continue_images is not None:
        continued = transfer.continued.stage(config.moce, 1.0)
        steps = max(1, round(request.continue_images / continued.batch_size))
        print(f"continued  {steps} steps of {continued.batch_size} images, each that names + steps")
    print(f"protocols  {', '.join(request.protocols)}, {request.num_seeds} seeds")
    print(f"budget     {kind.plan(transfer)}")


def print_table(tables: Sequence[dict[str, Any]], title: str) -> None:
    """Print mean, deviation and difference to the reference per task, backbone and protocol."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("task", "metric", "protocol", "backbone", "mean", "difference", "to"):
        table.add_column(column)
    for metrics in tables:
        names = backbone_texts(metrics)
        other: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in metrics["differences"]:
            other.setdefault((row["backbone"], row["protocol"]), []).append(row)
        for row in metrics["summary"]:
            found = other.get((row["backbone"], row["protocol"]), [])
            # a mean of a suite covers only the tasks that have such fits
            metric = (
                f"mean over {row['num_tasks']} tasks" if "num_tasks" in row else metrics["metric"]
            )
            table.add_row(
                *(metrics["task"], metric, row["protocol"], names[row["backbone"]]),
                value_text(row),
                "\n".join(value_text(each, "+") for each in found),
                "\n".join(names[each["reference"]] for each in found),
            )
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def train_on_workers(job: Job) -> None:
    """Train the fits of a task, or the further steps before them, on all workers."""
    from moce_dist.launch.training import train

    train(job)


def run_task(run: Run, order: Order) -> dict[str, Any]:
    """Carry out a task, and return its metrics; {} on ranks of torchrun other than 0.

    Where the driver of a cluster has no GPU and the workers have, a worker does the driver's part.
    """
    if os.environ.get("RAY_ADDRESS") and "RANK" not in os.environ:
        from moce_dist.launch.away import call_away, lacks_gpu

        if lacks_gpu(order.config.parallel):
            return carry_out_away(run, order, train_on_workers, call_away)
    return carry_out(run, order, train_on_workers)


def attempts(parallel: ParallelConfig, run: Run, orders: Sequence[Order]) -> Iterator[TaskOutcome]:
    """Attempt all orders in parallel where there are several workers; yield how each ended."""
    from moce_dist.launch.tasks import hold_tasks, needs_ray

    if not needs_ray(parallel):
        yield from (attempt(run, order) for order in orders)
        return
    with hold_tasks(parallel, attempt, run) as start:
        for order, outcome in [(order, start(order)) for order in orders]:
            try:
                yield outcome.result()
            except Exception as error:  # noqa: BLE001 - of Ray, when a worker was lost too often
                yield TaskOutcome(order.request.folder, None, typed(error))


def run_suite(run: Run, config: Config, orders: Sequence[Order]) -> None:
    """Carry out all tasks on all workers, and print the results.

    Raises:
        RuntimeError: names the tasks that failed; the others are finished and reported.
    """
    quiet_libraries()
    orders = prepare(run, orders, train_on_workers)
    metrics = collect(run, attempts(config.parallel, run, orders))
    if metrics["summary"]:
        print_table([*metrics["tasks"], metrics], f"{len(metrics['tasks'])} tasks")
    if failed := metrics["failed"]:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise RuntimeError(f"{len(failed)} of {len(orders)} tasks failed: {reasons}")


def main(argv: Sequence[str]) -> None:
    """Check the request, then carry it out."""
    args = parse(argv)
    run, config = open_configured(args)
    orders = make_orders(args, run, config)
    is_suite = (args.task or config.transfer.task) == ALL
    if is_suite and "RANK" in os.environ:
        raise ConfigError("--task all: not under torchrun; its tasks have one worker each")
    if run is not None:
        for order in orders:
            check_stages(order.request, run, order.config)
    if run is not None and not args.dry_run:
        check_writable(run.transfer(orders[0].request.folder), "name another folder with --out")
    if args.dry_run or run is None:
        for order in orders:
            print_plan(order.request, order.config, run)
    elif is_suite:
        with hold(run.transfer(ALL)):
            run_suite(run, config, orders)
    elif metrics := run_task(run, orders[0]):
        print_table([metrics], f"{metrics['task']}: {metrics['metric']}")
        print("".join(f"{note}\n" for note in metrics["notes"]), end="")


if __name__ == "__main__":
    run_job(main)
