"""Tests that need a GPU skip themselves where there is none."""

import pytest


def pytest_collection_modifyitems(items):
    """Mark tests with the `gpu` mark as skipped, without importing torch where there are none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
