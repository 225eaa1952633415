"""The control path: containerd's Snapshots service, its rules, its SQLite state and its mounts."""
