"""The write path: sources become entries, chunks, packs, trees, manifests and refs."""
