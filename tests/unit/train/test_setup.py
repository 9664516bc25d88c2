"""Settings of the training state that must not be ignored."""

import pytest
import torch

from moce_dist.config import load_config
from moce_dist.settings import ConfigError
from moce_dist.train.setup import worker_device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"parallel\.use_gpu"):
        worker_device(load_config(None, ["parallel.use_gpu=true"]))
