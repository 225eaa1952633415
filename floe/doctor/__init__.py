"""`floe doctor`: what on this node would keep Floe from working, and the command that mends it."""
