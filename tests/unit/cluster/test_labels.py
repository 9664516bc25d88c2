"""Classes from tars to the summary of a clustering: the mix of labels, and their information."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

from moce_dist.cluster.assign import run_clustering
from moce_dist.cluster.blocks import clean_label
from moce_dist.cluster.existing import assign_folder
from moce_dist.config import ClusterConfig
from moce_dist.data.shards import class_label, domain_of, scan_shard
from moce_dist.features.decoding import ShardImages
from moce_dist.features.extract import EncoderSpec, FeatureJob, begin_features, extract_shard
from moce_dist.report.record import Clusters
from moce_dist.report.summary import cluster_notes, label_mix

NO_LABELS = (None, True, ["a"], {"a": 1}, "", " ", "\ud800", "a\x1b[31m", "a\nb", "x" * 201)


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (20, 24), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def tar_of(path, samples, form=tarfile.PAX_FORMAT):
    """Write samples {member: bytes} one after the other."""
    with tarfile.open(path, "w", format=form) as tar:
        for key, members in samples:
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def build_encoder():
    return lambda images: images.flatten(1)[:, :3]


def extract(folder, tar, **more):
    """Index a tar, write its features, and return the labels beside them."""
    shard, _ = scan_shard(str(tar), path=tar.name)
    out = folder / "features"
    begin_features(out, {})
    images = ShardImages(shard, str(tar), 16, None, 4, **more)
    job = FeatureJob(images, tar.stem, out, folder / "faults.jsonl", EncoderSpec(build_encoder))
    extract_shard(None, job)
    path = out / f"{tar.stem}.labels.json"
    return json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("threads", [1, 3])
def test_labels_of_a_tar_stand_beside_its_features_wherever_they_are_in_it(tmp_path, form, threads):
    long = "0" * 60 + "/" + "k" * 90
    samples = [
        ("a/0", {"png": png(0), "cls": b"7"}),
        ("a/1", {"cls": b" 12\n", "json": b"{}", "png": png(1)}),
        ("a/2", {"png": png(2)}),
        (long, {"json": bytes(2000), "png": png(3), "cls": "Übersee".encode()}),
        ("a/4", {"png": b"no image", "cls": b"7"}),
    ]
    tar_of(tmp_path / "s.tar", samples, form)
    labels = extract(tmp_path, tmp_path / "s.tar", num_threads=threads)
    assert labels == ["7", "12", None, "Übersee", "7"]
    rows = np.load(tmp_path / "features" / "s.npy")
    tar_of(tmp_path / "t.tar", [(key, {"png": members["png"]}) for key, members in samples])
    assert extract(tmp_path, tmp_path / "t.tar", num_threads=threads) is None
    assert (np.load(tmp_path / "features" / "t.npy") == rows).all()


def test_labels_that_webdataset_wrote(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(6):
            image = Image.new("RGB", (20, 24), (number, 0, 0))
            writer.write({"__key__": f"{number:06d}", "png": image, "cls": number % 3})
    assert extract(tmp_path, tmp_path / "w.tar") == ["0", "1", "2", "0", "1", "2"]


@pytest.mark.parametrize("content", [b"", b"  ", b"\xff\xfe", b"x" * 3000, b"\x1b[31m", b"a\nb"])
def test_what_is_no_short_text_is_no_label(tmp_path, content):
    tar_of(tmp_path / "s.tar", [("0", {"png": png(0), "cls": content})])
    assert extract(tmp_path, tmp_path / "s.tar") is None
    assert class_label(b"no tar" * 200) is None


@pytest.mark.parametrize(("size", "labels"), [(60_000, ["7"]), (70_000, None)])
def test_large_members_are_not_read_for_a_label(tmp_path, size, labels):
    sample = {"png": png(0), "cls": b"7", "json": b" " * size}
    tar_of(tmp_path / "s.tar", [("0", sample)])
    assert extract(tmp_path, tmp_path / "s.tar") == labels


def test_labels_of_other_inputs_are_removed(tmp_path):
    tar_of(tmp_path / "s.tar", [("0", {"png": png(0), "cls": b"1"})])
    assert extract(tmp_path, tmp_path / "s.tar") == ["1"]
    begin_features(tmp_path / "features", {"encoder": "other"})
    assert not list((tmp_path / "features").glob("*.labels.json"))


def features_of(folder, labels):
    """Bare features of 3 blobs in two files, with labels beside them where there are any."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    blob = draws.integers(0, 3, 200)
    rows = (np.eye(3, 4)[blob] * 9 + draws.standard_normal((200, 4))).astype(np.float32)
    for name, part in (("a", slice(0, 90)), ("b", slice(90, 200))):
        np.save(folder / f"{name}.npy", rows[part])
        if labels is not None:
            (folder / f"{name}.labels.json").write_text(json.dumps(labels(blob)[part]))
    return blob


def clustered(tmp_path):
    config = ClusterConfig(num_clusters=3, block_rows=32, balance="off")
    out = tmp_path / "clusters"
    summary = run_clustering(tmp_path / "features", out, config, seed=1, subtract_mean=False)
    return summary, assignments(out)


def assignments(out):
    import pyarrow.parquet as pq

    return pq.read_table(out / "assignments.parquet")["cluster"].to_numpy()


def some_labels(blob):
    """Numbers, names and gaps: of every blob mostly one label, of which each fifth is another."""
    return [
        None if row % 7 == 0 else int(kind) if row % 5 else f"other {row % 2}"
        for row, kind in enumerate(blob)
    ]


def test_summary_tells_the_mix_of_labels_and_their_information(tmp_path):
    blob = features_of(tmp_path / "features", some_labels)
    summary, cluster = clustered(tmp_path)
    labels = np.array([str(label) for label in some_labels(blob)])
    known = labels != "None"
    expected = normalized_mutual_info_score(labels[known], cluster[known])
    assert summary["label_nmi"] == pytest.approx(expected)
    assert summary["labelled"] == known.sum() and summary["num_labels"] == 5
    assert "nmi" not in summary
    for number, mix in enumerate(summary["labels"]):
        names, counts = np.unique(labels[known & (cluster == number)], return_counts=True)
        assert mix == {str(name): count for name, count in zip(names, counts, strict=True)}
        assert list(mix.values()) == sorted(mix.values(), reverse=True)
    assert summary == json.loads((tmp_path / "clusters" / "summary.json").read_text())


def test_features_that_meet_clusters_have_their_labels_told(tmp_path):
    features_of(tmp_path / "features", some_labels)
    made, _ = clustered(tmp_path)
    out = tmp_path / "assigned"
    met = assign_folder(tmp_path / "features", tmp_path / "clusters", out, block_rows=32)
    for name in ("label_nmi", "labelled", "num_labels", "labels"):
        assert met[name] == made[name]


def test_of_many_labels_the_commonest_of_a_cluster_are_listed(tmp_path):
    blob = features_of(tmp_path / "features", lambda blob: (np.arange(200) ** 2 % 41).tolist())
    summary, cluster = clustered(tmp_path)
    labels = np.arange(200) ** 2 % 41
    assert summary["num_labels"] == len(set(labels)) > 8
    for number, mix in enumerate(summary["labels"]):
        counts = np.bincount(labels[cluster == number])
        assert list(mix.values()) == sorted(counts, reverse=True)[:8]
    assert summary["label_nmi"] == pytest.approx(normalized_mutual_info_score(labels, cluster))
    assert len(blob) == 200


@pytest.mark.parametrize("broken", ["", "{", '{"a": 1}', "[1, 2]", "\udcff", "[" * 10**5])
def test_labels_that_cannot_be_read_are_not_told_and_stop_nothing(tmp_path, broken, caplog):
    features_of(tmp_path / "features", some_labels)
    path = tmp_path / "features" / "a.labels.json"
    path.write_bytes(broken.encode(errors="surrogateescape"))
    summary, cluster = clustered(tmp_path)
    assert summary["labelled"] == sum(label is not None for label in some_labels(cluster)[90:])
    assert f"{path}: is no list of 90 labels" in caplog.text


@pytest.mark.parametrize(
    ("label", "text"),
    [(3, "3"), (" a cat ", "a cat"), ("é", "é"), (1.5, "1.5"), *((x, None) for x in NO_LABELS)],
)
def test_a_label_is_a_short_text_that_can_be_printed(label, text):
    assert clean_label(label) == text


@pytest.mark.parametrize("labels", [None, lambda _: [None] * 200, lambda _: [3] * 200])
def test_without_two_labels_nothing_is_told(tmp_path, labels):
    features_of(tmp_path / "features", labels)
    summary, _ = clustered(tmp_path)
    assert not {"label_nmi", "labelled", "num_labels", "labels"} & summary.keys()


def test_labels_are_told_in_words():
    summary = {
        **{"label_nmi": 0.25, "labelled": 90, "num_labels": 4},
        "labels": [{"7": 30, "cat": 10, "9": 0}],
    }
    clusters = Clusters(["(no folder)"], np.array([[50], [50]]), summary)
    assert label_mix(clusters, 0) == "7 60 %, cat 20 %" and label_mix(clusters, 1) == ""
    (note,) = cluster_notes(clusters)
    assert note == (
        "normalised mutual information of clusters and labels: 0.250 "
        "(90 images have one of 4 labels)"
    )


def test_the_domain_is_the_first_folder_that_has_a_name():
    keys = ("a/b/c", "./dog/6", "/x/y/1", "one", "./6")
    assert [domain_of(key) for key in keys] == ["a", "dog", "x", "", ""]
