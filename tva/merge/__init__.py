"""Merge methods: how the deltas of several task vectors become one delta, as pure functions on tensors.

A method is a class in a file of the folder ``methods``, from which `METHODS` is filled; its fields are its parameters
in a recipe. Other packages add theirs as entry points of the group ``tva.merge_methods``, and a recipe names any class
by its dotted path.
"""

from tva.merge.base import Chunk, Method
from tva.merge.find import find_method, method_names, own_methods
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

METHODS = own_methods()

__all__ = [
    "METHODS",
    "Analogy",
    "Breadcrumbs",
    "Cart",
    "Chunk",
    "Consensus",
    "Dare",
    "Della",
    "Emr",
    "Fisher",
    "IsoC",
    "IsoCts",
    "Lines",
    "Magnitude",
    "Mean",
    "Method",
    "ModelStock",
    "Pcb",
    "RegMean",
    "Rescale",
    "Sce",
    "SignConsensus",
    "Slerp",
    "Svc",
    "Tall",
    "Ties",
    "Tsv",
    "Wudi",
    "find_method",
    "method_names",
]
