"""`fxpath prune`: what it writes is what the library gives, and one line where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fxpath
from fxpath_command import main
from tests.support.command_line import fails, seeded_mlp


def test_weights_with_zeros_are_written(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = seeded_mlp(nets)
    for options, arguments in (
        (["--amount", "0.4"], {"amount": 0.4}),
        (["--amount", "3", "--criterion", "magnitude"], {"amount": 3, "criterion": "magnitude"}),
        (["--budget", "0.1"], {"budget": 0.1}),
    ):
        assert main(["prune", "some_nets:mlp", *options, "-o", "out.safetensors"]) == 0
        pruned = fxpath.prune(model, input_shape=(4,), **arguments)
        state = load_file(nets / "out.safetensors")
        assert state.keys() == pruned.state_dict.keys()
        assert all(torch.equal(state[name], value) for name, value in pruned.state_dict.items())
        out, err = capsys.readouterr()
        assert str(pruned) in out and err == ""
        assert max(map(len, out.splitlines())) <= 100
    model.load_state_dict(state)  # the file is a checkpoint
    command = ["analyze", "some_nets:mlp", "--checkpoint", "out.safetensors"]
    assert main(command) == 0
    assert str(fxpath.analyze(model, (4,))) in capsys.readouterr().out


def test_a_smaller_network_is_written_with_its_plan(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--channels", "--amount", "1", "-o", "small.safetensors", "--plan", "plan.json"]
    assert main(["prune", "some_nets:mlp", *options]) == 0
    model = seeded_mlp(nets)
    expected = fxpath.prune_channels(model, 1, (4,))
    assert str(expected) in capsys.readouterr().out
    plan = fxpath.Plan.from_dict(json.loads((nets / "plan.json").read_text()))
    assert plan == expected.plan
    x = torch.randn(5, 4)
    small = fxpath.load_pruned(nets / "small.safetensors", seeded_mlp(nets))
    assert small[0].out_features == 2
    torch.testing.assert_close(small(x), expected.model(x))


def test_what_cannot_be_pruned_is_one_line(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlp = ["prune", "some_nets:mlp"]
    out = ["-o", "out.safetensors"]
    assert "--amount --budget" in fails(capsys, *mlp, *out)
    assert "--output" in fails(capsys, *mlp, "--amount", "0.4")
    assert "'4x': a share" in fails(capsys, *mlp, "--amount", "4x", *out)
    assert "no path from an input" in fails(capsys, *mlp, "--amount", "1.0", *out)
    assert "there are path_magnitude" in fails(
        capsys, *mlp, "--amount", "1", "--criterion", "size", *out
    )
    assert "goes with --channels" in fails(capsys, *mlp, "--amount", "1", "--plan", "p.json", *out)
    assert "no such directory" in fails(capsys, *mlp, "--amount", "1", "-o", "no/out.safetensors")
    assert not (nets / "out.safetensors").exists()
