"""The page and the summary: whole runs, unfinished runs, damaged runs."""

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from moce_dist.config import make_config
from moce_dist.report import figures
from moce_dist.report.figures import routing_changes
from moce_dist.report.page import write_report
from moce_dist.report.record import read_record
from moce_dist.report.summary import summary_lines, timing_rows
from moce_dist.report.tasks import half_widths
from moce_dist.run.directory import open_run, set_aside
from moce_dist.settings import ConfigError

from .conftest import moce_line, write_control, write_lines
from .parsed import Page

ROOT = Path(__file__).parents[3]


def test_page_of_a_finished_run_has_every_part(rendered):
    page = Page(rendered)
    for part in ("quickstart", "0.4211", "0.3987", "600", "MoE layer 1", "images per second"):
        assert part in page.text, part
    for part in ("digits", "climate", "0.9300 ± 0.0040", "seed: 3", "moe.num_experts: 4"):
        assert part in page.text, part
    assert page.tags.count("svg") == 19
    assert "missing" not in page.text.split("Artefacts")[0]


def test_run_that_goes_on_from_another_says_so_and_shows_its_empty_clusters(finished):
    text = (finished / "config.yaml").read_text()
    (finished / "config.yaml").write_text(text.replace("base_run: null", "base_run: /runs/old"))
    table = pq.read_table(finished / "clusters" / "assignments.parquet")
    kept = table.filter(pc.less(table["cluster"], 9))
    pq.write_table(kept, finished / "clusters" / "assignments.parquet")
    lines = summary_lines(finished)
    assert lines[1] == "goes on from the encoder, clusters and experts of /runs/old"
    assert not [line for line in lines if line.startswith("MAE loss")]
    assert "clusters: 12 of 0 to 50 images" in "\n".join(lines)
    assert [line for line in lines if line.startswith("  cluster   11: no images")]
    page = Page(write_report(finished))
    assert "Goes on from the encoder, clusters and experts of /runs/old" in page.text
    assert "MAE held-out loss" not in page.text and "no images" in page.text


def test_what_a_fresh_transfer_set_aside_is_shown_no_more(finished):
    before, folder = read_record(finished), finished / "transfer" / "digits"
    content = (folder / "metrics.json").read_text()
    set_aside(folder)
    assert "digits" not in {each["task"] for each in read_record(finished).transfers}
    folder.mkdir()
    (folder / "metrics.json").write_text(content.replace("0.93", "0.94"))
    after = read_record(finished)
    assert len(after.transfers) == len(before.transfers) and "digits" not in after.choices
    page = Page(write_report(finished)).text
    assert "0.9400 ± 0.0040" in page and "0.9300 ± 0.0040" not in page
    assert ".before-" not in page


def test_a_file_that_is_renamed_while_sizes_are_read_does_not_end_the_report(finished, monkeypatch):
    gone, stat = finished / "moce" / "routing" / ".step_9.json.1.tmp", Path.stat
    gone.write_text("{}")

    def vanish(path, **flags):
        if path == gone:
            raise FileNotFoundError(path)
        return stat(path, **flags)

    monkeypatch.setattr(Path, "stat", vanish)
    sizes = {each.name: each.bytes for each in read_record(finished).artefacts}
    assert sizes["routing tables"]


def test_control_stands_beside_the_moce(finished):
    write_control(finished)
    text, page = "\n".join(summary_lines(finished)), Page(write_report(finished))
    assert "control loss: 0.7000 -> 0.3342, held-out: 0.4001 on 60 images" in text
    assert "control held-out loss" in page.text and "0.4001" in page.text
    assert "stage control: MAE loss" in page.text
    for shown in (text, page.text):
        assert "moce - control, knn: +0.0100" in shown
        assert "mae (60 steps fewer)" in shown
    assert "control checkpoint" in page.text
    assert "differences are of one pre-training" in text


def test_one_seed_shows_no_deviation(finished):
    """A file of an older version, which gave it one of 0, among others."""
    for name, std in (("digits", 0.0), ("climate", None)):
        path = finished / "transfer" / name / "metrics.json"
        document = json.loads(path.read_text())
        document["results"] = [r for r in document["results"] if r["seed"] == 0]
        for row in [*document["summary"], *document["differences"]]:
            row["std"] = std
        path.write_text(json.dumps(document))
    text, page = "\n".join(summary_lines(finished)), Page(write_report(finished)).text
    for shown in (text, page.split("Mean ± standard deviation")[0]):
        assert "0.9300" in shown and "±" not in shown and "+-" not in shown


def test_a_single_backbone_is_compared_with_nothing(finished):
    """Neither a figure nor a best value; the other task keeps its own."""
    path = finished / "transfer" / "digits" / "metrics.json"
    document = json.loads(path.read_text())
    for name in ("results", "summary"):
        document[name] = [row for row in document[name] if row["backbone"] == "control"]
    path.write_text(json.dumps(document | {"differences": []}))
    text = write_report(finished).read_text()
    assert "Backbones of climate" in text and "Backbones of digits" not in text
    assert "Results of digits" in text
    assert len(re.findall(r'class="number best">', text)) == 2


def test_choice_of_a_task_is_told_with_how_sure_it_was(finished):
    text = " ".join(Page(write_report(finished)).text.split())
    assert "400 training images fell into these clusters" in text
    assert "cluster 4: 75 %" in text and "cluster 7: 25 %" in text
    assert "expert 2 91 % expert 0, 6 %" in text and "expert 2 37 % expert 0, 33 %" in text


def test_share_of_a_group_is_of_its_own_total(finished):
    """The plan is of an epoch and the count of the logged steps: their numbers do not compare."""
    path = finished / "moce" / "placement" / "step_200.json"
    document = json.loads(path.read_text())
    document["predicted_per_epoch"]["images_per_group"] = [4500.0, 5500.0]
    document["measured_in_interval"] = {
        **document["predicted_per_epoch"], "images_per_group": [88.0, 112.0],
    }  # fmt: skip
    path.write_text(json.dumps(document))
    text = " ".join(Page(write_report(finished)).text.split())
    assert "group 0 reads 45.0 % of the images as planned; of those counted: 44.0 %" in text
    assert "group 1 reads 55.0 % of the images as planned; of those counted: 56.0 %" in text


def test_whisker_is_students_interval_over_seeds():
    names = (("moce", 0.004), ("mae", None))
    summary = [{"backbone": b, "protocol": "knn", "mean": 0.9, "std": s} for b, s in names]
    rows = [{"backbone": "moce", "protocol": "knn", "seed": s, "value": 0.9} for s in range(5)]
    rows += [{"backbone": "mae", "protocol": "knn", "seed": 0, "value": 0.9}]
    # 2.776 is the quantile of 97.5 % for four degrees of freedom
    expected = {"moce": pytest.approx(2.776445 * 0.004 / 5**0.5)}
    assert half_widths({"summary": summary, "results": rows}, "knn") == expected
    assert half_widths({"summary": summary, "results": rows}, "linear") == {}
    # of a mean over tasks, the task with the fewest seeds counts
    of_tasks = [row | {"task": "a"} for row in rows] + [row | {"task": "b"} for row in rows[:3]]
    expected = {"moce": pytest.approx(4.302653 * 0.004 / 3**0.5)}
    assert half_widths({"summary": summary, "results": of_tasks}, "knn") == expected


def test_predicted_exchange_stands_beside_the_measured_one(rendered):
    text = " ".join(Page(rendered).text.split())
    assert "90.0 % 87.5 % 50.0 % 0" in text
    assert "group 0 reads 50.0 % of the images as planned; of those counted: -" in text
    assert "cluster 11, 50 % of it" in text


def test_time_is_split_by_what_the_lines_say(finished):
    lines = [
        {"step": s, "images_seen": 64 * (s + 1), "loss": 1.0, "lr": 0.1}
        | {"images_per_s": 64.0, "data_wait_s": 0.25, "save_s": 0.5 if s == 3 else 0.0}
        for s in range(4)
    ]
    path = finished / "mae" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [row, clustering, moce] = timing_rows(read_record(finished))
    assert row["time"] == "4 s" and row["parts"] == {"steps": 62.5, "waiting": 25, "saving": 12.5}
    assert clustering == {
        "stage": "clustering", "images": "600", "rate": "50", "time": "12 s", "parts": {},
    }  # fmt: skip
    assert moce["stage"] == "MoCE"
    (finished / "clusters" / "summary.json").write_text("{}")
    assert [row["stage"] for row in timing_rows(read_record(finished))] == ["MAE", "MoCE"]


def test_comparison_shows_fields_losses_and_tasks_of_both(finished, tmp_path):
    config = make_config({"seed": 3, "moe": {"num_experts": 4}, "mae": {"base_lr": 0.5}})
    other = open_run(tmp_path / "lower", config).root
    shutil.copytree(finished / "mae", other / "mae")
    (other / "mae" / "holdout.json").write_text('{"loss": 0.4111, "images": 60}')
    shutil.copytree(finished / "transfer" / "digits", other / "transfer" / "digits")
    path = write_report(finished, tmp_path / "page.html", other)
    text = " ".join(Page(path).text.split())
    assert "MAE: held-out loss 0.4211 0.4111 +0.0100" in text
    assert "MoCE: held-out loss 0.3987 - -" in text
    assert "mae.base_lr 0.00015 0.5" in text
    assert "digits, knn: moce 0.9300 ± 0.0040 0.9300 ± 0.0040 +0.0000" in text
    assert not (finished / "report.html").exists()


def test_page_fetches_nothing_and_runs_nothing(rendered):
    path = rendered
    page = Page(path)
    assert page.fetched == [] and "script" not in page.tags
    assert not re.search(r"@import|url\(['\"]?http", path.read_text())
    assert len(page.ids) == len(set(page.ids))


def test_references_inside_the_figures_lead_somewhere(rendered):
    text = rendered.read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    assert {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)} <= ids
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(svg)


def test_names_from_the_data_are_escaped(rendered):
    text = rendered.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "&lt;b&gt;.tar" in text


def test_same_run_gives_the_same_page(rendered):
    first = rendered.read_text()
    assert write_report(rendered.parent).read_text() == first


def test_best_value_of_a_column_is_marked(rendered):
    text = rendered.read_text()
    assert re.findall(r'class="number best">(\S+)', text) == ["0.7300"] * 2 + ["0.9300"] * 2


def test_routing_changes_count_entries_that_differ(finished):
    assert routing_changes(read_record(finished)) == ([100, 200], [3, 2])


def test_summary_of_a_finished_run(finished):
    text = "\n".join(summary_lines(finished))
    assert "MAE loss: 1.0000 -> 0.3599, held-out: 0.4211 on 60 images" in text
    assert "MoCE loss: 0.7000 -> 0.3342, held-out: 0.3987 on 60 images" in text
    assert "clusters: 12 of 50 to 50 images" in text
    assert re.search(r"cluster +0: digits \d+ %, ", text)
    assert re.search(r"MoE layer 0: (\d+ ){3}\d+\n", text)
    exchanged = [int(20 * math.exp(-step / 50)) for step in range(150, 300, 5)]
    local = 100 * (1 - sum(exchanged) / (30 * 2 * 64))
    assert f"second half: {local:.1f} % of images times layers; 50.0 % if placed" in text
    assert "clusters that changed an expert after step 0: 25 % (in 3 written tables)" in text
    assert "task digits, accuracy:" in text and "moce       0.9300 +- 0.0040" in text
    assert str(finished / "clusters" / "assignments.parquet") in text
    assert "faults: 2" in text


def test_images_per_expert_add_up_to_the_logged_batches(finished):
    experts = read_record(finished).stages["moce"].experts
    assert experts.shape == (60, 2, 4) and (experts.sum(axis=2) == 64).all()


def test_run_that_has_only_begun_says_what_is_missing(tmp_path):
    root = open_run(tmp_path / "new", make_config({})).root
    page = Page(write_report(root))
    for part in ("Nothing was trained yet.", "were not clustered yet", "No task was transferred"):
        assert part in page.text
    text = "\n".join(summary_lines(root))
    for part in ("MAE loss: not trained yet", "clusters: missing", "downstream tasks: none yet"):
        assert part in text


DAMAGES = {
    "mae/metrics.jsonl": '{"step": 1}\nnot json\n',
    "moce/metrics.jsonl": '{"loss": 1}\n',
    "mae/holdout.json": "[]",
    "moce/holdout.json": "{}",
    "moce/routing/step_100.json": "[[1, 2], [3]]",
    "moce/routing/step_200.json": "[1, 2]",
    "moce/gate/step_100.json": '{"chosen": [[1, 2]], "runner_up": [1]}',
    "moce/placement/step_100.json": "{}",
    "clusters/assignments.parquet": "PAR1",
    "transfer/digits/metrics.json": '{"task": "digits"}',
    "config.yaml": "seed: many",
    "provenance.json": "",
}


def test_damaged_files_are_named_and_the_rest_is_shown(finished):
    for name, content in DAMAGES.items():
        (finished / name).write_text(content)
    page, summary = Page(write_report(finished)), "\n".join(summary_lines(finished))
    for name in DAMAGES:
        assert f"could not read {name}: " in page.text and f"could not read {name}: " in summary
    assert "climate" in page.text and "task climate, accuracy:" in summary


def test_routing_tables_of_another_shape_are_left_out_of_the_changes(finished):
    (finished / "moce" / "routing" / "step_300.json").write_text("[[1, 2, 3]]")
    lines = "\n".join(summary_lines(finished))
    assert "clusters that changed an expert after step 0" in lines and "(in 3 written" in lines
    assert "clusters" in Page(write_report(finished)).text


def test_differences_and_failures_of_tasks_are_shown(finished):
    page = Page(write_report(finished))
    assert "moce - mae, knn: +0.0200 ± 0.0010" in page.text
    assert "Differences are of one pre-training" in page.text
    path = finished / "transfer" / "digits" / "metrics.json"
    document = json.loads(path.read_text()) | {"failed": {"cars": "ConfigError: no folder"}}
    del document["differences"]
    path.write_text(json.dumps(document))
    page = Page(write_report(finished))
    assert "failed: cars: ConfigError: no folder" in page.text


def test_experts_of_changing_number_are_a_damage(finished):
    line = '{"step": %d, "images_seen": 9, "loss": 1, "images_per_expert": %s}\n'
    (finished / "moce" / "metrics.jsonl").write_text(line % (1, "[[1]]") + line % (2, "[[1, 2]]"))
    assert [p.split(":")[0] for p in read_record(finished).problems] == ["moce/metrics.jsonl"]


def test_line_cut_off_by_a_kill_does_not_matter(finished):
    with (finished / "moce" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "lo')
    assert read_record(finished).problems == []


def test_values_that_are_not_finite_are_drawn_as_gaps(finished):
    with (finished / "mae" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "images_seen": 19264, "loss": NaN, "lr": 0.001}\n')
    assert Page(write_report(finished)).tags.count("svg") == 19


def run_job(*flags):
    return subprocess.run(
        [sys.executable, ROOT / "jobs" / "report.py", *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def test_job_writes_the_page_and_prints_the_summary(finished):
    done = run_job(finished)
    assert (done.returncode, done.stderr) == (0, "")
    assert (finished / "report.html").exists()
    assert done.stdout.splitlines()[:-1] == summary_lines(finished)


def test_job_refuses_what_is_no_run(tmp_path):
    done = run_job(tmp_path / "none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    with pytest.raises(ConfigError, match="is not a run directory"):
        summary_lines(tmp_path)
    assert run_job().returncode == 2


def test_stage_moce_of_a_run_without_experts_compares_with_the_control(finished, tmp_path):
    write_control(finished)
    other = open_run(tmp_path / "dense", make_config({"seed": 3, "moe": {"kind": "dense"}})).root
    shutil.copytree(finished / "control", other / "moce")
    (other / "moce" / "holdout.json").write_text('{"loss": 0.3900, "images": 60}')
    text = " ".join(Page(write_report(finished, tmp_path / "page.html", other)).text.split())
    assert "control: held-out loss 0.4001 0.3900 +0.0101" in text
    assert "MoCE: held-out loss 0.3987 - -" in text
    assert text.count("control: held-out loss") == 1


def test_means_over_fewer_tasks_are_marked_and_not_subtracted(finished, tmp_path):
    other = open_run(tmp_path / "other", make_config({"seed": 3, "moe": {"num_experts": 4}})).root
    for root, number in ((finished, 10), (other, 9)):
        rows = [
            {"backbone": b, "protocol": "knn", "mean": m, "std": None, "num_tasks": n}
            for b, m, n in (("moce", 0.5, number), ("control", 0.4, 9))
        ]
        change = {**rows[0], "reference": "control", "mean": 0.02, "num_tasks": 9}
        document = {"task": "all", "metric": "mean over tasks", "results": [], "summary": rows}
        (root / "transfer" / "all").mkdir(parents=True)
        path = root / "transfer" / "all" / "metrics.json"
        path.write_text(json.dumps({**document, "differences": [change]}))
    summary = "\n".join(summary_lines(finished))
    assert "moce       0.5000\n" in summary and "control    0.4000 (9 tasks)\n" in summary
    assert "moce - control, knn: +0.0200 over 9 tasks" in summary
    text = " ".join(Page(write_report(finished, tmp_path / "page.html", other)).text.split())
    assert "0.4000 (9 tasks)" in text and "+0.0200 over 9 tasks" in text
    assert "all, 9 tasks, knn: control 0.4000 0.4000 +0.0000" in text
    assert "all, 10 tasks, knn: moce 0.5000 - -" in text


def test_a_loss_after_fewer_steps_says_so(finished):
    for name, steps in (("mae", 60), ("moce", 120)):
        holdout = {"loss": 0.5, "images": 60, "steps": steps}
        (finished / name / "holdout.json").write_text(json.dumps(holdout))
    text = Page(write_report(finished)).text
    assert "MAE held-out loss (60 steps fewer)" in text and "MoCE held-out loss (" not in text
    assert "0.5000 on 60 images (60 steps fewer)" in "\n".join(summary_lines(finished))


def test_first_and_last_start_are_told(finished):
    starts = [{"time": f"2026-01-0{n}", "command": ["pretrain", str(n)]} for n in (1, 2, 3)]
    (finished / "provenance.json").write_text(json.dumps({**starts[-1], "starts": starts}))
    text = " ".join(Page(write_report(finished)).text.split())
    assert "started 2026-01-01 with pretrain 1; last continued 2026-01-03" in text


def test_images_per_expert_are_drawn_over_the_steps(finished):
    lines = [moce_line(step, np.random.default_rng(step)) for step in range(0, 20_000, 20)]
    write_lines(finished / "moce" / "metrics.jsonl", lines)
    drawn = figures.experts(read_record(finished))[0]
    assert max(int(tick) for tick in re.findall(r">(\d+)</text>", drawn)) == 15_000
