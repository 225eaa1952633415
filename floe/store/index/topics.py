"""Topics of notes in the index. Nodes write those of OF_NODES, and only read the others: the ACL in install/identity/ holds them to that."""

from __future__ import annotations

NODES = "nodes"  # by node: its heartbeat
STATES = "warm"  # by node: how far it is with each order
ORDERS = "orders"  # by id: what operators want of nodes
OF_NODES = (NODES, STATES)
