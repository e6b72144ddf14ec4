"""Arguments of the command line as the API's, and the API's messages in their words."""

from __future__ import annotations

import argparse
import re
from typing import Any

from fxpath.capture.loading import UsageError

__all__ = ["in_options", "model_options"]


def in_options(text: str) -> str:
    """A message about arguments of the API in the words of the command line.

    Example:
        >>> in_options("pass input_shape=(3, 224, 224), or until='features'")
        "pass --input-shape 3,224,224, or --until 'features'"
        >>> in_options("pass input_shape=[(3, 8), (4,)] or batch_dim=None")
        'pass --input-shape 3,8 --input-shape 4 or --no-batch'
    """
    text = re.sub(
        r"input_shape=\[((\([\d, ]+\)(, )?)+)\]",
        lambda m: " ".join(f"input_shape={shape}" for shape in re.findall(r"\([\d, ]+\)", m[1])),
        text,
    )
    text = re.sub(
        r"input_shape=\(([\d, ]+)\)",
        lambda m: "--input-shape " + m[1].replace(" ", "").rstrip(","),
        text,
    )
    for said, option in (
        ("input_shape=(...)", "--input-shape N,N,..."),
        ("input_shape={name: shape}", "--input-shape NAME=N,N,..."),
        ("input_shape=", "--input-shape "),
        ("input_shape/example_inputs", "--input-shape"),
        ('until="..."', "--until MODULE"),
        ("until=", "--until "),
        ("outputs=", "--outputs "),
        ("fxpath.analyze(..., gates=True)", "fxpath analyze --gates"),
        ("gates=True", "--gates"),
        ("batch_dim=None", "--no-batch"),
        (", or example_inputs", ""),
    ):
        text = text.replace(said, option)
    return re.sub(r"(?<![-\w])input_shape\b", "--input-shape", text)


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `fxpath.analyze`, `fxpath.compile` and `fxpath.check`.

    Those of commands that do not offer `--gates` leave it to the verb.
    """
    options: dict[str, Any] = {"until": arguments.until, "outputs": arguments.outputs}
    if "gates" in arguments:
        options["gates"] = arguments.gates
    if arguments.no_batch:
        options["batch_dim"] = None
    shapes = arguments.input_shape or []
    named = dict(shape for shape in shapes if isinstance(shape[0], str))
    if named and len(named) < len(shapes):
        raise UsageError("--input-shape: name all inputs, each once, or none")
    if shapes:
        options["input_shape"] = named or (shapes[0] if len(shapes) == 1 else shapes)
    return options
