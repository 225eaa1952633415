"""What `bootstrap-node.sh` does, with the standard library alone: it runs before anything of Floe is installed."""
