"""Which numbers of workers a stage may run on.

Letters: R workers, G expert groups.
"""


def legal_worker_counts(
    num_groups: int, batch_size: int, micro_batches: int, most: int | None = None
) -> list[int]:
    """Numbers of workers R <= `most` (4 G) that host G groups evenly and divide the batch."""
    counts = range(1, (4 * num_groups if most is None else most) + 1)
    return [
        r
        for r in counts
        if (r % num_groups == 0 or num_groups % r == 0)
        and batch_size % (max(r, num_groups) * micro_batches) == 0
    ]
