"""The verb ``prune_channels``: rank channels, remove them for real, and prove what was lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpath.model import Captured, Given, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.pairs.erasure import estimated_loss
from fxpath.pairs.matching import side_of
from fxpath.pairs.metric import PathMetric
from fxpath.pairs.pair import Pair
from fxpath.program.program import build
from fxpath.pruning.agreement import Fault, compare
from fxpath.pruning.budget import last_that
from fxpath.pruning.channels import Channels, Kept
from fxpath.pruning.choices import Choice
from fxpath.pruning.chosen import keep_others
from fxpath.pruning.constraints import Constraints, absolute, check_amount, check_budget, unmet
from fxpath.pruning.criterion import Criterion, Scores, all_scores
from fxpath.pruning.cuts import (
    Cost,
    gone_mask,
    layer_macs,
    make_plan,
    masked_tensors,
    parameter_count,
)
from fxpath.pruning.importance import channel_importance
from fxpath.pruning.plan import Plan
from fxpath.pruning.ranking import Ranking
from fxpath.pruning.smaller import ChannelRow, KeptRow, PrunedChannels
from fxpath.pruning.surgery import apply_plan
from fxpath.pruning.units import ENDS, find_units
from fxpath.symmetry.rescaling import unread_modules


@plain_mode()
def prune_channels(
    model: nn.Module,
    amount: float | int | None = None,
    input_shape: Shapes = None,
    *,
    budget: float | None = None,
    constraints: Constraints | None = None,
    criterion: Criterion = "path_magnitude",
    include: Choice | None = None,
    exclude: Choice = (),
    multiple_of: int = 1,
    min_channels: int = 1,
    example_inputs: Inputs = None,
    example_kwargs: Mapping[str, Any] | None = None,
    batch_dim: int | None = 0,
    until: str | None = None,
    outputs: Outputs = None,
) -> PrunedChannels:
    """Remove whole channels: a smaller model, whose loss of path-norm is known exactly.

    Channels are those of :func:`fxpath.channel_groups`.  Some go together: what a depthwise
    convolution or a batch norm reads and makes, and one channel from each group of a grouped
    convolution.  Such a unit's importance is the sum of the scores of the weights and biases that
    lead into it; with shares of Path-Mag (14) that is an upper bound of the part of the path-norm
    that is lost with it.  Units go in ascending order of importance.

    The smaller model is captured again, and its outputs are compared with those of the model in
    which the same weights are zero (random inputs, float64, 1e-9).  Where a line of the model's
    code has sizes written into it, what it reads stays: ``kept`` has the line.

    Args:
        model: a module, in either mode; it is not changed.  The function is that of eval mode.
        amount: share (float) or number (int) of the output channels of layers that can be removed;
            as many units as fit into it go.
        input_shape: as for :func:`fxpath.analyze`.
        budget: instead of ``amount``: the largest part of the path-norm that may be lost
            (0.01 = 1 %), by the exact path-metric to the model; as many units as it allows go.
        constraints: instead of ``amount``: ``{"parameters": "60%", "macs": 2e9}``, the most
            parameters, and multiply-adds of one sample in the model's own layers, that may be left;
            units go until all constraints are met.
        criterion: as for :func:`fxpath.prune`; scores that are given must have every layer.
        include: layers whose output channels may go: fnmatch patterns on names of parameters or of
            modules (with all that is in them), or types of modules; ``None`` for all.  A channel
            that several layers make together goes only if it may go in all of them.
        exclude: layers whose output channels stay, likewise.
        multiple_of: what the number of output channels that a layer keeps is a multiple of, where
            it loses any.
        min_channels: output channels that every layer keeps at least.
        example_inputs: as for :func:`fxpath.analyze`.
        example_kwargs: as for :func:`fxpath.analyze`.
        batch_dim: as for :func:`fxpath.analyze`.
        until: as for :func:`fxpath.analyze`.
        outputs: as for :func:`fxpath.analyze`.

    Returns:
        A :class:`~fxpath.PrunedChannels`.

    Warns:
        UserWarning: naming modules that eval mode does not reach (auxiliary heads): they stay as
            they are, although channels that they read may be gone.

    Raises:
        UnsupportedModelError: listing every operation that the theory does not cover.
        ValueError: unless exactly one of amount, budget and constraints is given; for constraints
            that cannot be met, with the smallest sizes that can be reached; an unknown criterion or
            incomplete scores; a pattern that matches nothing; a weight that is computed (pruned,
            parametrized), by name; code that has sizes written into it where no channel can be
            kept instead, with the line.
        TypeError: for an exported program.
        FloatingPointError: as :func:`fxpath.path_metric`.

    Example:
        >>> import fxpath
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> smaller = fxpath.prune_channels(model, 0.25, (3, 8, 8))
        >>> smaller.model[0].weight.shape, smaller.model[2].in_channels
        (torch.Size([6, 3, 3, 3]), 6)
        >>> smaller.certificate.exact
        True
    """
    if sum(each is not None for each in (amount, budget, constraints)) != 1:
        raise ValueError("pass exactly one of amount, budget and constraints")
    for name, number in (("multiple_of", multiple_of), ("min_channels", min_channels)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r}: pass a positive integer")
    if amount is not None:
        check_amount(amount)
    if budget is not None:
        check_budget(budget)
    given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
    network = Network(model, given)
    limits = None if constraints is None else absolute(constraints, network.cost.before)
    keep_others(model, network.found, include, exclude)
    if criterion == "path_magnitude":
        scores: Scores = network.program.scores()
    else:
        scores = all_scores(criterion, model, network.given)
    importance = channel_importance(network.found, scores)

    def choose(least: int | None) -> Chosen:
        """What goes; all but ``least`` channels of each layer if that is a number."""
        units, kept = find_units(network.found, importance, network.found.kept)
        ranking = Ranking(network.found, units, multiple_of, least or min_channels)
        if least is not None:
            count = len(ranking.units)
        elif amount is not None:
            if isinstance(amount, int) and amount > ranking.removable:
                raise ValueError(
                    f"amount={amount}: only {ranking.removable} channels can be removed"
                )
            count = ranking.within(amount)
        elif limits is not None:
            count = _until_met(ranking, network.cost, limits)
        else:
            assert budget is not None
            count = _within_budget(network, ranking, budget)
        ends = dict.fromkeys((0, -1), ENDS)
        return Chosen(ranking.first(count), ranking.removable, {**ends, **kept, **ranking.kept})

    choice, plan, smaller, lifted = _removed(network, choose)
    return finished(network, choice, plan, smaller, lifted, network.metric(choice.channels))


@dataclass(frozen=True)
class Chosen:
    """Channels that go, how many could, and those that are reported to stay."""

    channels: Sequence[int]
    removable: int
    kept: Mapping[int, Kept]


class Network:
    """A model taken in once, with its channels.

    Attributes:
        model: the model.
        given: what is said about its inputs; a shape that was inferred is written down.
        program: computes its scores.
        captured: the captured model.
        lifted: its lifted graph.
        found: its channels.
        cost: its size, and what is left of it.
    """

    def __init__(self, model: nn.Module, given: Given) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError("channels are removed from an nn.Module, not from an ExportedProgram")
        self.model = model
        self.program = build(model, given)
        self.captured = self.program.captured
        self.given = _written_down(given, self.captured)
        self._side = side_of(self.captured, self.program.lifted)
        self.lifted = self.program.lifted
        with torch.no_grad():
            self.found = Channels(self.captured, self.lifted)
        if self.found.blocked:
            raise ValueError(
                f"{', '.join(dict.fromkeys(self.found.blocked))}: computed from other parameters, "
                "which cannot be cut; make them parameters first (torch.nn.utils.prune.remove, "
                "torch.nn.utils.parametrize.remove_parametrizations)"
            )
        self.cost = Cost(model, self.found, self.lifted)

    def masked(self, channels: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of the model in which these channels' weights are zero, by name."""
        return masked_tensors(self.model, self.found, gone_mask(self.found, channels))

    def lost(self, channels: Sequence[int]) -> float:
        """What :meth:`metric` is relative to the path-norm, but for what cancels; much faster."""
        return estimated_loss(self.program, self._side.tensors, self._without(channels))

    def metric(self, channels: Sequence[int]) -> PathMetric:
        """The path-metric between the model and the same without these channels."""
        theirs = replace(self._side, tensors=self._without(channels))
        return PathMetric(Pair(self.lifted, self._side, theirs).remember())

    def _without(self, channels: Sequence[int]) -> dict[str, Tensor]:
        masked, names = self.masked(channels), self.captured.tensors
        return {key: masked.get(names[key], own) for key, own in self._side.tensors.items()}


def _written_down(given: Given, captured: Captured) -> Given:
    """The inputs that the model was captured with, where they were inferred."""
    if (given.input_shape, given.example_inputs, given.example_kwargs) != (None, None, None):
        return given
    (shape,) = captured.inputs.shapes.values()
    return replace(given, input_shape=shape[1:], batch_dim=0)


def _within_budget(network: Network, ranking: Ranking, budget: float) -> int:
    """The largest number of units whose exact path-metric is within the budget."""
    count = len(ranking.units)
    guess = last_that(lambda n: network.lost(ranking.first(n)) <= budget, count)
    return last_that(
        lambda n: network.metric(ranking.first(n)).relative_upper <= budget, count, guess
    )


def _until_met(ranking: Ranking, cost: Cost, limits: Mapping[str, float]) -> int:
    """The smallest number of units without which all limits are met."""
    least = cost.after(ranking.first(len(ranking.units)))
    if unmet(limits, least):
        raise ValueError(
            f"constraints that cannot be met: {'; '.join(unmet(limits, least))} with all channels "
            "removed that can be"
        )
    if not unmet(limits, cost.after([])):
        return 0
    exceeding = last_that(
        lambda n: bool(unmet(limits, cost.after(ranking.first(n)))), len(ranking.units) - 1
    )
    return exceeding + 1


def _removed(
    network: Network, choose: Callable[[int | None], Chosen]
) -> tuple[Chosen, Plan, nn.Module, fx.GraphModule]:
    """Remove what is chosen, where the model's code does not hold on to it.

    That is found out by removing all there is first, up to two channels in each layer (a single
    one would be broadcast, and hide that sizes do not fit).
    """
    found = network.found
    probe = choose(2)
    while isinstance(fault := _tried(network, probe)[2], Fault) and blame(found, fault, probe):
        probe = choose(2)
    choice = choose(None)
    plan, smaller, outcome = _tried(network, choice)
    while isinstance(outcome, Fault):
        if not blame(found, outcome, choice):
            raise ValueError(
                f"{outcome.source_line}: {outcome.reason}; exclude=(...) the layers that it "
                "depends on"
            )
        choice = choose(None)
        plan, smaller, outcome = _tried(network, choice)
    return choice, plan, smaller, outcome[1]


def finished(
    network: Network,
    choice: Chosen,
    plan: Plan,
    smaller: nn.Module,
    lifted: fx.GraphModule,
    certificate: PathMetric,
) -> PrunedChannels:
    """What a verb returns; warns of modules that were not looked at.

    Args:
        network: the model before.
        choice: the channels that are gone.
        plan: what was removed.
        smaller: the model that is left.
        lifted: its lifted graph.
        certificate: the path-metric between the two.
    """
    unread = unread_modules(network.model, network.captured) if choice.channels else []
    if unread and network.given.until is None and network.given.outputs is None:
        warnings.warn(
            f"{', '.join(unread)}: not reached in eval mode, and left as they are; channels that "
            "they read in training (an auxiliary head reads some inside the network) may be gone",
            UserWarning,
            stacklevel=4,  # past the decorator of the verb
        )
    before, rows = network.cost.before, _layer_rows(network.found, choice.channels)
    return PrunedChannels(
        model=smaller,
        plan=plan,
        certificate=certificate,
        layers=rows,
        kept=_kept_rows(network.found, choice.kept),
        channels=(sum(row["before"] - row["after"] for row in rows), choice.removable),
        parameters=(before["parameters"], parameter_count(smaller)),
        macs=(before["macs"], sum(layer_macs(lifted).values())),
    )


def _tried(
    network: Network, choice: Chosen
) -> tuple[Plan, nn.Module, tuple[Captured, fx.GraphModule] | Fault]:
    """The plan for a choice, the smaller model, and whether it agrees with the masked one."""
    plan = make_plan(network.model, network.found, choice.channels)
    smaller = apply_plan(network.model, plan)
    gone, masked = gone_mask(network.found, choice.channels), network.masked(choice.channels)
    outcome = compare(network.captured, network.found, gone, masked, smaller, network.given)
    return plan, smaller, outcome


def blame(found: Channels, fault: Fault, choice: Chosen) -> bool:
    """Keep the channels that a line holds on to; false if none of them would go."""
    gone = set(choice.channels)
    for node in fault.nodes:
        # What an operation reads is at fault, unless it reads all there is.
        read, made = found.at(node)
        held = next((each for each in (read, made) if each & gone), set[int]())
        found.keep(torch.tensor(sorted(held)), Kept(fault.reason, fault.source_line))
    return bool(gone & found.kept.keys())


def _layer_rows(found: Channels, channels: Sequence[int]) -> list[ChannelRow]:
    gone = gone_mask(found, channels)
    return [
        ChannelRow(
            name=weight.removesuffix(".weight"),
            before=len(made),
            after=len(made) - int(gone[made].sum()),
        )
        for weight, made in found.outputs.items()
    ]


def _kept_rows(found: Channels, kept: Mapping[int, Kept]) -> list[KeptRow]:
    rows = []
    for weight, made in found.outputs.items():
        counts: dict[Kept, int] = {}
        for channel in made.tolist():
            if channel in kept:
                counts[kept[channel]] = counts.get(kept[channel], 0) + 1
        rows += [
            KeptRow(
                name=weight.removesuffix(".weight"),
                channels=count,
                reason=why.reason,
                source_line=why.source_line,
            )
            for why, count in counts.items()
        ]
    return rows
