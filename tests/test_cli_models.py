"""What a MODEL can be besides torchvision's names: timm's, and what a file of Python makes."""

import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from fxpath.capture.loading import UsageError, load_model
from fxpath_command import main
from tests.support.command_line import fails

MADE = """
import dataclasses
import helper_beside
from torch import nn

@dataclasses.dataclass
class Config:
    width: int = helper_beside.WIDTH

def make():
    import late_beside
    return nn.Linear(Config().width, late_beside.OUT)

class Space:
    net = nn.Linear(5, 1)

wrong = dict
"""


def same(a: Any, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(v, w) for (m, v), (n, w) in pairs)


# FILE.py:callable


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "some where"
    folder.mkdir()
    (folder / "types.py").write_text(MADE)  # called like a module of Python's own
    (folder / "helper_beside.py").write_text("WIDTH = 3")
    (folder / "late_beside.py").write_text("OUT = 2")
    return folder / "types.py"


def test_a_file_of_python(made: Path, nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = list(sys.path)
    model = load_model(f"{made}:make")
    assert isinstance(model, nn.Linear) and (model.in_features, model.out_features) == (3, 2)
    assert sys.path == path and sys.modules["types"] is types
    torch.manual_seed(0)
    assert same(model, nn.Linear(3, 2))
    assert load_model(f"{made}:Space.net").in_features == 5  # type: ignore[union-attr]
    # As it is now, not as it was.
    made.with_name("new.py").write_text("from torch import nn\nmake = nn.Identity")
    assert isinstance(load_model(f"{made.with_name('new.py')}:make"), nn.Identity)
    made.with_name("new.py").write_text("from torch import nn\nmake = nn.Flatten")
    assert isinstance(load_model(f"{made.with_name('new.py')}:make"), nn.Flatten)
    assert main(["analyze", "some_nets.py:mlp"]) == 0
    assert "some_nets.py:mlp (its own weights)" in capsys.readouterr().out


def test_a_file_of_python_that_is_not_right(
    made: Path, nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = list(sys.path)
    (nets / "bad.py").write_text("def broken(")
    for name, advice in (
        ("none.py:make", "none.py: no such file"),
        (f"{made}:", "FILE.py:callable"),
        (f"{made}:absent", "no attribute 'absent'"),
        (f"{made}:wrong", "returned a dict, not a torch.nn.Module"),
        ("bad.py:make", "SyntaxError"),
    ):
        assert advice in fails(capsys, "analyze", name)
    assert "use --checkpoint" in fails(capsys, "analyze", f"{made}:make", "--weights", "DEFAULT")
    assert sys.path == path


# timm


def test_without_timm_its_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("timm:resnet18", "hf-hub:timm/resnet18.a1_in1k", "local-dir:here"):
        assert "pip install 'torch-fxpath[timm]'" in fails(capsys, "analyze", name)


def test_timm_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    expected = timm.create_model("resnet10t", pretrained=False)
    for name in ("timm:resnet10t", "timm:resnet10t.c3_in1k"):
        assert same(load_model(name), expected)
    torch.save(
        {"model": (trained := timm.create_model("resnet10t")).state_dict()}, tmp_path / "c.pt"
    )
    assert same(load_model("timm:resnet10t", checkpoint=tmp_path / "c.pt"), trained)
    assert main(["analyze", "timm:resnet10t", "--input-shape", "3,32,32"]) == 0
    assert "timm:resnet10t (random weights, seed 0)" in capsys.readouterr().out
    assert "did you mean timm:resnet10t" in fails(capsys, "check", "timm:resnet10")
    assert "no weights 'x': c3_in1k" in fails(capsys, "check", "timm:resnet10t", "--weights", "x")
    assert "no weights 'x': c3_in1k" in fails(capsys, "check", "timm:resnet10t.x")


def test_pretrained_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    asked: list[object] = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")))
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", create_model)
    for name, weights in (
        ("timm:resnet18", "DEFAULT"),
        ("timm:resnet18.tv_in1k", "DEFAULT"),
        ("timm:resnet18", "tv_in1k"),
        ("timm:resnet18", None),
    ):
        load_model(name, weights)
    assert asked == [
        ("resnet18", True, "1"),
        ("resnet18.tv_in1k", True, "1"),
        ("resnet18.tv_in1k", True, "1"),
        ("resnet18", False, "1"),
    ]
    with pytest.raises(UsageError, match="brings its own weights"):
        load_model("hf-hub:timm/resnet18.tv_in1k", "DEFAULT")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("marker",)


def folder(place: Path, seed: int = 0) -> nn.Module:
    """A net of three classes whose description lies in a folder; its weights are still to come."""
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.create_model("resnet10t", num_classes=3)
    place.mkdir(parents=True, exist_ok=True)
    about = {"num_classes": 3, "input_size": [3, 32, 32], "first_conv": "conv1.0"}
    about["classifier"] = "fc"
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": about}
    (place / "config.json").write_text(json.dumps(config))
    assert isinstance(net, nn.Module)
    return net


def told(name: str) -> tuple[nn.Module, str]:
    """A model, and what is said of its weights."""
    lines: list[str] = []
    model = load_model(name, tell=lines.append)
    assert isinstance(model, nn.Module) and len(lines) <= 1 and "\n" not in "".join(lines)
    return model, "".join(lines)


def test_a_folder_in_the_form_of_the_hub(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    net = folder(tmp_path / "saved")
    timm.models.save_for_hf(net, tmp_path / "net", safe_serialization=True)
    found, line = told("local-dir:net")
    assert same(found, net) and line == ""
    torch.save((other := folder(tmp_path / "saved", 1)).state_dict(), "other.pt")
    assert same(load_model("local-dir:net", checkpoint=Path("other.pt")), other)
    (file,) = (tmp_path / "net").glob("*.safetensors")
    file.unlink()
    said = fails(capsys, "check", "local-dir:net")
    assert "cannot get its weights (no file of weights in net: model.safetensors" in said
    torch.save({"state_dict": Bomb()}, "net/pytorch_model.bin")
    said = fails(capsys, "check", "local-dir:net")
    assert "local-dir:net: pytorch_model.bin: holds a pickled" in said
    assert "mkdir, and making one may run code" in said
    assert not Path("marker").exists()
    assert "Config file not found" in fails(capsys, "check", "local-dir:nowhere")


def test_averages_in_a_folder_do_not_count(tmp_path: Path) -> None:
    net, file = folder(tmp_path), tmp_path / "pytorch_model.bin"
    state = net.state_dict()
    averages = {name: value * 2 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averages}, file)
    name = f"local-dir:{tmp_path}"
    found, line = told(name)
    assert same(found, net) and line == f"{name}: took state_dict; left state_dict_ema"
    half = {n: v.half() if v.is_floating_point() else v for n, v in state.items()}
    torch.save({"model": {f"module.{n}": v for n, v in half.items()}}, file)
    notes = "took model; dropped the prefix module.; converted float16 to float32"
    assert told(name)[1] == f"{name}: {notes}"


def test_a_head_that_is_missing_in_a_folder_is_not_drawn(tmp_path: Path) -> None:
    state, file = folder(tmp_path).state_dict(), tmp_path / "pytorch_model.bin"
    wide = {**state, "fc.weight": torch.ones(7, 512), "fc.bias": torch.ones(7)}
    headless = {name: value for name, value in state.items() if not name.startswith("fc.")}
    for content, advice in (
        (headless, "2 missing: fc.weight, fc.bias"),
        (wide, "fc.weight (7x512, not 3x512)"),
    ):
        torch.save(content, file)
        with pytest.raises(UsageError, match=re.escape(advice)) as caught:
            load_model(f"local-dir:{tmp_path}")
        assert "let a function call timm.create_model" in str(caught.value)


def test_several_files_in_a_folder(tmp_path: Path) -> None:
    net, other = folder(tmp_path), folder(tmp_path, 1)
    name = f"local-dir:{tmp_path}"
    for file in ("last.pth", "best.pth"):
        torch.save(other.state_dict(), tmp_path / file)
    with pytest.raises(UsageError, match=r"not clear which of best\.pth, last\.pth counts"):
        load_model(name)
    torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    found, line = told(name)
    assert same(found, net)
    assert line == f"{name}: took model.safetensors; left pytorch_model.bin"
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "last.pth").unlink()
    assert same(told(name)[0], other)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    # What the hub's client keeps of a repository that it has downloaded.
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--some--net", "0" * 40
    here = repository / "snapshots" / commit
    net = folder(here)
    for name in ("main", "v2"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    with pytest.raises(UsageError, match="cannot get its weights") as caught:
        load_model("hf-hub:some/net")
    assert "no file of weights" not in str(caught.value)  # there may be one
    state = net.state_dict()
    averages = {name: value * 2 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averages}, here / "pytorch_model.bin")
    found, line = told("hf-hub:some/net@v2")
    notes = "took pytorch_model.bin; took state_dict; left state_dict_ema"
    assert same(found, net) and line == f"hf-hub:some/net@v2: {notes}"
    save_file(state, here / "model.safetensors")
    found, line = told("hf-hub:some/net")
    assert same(found, net) and line == ""

    def absent(*args: object, **named: object) -> str:
        raise hub.errors.EntryNotFoundError("404")

    monkeypatch.setattr(hub, "hf_hub_download", absent)
    with pytest.raises(UsageError, match=r"no file of weights: model\.safetensors"):
        load_model("hf-hub:some/net")


# Checkpoints: what was done is said


def said(content: object, model: str = "some_nets:mlp") -> str:
    """What is told of a checkpoint, but for the name of its file."""
    torch.save(content, "c.pt")
    told: list[str] = []
    load_model(model, checkpoint=Path("c.pt"), tell=told.append)
    assert len(told) <= 1 and "\n" not in "".join(told)
    return "".join(told).removeprefix("c.pt: ")


def test_what_was_done_to_a_checkpoint_is_one_line(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    state = net.state_dict()
    half = {name: value.half() for name, value in state.items()}
    for key in ("state_dict", "model", "ema", "teacher"):
        assert said({key: state, "epoch": 3}) == f"took {key}"
    for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod."):
        long = {prefix + name: value for name, value in state.items()}
        assert said(long) == f"dropped the prefix {prefix}"
        told = f"took model; dropped the prefix {prefix}; converted float16 to float32"
        assert said({"model": {prefix + n: v for n, v in half.items()}}) == told
    assert said({"model": state, "ema": half}) == "took model; left ema"
    inner = {name.replace(".", "._orig_mod."): value for name, value in state.items()}
    assert said(inner) == "renamed 4 tensors, the first from 0._orig_mod.weight to 0.weight"
    assert said({n: v.double() for n, v in state.items()}) == "computing in their float64"
    for layer in (net[0], net[2]):
        prune.random_unstructured(layer, "weight", 0.5)
    assert said({"model": net.state_dict()}) == (
        "took model; multiplied in the masks of pruning (2)"
    )
    assert said(state) == ""
    save_file(half, "c.safetensors")
    argv = ["bound", "some_nets:mlp", "c.safetensors", "--input-shape", "4"]
    assert main(argv) == 0
    assert capsys.readouterr().err == "fxpath: c.safetensors: converted float16 to float32\n"


def test_a_prefix_that_the_model_has_is_added(nets: Path) -> None:
    (nets / "wrapped.py").write_text(
        "from some_nets import mlp\nfrom torch import nn\n"
        "class Wrapped(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = mlp()\n"
        "    def forward(self, x):\n        return self.net(x)\n"
    )
    state = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).state_dict()
    assert said(state, "wrapped.py:Wrapped") == "added the prefix net."
