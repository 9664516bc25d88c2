"""jobs/pretrain.py whose checkpoints take seconds to write, all of them inside safetensors."""

import runpy
import sys
import time
from pathlib import Path

import torch

from moce_dist.train import saver

write, ballast = saver.save_file, torch.zeros(2**22)


def write_for_long(tensors, path):
    end = time.monotonic() + 4
    while time.monotonic() < end:
        write({**tensors, "ballast": ballast}, path)
    write(tensors, path)


saver.save_file = write_for_long
jobs = Path(__file__).parents[2] / "jobs"
# as when it is started itself
sys.path[0], sys.argv[0] = str(jobs), str(jobs / "pretrain.py")
runpy.run_path(sys.argv[0], run_name="__main__")
