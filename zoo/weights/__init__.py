"""Authors' checkpoints in, and the zoo's own out: readers of files, and tables of rules between parameter names.

`load` is `read` (any file into {published name: array}) and then `convert` (names and layouts by `Rule`s); `save`
writes variables for `load` to read back; `to_published` gives them their published names again.
"""

from zoo.weights.errors import WeightsFileError
from zoo.weights.int8 import Int8, dequantize, quantize_int8
from zoo.weights.loading import abstract_variables, load, save
from zoo.weights.names import NameMapError, Rule, Transform, convert, layer, to_published, under, vector
from zoo.weights.packages import PackagedFile
from zoo.weights.readers import read

__all__ = [
    "Int8",
    "NameMapError",
    "PackagedFile",
    "Rule",
    "Transform",
    "WeightsFileError",
    "abstract_variables",
    "convert",
    "dequantize",
    "layer",
    "load",
    "quantize_int8",
    "read",
    "save",
    "to_published",
    "under",
    "vector",
]
