"""The command line: what it prints, what it writes, and one line with exit code 2 otherwise."""

import json
import logging
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxpath
from fxpath.capture.loading import load_model
from fxpath_command import main
from tests.support.command_line import fails, seeded_mlp

models = pytest.importorskip("torchvision.models")


# analyze


def test_one_model(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "some_nets:mlp"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert str(fxpath.analyze(seeded_mlp(nets), (4,))) in out
    assert max(map(len, out.splitlines())) <= 100


def test_several_models_make_one_table(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "some_nets:mlp", "some_nets:instance", "some_nets:huge"]) == 0
    summary = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    norm = fxpath.path_norm(seeded_mlp(nets), (4,))
    assert [line.split()[0] for line in summary[2:]] == [
        "some_nets:mlp",
        "some_nets:instance",
        "some_nets:huge",
    ]
    assert summary[2].split()[1:3] == ["23", f"{norm:.6g}"]
    # 24 layers that each multiply by 4e30 are far beyond float64.
    assert re.search(r"\s10\^7\d\d\.\d+\s", summary[-1])


def test_torchvision_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    state = torch.get_rng_state()
    assert main(["analyze", "SqueezeNet1_1", "--input-shape", "3,64,64", "--json", str(file)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert "random weights" in capsys.readouterr().out
    torch.manual_seed(0)
    model = models.squeezenet1_1(weights=None)
    (result,) = json.loads(file.read_text())
    assert result["name"] == "SqueezeNet1_1"
    expected = fxpath.path_norm(model, (3, 64, 64))
    assert math.isclose(result["path_norm"], expected, rel_tol=1e-6)


def test_json_is_valid_json_for_a_norm_beyond_float64(nets: Path) -> None:
    assert main(["analyze", "some_nets:huge", "some_nets:mlp", "--json", "out.json"]) == 0

    def refuse(literal: str) -> Any:
        raise AssertionError(f"{literal} is no JSON")

    huge, mlp = json.loads(Path("out.json").read_text(), parse_constant=refuse)
    assert huge["path_norm"] is None and huge["log10_path_norm"] > 700
    assert mlp["path_norm"] > 0 and mlp["layers"]


def test_until_and_q(nets: Path) -> None:
    argv = ["analyze", "some_nets:with_head", "--until", "2", "-q", "2", "--json", "out.json"]
    assert main(argv) == 0
    (result,) = json.loads(Path("out.json").read_text())
    expected = fxpath.path_norm(seeded_mlp(nets), (4,), q=2)
    assert math.isclose(result["path_norm"], expected, rel_tol=1e-6)


def test_outputs(nets: Path) -> None:
    argv = ["analyze", "some_nets:two_outputs", "--input-shape", "4", "--json", "out.json"]
    import some_nets

    torch.manual_seed(0)
    net = some_nets.two_outputs()
    both = fxpath.path_norm(net, (4,))
    alone = fxpath.path_norm(net.b, (4,))
    for option, expected in ((["--outputs", "1"], alone), (["--outputs", "0,1"], both), ([], both)):
        assert main([*argv, *option]) == 0
        (result,) = json.loads(Path("out.json").read_text())
        assert math.isclose(result["path_norm"], expected, rel_tol=1e-6)


def test_inputs_by_name_and_without_a_batch_axis(nets: Path) -> None:
    import some_nets

    torch.manual_seed(0)
    net = some_nets.two_inputs()
    expected = fxpath.path_norm(net, {"x": (4,), "y": (3,)})
    argv = ["analyze", "some_nets:two_inputs", "--json", "out.json"]
    for shapes in (["x=4", "y=3"], ["y=3", "x=4"]):
        options = [part for shape in shapes for part in ("--input-shape", shape)]
        assert main([*argv, *options]) == 0
        (result,) = json.loads(Path("out.json").read_text())
        assert math.isclose(result["path_norm"], expected, rel_tol=1e-6)
    options = ["--input-shape", "x=1,4", "--input-shape", "y=1,3", "--no-batch"]
    assert main([*argv, *options]) == 0
    (result,) = json.loads(Path("out.json").read_text())
    assert math.isclose(result["path_norm"], expected, rel_tol=1e-6)


def test_pt2(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(seeded_mlp(nets).eval(), (torch.zeros(1, 4),))
    torch.export.save(program, "net.pt2")
    assert main(["analyze", "net.pt2", "--json", "out.json"]) == 0
    (result,) = json.loads(Path("out.json").read_text())
    expected = fxpath.path_norm(seeded_mlp(nets), (4,))
    assert math.isclose(result["path_norm"], expected, rel_tol=1e-6)


@pytest.mark.parametrize("form", ["plain.pt", "wrapped.pth", "parallel.pt", "plain.safetensors"])
def test_checkpoint(nets: Path, form: str) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    state: dict[str, Any] = model.state_dict()
    if form == "plain.safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, form)
    elif form == "wrapped.pth":
        torch.save({"epoch": 3, "state_dict": state}, form)
    elif form == "parallel.pt":
        torch.save(nn.DataParallel(model).state_dict(), form)
    else:
        torch.save(state, form)
    assert main(["analyze", "some_nets:mlp", "--checkpoint", form, "--json", "out.json"]) == 0
    (result,) = json.loads(Path("out.json").read_text())
    assert math.isclose(result["path_norm"], fxpath.path_norm(model, (4,)), rel_tol=1e-6)


# What the user can put right


@pytest.mark.parametrize(
    "argv, advice",
    [
        (["analyze", "resnt18"], "did you mean resnet18"),
        (["analyze", "xyzzy"], r"package.module:callable"),
        (["analyze", "resnet18", "--input-shape", "3,x"], "3,224,224"),
        (["analyze", "resnet18", "--input-shape", "3,0,224"], "3,224,224"),
        (["analyze", "resnet18", "--input-shape", "3,10"], "--input-shape"),
        (["analyze", "some_nets:mlp", "--input-shape", "5"], "--input-shape"),
        (["analyze", "resnet18", "-q", "-1"], "not negative"),
        (["analyze", "resnet18", "-q", "nan"], "not negative"),
        (["analyze", "resnet18", "--weights", "NO_SUCH"], "IMAGENET1K_V1"),
        (["analyze", "resnet18", "--until", "layer9"], "--until 'layer9'"),
        (["analyze", "resnet18", "--json", "nowhere/out.json"], "no such directory"),
        (["analyze", "missing.pt2"], "torch.export.save"),
        (["analyze", "some_nets.py", "--checkpoint", "a.pt"], "as in some_nets.py:mlp"),
        (["analyze", "weights.pth"], "--checkpoint weights.pth"),
        (["analyze", "no_such_module:net"], "no_such_module"),
        (["analyze", "some_nets:no_such_name"], "no_such_name"),
        (["analyze", "some_nets:"], "package.module:callable"),
        (["analyze", "some_nets:number"], "not callable"),
        (["analyze", "some_nets:broken"], "no such data set"),
        (["analyze", "some_nets:shapeless"], "--input-shape 3,224,224"),
        (["analyze", "some_nets:mlp", "--weights", "DEFAULT"], "--checkpoint"),
        (["analyze", "some_nets:mlp", "--input-shape", "x=4", "--input-shape", "4"], "or none"),
        (["analyze", "some_nets:branching", "--input-shape", "4"], "--until"),
        (["analyze", "some_nets:mlp", "--checkpoint", "missing.pt"], "no such file"),
        (["analyze", "alexnet", "vgg16", "--checkpoint", "missing.pt"], "one MODEL"),
        (["analyze"], "--help"),
        (["graph", "resnt18"], "did you mean resnet18"),
        (["check", "resnt18"], "did you mean resnet18"),
        (["frobnicate"], "--help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line(
    nets: Path, capsys: pytest.CaptureFixture[str], argv: list[str], advice: str
) -> None:
    assert advice in fails(capsys, *argv)


def test_checkpoint_that_does_not_fit(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(state: object) -> str:
        torch.save(state, "a.pt")
        return fails(capsys, "analyze", "some_nets:mlp", "--checkpoint", "a.pt")

    state = seeded_mlp(nets).state_dict()
    assert "1 missing: 0.bias" in message({k: v for k, v in state.items() if k != "0.bias"})
    assert "1 unexpected: extra" in message({**state, "extra": torch.zeros(1)})
    assert "0.bias (7, not 3)" in message({**state, "0.bias": torch.zeros(7)})
    assert "holds no state dict" in message([torch.zeros(1)])
    assert "torch.save(model.state_dict(), FILE)" in message(seeded_mlp(nets))


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damaged_checkpoint(nets: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    Path(name).write_bytes(b"not a checkpoint at all")
    assert "cannot be read" in fails(capsys, "analyze", "some_nets:mlp", "--checkpoint", name)


def test_damaged_program(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.pt2").write_bytes(b"not a program at all")
    assert "cannot be read" in fails(capsys, "analyze", "a.pt2")


def test_no_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        print("Downloading: ...")
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    assert "network" in fails(capsys, "analyze", "squeezenet1_1", "--weights", "DEFAULT")


def test_pretrained_weights_are_only_tensors(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("marker",)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(nets))
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    file = nets / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir()
    argv = ["analyze", "squeezenet1_1", "--weights", "DEFAULT", "--input-shape", "3,32,32"]
    torch.save({"x": Bomb()}, file)
    assert "remove that file" in fails(capsys, *argv)
    assert not Path("marker").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    net = models.squeezenet1_1(weights=None)
    torch.save(net.state_dict(), file)
    loaded = load_model("squeezenet1_1", weights="DEFAULT")
    assert isinstance(loaded, nn.Module)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), net.parameters(), strict=True)
    )


def test_unsupported_model_prints_the_report(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "some_nets:with_head"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "softmax" in err and "sigmoid" in err and "Traceback" not in err


def test_one_bad_model_does_not_stop_the_others(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["analyze", "some_nets:with_head", "some_nets:mlp", "--json", "out.json"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "some_nets:mlp" in out and "with_head" in err
    assert [result["name"] for result in json.loads(Path("out.json").read_text())] == [
        "some_nets:mlp"
    ]


def test_traceback_on_request(nets: Path) -> None:
    with pytest.raises(OSError, match="no such data set"):
        main(["analyze", "some_nets:broken", "--traceback"])


# graph, check, and the process itself


def test_graph(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "some_nets:mlp"]) == 0
    out = capsys.readouterr().out
    assert out.count("placeholder") >= 4 and "fxpath.graph.ops" in out and "return" in out


def test_check(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "some_nets:mlp"]) == 0
    assert "supported" in capsys.readouterr().out
    assert main(["check", "some_nets:with_head"]) == 2
    out = capsys.readouterr().out
    assert "softmax" in out and "sigmoid" in out


@pytest.mark.parametrize("given", [True, False], ids=["given", "assumed"])
@pytest.mark.parametrize("name", ["pooled", "pooled_head"])
def test_the_input_shape_is_in_every_print_out(
    nets: Path, capsys: pytest.CaptureFixture[str], name: str, given: bool
) -> None:
    shape = ["--input-shape", "3,224,224"] if given else []
    for verb in (["check"], ["analyze"], ["graph"], ["graph", "--sizes"]):
        main([*verb, f"some_nets:{name}", *shape])
        out, err = capsys.readouterr()
        assert "input: 3 x 224 x 224" in out + err
        assert ("(assumed)" in out + err) is not given


@pytest.mark.parametrize("name", ["mlp", "with_head", "branching", "two_outputs", "shapeless"])
def test_check_and_analyze_agree(nets: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    shape = [] if name in ("mlp", "with_head", "shapeless") else ["--input-shape", "4"]
    codes = [main([verb, f"some_nets:{name}", *shape]) for verb in ("check", "analyze")]
    capsys.readouterr()
    assert codes[0] == codes[1]


def test_ctrl_c(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    disabled = logging.root.manager.disable
    monkeypatch.setattr(fxpath, "analyze", interrupted)
    assert main(["analyze", "some_nets:mlp", "some_nets:instance"]) == 130
    assert capsys.readouterr() == ("", "fxpath: interrupted\n")
    assert logging.root.manager.disable == disabled
    # While the package is imported: the command starts outside of it.
    monkeypatch.setitem(sys.modules, "fxpath.cli", types.ModuleType("fxpath.cli"))
    monkeypatch.setattr(sys.modules["fxpath.cli"], "__getattr__", interrupted, raising=False)
    assert main(["check", "resnet18"]) == 130
    assert capsys.readouterr() == ("", "fxpath: interrupted\n")


def test_a_signal_during_the_import(tmp_path: Path) -> None:
    # The import of torch takes a second or more; the signal comes in the middle of it.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal, time\n"
        # A job in the background may have been started without it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    root = str(Path(fxpath.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-m", "fxpath_command", "analyze", "resnet18"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
    )
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "fxpath: interrupted\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"fxpath \S.*\n", capsys.readouterr().out)


def test_as_a_process(nets: Path) -> None:
    # The package under test, whether it is installed or not.
    path = os.pathsep.join([str(Path(fxpath.__file__).parent.parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "-m", "fxpath", "check", "some_nets:mlp"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "supported" in result.stdout
