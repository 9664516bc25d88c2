"""Tests that need a GPU skip themselves where there is none; slow folders run side by side."""

import os
import signal
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest_plugins = ["range_server", "ranks", "started"]


def pytest_configure(config):
    """Let children be interrupted: background jobs of a shell ignore SIGINT, and pass that on.

    Hide GPUs unless only tests of GPUs were asked for, by `-m gpu` or by path.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # all other tests are about CPUs (`use_gpu: auto`, gloo, equal bits); torch reads this when it
    # first looks for GPUs, and so do the processes that tests start
    paths = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if config.option.markexpr != "gpu" and not all(HERE / "gpu" in [p, *p.parents] for p in paths):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark tests with the `gpu` mark as skipped, without importing torch where there are none.

    To `--dist loadgroup` tests that use `pools` are one group and share warm ranks; besides those
    and `unit` each file is one, and stays in order in one process.
    """
    for item in items:
        path = item.path.relative_to(HERE)
        if path.parts[0] != "unit":
            name = "ranks" if "pools" in item.fixturenames else str(path)
            item.add_marker(pytest.mark.xdist_group(name))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def timm_hub(tmp_path_factory):
    """A copy of timm's hub (HF_HOME) that holds one small ViT, its weights drawn at random."""
    import timm
    import torch
    from safetensors.torch import save_file

    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    torch.manual_seed(3)
    weights = timm.create_model("test_vit").state_dict()
    save_file(weights, repository / "snapshots" / ("0" * 40) / "model.safetensors")
    return home


@pytest.fixture
def timm_offline(timm_hub, monkeypatch):
    """Let this process find the models of `timm_hub`, and nothing on the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(timm_hub / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
