"""Tests that need a GPU skip themselves where there is none; slow folders run side by side."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark tests with the `gpu` mark as skipped, without importing torch where there are none.

    A folder besides `unit` is one group to `--dist loadgroup`: its tests share warm processes or a
    finished run, and stay in order in one process.
    """
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder != "unit":
            item.add_marker(pytest.mark.xdist_group(folder))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
