"""README names only what exists: files, functions, commands, flags, make targets."""

import itertools
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from in_process import run_here

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, "k8s/README.md": (ROOT / "k8s" / "README.md").read_text()}
MADE = ("RUN/", "runs/", "REGISTRY/", "/")
COMMANDS = sorted(
    {
        (page, command)
        for page, text in PAGES.items()
        for command in re.findall(
            r"(?:python|torchrun --nproc-per-node \d+) (jobs/\w+\.py[^`\n]*)",
            text.replace("\\\n", ""),
        )
    }
)


@cache
def help_of(job):
    done = run_here(Path(job).stem, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
    folder = (ROOT / page).parent
    quoted = re.findall(r"`([\w./-]+)`", PAGES[page])
    indented = re.findall(r"^ {4}.*?((?:jobs|configs|k8s)/[\w./-]+)", PAGES[page], re.M)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    linked = [link for link in links if not link.startswith("#")]
    paths = {p for p in quoted if "/" in p and not p.startswith(MADE)} | {*indented, *linked}
    paths -= {"moce.dist/expert-group"}
    assert len(paths) > 5
    missing = [p for p in sorted(paths) if not (ROOT / p).exists() and not (folder / p).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_a_page_has_its_heading(page):
    headings = re.findall(r"^#+ (.+)$", PAGES[page], re.M)
    anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGES[page])) <= anchors


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_of_a_job_has_its_flags_and_files(page, command):
    job, *words = shlex.split(command, comments=True)
    for word in words:
        if word.startswith("--"):
            assert word in help_of(job), f"{page}: {command}"
    for flag, value in itertools.pairwise(words):
        if flag == "--config":
            assert (ROOT / value).is_file(), f"{page}: {command}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, re.M))
    assert {"pretrain", "test", "doctor"} <= named <= targets


def test_reading_order_exists_and_names_every_chapter():
    order = README.split("## Reading order")[1].split("Imports point")[0]
    files = re.findall(r"`([\w/]+\.py)`", order)
    assert all((ROOT / name).is_file() for name in files)
    chapters = {Path(name).parts[1] for name in files if name.startswith("moce_dist/")}
    assert {
        "model",
        "data",
        "cluster",
        "parallel",
        "train",
        "transfer",
        "launch",
        "run",
    } <= chapters


def test_functions_that_answer_a_question_stand_where_it_says():
    answers = re.findall(r"`(moce_dist/[\w/]+\.py)`, `(\w+)`", README)
    assert len(answers) >= 4
    for path, name in answers:
        assert re.search(rf"^ *(def|class) {name}\b", (ROOT / path).read_text(), re.M), name
    assert "engine.backward(" in (ROOT / "moce_dist" / "train" / "loop.py").read_text()


def test_results_say_what_was_measured():
    table = README.split("## Results")[1]
    for row in re.findall(r"^\| (?!what|---)(.+)$", table, re.M):
        assert re.search(r"measured|not reproduced", row), row
