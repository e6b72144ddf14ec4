"""Every private name of torch that fxpath reads, each with what it is for.

A release of torch may move or drop these: what the package asks of torch beyond its public
interface is decided here, and nowhere else.  Left out are the operators of ATen whose names begin
with an underscore, which exported graphs consist of, and the dictionaries ``_modules``,
``_parameters`` and ``_buffers`` of a module, which torch's own users write modules with.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Finds a backend of `torch.compile` by its name.
from torch._dynamo import lookup_backend

# Held while Dynamo captures and compiles.
from torch._dynamo.convert_frame import compile_lock

# What `torch.compile` makes of a module; it is run uncompiled.
from torch._dynamo.eval_frame import OptimizedModule

# Where Dynamo found an input of a graph: a variable, and the steps from there.
from torch._dynamo.source import (
    GlobalSource,
    LocalSource,
    NNModuleSource,
    TensorPropertySource,
)

# What says which operators an exported program of a dialect may hold.
from torch._export.verifier import SpecViolationError, Verifier
from torch._guards import ChainedSource, CompileContext, tracing

# Targets of an exported graph's nodes: an operation of ATen, or a control structure.
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

# Values of a trace, which have shapes and no entries.
from torch._subclasses.fake_tensor import FakeTensor

# A graph module whose Python code is written when it is called or printed.
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule

# The classes that all batch norms and all convolutions have in common.
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.utils import prune
from torch.sparse import SparseSemiStructuredTensorCUTLASS

# Leaves a trace, to compute with real numbers meanwhile.
from torch.utils._python_dispatch import _disable_current_modes as without_modes

# Nested inputs and outputs, flattened as torch.export flattens them.
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "ASSERT",
    "ChainedSource",
    "HOOKS",
    "ConvNd",
    "FakeTensor",
    "GlobalSource",
    "HigherOrderOperator",
    "LazyGraphModule",
    "LocalSource",
    "NNModuleSource",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "OptimizedModule",
    "SpecViolationError",
    "TensorPropertySource",
    "Verifier",
    "archived_device",
    "archived_dtype",
    "archived_program",
    "archive_schema",
    "compile_ahead",
    "call_uncompiled",
    "called_compiled",
    "compile_id",
    "compile_lock",
    "entered_by",
    "forward_hooks",
    "forward_pre_hooks",
    "global_forward_hooks",
    "has_cpp_compiler",
    "internal_overlap",
    "is_archived_union",
    "keep_versions",
    "keystr",
    "lookup_backend",
    "operators",
    "outside_dynamo",
    "overload_name",
    "pruned_name",
    "schema",
    "semi_structured_tiles",
    "storage_key",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "uncompiled",
    "unsharded_now",
    "without_modes",
    "without_torch_function",
    "write_count",
]

#: Reads a number, as `torch.Tensor.item` does.
ASSERT: Callable[..., Any] = torch._assert
#: Where a module keeps the hooks that its call runs.
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


# --- operations -----------------------------------------------------------------------------------


def schema(overload: OpOverload) -> torch.FunctionSchema:
    """Names, defaults and aliasing of an operation's arguments and results."""
    return overload._schema


def overload_name(overload: OpOverload) -> str:
    """``"Tensor"`` of ``aten.add.Tensor``."""
    return overload._overloadname


def operators() -> Sequence[str]:
    """Names of all operations that torch's dispatcher knows: what a graph in a file may call."""
    return torch._C._dispatch_get_all_op_names()


# --- modules --------------------------------------------------------------------------------------


def forward_pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Hooks that run before a module's forward: pruning is one, and a copy has its own."""
    return module._forward_pre_hooks


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Hooks that run after a module's forward."""
    return module._forward_hooks


def global_forward_hooks() -> Iterator[Callable[..., Any]]:
    """Hooks that run at the call of any module."""
    yield from _module._global_forward_hooks.values()
    yield from _module._global_forward_pre_hooks.values()


def entered_by(module: nn.Module, entry: Callable[..., Any] | None) -> None:
    """Let ``entry`` answer a module's calls, its hooks included; None: itself does."""
    module._compiled_call_impl = entry


def call_uncompiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module with its hooks, past what `entered_by` or `Module.compile` put before it."""
    return module._call_impl(*args, **kwargs)


def uncompiled(module: nn.Module) -> nn.Module | None:
    """The module that ``torch.compile`` was given, if it made this one."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def unsharded_now(module: Any) -> bool:
    """Whether a module of ``fully_shard`` holds gathered parameters in the place of its own."""
    state = module._get_fsdp_state()
    # Releases of torch differ: a list of groups, or one or none.
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return not all(group.is_sharded for group in groups)


def keep_versions(state: collections.OrderedDict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Give a state dict the layers' format versions of another one: loading converts by them."""
    state._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]


def pruned_name(method: prune.BasePruningMethod) -> str:
    """Name of the weight that a hook of ``torch.nn.utils.prune`` computes."""
    return method._tensor_name


def called_compiled(frame: FrameType) -> nn.Module | None:
    """The module that this frame of the stack calls, if ``torch.compile`` was given it."""
    if frame.f_code is not nn.Module._wrapped_call_impl.__code__:
        return None
    module: nn.Module = frame.f_locals["self"]
    # `Module.compile` leaves the module as it is, and has its calls compiled.
    return uncompiled(module) or (module if module._compiled_call_impl is not None else None)


# --- tensors --------------------------------------------------------------------------------------


def storage_key(tensor: Tensor) -> int:
    """The same number for tensors of one storage, one without memory included."""
    return tensor.untyped_storage()._cdata


def internal_overlap(tensor: Tensor) -> bool | None:
    """Whether two entries of a tensor are in one place; None where torch does not try to tell."""
    return (False, True, None)[torch._debug_has_internal_overlap(tensor)]


def without_torch_function() -> AbstractContextManager[None]:
    """Calls that modes and subclasses of ``__torch_function__`` do not see."""
    return torch._C.DisableTorchFunction()


def semi_structured_tiles() -> Mapping[torch.dtype, Any]:
    """Per dtype, of what sizes the rows and columns must be for torch's 2:4 kernels."""
    return SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version


# --- what Dynamo compiles -------------------------------------------------------------------------


def compile_id() -> str:
    """Torch's number of what is being compiled: ``frame/compilation``."""
    return str(CompileContext.current_compile_id())


def outside_dynamo() -> AbstractContextManager[Any]:
    """In it, torch.export does not go on with the fake tensors and lengths of Dynamo's trace."""
    return tracing(None)


# --- slow to import: for those alone who ask ------------------------------------------------------


def compile_ahead(program: Any, path: str, configs: dict[str, Any]) -> None:
    """Compile an exported program with AOTInductor into a package at ``path``."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=path, inductor_configs=configs)


def archive_schema() -> ModuleType:
    """The dataclasses that an exported program's file is written in."""
    from torch._export.serde import schema

    return schema


def is_archived_union(record: type) -> bool:
    """Whether a dataclass of `archive_schema` holds one of several fields."""
    from torch._export.serde.union import _Union

    return issubclass(record, _Union)


def _archived_record(record: type, data: Mapping[str, Any]) -> Any:
    """A dataclass of `archive_schema`, from vetted data."""
    from torch._export.serde.serialize import _dict_to_dataclass

    return _dict_to_dataclass(record, data)


def archived_device(data: Mapping[str, Any]) -> torch.device:
    """The device that a file names."""
    from torch._export.serde.serialize import deserialize_device

    return deserialize_device(_archived_record(archive_schema().Device, data))


def archived_dtype(number: int) -> torch.dtype:
    """The dtype that a file numbers."""
    from torch._export.serde.serialize import deserialize_scalar_type

    return deserialize_scalar_type(number)  # type: ignore[arg-type]


def archived_program(
    data: Mapping[str, Any], state: dict[str, Any], constants: dict[str, Any], inputs: Any
) -> torch.export.ExportedProgram:
    """The program that a file describes, from vetted data: reads nothing, evaluates no pickle."""
    from torch._export.serde.serialize import ExportedProgramDeserializer

    described = _archived_record(archive_schema().ExportedProgram, data)
    return ExportedProgramDeserializer().deserialize(described, state, constants, inputs)


def has_cpp_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
