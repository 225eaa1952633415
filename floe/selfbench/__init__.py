"""`floe bench`: what binds reads on this machine. Measures the store, the cache disk, the network, the cores and a mount."""
