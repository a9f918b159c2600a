"""For all tests: shapes and types are checked in the numerical rooms, and no verdict depends on a machine's speed."""

import os
import signal

import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook(
    [f"fedmerge.{room}" for room in ("core", "algorithms", "training", "runtime", "models", "data.federated")],
    "typechecking.check",
)
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs ignore it and pass that on
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup ignores this one
for size in ("COLUMNS", "LINES"):  # pytest's worker processes inherit them, and consoles keep what they say when made
    os.environ.pop(size, None)
settings.register_profile("any speed", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
