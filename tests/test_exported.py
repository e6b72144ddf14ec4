"""Exported programs: ATen alone, and buffers under the model's names.

The program as it runs eagerly is the oracle; what it computes is tested elsewhere.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

import fxpath
from fxpath.capture.loading.certificates import stored_tensors
from fxpath.certificate import fingerprint
from tests.support.artefacts import agrees, made, shared
from tests.support.nets import randomize


def operators(program: ExportedProgram) -> set[str]:
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    # What splits several results is Python's own.
    return {
        t.namespace if isinstance(t, OpOverload) else getattr(t, "__name__", str(t)) for t in called
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("lenet", torch.float32), ("convolutions", torch.float64), ("joined", torch.float32)],
)
def test_aten_alone_with_the_model_s_tensors_as_buffers(name: str, dtype: torch.dtype) -> None:
    model, program, exported = shared(name, dtype)
    # The gradients of what was joined are taken apart by Python's own getitem, torch.export's way.
    assert operators(exported) - ({"getitem"} if name == "joined" else set()) == {"aten"}
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


class AlsoRead(nn.Module):
    """Tensors that weigh, and whose numbers decide what the graph is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 1)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))
        self.register_buffer("scale", torch.tensor(2.0))
        # What the program and its holder have of their own.
        self._own = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.steps = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.where(self.mask > 0, self.first(x), torch.zeros(3)) * self.mask * self._own
        return self.last(torch.relu(self.steps(h) * self.scale)) * self.scale.item()


def test_what_the_graph_was_made_for_is_not_exchanged() -> None:
    model = randomize(AlsoRead(), weights=True)
    program = fxpath.compile(model, (3,), backend="eager")
    exported = program.exported()
    assert "_own" in exported.state_dict and "steps.weight" in exported.state_dict
    module = exported.module()
    agrees(module(), program)
    state = copy.deepcopy(model.state_dict())
    weights = {name: -3 * x for name, x in state.items() if name not in ("mask", "scale")}
    # In half of its uses alone they would make a number that belongs to no network.
    changed = {"mask": 1 - state["mask"], "scale": 2 * state["scale"]}
    found = module.load_state_dict({**weights, **changed}, strict=False)
    assert set(found.unexpected_keys) == {"mask", "scale"}
    model.load_state_dict(weights, strict=False)
    agrees(module(), program)


def test_its_certificate_is_about_them_all_the_same(tmp_path: Path) -> None:
    program = fxpath.compile(randomize(AlsoRead(), weights=True), (3,), backend="eager")
    program.save(tmp_path / "net.pt2")
    tensors = stored_tensors(tmp_path / "net.pt2")
    certificate = fxpath.load_certificate(tmp_path / "net.pt2")
    assert tensors is not None and {"mask", "scale"} <= set(certificate.tensors)
    assert fingerprint({n: tensors[n] for n in certificate.tensors}) == certificate.weights
