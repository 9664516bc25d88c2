"""What the driver tells Prometheus follows from the newest whole line of metrics."""

import json

from moce_dist.launch.gauges import newest_line


def test_newest_whole_line_is_read_from_the_end_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert newest_line(path) == {}
    path.write_text('{"step": 0, "lo')
    assert newest_line(path) == {}
    lines = [json.dumps({"step": step, "rest": "x" * 200}) for step in range(3000)]
    path.write_text("\n".join(lines) + '\n{"step": 3000, "lo')
    assert newest_line(path)["step"] == 2999
