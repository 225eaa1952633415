"""Models for Python programs: `floe.open_store`, what it gives, and `floe://` for fsspec. docs/PYTHON.md shows its use."""
