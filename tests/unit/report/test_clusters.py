"""Clusters on the page and in the summary: their figures, domains, pictures, and damages."""

import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moce_dist.report.figures import cluster_sizes
from moce_dist.report.page import write_report
from moce_dist.report.record import Clusters, read_record
from moce_dist.report.summary import summary_lines

from .parsed import Page


def test_clusters_are_shown_by_their_images_centroids_and_sizes(finished):
    folder = finished / "clusters"
    count = len(read_record(finished).clusters.sizes)
    np.save(folder / "centroids.npy", np.eye(count, 8, dtype=np.float32))
    (folder / "summary.json").write_text(json.dumps({"sizes_without_balance": [7] * count}))
    (folder / "gallery").mkdir()
    Image.new("RGB", (20, 10), (200, 10, 10)).save(folder / "gallery" / "cluster-00000.jpg")
    page = Page(write_report(finished))
    # two strips over time, and the sheet
    assert page.tags.count("svg") == 19 and page.tags.count("img") == 3
    assert "without balance" in page.text and "distance between centroids" in page.text
    assert page.fetched == []


def test_figures_of_the_clusters_are_told(finished):
    figures = {
        **{"nmi": 0.4321, "sizes_without_balance": [7] * 11 + [523]},
        **{"centroid_distance_min": 0.25, "centroid_distance_median": 0.5},
        **{"label_nmi": 0.1234, "labelled": 400, "num_labels": 2, "labels": [{"<7>": 25}]},
    }
    (finished / "clusters" / "summary.json").write_text(json.dumps(figures))
    page, summary = Page(write_report(finished)).text, "\n".join(summary_lines(finished))
    for part in (
        "mutual information of clusters and domains: 0.432",
        "mutual information of clusters and labels: 0.123 (400 images have one of 2 labels)",
        "; labels <7> 50 %",
        "without balance they would have 7 to 523 images",
        "distance of a centroid to the nearest other: 0.500 (median), 0.250 (least)",
    ):
        assert part in page and part in summary


def test_images_of_very_many_clusters_and_domains_stay_small(finished):
    folder, count = finished / "clusters", 3000
    draws = np.random.default_rng(0)
    cluster = np.repeat(np.arange(count), 4)
    table = {
        "key": [f"domain-{i % 40}/{i:06d}" for i in range(len(cluster))],
        "shard": ["000000.tar"] * len(cluster),
        "cluster": cluster.astype(np.int32),
        "distance": np.zeros(len(cluster), np.float32),
    }
    pq.write_table(pa.table(table), folder / "assignments.parquet")
    np.save(folder / "centroids.npy", draws.standard_normal((count, 16)).astype(np.float32))
    free = draws.multinomial(len(cluster), draws.dirichlet(np.ones(count)))
    mixes = [Counter(f"domain-{i % 40}" for i in range(4 * c, 4 * c + 4)) for c in range(count)]
    summary = {"sizes_without_balance": free.tolist(), "domains": mixes}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "gallery").mkdir()
    for shown in range(0, count, 12):
        sheet = folder / "gallery" / f"cluster-{shown:05d}.jpg"
        Image.new("RGB", (20, 10), (200, 10, 10)).save(sheet)
    path = write_report(finished)
    page = Page(path)
    assert read_record(finished).problems == []
    listed = re.findall(r"<tr><td>(\d+)</td>", path.read_text())
    assert [int(cluster) for cluster in listed] == list(range(0, count, 12))
    # strips over time, and sheets
    assert page.tags.count("img") == 2 + 40
    assert page.tags.count("svg") == 19
    assert "without balance" in page.text and "512 of 3000" in page.text
    assert "domain-0 25 %, domain-1 25 %, domain-2 25 %, domain-3 25 %" in page.text
    assert path.stat().st_size < 2 * 2**20


def test_mixes_of_other_images_are_not_shown(finished):
    path = finished / "clusters" / "summary.json"
    summary = json.loads(path.read_text())
    assert read_record(finished).clusters.counts.shape == (12, 6)
    summary["domains"][3]["digits"] = 1000
    path.write_text(json.dumps(summary))
    clusters = read_record(finished).clusters
    assert clusters.domains == ["all images"] and clusters.sizes.tolist() == [50] * 12
    assert "main domain" not in "\n".join(summary_lines(finished))


def test_very_many_domains_are_the_most_frequent_and_the_others(finished):
    path = finished / "clusters" / "summary.json"
    mixes = [{f"d{c}": 3, **{f"{c}/{i}": 1 for i in range(47)}} for c in range(12)]
    path.write_text(json.dumps({"domains": mixes}))
    assert read_record(finished).clusters.counts.shape == (12, 12 * 48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moce_dist.cluster.domains.MOST_DOMAINS", 12)
        clusters = read_record(finished).clusters
        # a summary of the clustering has no others
        path.write_text(json.dumps({"domains": [{f"d{c}": 3} for c in range(12)]}))
        listed = read_record(finished).clusters
    assert listed.domains == clusters.domains
    assert listed.counts.tolist() == clusters.counts.tolist()
    assert read_record(finished).clusters.domains == ["all images"]
    assert clusters.domains == [*(f"d{c}" for c in range(12)), "others"]
    assert clusters.counts[5].tolist() == [0] * 5 + [3] + [0] * 6 + [47]


def test_many_domains_are_few_colours(finished):
    record = read_record(finished)
    counts = np.arange(12 * 40).reshape(12, 40)
    clusters = Clusters([f"domain-{i}" for i in range(40)], counts)
    [drawn] = cluster_sizes(clusters)
    assert "domain-7<" in drawn and "domain-8<" not in drawn and "32 others" in drawn
    assert "others" not in cluster_sizes(record.clusters)[0]


def test_any_name_of_a_folder_can_be_a_domain():
    names = ["price_$5_to_$10", "_drafts", "a$x_$b"]
    [drawn] = cluster_sizes(Clusters(names, np.ones((4, 3), np.int64)))
    assert all(name in drawn for name in names)


@pytest.mark.parametrize(
    "summary",
    [
        "[]",
        '{"domains": [3]}',
        '{"labels": [[]]}',
        '{"labels": [3]}',
        '{"labels": [{"a": "b"}]}',
        "[" * 10**5,
    ],
)
def test_damaged_images_of_clusters_are_named(finished, summary):
    (finished / "clusters" / "centroids.npy").write_text("no array")
    (finished / "clusters" / "summary.json").write_text(summary)
    text = Page(write_report(finished)).text
    assert "could not read clusters/centroids.npy" in text
    assert "could not read clusters/summary.json" in text
