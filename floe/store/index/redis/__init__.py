"""An index in Redis, Redis Cluster or Valkey, for a fleet. The library `redis` is imported only when it is connected to."""
