"""Magnitude at one representative of all rescalings, and scores relative to their tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxpath.model import Given, Model, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.program.evaluation import fitted
from fxpath.program.program import build
from fxpath.sharding import placed, whole
from fxpath.symmetry.least_norm import Canonical


@plain_mode()
@torch.no_grad()
def canonical_magnitude(
    model: Model,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
) -> dict[str, Tensor]:
    """Size ``|theta_i|`` of every parameter at the rescaling of least l^2 norm.

    Rescaling a hidden neuron changes the size of its weights and not the function.  Of all
    rescalings one has the least sum of squares of all effective parameters (see
    :func:`fxpath.normalize`), and that sizes are taken there makes them the same for all of them,
    by construction.  In contrast to ``normalize`` no tensor has to hold a factor: weights may be
    pruned, parametrized or frozen, and the model is not changed.  Batch norms are folded in, so
    that the scale of a convolution in front of one plays no part.

    An entry that the least norm makes as small as one likes has size 0: weights of channels that no
    input or bias reaches, or that reach no output.

    The least norm evens out the norms of layers, and so moves sparsity between them if scores are
    compared across layers; :func:`relative_to_layer` makes the ranking independent of that.

    Args:
        model: as for :func:`fxpath.analyze`.
        input_shape: as for :func:`fxpath.analyze`.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.
        outputs: as for :func:`fxpath.analyze`.
        gates: as for :func:`fxpath.analyze`.

    Returns:
        Parameter name -> tensor of the parameter's shape, entries >= 0; names are those of
        :func:`fxpath.analyze`, biases and folded batch norms included.  In float64 if the model has
        such parameters, or where float32 does not hold an entry, else in float32.  A parameter with
        several effective values (two batch norms read one convolution) has the root of the sum of
        their squares.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: for a NaN or infinite parameter or effective value, by name; for an input shape
            that is missing and cannot be inferred.
        FloatingPointError: if float64 does not suffice.

    Example:
        >>> from torch import nn
        >>> layers = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> _ = nn.init.constant_(layers[0].weight, 8.0), nn.init.constant_(layers[1].weight, -2.0)
        >>> model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        >>> {name: round(s.item(), 6) for name, s in canonical_magnitude(model).items()}
        {'0.weight': 4.0, '2.weight': 4.0}
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    program = build(model, given, reduced=False)
    return Canonical(program.captured, program.lifted).scores(program.dtype)


@torch.no_grad()
def relative_to_layer(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores relative to what remains of their tensor once all smaller ones are pruned.

    The layer-adaptive scores of Lee et al., "Layer-adaptive sparsity for the magnitude-based
    pruning" (ICLR 2021), for any criterion: with s the score of an entry,

        s^2 / (sum of s'^2 over the entries of the tensor with s' >= s).

    The largest entry of every tensor has score 1 (several that are largest share it), so that no
    tensor is pruned altogether before all others are; a factor on all scores of a tensor changes
    nothing, which leaves out how a criterion weighs layers against each other.  Inside a tensor
    the order stays.

    Estimates below 0, as OBD makes them, become ``-s^2 / (sum of s'^2 over the whole tensor)``.

    Args:
        scores: name -> tensor of any shape, as every criterion returns them; they are not changed.

    Returns:
        Name -> tensor of the same shape, entries in [-1, 1]; in float64 for scores in float64 or
        where float32 would make zeros of small ones, else in float32.

    Raises:
        ValueError: for scores that are NaN or infinite, by name.

    Example:
        >>> relative_to_layer({"weight": torch.tensor([3.0, 0.0, 4.0])})
        {'weight': tensor([0.3600, 0.0000, 1.0000])}
    """
    bad = [name for name, score in scores.items() if not bool(whole(score).isfinite().all())]
    if bad:
        raise ValueError(f"NaN or infinite scores of {', '.join(bad)}")
    return {name: placed(_relative(whole(score)), score) for name, score in scores.items()}


def _relative(score: Tensor) -> Tensor:
    dtype = torch.promote_types(score.dtype, torch.float32)
    if not score.count_nonzero():
        return torch.zeros_like(score, dtype=dtype)
    ordered, order = score.reshape(-1).sort(descending=True)
    below = ordered < 0
    ordered = ordered.double()
    # Squares of shares of the largest score: of those above 0 by themselves, as nothing else counts
    # for them.
    total = ordered.div(ordered.abs().max()).square().sum()
    largest = torch.where(below, ordered.abs().max(), ordered[0])
    squares = (ordered / largest).square_()
    remaining = squares.masked_fill(below, 0.0).cumsum(0)
    # Of equal scores the last has the sum over all of them, the next larger sum at an end.
    remaining[:-1].masked_fill_(ordered[1:] == ordered[:-1], torch.inf)
    remaining = remaining.flip(0).cummin(0).values.flip(0)
    remaining = torch.where(below, -total, remaining)
    # 0 / 0 where there are only zeros so far.
    relative = torch.where(ordered == 0, 0.0, squares / remaining)
    placed = torch.empty_like(relative).scatter_(0, order, relative).reshape(score.shape)
    return placed.to(fitted(placed.abs(), dtype).dtype)
