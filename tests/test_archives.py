"""Exported programs from files: honest ones give the right number, nothing in any is executed."""

import copy
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxpath
from fxpath.capture.loading import UsageError
from fxpath.capture.loading.archives import load_program
from fxpath_command import main


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Net(nn.Module):
    """With a parameter, a buffer that is saved, one that is not, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.rand(4, 1, 1), persistent=False)
        self.shift = torch.rand(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu() * self.scale + self.shift
        return self.head(y.mean((2, 3)).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def archive(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest archive of a program with dynamic shapes, and so with expressions in it."""
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    sizes = {0: torch.export.Dim("b", min=1, max=64), 2: torch.export.Dim("h", min=8, max=64)}
    inputs = (torch.zeros(2, 3, 16, 16),)
    torch.export.save(torch.export.export(net, inputs, dynamic_shapes=(sizes,)), path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return path


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def refusal(path: Path, marker: Path) -> str:
    """The one line that says why a file is not read; the bomb in it has not gone off."""
    with pytest.raises(UsageError) as caught:
        load_program(str(path))
    assert not marker.exists()
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text


# Honest archives


def test_the_same_program_as_torch_reads(archive: Path, net: nn.Module) -> None:
    ours, theirs = load_program(str(archive)), torch.export.load(str(archive))
    x = torch.randn(5, 3, 20, 16)
    assert torch.equal(ours.module()(x), net(x))
    assert str(ours.graph) == str(theirs.graph)
    assert str(ours.graph_signature) == str(theirs.graph_signature)
    assert str(ours.range_constraints) == str(theirs.range_constraints)
    assert ours.state_dict.keys() == theirs.state_dict.keys()
    for name, value in theirs.state_dict.items():
        assert torch.equal(ours.state_dict[name], value)
        assert type(ours.state_dict[name]) is type(value)
        assert ours.state_dict[name].requires_grad == value.requires_grad


def test_the_right_number_and_tensors_as_sample_inputs(
    net: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, inputs = tmp_path / "net.pt2", (torch.rand(1, 3, 16, 16),)
    torch.export.save(torch.export.export(net, inputs), path)
    assert torch.equal(load_program(str(path)).example_inputs[0][0], inputs[0])  # type: ignore[index]
    assert main(["analyze", str(path), "--json", str(tmp_path / "out.json")]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert result["path_norm"] == pytest.approx(fxpath.path_norm(net, (3, 16, 16)), rel=1e-6)


def test_tied_and_sliced_parameters_keep_their_storage(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            whole = torch.rand(10)
            self.register_buffer("whole", whole)
            self.register_buffer("left", whole[:3])
            self.register_buffer("right", whole[4:7])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x * self.left).relu() * self.right)

    net, path = Tied(), tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3),)), path)
    state = load_program(str(path)).state_dict
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    assert torch.equal(state["left"], net.left) and torch.equal(state["right"], net.right)


def test_nested_inputs_and_control_structures(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: dict[str, Any], *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                shifted = x["pair"][0] + x["pair"][1]
            return {"out": self.fc(shifted).relu() * scale}

    net, path = Nested(), tmp_path / "net.pt2"
    x, scale = {"pair": [torch.rand(1, 3), torch.rand(1, 3)]}, torch.rand(1, 2)
    torch.export.save(torch.export.export(net, (x,), {"scale": scale}), path)
    loaded = load_program(str(path))
    assert any("wrap_with_set_grad_enabled" in str(node.target) for node in loaded.graph.nodes)
    assert torch.equal(loaded.module()(x, scale=scale)["out"], net(x, scale=scale)["out"])


def test_the_format_until_torch_2_7(archive: Path, tmp_path: Path, net: nn.Module) -> None:
    theirs = torch.export.load(str(archive))
    content = members(archive)
    old = {
        "version": b"8.8",
        "serialized_exported_program.json": content["net/models/model.json"],
        "serialized_state_dict.pt": saved(dict(theirs.state_dict)),
        "serialized_constants.pt": saved(dict(theirs.constants)),
        "serialized_example_inputs.pt": saved(theirs.example_inputs),
    }
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(load_program(str(write(tmp_path / "a.pt2", old))).module()(x), net(x))
    marker = tmp_path / "marker"
    for name in old:
        if name != "version":
            bombed = {**old, name: saved({"x": Bomb(marker)})}
            refusal(write(tmp_path / "b.pt2", bombed), marker)


# Pickles


def test_a_bomb_in_every_member(archive: Path, tmp_path: Path) -> None:
    content, marker = members(archive), tmp_path / "marker"
    for bomb in (saved({"x": Bomb(marker)}), saved(Bomb(marker))):
        for name in content:
            refusal(write(tmp_path / "bomb.pt2", {**content, name: bomb}), marker)


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    torch.load(io.BytesIO(saved(Bomb(tmp_path / "marker"))), weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["weights", "constants"])
@pytest.mark.parametrize("file", ["{}_0", "custom_obj_0", "opaque_obj_0", "../models/model.json"])
def test_a_tensor_that_is_said_to_be_pickled(
    archive: Path, tmp_path: Path, kind: str, file: str
) -> None:
    content, marker = members(archive), tmp_path / "marker"
    file = file.format("weight" if kind == "weights" else "tensor")
    listing = f"net/data/{kind}/model_{kind}_config.json"
    config = json.loads(content[listing])
    name = next(iter(config["config"]))
    config["config"][name].update(path_name=file, use_pickle=True)
    content |= {listing: json.dumps(config).encode()}
    content[f"net/data/{kind}/{file}"] = saved(Bomb(marker))
    refusal(write(tmp_path / "bomb.pt2", content), marker)


@pytest.mark.parametrize(
    "name",
    ["data/weights/model.pt", "data/constants/model.pt", "data/SAMPLE_INPUTS/model.pt"]
    + ["extra/notes", "data/weights/MODEL.pt", "models/../data/sample_inputs/model.pt"],
)
def test_members_that_honest_archives_lack(archive: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    content = {**members(archive), f"net/{name}": saved({"x": Bomb(marker)})}
    refusal(write(tmp_path / "bomb.pt2", content), marker)


def test_two_members_of_one_name(archive: Path, tmp_path: Path) -> None:
    content, marker = members(archive), tmp_path / "marker"
    path = write(tmp_path / "bomb.pt2", content)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("net/data/sample_inputs/model.pt", saved(Bomb(marker)))
    assert "two members of one name" in refusal(path, marker)


def test_compiled_code_is_never_loaded(archive: Path, tmp_path: Path, net: nn.Module) -> None:
    content, marker = members(archive), tmp_path / "marker"
    code = {"net/data/aotinductor/model/wrapper.so": b"\x7fELF not a library at all"}
    x = torch.randn(2, 3, 16, 16)
    loaded = load_program(str(write(tmp_path / "both.pt2", {**content, **code})))
    assert torch.equal(loaded.module()(x), net(x))
    content = {name: data for name, data in content.items() if "models/" not in name}
    assert "compiled code only" in refusal(
        write(tmp_path / "code.pt2", {**content, **code}), marker
    )


def test_a_zip_bomb(archive: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "bomb.pt2", members(archive))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("net/extra/zeros", bytes(80 * 2**20))
    assert "unpack to many times its size" in refusal(path, tmp_path / "marker")


# Strings that torch evaluates, imports or compiles

EVIL = "__import__('os').mkdir({!r})"


def in_graph(change: Callable[[dict[str, Any], str], object]) -> Callable[..., object]:
    return lambda program, evil: change(program["graph_module"]["graph"], evil)


def tree(kind: str, context: Any) -> str:
    leaf = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])


def signature(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["module_call_graph"][0]["signature"]
    return found


def set_size(graph: dict[str, Any], text: str) -> None:
    graph["tensor_values"]["relu"]["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}


def rename_node(graph: dict[str, Any], name: str) -> None:
    graph["nodes"][2]["name"] = graph["nodes"][2]["outputs"][0]["as_tensor"]["name"] = name


def keyword_tree(program: dict[str, Any], key: str) -> None:
    spec = json.loads(signature(program)["in_spec"])
    spec[1]["children_spec"][1]["context"] = json.dumps([key])
    signature(program)["in_spec"] = json.dumps(spec)


HOSTILE: dict[str, Callable[[dict[str, Any], str], object]] = {
    "size": in_graph(set_size),
    "size in a function": in_graph(lambda g, e: set_size(g, f"Max({e}, Integer(1))")),
    "size as a string": in_graph(lambda g, e: set_size(g, f"Integer({e!r})")),
    "size as a symbol": in_graph(lambda g, e: set_size(g, f"Symbol({e!r})")),
    "size by attributes": in_graph(
        lambda g, e: set_size(g, "Symbol('s0').__class__.__base__.__subclasses__()")
    ),
    "size by a lambda": in_graph(lambda g, e: set_size(g, f"(lambda: {e})()")),
    "size that never ends": in_graph(
        lambda g, e: set_size(g, "Pow(Integer(9), Pow(Integer(9), Pow(Integer(9), Integer(9))))")
    ),
    "symbolic integer": in_graph(
        lambda g, e: g["sym_int_values"].update(s={"as_expr": {"expr_str": e, "hint": None}})
    ),
    "a function of os": in_graph(lambda g, e: g["nodes"][2].update(target="torch.os.mkdir")),
    "torch.load": in_graph(lambda g, e: g["nodes"][2].update(target="torch.load")),
    "a shared library": in_graph(
        lambda g, e: g["nodes"][2].update(target="torch.ops.load_library")
    ),
    "operator.methodcaller": in_graph(
        lambda g, e: g["nodes"][2].update(target="_operator.methodcaller")
    ),
    "an operation of a file": in_graph(
        lambda g, e: g["nodes"][2].update(target="torch.ops.aten.from_file.default")
    ),
    "an operation of TorchScript": in_graph(
        lambda g, e: g["nodes"][2].update(target="torch.ops.aten.save.default")
    ),
    "an extension": in_graph(lambda g, e: g["nodes"][2].update(target="#evil:mkdir")),
    "an operator as an argument": in_graph(
        lambda g, e: g["nodes"][2]["inputs"].append(
            {"name": "f", "arg": {"as_operator": "torch.os.mkdir"}, "kind": 2}
        )
    ),
    "name of a node": in_graph(lambda g, e: rename_node(g, f"a = {e}\n    b")),
    "name of an input": in_graph(lambda g, e: g["inputs"][0]["as_tensor"].update(name=f"x={e}")),
    "name of an argument": in_graph(
        lambda g, e: g["nodes"][2]["inputs"][0].update(name=f"x={e}, y")
    ),
    "name of a parameter": lambda p, e: p["graph_module"]["signature"]["input_specs"][0][
        "parameter"
    ].update(parameter_name=f'conv.w"), {e}, getattr(self, "weight'),
    "a type instead of a number": in_graph(
        lambda g, e: g["tensor_values"]["relu"]["sizes"].__setitem__(0, {"as_int": e})
    ),
    "a hint": in_graph(
        lambda g, e: g["tensor_values"]["relu"]["sizes"].__setitem__(
            0, {"as_expr": {"expr_str": "s9", "hint": {"as_int": e}}}
        )
    ),
    "a range": lambda p, e: p["range_constraints"].update(s1={"min_val": e, "max_val": None}),
    "names of arguments": lambda p, e: signature(p).update(forward_arg_names=[f"x={e}"]),
    "a keyword": lambda p, e: keyword_tree(p, f"x={e}, y"),
    "an enumeration": lambda p, e: signature(p).update(
        out_spec=tree(
            "builtins.dict", json.dumps([{"__enum__": True, "fqn": "evil:E", "name": "A"}])
        )
    ),
    "a default factory": lambda p, e: signature(p).update(
        out_spec=tree(
            "collections.defaultdict",
            {
                "default_factory_module": "evil",
                "default_factory_name": "mkdir",
                "dict_context": ["a"],
            },
        )
    ),
    "another type of tree": lambda p, e: signature(p).update(out_spec=tree("evil.Type", "null")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_strings(
    archive: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(EVIL.format(str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    content = members(archive)
    program = json.loads(content["net/models/model.json"])
    untouched = copy.deepcopy(program)
    HOSTILE[name](program, EVIL.format(str(marker)))
    assert program != untouched
    content["net/models/model.json"] = json.dumps(program).encode()
    text = refusal(write(tmp_path / "bomb.pt2", content), marker)
    assert "refused" in text


def test_strings_that_are_only_shown_or_left_out(
    archive: Path, tmp_path: Path, net: nn.Module
) -> None:
    marker, content = tmp_path / "marker", members(archive)
    evil = EVIL.format(str(marker))
    program = json.loads(content["net/models/model.json"])
    program["guards_code"] = [evil]
    program["graph_module"]["metadata"]["custom"] = evil
    for node in program["graph_module"]["graph"]["nodes"]:
        node["metadata"] |= {"stack_trace": evil, "source_fn_stack": f"a,{evil}", "custom": evil}
        node["metadata"] |= {"from_node": evil, "torch_fn": evil}
    content["net/models/model.json"] = json.dumps(program).encode()
    loaded = load_program(str(write(tmp_path / "a.pt2", content)))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.module()(x), net(x))
    assert fxpath.path_norm(loaded, (3, 16, 16)) > 0
    assert not marker.exists()


# Damaged archives


def test_damage_is_one_line(archive: Path, tmp_path: Path) -> None:
    content, marker = members(archive), tmp_path / "marker"
    for name in content:
        if ".data/" in name or "byteorder" in name:
            continue
        for data in (b"", content[name][: len(content[name]) // 2], b"\xff" + content[name][1:]):
            if data != content[name] and "weight_" not in name and "tensor_" not in name:
                refused = name.endswith(".json") or "archive_" in name or data
                if refused:
                    refusal(write(tmp_path / "bad.pt2", {**content, name: data}), marker)
        without = {key: value for key, value in content.items() if key != name}
        refusal(write(tmp_path / "bad.pt2", without), marker)
    truncated = tmp_path / "bad.pt2"
    truncated.write_bytes(archive.read_bytes()[:-500])
    refusal(truncated, marker)


def test_values_that_are_not_there(archive: Path, tmp_path: Path) -> None:
    content = {**members(archive), "net/data/weights/weight_0": b""}
    text = refusal(write(tmp_path / "bad.pt2", content), tmp_path / "marker")
    assert "has no values" in text


def test_what_is_no_archive(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert "no such file" in refusal(tmp_path / "none.pt2", marker)
    torch.save({"x": Bomb(marker)}, tmp_path / "a.pt2")
    assert "not an exported program" in refusal(tmp_path / "a.pt2", marker)
