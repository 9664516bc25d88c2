"""What several laws compare: a step's whole batch, tensors of all ranks by name."""

import numpy as np

from moce_dist.data.batches import stream
from moce_dist.data.stream import StreamSpec


def global_batch(job, step=0):
    """The batch of a step as one process sees it."""
    spec = StreamSpec(
        job.plan(), job.config.data, job.config.num_patches, 1, 0,
        job.run_root / "faults.jsonl", "moce",
    )  # fmt: skip
    return next(stream(spec, lambda ids: np.zeros(len(ids), np.int64), start=step, stop=step + 1))


def assert_close(name, value, expected, norm, tolerance):
    limit = tolerance * max(np.linalg.norm(expected), 1e-3 * norm)
    assert np.linalg.norm(value - expected) <= limit, name


def merged(results, key):
    """Union of the ranks' tensors; replicas must agree to the bit."""
    union = {}
    for result in results:
        for name, value in result[key].items():
            if name in union:
                np.testing.assert_array_equal(union[name], value, err_msg=str(name))
            union[name] = value
    return union
