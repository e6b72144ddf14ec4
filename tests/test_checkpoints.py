"""Checkpoints as people have them: which weights are taken, and what is said of the rest."""

import argparse
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import fxpath
from fxpath.capture.loading import UsageError, fit_state_dict, load_model
from fxpath_command import main
from tests.support.checkpoints import FORMS, prefixed, read, refused, same, trained, zeros

SOURCE = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )

def normed():
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))

def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `a_model`, in the current directory."""
    (tmp_path / "a_model.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(os.sys.modules, "a_model", raising=False)  # type: ignore[attr-defined]
    import a_model  # type: ignore[import-not-found]

    return a_model


@pytest.mark.parametrize("form", FORMS)
def test_what_loads(nets: Any, form: str) -> None:
    state = trained(nets).state_dict()
    assert same(read(FORMS[form](state)), state)


def test_the_old_format_of_torch_save(nets: Any) -> None:
    state = trained(nets).state_dict()
    content = {"model": state, "best": np.float64(0.9), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, "old.pth", _use_new_zipfile_serialization=False)
    loaded = load_model("a_model:make", checkpoint=Path("old.pth"))
    assert same(loaded.state_dict(), state)  # type: ignore[operator]


def test_precision(nets: Any) -> None:
    state = trained(nets).state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    double = {k: v.double() / 3 if v.is_floating_point() else v for k, v in state.items()}
    assert same(read(half), {k: v.float() for k, v in half.items()})
    found = read(double)
    assert found["0.weight"].dtype == torch.float64 and same(found, double)


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
def test_pruned(nets: Any, prefix: str) -> None:
    net = trained(nets)
    for layer in (net[0], net[4]):  # type: ignore[index]
        prune.random_unstructured(layer, "weight", 0.5)
    state = prefixed(prefix, net.state_dict())
    for layer in (net[0], net[4]):  # type: ignore[index]
        prune.remove(layer, "weight")
    found = read({"state_dict": state})
    assert same(found, net.state_dict()) and (found["4.weight"] == 0).sum() == 160


def test_tied_tensors_have_one_name_or_two(nets: Any) -> None:
    state = nets.tied().state_dict()
    once = {k: v for k, v in state.items() if k != "2.weight"}
    assert same(read(once, "a_model:tied"), state)
    other = {**state, "2.weight": state["2.weight"] + 1}
    assert "0.weight, 2.weight are one tensor in the model" in refused(other, "a_model:tied")


def test_weight_norm_by_both_of_its_names(nets: Any) -> None:
    net = parametrizations.weight_norm(nn.Linear(3, 2))
    new = net.state_dict()
    old = {
        "weight_g": new["parametrizations.weight.original0"] * 2,
        "weight_v": new["parametrizations.weight.original1"],
        "bias": new["bias"],
    }
    found = read(prefixed("module.", old), "a_model:normed")
    assert torch.equal(found["parametrizations.weight.original0"], old["weight_g"])
    with pytest.warns(FutureWarning):
        older = weight_norm(nn.Linear(3, 2)).state_dict()
    assert fit_state_dict(new, older)["weight_v"] is new["parametrizations.weight.original1"]


def test_safetensors_and_shards(nets: Any) -> None:
    state = trained(nets).state_dict()
    save_file(prefixed("model.", state), "c.safetensors")
    loaded = load_model("a_model:make", checkpoint=Path("c.safetensors"))
    assert same(loaded.state_dict(), state)  # type: ignore[operator]
    names = list(state)
    for suffix, save in (("safetensors", save_file), ("bin", torch.save)):
        files = [f"c-{i}.{suffix}" for i in (0, 1)]
        for file, part in zip(files, (names[:3], names[3:]), strict=True):
            save({name: state[name] for name in part}, file)
        shards = {name: files[i >= 3] for i, name in enumerate(names)}
        index = Path(f"c.{suffix}.index.json")
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        loaded = load_model("a_model:make", checkpoint=index)
        assert same(loaded.state_dict(), state)  # type: ignore[operator]
    for file, advice in (
        ("../c-0.safetensors", "not beside it"),
        ("c.safetensors.index.json", "not beside it"),
        ("none.safetensors", "no such file"),
        ("c-1.safetensors", "not in the shard"),
    ):
        index.write_text(json.dumps({"weight_map": {**shards, names[0]: file}}))
        with pytest.raises(UsageError, match=advice):
            load_model("a_model:make", checkpoint=index)


def test_a_buffer_that_the_model_makes_itself() -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("index", torch.arange(2), persistent=False)
    own = {**net.state_dict(), "index": net.index}
    assert list(fit_state_dict(net.state_dict(), own, optional=["index"])) == ["weight", "bias"]
    assert list(fit_state_dict(own, own, optional=["index"])) == ["weight", "bias", "index"]


# What is refused, by name


def test_what_does_not_fit(nets: Any) -> None:
    state = trained(nets).state_dict()
    no_bias = {k: v for k, v in state.items() if k != "4.bias"}
    assert "1 missing: 4.bias" in refused(no_bias)
    assert "1 missing: 4.bias" in refused({"epoch": 1, "net": prefixed("module.", no_bias)})
    assert "1 unexpected: more" in refused({**state, "more": torch.zeros(1)})
    assert "4.bias (7, not 5)" in refused({**state, "4.bias": torch.zeros(7)})
    assert "1 missing: 1.running_var" in refused(
        {k: v for k, v in state.items() if k != "1.running_var"}
    )
    assert "1 unexpected: loss (no a.b.)" in refused(
        {**prefixed("a.b.", state), "loss": torch.zeros(1)}
    )
    some = {("a." + k if k != "4.bias" else k): v for k, v in state.items()}
    assert "1 missing: 4.bias; 1 unexpected: 4.bias (no a.)" in refused(some)
    mixed = {("module." if "bias" in k else "other.") + k: v for k, v in state.items()}
    assert "missing" in refused(mixed)
    message = refused({"a": state, "b": zeros(state)})
    assert "two state dicts that fit the model and differ, a and b" in message
    message = refused({"ema": state, "ema_best": zeros(state)})
    assert "ema and ema_best" in message


def test_names_are_kept_on_one_line(nets: Any) -> None:
    state = trained(nets).state_dict()
    assert "'a\\nb'" in refused({**state, "a\nb": torch.zeros(1)})
    assert "'\\x1b[2J'" in refused({"\x1b[2J": {**state, "a": torch.zeros(1)}})
    complexes = {name: value.to(torch.complex64) for name, value in state.items()}
    assert "two state dicts" in refused({"a\nb": state, "c\nd": zeros(state), "e": complexes})


def test_a_zip_bomb(nets: Any) -> None:
    torch.save(trained(nets).state_dict(), "c.pth")
    with zipfile.ZipFile("c.pth", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("c/data/zeros", bytes(80 * 2**20))
    with pytest.raises(UsageError, match="unpack to many times its size"):
        load_model("a_model:make", checkpoint=Path("c.pth"))


@pytest.mark.parametrize("content", [{}, [], None, 3, {"state_dict": {}}, {"epoch": 1}])
def test_no_weights(nets: Any, content: object) -> None:
    assert "holds no state dict" in refused(content)


def test_tensors_that_are_no_real_numbers(nets: Any) -> None:
    state = trained(nets).state_dict()
    weight = state["4.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        csr = weight.to_sparse_csr()
        quantized = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    for value, advice in (
        (weight.to(torch.complex64), "4.weight is complex"),
        (quantized, "4.weight is quantized"),
        (weight.to_sparse(), "4.weight is not dense"),
        (csr, "4.weight is not dense"),
        (weight.to(torch.float8_e4m3fn), "4.weight is torch.float8_e4m3fn"),
        ((weight * 10).to(torch.int8), "4.weight is torch.int8, and torch.float32 in the model"),
        (weight.to("meta"), "4.weight has no values"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert advice in refused({"net": {**state, "4.weight": value}})


def test_a_nan_is_named(nets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    state = trained(nets).state_dict()
    state["4.weight"][0, 0] = float("nan")
    torch.save(state, "c.pth")
    argv = ["analyze", "a_model:make", "--input-shape", "3,4,4", "--checkpoint", "c.pth"]
    assert main(argv) == 2
    assert "NaN or infinite entries in 4.weight" in capsys.readouterr().err


def test_parametrizations_that_the_model_lacks(nets: Any) -> None:
    net = trained(nets)
    parametrizations.orthogonal(net[4])  # type: ignore[index]
    assert "parametrization that the model does not have" in refused(net.state_dict())
    net = trained(nets)
    with pytest.warns(FutureWarning):
        weight_norm(net[4])  # type: ignore[index]
    message = refused({"state_dict": prefixed("module.", net.state_dict())})
    assert "4.weight_g, 4.weight_v belong to a parametrization" in message
    net = trained(nets)
    nn.utils.spectral_norm(net[4])  # type: ignore[index]
    assert "parametrization" in refused(net.state_dict())


# Objects


class Thing:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("marker",)


class Config:
    """Something of the user's own."""


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_nothing_is_executed(nets: Any, old: bool) -> None:
    state = trained(nets).state_dict()
    for content in ({"model": state, "x": Thing()}, Thing(), [Thing()]):
        for file in ("c.pt", "c.pth", "c.ckpt", "c.bin"):
            torch.save(content, file, _use_new_zipfile_serialization=not old)
            with pytest.raises(UsageError, match="mkdir, and making one may run code"):
                load_model("a_model:make", checkpoint=Path(file))
            assert not Path("marker").exists()
    torch.load("c.pt", weights_only=False)
    assert Path("marker").exists()


def test_other_objects_are_named(nets: Any) -> None:
    state = trained(nets).state_dict()
    assert "test_checkpoints.Config" in refused({"model": state, "config": Config()})
    for module in (nets.make(), {"model": nets.make()}):
        message = refused(module)
        assert "pickled torch.nn.modules" in message
        assert "torch.save(model.state_dict(), FILE)" in message
    torch.save({"model": state, "best": np.float64(0.9)}, "c.pth")
    before = torch.serialization.get_safe_globals()
    load_model("a_model:make", checkpoint=Path("c.pth"))
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_objects_beside_the_weights_stay_inert(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("called")

    state = trained(nets).state_dict()
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, "c.pth")
    monkeypatch.setattr(argparse.Namespace, "__init__", never)
    monkeypatch.setattr(argparse.Namespace, "__setstate__", never, raising=False)
    assert same(load_model("a_model:make", checkpoint=Path("c.pth")).state_dict(), state)  # type: ignore[operator]


def test_files_that_are_something_else(nets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    net = trained(nets).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.zeros(1, 3, 4, 4)).save("scripted.pt")
    torch.save(net.state_dict(), "weights.pt")
    Path("x.safetensors").write_bytes(b"not a checkpoint")
    Path("x.pth").write_bytes(b"not a checkpoint")
    Path("empty.pth").write_bytes(b"")
    Path("x.index.json").write_text("[]")
    program = torch.export.export(net, (torch.zeros(1, 3, 4, 4),))
    with open("program.pt", "wb") as file:
        torch.export.save(program, file)

    def said(*argv: str) -> str:
        assert main(["analyze", *argv]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1
        return err

    for argv in (["scripted.pt"], ["a_model:make", "--checkpoint", "scripted.pt"]):
        message = said(*argv)
        assert "a TorchScript program" in message
        assert "torch.jit.load('scripted.pt').state_dict()" in message
    for argv in (["program.pt"], ["a_model:make", "--checkpoint", "program.pt"]):
        assert "an exported program, not weights: name it FILE.pt2" in said(*argv)
    assert "MODEL --checkpoint weights.pt" in said("weights.pt")
    assert "no such file" in said("none.ckpt")
    for file in ("x.safetensors", "x.pth", "empty.pth"):
        assert "cannot be read" in said("a_model:make", "--checkpoint", file)
    assert "not the index" in said("a_model:make", "--checkpoint", "x.index.json")


def test_the_advice_on_scripted_files_leads_somewhere(nets: Any) -> None:
    net = trained(nets).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.zeros(1, 3, 4, 4)).save("scripted.pt")
        state = torch.jit.load("scripted.pt").state_dict()
    assert same(read(state), net.state_dict())


# Wherever a state dict is taken


def test_the_same_in_pairs(nets: Any) -> None:
    net, other = nets.make().eval(), trained(nets).eval()
    expected = fxpath.path_metric(net, other, (3, 4, 4))
    state = other.state_dict()
    for form in ("nested twice", "Lightning", "averages beside", "compiled submodules"):
        found = fxpath.path_metric(net, FORMS[form](state), (3, 4, 4))  # type: ignore[arg-type]
        assert (found.lower, found.upper) == (expected.lower, expected.upper)
    bound = fxpath.lipschitz_bound(net, prefixed("module.", state), (3, 4, 4))
    assert bound.value == fxpath.lipschitz_bound(net, other, (3, 4, 4)).value
    with pytest.raises(ValueError, match="4.weight is complex"):
        fxpath.path_metric(
            net, {**state, "4.weight": state["4.weight"].to(torch.complex64)}, (3, 4, 4)
        )


@pytest.fixture(autouse=True)
def one_generator() -> Iterator[None]:
    """Nets are drawn alike in each test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
