"""What a study would do, told before anything is done: runs, shared stages, images, cost."""

from moce_dist.config import Config
from moce_dist.study.plan import STAGES, Plan, stages_of
from moce_dist.study.request import arm_config


def forecast(plan: Plan) -> list[str]:
    """Describe a plan in lines: every run with its stages, every arm with its cost, the sum."""
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
    lines.append("arms       images of mae, then; TFLOP of training, of clusters; as if alone")
    for name, arm in study.arms.items():
        names = dict.fromkeys(cell.run for cell in plan.cells if cell.arm == name)
        first = plan.runs[next(iter(names))]
        cost = first.cost(stages_of(arm.backbone, arm_config(study, arm), paid=True))
        tasks = dict.fromkeys(cell.task for cell in plan.cells if cell.arm == name)
        lines.append(
            f"  {name}: {arm.backbone} of {len(names)} runs, {len(tasks)} tasks; "
            f"{cost.mae_images:,} + {cost.moce_images:,} images; {cost.training / 1e12:,.1f} + "
            f"{cost.clustering / 1e12:,.1f} TFLOP{_hours(cost.flop, rate, first.config)}"
        )
    workers = next(iter(plan.runs.values())).config
    lines.append(
        f"in all     {total / 1e12:,.1f} TFLOP{_hours(total, rate, workers)}, without fits"
    )
    return lines


def _hours(flop: int, rate: float | None, config: Config) -> str:
    workers = config.parallel.num_workers
    return f", {flop / rate / workers / 3600:,.1f} h on {workers} workers" if rate else ""
