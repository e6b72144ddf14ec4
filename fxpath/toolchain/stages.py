"""The passes as functions from one exported program to the next.

    >>> import torch
    >>> from fxpath.toolchain import derive_program, fold_program, lift_program, lower_program
    >>> from fxpath.toolchain import reduce_program
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, -3.0)
    >>> lifted = lift_program(fold_program(torch.export.export(model, (torch.ones(1, 2),))))
    >>> lifted.module()().item(), lifted.dialect
    (6.0, 'FXPATH/LIFTED')
    >>> derived = derive_program(lower_program(reduce_program(lifted)), scores=False)
    >>> found = derived.module()()
    >>> float(found["mantissa"] * 2 ** found["exponent"]), derived.dialect
    (6.0, 'ATEN')

What is between the model's own program and the derived one are programs of a dialect of their own
(see :mod:`fxpath.toolchain.dialect`), which torch prints, verifies and calls as any other, as long
as the model's tensors are on the CPU.  All of them share the model's tensors and leave the program
that they are given as it is.  They are for the l^1 path-norm: an exponent is no property of a
program, so for others there are ``fxpath.compile(model, q=...)`` and the passes that take a
:class:`~fxpath.passes.Setting`.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from fxpath.capture import capture
from fxpath.model import Given
from fxpath.modes import plain_mode
from fxpath.passes import Rewritten, Setting
from fxpath.passes.fold import fold
from fxpath.passes.hoist import hoist
from fxpath.passes.lift import lift
from fxpath.passes.lower import lower
from fxpath.passes.reduce import reduce
from fxpath.program.formats import check_format, format_of
from fxpath.program.program import PathProgram
from fxpath.toolchain.dialect import as_program, from_program, take

__all__ = ["derive_program", "fold_program", "lift_program", "lower_program", "reduce_program"]


@plain_mode()
def fold_program(program: ExportedProgram) -> ExportedProgram:
    """Fold frozen batch norms into the maps before them (:mod:`fxpath.passes.fold`).

    Args:
        program: of a model, as ``torch.export.export`` returns it.

    Returns:
        A program that is called as the model is and computes the same function within rounding, of
        one sample where the model's program is for a batch.  ``run_decompositions({})`` makes one
        of ATen operators of it.

    Raises:
        TypeError: for anything else than a program.
        ValueError: for a program that is folded already, or whose batch cannot be cut.
        UnsupportedModelError: if it cannot be made functional.
    """
    captured = capture(take(program, "the model's own"), Given())
    module = fold(captured.graph_module, Setting(captured))
    return as_program("folded", module, captured, program)


@plain_mode()
def lift_program(program: ExportedProgram) -> ExportedProgram:
    """Lift a folded program: its paths in place of its function (:mod:`fxpath.passes.lift`).

    Args:
        program: of :func:`fold_program`.

    Returns:
        A program without inputs that returns the l^1 path-norm, 0-d, without care for range.

    Raises:
        TypeError: for anything else than a program.
        ValueError: for a program at another stage, or of a model that has changed since.
        UnsupportedModelError: listing every operation without an exact rule.
    """
    module, captured = from_program(take(program, "folded"))
    return as_program("lifted", lift(module, Setting(captured)), captured, program)


@plain_mode()
def reduce_program(program: ExportedProgram) -> ExportedProgram:
    """Keep equal positions of a lifted program once (:mod:`fxpath.passes.reduce` and ``hoist``).

    Args:
        program: of :func:`lift_program`.

    Returns:
        A program that returns the same number.

    Raises:
        TypeError: for anything else than a program.
        ValueError: for a program at another stage, or of a model that has changed since.
    """
    module, captured = from_program(take(program, "lifted"))
    setting = Setting(captured)
    reduced = hoist(reduce(module, setting), setting)
    return as_program("reduced", reduced, captured, program)


@plain_mode()
def lower_program(program: ExportedProgram) -> ExportedProgram:
    """Choose how each layer is computed (:mod:`fxpath.passes.lower`).

    Args:
        program: of :func:`lift_program` or :func:`reduce_program`.

    Returns:
        A program that returns the same number.

    Raises:
        TypeError: for anything else than a program.
        ValueError: for a program at another stage, or of a model that has changed since.
    """
    module, captured = from_program(take(program, "lifted", "reduced"))
    return as_program("lowered", lower(module, Setting(captured)), captured, program)


@plain_mode()
def derive_program(
    program: ExportedProgram, scores: bool = True, dtype: torch.dtype | None = None
) -> ExportedProgram:
    """Append the reverse half, in ATen operators: the program that every toolchain takes.

    Args:
        program: of :func:`lower_program`.
        scores: as for :meth:`fxpath.PathProgram.exported`.
        dtype: number format of its steps, by default float64 if the model has such tensors, else
            float32.

    Returns:
        What :meth:`fxpath.PathProgram.exported` returns.

    Raises:
        TypeError: for anything else than a program.
        ValueError: for a program at another stage, or of a model that has changed since; for a NaN
            or infinite parameter, by name; for another number format.
        FloatingPointError: if the number format does not suffice.
    """
    module, captured = from_program(take(program, "lowered"))
    check_format(dtype)
    known = dtype or format_of(captured, module)
    return PathProgram(captured, Rewritten(module, module, module), known, 1.0).exported(scores)
