"""What a study counts as done, and how its processes end."""

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace

import torch

from moce_dist.config import load_config
from moce_dist.launch.job import heed_sigterm
from moce_dist.run.artefacts import mark_complete
from moce_dist.run.directory import StoppedError
from moce_dist.study.runner import Journal, end_processes, piece_fingerprint, visible_gpus
from moce_dist.study.work import PieceOutcome


def _forget_handlers():
    # a fork inherits the handler of a test process that has used Ray
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def train(ready):
    """Take the first SIGTERM as the request to save, then wait like a process of a pool."""
    _forget_handlers()
    with suppress(StoppedError), heed_sigterm() as is_terminated:
        ready.set()
        while not is_terminated():
            time.sleep(0.01)
        raise StoppedError
    time.sleep(600)


def fit(ready):
    _forget_handlers()
    ready.set()
    time.sleep(600)


def test_a_process_that_saved_its_state_and_waits_for_work_is_ended_too():
    context = multiprocessing.get_context("fork")
    begun = [context.Event() for _ in range(2)]
    children = [
        context.Process(target=work, args=(ready,), daemon=True)
        for work, ready in zip((train, fit), begun, strict=True)
    ]
    for child in children:
        child.start()
    assert all(ready.wait(30) for ready in begun)
    # planted: asked once, the one in training lives on for ever
    for child in children:
        child.terminate()
    children[1].join(30)
    children[0].join(1)
    assert children[0].is_alive() and children[1].exitcode == -signal.SIGTERM
    end_processes(children)
    assert [child.exitcode for child in children] == [-signal.SIGTERM] * 2


def test_a_piece_of_a_task_knows_of_images_in_linked_folders(read, plan, tmp_path):
    piece = next(p for p in plan(read()).pieces if p.request is not None)

    def fingerprint(name, images):
        kept, shown = tmp_path / f"{name}-kept", tmp_path / name / "train"
        kept.mkdir()
        shown.mkdir(parents=True)
        for image in images:
            (kept / image).write_bytes(b"image")
            os.utime(kept / image, (1, 1))
        (shown / "class").symlink_to(kept)
        (shown / "circle").symlink_to(tmp_path / name)
        (shown / "gone.png").symlink_to(tmp_path / "nowhere")
        return piece_fingerprint(replace(piece, request=replace(piece.request, data=shown.parent)))

    assert fingerprint("one", "a") == fingerprint("same", "a") != fingerprint("two", "ab")


def test_a_piece_is_done_again_when_what_it_needs_was_made_anew(read, plan, tmp_path):
    found = plan(read())
    pieces = {p.id: replace(p, root=tmp_path / p.run) for p in found.pieces}
    journal = Journal(tmp_path / "pieces.jsonl")

    def make(piece, content):
        piece.folder.mkdir(parents=True, exist_ok=True)
        (piece.folder / "file").write_text(content)
        mark_complete(piece.folder, {"content": content}, [piece.folder / "file"])
        journal.enter(piece, PieceOutcome(piece.id, 1.0))

    transfer = next(p for p in pieces.values() if any(n.endswith("/moce") for n in p.stages))
    for need in transfer.stages:
        make(pieces[need], "first")
    make(transfer, "value")
    assert journal.holds(transfer) and Journal(journal.path).holds(transfer)
    other = replace(transfer, request=replace(transfer.request, task="webdataset"))
    assert not journal.holds(other)
    make(pieces[transfer.stages[-1]], "second")
    assert not journal.holds(transfer)


def test_gpus_are_named_as_the_environment_names_them(monkeypatch):
    parallel = load_config(None, []).parallel
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(parallel) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f,GPU-2c")
    assert visible_gpus(parallel) == ["GPU-8f", "GPU-2c"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert visible_gpus(parallel) == ["MIG-a", "MIG-b"]
    assert visible_gpus(load_config(None, ["parallel.use_gpu=false"]).parallel) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus(parallel) == []
