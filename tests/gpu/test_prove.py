"""The script that a GPU machine is proved with runs here, small, section by section."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moce_dist.config import load_config
from moce_dist.cost.budget import budget

SCRIPT = Path(__file__).with_name("prove.py")
PARTS = {
    "ceilings", "grouped", "collectives", "step", "repeatable", "loop", "decode", "clustering",
}  # fmt: skip


@pytest.fixture(scope="module")
def prove():
    spec = importlib.util.spec_from_file_location("prove", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(1800)
def test_every_section_runs_without_a_gpu(tmp_path):
    out, terms = tmp_path / "proof.json", tmp_path / "terms.json"
    done = subprocess.run(
        # a test must not depend on how busy the machine is
        [sys.executable, SCRIPT, "--out", out, "--terms", terms, "--minutes", "50"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    proof = json.loads(out.read_text())
    sections = proof["sections"]
    assert sections.keys() == PARTS and proof["machine"]["device"] == "cpu"
    assert {name for name, found in sections.items() if "skipped" in found} <= {"decode"}
    counts = ("[4, 4]", "[0, 4]", "[4, 0]", "[0, 0]")
    assert sections["grouped"].keys() >= {f"{w} {c}" for w in ("own", "base") for c in counts}
    for kind in ("dense_8", "cluster_8"):
        found = sections["step"][kind]
        assert found["images_per_s"] > 0 and found["predicted_memory_gib"] > 0
    tensors = sections["repeatable"]["deterministic"]
    assert tensors == sections["repeatable"]["default"]
    assert tensors["tensors"] > 50 and tensors["differing"] == 0
    assert sections["loop"]["checkpoints"][0] == "step_00000024"
    assert sections["clustering"]["whole"]["rows"] == 4000
    # every finding is a line
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(s, name) for line in lines for s, found in line.items() for name in found} == {
        (s, name) for s, found in sections.items() for name in found
    }
    # what a CPU does says nothing about hardware that a budget is for
    assert proof["terms"] == {} and not terms.exists()


def test_section_that_takes_too_long_is_killed_and_fails(prove, tmp_path):
    proof = prove.Proof(tmp_path / "proof.json", None)
    proof.note("step", "dense_128", {"images_per_s": 1.0})
    prove.supervise("step", 1.0, str(tmp_path), proof)
    found = json.loads((tmp_path / "proof.json").read_text())["sections"]["step"]
    assert found["dense_128"] == {"images_per_s": 1.0} and found["error"] == "killed after 1 s"
    assert proof.status() == 1


@pytest.mark.parametrize(
    ("section", "status"), [("step", 1), ("grouped", 1), ("repeatable", 1), ("decode", 0)]
)
def test_proof_of_nothing_fails(prove, tmp_path, section, status):
    proof = prove.Proof(tmp_path / "proof.json", None)
    proof.note("ceilings", "memory_gb_s", 1.0)
    assert proof.status() == 0
    proof.note(section, "skipped", "No module named 'deepspeed'")
    assert proof.status() == status


def test_measured_terms_are_read_by_budgets(prove, tmp_path):
    terms = tmp_path / "terms.json"
    terms.write_text('{"decode_images_s": 650.0}')
    proof = prove.Proof(tmp_path / "proof.json", terms)
    proof.note("ceilings", "terms", {"bf16_tflops": 700.0, "memory_gb_s": 3000.0})
    proof.note("step", "terms", {"bf16_tflops": 690.0, "utilisation": 0.5})
    proof.note("step", "terms", {"host_ms": 1.5})
    found = budget(load_config(None, [f"hardware.terms={terms}"]))
    assert found.hardware.bf16_tflops == 690 and found.hardware.utilisation == 0.5
    parts = (found.compute(), found.host(), found.optimiser(), found.loader())
    assert {part.source for part in parts} == {"measured"}
