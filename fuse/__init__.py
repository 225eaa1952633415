"""The read path: /dev/fuse protocol, session, keeper, worker and pack reader."""
