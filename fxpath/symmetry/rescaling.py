"""Random rescaling and normalization of a model, one factor for each channel group."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath.graph import ops
from fxpath.model import Captured, Given, Model, Shapes, check_finite, named_tensors
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.passes import take_in
from fxpath.symmetry.carriers import Numbers, through_norms
from fxpath.symmetry.conditioning import conditioning_factors
from fxpath.symmetry.groups import ChannelGroups, find_groups, open_groups
from fxpath.symmetry.least_norm import least_norm_factors


@plain_mode()
def channel_groups(
    model: Model,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
) -> ChannelGroups:
    """Find the channels that share one scale, and every entry that a factor would change.

    Args:
        model: as for :func:`fxpath.analyze`; channels are those of eval mode.
        input_shape: as for :func:`fxpath.analyze`.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.
        outputs: as for :func:`fxpath.analyze`.
        gates: take gates in, as for :func:`fxpath.analyze`; a channel that an activation reads
            which is not homogeneous keeps its scale.

    Returns:
        A :class:`ChannelGroups`.  Where an operation cannot be followed, its channels are in one
        group or, with the inputs and outputs, in none.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: for an input shape that is missing and cannot be inferred.
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    return find_groups(*take_in(model, given))


@plain_mode()
@torch.no_grad()
def rescale(
    model: nn.Module,
    input_shape: Shapes = None,
    *,
    factors: Mapping[int, float] | None = None,
    choices: Sequence[float] = (1, 128, 4096),
    seed: int = 0,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
) -> nn.Module:
    """A model of the same function, and of the same Phi, with other parameters.

    The random rescaling of the paper's Appendix D: each channel group draws a factor.  A channel's
    incoming weights and bias are multiplied by it, its outgoing weights divided.  A batch norm
    behind a convolution keeps its scale and variance; its running mean and its bias are multiplied
    like the convolution.  Powers of two change no digit of any result.

    Args:
        model: a module, in either mode; it is not changed.  The function is that of eval mode.
        input_shape: shape of the input without the batch axis.
        factors: number of a group in :func:`channel_groups` -> its factor > 0, instead of random
            ones; 1 for those that are not listed.
        choices: factors that each rescalable group draws from, with equal probability.
        seed: of the draw.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.
        outputs: as for :func:`fxpath.analyze`.
        gates: take gates in, as for :func:`fxpath.analyze`; a channel that an activation reads
            which is not homogeneous keeps its scale.

    Returns:
        A deep copy with rescaled parameters and running means.

    Warns:
        UserWarning: naming modules that eval mode does not reach (auxiliary heads): they stay as
            they are, and their outputs in training change.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: for a weight that is computed (pruned, parametrized), by name; a factor that is
            no positive number, or of a group that cannot be rescaled; a result that the number
            format of a parameter does not hold, by name.
        TypeError: for an exported program.

    Example:
        >>> import fxpath
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> other = rescale(model)
        >>> torch.equal(model[0].weight, other[0].weight)
        False
        >>> fxpath.path_norm(model) == fxpath.path_norm(other)
        True
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    captured, lifted = take_in(model, given)
    found = open_groups(captured, lifted)
    values = torch.ones(len(found), dtype=torch.float64)
    rescalable = found.rescalable
    if factors is None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(choices), (len(found),), generator=generator)
        values = torch.tensor(choices, dtype=torch.float64)[drawn]
        values[~rescalable] = 1
    else:
        for number, factor in factors.items():
            if not 0 <= number < len(found) or not rescalable[number]:
                raise ValueError(f"factors[{number}]: no such group can be rescaled")
            values[number] = factor
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError("every factor must be a positive number")
    _warn_of_unread(model, captured, found, values, given)
    return _rescaled(model, found._numbers, values)


@plain_mode()
@torch.no_grad()
def normalize(
    model: nn.Module,
    input_shape: Shapes = None,
    *,
    method: str = "incoming",
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
    gates: bool = False,
) -> nn.Module:
    """A model of the same function at one chosen rescaling of its hidden neurons.

    ``method="incoming"``: incoming l^1 norms of at most 1.  That of a neuron v is, as in
    Algorithm 1 in Gonon et al. (2024), sum over its antecedents u of ``|theta^{u->v}| h_u``, plus
    ``|b_v|``, where h is the same number of u, and 1 for inputs: the l^1 norm of the path-lifting
    that ends at v.  Algorithm 1 divides by h_v and leaves 1 at each neuron; a model of the same
    architecture has one factor for each channel group, 1 / max h_v over the group's channels and
    positions.  So every neuron of a rescalable group ends with h_v <= 1, and one of them with 1 (a
    group whose h_v are all 0 stays as it is).  In a fully-connected network these are the norms of
    the rows of weights and biases.

    ``method="least_norm"``: the least l^2 norm of the effective parameters, weights and biases with
    batch norms folded in,

        minimize  sum over entries of  w^2 exp(2 (a_out - a_in)) + b^2 exp(2 a_out)

    over the logarithms a of the groups' factors, which are 0 for inputs, outputs and groups that
    cannot be rescaled.  The problem is convex; at its solution the squares that enter a group
    have the same sum as those that leave it, to 1e-10.  Channels that no input or bias reaches, or
    that reach no output, could be made as small as one likes, so that no minimum is attained: they
    stay as they are, or take the factor nearest to 1 with which none of their weights grows.
    (ENorm of Stock et al., "Equi-normalization of neural networks", 2019, descends to the same
    balance channel by channel.)

    ``method="path_conditioning"``: the least :func:`fxpath.path_conditioning`, the divergence of
    the path kernel's diagonal from a multiple of the identity, which Lebeurrier, Vayer and
    Gribonval propose before training (2026).  The problem is convex, and solved until the sums of
    the kernel into and out of every group are balanced to 1e-10.  A batch norm in training divides
    by the statistics of the batch, so that what is multiplied into the weights in front of it is
    lost: here the factor of a channel goes into the scale and bias of the batch norm instead, and
    the function in training stays as well.  Channels whose scale a batch norm reads that is not
    folded into the map before it (in front of a ReLU, as in DenseNet) keep theirs.

    The result of the first two is the same for all rescalings of one model (by the least norm,
    within rounding and but for channels that no path visits); that of the third in its effective
    parameters, with batch norms folded in, up to channels that keep their scale.

    Args:
        model: a module, in either mode; it is not changed.  The function is that of eval mode.
        input_shape: as for :func:`fxpath.analyze`.
        method: ``"incoming"``, ``"least_norm"`` or ``"path_conditioning"``.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.
        outputs: as for :func:`fxpath.analyze`.
        gates: take gates in, as for :func:`fxpath.analyze`; a channel that an activation reads
            which is not homogeneous keeps its scale.

    Returns:
        A deep copy with rescaled parameters and running means (see :func:`rescale`).

    Warns:
        UserWarning: as :func:`rescale`.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: for an unknown method; for a NaN or infinite parameter; for a weight that is
            computed (pruned, parametrized), by name; for a result that the number format of a
            parameter does not hold, by name.
        TypeError: for an exported program.
        FloatingPointError: if some h_v, the least norm or the path kernel is beyond float64.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> first = normalize(model)[0]
        >>> bool(torch.allclose(first.weight.abs().sum(1) + first.bias.abs(), torch.ones(3)))
        True
        >>> least = normalize(model, method="least_norm")
        >>> entering = least[0].weight.square().sum(1) + least[0].bias.square()
        >>> bool(torch.allclose(entering, least[2].weight.square().sum(0)))
        True
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: known are {', '.join(map(repr, METHODS))}")
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs, gates)
    captured, lifted = take_in(model, given)
    check_finite({captured.tensors[key]: tensor for key, tensor in captured.live().items()})
    found = open_groups(captured, lifted)
    numbers, free = found._numbers, found.rescalable
    if method == "path_conditioning":
        numbers, free = through_norms(captured, lifted, found)
    values = METHODS[method](captured, lifted, found, free)
    _warn_of_unread(model, captured, found, values, given)
    return _rescaled(model, numbers, values)


def _unit_norm_factors(
    captured: Captured, lifted: fx.GraphModule, found: ChannelGroups, free: Tensor
) -> Tensor:
    """Factors with which the largest h_v of each group that is free is 1, ``[groups]``."""
    live = captured.live()
    largest = torch.zeros(len(found) + 1, dtype=torch.float64)
    _Norms(lifted, found._activations, largest).run(
        *(
            live[node.target].double().cpu()
            for node in lifted.graph.nodes
            if node.op == "placeholder"
        )
    )
    largest = largest[:-1]
    if not bool(largest.isfinite().all()):
        raise FloatingPointError("a path-norm inside the network does not fit into float64")
    return torch.where((largest > 0) & free, 1 / largest, 1.0)


#: Method of :func:`normalize` -> the factors of all channel groups.
METHODS: dict[str, Callable[[Captured, fx.GraphModule, ChannelGroups, Tensor], Tensor]] = {
    "incoming": _unit_norm_factors,
    "least_norm": least_norm_factors,
    "path_conditioning": conditioning_factors,
}


class _Norms(fx.Interpreter):
    """Runs the lifted network in float64, and keeps the largest h_v of each group."""

    def __init__(
        self, module: fx.GraphModule, activations: Mapping[fx.Node, Tensor], largest: Tensor
    ) -> None:
        super().__init__(module)
        self.activations, self.largest = activations, largest

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is ops.source:
            result = result.double()
        numbers = self.activations.get(n)
        if numbers is not None:
            uniform = [d for d, size in enumerate(numbers.shape) if size == 1]
            most = result.amax(uniform, keepdim=True) if uniform else result
            self.largest.scatter_reduce_(0, numbers.reshape(-1), most.reshape(-1), "amax")
        return result


# -- applying factors ------------------------------------------------------------------------------


def _warn_of_unread(
    model: nn.Module, captured: Captured, found: ChannelGroups, values: Tensor, given: Given
) -> None:
    """Say which modules evaluation leaves out: what they read may be rescaled, and they are not."""
    if given.until is not None or given.outputs is not None or bool((values == 1).all()):
        return
    unread = unread_modules(model, captured)
    if unread:
        warnings.warn(
            f"{', '.join(unread)}: not reached in eval mode, and left as they are; what they read "
            "in training (an auxiliary head reads channels inside the network) may have another "
            "scale now, so that their outputs change",
            UserWarning,
            stacklevel=5,  # past the decorators of the verb
        )


def unread_modules(model: nn.Module, captured: Captured) -> list[str]:
    """The largest submodules, and single parameters, that no evaluation reads."""
    nodes = captured.graph_module.graph.nodes
    names = {captured.tensors[n.name] for n in nodes if n.users and n.name in captured.tensors}
    named = named_tensors(model)
    return _unread(model, "", {id(named[name]) for name in names if name in named})


def _unread(module: nn.Module, path: str, read: set[int]) -> list[str]:
    """The same for one module, from the ids of what is read."""
    found: list[str] = []
    for name, parameter in module.named_parameters(path, recurse=False):
        if id(parameter) not in read:
            found.append(name)
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        parameters = list(child.parameters())
        if parameters and not any(id(p) in read for p in parameters):
            found.append(full)
        else:
            found += _unread(child, full, read)
    return found


def _rescaled(model: nn.Module, numbers: Numbers, values: Tensor) -> nn.Module:
    table = torch.cat([values, values.new_ones(1)])
    copied = copy.deepcopy(model)
    tensors = named_tensors(copied)
    overflowed = []
    for name, (out, into) in numbers.items():
        tensor = tensors[name]
        # The quotient first: where both sides have one factor, no digit changes.
        ratio = table[-1:] if out is None else table[out]
        if into is not None:
            ratio = ratio / table[into]
        result = (tensor.double() * ratio.to(tensor.device)).to(tensor.dtype)
        # Below the smallest normal number digits get lost.
        lost = (
            (result.abs() < torch.finfo(tensor.dtype).tiny)
            & (tensor != 0)
            & (ratio < 1).to(tensor.device)
        )
        if bool(lost.any()) or not bool(result.isfinite().all()):
            overflowed.append(name)
        tensor.data.copy_(result)
    if overflowed:
        raise ValueError(
            f"{', '.join(overflowed)}: the rescaled values over- or underflow; take smaller "
            "factors, or a model in float64"
        )
    return copied
