"""What graph viewers are given: shares as an overlay, and smaller networks as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpath
from tests.support.nets import randomize


class Branches(nn.Module):
    """Two branches that are added, one weight that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        y = torch.relu(self.left(y) + self.right(y)).mean((2, 3))
        return self.head(torch.relu(self.head(y)))


def test_the_overlay_fits_the_graph_that_model_explorer_makes(tmp_path: Path) -> None:
    explorer = pytest.importorskip("model_explorer")
    builder = pytest.importorskip("model_explorer.node_data_builder")
    adapter = pytest.importorskip("model_explorer.builtin_pytorch_exportedprogram_adapter")
    model = randomize(Branches(), weights=True).eval()
    analysis = fxpath.analyze(model, (1, 6, 6))
    file, program = tmp_path / "shares.json", tmp_path / "net.pt2"
    analysis.to_model_explorer(file)
    torch.export.save(torch.export.export(model, (torch.ones(1, 1, 6, 6),)), program)

    (graph,) = adapter.BuiltinPytorchExportedProgramAdapter().convert(
        str(program), {"const_element_count_limit": 16}
    )["graphs"]
    labels = {node.id: node.label for node in graph.nodes}
    ((name, data),) = json.loads(file.read_text()).items()
    assert name == graph.id
    # Their own classes take it, and write what we wrote.
    read = builder.GraphNodeData(
        name=data["name"],
        results={k: builder.NodeDataResult(**v) for k, v in data["results"].items()},
        gradient=[builder.GradientItem(**item) for item in data["gradient"]],
    )
    written = json.loads(builder.ModelNodeData({name: read}).to_json_string())
    assert {k: written[name][k] for k in data} == data
    config = explorer.config().add_model_from_path(str(program))
    config.add_node_data_from_path(str(file))
    assert str(file) in config.to_url_param_value()

    shares = {row["name"]: row["share"] for row in analysis.layers}
    found = {node: value["value"] for node, value in data["results"].items()}
    weighing = [node for node, label in labels.items() if "conv2d" in label or "linear" in label]
    assert weighing and set(weighing) <= found.keys() <= labels.keys()
    # In order of execution; the head is called twice.
    expected = ["stem.0", "left", "right", "head", "head"]
    assert [found[node] for node in weighing] == pytest.approx([shares[n] for n in expected])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_pruned_network_in_onnx_has_zeros_and_smaller_shapes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = randomize(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)), weights=True
    )
    x = torch.ones(1, 1, 6, 6)

    def initializers(net: nn.Module, name: str) -> dict[str, torch.Tensor]:
        path = tmp_path / name
        torch.onnx.export(net.eval(), (x,), path, dynamo=True, verbose=False)
        graph = onnx.load(str(path)).graph
        return {
            each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer
        }

    pruned = fxpath.prune(model, 0.5, (1, 6, 6))
    zeros = initializers(pruned.model(), "zeros.onnx")
    for name, mask in pruned.masks.items():
        assert torch.equal(zeros[name] != 0, mask)
    smaller = initializers(fxpath.prune_channels(model, 0.5, (1, 6, 6)).model, "small.onnx")
    assert smaller["0.weight"].shape == (4, 1, 3, 3) and smaller["3.weight"].shape == (2, 64)
