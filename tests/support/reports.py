"""Reports of networks that were never built, in the form of `Analysis.report()`."""

import math
import random
from collections.abc import Sequence
from typing import Any

COLUMNS = [
    ("layer", "text"),
    ("operation", "text"),
    ("shape", "text"),
    ("parameters", "count"),
    ("zeros", "part"),
    ("share", "part"),
    ("effective", "number"),
    ("effective_part", "part"),
    ("per_parameter", "number"),
    ("p10", "number"),
    ("p50", "number"),
    ("p90", "number"),
    ("channels", "count"),
    ("dead_channels", "count"),
]


def made_up(names: Sequence[str], title: str = "A network") -> dict[str, Any]:
    """Numbers by chance, but possible ones; the layers with odd numbers have no score at p10."""
    chance = random.Random(len(names))
    rows, histograms, weights = [], {}, {}
    for i, name in enumerate(names):
        entries = chance.randrange(1000, 100_000)
        share = chance.choice([1.0, chance.uniform(0.01, 1)])
        effective = entries * chance.uniform(0.05, 0.7)
        median = share / entries / 10
        numbers: list[Any] = [entries + 8, chance.uniform(0, 0.5), share, effective]
        numbers += [effective / entries, share / (entries + 8)]
        numbers += [0.0 if i % 2 else median / 100, median, median * 9, 8 * (i + 1), i % 3]
        texts = [name, "linear" if i % 4 == 3 else "conv2d", f"8x{i}x3x3"]
        rows.append(
            {column: value for (column, _), value in zip(COLUMNS, [*texts, *numbers], strict=True)}
        )
        low = math.log10(median) - 5
        histograms[name] = {
            "edges": [low + k / 8 for k in range(61)],
            "counts": [int(entries * math.exp(-(((k - 40) / 9) ** 2)) / 16) for k in range(60)],
            "zeros": entries // 10 if i % 2 else 0,
        }
        weights[name] = [entries, share * 0.9]
    return {
        "title": title,
        "summary": [["path-norm", "1.5e+07"], ["input", "1 x 3 x 8 x 8 (assumed)"]],
        "findings": [
            {"kind": "concentrated", "text": "Few carry much.", "layers": list(names[:12])},
            {"kind": "unscored", "text": "One has no score.", "layers": ["norm.weight"]},
        ],
        "columns": [
            {"name": name, "heading": name, "kind": kind, "about": f"about {name}"}
            for name, kind in COLUMNS
        ],
        "rows": rows,
        "histograms": histograms,
        "weights": weights,
        "curve": [[k / 200, 10 ** (k / 25 - 7) if k else 0.0] for k in range(201)],
        "unscored": {"norm.weight": "normalization factor, part of stem.weight"},
        "norm": "generalised path-norm",
        "gates": [
            {
                "operation": "aten.mul.Tensor",
                "module_path": "stem.gate",
                "size": 1.5,
                "signal": "conv2d in stem",
                "factor": "sigmoid in stem.gate",
                "source_line": "net.py:3: x * g",
            }
        ],
        "about_gates": "gates: mul by sigmoid",
    }
