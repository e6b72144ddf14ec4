"""Modules that are really smaller: a plan carried out on a deep copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxpath.model import named_tensors
from fxpath.private import ConvNd, NormBase
from fxpath.pruning.plan import Bias, Cut, Plan
from fxpath.sharding import refuse_sharded


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """A smaller copy of a model.

    Args:
        model: a module with the names and shapes that the plan was made for, such as a new one from
            the same constructor; it is not changed.
        plan: of :func:`fxpath.prune_channels`.

    Returns:
        A deep copy with smaller parameters, buffers and modules.  Tied tensors stay tied; modes,
        number formats, devices, memory formats and ``requires_grad`` stay what they are.

    Raises:
        ValueError: if names, shapes or attributes do not fit, naming them; for cuts of one tensor
            that differ under its names, and modules that would say something else than their
            tensors are; for positions that are not ascending or outside of a tensor.
        TypeError: for something that is no plan.

    Example:
        >>> import fxpath
        >>> make = lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> plan = fxpath.prune_channels(make(), 2).plan
        >>> apply_plan(make(), plan)[0].weight.shape
        torch.Size([2, 2])
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"the plan is a {type(plan).__name__}: Plan.from_dict makes one from data")
    # One that was made by hand is trusted no more than one from a file.
    plan = Plan.from_dict(plan.to_dict())
    _check(model, plan)
    refuse_sharded(model, "a deep copy of a model")
    copied = copy.deepcopy(model)
    named, ties = named_tensors(copied), places(copied)
    for name, each in plan.tensors.items():
        _replace(copied, ties[name], cut(named[name], each))
    modules = dict(copied.named_modules())
    for path, changes in plan.attributes.items():
        for attribute, (_, after) in changes.items():
            setattr(modules[path], attribute, after)
    _check_result(copied, plan)
    for name, bias in plan.biases.items():
        _add(copied, name, bias)
    return copied


def cut(tensor: Tensor, what: Cut) -> Tensor:
    """What is left of a tensor, in its memory format; a parameter stays one."""
    with torch.no_grad():
        left = tensor.detach()
        if what.within:
            left = _cut_parts(left, what)
        for axis, gone in what.remove.items():
            if axis or not what.within:
                left = left.index_select(axis, _left(left.shape[axis], gone, left.device))
        for layout in (torch.channels_last, torch.channels_last_3d):
            fits = tensor.dim() == (4 if layout is torch.channels_last else 5)
            # A kernel of one tap has both formats.
            if fits and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
                left = left.contiguous(memory_format=layout)
    if not isinstance(tensor, nn.Parameter):
        return left
    return nn.Parameter(left, tensor.requires_grad)


def _left(size: int, gone: Sequence[int], device: torch.device) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[list(gone)] = False
    return kept.nonzero().flatten().to(device)


def _cut_parts(tensor: Tensor, what: Cut) -> Tensor:
    """Rows of a grouped convolution's weight, with the columns that its own group keeps."""
    rows = set(what.remove.get(0, ()))
    each = len(tensor) // len(what.within)
    parts = []
    for number, (part, gone) in enumerate(zip(tensor.split(each), what.within, strict=True)):
        own = [row - number * each for row in rows if row // each == number]
        part = part.index_select(0, _left(each, own, part.device))
        parts.append(part.index_select(1, _left(part.shape[1], gone, part.device)))
    return torch.cat(parts)


# -- the model's modules ---------------------------------------------------------------------------


def places(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a tensor of the model all its names: more than one if it is tied."""
    named = named_tensors(model)
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in named.items()}


def _replace(model: nn.Module, names: Sequence[str], new: Tensor) -> None:
    """Put a tensor in the place of another, wherever that is registered."""
    for place in names:
        path, _, leaf = place.rpartition(".")
        module = model.get_submodule(path)
        held = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = new  # type: ignore[assignment]


def _add(model: nn.Module, name: str, bias: Bias) -> None:
    """Add constants to a bias that exists, or give the module one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if bias.create:
        like = module._parameters["weight"]
        assert like is not None
        module._parameters[leaf] = nn.Parameter(
            torch.zeros(len(bias.add), dtype=like.dtype, device=like.device), like.requires_grad
        )
    held = named_tensors(model)[name]
    with torch.no_grad():
        added = held.double() + torch.tensor(bias.add, dtype=torch.float64, device=held.device)
        held.copy_(added.reshape(held.shape))


def attributes_of(
    module: nn.Module, shapes: dict[str, tuple[int, ...]], groups: int | None
) -> dict[str, int]:
    """What a module of torch.nn notes about the shapes of its tensors.

    Args:
        module: any module; those that note nothing give an empty dict.
        shapes: of its tensors, by their names in it.
        groups: of a convolution.
    """
    weight = shapes.get("weight", ())
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, ConvNd):
        assert groups is not None
        ends = weight[0], weight[1] * groups
        out, into = reversed(ends) if module.transposed else ends
        return {"out_channels": out, "in_channels": into, "groups": groups}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(module, NormBase):
        sizes = [shape[0] for shape in shapes.values() if shape]
        return {"num_features": sizes[0]} if sizes else {}
    return {}


# -- does a plan fit? ------------------------------------------------------------------------------


def _check(model: nn.Module, plan: Plan) -> None:
    named, ties = named_tensors(model), places(model)
    wrong = []
    for name, each in plan.tensors.items():
        if name not in named:
            wrong.append(f"{name} is missing")
        elif tuple(named[name].shape) != each.shape:
            wrong.append(f"{name} has shape {tuple(named[name].shape)}, in the plan {each.shape}")
        else:
            wrong += [
                f"{other} is {name}, and loses something else in the plan"
                for other in ties[name]
                if plan.tensors.get(other, each) != each
            ]
    modules = dict(model.named_modules())
    for path, changes in plan.attributes.items():
        for attribute, (before, _) in changes.items():
            found = getattr(modules.get(path), attribute, None)
            if attribute not in _KNOWN or found != before:
                wrong.append(f"{path}.{attribute} is {found}, in the plan {before}")
    for name, bias in plan.biases.items():
        wrong += _wrong_bias(model, plan, name, bias)
    if wrong:
        raise ValueError(f"the plan is for another model: {'; '.join(wrong)}")


def _check_result(smaller: nn.Module, plan: Plan) -> None:
    """Whether modules say what their tensors are."""
    named, ties = named_tensors(smaller), places(smaller)
    touched = {place.rpartition(".")[0] for name in plan.tensors for place in ties[name]}
    wrong = []
    for path, module in smaller.named_modules():
        if path in touched or path in plan.attributes:
            prefix = f"{path}." if path else ""
            own = [*module._parameters, *module._buffers]
            shapes = {n: tuple(named[prefix + n].shape) for n in own if prefix + n in named}
            groups = module.groups if isinstance(module, ConvNd) else None
            for attribute, size in attributes_of(module, shapes, groups).items():
                said = getattr(module, attribute)
                if said != size:
                    wrong.append(f"{prefix}{attribute} would be {said} where there are {size}")
    if wrong:
        raise ValueError(f"the plan does not agree with itself: {'; '.join(wrong)}")


_KNOWN = {
    *("out_features", "in_features", "out_channels", "in_channels", "groups"),
    *("num_parameters", "num_features"),
}


def _wrong_bias(model: nn.Module, plan: Plan, name: str, bias: Bias) -> list[str]:
    named = named_tensors(model)
    path, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    if not bias.create:
        if name not in named:
            return [f"{name} is missing"]
        shape = plan.tensors[name].after if name in plan.tensors else tuple(named[name].shape)
        expected = torch.Size(shape).numel()
    else:
        if path not in modules or leaf not in modules[path]._parameters or name in named:
            return [f"{name} is no bias that {path or 'the model'} lacks"]
        weight = f"{path}.weight" if path else "weight"
        if weight not in named:
            return [f"{weight} is missing"]
        shape = plan.tensors[weight].after if weight in plan.tensors else named[weight].shape
        module = modules[path]
        if isinstance(module, ConvNd) and module.transposed:
            changes = plan.attributes.get(path, {})
            expected = shape[1] * changes.get("groups", (module.groups, module.groups))[1]
        else:
            expected = shape[0]
    if expected != len(bias.add):
        return [f"{name} has {expected} entries, in the plan {len(bias.add)}"]
    return []
