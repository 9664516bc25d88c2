"""What `jobs/bench.py` measures: a module a benchmark, ours and its baselines interleaved."""
