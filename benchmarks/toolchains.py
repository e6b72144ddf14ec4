"""Saved programs in the runtimes of others, each beside a forward pass in that runtime.

`python -m benchmarks.toolchains alexnet resnet18`: per runtime its version, how far the results are
from fxpath's own in float64, milliseconds of one evaluation of path-norm and scores, and of one
forward pass of the model in the same runtime.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxpath
from benchmarks.columns import Found, deviation, expected, read
from benchmarks.timing import explained, interleave, load_module, options, write_json

__all__ = ["TOOLS", "main", "measure"]

#: What runs a file: a function that returns what it finds, as an exported program does.
Run = Callable[[], Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = options("toolchains", __doc__.split("\n")[0], repeats=11)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as for fxpath analyze")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL")
    arguments = parser.parse_args(argv)
    rows = []
    with explained(parser):
        for name in arguments.models:
            for tool in arguments.tools:
                row = measure(load_module(name), tool, arguments.repeats)
                rows.append({"model": name, **row})
                print({"model": name, **row}, flush=True)
    print(tabulate(rows, headers="keys"))
    write_json(arguments.json, rows)
    return 0


def measure(model: nn.Module, tool: str, repeats: int) -> dict[str, Any]:
    """One row: a model's program and its forward pass in one runtime."""
    package, write, load, forward = TOOLS[tool]
    row: dict[str, Any] = {"tool": tool, "version": importlib.metadata.version(package)}
    program = fxpath.compile(model, backend="eager")
    (shape,) = program.captured.inputs.shapes.values()
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what exporters say of their own code
        file = Path(folder) / f"program.{write[0]}"
        start = time.perf_counter()
        program.save(file, write[1])
        row["saved_s"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        run = load(file)
        row["loaded_s"] = round(time.perf_counter() - start, 1)
        found = read(run())
        apart = deviation(Found(found.log10, _visible(found.scores)), expected(model, shape[1:]))
        row["deviation"] = float(f"{apart:.1e}")
        cases = {"program": run, "forward": forward(model, x, Path(folder))}
        medians = interleave(cases, repeats)
    row.update({f"{name}_ms": round(value, 1) for name, value in medians.items()})
    row["ratio"] = round(medians["program"] / medians["forward"], 2)
    return row


def _visible(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores but for those that the format makes zeros of, which exported programs say they do."""
    return {n: s for n, s in scores.items() if float(s.amax()) > 2.0**-100}


# --- runtimes -------------------------------------------------------------------------------------


def exported_run(file: Path) -> Run:
    """The exported program as torch runs it."""
    module = torch.export.load(file).module()
    return lambda: module()


def exported_forward(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], object]:
    """The model as torch runs it."""
    return lambda: model(x)


def aoti_run(file: Path) -> Run:
    """The compiled package."""
    package: Any = importlib.import_module("torch._inductor").aoti_load_package(str(file))
    return lambda: package()


def aoti_forward(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], object]:
    """The model as a compiled package."""
    inductor = importlib.import_module("torch._inductor")
    path = str(folder / "forward.pt2")
    inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=path)
    package = inductor.aoti_load_package(path)
    return lambda: package(x)


def _onnx_forward(model: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "forward.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    return path


def _session(file: Path) -> Any:
    runtime = importlib.import_module("onnxruntime")
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3  # no line for every weight that is an input
    settings.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])


def _structured(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Results by the names that they have in ONNX, as an exported program returns them."""
    found = {name: torch.as_tensor(value) for name, value in zip(names, values, strict=True)}
    scores = {n.removeprefix("scores."): v for n, v in found.items() if n.startswith("scores.")}
    return {**{n: v for n, v in found.items() if not n.startswith("scores.")}, "scores": scores}


def onnx_run(file: Path) -> Run:
    """A session of ONNX Runtime."""
    session = _session(file)
    names = [output.name for output in session.get_outputs()]
    return lambda: _structured(names, session.run(None, {}))


def onnx_forward(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], object]:
    """The model in ONNX Runtime."""
    session = _session(_onnx_forward(model, x, folder))
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _compiled(file: Path) -> Any:
    core = importlib.import_module("openvino").Core()
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return core.compile_model(core.read_model(str(file)), "CPU", threads)


def openvino_run(file: Path) -> Run:
    """A compiled model of OpenVINO, which computes it while it compiles: there are no inputs."""
    compiled = _compiled(file)
    names = [output.any_name for output in compiled.outputs]

    def run() -> dict[str, Any]:
        found = compiled({})
        return _structured(names, [found[output] for output in compiled.outputs])

    return run


def openvino_forward(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], object]:
    """The model in OpenVINO."""
    compiled = _compiled(_onnx_forward(model, x, folder))
    feed = x.numpy()
    return lambda: compiled(feed)


#: Name -> package, ending and kind of its file, how that is run, and the model's forward pass.
TOOLS: dict[
    str,
    tuple[
        str,
        tuple[str, str],
        Callable[[Path], Run],
        Callable[[nn.Module, Tensor, Path], Callable[[], object]],
    ],
] = {
    "exported": ("torch", ("pt2", "exported"), exported_run, exported_forward),
    "aoti": ("torch", ("pt2", "aoti"), aoti_run, aoti_forward),
    "onnxruntime": ("onnxruntime", ("onnx", "onnx"), onnx_run, onnx_forward),
    "openvino": ("openvino", ("onnx", "onnx"), openvino_run, openvino_forward),
}


if __name__ == "__main__":
    sys.exit(main())
