"""Bentos: BentoML's packages, read as they lie on disk; their models go to the store, their images carry none of them."""
