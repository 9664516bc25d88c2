"""A loader process that cannot go on is noticed at once, and says why in one line."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from moce_dist.data.loaders import load
from moce_dist.run.files import record_fault


class Faulty(Dataset):
    """Numbers; one of them does something else."""

    def __init__(self, action=None, size=1):
        self.action, self.size = action, size

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5 and self.action is not None:
            self.action()
        return torch.full((self.size,), index)


def batches(action=None, size=1, **options):
    return [int(batch[0]) for batch in load(Faulty(action, size), 2, batch_size=None, **options)]


def test_processes_give_the_same_in_the_same_order():
    here = [int(batch[0]) for batch in load(Faulty(), 0, batch_size=None)]
    assert batches() == here == list(range(8))


def test_a_killed_process_is_not_waited_for():
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* exited unexpectedly|Killed"):
        batches(lambda: os.kill(os.getpid(), signal.SIGKILL), stall_s=100)
    assert time.monotonic() - begin < 30


def test_a_process_that_delivers_nothing_is_given_up():
    message = r"the loader delivered nothing for data\.stall_timeout_s \(2 s\)"
    with pytest.raises(RuntimeError, match=message):
        batches(lambda: time.sleep(60), stall_s=2)


@pytest.mark.parametrize("message", ["sizes 3 and 4 differ\nsee the documentation", "short", ""])
def test_an_error_keeps_all_lines_of_its_message_as_one(message):
    def fail():
        raise ArithmeticError(message)

    with pytest.raises(ArithmeticError) as caught:
        batches(fail)
    assert str(caught.value) == message.replace("\n", " ")


def test_an_error_is_the_one_of_the_process_in_a_line(tmp_path):
    def write():
        record_fault(tmp_path, stage="mae")

    with pytest.raises(IsADirectoryError) as caught:
        batches(write)
    assert str(caught.value) == f"[Errno 21] Is a directory: '{tmp_path}'"


class Arrays(Dataset):
    """Images as numpy arrays, of which a loader process makes a batch in shared memory."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return np.zeros((3, 256, 256), np.float32)


def collated():
    return list(load(Arrays(), 2, batch_size=4, stall_s=100))


SMALL = """
import time
from test_loaders import batches, collated
begin = time.monotonic()
try:
    {call}
except OSError as error:
    print(error.errno, error.filename, error.strerror, time.monotonic() - begin < 30)
"""
SEND = "batches(size=2**20, stall_s=100)"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a /dev/shm of its own")
@pytest.mark.parametrize(
    ("size", "call"),
    [("1m", SEND), ("1m", "collated()"), ("4k", SEND)],
    ids=["to send a batch", "to collate a batch", "for a lock"],
)
def test_small_shared_memory_is_named_at_once(size, call):
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable,
         SMALL.format(call=call)],
        capture_output=True, text=True, cwd=os.path.dirname(__file__), check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.startswith("28 /dev/shm shared memory is too small"), done.stderr
    assert done.stdout.strip().endswith("True")
