"""Path-norm, Path-Mag and what follows from them, for real ReLU networks.

    >>> import fxpath, torch
    >>> analysis = fxpath.analyze(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> analysis.path_norm > 0
    True

The mathematics is that of Gonon, Brisebarre, Riccietti and Gribonval, "A rescaling-invariant
Lipschitz bound based on path-metrics for modern ReLU network parameterizations" (2025); numbers of
definitions and equations in docstrings are the paper's.
"""

from fxpath import criteria, passes
from fxpath.api import analyze, check, compile, path_magnitude, path_norm, path_norms
from fxpath.capture.loading.certificates import load_certificate
from fxpath.certificate import Certificate, Claim
from fxpath.checkpoints.compare import compare
from fxpath.checkpoints.comparison import Comparison
from fxpath.errors import Problem, SupportReport, UnsupportedModelError
from fxpath.gates import Gate
from fxpath.pairs.bounds import Bound, lipschitz_bound
from fxpath.pairs.certify import certify, verify
from fxpath.pairs.metric import PathMetric, path_metric
from fxpath.pairs.quantization import Quantized, quantize
from fxpath.paths.paths import Path, PathLifting, path_lifting
from fxpath.program.analysis import Analysis
from fxpath.program.findings import Finding
from fxpath.program.program import PathProgram
from fxpath.program.rows import LayerRow
from fxpath.pruning.dead import remove_dead
from fxpath.pruning.masks import Masks, apply_masks, load_masks
from fxpath.pruning.patterns import NM, PatternReport, PatternRow, verify_pattern
from fxpath.pruning.plan import Plan
from fxpath.pruning.prune import prune
from fxpath.pruning.pruned import Pruned, PrunedLayer
from fxpath.pruning.removal import prune_channels
from fxpath.pruning.smaller import PrunedChannels, load_pruned
from fxpath.pruning.surgery import apply_plan
from fxpath.report.table import Column, Table
from fxpath.rules.own import RegisteredRule, register_rule
from fxpath.symmetry.conditioning import path_conditioning
from fxpath.symmetry.groups import ChannelGroup, ChannelGroups, Member
from fxpath.symmetry.rescaling import channel_groups, normalize, rescale
from fxpath.toolchain.annotations import annotate
from fxpath.version import __version__ as __version__

__all__ = [
    "Analysis",
    "Bound",
    "Certificate",
    "ChannelGroup",
    "ChannelGroups",
    "Claim",
    "Column",
    "Comparison",
    "Finding",
    "Gate",
    "LayerRow",
    "Masks",
    "Member",
    "NM",
    "Path",
    "PathLifting",
    "PathMetric",
    "PathProgram",
    "PatternReport",
    "PatternRow",
    "Plan",
    "Problem",
    "Pruned",
    "PrunedChannels",
    "PrunedLayer",
    "Quantized",
    "RegisteredRule",
    "SupportReport",
    "Table",
    "UnsupportedModelError",
    "analyze",
    "annotate",
    "apply_masks",
    "apply_plan",
    "certify",
    "channel_groups",
    "check",
    "compare",
    "compile",
    "criteria",
    "lipschitz_bound",
    "load_certificate",
    "load_masks",
    "load_pruned",
    "normalize",
    "passes",
    "path_conditioning",
    "path_lifting",
    "path_magnitude",
    "path_metric",
    "path_norm",
    "path_norms",
    "prune",
    "prune_channels",
    "quantize",
    "register_rule",
    "remove_dead",
    "rescale",
    "verify",
    "verify_pattern",
]


def __dir__() -> list[str]:
    """The API, and nothing that the package is built of."""
    return [*__all__, "__version__"]
