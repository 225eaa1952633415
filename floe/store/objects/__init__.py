"""Object stores behind one interface: memory (tests), file and S3."""
