"""README names only what exists: files, functions, commands, flags, make targets."""

import re
from pathlib import Path

import pytest
from documented import commands_of, mistakes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {
    page: (ROOT / page).read_text()
    for page in (
        *("README.md", "CHANGELOG.md", "k8s/README.md", "configs/README.md"),
        *("configs/studies/README.md", "jobs/benches/README.md"),
    )
}
MADE = ("RUN/", "runs/", "REGISTRY/", "/")
COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands_of(text)]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
    folder = (ROOT / page).parent
    quoted = re.findall(r"`([\w./-]+)`", PAGES[page])
    indented = re.findall(r"^ {4}.*?((?:jobs|configs|k8s)/[\w./-]+)", PAGES[page], re.M)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    linked = [link for link in links if not link.startswith("#")]
    paths = {p for p in quoted if "/" in p and not p.startswith(MADE)} | {*indented, *linked}
    paths -= {"moce.dist/expert-group"}
    assert len(paths) > 3
    missing = [p for p in sorted(paths) if not (ROOT / p).exists() and not (folder / p).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_a_page_has_its_heading(page):
    headings = re.findall(r"^#+ (.+)$", PAGES[page], re.M)
    anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGES[page])) <= anchors


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=str)
def test_every_command_exists_with_its_flags_and_settings(page, command):
    assert mistakes(command) == []


@pytest.mark.parametrize("page", PAGES)
def test_no_command_or_setting_is_missed(page):
    found = [command for where, command in COMMANDS if where == page]
    settings = {word.partition("=")[0] for command in found for word in command.words}
    called = r"(?:\bpython|\btorchrun(?: \S+)*? --) (-m moce_dist|[\w./-]+\.py)"
    assert {*re.findall(called, PAGES[page])} <= {command.program for command in found}
    assert {*re.findall(r"--set\s+'?([\w.]+)=", PAGES[page])} <= settings


def test_commands_are_found_in_blocks_over_lines_and_within_sentences():
    page = (
        "First `python jobs/study.py --jobs\n2`, then:\n\n"
        "    ray job submit -- \\\n        python jobs/pretrain.py --set 'data.source=folder:/a b' "
        "\\\n        --run a      # compare: jobs/report.py a b\n"
        "    torchrun --nproc-per-node 8 -- jobs/pretrain.py --stage mae\n"
        "    python k8s/size.py --gpus 8 > file\n\n"
        "The same with `--set a.b=1 --set c=2`; `python -m moce_dist routes --dense mae\\|control`."
    )
    assert [(*command,) for command in commands_of(page)] == [
        ("", ("--set", "a.b=1", "--set", "c=2"), False),
        ("-m moce_dist", ("routes", "--dense", "mae|control"), False),
        ("jobs/pretrain.py", ("--set", "data.source=folder:/a b", "--run", "a"), True),
        ("jobs/pretrain.py", ("--stage", "mae"), True),
        ("jobs/report.py", ("a", "b"), False),
        ("jobs/study.py", ("--jobs", "2"), False),
        ("k8s/size.py", ("--gpus", "8"), True),
    ]


STUDY = "python jobs/study.py --config configs/studies/small.yaml --out a"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python jobs/absent.py", "jobs/absent.py: no such file"),
        ("python jobs/pretrain.py --absent", "unrecognized arguments: --absent"),
        ("torchrun --nproc-per-node 8 -- jobs/pretrain.py --absent", "arguments: --absent"),
        ("python jobs/pretrain.py --stage absent", "invalid choice: 'absent'"),
        ("python jobs/studies/small_data.py --outs a", "are required: --out"),
        ("python -m moce_dist absent", "invalid choice: 'absent'"),
        ("python -m moce_dist routes runs/a --absent", "unrecognized arguments: --absent"),
        ("python -m moce_dist onnx runs/a", "are required: --out"),
        ("python k8s/size.py --config configs/quickstart.yaml --absent", "arguments: --absent"),
        ("python jobs/pretrain.py --config absent.yaml", "absent.yaml: No such file"),
        ("python jobs/pretrain.py --set mae.absent=3", "mae.absent = 3: unknown key"),
        ("python jobs/pretrain.py --set mae.epochs=many", "mae.epochs = many: input"),
        ("python jobs/pretrain.py --set parallel.num_workers=3", "(3) must be a multiple"),
        ("python jobs/pretrain.py --set bench.rounds=3", "bench = {'rounds': 3}: unknown"),
        ("python jobs/pretrain.py --set transfer.detect_epochs=3", "has another name now"),
        ("python jobs/bench.py step --set bench.absent=3", "bench.absent = 3: unknown key"),
        (f"{STUDY} --set mae.epochs=3", "mae = {'epochs': 3}: unknown key"),
        (f"{STUDY} --set config.mae.epochs=many", 'mae.epochs = "many": input'),
    ],
)
def test_a_wrong_command_is_noticed(command, said):
    (found,) = commands_of(f"    {command}\n")
    assert said in "; ".join(mistakes(found))


@pytest.mark.parametrize(
    ("quoted", "said"),
    [
        ("jobs/absent.py", "no such file"),
        ("jobs/ingest.py --against --absent", "--absent"),
        ("jobs/bench.py NAME --absent", "--absent"),
        ("python -m moce_dist onnx --absent", "--absent"),
        ("python -m moce_dist routes --dense mae|absent", "invalid choice: 'absent'"),
        ("--set mae.absent=3", "mae.absent = 3: unknown key"),
        ("--set bench.rounds=none", "bench.rounds = none: input"),
    ],
)
def test_a_wrong_quotation_is_noticed(quoted, said):
    (found,) = commands_of(f"See `{quoted}`.")
    assert said in "; ".join(mistakes(found))


@pytest.mark.parametrize(
    "quoted",
    [
        "jobs/bench.py NAME",
        "jobs/ingest.py --against",
        "jobs/pretrain.py --set",
        "jobs/transfer.py --seeds N",
        "python -m moce_dist onnx",
    ],
)
def test_a_quotation_may_leave_words_out(quoted):
    (found,) = commands_of(f"See `{quoted}`.")
    assert mistakes(found) == []


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
    for table in (README.split("## Results")[1], PAGES["jobs/benches/README.md"]):
        for row in re.findall(r"^\| (?!what|---)(.+)$", table, re.M):
            assert re.search(r"measured|not reproduced", row), row
