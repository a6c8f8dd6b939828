"""Authors' checkpoints in, and the zoo's own out: readers of files, and tables of rules between parameter names.

`load` is `read` (any file into {published name: array}) and then `convert` (names and layouts by `Rule`s); `save`
writes variables for `load` to read back; `to_published` gives them their published names again.
"""

from zoo.weights.errors import WeightsFileError
from zoo.weights.loading import abstract_variables, load, save
from zoo.weights.names import NameMapError, Rule, Transform, convert, layer, to_published, under, vector
from zoo.weights.packages import PackagedFile
from zoo.weights.readers import read

__all__ = [
    "NameMapError",
    "PackagedFile",
    "Rule",
    "Transform",
    "WeightsFileError",
    "abstract_variables",
    "convert",
    "layer",
    "load",
    "read",
    "save",
    "to_published",
    "under",
    "vector",
]
