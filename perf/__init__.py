"""Benchmarks: what each hot path costs beside its peers and beside the limits of the machine, with a record that is kept.

`python -m perf run` finds the files `perf/**/bench_*.py`, runs their cases and appends records under perf/history/;
`report`, `compare` and `verify` read them. What is measured belongs to the bench files, which lie on the same paths as
the code they measure.
"""
