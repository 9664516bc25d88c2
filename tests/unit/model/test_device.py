"""A device that is asked for must not be replaced by another."""

import pytest
import torch

from moce_dist.config import load_config
from moce_dist.model.device import check_gpu, choose_device, training_device
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


def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("moce_dist.model.device.DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    automatic = load_config(None, []).parallel
    assert choose_device(automatic).type == "cpu" and not caplog.text
    (tmp_path / "nvidia0").touch()
    assert choose_device(load_config(None, ["parallel.use_gpu=false"]).parallel).type == "cpu"
    assert not caplog.text
    assert choose_device(automatic).type == "cpu" and "driver" in caplog.text
    with pytest.raises(ConfigError, match=r"parallel\.use_gpu \(True\).*driver"):
        check_gpu(load_config(None, ["parallel.use_gpu=true"]).parallel)
    # whoever names the visible GPUs may mean none
    caplog.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device(automatic).type == "cpu" and not caplog.text


def test_a_fit_asks_for_repeatable_kernels_and_warns_where_there_are_none(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("moce_dist.parallel.engine.init_distributed", _no_group)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    asked = (
        torch.are_deterministic_algorithms_enabled,
        torch.is_deterministic_algorithms_warn_only_enabled,
    )
    try:
        for flags, wanted in (
            ((), (False, False)),
            (("parallel.deterministic=true",), (True, True)),
        ):
            with pytest.raises(RuntimeError, match="no group"):
                join(load_config(None, flags))
            assert tuple(ask() for ask in asked) == wanted
        training_device(load_config(None, ["parallel.deterministic=true"]).parallel)
        assert tuple(ask() for ask in asked) == (True, False)
    finally:
        torch.use_deterministic_algorithms(False)


def _no_group(*_):
    raise RuntimeError("no group")


def test_more_processes_than_gpus_of_a_host_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    parallel = load_config(None, ["parallel.num_workers=4"]).parallel
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(parallel) == torch.device("cuda", 1) and len(chosen) == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"parallel\.num_workers \(4\): a host with 2 GPUs"):
        choose_device(parallel)
