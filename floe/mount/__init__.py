"""Tree mounts: EROFS on files or loop devices, native or over packfs, one superblock a tree and node."""
