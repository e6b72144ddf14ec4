"""Capture to placed graph on a device that is not there: nothing mixes devices or reads a number.

Under ``FakeTensorMode`` a tensor has a device and no numbers.  An operation on tensors of two
devices is an error there, and so is a number that is read on the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)

from fxpath.capture import capture
from fxpath.model import Given
from fxpath.passes import Setting, fold, lift, rewrite
from fxpath.passes.derive import Ending, derive
from fxpath.passes.place import into, place
from fxpath.passes.tape import Tape
from fxpath.program.flat import placeholders
from fxpath.program.theta import score_shapes

CUDA = torch.device("cuda", 0)


class Mixed(nn.Module):
    """Products of two parameters, contractions, slopes, clamps, concatenations, upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose1d(2, 4, 3, stride=2)
        self.slope = nn.PReLU(4)
        self.a, self.b = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.ones(1, 11))
        self.matrix = nn.Parameter(torch.ones(3, 4))
        self.mixing = nn.Parameter(torch.ones(11, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(self.first(x))
        y = torch.cat([y * (self.a * self.b), F.relu6(y)], 2)[:, :, :11]
        y = torch.einsum("oc,bct->bot", self.matrix, y)
        y = torch.einsum("bct,tcd->bd", y[:, :2].clamp(-1, 2), self.mixing[..., :2])
        y = F.interpolate(y[:, None], scale_factor=2, mode="linear")
        return F.max_pool1d(y, 2).flatten(1) @ self.matrix[:2]


NETS: dict[str, Any] = {
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (3, 12, 12),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        (5,),
    ),
    "mixed": (Mixed, (2, 5)),
}


def tensors(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


class Watched(fx.Interpreter):
    """Runs a graph and looks at the device of everything in it."""

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        for tensor in tensors(result):
            assert isinstance(tensor, FakeTensor) and tensor.device == CUDA, node.format_node()
        return result


@pytest.mark.parametrize(
    ("name", "whole", "q"),
    [(name, whole, 1.0) for name in NETS for whole in (False, True)] + [("conv", False, 0.5)],
)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_every_step_is_on_the_device_of_the_model(
    name: str, whole: bool, q: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = NETS[name]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Constants are made on the host, with numbers, and moved to the device of the model.
    hold = Tape.hold

    def held(*args: Any) -> Any:
        with mode:
            return hold(*args)

    monkeypatch.setattr(Tape, "hold", held)
    with mode, CUDA:
        model = make().eval()
    with mode:
        captured = capture(model, Given(shape))
    setting = Setting(captured, q)
    assert setting.device == CUDA
    lifted = lift(fold(captured.graph_module, setting), setting)
    lowered = rewrite(lifted, setting, whole).lowered
    live = captured.live()
    values = [live[key].detach() for key in placeholders(lowered)]
    dtype = torch.float32 if q == 1 else torch.float64
    endings: tuple[Ending, ...] = ("norm", "scores", "gradients")
    for ending in endings:
        derived = derive(lowered, setting, dtype, ending)
        assert all(buffer.device == CUDA for buffer in derived.buffers())
        graphs = [derived]
        if ending != "gradients":
            graphs += [place(derived, setting), into(derived, setting)]
        with mode:
            sizes = score_shapes(lowered).values() if ending == "scores" else ()
            out = [torch.empty(size, dtype=dtype, device=CUDA) for size in sizes]
            for module in graphs:
                found = Watched(module).run(*values, *(out if module is not derived else []))
                assert {"mantissa", "exponent"} < found.keys()
                assert len(found.get("scores", {})) == len(out)


def test_a_step_that_reads_a_number_or_mixes_devices_is_found() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ones, (3,)))
    with FakeTensorMode():
        x = torch.ones(2, 3, device=CUDA)
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(3)
        with pytest.raises(DataDependentOutputException):
            float(x.sum())
        with pytest.raises(AssertionError):
            Watched(fx.GraphModule(nn.Module(), graph)).run()
