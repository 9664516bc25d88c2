"""The planned stream for other trainings: exactly once over kills, ranks and loader processes."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import time
from collections import Counter
from itertools import zip_longest

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moce_dist.data.dataset import PlannedSamples
from moce_dist.data.shards import scan_shard, write_index
from moce_dist.data.writer import ShardWriter

SAMPLES, BATCH = 101, 12


@pytest.fixture
def index(tmp_path, some_image):
    """Three tars with an image, a class and a caption a sample."""
    shards = []
    for number, rows in enumerate(np.array_split(np.arange(SAMPLES), 3)):
        writer = ShardWriter(tmp_path / "data", f"{number}.tar", cluster=number % 2)
        for row in rows:
            label, words = f"{row % 7}".encode(), f"caption of {row}".encode()
            writer.add(f"class/{row:03d}", {"png": some_image(row), "cls": label, "txt": words})
        shards.append(writer.close())
    write_index(tmp_path / "data", shards)
    return tmp_path / "data"


def every_key():
    return Counter(f"class/{row:03d}" for row in range(SAMPLES))


def steps_of(index, ranks, processes, epoch):
    """Keys of the steps of an epoch, from batches of all ranks."""
    steps = {}
    for rank in range(ranks):
        samples = PlannedSamples(index, batch_size=BATCH, seed=5, rank=rank, num_ranks=ranks)
        samples.set_epoch(epoch)
        loader = DataLoader(
            samples, samples.rank_batch, num_workers=processes, collate_fn=lambda batch: batch
        )
        for step, batch in enumerate(loader):
            steps.setdefault(step, []).extend(sample["__key__"] for sample in batch)
    return steps


@pytest.mark.parametrize(("ranks", "processes"), [(2, 0), (3, 2)])
def test_steps_are_the_same_on_any_ranks_and_loader_processes(index, ranks, processes):
    for epoch in (0, 1):
        expected = steps_of(index, 1, 0, epoch)
        assert Counter(key for keys in expected.values() for key in keys) == every_key()
        assert steps_of(index, ranks, processes, epoch) == expected
    assert steps_of(index, 1, 0, 0) != expected


def test_samples_are_those_of_webdataset_itself(index, some_image):
    urls = [str(path) for path in sorted(index.glob("*.tar"))]
    theirs = {
        sample["__key__"]: {k: v for k, v in sample.items() if k != "__local_path__"}
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    }
    ours = {sample["__key__"]: sample for sample in PlannedSamples(index, batch_size=BATCH)}
    assert ours == theirs and ours["class/003"]["png"] == some_image(3)


def test_members_that_are_passed_over_and_odd_folders_do_not_matter(tmp_path, some_image):
    """Those of macOS stand between the members of a sample."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row in range(3):
            for ending, content in (("cls", b"1"), ("jpg", some_image(row, "JPEG"))):
                for part, body in (("._", b"\0\5\x16\7"), ("", content)):
                    info = tarfile.TarInfo(f"a\nb.c/{part}{row}.{ending}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    write_index(tmp_path, [scan_shard(str(tmp_path / "a.tar"))[0]])
    samples = sorted(PlannedSamples(tmp_path, batch_size=3), key=lambda sample: sample["__key__"])
    assert [sample["__key__"] for sample in samples] == [f"a\nb.c/{row}" for row in range(3)]
    assert [sample["cls"] for sample in samples] == [b"1"] * 3
    assert [sample["jpg"] for sample in samples] == [some_image(row, "JPEG") for row in range(3)]


def test_it_stands_at_the_head_of_a_pipeline(index):
    samples = PlannedSamples(index, batch_size=BATCH, rank=0, num_ranks=1)
    pipeline = webdataset.DataPipeline(
        samples, webdataset.decode("rgb"), webdataset.to_tuple("png", "cls", "__key__")
    )
    loader = webdataset.WebLoader(pipeline, batch_size=samples.rank_batch, num_workers=2)
    batches = list(loader)
    assert [len(keys) for *_, keys in batches] == [12] * 8 + [5]
    assert batches[0][0].shape == (12, 16, 16, 3) and float(batches[0][0].max()) <= 1
    keys = [key for *_, found in batches for key in found]
    assert Counter(keys) == every_key()
    labels = [int(label) for _, found, _ in batches for label in found]
    assert labels == [int(key[6:]) % 7 for key in keys]


def test_a_position_may_be_anywhere_and_is_of_one_order(index):
    samples = PlannedSamples(index, batch_size=BATCH, seed=5, rank=1, num_ranks=2)
    whole = [sample["__key__"] for sample in samples]
    samples.set_epoch(0)
    begun, taken = iter(samples), []
    for _ in range(17):
        taken.append(next(begun)["__key__"])
    state = json.loads(json.dumps(samples.state_dict()))
    assert (state["step"], state["slot"]) == (2, 5)
    other = PlannedSamples(index, batch_size=BATCH, seed=5, rank=1, num_ranks=2)
    other.load_state_dict(state)
    assert taken + [sample["__key__"] for sample in other] == whole
    with pytest.raises(ValueError, match="seed of the state is 5, here it is 6"):
        PlannedSamples(index, batch_size=BATCH, seed=6).load_state_dict(state)
    with pytest.raises(ValueError, match="rank_batch of the state is 6, here it is 12"):
        PlannedSamples(index, batch_size=BATCH, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"batch_size \(12\) must be a multiple of num_ranks"):
        PlannedSamples(index, batch_size=BATCH, rank=0, num_ranks=5)


def test_a_position_is_of_one_data_set(index, tmp_path, some_image):
    state = PlannedSamples(index, batch_size=BATCH).state_dict()
    writer = ShardWriter(tmp_path / "others", "0.tar")
    for row in range(SAMPLES):
        writer.add(f"class/{row:03d}", {"png": some_image(row + 1)})
    write_index(tmp_path / "others", [writer.close()])
    with pytest.raises(ValueError, match="data of the state is"):
        PlannedSamples(tmp_path / "others", batch_size=BATCH).load_state_dict(state)


def test_a_sample_that_cannot_be_read_is_the_handlers(index):
    (index / "1.tar").write_bytes((index / "1.tar").read_bytes()[:20_000])
    with pytest.raises(Exception, match=r"class/\d+ of .*1\.tar: ends after"):
        list(PlannedSamples(index, batch_size=BATCH))
    met = []

    def note(error):
        met.append(error)
        return True

    found = [s["__key__"] for s in PlannedSamples(index, batch_size=BATCH, handler=note)]
    assert met and len(found) + len(met) == SAMPLES and not Counter(found) - every_key()


def test_bytes_of_another_sample_are_an_error(index, some_image):
    """A tar of the same sizes in another order, as after a change or a wrong response."""
    (index / "1.tar").unlink()
    writer = ShardWriter(index, "1.tar")
    for row in reversed(np.array_split(np.arange(SAMPLES), 3)[1]):
        label, words = f"{row % 7}".encode(), f"caption of {row}".encode()
        writer.add(f"class/{row:03d}", {"png": some_image(row), "cls": label, "txt": words})
    writer.close()
    met = []

    def note(error):
        met.append(str(error))
        return True

    samples = list(PlannedSamples(index, batch_size=BATCH, handler=note))
    assert len(samples) + len(met) == SAMPLES and met
    assert all("are no sample of this key" in error for error in met)
    for sample in samples:
        assert sample["txt"] == f"caption of {int(sample['__key__'][6:])}".encode()


def consume(index, folder, rank, ranks, start, stop):
    """Leave a file for every batch that was used; hang with that of step `stop` in hand."""
    # a group with its loader, which does not notice the end of a rank that ends as both begin
    os.setpgrp()
    samples = PlannedSamples(index, batch_size=BATCH, seed=5, rank=rank, num_ranks=ranks)
    samples.load_state_dict({"step": start})
    loader = webdataset.WebLoader(
        webdataset.DataPipeline(samples, webdataset.to_tuple("__key__")),
        batch_size=samples.rank_batch,
        num_workers=1,
    )
    for step, (keys,) in enumerate(loader, start):
        while step == stop:
            time.sleep(1)
        (folder / f".{rank}").write_text(json.dumps(keys))
        (folder / f".{rank}").rename(folder / f"{step}.{rank}")


def test_killed_on_changing_ranks_every_sample_is_used_once(index, tmp_path):
    context, start, used = multiprocessing.get_context("fork"), 0, []
    for ranks, stop in ((2, 2), (4, 5), (1, 6), (3, None)):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        processes = [
            context.Process(target=consume, args=(index, folder, rank, ranks, start, stop))
            for rank in range(ranks)
        ]
        # a rank has a loader process, so it cannot be a daemon that ends with this process
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + 200
            while stop is not None and len(list(folder.glob("[0-9]*"))) < ranks * (stop - start):
                assert time.monotonic() < deadline and all(p.is_alive() for p in processes)
                time.sleep(0.02)
            if stop is None:
                for process in processes:
                    process.join(200)
                assert [p.exitcode for p in processes] == [0] * ranks
        finally:
            for process in processes:
                if process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()  # it may not have come to its group
                    process.join()
        used += [key for file in folder.glob("[0-9]*") for key in json.loads(file.read_text())]
        start = stop
    assert Counter(used) == every_key()


@pytest.mark.parametrize("processes", [0, 2])
def test_without_the_last_step_all_ranks_take_as_many(index, processes):
    steps = {}
    for rank in range(3):
        samples = PlannedSamples(index, batch_size=BATCH, rank=rank, num_ranks=3, drop_last=True)
        loader = DataLoader(samples, samples.rank_batch, num_workers=processes, collate_fn=list)
        for epoch in range(2):
            samples.set_epoch(epoch)
            steps[rank, epoch] = [[s["__key__"] for s in batch] for batch in loader]
    assert {len(batches) for batches in steps.values()} == {SAMPLES // BATCH}
    for epoch in range(2):
        used = Counter(key for r in range(3) for batch in steps[r, epoch] for key in batch)
        assert used.total() == SAMPLES // BATCH * BATCH and set(used.values()) == {1}


def test_a_loaded_position_is_not_given_up(index):
    samples = PlannedSamples(index, batch_size=BATCH)
    samples.load_state_dict({"step": 2 * samples.steps_per_epoch + 1})
    with pytest.raises(ValueError, match="epoch 0 is over: the loaded position is in epoch 2"):
        samples.set_epoch(0)
    samples.set_epoch(2)
    assert sum(1 for _ in samples) == SAMPLES - BATCH


def test_without_the_last_step_the_position_resumes_where_it_was(index):
    def open_samples(step=0):
        samples = PlannedSamples(index, batch_size=BATCH, drop_last=True)
        samples.load_state_dict({"step": step})
        return samples

    samples, steps = open_samples(), []
    assert samples.steps_per_epoch == SAMPLES // BATCH
    for epoch in range(6):
        samples.set_epoch(epoch)
        loader = DataLoader(samples, BATCH, collate_fn=list)
        steps += [[sample["__key__"] for sample in batch] for batch in loader]
    done = 5 * samples.steps_per_epoch + 3
    resumed = open_samples(done)
    rest = [[s["__key__"] for s in batch] for batch in DataLoader(resumed, BATCH, collate_fn=list)]
    assert rest == steps[done:] and len(rest) == samples.steps_per_epoch - 3
    with pytest.raises(ValueError, match="drop_last: 101 samples are no step"):
        PlannedSamples(index, batch_size=102, drop_last=True)


def keys_of(batch):
    return [sample["__key__"] for sample in batch]


LOADERS = {
    "no processes": {},
    "processes": {"num_workers": 2},
    "processes that live on": {"num_workers": 2, "persistent_workers": True},
    "more processes than steps": {"num_workers": 11, "persistent_workers": True},
}


def open_loaders(index, ranks, options, step=0):
    """The samples of every rank, at the same position, and a loader of each."""
    opened = []
    for rank in range(ranks):
        samples = PlannedSamples(index, batch_size=BATCH, seed=5, rank=rank, num_ranks=ranks)
        samples.load_state_dict({"step": step})
        loader = DataLoader(samples, samples.rank_batch, collate_fn=keys_of, **options)
        opened.append((samples, loader))
    return opened


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_after_a_resume_every_epoch_is_whole(index, kind, ranks):
    opened = open_loaders(index, ranks, LOADERS[kind], step=6)
    # an epoch may be left out, and the same one come again
    for epoch, first in ((0, 6), (1, 0), (3, 0), (3, 0), (2, 0)):
        for samples, _ in opened:
            samples.set_epoch(epoch)
        parts = zip_longest(*(list(loader) for _, loader in opened), fillvalue=[])
        expected = steps_of(index, 1, 0, epoch)
        found = [[key for keys in step for key in keys] for step in parts]
        assert found == [expected[step] for step in range(first, 9)]


@pytest.mark.parametrize("kind", ["no processes", "processes that live on"])
def test_without_set_epoch_the_next_one_follows(index, kind):
    ((_, loader),) = open_loaders(index, 1, LOADERS[kind], step=6)
    for epoch, first in ((0, 6), (1, 0), (2, 0)):
        expected = steps_of(index, 1, 0, epoch)
        assert list(loader) == [expected[step] for step in range(first, 9)]


@pytest.mark.parametrize("kind", ["no processes", "processes", "processes that live on"])
def test_an_epoch_that_was_broken_off_does_not_change_the_next(index, kind):
    ((samples, loader),) = open_loaders(index, 1, LOADERS[kind])
    for taken in (1, 8, 1):
        samples.set_epoch(0)
        for _ in zip(range(taken), loader, strict=False):
            pass
        samples.set_epoch(1)
        assert list(loader) == list(steps_of(index, 1, 0, 1).values())


def test_a_running_iteration_keeps_its_epoch(index):
    ((samples, loader),) = open_loaders(index, 1, LOADERS["processes that live on"])
    for epoch in (0, 3, 1):
        samples.set_epoch(epoch)
        found = []
        for keys in loader:
            found.append(keys)
            # all processes have begun
            if len(found) > 1:
                samples.set_epoch(7)
        assert found == list(steps_of(index, 1, 0, epoch).values())


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_copy_follows_only_itself(index, context):
    original = PlannedSamples(index, batch_size=BATCH, seed=5)
    copy = pickle.loads(pickle.dumps(original))
    options = {**LOADERS["processes that live on"], "multiprocessing_context": context}
    loader = DataLoader(copy, copy.rank_batch, collate_fn=keys_of, **options)
    for epoch in (0, 2):
        copy.set_epoch(epoch)
        original.set_epoch(5)
        assert list(loader) == list(steps_of(index, 1, 0, epoch).values())


class WithStates(IterableDataset):
    """Samples, each with the state after it, and at the end of a process None with its state."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        worker = get_worker_info().id
        yield from ((worker, s["__key__"], self.samples.state_dict()) for s in self.samples)
        yield worker, None, self.samples.state_dict()


@pytest.mark.parametrize("size", [BATCH, 5])
@pytest.mark.parametrize("kind", ["processes", "processes that live on"])
def test_states_of_loader_processes_resume_within_their_epoch(index, kind, size):
    """As torchdata's StatefulDataLoader keeps them: of every process, after its last batch."""
    samples = PlannedSamples(index, batch_size=BATCH, seed=5)
    samples.set_epoch(1)

    def load(states):
        def begin(worker):
            if worker in states:
                get_worker_info().dataset.samples.load_state_dict(states[worker])

        with_states = WithStates(samples)
        options = {**LOADERS[kind], "collate_fn": list, "worker_init_fn": begin}
        return DataLoader(with_states, size, **options)

    states, used, whole = {}, Counter(), list(load({}))
    for batch in [[], *whole]:
        states |= {worker: state for worker, _, state in batch}
        used.update(key for _, key, _ in batch if key)
        rest = load(states)
        left = Counter(key for batch in rest for _, key, _ in batch if key)
        assert used + left == every_key()
    # after all processes have ended the epoch, those that live on make the next one
    if kind == "processes that live on":
        assert Counter(key for batch in rest for _, key, _ in batch if key) == every_key()
