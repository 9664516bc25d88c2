"""Jobs of a transfer, such as further steps (`further.py`); imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from moce_dist.config import Config, ParallelConfig
from moce_dist.run.artefacts import fingerprint
from moce_dist.run.directory import Run
from moce_dist.train.job import MoreSteps
from moce_dist.train.pulse import Pulse
from moce_dist.transfer.request import Request, base_of, further_of


@dataclass(frozen=True)
class TransferJob:
    """What the jobs of a transfer share (`train/job.py`, `Job`): run and configuration."""

    place: Run
    config: Config

    @property
    def run_root(self) -> Path:
        """The run's folder, or the one that its transfers write to."""
        return self.place.output

    @property
    def parallel(self) -> ParallelConfig:
        """Number of workers, and their groups."""
        return self.config.parallel


@dataclass(frozen=True)
class FurtherJob(TransferJob):
    """The further steps of one backbone, as they are sent to the ranks.

    Ranks that torchrun started do not know `steps`; rank 0 sends them. If rank 0 has None, the
    steps are done.
    """

    folder: Path
    steps: MoreSteps | None = None

    @property
    def out(self) -> str:
        """Output folder, relative to `run_root`."""
        return str(self.folder.relative_to(self.run_root))

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.out.replace("/", "-")

    @property
    def batch_size(self) -> int:
        """Images of a step; any number of workers below the full one must divide it."""
        return self.config.transfer.continued.stage(self.config.moce, 1.0).batch_size

    def run(self, pulse: Pulse) -> None:
        """Train to the end on this rank; collective over all ranks."""
        from moce_dist.train.loop import pretrain
        from moce_dist.transfer.ranks import from_first, join

        steps = from_first(self.steps, join(self.config))
        if steps is not None:
            pretrain(steps, pulse)

    def progress(self) -> str:
        """Describe the progress of the training; "" before its first line."""
        return self.steps.progress() if self.steps else ""


def steps_name(config: Config, images: int | None) -> str:
    """Name further steps on all data: N, and how, where `transfer.continued` is not the default."""
    continued = config.transfer.continued
    how = "" if continued == type(continued)() else f"-{fingerprint(continued.model_dump())[:8]}"
    return f"{images}{how}"


def further_folder(run: Run, config: Config, request: Request, backbone: str) -> Path:
    """Return the folder of a backbone's further steps."""
    images = request.continue_images
    if further_of(backbone) == "all":
        return run.output / f"{base_of(backbone)}_more" / steps_name(config, images)
    name = backbone.replace(":", "-")
    return run.transfer(request.folder) / "continued" / f"{name}-{images}"


def further_jobs(run: Run, config: Config, request: Request) -> dict[str, FurtherJob]:
    """Return the jobs of the further steps that a request needs, by backbone, without `steps`."""
    return {
        name: FurtherJob(run, config, further_folder(run, config, request, name))
        for name in request.backbones
        if further_of(name)
    }
