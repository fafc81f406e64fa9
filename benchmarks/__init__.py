"""Benchmarks of t4r_fast: `make bench`, or `t4r-fast bench` inside the repository.

bench_<op>.py holds an op's cases, providers and work; everything else is the runner.
"""
