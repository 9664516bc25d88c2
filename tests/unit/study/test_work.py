"""What the pieces of a study write into the run that they share."""

from dataclasses import replace

from moce_dist.config import read_resolved
from moce_dist.study.work import carry_out, prepare


def test_a_task_leaves_configuration_and_provenance_to_its_run(read, plan, tmp_path):
    tasks = [
        {"task": "imagefolder", "name": name, "data": "nowhere", "set": [f"transfer.knn_k={k}"]}
        for name, k in (("few", 3), ("many", 7))
    ]
    arms = {"control": {"backbone": "control"}}
    found = plan(read(tasks=tasks, arms=arms, seeds=[0], reference="control"))
    (run,) = found.runs.values()
    root = tmp_path / "run"
    pieces = [replace(piece, root=root, links=()) for piece in found.pieces if piece.request]
    assert [piece.config.transfer.knn_k for piece in pieces] == [3, 7]
    for piece in pieces:
        prepare(piece, run.config)
        files = [root / "config.yaml", root / "provenance.json"]
        before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
        assert "nowhere" in carry_out(piece).failure
        assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
        config = read_resolved(root / "config.yaml")
        assert config == run.config and config.control
