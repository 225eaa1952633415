"""Wire contracts: containerd's Snapshots API and the pack filesystem's control socket."""
