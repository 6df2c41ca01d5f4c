"""Benchmarks: ours beside others, in one run, by ratio. jobs/bench.py runs them."""
