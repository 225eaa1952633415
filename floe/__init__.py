"""Floe: containers and models that start before they have arrived."""

__version__ = "0.1.0"
