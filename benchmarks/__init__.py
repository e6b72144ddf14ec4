"""Benchmarks, run from the root of the source checkout.

    python -m benchmarks.criteria           the paper's Table 3; also `fxpath bench`
    python -m benchmarks.resolution         time against the size of the input
    python -m benchmarks.memory             peak memory
    python -m pytest benchmarks --benchmark-only    the passes, to compare with an earlier run

Each of the first three prints its tables and writes one JSON file with its rows and a record of the
environment.  `pip install -e '.[bench]'` installs what they need.
"""
