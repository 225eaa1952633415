"""Self-seeding: a node that had to unpack an image gives its layers to the store, so that the next node starts it lazily."""
