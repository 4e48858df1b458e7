"""Federated knowledge distillation on Flower: small on the wire, exact on both ends."""

__version__ = "0.1.0"
