"""Exported programs: ATen alone, and buffers under the model's names.

The program as it runs eagerly is the oracle; what it computes is tested elsewhere.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

import fxpath
from tests.support.artefacts import agrees, made, shared
from tests.support.nets import randomize


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
