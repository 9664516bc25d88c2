"""An error of a rank that no restart cures reaches the driver as what it is."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray

from moce_dist.cli import FinalError
from moce_dist.config import ParallelConfig
from moce_dist.launch.training import train
from moce_dist.settings import ConfigError


@dataclass
class Failing:
    """A job whose ranks raise an error."""

    run_root: Path
    error: Exception
    name: str = "failing"
    batch_size: int = 2
    parallel: ParallelConfig = field(
        default_factory=lambda: ParallelConfig(num_workers=2, num_groups=1, use_gpu=False)
    )

    @property
    def folder(self):
        return self.run_root / "failing"

    def run(self, pulse):
        (self.folder / f"run-{os.getpid()}").touch()
        raise self.error

    def progress(self):
        return ""


@pytest.fixture(scope="module", autouse=True)
def embedded():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.shutdown()
        yield
        ray.shutdown()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("data.decode_on = 'device': is not installed"), ConfigError),
        (FloatingPointError("mae: loss is nan at step 3"), FinalError),
    ],
)
def test_a_rank_that_would_fail_again_ends_the_job_with_its_error(tmp_path, error, kind):
    with pytest.raises(kind) as caught:
        train(Failing(tmp_path, error))
    assert type(caught.value) is kind and str(caught.value) == str(error)
    # once on each rank at most
    assert 1 <= len([*(tmp_path / "failing").glob("run-*")]) <= 2
