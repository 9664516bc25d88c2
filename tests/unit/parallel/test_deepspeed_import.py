"""DeepSpeed is imported without what its autotuner would import."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

ENGINE_ALONE = """
import sys
import moce_dist.parallel.engine, moce_dist.parallel.token
assert "deepspeed.autotuning.autotuner" in sys.modules
assert "mlflow" not in sys.modules and "pandas" not in sys.modules, "imported with DeepSpeed"
import mlflow
assert mlflow.log_metric
"""
MLFLOW_FIRST = """
import sys, mlflow
import moce_dist.parallel.engine
assert sys.modules["mlflow"] is mlflow
"""


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow")
@pytest.mark.parametrize("program", [ENGINE_ALONE, MLFLOW_FIRST], ids=["engine", "mlflow first"])
def test_mlflow_is_not_imported_with_deepspeed_and_can_be_used_after_it(program):
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
