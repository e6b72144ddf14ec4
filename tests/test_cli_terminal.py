"""What a person at a terminal sees and a file does not: colour, and that something is going on."""

import contextlib
import io
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch

import fxpath
from fxpath_command import main, terminal
from tests.support.command_line import fails, seeded_mlp


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def shown(*argv: str, code: int = 0) -> str:
    """What a person sees of a command, on standard output and standard error together."""
    screen = Terminal()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        assert main(argv) == code
    return screen.getvalue()


def test_colour_is_for_a_terminal(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = f"some_nets:mlp (its own weights)\n{fxpath.analyze(seeded_mlp(nets), (4,))}\n\n"
    coloured = shown("analyze", "some_nets:mlp")
    assert coloured.startswith("\x1b[1msome_nets:mlp (its own weights)\x1b[0m\n")
    assert "\n\x1b[33mOne threshold" in coloured and "\nparams:" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    error = shown("check", "some_nets:number", code=2)
    assert error.startswith("fxpath: \x1b[1;31merror:\x1b[0m some_nets:number")
    for variable, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patched:
            patched.setenv(variable, value)
            assert shown("analyze", "some_nets:mlp") == plain
            assert shown("check", "some_nets:number", code=2).startswith("fxpath: error: some")


def test_what_takes_long_is_shown_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(screen: io.StringIO, quiet: bool = False) -> str:
        with contextlib.redirect_stderr(screen), terminal.working("resnet18", quiet):
            time.sleep(0.15)
            terminal.note("c.pt: took model")
        return screen.getvalue()

    note = "fxpath: c.pt: took model\n"
    assert seen(Terminal()) == f"\r\x1b[K{note}"
    monkeypatch.setattr(terminal, "_PATIENCE", 0.01)
    assert seen(Terminal()).startswith("\r\x1b[K| resnet18, 0 s")
    assert seen(Terminal()).endswith("\r\x1b[K") and f"\r\x1b[K{note}" in seen(Terminal())
    assert seen(Terminal(), quiet=True) == f"\r\x1b[K{note}"
    assert seen(io.StringIO()) == note


def test_each_of_several_models_is_named(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PATIENCE", 0.0)
    screen = shown("analyze", "some_nets:mlp", "some_nets:instance")
    assert "| 2 of 2: analyze some_nets:instance, 0 s" in screen


# Where results go, and on what they are computed


def test_quiet_leaves_files_and_exit_codes(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": seeded_mlp(nets).state_dict()}, "c.pt")
    loud = [
        ["analyze", "some_nets:mlp", "some_nets:mlp"],
        ["check", "some_nets:mlp", "--checkpoint", "c.pt"],
        ["graph", "some_nets:mlp"],
        ["graph", "some_nets:mlp", "--sizes"],
        ["prune", "some_nets:mlp", "--amount", "3", "-o", "out.safetensors"],
        ["verify", "some_nets:mlp", "out.safetensors"],
        ["bound", "some_nets:mlp", "out.safetensors"],
    ]
    for argv in loud:
        assert main(argv) == 0 and any(capsys.readouterr())
        assert main([*argv, "--quiet"]) == 0
        assert capsys.readouterr() == ("", ""), argv
    over = ["bound", "some_nets:mlp", "out.safetensors", "--max-relative", "0", "--quiet"]
    assert main(over) == 1
    assert capsys.readouterr() == ("", "")
    assert "softmax" in failing(capsys, "analyze", "some_nets:with_head", "--quiet")


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_json_on_standard_output_stands_alone(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (nets / "chatty.py").write_text(
        "from some_nets import *\ndef make():\n    print('building')\n    return mlp()\n"
    )
    assert main(["analyze", "chatty.py:make", "some_nets:mlp", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    first, second = json.loads(out)
    assert (first["name"], second["name"]) == ("chatty.py:make", "some_nets:mlp")
    assert first["path_norm"] == second["path_norm"]
    assert err == "building\n"


def test_precision_and_device(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["analyze", "some_nets:mlp", "--json", "-", "--device", "cpu"]
    expected = fxpath.analyze(seeded_mlp(nets), (4,), dtype=torch.float64).path_norm
    found = []
    for dtype in ("float32", "float64"):
        assert main([*argv, "--dtype", dtype]) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["path_norm"])
    assert found[1] == expected and found[0] != expected
    assert math.isclose(found[0], expected, rel_tol=1e-6)
    assert "float32" in fails(capsys, *argv, "--dtype", "float16")
    for name in ("nowhere", "cuda:99"):
        assert f"--device {name}: " in fails(capsys, "check", "some_nets:mlp", "--device", name)


def test_the_model_moves_to_the_device(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    check = fxpath.check

    def spy(model: object, *args: object, **options: object) -> object:
        tensors = (model if isinstance(model, torch.nn.Module) else model.module()).parameters()
        seen.extend({tensor.device.type for tensor in tensors})
        return check(model, *args, **options)

    monkeypatch.setattr(fxpath, "check", spy)
    program = torch.export.export(seeded_mlp(nets).eval(), (torch.zeros(1, 4),))
    torch.export.save(program, "net.pt2")
    for name in ("some_nets:mlp", "net.pt2"):
        main(["check", name])
        main(["check", name, "--device", "meta"])
    assert seen == ["cpu", "meta"] * 2
