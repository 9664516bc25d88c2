"""Run one process of a benchmark on several ranks; `harness.run_ranks` starts it.

python -m benches.rank MODULE:FUNCTION OUT < configuration as JSON
"""

import importlib
import json
import sys
from pathlib import Path

import torch

from benches.settings import make_bench_config
from moce_dist.cli import quiet_libraries


def main() -> None:
    """Call the function on the configuration; rank 0 writes its result to OUT."""
    quiet_libraries()
    function, out = sys.argv[1:]
    module, _, name = function.partition(":")
    config = make_bench_config(json.load(sys.stdin))
    torch.set_num_threads(config.parallel.threads_per_worker)
    from moce_dist.model.device import choose_device
    from moce_dist.parallel.engine import init_distributed

    init_distributed(choose_device(config.parallel))
    result = getattr(importlib.import_module(f"benches.{module}"), name)(config)
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
