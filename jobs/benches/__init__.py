"""The benchmarks of `jobs/bench.py`, one module each, interleaved with their baselines."""
