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
    job, until_moce, after = start("pretrain", *command), set(), set()
    job.wait_until((run / "mae" / COMPLETE).exists, "the end of stage mae")
    waiting = job.workers()
    of_mae = {worker.pid for worker in waiting}
    assert len(of_mae) == 2, "workers did not stay after stage mae"
    waiting[0].kill()

    def is_over():
        # to look at all processes costs, and workers live for seconds at least
        time.sleep(0.3)
        seen = after if (run / "moce" / COMPLETE).exists() else until_moce
        seen.update(worker.pid for worker in job.workers())
        return job.process.poll() is not None

    job.wait_until(is_over, "its end")
    result = job.finish().assert_done()
    assert result.err.count("control: 2 of 2 workers") == 1
    # one was lost, so both are replaced; stage control has those of stage moce
    assert len(until_moce - of_mae) >= 2
    assert len(after) == 2 and after <= until_moce - of_mae
    assert learned(run / "moce") == learned(finished / "moce")
    (run / "control").rename(run.parent / "control")
    shutil.rmtree(run / "ray")
    torchrun(2, *command, "--stage", "control").assert_done()
    assert learned(run.parent / "control") == learned(run / "control")
