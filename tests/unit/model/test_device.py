"""A device that is asked for must not be replaced by another."""

import pytest
import torch

from moce_dist.config import load_config
from moce_dist.model.device import choose_device
from moce_dist.settings import ConfigError
from moce_dist.transfer.loading import machine_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_and_fits_refuse_a_gpu_that_is_not_there():
    config = load_config(None, ["parallel.use_gpu=true"])
    for choose in (lambda: choose_device(config.parallel), lambda: machine_of(config)):
        with pytest.raises(ConfigError, match=r"parallel\.use_gpu"):
            choose()
