"""Indexers: workers that take jobs from a queue and index images, what registries tell them, and what they no longer have."""
