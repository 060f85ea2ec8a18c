"""Task vectors: the value, the file, and every tool on them."""

from tva.vectors.compare import Compared, compare
from tva.vectors.compress import CompressReport, compress
from tva.vectors.extract import Extracted, extract
from tva.vectors.header import Origin
from tva.vectors.inspect import Inspection, inspect
from tva.vectors.listing import Listing, list_vectors
from tva.vectors.match import Matched, match
from tva.vectors.task_vector import TaskVector

__all__ = [
    "Compared",
    "CompressReport",
    "Extracted",
    "Inspection",
    "Listing",
    "Matched",
    "Origin",
    "TaskVector",
    "compare",
    "compress",
    "extract",
    "inspect",
    "list_vectors",
    "match",
]
