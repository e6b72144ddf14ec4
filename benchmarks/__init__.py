"""Benchmarks, run from the root of the source checkout.

    python -m benchmarks.criteria           the paper's Table 3, and what can run a program
    python -m benchmarks.resolution         time against the size of the input
    python -m benchmarks.memory             peak memory
    python -m benchmarks.operators resnet18   operators of an exported program
    python -m benchmarks.callbacks          what a line of path-norms costs a training
    python -m benchmarks.pruning_accuracy   Table 4: accuracy after pruning and finetuning
    python -m pytest benchmarks/speed.py --benchmark-only   the passes, to compare with others

Each but the last prints its tables, and writes its rows and a record of the environment where
`--json FILE` says, and nowhere else; those of pruning_accuracy are kept in `benchmarks/results`,
with their plot (`--plot FILE`).
`pip install -e '.[bench]'` installs what they need.
"""
