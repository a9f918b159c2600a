"""Flower's libraries warn of each other's old names while they are imported, which is not these tests' business."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401 - for its warnings
