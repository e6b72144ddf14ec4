"""Model -> flat functional ATen graph, without touching the model.

``torch.export`` does the tracing; this module prepares what it is given (an eval-mode skeleton that
shares every tensor, example inputs of batch size 1, a cut at ``until``), and tidies what comes
back: one placeholder per tensor, no in-place operations, no training leftovers.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind
from torch.overrides import TorchFunctionMode

from fxpath.errors import Problem, SupportReport, UnsupportedModelError
from fxpath.passes.functional import functionalize
from fxpath.shapes import infer_input_shape

Model = nn.Module | ExportedProgram
Shape = Sequence[int]

TENSOR_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass
class Captured:
    """A captured model.

    Attributes:
        graph_module: flat ATen graph; placeholders are tensors of the model, then its inputs.
        tensors: placeholder name -> qualified name of the tensor in the model.
        parameters: those qualified names that are parameters.
        source: where the live tensors are read from.
        constants: tensors that the graph holds itself (literals of the forward code).
    """

    graph_module: fx.GraphModule
    tensors: dict[str, str]
    parameters: frozenset[str]
    source: Model
    constants: dict[str, Tensor]

    def live(self) -> dict[str, Tensor]:
        """The model's tensors as they are now: placeholder name -> tensor.

        Raises:
            KeyError: if a tensor that was captured is no longer part of the model.
        """
        named = {**self.constants, **named_tensors(self.source)}
        missing = [name for name in self.tensors.values() if name not in named]
        if missing:
            raise KeyError(
                f"{', '.join(missing)}: no longer in the model; its structure has changed since it "
                "was captured, so call fxpath.compile again"
            )
        return {placeholder: named[name] for placeholder, name in self.tensors.items()}


def named_tensors(model: Model) -> dict[str, Tensor]:
    """Parameters and buffers by qualified name, tied ones under each of their names."""
    if isinstance(model, ExportedProgram):
        return {**model.state_dict, **{k: v for k, v in model.constants.items() if _is_tensor(v)}}
    named: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    named.update(model.named_parameters(remove_duplicate=False))
    return named


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class _Passthrough(nn.Module):
    """Stands for a data-parallel wrapper: the names stay, the scattering goes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _SharedTensors(TorchFunctionMode):
    """While active, deep copies share their tensors, non-leaf ones included."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0]
        return func(*args, **(kwargs or {}))


def skeleton(model: nn.Module) -> nn.Module:
    """An eval-mode copy of the module tree that shares all tensors with ``model``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> copied = skeleton(model)
        >>> copied.training, copied[0].weight is model[0].weight, model.training
        (False, True, True)
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = _normal(tensor) if tensor.is_inference() else tensor
    with _SharedTensors():
        copied = copy.deepcopy(model, memo)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if _is_data_parallel(child):
                setattr(module, name, _Passthrough(child.get_submodule("module")))
    if _is_data_parallel(copied):
        copied = _Passthrough(copied.get_submodule("module"))
    return copied.eval()


def _normal(tensor: Tensor) -> Tensor:
    """A tensor that torch.export accepts, for one that was made in inference mode."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied


def _is_data_parallel(module: nn.Module) -> bool:
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def capture(
    model: Model,
    input_shape: Shape | Sequence[Shape] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    until: str | None = None,
) -> Captured:
    """Trace a model into a flat ATen graph.

    Raises:
        ValueError: if no input shape is given and none can be inferred, or ``until`` names no
            module.
        UnsupportedModelError: if the model cannot be captured as one graph.
    """
    if isinstance(model, ExportedProgram):
        if until is not None:
            raise ValueError(
                "until needs a module to stop at, and an ExportedProgram has none: "
                "export the model up to there, or pass the nn.Module itself"
            )
        if _is_dynamic(model):
            # Shapes must be numbers; tracing the program once more with given inputs makes them so.
            return _adopt(
                _export(model.module(), _examples(model.module(), input_shape, example_inputs))
            )
        return _adopt(model)
    copied = skeleton(model)
    if input_shape is None and example_inputs is None:
        input_shape = infer_input_shape(model)
    inputs = _examples(copied, input_shape, example_inputs)
    if until is not None:
        _stop_at(copied, until)
    program = _export_one_sample(copied, inputs) if example_inputs else _export(copied, inputs)
    return _adopt(program, model)


def _is_dynamic(program: ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(
        isinstance(v, Tensor) and any(not isinstance(n, int) for n in v.shape) for v in values
    )


def _examples(
    model: nn.Module,
    input_shape: Shape | Sequence[Shape] | None,
    example_inputs: tuple[Any, ...] | None,
) -> tuple[Any, ...]:
    if example_inputs is not None:
        if input_shape is not None:
            raise ValueError("pass either input_shape or example_inputs, not both")
        return tuple(example_inputs)
    if input_shape is None:
        raise ValueError("pass input_shape=(...), without the batch axis, or example_inputs")
    shapes = [input_shape] if not input_shape or isinstance(input_shape[0], int) else input_shape
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return tuple(
        torch.zeros(1, *_checked(shape), dtype=like.dtype, device=like.device) for shape in shapes
    )


def _checked(shape: Any) -> tuple[int, ...]:
    if not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"input_shape {tuple(shape)}: every length must be a positive integer")
    return tuple(shape)


def _export_one_sample(model: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """Export for the first sample of a batch; inputs without a batch axis are taken as they are."""
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.dim()]
    batch = {x.shape[0] for x in tensors}
    if len(batch) != 1 or batch == {1}:
        return _export(model, inputs)
    first = tuple(x[:1] if isinstance(x, Tensor) and x.dim() else x for x in inputs)
    try:
        return _export(model, first)
    except UnsupportedModelError:
        # The first axis is no batch axis: a single sample has other shapes than the model reads.
        return _export(model, inputs)


def _export(model: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, inputs, strict=False)
    except Exception as error:
        raise UnsupportedModelError(SupportReport((_capture_problem(error),))) from error


def _capture_problem(error: Exception) -> Problem:
    """What torch.export could not trace, with the user's own line."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        frames.append((path, trace.tb_lineno))
        trace = trace.tb_next
    package = __file__.rsplit("/", 1)[0]
    ours = [f for f in frames if "/torch/" not in f[0] and not f[0].startswith((package, "<"))]
    text = next(iter(str(error).strip().splitlines()), "")
    if "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        reason = f"control flow that depends on the values of activations ({text})"
        remedy = "replace the branch by tensor operations, or cut the model before it with until="
    else:
        reason = f"torch.export cannot trace the model: {type(error).__name__}: {text}"
        remedy = "check input_shape/example_inputs against a plain call of the model"
    where = f"{ours[-1][0]}:{ours[-1][1]}" if ours else "unknown"
    return Problem("torch.export.export", "(capture)", "", where, reason, remedy)


def _stop_at(model: nn.Module, until: str) -> None:
    """Make ``model`` return the last output of its submodule; later operations are dead."""
    try:
        stop = model.get_submodule(until)
    except AttributeError as error:
        known = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"until={until!r} names no module; the last ones are {', '.join(known[-5:])}"
        ) from error
    outputs: list[Any] = []
    stop.register_forward_hook(lambda module, args, output: outputs.append(output))
    forward = model.forward

    @functools.wraps(forward)
    def truncated(*args: Any, **kwargs: Any) -> Any:
        outputs.clear()
        forward(*args, **kwargs)
        if not outputs:
            raise ValueError(f"until={until!r}: this module is not called by the model's forward")
        return outputs[-1]

    model.forward = truncated


def _adopt(program: ExportedProgram, model: nn.Module | None = None) -> Captured:
    """Turn an exported program into a functional graph with canonical tensor names."""
    graph, signature = functionalize(program)
    source: Model = program if model is None else model
    held = {**program.constants, **dict(program.state_dict)}
    live = named_tensors(source)
    canonical: dict[int, str] = {}
    parameters = dict(program.named_parameters() if model is None else model.named_parameters())
    for name, tensor in (*parameters.items(), *live.items()):
        canonical.setdefault(id(tensor), name)

    tensors: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    first: dict[str, fx.Node] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind not in TENSOR_KINDS or spec.target is None:
            continue
        name = spec.target
        if name in live:
            name = canonical[id(live[name])]
        elif isinstance(held.get(name), Tensor):
            constants[name] = held[name]
        if name in first:
            # Tied weights: one placeholder, so that their scores add up under one name.
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
            continue
        first[name] = node
        tensors[node.name] = name
    _keep_outputs(graph, signature)
    _drop_dead(graph)
    return Captured(fx.GraphModule({}, graph), tensors, frozenset(parameters), source, constants)


def _keep_outputs(graph: fx.Graph, signature: ExportGraphSignature) -> None:
    """Drop outputs that stand for mutated inputs and buffers, and those that are no tensors."""
    output = next(iter(reversed(graph.nodes)))
    users = [
        value
        for value, spec in zip(output.args[0], signature.output_specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(value, fx.Node)
    ]
    output.args = (tuple(users),)


def _drop_dead(graph: fx.Graph) -> None:
    """Erase what no output depends on, so that a value's users are those that count.

    torch's own pass keeps assertions and dropout; after functionalization nothing has side effects.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not numbers.

    Raises:
        ValueError: naming every tensor with a NaN or infinite entry.
    """
    bad = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            lo, hi = torch.aminmax(tensor.detach())
            if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
                bad.append(name)
    if bad:
        raise ValueError(f"NaN or infinite entries in {', '.join(bad)}: no path-norm is defined")
