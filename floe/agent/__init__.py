"""`floe agent`: what a node says of itself and does when nobody waits for it. It may die at any moment; see daemon.py."""
