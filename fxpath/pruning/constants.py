"""Constants of channels that are removed: what they add to the biases behind them.

A channel that no input reaches has a value of its own at each position.  What a layer makes of it
can be added to the layer's bias where that is one number for each output channel: without zero
padding, or where the padding meets only weights that are zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from fxpath.errors import source_line
from fxpath.graph import ops
from fxpath.graph.aten import IN_ORDER
from fxpath.graph.equations import letters
from fxpath.graph.schema import arguments, bias_of
from fxpath.model import Captured
from fxpath.private import ConvNd
from fxpath.program.layers import coordinate_of
from fxpath.pruning.channels import Channels, Kept
from fxpath.pruning.plan import Bias
from fxpath.pruning.surgery import places
from fxpath.pruning.values import Reading, read_values

#: What float64 makes of one number at two positions, of the sum of its terms' sizes.
ROUNDING = 1e-12


@dataclass(frozen=True)
class _Place:
    """A tensor that takes up what is added to a layer's outputs.

    Attributes:
        name: of the tensor.
        create: whether it is a bias that its module lacks.
        divisor: what is added is divided by this, one for each output channel.
    """

    name: str
    create: bool = False
    divisor: Tensor = field(default_factory=lambda: torch.ones(()))


class Constants:
    """Constant channels of one model, and the layers that read them.

    Attributes:
        channels: flags of channels whose constants count, ``[numbers]``.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        lifted: fx.GraphModule,
        found: Channels,
        channels: Tensor,
    ) -> None:
        self.channels = channels
        self._model, self._captured, self._found = model, captured, found
        self._lifted, self._ties = lifted, places(model)
        self._nodes = {node.name: node for node in lifted.graph.nodes}
        self._readings: dict[str, Reading] = {}
        if bool(channels.any()):
            self._readings = read_values(lifted, captured.live(), self._chosen)

    def _read(self, name: str) -> Tensor:
        """Channels of what a node reads."""
        return self._found.of(arguments(self._nodes[name])[0])

    def _chosen(self, name: str, x: Tensor) -> Tensor | None:
        kept = x * self.channels[self._read(name)].to(x.device)
        return kept if bool(kept.any()) else None

    def folded(self, gone: Tensor, needless: Tensor) -> tuple[dict[str, Bias], dict[int, Kept]]:
        """What biases take up when channels go.

        Args:
            gone: flags of the channels that go, ``[numbers]``.
            needless: flags of channels whose values no output depends on.

        Returns:
            For each tensor what is added to it, and channels that have to stay, with reasons.
        """
        biases: dict[str, Bias] = {}
        kept: dict[int, Kept] = {}
        for name, reading in self._readings.items():
            node = self._nodes[name]
            read = self._read(name)
            where = gone[read].to(reading.x.device)
            x = reading.x * where
            outputs = self._outputs(node)
            needed = ~(gone | needless)[outputs]
            added = self._added(node, replace(reading, x=x), needed)
            if added is not None and not bool(added.any()):
                continue
            place = self._place(node, len(outputs))
            if added is None or isinstance(place, Kept):
                kept.update(self._culprits(node, replace(reading, x=x), needed, place))
            else:
                left = (added / place.divisor)[~gone[outputs]]
                biases[place.name] = Bias(tuple(left.tolist()), place.create)
        return biases, kept

    def _outputs(self, node: fx.Node) -> Tensor:
        """The channel of each output of a layer."""
        lines = self._found.of(node).expand(node.meta["val"].shape).movedim(_axis(node), 0)
        return lines.flatten(1)[:, 0]

    def _added(self, node: fx.Node, reading: Reading, needed: Tensor) -> Tensor | None:
        """What constants add to each output of a layer; ``None`` if that depends on the position.

        0 for outputs that are not needed; float64 on the CPU.
        """
        if not bool(reading.x.any()):
            return torch.zeros(len(needed), dtype=torch.float64)
        value = reading.apply(reading.x, reading.weight)
        size = reading.apply(reading.x.abs(), reading.weight.abs())
        lines, sizes = (y.movedim(_axis(node), 0).flatten(1).cpu() for y in (value, size))
        lines, sizes = (torch.where(needed[:, None], y, 0) for y in (lines, sizes))
        spread = lines.amax(1) - lines.amin(1)
        return lines[:, 0] if bool((spread <= ROUNDING * sizes.amax(1)).all()) else None

    def _culprits(
        self, node: fx.Node, reading: Reading, needed: Tensor, place: _Place | Kept
    ) -> dict[int, Kept]:
        """Channels whose constants a layer's bias cannot take up."""
        read = self._read(node.name).to(reading.x.device)
        present = read.expand(reading.x.shape)[reading.x != 0].unique().tolist()
        varies = Kept(
            f"a constant, and what it adds to the outputs of {self._layer(node)} depends on the "
            "position, as with zero padding",
            source_line(node.meta["origin"]),
        )
        kept: dict[int, Kept] = {}
        for channel in present:
            added = self._added(node, _part(node, reading, read == channel), needed)
            if added is None:
                kept[channel] = varies
            elif isinstance(place, Kept) and bool(added.any()):
                kept[channel] = place
        # Each may be within rounding where their sum is not.
        return kept or dict.fromkeys(present, varies)

    # -- which tensor takes it up -----------------------------------------------------------------

    def _layer(self, node: fx.Node) -> str:
        weight = coordinate_of(arguments(node)[1])
        name = "a layer" if weight is None else str(arguments(weight)[1])
        return name.split(":", 1)[0].removesuffix(".weight")

    def _place(self, node: fx.Node, count: int) -> _Place | Kept:
        """The bias of a layer, that of its batch norm, or one that its module gets."""
        bias = _bias(node, count)
        if bias is not None:
            return self._holder(bias, node)
        name = next((own for own, use in self._found.uses if use is node), "")
        uses = sum(own == name for own, _ in self._found.uses)
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path) if leaf == "weight" else None
        lacking = isinstance(module, nn.Linear | ConvNd) and module.bias is None
        if lacking and uses == 1 and len(self._ties[name]) == 1:
            return _Place(f"{path}.bias" if path else "bias", create=True)
        return self._refused(
            node, "is used more than once" if lacking else "has no bias of its own"
        )

    def _refused(self, node: fx.Node, why: str) -> Kept:
        layer = self._layer(node)
        return Kept(
            f"a constant, which the bias of {layer} cannot take up: {layer} {why}",
            source_line(node.meta["origin"]),
        )

    def _holder(self, bias: fx.Node, node: fx.Node) -> _Place | Kept:
        """The tensor behind a bias: the batch norm's own shift comes first, its mean last."""
        alone, divisor = len(bias.users) == 1, torch.ones(())
        while bias.target in IN_ORDER or bias.target is ops.coordinate:
            bias = arguments(bias)[0]
            alone &= len(bias.users) == 1
        if bias.target is ops.folded_bias:
            own, factor, beta, mean = arguments(bias)
            if beta is None:
                divisor = -self._factor(factor) if own is None else self._factor(factor)
            bias = beta or own or mean
            alone &= len(bias.users) == 1
        if bias.op != "placeholder":
            return self._refused(node, "computes it from other tensors")
        name = self._captured.tensors[str(bias.target)]
        if name not in self._ties:
            return self._refused(node, f"has {name}, which is no parameter and no buffer")
        if not alone or len(self._ties[name]) != 1:
            return self._refused(node, f"shares {name} with other layers")
        return _Place(name, divisor=divisor)

    def _factor(self, node: fx.Node) -> Tensor:
        """Gamma / sigma; where gamma is 0 nothing is added, and nothing to be divided."""
        gamma, var, eps = arguments(node)
        live = self._captured.live()
        known = [None if n is None else live[str(n.target)].detach().cpu() for n in (gamma, var)]
        assert known[1] is not None
        factor = ops.normalizer(known[0], known[1], eps)
        return torch.where(factor == 0, 1.0, factor)


def _part(node: fx.Node, reading: Reading, where: Tensor) -> Reading:
    """What a layer reads of a channel."""
    x, weight = reading.x, reading.weight
    if node.target is ops.conv and arguments(node)[8] == 1:
        # A thin convolution takes a fraction of the time.
        places = where.expand(x.shape).movedim(1, 0).flatten(1)[:, 0].nonzero().flatten()
        axis = 0 if arguments(node)[6] else 1
        return replace(
            reading, x=x.index_select(1, places), weight=weight.index_select(axis, places)
        )
    return replace(reading, x=x * where)


def _bias(node: fx.Node, count: int) -> fx.Node | None:
    """What is added to a layer's outputs alone, one number for each output channel."""
    bias = bias_of(node)
    if bias is None:
        return None
    shape, behind = bias.meta["val"].shape, node.meta["val"].dim() - _axis(node)
    if shape.numel() != count or (
        count > 1 and (len(shape) < behind or shape[len(shape) - behind] != count)
    ):
        return None
    held = bias
    while held.target in IN_ORDER:
        held = arguments(held)[0]
    whole = held.target is ops.coordinate and held.meta["val"].numel() == count
    return bias if whole else None


def _axis(node: fx.Node) -> int:
    """The axis of a layer's outputs along which its channels lie."""
    if node.target is ops.conv:
        return 1
    form = letters(arguments(node)[3])
    return len(form.out) - 1 if form.matrix is None else form.out.index(form.matrix[1])
