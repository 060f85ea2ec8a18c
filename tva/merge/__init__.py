"""Merge methods: how the deltas of several task vectors become one delta, as pure functions on tensors.

A method is one class in one file of this package, listed in `METHODS`; its fields are its parameters in a recipe.
"""

from tva.merge.base import Chunk, Method
from tva.merge.methods.breadcrumbs import Breadcrumbs
from tva.merge.methods.cart import Cart
from tva.merge.methods.consensus import Consensus, Tall
from tva.merge.methods.dare import Dare
from tva.merge.methods.della import Della
from tva.merge.methods.emr import Emr
from tva.merge.methods.fisher import Fisher
from tva.merge.methods.iso import IsoC, IsoCts
from tva.merge.methods.linear import Analogy, Mean
from tva.merge.methods.lines import Lines
from tva.merge.methods.magnitude import Magnitude
from tva.merge.methods.model_stock import ModelStock
from tva.merge.methods.pcb import Pcb
from tva.merge.methods.regmean import RegMean
from tva.merge.methods.rescale import Rescale
from tva.merge.methods.sce import Sce
from tva.merge.methods.slerp import Slerp
from tva.merge.methods.svc import Svc
from tva.merge.methods.ties import SignConsensus, Ties
from tva.merge.methods.tsv import Tsv
from tva.merge.methods.wudi import Wudi

METHODS: dict[str, type[Method]] = {
    "analogy": Analogy,
    "cart": Cart,
    "della": Della,
    "model_stock": ModelStock,
    "rescale": Rescale,
    "sce": Sce,
    "svc": Svc,
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
    "Chunk",
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
    "RegMean",
    "SignConsensus",
    "Slerp",
    "Tall",
    "Ties",
    "Tsv",
    "Wudi",
]
