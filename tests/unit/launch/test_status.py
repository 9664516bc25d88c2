"""Who stands still, spelt out."""

import time

from moce_dist.launch.status import Sign, standing_still
from moce_dist.train.pulse import Beat, Pulse


def signs(**ranks):
    """Signs of life 1000 s after the clock began: (seconds of silence, step, age, median) each."""
    return {
        int(name[1:]): Sign(
            f"n{name}", f"10.0.0.{name[1:]}", 70, 1000.0 - silence, Beat("moce", *b)
        )
        for name, (silence, *b) in ranks.items()
    }


def found(timeout_s, **ranks):
    return standing_still(signs(**ranks), timeout_s, 1000.0)


def test_a_stopped_process_is_silent():
    lines = found(300, r0=(1, 41, 310, 2.0), r1=(305, 41, 1, 2.0), r2=(1, 41, 310, 2.0))
    assert list(lines) == [1]
    assert lines[1] == (
        "rank 1 on node 10.0.0.1 (process 70) stands still: no sign of life for 305 s"
    )


def test_who_is_behind_holds_up_those_that_wait():
    lines = found(300, r0=(1, 41, 310, 2.0), r1=(1, 40, 312, 2.0))
    assert list(lines) == [1]
    assert lines[1].endswith("stands still: in step 40 of moce for 313 s")
    assert list(found(300, r0=(1, 41, 310, 2.0), r1=(1, 41, 312, 2.0))) == [0, 1]


def test_nobody_is_accused_before_ten_times_the_median_step():
    assert found(5, r0=(1, 41, 90, 10.0), r1=(1, 40, 92, 10.0)) == {}
    assert list(found(5, r0=(1, 41, 90, 8.0), r1=(1, 40, 92, 8.0))) == [1]
    assert found(5, r0=(60, 41, 0.1, 8.0)) == {}


def test_what_is_no_step_may_take_its_time():
    assert found(300, r0=(1, 41, 900, 2.0), r1=(1, 40, None, 2.0)) == {}
    assert found(300, r0=(1, -1, None, 0.0)) == {}
    assert list(found(300, r0=(900, -1, None, 0.0))) == [0]


def test_a_first_step_has_four_times_as_long():
    assert found(300, r0=(1, -1, 1190, 0.0), r1=(1, -1, 1195, 0.0)) == {}
    assert list(found(300, r0=(1, -1, 1210, 0.0), r1=(1, 0, 1, 0.0))) == [0]
    # a process that is stopped is found sooner, whatever the others do
    assert list(found(300, r0=(305, -1, 1, 0.0), r1=(1, -1, 305, 0.0))) == [0]


def test_a_pulse_tells_step_age_and_median():
    pulse = Pulse(lambda: True)
    assert pulse.beat() == Beat()
    for step in range(4):
        assert pulse("mae", step)
        time.sleep(0.02)
    beat = pulse.beat()
    assert (beat.loop, beat.step) == ("mae", 3)
    assert 0.02 <= beat.age_s < 2 and 0.02 <= beat.median_s < 2
    pulse.rest()
    time.sleep(0.2)
    assert pulse.beat().age_s is None
    pulse.resume()
    time.sleep(0.02)
    assert pulse.beat().step == 3 and 0.02 <= pulse.beat().age_s < 0.2
    pulse("mae", 4)
    # the rest is no step
    assert pulse.beat().median_s < 0.2
