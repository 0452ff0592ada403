"""Federated learning on whole-slide images that never leave their hospital."""

__version__ = "0.1.0"
