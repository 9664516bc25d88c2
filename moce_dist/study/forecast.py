"""The forecast of a study, before anything is run: runs, shared stages, images, cost."""

from statistics import fmean

from moce_dist.config import Config
from moce_dist.cost.sizes import training_flop
from moce_dist.study.plan import STAGES, StudyPlan
from moce_dist.transfer.request import further_of


def forecast(plan: StudyPlan) -> list[str]:
    """Describe a plan in lines: every run with its stages, every arm with its cost, the total."""
    study, rate = plan.study, plan.study.flop_per_s
    lines = [f"runs       {len(plan.runs)}, {len(plan.pieces)} pieces of work"]
    total = 0
    for run in plan.runs.values():
        own = [stage for stage in STAGES if run.makers.get(stage) == run.name]
        taken = [f"{stage} of {maker}" for stage, maker in run.makers.items() if maker != run.name]
        flop = run.cost(tuple(own)).flop
        total += flop
        shared = f"; takes {', '.join(taken)}" if taken else ""
        lines.append(
            f"  {run.name}: {', '.join(own) or 'none to train'}, {flop / 1e12:,.1f} TFLOP{shared}"
        )
    lines.append(
        "arms       images of mae, then; TFLOP of training, of clusters: a run, as if alone"
    )
    for name, arm in study.arms.items():
        runs = plan.runs_of(name)
        costs = [plan.cost(name, run) for run in runs]
        mae, moce, training, clustering = (
            fmean(getattr(cost, field) for cost in costs)
            for field in ("mae_images", "moce_images", "training", "clustering")
        )
        tasks = {cell.task for cell in plan.cells if cell.arm == name}
        lines.append(
            f"  {name}: {arm.backbone} of {len(runs)} runs, {len(tasks)} tasks; "
            f"{mae:,.0f} + {moce:,.0f} images; {training / 1e12:,.1f} + "
            f"{clustering / 1e12:,.1f} TFLOP{_hours(training + clustering, rate, runs[0].config)}"
        )
    if further := _further_flop(plan):
        lines.append(f"further    {further / 1e12:,.1f} TFLOP of continued training for the tasks")
        total += further
    workers = next(iter(plan.runs.values())).config
    lines.append(
        f"in all     {total / 1e12:,.1f} TFLOP{_hours(total, rate, workers)}, without fits"
    )
    return lines


def _further_flop(plan: StudyPlan) -> int:
    """Return the FLOPs of all further steps; `+all` is trained once for all tasks of a run."""
    flop, shared = 0, set()
    for piece in plan.pieces:
        if piece.request is None or not (images := piece.request.continue_images):
            continue
        for backbone in piece.request.backbones:
            key = (piece.run, backbone, images)
            if not (kind := further_of(backbone)) or key in shared:
                continue
            if kind == "all":
                shared.add(key)
            flop += images * training_flop(piece.config)
    return flop


def _hours(flop: float, rate: float | None, config: Config) -> str:
    workers = config.parallel.num_workers
    return f", {flop / rate / workers / 3600:,.1f} h on {workers} workers" if rate else ""
