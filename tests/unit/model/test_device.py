"""A device that is asked for must not be replaced by another."""

import pytest
import torch

from moce_dist.config import load_config
from moce_dist.model.device import choose_device, training_device
from moce_dist.settings import ConfigError
from moce_dist.transfer.ranks import join


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ranks_of_pre_training_and_of_fits_refuse_to_do_without_a_gpu():
    config = load_config(None, ["parallel.use_gpu=true"])
    for begin in (lambda: training_device(config.parallel), lambda: join(config)):
        with pytest.raises(ConfigError, match=r"parallel\.use_gpu"):
            begin()
    # a driver may run where no GPU is
    assert choose_device(config.parallel).type == "cpu"
