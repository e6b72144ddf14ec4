"""What can run a program: each column of `benchmarks.criteria`.

A column is a function of a model, the shape of its input and whether scores are asked for besides
the norm.  It does all that is done once, and returns a :class:`Way`.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxpath
from fxpath import PathProgram

__all__ = ["COLUMNS", "Found", "Way", "deviation", "expected", "offered", "read"]


@dataclass(frozen=True)
class Found:
    """Decimal logarithm of the path-norm, and shares by name, as far as they were asked for."""

    log10: float | None
    scores: Mapping[str, Tensor]


@dataclass(frozen=True)
class Way:
    """One evaluation, which is timed, and what it found when it was last run, which is not."""

    run: Callable[[], object]
    found: Callable[[], Found]


def expected(model: nn.Module, shape: tuple[int, ...]) -> Found:
    """What every column finds, in float64."""
    program = fxpath.compile(model, shape, dtype=torch.float64, backend="eager")
    return Found(program.log10_path_norm(), program.scores())


def deviation(found: Found, right: Found) -> float:
    """Largest relative deviation: of the norm, or of a score from the largest of its parameter's.

    Example:
        >>> right = Found(2.0, {"weight": torch.tensor([0.5, 0.1])})
        >>> round(deviation(Found(2.0, {"weight": torch.tensor([0.5, 0.2])}), right), 4)
        0.2
    """
    apart = []
    if found.log10 is not None and right.log10 is not None:
        apart.append(abs(10 ** (found.log10 - right.log10) - 1))
    for name, score in found.scores.items():
        other = right.scores[name]
        largest = float(other.amax()) or 1.0
        apart.append(float((score.double() - other).abs().amax()) / largest)
    return math.nan if any(map(math.isnan, apart)) else max(apart)


def eager(model: nn.Module, shape: tuple[int, ...], scores: bool) -> Way:
    """The flat graph as it is; scores into given tensors."""
    return _program(fxpath.compile(model, shape, backend="eager"), scores)


def inductor(model: nn.Module, shape: tuple[int, ...], scores: bool) -> Way:
    """The flat graph through Inductor; scores into given tensors."""
    with warnings.catch_warnings():
        # Without a compiler the graph runs as it is, which is not what is measured here.
        warnings.filterwarnings("error", "no C\\+\\+ compiler found")
        return _program(fxpath.compile(model, shape, backend="inductor"), scores)


def _program(program: PathProgram, scores: bool) -> Way:
    if not scores:
        program.path_norm()
        return Way(program.path_norm, lambda: Found(program.log10_path_norm(), {}))
    out = {name: torch.empty_like(score) for name, score in program.scores().items()}
    return Way(lambda: program.scores(out), lambda: Found(None, out))


def aotinductor(model: nn.Module, shape: tuple[int, ...], scores: bool) -> Way:
    """The exported program, compiled ahead of time; scores into new tensors."""
    from torch._inductor import aoti_load_package

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "program.pt2"
        fxpath.compile(model, shape, backend="eager").save(package, "aoti", scores)
        loaded = aoti_load_package(str(package))
    return Way(loaded, lambda: read(loaded()))


def onnx_runtime(model: nn.Module, shape: tuple[int, ...], scores: bool) -> Way:
    """The exported program in ONNX Runtime; all that it finds into given tensors."""
    import numpy
    import onnxruntime

    program = fxpath.compile(model, shape, backend="eager")
    found: dict[str, Any] = program.exported(scores).module()()
    found = {key: _empty(value) for key, value in found.items()}
    numbers = [value for value in found.values() if isinstance(value, Tensor)]
    memory = [*numbers, *found.get("scores", {}).values()]
    device = memory[0].device
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # no line for every weight that is an input
    settings.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait in a loop take the cores from the forward pass that follows.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    own = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if own not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this onnxruntime was built without {own}: install onnxruntime-gpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.onnx"
        program.save(path, scores=scores)
        session = onnxruntime.InferenceSession(path, settings, providers=[own])
    binding = session.io_binding()
    kinds = {torch.float32: numpy.float32, torch.float64: numpy.float64}
    for output, tensor in zip(session.get_outputs(), memory, strict=True):
        place = device.type, device.index or 0, kinds[tensor.dtype], tensor.shape
        binding.bind_output(output.name, *place, tensor.data_ptr())
    return Way(lambda: session.run_with_iobinding(binding), lambda: read(found))


def _empty(value: Any) -> Any:
    """Memory for what a program finds: contiguous zeros."""
    if isinstance(value, dict):
        return {name: _empty(score) for name, score in value.items()}
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)


def cudagraph(model: nn.Module, shape: tuple[int, ...], scores: bool) -> Way:
    """The flat graph as it is, recorded once as a CUDA graph on its tensors, and replayed."""
    program = fxpath.compile(model, shape, backend="eager")
    out = {n: torch.empty_like(s) for n, s in program.scores().items()} if scores else {}
    ending = "scores" if scores else "norm"
    live = program.captured.live()
    steps = program.flat.steps(live, program.dtype, ending, list(out.values()))
    # Libraries set themselves up at the first runs, which must not be recorded.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            steps()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = steps()
    for score in out.values():
        score.zero_()  # what is found is a replay's

    def replay(held: Any = steps) -> None:
        """A recorded graph has addresses alone: what lies there lives as long as its steps."""
        graph.replay()

    return Way(replay, lambda: read({**found, "scores": out}))


def read(found: Mapping[str, Any]) -> Found:
    """What an exported program returned."""
    mantissa, exponent = float(found["mantissa"]), float(found["exponent"])
    log10 = math.log10(mantissa) + exponent * math.log10(2) if mantissa > 0 else -math.inf
    return Found(log10, found.get("scores", {}))


#: Name -> label and function.
COLUMNS: dict[str, tuple[str, Callable[[nn.Module, tuple[int, ...], bool], Way]]] = {
    "eager": ("eager", eager),
    "inductor": ("Inductor", inductor),
    "aotinductor": ("AOTInductor", aotinductor),
    "onnx": ("ONNX Runtime", onnx_runtime),
    "cudagraph": ("CUDA graph", cudagraph),
}


def offered(device: torch.device) -> list[str]:
    """Names of the columns that a device can have."""
    return [name for name in COLUMNS if name != "cudagraph" or device.type == "cuda"]
