"""Imports point one way, frameworks have one door, jobs start light (contracts: pyproject.toml)."""

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.api import read_configuration
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "moce_dist").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
HEAVY = ("torch", "ray", "deepspeed", "faiss", "timm", "scipy", "pyarrow", "matplotlib")
CONTRACTS = [
    options["id"]
    for options in read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
]


def calls(tree: ast.AST, name: str) -> list[int]:
    """Lines on which a bare function of this name is called."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, or of what an import names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.ImportFrom):
        return " ".join(f"{node.module}.{alias.name}" for alias in node.names)
    if isinstance(node, ast.Import):
        return " ".join(alias.name for alias in node.names)
    return node.id if isinstance(node, ast.Name) else ""


def imported_files(package):
    """File -> files of the package that it imports, in functions and for types too."""
    files = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    graph = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= named & files.keys() or {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = found & files.keys()
    return graph


def circles(graph):
    """Files that can be reached from themselves, each with those of its circle."""
    reached = {name: set(targets) for name, targets in graph.items()}
    while grown := {
        name: more
        for name, targets in reached.items()
        if (more := targets.union(*(reached[target] for target in targets))) != targets
    }:
        reached |= grown
    return {
        name: {other for other in targets if name in reached[other]}
        for name, targets in reached.items()
        if name in targets
    }


@pytest.fixture(autouse=True)
def loggers_as_before():
    """The linter's logging set-up turns off every logger that it finds."""
    yield
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.mark.parametrize("contract", CONTRACTS)
def test_import_contract_holds(contract, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = lint_imports(limit_to_contracts=(contract,), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_contracts_notice_a_wrong_import(tmp_path, monkeypatch, capsys):
    package = tmp_path / "moce_dist"
    for path in PACKAGE:
        copy = package / path.relative_to(ROOT / "moce_dist")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    with (package / "data" / "shards.py").open("a") as file:
        file.write("\n\ndef late():\n    import ray\n    import moce_dist.model.gate\n")
    lint = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command"
    done = subprocess.run(
        [sys.executable, "-c", f"{lint}; lint_imports_command()", "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "moce_dist.data.shards -> ray" in done.stdout
    assert "moce_dist.data.shards -> moce_dist.model.gate" in done.stdout


def test_no_file_imports_itself_by_way_of_others():
    assert circles(imported_files(ROOT / "moce_dist")) == {}


def test_a_circle_of_files_is_noticed_inside_functions_too(tmp_path):
    package = tmp_path / "moce_dist"
    package.mkdir()
    (package / "a.py").write_text("from moce_dist import b\n")
    (package / "b.py").write_text("def f():\n    from moce_dist.c import g\n")
    (package / "c.py").write_text("import moce_dist.a\n")
    (package / "d.py").write_text("import moce_dist.a\n")
    assert circles(imported_files(package)).keys() == {f"moce_dist.{n}" for n in "abc"}


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_job_imports_nothing_heavy_before_its_request_is_checked(job):
    code = (
        "import json, runpy, sys; sys.path.insert(0, 'jobs');"
        "runpy.run_path(sys.argv[1], run_name='job');"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(job)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_package_never_prints():
    printing = {
        str(path.relative_to(ROOT)): lines
        for path in PACKAGE
        if (lines := calls(ast.parse(path.read_text()), "print"))
    }
    assert printing == {}
    assert calls(ast.parse("def f():\n    print(1)"), "print") == [2]


def test_model_knows_no_process_group():
    for path in (ROOT / "moce_dist" / "model").glob("*.py"):
        names = [dotted(node) for node in ast.walk(ast.parse(path.read_text()))]
        assert not [name for name in names if "torch.distributed" in name], path


def test_init_files_re_export_nothing():
    # a configuration has one address, whichever file its sections stand in
    allowed = ROOT / "moce_dist" / "config" / "__init__.py"
    for path in PACKAGE:
        if path.name == "__init__.py" and path != allowed:
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and ast.get_docstring(ast.parse(path.read_text())), path


def test_modules_are_documented_and_readable_in_one_go():
    for path in PACKAGE:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path}: no docstring"
        assert len(text.splitlines()) <= 400, f"{path}: more than 400 lines"


def test_functions_fit_on_a_screen():
    for path in (*PACKAGE, *JOBS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path}:{node.lineno} {node.name}: {length} lines"


def test_a_training_imports_no_library_that_it_does_not_need():
    slow = "timm", "torchvision", "scipy.optimize"
    code = f"import sys, moce_dist.train.loop; print([m for m in {slow} if m in sys.modules])"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
