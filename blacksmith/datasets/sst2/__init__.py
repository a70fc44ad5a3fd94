"""SST-2, and data of the same form: sentences labeled 0 (negative) or 1 (positive).

`read` reads a source, and the source's `split` gives disjoint training, validation and test examples.
Nothing is downloaded unless the source is a Hugging Face dataset id.
"""

from blacksmith.datasets.sst2.reader import read
from blacksmith.datasets.sst2.splits import CLASSES, Examples, Info, Source, Sst2

__all__ = ["CLASSES", "Examples", "Info", "Source", "Sst2", "read"]
