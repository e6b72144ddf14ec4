"""Pruning criteria side by side: magnitude, Path-Mag, and the loss-sensitivity of OBD.

Magnitude comes as it is, and at the rescaling of least l^2 norm (canonical magnitude), where it is
as invariant as Path-Mag; any of them can be taken relative to the rest of its tensor.

Every criterion returns scores by parameter name, each a tensor of its parameter's shape, larger =
more important to keep; the model is not changed.  Weights are *effective* ones, as in
:func:`fxpath.analyze`: a pruned or parametrized weight has the name of the weight that its layer
reads (``0.weight``), and its value.

Magnitude and OBD score the weights of convolutions and linear layers, as the paper's Appendix E
does; Path-Mag and canonical magnitude score biases and batch normalization too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.utils import parametrize, prune

from fxpath.api import analyze
from fxpath.model import Model, Shapes, skeleton
from fxpath.model.state import untouched
from fxpath.private import forward_pre_hooks, pruned_name
from fxpath.sharding import refuse_sharded
from fxpath.symmetry.canonical import canonical_magnitude, relative_to_layer

__all__ = [
    "canonical_magnitude",
    "magnitude",
    "obd",
    "path_magnitude",
    "path_shares",
    "relative_to_layer",
]

Loss = Callable[[Any, Any], Tensor]

_SCORED = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def magnitude(
    model: nn.Module, *, out: MutableMapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Size ``|theta_i|`` of every convolution and linear weight.

    It changes when neurons are rescaled and the function is not; Path-Mag (10) does not.

    Args:
        model: a module in either mode.
        out: tensors to write into, one for every score, of its shape and dtype.

    Returns:
        Parameter name -> tensor of the parameter's shape and dtype, entries >= 0; those of ``out``
        if it was given.

    Raises:
        ValueError: if ``out`` has other names, shapes or dtypes than the scores; if a layer's
            weight is neither a parameter nor computed by a pruning or a parametrization.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> magnitude(layer)
        {'weight': tensor([[3., 4.]])}
    """
    computed = prune.is_pruned(model) or any(map(parametrize.is_parametrized, model.modules()))
    weights = _weights(_effective(model) if computed else model)
    with torch.no_grad():
        if out is None:
            return {name: weight.abs() for name, weight in weights.items()}
        _check_buffers(out, weights)
        return {name: torch.abs(weight, out=out[name]) for name, weight in weights.items()}


def path_shares(model: Model, input_shape: Shapes = None, **options: Any) -> dict[str, Tensor]:
    """Path-Mag (10) of every parameter as a share of the path-norm.

    The scores of :func:`fxpath.analyze`; shares rank entries as absolute values do, and always fit
    (:func:`fxpath.path_magnitude` has absolute values).

    Args:
        model: as for :func:`fxpath.analyze`.
        input_shape: shape of the input without the batch axis.
        options: as for :func:`fxpath.analyze`.

    Returns:
        Parameter name -> tensor of the parameter's shape, entries >= 0.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: as :func:`fxpath.analyze`.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0]]))
        >>> path_shares(layer)
        {'weight': tensor([[0.2500, 0.7500]])}
    """
    return analyze(model, input_shape, **options).scores


def path_magnitude(model: Model, input_shape: Shapes = None, **options: Any) -> dict[str, Tensor]:
    """Deprecated name of :func:`path_shares`; :func:`fxpath.path_magnitude` has absolute values.

    Args:
        model: as for :func:`path_shares`.
        input_shape: as for :func:`path_shares`.
        options: as for :func:`path_shares`.
    """
    warnings.warn(
        "fxpath.criteria.path_magnitude returns shares: it is called path_shares now; "
        "fxpath.path_magnitude returns absolute values",
        DeprecationWarning,
        stacklevel=2,
    )
    return path_shares(model, input_shape, **options)


def obd(
    model: nn.Module, loss: Loss, batch: tuple[Any, Any], *, seed: int = 0
) -> dict[str, Tensor]:
    """Optimal Brain Damage ``h_ii theta_i^2 / 2`` of every convolution and linear weight.

    The diagonal of the loss's Hessian H is Hutchinson's estimate from one Rademacher vector v, as
    in the paper's Appendix E: ``diag(H) = E[(Hv) * v]``, so that the score is
    ``(Hv) * v * theta * theta / 2``.  Other parameters are held fixed.

    An estimate has the noise of the off-diagonal entries: scores can be negative, and unlike exact
    OBD (21) they do change when neurons are rescaled.  Average over seeds for less noise.

    Args:
        model: a module in either mode; it is run as in eval mode.
        loss: called as ``loss(output, targets)``, returns a 0-d tensor.
        batch: the pair ``(inputs, targets)``; inputs are a tensor ``[batch, ...]``, or a tuple of
            the model's arguments.
        seed: of v; the same on every device.

    Returns:
        Parameter name -> tensor of the parameter's shape and dtype, of either sign.

    Raises:
        ValueError: if the loss is not a 0-d tensor; if a layer's weight is neither a parameter nor
            computed by a pruning or a parametrization.
        NotImplementedError: from torch, if an operation has no forward-mode derivative.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = layer.weight.data.fill_(3.0)
        >>> batch = torch.tensor([[2.0]]), torch.tensor([[1.0]])
        >>> obd(layer, lambda output, target: (output - target).square().sum() / 2, batch)
        {'weight': tensor([[18.]])}
    """
    copied = _effective(model)
    weights = {name: weight.detach() for name, weight in _weights(copied).items()}
    if not weights:
        return {}
    fixed = {name: parameter.detach() for name, parameter in copied.named_parameters()}
    inputs, targets = batch

    def value(theta: dict[str, Tensor]) -> Tensor:
        # A forward pass may write into buffers (a counter of calls) even in eval mode.
        buffers = {name: buffer.clone() for name, buffer in copied.named_buffers()}
        result = loss(functional_call(copied, fixed | buffers | theta, inputs), targets)
        if result.dim():
            raise ValueError(
                f"the loss has shape {tuple(result.shape)}: take its sum or mean over the batch"
            )
        return result

    generator = torch.Generator().manual_seed(seed)
    signs = {name: _rademacher(weight, generator) for name, weight in weights.items()}
    # Reverse over forward: a fifth faster than backward twice.  Hooks see no real tensors.
    with untouched(model), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # torch's own use of torch.jit, on the first forward-mode derivative.
        warnings.simplefilter("ignore", FutureWarning)
        products = grad(lambda theta: jvp(value, (theta,), (signs,))[1])(weights)
    return {
        name: signs[name].mul_(products[name]).mul_(weight).mul_(weight).mul_(0.5)
        for name, weight in weights.items()
    }


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs in the shape, dtype and device of a tensor.

    One random bit each: ``bernoulli_`` takes eight times as long, a good part of the whole score.
    """
    words = torch.empty(-(-like.numel() // 64), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    signs = (2 * bits - 1).to(like.dtype).index_select(0, words.view(torch.uint8).int())
    return signs.flatten()[: like.numel()].view(like.shape).to(like.device)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of convolutions and linear layers; a tied one once, by its first name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, _SCORED):
            if id(module.weight) not in names:
                raise ValueError(
                    f"{path or type(module).__name__}: its weight is no parameter; register it as "
                    "one, or compute it with torch.nn.utils.parametrize"
                )
            found[names[id(module.weight)]] = module.weight
    return found


def _effective(model: nn.Module) -> nn.Module:
    """A skeleton of the model in which pruned and parametrized tensors are plain parameters."""
    refuse_sharded(model, "a criterion that computes weights, or runs the model,")
    copied = skeleton(model)
    with torch.no_grad():
        for module in copied.modules():
            for name, value in _computed(module).items():
                # A pruned weight is a plain attribute, which would hide the parameter.
                module.__dict__.pop(name, None)
                module.register_parameter(name, nn.Parameter(value))
    return copied


def _computed(module: nn.Module) -> dict[str, Tensor]:
    """Take pruning or parametrization off one module of a skeleton: name -> computed tensor."""
    values: dict[str, Tensor] = {}
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        values = {name: getattr(module, name) for name in module.parametrizations}
        # remove_parametrizations() would edit the class, which is the original module's too.
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
    for key, hook in list(forward_pre_hooks(module).items()):
        if isinstance(hook, prune.BasePruningMethod):
            values[pruned_name(hook)] = hook.apply_mask(module)
            del forward_pre_hooks(module)[key]
    return values


def _check_buffers(out: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
    if out.keys() != scores.keys():
        difference = sorted(out.keys() ^ scores.keys())
        raise ValueError(f"out must have one tensor for each score; differs in {difference}")
    for name, score in scores.items():
        given, needed = _form(out[name]), _form(score)
        if given != needed:
            raise ValueError(f"out[{name!r}] is {given}, its score {needed}")


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
