"""Programs in files, as other toolchains load them: agreement, exchange of weights, no fxpath.

The program as it runs eagerly is the oracle; what it computes is tested elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import fxpath
from tests.support.artefacts import agrees, made, shared
from tests.support.nets import randomize

ROOT = Path(__file__).parent.parent
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

FOREIGN = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fxpath":
            raise ImportError(f"{name} is forbidden")

sys.meta_path.insert(0, Forbidden())
try:
    import fxpath
except ImportError:
    pass
else:
    raise SystemExit("fxpath was imported")
import torch

program = torch.export.load(sys.argv[1])
module = program.module()
before = module()
keys = module.load_state_dict(torch.load(sys.argv[2], weights_only=True), strict=False)
assert not keys.missing_keys, keys
torch.save((before, module()), sys.argv[3])
assert not [name for name in sys.modules if name.split(".")[0] == "fxpath"]
"""


def other_weights(name: str, seed: int = 3) -> tuple[nn.Module, fxpath.PathProgram]:
    """The same architecture with other weights, and what is true of it."""
    model, program = made(name)
    randomize(model, seed, weights=True)
    return model, program


def test_exported_runs_and_takes_weights_where_fxpath_cannot_be_imported(tmp_path: Path) -> None:
    _, program, _ = shared("small")
    file, weights, result = (tmp_path / n for n in ("net.pt2", "weights.pt", "found.pt"))
    program.save(file)
    other, expected = other_weights("small")
    torch.save(other.state_dict(), weights)
    command = [sys.executable, "-c", FOREIGN, *map(str, (file, weights, result))]
    subprocess.run(command, cwd=tmp_path, check=True)
    before, after = torch.load(result, weights_only=True)
    agrees(before, program)
    agrees(after, expected)


def test_files_are_complete_or_not_there(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e30, 0.0], [0.0, 1e-30]]))
        model[1].weight.copy_(torch.tensor([[1e-30, 0.0], [0.0, 1e30]]))
    file = tmp_path / "net.pt2"
    file.write_text("before")
    with pytest.raises(FloatingPointError, match="float64"):
        fxpath.compile(model, backend="eager").save(file)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.pt2", "before")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("net.bin", None), ("net.onnx", "aoti"), ("net.pt2", "onnx"), ("net.pt2", "torchscript")],
)
def test_another_kind_is_an_error_that_names_those_there_are(
    tmp_path: Path, name: str, kind: str | None
) -> None:
    _, program, _ = shared("small")
    with pytest.raises(ValueError, match=r"kind='exported' as FILE.pt2.*kind='onnx' as FILE.onnx"):
        program.save(tmp_path / name, kind)
    assert not list(tmp_path.iterdir())


# -- AOTInductor, in Python and in C++ -------------------------------------------------------------


def compiled_host(folder: Path) -> Path:
    """The example's program in C++, built against this torch."""
    torch_root = Path(torch.__file__).parent
    host = folder / "norm"
    command = [
        *("g++", "-std=c++20", "-O0", str(ROOT / "examples" / "cpp" / "norm.cpp"), "-o", str(host)),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{torch_root / 'include' / part}" for part in ("", "torch/csrc/api/include")),
        *(f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
        f"-Wl,-rpath,{torch_root / 'lib'}",
    ]
    subprocess.run(command, check=True)
    return host


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_aot_inductor_takes_weights_in_python_and_in_a_host_in_c(tmp_path: Path) -> None:
    _, program, _ = shared("small")
    file, weights = tmp_path / "net.pt2", tmp_path / "weights.safetensors"
    program.save(file, kind="aoti")
    other, expected = other_weights("small")
    save_file(other.state_dict(), weights)

    package = torch._inductor.aoti_load_package(str(file))
    agrees(package(), program)
    # Biases of eight numbers and less as well, which Inductor likes to make part of the code.
    held = {n: t for n, t in other.state_dict().items() if n in package.get_constant_fqns()}
    assert other.state_dict().keys() - held.keys() == {"1.num_batches_tracked"}
    package.load_constants(held, check_full_update=False)
    agrees(package(), expected)

    host = compiled_host(tmp_path)
    for arguments, oracle in (([], program), ([str(weights)], expected)):
        command = [str(host), str(file), *arguments]
        first, second = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        mantissa, exponent = map(float, first.split())
        assert math.ldexp(mantissa, int(exponent)) == pytest.approx(oracle.path_norm(), rel=1e-6)
        assert float(second.removeprefix("path-norm ")) == pytest.approx(oracle.path_norm())
    save_file({"0.weight": torch.zeros(3, 1, 3, 3)}, weights)
    failed = subprocess.run([str(host), str(file), str(weights)], capture_output=True, text=True)
    assert failed.returncode == 1 and "no weights for" in failed.stderr


# -- ONNX ------------------------------------------------------------------------------------------


def results(outputs: list[str], values: Any) -> dict[str, Any]:
    """Results of an ONNX runtime in the form of an exported program's."""
    found: dict[str, Any] = {"scores": {}}
    for name, value in zip(outputs, values, strict=True):
        scores, _, key = name.partition("scores.")
        if key and not scores:
            found["scores"][key] = torch.as_tensor(value)
        else:
            found[name] = torch.as_tensor(value)
    return found


def in_onnx_runtime(session: Any, weights: dict[str, Any] | None = None) -> dict[str, Any]:
    outputs = [output.name for output in session.get_outputs()]
    return results(outputs, session.run(None, weights or {}))


def session_of(file: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # a line for each weight, that it can be exchanged
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@quiet
def test_onnx_takes_weights_in_a_session_and_in_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, program, _ = shared("small")
    file = tmp_path / "net.onnx"
    program.save(file)
    other, expected = other_weights("small")
    read = expected.exported(scores=False).state_dict
    named = {name: tensor.numpy() for name, tensor in read.items()}

    session = session_of(file)
    assert not session.get_inputs()
    assert {each.name for each in session.get_overridable_initializers()} == named.keys()
    agrees(in_onnx_runtime(session), program)
    agrees(in_onnx_runtime(session, named), expected)

    graph = onnx.load(str(file))
    onnx.checker.check_model(graph)
    for initializer in graph.graph.initializer:
        if initializer.name in named:
            initializer.CopyFrom(
                onnx.numpy_helper.from_array(named[initializer.name], initializer.name)
            )
    exchanged = tmp_path / "other.onnx"
    onnx.save(graph, str(exchanged))
    agrees(in_onnx_runtime(session_of(exchanged)), expected)

    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    for path, oracle in ((file, program), (exchanged, expected)):
        compiled = core.compile_model(core.read_model(str(path)), "CPU")
        found = compiled({})
        outputs = [output.any_name for output in compiled.outputs]
        agrees(results(outputs, [found[output] for output in compiled.outputs]), oracle, 1e-4)


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("name", ["convolutions", "joined"])
def test_operations_of_all_kinds_in_onnx_runtime(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxscript")
    _, program, _ = shared(name)
    program.save(tmp_path / "net.onnx")
    agrees(in_onnx_runtime(session_of(tmp_path / "net.onnx")), program)


@quiet
def test_sums_by_positions_do_not_depend_on_threads(tmp_path: Path) -> None:
    """ONNX Runtime adds by ScatterND in several threads at once, and loses terms."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    _, program, exported = shared("picked")
    called = {str(node.target) for node in exported.graph.nodes}
    assert "aten.scatter_add.default" in called and "aten.index_put.default" not in called
    program.save(tmp_path / "net.onnx")
    agrees(in_onnx_runtime(session_of(tmp_path / "net.onnx")), program)
    nodes = onnx.load(str(tmp_path / "net.onnx")).graph.node
    reducing = {n.op_type for n in nodes if any(a.name == "reduction" for a in n.attribute)}
    assert reducing == {"ScatterElements"}


@quiet
@pytest.mark.long
def test_a_real_network_in_onnx_runtime(tmp_path: Path) -> None:
    """A ResNet with one block for each width."""
    pytest.importorskip("onnxscript")
    model = randomize(ResNet(BasicBlock, [1, 1, 1, 1])).eval()
    program = fxpath.compile(model, (3, 32, 32), backend="eager")
    program.save(tmp_path / "net.onnx")
    agrees(in_onnx_runtime(session_of(tmp_path / "net.onnx")), program)


def test_what_is_missing_for_onnx_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, _ = shared("small")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-fxpath\[onnx\]'"):
        program.save(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


# -- ExecuTorch ------------------------------------------------------------------------------------


class WithInput(nn.Module):
    """A program with an input that nothing reads: ExecuTorch 1.5 mixes up constants without one."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, unread: torch.Tensor) -> Any:
        return self.program()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_executorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its compiler is a script beside the interpreter, which need not be on the path.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    exir = pytest.importorskip("executorch.exir")
    runtime = pytest.importorskip("executorch.runtime")
    model = randomize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)), weights=True)
    program = fxpath.compile(model, (1, 6, 6), backend="eager")
    unread = (torch.zeros(1),)
    exported = torch.export.export(WithInput(program.exported().module()), unread, strict=False)
    # No operation of core ATen, which is what ExecuTorch takes.
    power = {torch.ops.aten.exp2.default: lambda x: torch.ops.aten.pow.Scalar(2.0, x)}
    lowered = exir.to_edge(exported.run_decompositions(power)).to_executorch()
    file = tmp_path / "net.pte"
    file.write_bytes(lowered.buffer)
    method = runtime.Runtime.get().load_program(str(file)).load_method("forward")
    _, spec = torch.utils._pytree.tree_flatten(program.exported().module()())
    agrees(torch.utils._pytree.tree_unflatten(method.execute(unread), spec), program)


# -- what the files carry --------------------------------------------------------------------------


def test_an_exported_file_lists_its_certificate(tmp_path: Path) -> None:
    model, program, _ = shared("small")
    file = tmp_path / "net.pt2"
    program.save(file, scores=False)
    with zipfile.ZipFile(file) as archive:
        assert [n for n in archive.namelist() if n.endswith("extra/fxpath.json")]
    extra = {"fxpath.json": ""}
    exported = torch.export.load(file, extra_files=extra)
    assert json.loads(extra["fxpath.json"])["path_norm"] == pytest.approx(program.path_norm())
    assert exported.module()().keys() == {"mantissa", "exponent", "smallest"}
    certificate = fxpath.load_certificate(file)
    assert certificate == fxpath.certify(model, (1, 6, 6))
    assert set(certificate.tensors) == exported.state_dict.keys()
