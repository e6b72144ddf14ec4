"""The rules of the path-lifting, one entry per ATen operation.

Weights: ``affine`` (convolutions, linear maps, batch norms), ``products`` (everything that
multiplies or adds), ``recurrent``.  Neurons: ``activation`` (ReLU and its relatives), ``pooling``
(maxima, means, sums), ``ranks`` (order statistics), ``norms``.  Fixed maps: ``padding``,
``resampling`` (interpolation), ``indexing`` and ``assignment`` (entries read from and written to
constant positions), ``shape`` (what only moves entries).  Where gates are taken in, ``gates``
(activations that are gates of themselves), ``gating`` (products with one) and ``gated_recurrent``
(LSTM, GRU).  ``refused`` explains
the best-known operations that the theory does not cover; ``own`` takes compositions for operators
of a user's.
"""

from fxpath.rules import (
    activation,
    affine,
    assignment,
    gated_recurrent,
    gates,
    indexing,
    norms,
    padding,
    pooling,
    products,
    ranks,
    recurrent,
    resampling,
    shape,
)
from fxpath.rules.refused import refusal
from fxpath.rules.registry import GATED, RULES

__all__ = [
    "GATED",
    "RULES",
    "activation",
    "affine",
    "assignment",
    "gated_recurrent",
    "gates",
    "indexing",
    "norms",
    "padding",
    "pooling",
    "products",
    "ranks",
    "recurrent",
    "refusal",
    "resampling",
    "shape",
]
