"""The engine stays on the device that it was given, whatever the machine has."""

import os
import subprocess
import sys

CODE = """
import torch
from moce_dist.config import ParallelConfig
from moce_dist.parallel.engine import Engine, EngineSpec, init_distributed
from moce_dist.parallel.groups import Topology

device = torch.device("cpu")
init_distributed(device)
model = torch.nn.Linear(4, 2)
engine = Engine(
    model,
    [{"params": list(model.parameters())}],
    lambda groups: torch.optim.SGD(groups, lr=0.5, fused=True),
    EngineSpec(ParallelConfig(precision="fp32"), Topology(1, 1), 1, 1, 0.0),
)
before = model.weight.detach().clone()
engine.backward(engine.forward(torch.ones(3, 4)).sum())
engine.step()
assert engine.device == device and model.weight.device == device
torch.testing.assert_close(model.weight, before - 1.5)
"""


def test_cpu_rank_stays_on_its_cpu_where_deepspeed_would_choose_a_gpu():
    # what DeepSpeed's own choice comes to on a machine with GPUs
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
