"""What becomes of a model's tensors when channels go: their cuts, and what is left of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fxpath.graph.costs import multiply_adds
from fxpath.graph.schema import arguments
from fxpath.model import named_tensors
from fxpath.private import ConvNd
from fxpath.program.layers import WEIGHING, coordinate_of
from fxpath.pruning.channels import Axis, Channels
from fxpath.pruning.plan import Attribute, Cut, Plan
from fxpath.pruning.surgery import attributes_of, places


def gone_mask(found: Channels, channels: Sequence[int]) -> Tensor:
    """Which numbers of channels go; the last place stands for -1, nothing."""
    gone = torch.zeros(found.count + 1, dtype=torch.bool)
    gone[list(channels)] = True
    gone[0] = False
    return gone


def make_plan(model: nn.Module, found: Channels, channels: Sequence[int]) -> Plan:
    """The plan that removes these channels."""
    gone = gone_mask(found, channels)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    remove: dict[str, dict[int, tuple[int, ...]]] = {}
    within: dict[str, tuple[tuple[int, ...], ...]] = {}
    for axis in found.axes:
        places = gone[axis.channels]
        if not bool(places.any()):
            continue
        if places.dim() == 2:
            parts = [tuple(line.nonzero().flatten().tolist()) for line in places]
            within[axis.tensor] = tuple(parts)
            remove.setdefault(axis.tensor, {})
        else:
            positions = tuple(places.nonzero().flatten().tolist())
            remove.setdefault(axis.tensor, {})[axis.axis] = positions
    tensors = {name: Cut(shapes[name], cuts, within.get(name, ())) for name, cuts in remove.items()}
    return Plan(tensors, _attributes(model, found, gone, tensors))


def _attributes(
    model: nn.Module, found: Channels, gone: Tensor, tensors: Mapping[str, Cut]
) -> dict[str, dict[str, Attribute]]:
    """What modules note about the tensors that are cut, before and after."""
    named = named_tensors(model)
    ties = places(model)
    # A tied tensor is noted by each module that has it.
    cuts = {place: (name, each) for name, each in tensors.items() for place in ties[name]}
    changes: dict[str, dict[str, Attribute]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [*module._parameters, *module._buffers]
        shapes = {leaf: tuple(named[prefix + leaf].shape) for leaf in own if prefix + leaf in named}
        left = {
            leaf: cuts[prefix + leaf][1].after if prefix + leaf in cuts else shape
            for leaf, shape in shapes.items()
        }
        if left == shapes:
            continue
        groups = module.groups if isinstance(module, ConvNd) else None
        after = groups
        if groups is not None and prefix + "weight" in cuts:
            name = cuts[prefix + "weight"][0]
            uses = found.grouped.get(name, [])
            if uses and not uses[0].balanced:
                after = groups - int(gone[uses[0].outputs[:, 0]].sum())
        now = attributes_of(module, left, after)
        # A module whose tensors were exchanged by hand may say something else about them.
        said = {key: getattr(module, key) for key in now}
        changed = {key: (said[key], now[key]) for key in now if said[key] != now[key]}
        if changed:
            changes[path] = changed
    return changes


def masked_tensors(model: nn.Module, found: Channels, gone: Tensor) -> dict[str, Tensor]:
    """The tensors of the model with zeros where weights, biases and means lead into what goes.

    So the channels that go are 0 at the output of each layer; slopes and variances stay.
    """
    named, ties = named_tensors(model), places(model)
    masked: dict[str, Tensor] = {}
    for axis in found.axes:
        where = gone[axis.channels]
        if not axis.incoming or not bool(where.any()):
            continue
        if axis.tensor not in masked:
            value = named[axis.tensor].detach().clone()
            masked.update(dict.fromkeys(ties[axis.tensor], value))
        value = masked[axis.tensor]
        lines = where if where.dim() == 2 else where[None]
        # Parts of axis 0, where each group of a convolution has channels of its own.
        for part, line in zip(value.split(max(1, len(value) // len(lines))), lines, strict=False):
            part.index_fill_(axis.axis, line.nonzero().flatten().to(value.device), 0)
    return masked


# -- sizes -----------------------------------------------------------------------------------------


def parameter_count(model: nn.Module) -> int:
    """Entries of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_macs(lifted: fx.GraphModule) -> dict[fx.Node, int]:
    """Multiply-adds of one sample in every use of a layer's own weight."""
    return {
        node: multiply_adds(node)
        for node in lifted.graph.nodes
        if node.target in WEIGHING and coordinate_of(arguments(node)[1]) is not None
    }


class Cost:
    """Parameters and multiply-adds that are left when channels go, without making the model.

    Attributes:
        before: the model's own, by ``parameters`` and ``macs``.
    """

    def __init__(self, model: nn.Module, found: Channels, lifted: fx.GraphModule) -> None:
        self._found = found
        named = named_tensors(model)
        self._parameters = {
            name for name, tensor in named.items() if isinstance(tensor, nn.Parameter)
        }
        self._shapes = {
            axis.tensor: tuple(named[axis.tensor].shape)
            for axis in found.axes
            if axis.tensor in named
        }
        macs = layer_macs(lifted)
        self._macs: dict[str, int] = {}
        for name, node in found.uses:
            self._macs[name] = self._macs.get(name, 0) + macs[node]
        self.before = {"parameters": parameter_count(model), "macs": sum(macs.values())}

    def after(self, channels: Sequence[int]) -> dict[str, int]:
        """What is left without these channels."""
        gone = gone_mask(self._found, channels)
        left = {name: list(shape) for name, shape in self._shapes.items()}
        for axis in self._found.axes:
            if axis.tensor in left:
                left[axis.tensor][axis.axis] = _left(axis, gone)
        parameters, macs = self.before["parameters"], self.before["macs"]
        for name, shape in left.items():
            before, after = (torch.Size(each).numel() for each in (self._shapes[name], shape))
            if name in self._parameters:
                parameters -= before - after
            if name in self._macs:
                # Each entry of a weight is multiplied equally often.
                macs -= self._macs[name] // before * (before - after)
        return {"parameters": parameters, "macs": macs}


def _left(axis: Axis, gone: Tensor) -> int:
    line = axis.channels if axis.channels.dim() == 1 else axis.channels[0]
    return int((~gone[line]).sum())
