"""Locks, Makefile, continuous integration and packaging agree with each other."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moce_dist.samples import carriers

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in pairs}


def make(*targets):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", "--dry-run", *targets],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )


def test_lock_holds_a_fitting_version_of_every_dependency():
    locked = pins("constraints.txt")
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"sys_platform": "linux"}):
            version = locked[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, text


def test_lock_holds_what_the_dependencies_need():
    locked = pins("constraints.txt")
    todo = [Requirement(text) for text in PROJECT["dependencies"]]
    seen = set()
    while todo:
        requirement = todo.pop()
        extras = sorted(requirement.extras) or [""]
        key = (canonicalize_name(requirement.name), *extras)
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if key in seen or not is_needed:
            continue
        seen.add(key)
        assert key[0] in locked, f"{key[0]} is not in constraints.txt: make lock"
        for text in metadata.requires(requirement.name) or []:
            child = Requirement(text)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                child.marker = None
                todo.append(child)


def test_lock_holds_nothing_else_by_name():
    assert not {"tensorflow", "keras", "pyright", "hypothesis"} & set(pins("constraints.txt"))


def test_checkov_is_locked_apart_from_what_it_would_hold_back():
    assert "checkov" in pins("checkov.txt") and "checkov" not in pins("constraints.txt")
    # as where nothing is installed yet
    done = make("--what-if=checkov.txt", "test").stdout
    assert done.index("-r checkov.txt") < done.index("not long")


def test_sample_packages_are_the_versions_that_the_reader_knows():
    assert pins("samples.txt") == {
        canonicalize_name(name): version for name, version in carriers.VERSIONS.items()
    }


@pytest.mark.parametrize("target", ["pretrain", "test", "test-long", "check", "format", "doctor"])
def test_make_target_is_runnable_and_names_existing_jobs(target):
    done = make(target)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"jobs/\w+\.py", done.stdout)
    assert all((ROOT / job).is_file() for job in jobs)
    assert len(jobs) == (5 if target == "pretrain" else 0)


def test_set_up_is_tied_to_what_it_installs():
    rule = re.search(r"^\$\(READY\): (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(rule[1].split()) == {"pyproject.toml", "constraints.txt", "samples.txt"}


def test_unusable_interpreter_is_refused_by_name(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "constraints.txt", "samples.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(
        ["make", "setup", "PYTHON=/bin/false"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode != 0 and "needs Python 3.11 or 3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_continuous_integration_runs_readmes_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text().splitlines()[-1]
    assert "make test " in (ROOT / "README.md").read_text()


def test_commit_hooks_run_what_make_check_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    run = set(re.findall(r"\.venv/bin/([\w-]+)", make("check").stdout)) - {"python"}
    assert entries == run == {"ruff", "mypy", "lint-imports"}


def test_wheel_carries_the_package_and_the_pages_template(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "moce_dist", source / "moce_dist")
    shutil.copytree(ROOT / "jobs", source / "jobs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        source,
    ]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "moce_dist/report/page.html.jinja" in names and "moce_dist/config/tree.py" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith("jobs")]


def private_names(path):
    """Functions and classes of the package that a test file takes although they are private."""
    tree = ast.parse(path.read_text())
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moce_dist")
    ]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    return {name for name in names if name.startswith("_")} | {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in names
        and node.attr.startswith("_")
        and node.attr != "_replace"
        and not node.attr.startswith("__")
    }


def test_tests_take_no_private_names_of_the_package(tmp_path):
    found = {
        path: names for path in (ROOT / "tests").rglob("*.py") if (names := private_names(path))
    }
    assert found == {}
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from moce_dist.train import loop\nfrom moce_dist.run.files import _a\nloop._b\n"
    )
    assert private_names(planted) == {"_a", "loop._b"}
