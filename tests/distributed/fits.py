"""Fits on a pool's processes: tiny backbones, tasks from real files, laws without draws."""

from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from moce_dist.config import load_config
from moce_dist.run.directory import StoppedError
from moce_dist.train.pulse import Pulse
from moce_dist.transfer import fit
from moce_dist.transfer.backbone import run_backbone
from moce_dist.transfer.classification import finetune
from moce_dist.transfer.classification.task import Classification
from moce_dist.transfer.detection import finding
from moce_dist.transfer.detection import fit as detect
from moce_dist.transfer.detection.task import Detection
from moce_dist.transfer.kinds import kind_named
from moce_dist.transfer.predict import load_model
from moce_dist.transfer.ranks import join
from moce_dist.transfer.segmentation import fit as segment
from moce_dist.transfer.segmentation import upernet
from moce_dist.transfer.segmentation.task import Segmentation
from moce_dist.transfer.skips import record_skips

TINY = (
    "model.size=tiny", "model.width=32", "model.num_heads=2", "model.depth=4",
    "data.image_size=32", "model.patch_size=8", "data.loader_processes=0",
    "parallel.precision=fp32", "cluster.batch_size=3",
    "transfer.finetune.epochs=2", "transfer.finetune.warmup_epochs=1",
    "transfer.finetune.batch_size=12", "transfer.finetune.drop_path=0",
    "transfer.finetune.mixup=0", "transfer.finetune.cutmix=0", "transfer.finetune.base_lr=1",
    "transfer.segmentation.crop=32", "transfer.segmentation.steps=6",
    "transfer.segmentation.batch_size=5", "transfer.segmentation.channels=8",
    "transfer.segmentation.lr=0.05",
    "transfer.detection.size=64", "transfer.detection.channels=8", "transfer.detection.rois=8",
    "transfer.detection.window=5", "transfer.detection.drop_path=0", "transfer.detection.lr=0.01",
)  # fmt: skip


class KilledError(Exception):
    """Stands for the end of the process."""


def _sgd(model, *_, **__):
    return torch.optim.SGD(
        [
            {"params": [p], "lr_scale": 1 / (1 + i % 3), "weight_decay": 0.0}
            for i, p in enumerate(model.parameters())
        ],
        lr=0.0,
        fused=True,
    )


def _settled_model(task, trial, made=detect.make_model):
    """A detector that draws nothing."""
    model = made(task, trial)
    for part in (model.rpn, model.roi_heads):
        # every anchor and proposal is taken
        part.fg_bg_sampler.batch_size_per_image = 10**6
    return model


def _settled_loss(model, device, made=detect.make_loss):
    """A loss that is a mean over images whatever the parts."""
    loss_of = made(model, device)

    def of(squares, targets):
        each = [loss_of(squares[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
        return torch.stack(each).mean()

    return of


def _kill_before(step):
    whole = fit.seed_step

    def seed_step(seed, number):
        if number == step:
            raise KilledError
        whole(seed, number)

    return patch.object(fit, "seed_step", seed_step)


def _figures(fitted):
    """Measures; on the first rank also step (None in the test) and key of skipped images."""
    skipped = [(each.get("step"), each["key"]) for each in fitted.skipped]
    return {**fitted.measures, **({"skipped": skipped} if skipped else {})}


def _run(kind, root, config, machine, kept, out):
    opened, work = kind_named(kind)
    task = opened.open({"segment": "ade20k", "detect": "coco"}.get(kind, "imagefolder"), root)
    backbone = run_backbone("random", config, None)
    trial = fit.Trial(backbone, config.transfer, machine, "finetune", 3, out, kept)
    fitted = work.fit(task, trial)
    if kind != "detect":
        return _figures(fitted)
    if machine.rank == 0:
        record_skips(kept.folder / "faults.jsonl", fitted.skipped)
    return fitted.figures


def fit_task(kind, root, out, overrides, adam=False, kill=None, ask=None, save_every=2, views=None):
    """Fit a tiny ViT; return the measures, or what ended the fit early.

    Without `adam` by SGD, whose steps are linear in the gradient, and a detector without its draws.
    The last rank alone says stop when it is asked for the `ask`th time.
    """
    config = load_config(None, [*TINY, *overrides])
    machine, asked = join(config), []

    def should_stop():
        asked.append(None)
        return machine.rank == machine.num_ranks - 1 and len(asked) == ask

    out = Path(out)
    kept = fit.Kept(out, "a", save_every, views, pulse=Pulse(should_stop))
    with ExitStack() as patches:
        patches.enter_context(patch.object(segment, "_DROP_PATH", 0.0))
        patches.enter_context(patch.object(upernet, "_DROPOUT", 0.0))
        if not adam:
            patches.enter_context(patch.object(finetune, "layered_adamw", _sgd))
            patches.enter_context(patch.object(upernet.Segmenter, "optimizer", _sgd))
            patches.enter_context(patch.object(detect, "make_optimizer", _sgd))
            patches.enter_context(patch.object(detect, "make_model", _settled_model))
            patches.enter_context(patch.object(detect, "make_loss", _settled_loss))
        if kill is not None:
            patches.enter_context(_kill_before(kill))
        try:
            return _run(kind, Path(root), config, machine, kept, out / "seen")
        except (KilledError, StoppedError, ValueError, FloatingPointError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            # what rank 0 wrote is there when any rank says that it is done
            dist.barrier()


def ruined_fit(kind, root, out, overrides, **options):
    """Fit; after the last step the weights are numbers that cannot be summed."""
    whole = fit.finish

    def finish(fitting, machine, kept):
        with torch.no_grad():
            for parameter in fitting.model.parameters():
                parameter.fill_(1e37)
        return whole(fitting, machine, kept)

    with patch.object(fit, "finish", finish):
        return fit_task(kind, root, out, overrides, **options)


def graphs_left(kind, root, out, overrides):
    """Name the buffers that hold a graph after the steps of a fit: memory would grow with them."""
    whole, found = fit.finish, []

    def finish(fitting, machine, kept):
        found.extend(name for name, buffer in fitting.model.named_buffers() if buffer.requires_grad)
        return whole(fitting, machine, kept)

    with patch.object(fit, "finish", finish):
        fit_task(kind, root, out, overrides)
    return found


def _noting(module, name, notes):
    """Have a function of a module note its arguments."""
    whole = getattr(module, name)

    def function(*arguments, **named):
        notes.append(arguments)
        return whole(*arguments, **named)

    return patch.object(module, name, function)


def images_used(**options):
    """Fit a detector; return its figures and the keys of what this rank learnt, saw and scored."""
    learnt, seen, scored = [], [], []
    with (
        _noting(detect, "training_square", learnt),
        _noting(finding, "find_in", seen),
        _noting(finding, "results_of", scored),
    ):
        figures = fit_task("detect", **options, adam=True)
    boxes = [each.key for each, *_, kind in scored if kind == "bbox"]
    keys = [[a[0].key for a in learnt], [a[1].key for a in seen], boxes]
    return figures, *keys


def _measure_detector(model, instances, machine, out):
    entries = []
    with _noting(finding, "average_precision", entries):
        found = finding.evaluate(model, instances, machine, out)
    faults = [(fault.key, fault.reason) for fault in found.unread]
    return found.measures(), faults, [(kind, results) for _, results, kind in entries]


def measure_saved(kind, root, folder, overrides):
    """Measure a saved model on the ranks together; of a detector also what the first one scored."""
    config = load_config(None, [*TINY, *overrides])
    machine = join(config)
    model, _ = load_model(Path(folder))
    out = Path(folder).parent / f"by{machine.num_ranks}"
    if kind == "detect":
        return _measure_detector(model, Detection.read("coco", Path(root)), machine, out)
    backbone = run_backbone("random", config, None)
    if kind == "classify":
        task = Classification.open("imagefolder", Path(root))
        return finetune.evaluate(model, backbone, task, machine)
    window = segment.Window(config.transfer.segmentation.crop)
    scenes = Segmentation.read("ade20k", Path(root))
    return segment.evaluate(model, scenes, backbone, window, machine, out)
