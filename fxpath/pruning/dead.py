"""The verb ``remove_dead``: channels go that do nothing, and constants go into biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from fxpath.model import Captured, Given, Shapes, named_tensors
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.private import forward_pre_hooks, pruned_name
from fxpath.pruning.agreement import Fault, compare
from fxpath.pruning.channels import Kept
from fxpath.pruning.constants import Constants
from fxpath.pruning.cuts import gone_mask, make_plan
from fxpath.pruning.masks import deep_copy
from fxpath.pruning.plan import Bias, Plan
from fxpath.pruning.ranking import Ranking
from fxpath.pruning.reach import driven_channels, live_channels
from fxpath.pruning.removal import Chosen, Network, blame, finished
from fxpath.pruning.smaller import PrunedChannels
from fxpath.pruning.surgery import apply_plan, cut
from fxpath.pruning.units import find_units

_USED = Kept("they go together with channels that are in use")
_LAST = Kept("a layer keeps one channel, or one in each group")


@plain_mode()
def remove_dead(
    model: nn.Module,
    input_shape: Shapes = None,
    *,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
) -> PrunedChannels:
    """Remove the channels that do nothing: a smaller model with the same outputs.

    What pruning single weights leaves behind:

    - channels that no path runs through, since all weights that lead to them from inputs and biases
      are zero, or all that lead from them to outputs.  Their share of the path-norm is exactly 0.
    - channels with constant values: biases lead to them, but no input does, as behind a batch norm
      whose gamma is 0.  What a constant adds to the next layer goes into that layer's bias (or its
      batch norm's, or one that it gets), in float64.  That is possible where it adds the same at
      each position; behind zero padding it does not, and the channel stays.

    What counts are the effective weights of eval mode, batch norms folded in, and whether they are
    zero: nothing is compared with a threshold.  A weight that is small stays, even where its share
    underflows.  Channels go together as in :func:`fxpath.prune_channels`; each layer keeps one.

    The smaller model is captured again, and its outputs are those of the model itself (random
    inputs, float64, 1e-9); biases that take up constants are rounded to the model's number format
    after that.

    Args:
        model: a module, in either mode; it is not changed.  Masks of ``torch.nn.utils.prune`` are
            made permanent in a copy, which is then what the plan fits.
        input_shape: as for :func:`fxpath.analyze`.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`; what only reaches other outputs counts as dead.
        outputs: as for :func:`fxpath.analyze`, likewise.

    Returns:
        A :class:`~fxpath.PrunedChannels`.  Its ``certificate`` is the path-metric between the model
        and the model in which all weights of the channels of share 0 are zero: 0.  Constants are no
        part of it: the function is the same without them, but paths that began at their biases now
        begin at those behind them, so that the path-norm changes.  ``kept`` has the channels that
        do nothing and stay, with the reason; ``channels`` are those that are gone, and all that do
        nothing.

    Warns:
        UserWarning: as :func:`fxpath.prune_channels`.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: for a weight that is computed (parametrized), by name; code that has sizes
            written into it where no channel can be kept instead, with the line.
        TypeError: for an exported program.
        FloatingPointError: as :func:`fxpath.path_metric`.

    Example:
        >>> import fxpath
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> _ = model[0].weight.data[:2].zero_()  # two constants
        >>> _ = model[2].weight.data[:, 3].zero_()  # read by nobody
        >>> smaller = fxpath.remove_dead(model)
        >>> smaller.model[0].weight.shape, smaller.certificate.value
        (torch.Size([1, 2]), 0.0)
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(smaller.model(x), model(x), atol=1e-6)
        True
    """
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
    network = Network(_unmasked(model), given)
    dead = _Dead(network)
    decision = dead.choose()
    plan, smaller, outcome = _tried(network, decision)
    while isinstance(outcome, Fault):
        if not blame(network.found, outcome, decision.choice):
            raise ValueError(f"{outcome.source_line}: {outcome.reason}; {_remedy(given)}")
        decision = dead.choose()
        plan, smaller, outcome = _tried(network, decision)
    certificate = network.metric(decision.without_paths)
    return finished(network, decision.choice, plan, smaller, outcome[1], certificate)


@dataclass(frozen=True)
class _Decision:
    """Channels that go, those of them in units that no path runs through, what biases take up."""

    choice: Chosen
    without_paths: Sequence[int]
    biases: Mapping[str, Bias]


class _Dead:
    """Channels of a network that do nothing."""

    def __init__(self, network: Network) -> None:
        found, live = network.found, network.captured.live()
        # What the model's code adds is one of the constants here.
        found.kept = {c: why for c, why in found.kept.items() if c not in found.loaded}
        self._found = found
        self._without_paths = ~live_channels(network.lifted, live, found)
        constant = ~driven_channels(network.lifted, live, found) & ~self._without_paths
        # Inputs and outputs of the network, and what is no channel.
        for flags in (self._without_paths, constant):
            flags[[0, -1]] = False
        self._idle = self._without_paths | constant
        self._constants = Constants(
            network.model,
            network.captured,
            network.lifted,
            found,
            constant,
        )

    def choose(self) -> _Decision:
        """All that can go; reasons to stay are noted with the channels."""
        found, idle = self._found, self._idle.tolist()
        importance = torch.zeros(found.count, dtype=torch.float64)
        used = dict.fromkeys([c for c in range(1, found.count) if not idle[c]], _USED)
        while True:
            units, kept = find_units(found, importance, used | found.kept)
            ranking = Ranking(found, units, 1, 1)
            channels = ranking.first(len(ranking.units))
            gone = gone_mask(found, channels)
            biases, stay = self._constants.folded(gone, self._without_paths)
            if not stay:
                break
            for channel, why in stay.items():
                found.keep(torch.tensor([channel]), why)
        reasons = kept | ranking.kept
        left = {c: reasons.get(c, _LAST) for c in range(1, found.count) if idle[c] and not gone[c]}
        count = sum(int(self._idle[made].sum()) for made in found.outputs.values())
        without_paths = [
            channel
            for unit in ranking.units
            if bool(self._without_paths[list(unit.channels)].all())
            for channel in unit.channels
        ]
        return _Decision(Chosen(channels, count, left), without_paths, biases)


def _tried(
    network: Network, decision: _Decision
) -> tuple[Plan, nn.Module, tuple[Captured, fx.GraphModule] | Fault]:
    """The plan for a choice, the smaller model, and whether it agrees with the model as it is."""
    channels, biases = decision.choice.channels, decision.biases
    plan = replace(make_plan(network.model, network.found, channels), biases=biases)
    smaller = apply_plan(network.model, plan)
    # Compared before the rounding of biases.
    exact: dict[str, Tensor] = {}
    named, made = named_tensors(network.model), named_tensors(smaller)
    for name, bias in biases.items():
        added = torch.tensor(bias.add, dtype=torch.float64, device=made[name].device)
        exact[name] = added.reshape(made[name].shape)
        if not bias.create:
            held = named[name].detach()
            left = cut(held, plan.tensors[name]) if name in plan.tensors else held
            exact[name] = exact[name] + left.double()
    gone = gone_mask(network.found, channels)
    outcome = compare(network.captured, network.found, gone, {}, smaller, network.given, exact)
    return plan, smaller, outcome


def _remedy(given: Given) -> str:
    if given.until is None and given.outputs is None:
        return "take sizes from the tensors themselves (x.flatten(1), x.shape)"
    return "until= and outputs= leave out what still reads these channels: ask for all outputs"


@torch.no_grad()
def _unmasked(model: nn.Module) -> nn.Module:
    """The model; a copy without them if it has masks of ``torch.nn.utils.prune``."""
    if not isinstance(model, nn.Module) or not prune.is_pruned(model):
        return model
    copied = deep_copy(model)
    for module in copied.modules():
        for hook in list(forward_pre_hooks(module).values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, pruned_name(hook))
    return copied
