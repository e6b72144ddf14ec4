"""Path mass as the importance by which Torch-Pruning ranks channels (extra ``torch-pruning``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxpath.model import Given, Shapes
from fxpath.model.given import Inputs, Outputs
from fxpath.modes import plain_mode
from fxpath.pairs.pair import fingerprint
from fxpath.pruning.importance import channel_importance
from fxpath.pruning.removal import Network

try:
    import torch_pruning as tp
except ImportError as error:
    raise ImportError(
        "path mass as an importance needs Torch-Pruning: pip install 'torch-fxpath[torch-pruning]'"
    ) from error

__all__ = ["PathMagnitudeImportance"]

#: What Torch-Pruning calls to cut the outputs of a layer.
MAKING = (
    tp.prune_conv_out_channels,
    tp.prune_depthwise_conv_out_channels,
    tp.prune_linear_out_channels,
)


class PathMagnitudeImportance(tp.importance.Importance):  # type: ignore[misc]
    """Path mass through the channels of a group, for any pruner of Torch-Pruning.

    The importance of a position of a group is the sum of the shares Path-Mag / path-norm (14) of
    all weights and biases that lead into its channels.  For one channel that is the path mass
    through a neuron, ``h_v d log ||Phi||_1 / d h_v``.  Every path that is lost when the channels
    are zero enters them by one of these entries, so that it is an upper bound of the part of the
    path-norm that is lost with them; and that part itself where no path enters them twice, as
    where one layer, called once, makes the channel.  Channels that a residual sum ties are entered
    once in each block that a path crosses: there the sum may exceed 1.  Weights from a channel to
    one that goes with it (depthwise convolutions, batch norms) are not counted, as what runs
    through them entered before.  It is what :func:`fxpath.prune_channels` ranks by.

    Shares of different layers compare as they are: rank globally without a normalizer.  No
    rescaling of neurons changes them.  They are those of the model as it is at each call: between
    two calls weights may change, and a model whose structure has changed is captured again.

    Example:
        >>> import torch, torch_pruning as tp
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> pruner = tp.pruner.BasePruner(
        ...     model,
        ...     torch.zeros(1, 3, 8, 8),
        ...     importance=PathMagnitudeImportance(model, (3, 8, 8)),
        ...     global_pruning=True,
        ...     pruning_ratio=0.25,
        ...     ignored_layers=[model[2]],
        ... )
        >>> pruner.step()
        >>> model[0].out_channels
        6
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Shapes = None,
        *,
        example_inputs: Inputs = None,
        example_kwargs: Mapping[str, Any] | None = None,
        batch_dim: int | None = 0,
        until: str | None = None,
        outputs: Outputs = None,
    ) -> None:
        """Capture a model.

        Args:
            model: the one that the pruner was given; only the pruner changes it.
            input_shape: as for :func:`fxpath.analyze`.
            example_inputs: as for :func:`fxpath.analyze`.
            example_kwargs: as for :func:`fxpath.analyze`.
            batch_dim: as for :func:`fxpath.analyze`.
            until: as for :func:`fxpath.analyze`.
            outputs: as for :func:`fxpath.analyze`.

        Raises:
            UnsupportedModelError: listing every operation that the theory does not cover.
            ValueError: as :func:`fxpath.analyze`; for a weight that is computed (pruned,
                parametrized), by name.
            TypeError: for an exported program.
        """
        self.model = model
        self._given = Given(input_shape, example_inputs, example_kwargs, batch_dim, until, outputs)
        with plain_mode():
            self._network = Network(model, self._given)
        self._marks: dict[str, int] = {}
        self._importance = torch.empty(0)

    def __call__(self, group: tp.dependency.Group) -> Tensor:
        """Importance of each position of a group.

        Args:
            group: channels that Torch-Pruning removes together.

        Returns:
            ``[positions]``, in the order of the group's first indices: float64, >= 0, on the
            device of the model's parameters.

        Raises:
            ValueError: where a position is an input or an output of the network, or no layer of
                what is analysed makes the channels, by name: such layers belong into the pruner's
                ``ignored_layers``; and if the model as it is now cannot be captured.
            FloatingPointError: if float64 does not hold the scores.
        """
        importance = self._live_importance()
        channels = self._channels(group)
        found = [float(importance[list(each)].sum()) for each in channels]
        device = next(self.model.parameters()).device
        return torch.tensor(found, dtype=torch.float64, device=device)

    @plain_mode()
    def _live_importance(self) -> Tensor:
        """Path mass into each channel of the model as it is."""
        try:
            live = self._network.captured.live()
        except ValueError:
            # Channels are gone since: what stands now is captured, or refused by its own name.
            self._network = Network(self.model, self._given)
            live = self._network.captured.live()
            self._marks = {}
        # A pruner asks for one group after another; only what it reads of the weights is new.
        marks = {key: fingerprint(tensor.detach()) for key, tensor in live.items()}
        if marks != self._marks:
            scores = self._network.program.scores()
            importance = channel_importance(self._network.found, scores)
            # Channels that nothing reads have the number -1, and no path.
            self._importance = torch.cat([importance, importance.new_zeros(1)])
            self._marks = marks
        return self._importance

    def _channels(self, group: tp.dependency.Group) -> list[set[int]]:
        """The channels of the network at each position of a group."""
        names = {module: name for name, module in self.model.named_modules()}
        made = self._network.found.outputs
        positions = {root: position for position, root in enumerate(group[0].idxs)}
        channels: list[set[int]] = [set() for _ in positions]
        layers: list[str] = []
        for item in group.items:
            layer, handler = item.dep.target.module, item.dep.handler
            if layer not in names or handler not in MAKING:
                continue
            layers.append(names[layer])
            own = made.get(f"{names[layer]}.weight")
            if own is None:
                continue
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                channels[positions[root]].add(int(own[index]))
            if any(0 in each for each in channels):
                raise ValueError(
                    f"{names[layer]} makes channels that are inputs or outputs of the network, "
                    "which path mass does not rank: put it into the pruner's ignored_layers"
                )
        if not all(channels):
            raise ValueError(
                f"{', '.join(layers)}: no layer that is analysed makes these channels, so that "
                "path mass does not rank them: put them into the pruner's ignored_layers"
            )
        return channels
