"""Shape and type checks of every annotated function of the numerical rooms are on in all tests."""

import torch
from jaxtyping import install_import_hook

install_import_hook(
    [f"fedmerge.{room}" for room in ("core", "algorithms", "training", "runtime", "models", "data.federated")],
    "typechecking.check",
)
torch.set_num_threads(1)
