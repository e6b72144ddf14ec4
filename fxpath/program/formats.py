"""Number formats: which one a model's program has, and why float64 does not suffice for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxpath.graph import ops
from fxpath.graph.schema import arguments
from fxpath.model import Captured, check_finite
from fxpath.program.theta import coordinates
from fxpath.sharding import whole


def check_format(dtype: torch.dtype | None) -> None:
    """Refuse a number format that nothing is computed in.

    Raises:
        ValueError: for it.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"dtype={dtype}: path-norms are computed in torch.float32 or torch.float64"
        )


def format_of(captured: Captured, lifted: fx.GraphModule) -> torch.dtype:
    """The number format of a model's program, by its tensors.

    Raises:
        ValueError: for a NaN or infinite parameter.
    """
    live = captured.live()
    # What the graph was made for alone, bounds that bound nothing say, was looked at by its rules.
    read = {n.target for n in lifted.graph.nodes if n.op == "placeholder" and n.users}
    check_finite({captured.tensors[name]: tensor for name, tensor in live.items() if name in read})
    double = any(tensor.dtype == torch.float64 for tensor in live.values())
    return torch.float64 if double else torch.float32


def failure(
    captured: Captured, lifted: fx.GraphModule, live: Mapping[str, Tensor], q: float
) -> Exception:
    """What to raise where not even float64 holds a result."""
    try:
        check_finite({captured.tensors[key]: value for key, value in live.items()})
    except ValueError as error:
        return error
    for node in lifted.graph.nodes:
        if node.target is ops.normalizer:
            _, variance, eps = arguments(node)
            if bool((whole(live[variance.target]) + eps <= 0).any()):
                name = captured.tensors[variance.target]
                return ValueError(f"{name} has entries that are no variance: not above {-eps}")
    for name, value in coordinates(lifted, live):
        if not bool(torch.isfinite(value).all()):
            return ValueError(
                f"{name}: the effective value is NaN or infinite: look for a division by 0"
            )
    return FloatingPointError(
        "some tensor of the lifted network spans more orders of magnitude than float64 holds: "
        f"rescale the model's neurons, or look for entries whose power q = {q:g} is near "
        "1e-300 or 1e300"
    )
