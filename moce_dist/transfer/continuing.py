"""Further steps (`further.py`) as they are asked for and sent to the ranks; nothing heavy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moce_dist.config import Config, ParallelConfig
from moce_dist.run.directory import Run
from moce_dist.train.job import MoreSteps
from moce_dist.train.pulse import Pulse
from moce_dist.transfer.request import Request, further_of


@dataclass(frozen=True)
class FurtherJob:
    """The further steps of one backbone, as they are sent to the ranks.

    Ranks that torchrun started do not know `steps`; the first one tells them. None: they are done.
    """

    place: Run
    config: Config
    folder: Path
    steps: MoreSteps | None = None

    @property
    def run_root(self) -> Path:
        """The run, or where its transfers write."""
        return self.place.out or self.place.root

    @property
    def out(self) -> str:
        """Where it writes, seen from there."""
        return str(self.folder.relative_to(self.run_root))

    @property
    def name(self) -> str:
        """What the job is called."""
        return self.out.replace("/", "-")

    @property
    def parallel(self) -> ParallelConfig:
        """How many workers there are to be, and in which groups."""
        return self.config.parallel

    @property
    def batch_size(self) -> int:
        """Images of a step, which every number of workers below the full one divides."""
        return self.config.transfer.continued.stage(self.config.moce, 1.0).batch_size

    def run(self, pulse: Pulse) -> None:
        """Train to the end on this rank; collective over all ranks."""
        from moce_dist.train.loop import pretrain
        from moce_dist.transfer.ranks import from_first, join

        steps = from_first(self.steps, join(self.config))
        if steps is not None:
            pretrain(steps, pulse)

    def progress(self) -> str:
        """Say how far the training is; "" before its first line."""
        return self.steps.progress() if self.steps else ""


Train = Callable[[FurtherJob], None]


def further_folder(run: Run, request: Request, backbone: str) -> Path:
    """Return the folder of a backbone's further steps."""
    images = request.continue_images
    if further_of(backbone) == "all":
        return (run.out or run.root) / "control_more" / str(images)
    name = backbone.replace(":", "-")
    return run.transfer(request.folder) / "continued" / f"{name}-{images}"


def further_jobs(run: Run, config: Config, request: Request) -> dict[str, FurtherJob]:
    """List the further steps that a request needs, by backbone, for ranks that know no more."""
    return {
        name: FurtherJob(run, config, further_folder(run, request, name))
        for name in request.backbones
        if further_of(name)
    }
