"""Between two logged steps the host waits for the device at few lines, and these are known."""

import pytest
import torch
import waiting

OPTIONS = ["parallel.num_workers=1", "logging.every_steps=1000", "parallel.replan_steps=1000"]
UNSAVED = ["checkpoint.every_steps=1000"]
DENSE = {
    # the one wait: for the step before
    "train/outcome.py Outcome.read: return Figures(*self.figures.tolist())": 1,
    # counts of clusters come of the plan
    "train/loop.py train_step: engine, count = state.engine, "
    "max(1, int(batch.cluster_counts.sum()))": 1,
    "train/outcome.py Outcome.planned: return max(1, int(self.batch.cluster_counts.sum()))": 1,
    # on the device already: a batch, and whether each group of parameters may be updated
    "train/loop.py forward: x[part].to(device, non_blocking=True) "
    "for x in (batch.images, batch.noise, batch.weights)": 3,
    "runtime/engine.py DeepSpeedEngine._take_model_step: self.optimizer.step()": 2,
    # a loader's work on an image, without processes of its own
    "data/resize.py resize: square: Pixels = "
    "resized[0].permute(1, 2, 0).numpy()[down.dropped :, across.dropped :]": 16,
}
EXPERTS = DENSE | {
    "runtime/engine.py DeepSpeedEngine._take_model_step: self.optimizer.step()": 4,
    # clusters and their counts come of the plan
    "train/loop.py forward: batch.clusters[state.rank, part].numpy(),": 1,
    "train/loop.py forward: batch.cluster_counts.numpy(),": 1,
    "parallel/exchange.py ExpertExchange.__init__: "
    "place, slot = _destinations(clusters.numpy(), routing, experts)": 1,
    # the coming table's gate, into page-locked memory; a thread waits for it
    "train/tables.py TableMaker.on_host: host.copy_(weight, non_blocking=True)": 1,
}
SAVING = EXPERTS | {
    # twice a save, from host to host
    "train/saver.py Saver._go_on: dist.all_gather_object(results, mine, group=self._hosts)": 6,
}
PLANTED = "train/loop.py train_step: lr = current_learning_rate(state)"


def waits(pools, run, *more, **arguments):
    (found,) = pools(1).run(
        "reads_between_logged_steps", run=str(run), overrides=[*OPTIONS, *more], **arguments
    )
    return found


def test_a_dense_step_waits_once_for_the_step_before(pools, own_run):
    places, _ = waits(pools, own_run, *UNSAVED, "moe.kind=dense")
    assert places == DENSE


def test_a_step_with_experts_waits_for_nothing_more(pools, own_run):
    # the routing table was made beside the step before
    places, _ = waits(pools, own_run, *UNSAVED)
    assert places == EXPERTS


def test_a_save_in_flight_adds_no_wait(pools, own_run):
    places, busy = waits(pools, own_run, "checkpoint.every_steps=8", held=(10, 13))
    assert {8, 9, 12} <= set(busy)
    assert places == SAVING


@pytest.mark.parametrize("planted", ["read", "copy_to_host"])
def test_planted_wait_inside_a_step_is_counted(pools, own_run, planted):
    places, _ = waits(pools, own_run, *UNSAVED, planted=planted)
    assert places == EXPERTS | {PLANTED: 1}


ONE = torch.ones(1)
MASK = torch.tensor([True])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: waiting.read(ONE),
        lambda: waiting.copy_to_host(ONE),
        lambda: float(ONE),
        lambda: bool(ONE),
        lambda: 1.0 in ONE,
        lambda: range(3)[MASK.int()],
        ONE.tolist,
        ONE.numpy,
        ONE.cpu,
        lambda: ONE.to("cpu"),
        lambda: ONE.to(torch.device("cpu")),
        lambda: ONE.to(device="cpu"),
        lambda: ONE.to(MASK),
        lambda: torch.tensor(1.0, device="cpu"),
        lambda: torch.equal(ONE, ONE),
        lambda: torch.allclose(ONE, ONE),
        lambda: ONE.allclose(ONE),
        lambda: torch.nonzero(ONE),
        lambda: torch.masked_select(ONE, MASK),
        lambda: torch.bincount(MASK.int()),
        lambda: ONE[MASK],
        lambda: ONE[:, None][MASK, 0],
        lambda: ONE.clone().__setitem__(MASK, 0.0),
    ],
)
def test_every_kind_of_wait_is_counted(wait):
    with waiting.Waits() as mode:
        wait()
    assert list(mode.places.values()) == [1]


def test_what_stays_on_the_device_is_not_counted():
    with waiting.Waits() as mode:
        ONE.to(torch.float64).add(1)[0:1][torch.tensor([0])].sum().sqrt_()
        torch.zeros(1, device="cpu").fill_(1.0)
    assert not mode.places


def test_the_read_of_a_step_follows_the_launch_of_the_next(pools, own_run):
    overrides = [*OPTIONS, *UNSAVED]
    (done,) = pools(1).run("launches_and_reads", run=str(own_run), overrides=overrides)
    steps = 1 + max(step for _, step in done)
    assert steps == 22
    # the first step and the last are logged: read at once, and once more for the log
    expected = [("launch", 0), ("read", 0), ("read", 0), ("launch", 1)]
    for step in range(2, steps):
        expected += [("launch", step), ("read", step - 1)]
    assert done == [*expected, ("read", steps - 1), ("read", steps - 1)]


def test_every_step_is_watched_the_held_out_ones_too_and_no_save(pools, own_run):
    (told,) = pools(1).run("train_recorded", run=str(own_run), overrides=["parallel.num_workers=1"])
    # 11 steps an epoch, two epochs, a checkpoint every 4 steps and after the last one
    expected = []
    for begin in range(0, 22, 4):
        expected += ["resume", *range(begin, min(begin + 4, 22)), "rest", "save"]
    assert told == [*expected, "resume", *range(22, 33), "rest"]
