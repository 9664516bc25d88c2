"""The script that a GPU machine is proved with runs here, small, section by section."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("prove.py")


def test_every_section_runs_without_a_gpu(tmp_path):
    out = tmp_path / "proof.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", out],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert sections.keys() == {
        "ceilings", "grouped", "collectives", "step", "repeatable", "decode", "clustering",
    }  # fmt: skip
    assert {name for name, section in sections.items() if "skipped" in section} == {"decode"}
    assert sections["grouped"]["counts"].keys() == {"[4, 4]", "[0, 4]", "[4, 0]", "[0, 0]"}
    assert sections["step"]["cluster_8"]["images_per_s"] > 0
    assert len(done.stdout.splitlines()) == len(sections)
