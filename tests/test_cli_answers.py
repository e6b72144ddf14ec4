"""Help and mistakes are answered at once: by what is spelled, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import fxpath_command
from fxpath import cli
from fxpath_command.parser import make_parser, parse
from tests.support.command_line import fails

ROOT = Path(fxpath_command.__file__).parent.parent

# Runs a command in a process of its own, and says what it imported.
SPY = """
import sys
sys.path.insert(0, {root!r})
from fxpath_command import main
try:
    code = main({argv!r})
except SystemExit as error:
    code = error.code or 0
print("torch" in sys.modules or "fxpath" in sys.modules, code)
"""


@pytest.mark.parametrize(
    "argv, code, said",
    [
        (["--help"], 0, "FILE.py:callable"),
        (["analyze", "--help"], 0, "--input-shape"),
        (["--version"], 0, "fxpath "),
        (["analyse", "resnet18"], 2, "did you mean analyze?"),
        (["analyze"], 2, "MODEL"),
        (["analyze", "mynet.py"], 2, "mynet.py:callable"),
        (["analyze", "resnet18", "--inputshape", "3,8,8"], 2, "did you mean --input-shape?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_torch_is_not_imported(argv: list[str], code: int, said: str) -> None:
    spy = SPY.format(root=str(ROOT), argv=argv)
    result = subprocess.run([sys.executable, "-c", spy], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == f"False {code}"
    told, silent = (result.stderr, result.stdout) if code else (result.stdout, result.stderr)
    assert said in told
    assert len(silent.splitlines()) == (1 if code else 0)


def test_the_spy_sees_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    spy = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch\n" + SPY.format(
        root=str(ROOT), argv=["--version"]
    )
    result = subprocess.run([sys.executable, "-c", spy], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "True 0"


def test_every_command_is_spelled_and_done() -> None:
    assert list(make_parser()[1]) == list(cli.COMMANDS)


def test_slips_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        slip = command[:-1] + "x"
        assert f"did you mean {command}?" in fails(capsys, slip, "resnet18")
    there = "there are analyze, prune, graph, check, export, verify, bound"
    assert there in fails(capsys, "frobnicate")
    assert "; did you mean --max-relative?" in fails(
        capsys, "bound", "a", "b", "--max-relatives=1", "c"
    )
    assert "'1%': a number, as in 0.01" in fails(capsys, "bound", "a", "b", "--max-relative", "1%")


def test_a_file_of_python_names_what_makes_a_model(
    capsys: pytest.CaptureFixture[str], nets: Path
) -> None:
    (nets / "made.py").write_text(
        "raise SystemExit\ndef a(x): ...\ndef b(*, x): ...\ndef c(x=1): ..."
    )
    assert "made.py:callable, as in made.py:c" in fails(capsys, "analyze", "made.py")
    (nets / "made.py").write_text("def broken(")
    assert "made.py:callable (see" in fails(capsys, "bound", "some_nets:mlp", "made.py")
    assert parse(["check", "made.py:a"]).model == "made.py:a"


def test_a_file_that_cannot_be_written_is_refused_first(
    capsys: pytest.CaptureFixture[str], nets: Path
) -> None:
    prune = ["prune", "nothing", "--amount", "1"]
    for argv in (["analyze", "nothing", "--json"], ["export", "nothing", "-o"], [*prune, "-o"]):
        assert "no such directory" in fails(capsys, *argv, "no/file")
        assert "a directory, not a file" in fails(capsys, *argv, str(nets))
