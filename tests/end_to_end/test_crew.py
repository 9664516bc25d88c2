"""Workers stay from one stage to the next, are replaced when they die, and learn the same bits."""

import shutil
import time

from moce_dist.run.artefacts import COMPLETE


def test_stages_share_workers_and_learn_what_fresh_ones_do(
    start, torchrun, arguments, part_of, learned, finished
):
    run = part_of("ingested", "mae")
    (run / "mae" / COMPLETE).unlink()
    command = arguments(run, "control=true")
    job, seen = start("pretrain", *command), set()
    job.wait_until((run / "mae" / COMPLETE).exists, "the end of stage mae")
    waiting = job.workers()
    seen.update(worker.pid for worker in waiting)
    assert len(seen) == 2, "workers did not stay after stage mae"
    waiting[0].kill()

    def is_over():
        # to look at all processes costs, and workers live for seconds at least
        time.sleep(0.3)
        seen.update(worker.pid for worker in job.workers())
        return job.process.poll() is not None

    job.wait_until(is_over, "its end")
    result = job.finish().assert_done()
    assert result.err.count("control: 2 of 2 workers") == 1
    # two that stage mae left behind, two more for both of the stages after it; on a busy machine Ray
    # may replace one that is late to start, while fresh workers for stage control would be two more
    assert len(seen) in (4, 5)
    assert learned(run / "moce") == learned(finished / "moce")
    (run / "control").rename(run.parent / "control")
    shutil.rmtree(run / "ray")
    torchrun(2, *command, "--stage", "control").assert_done()
    assert learned(run.parent / "control") == learned(run / "control")
