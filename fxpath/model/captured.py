"""A captured model, and the tensors that it is read from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxpath.model.form import Form, attached_now, changes, held
from fxpath.sample import Sample
from fxpath.sharding import check_resharded, whole

Model = nn.Module | ExportedProgram
Shape = Sequence[int]


@dataclass
class Captured:
    """A captured model.

    Attributes:
        graph_module: flat ATen graph; placeholders are tensors of the model, then its inputs.
        tensors: placeholder name -> qualified name of the tensor in the model.
        parameters: those qualified names that are parameters.
        source: where the live tensors are read from.
        constants: tensors that the graph holds itself (literals of the forward code).
        inputs: shapes of the sample that was traced.
        form: what else about the model the graph was made for.
        baked: tensors whose numbers the graph was made for, such as masks, index lists, and what
            was read as Python numbers: name -> copy as it was then.
        outputs: for each output of the graph, the position or key by which the model returns it.
        gates: whether gates are taken in.
    """

    graph_module: fx.GraphModule
    tensors: dict[str, str]
    parameters: frozenset[str]
    source: Model
    constants: dict[str, Tensor]
    inputs: Sample
    form: Form
    baked: dict[str, Tensor]
    outputs: tuple[int | str, ...]
    gates: bool = False

    def live(self) -> dict[str, Tensor]:
        """The model's tensors as they are now: placeholder name -> tensor.

        Raises:
            ValueError: if anything that the graph was made for has changed since, by name, or if
                the parameters of ``fully_shard`` are gathered.
        """
        check_resharded(self.source)
        named = {
            **{k: v for k, v in self.constants.items() if k not in self.form.attached},
            **named_tensors(self.source),
            **attached_now(self.source, self.form.attached),
        }
        if self.baked.keys() - named.keys():
            named = {**held(self.source), **named}
        live = {key: named[name] for key, name in self.tensors.items() if name in named}
        changed = [
            *(f"{name} is gone" for name in self.tensors.values() if name not in named),
            *changes(self.source, self.form, named),
            *_newly_tied({self.tensors[key]: tensor for key, tensor in live.items()}),
            *(
                f"{self.tensors[key]} has shape {tuple(tensor.shape)}"
                for key, tensor in live.items()
                if tensor.shape != self.form.shapes[key]
            ),
            *(
                f"{name} has other entries, which select or were read as numbers"
                for name, known in self.baked.items()
                if name not in named or not _same(named[name], known)
            ),
        ]
        if changed:
            raise ValueError(
                f"the model has changed since it was captured: {'; '.join(changed)}. "
                "Call fxpath.compile again"
            )
        return live


def named_tensors(model: Model) -> dict[str, Tensor]:
    """Parameters and buffers by qualified name, tied ones under each of their names."""
    if isinstance(model, ExportedProgram):
        return {**model.state_dict, **{k: v for k, v in model.constants.items() if _is_tensor(v)}}
    named: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    named.update(model.named_parameters(remove_duplicate=False))
    return named


def _newly_tied(read: Mapping[str, Tensor]) -> Iterator[str]:
    """Parameters that became one: their scores belong under one name."""
    names: dict[int, str] = {}
    for name, tensor in read.items():
        if isinstance(tensor, nn.Parameter) and names.setdefault(id(tensor), name) != name:
            yield f"{name} and {names[id(tensor)]} became one tensor"


def _same(now: Tensor, then: Tensor) -> bool:
    now = whole(now)
    if now.layout != torch.strided or then.layout != torch.strided:
        now, then = now.to_dense(), then.to_dense()
    return now.dtype == then.dtype and torch.equal(now.detach().to(then.device), then)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _stored(tensor: Tensor) -> Tensor:
    """The entries that a tensor holds, also a sparse one."""
    if tensor.layout == torch.strided:
        return tensor
    return (tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor).values()


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not numbers.

    Raises:
        ValueError: naming every tensor with a NaN or infinite entry, or without values.
    """
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"{', '.join(empty)}: on the meta device, where tensors have no values; load the "
            "weights first"
        )
    bad = []
    for name, tensor in tensors.items():
        values = _stored(whole(tensor.detach()))
        if values.is_floating_point() and values.numel():
            lo, hi = torch.aminmax(values)
            if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
                bad.append(name)
    if bad:
        raise ValueError(f"NaN or infinite entries in {', '.join(bad)}: no path-norm is defined")
