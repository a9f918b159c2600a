"""A client's model for other programs: PEFT adapters, merged weights, recipes for mergekit, ONNX, plain tensors.

The room is not called like the public function `fedmerge.export`: a package of that name would take its place.
"""

from fedmerge.exporting.client import Client, client_of
from fedmerge.exporting.export import KINDS, Exported, Kind, export_client
from fedmerge.exporting.trained import Trained, trained_of_folder, trained_of_outcome

__all__ = [
    "KINDS",
    "Client",
    "Exported",
    "Kind",
    "Trained",
    "client_of",
    "export_client",
    "trained_of_folder",
    "trained_of_outcome",
]
