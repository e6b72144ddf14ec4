"""Exported programs: ATen alone, buffers under the model's names, and what other toolchains make.

The program as it runs eagerly is the oracle; what it computes is tested elsewhere.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

import fxpath
from tests.support.changes import lenet
from tests.support.nets import randomize, resnet18


class Convolutions(nn.Module):
    """Strides, groups, dilation and transposed ones, and a matrix that two things read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.apart = nn.Conv2d(4, 4, (2, 3), groups=2, dilation=(1, 2), padding=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.slope, self.head = nn.PReLU(2), nn.Linear(2, 2)
        self.register_buffer("steps", torch.ones(2))  # a name that the program could want itself

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.apart(self.norm(self.first(x)).relu()).relu())
        y = nn.functional.avg_pool2d(self.slope(y), 2) * self.steps.reshape(2, 1, 1)
        return self.head(self.head(y.mean((2, 3))).relu())


NETS: dict[str, Any] = {
    "lenet": (lenet, (1, 14, 14), True),
    "convolutions": (Convolutions, (2, 8, 7), False),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, fxpath.PathProgram]:
    make, shape, reduced = NETS[name]
    model = randomize(make(), weights=True).eval().to(dtype)
    return model, fxpath.compile(model, shape, backend="eager", reduce=reduced)


@functools.cache
def shared(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, fxpath.PathProgram, ExportedProgram]:
    """A model that nothing changes, its program, and that exported."""
    model, program = made(name, dtype)
    return model, program, program.exported()


def agrees(found: Any, program: fxpath.PathProgram, near: float = 1e-5) -> None:
    """Norm and scores are those of the program."""
    expected = program.evaluate(scores=True)
    assert expected.path_norm > 0
    norm = math.ldexp(float(found["mantissa"]), int(found["exponent"]))
    assert norm == pytest.approx(expected.path_norm, rel=near)
    assert found.keys() == {"mantissa", "exponent", "mass", "scores"}
    assert found["scores"].keys() == expected.shares.keys()
    for name, share in expected.shares.items():
        got = torch.as_tensor(found["scores"][name])
        assert got.dtype == share.dtype
        torch.testing.assert_close(got, share, rtol=0, atol=near * float(share.max()))


def operators(program: ExportedProgram) -> set[str]:
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    # What splits several results is Python's own.
    return {
        t.namespace if isinstance(t, OpOverload) else getattr(t, "__name__", str(t)) for t in called
    }


@pytest.mark.parametrize(
    ("name", "dtype"), [("lenet", torch.float32), ("convolutions", torch.float64)]
)
def test_aten_alone_with_the_model_s_tensors_as_buffers(name: str, dtype: torch.dtype) -> None:
    model, program, exported = shared(name, dtype)
    assert operators(exported) == {"aten"}
    read = model.state_dict()
    assert exported.state_dict.keys() <= read.keys()
    assert {n for n in read if n in program.evaluate(scores=True).shares} <= (
        exported.state_dict.keys()
    )
    for key, tensor in exported.state_dict.items():
        assert torch.equal(tensor, read[key]) and tensor.dtype == read[key].dtype
    agrees(exported.module()(), program, 1e-12 if dtype == torch.float64 else 1e-5)


def test_the_norm_alone() -> None:
    _, program, _ = shared("convolutions", torch.float64)
    found = program.exported(scores=False).module()()
    assert found.keys() == {"mantissa", "exponent", "smallest"}
    norm = math.ldexp(float(found["mantissa"]), int(found["exponent"]))
    assert norm == pytest.approx(program.path_norm(), rel=1e-6)


def test_weights_are_exchanged() -> None:
    model, program = made("convolutions")
    module = program.exported().module()
    for seed in (1, 2):
        randomize(model, seed, weights=True)
        missing = module.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert not missing
        agrees(module(), fxpath.compile(model, (2, 8, 7), backend="eager"))


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

torch.save(torch.export.load(sys.argv[1]).module()(), sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0] == "fxpath"]
"""


def test_it_runs_where_fxpath_cannot_be_imported(tmp_path: Path) -> None:
    _, program, exported = shared("lenet")
    file, result = tmp_path / "program.pt2", tmp_path / "found.pt"
    torch.export.save(exported, file)
    subprocess.run(
        [sys.executable, "-c", FOREIGN, str(file), str(result)], cwd=tmp_path, check=True
    )
    agrees(torch.load(result, weights_only=True), program)


def test_what_float32_does_not_hold_is_refused() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e30, 0.0], [0.0, 1e-30]]))
        model[1].weight.copy_(torch.tensor([[1e-30, 0.0], [0.0, 1e30]]))
    assert fxpath.path_norm(model) == pytest.approx(2, rel=1e-5)
    with pytest.raises(FloatingPointError, match="float64"):
        fxpath.compile(model, backend="eager").exported()
    program = fxpath.compile(model, backend="eager", dtype=torch.float64)
    agrees(program.exported().module()(), program, 1e-12)


# -- other toolchains ------------------------------------------------------------------------------


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    _, program, exported = shared("lenet")
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "lenet.pt2")
    )
    agrees(torch._inductor.aoti_load_package(package)(), program)


def in_onnx_runtime(exported: ExportedProgram, file: Path) -> Any:
    """What ONNX Runtime finds, in the structure of the program's own result."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    translated = torch.onnx.export(exported, dynamo=True, verbose=False)
    assert translated is not None
    translated.save(str(file))
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    like = exported.module()()
    _, spec = torch.utils._pytree.tree_flatten(like)
    results = [torch.from_numpy(result) for result in session.run(None, {})]
    return torch.utils._pytree.tree_unflatten(results, spec)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "dtype"),
    # ONNX Runtime has no transposed convolution in float64.
    [("lenet", torch.float32)]
    + [pytest.param("convolutions", torch.float32, marks=pytest.mark.slow)],
)
def test_onnx(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    _, program, exported = shared(name, dtype)
    agrees(in_onnx_runtime(exported, tmp_path / "net.onnx"), program)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_resnet18_as_aten_and_in_onnx_runtime(tmp_path: Path) -> None:
    program = fxpath.compile(resnet18(), (3, 32, 32), backend="eager")
    exported = program.exported()
    assert operators(exported) == {"aten"}
    agrees(exported.module()(), program)
    agrees(in_onnx_runtime(exported, tmp_path / "net.onnx"), program)
