"""Merge methods: how the deltas of several task vectors become one delta, as pure functions on tensors.

A method is one class in one file of this package, listed in `METHODS`; its fields are its parameters in a recipe.
"""

from tva.merge.consensus import Consensus, Tall
from tva.merge.dare import Dare
from tva.merge.emr import Emr
from tva.merge.linear import Analogy, Mean
from tva.merge.lines import Lines
from tva.merge.method import Method, Place
from tva.merge.pcb import Pcb
from tva.merge.slerp import Slerp
from tva.merge.sparse import Breadcrumbs, Magnitude
from tva.merge.statistics import Fisher, RegMean
from tva.merge.subspace import IsoC, IsoCts, Tsv
from tva.merge.ties import SignConsensus, Ties
from tva.merge.wudi import Wudi

METHODS: dict[str, type[Method]] = {
    "analogy": Analogy,
    "breadcrumbs": Breadcrumbs,
    "consensus": Consensus,
    "dare": Dare,
    "emr": Emr,
    "fisher": Fisher,
    "iso_c": IsoC,
    "iso_cts": IsoCts,
    "lines": Lines,
    "magnitude": Magnitude,
    "mean": Mean,
    "pcb": Pcb,
    "regmean": RegMean,
    "sign_consensus": SignConsensus,
    "slerp": Slerp,
    "tall": Tall,
    "ties": Ties,
    "tsv": Tsv,
    "wudi": Wudi,
}

__all__ = [
    "METHODS",
    "Analogy",
    "Breadcrumbs",
    "Consensus",
    "Dare",
    "Emr",
    "Fisher",
    "IsoC",
    "IsoCts",
    "Lines",
    "Magnitude",
    "Mean",
    "Method",
    "Pcb",
    "Place",
    "RegMean",
    "SignConsensus",
    "Slerp",
    "Tall",
    "Ties",
    "Tsv",
    "Wudi",
]
