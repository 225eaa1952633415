"""containerd's configuration: Floe's keys merged into a file that others wrote, and taken out again."""
