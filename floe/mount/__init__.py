"""Tree mounts: EROFS on files or loop devices, native or over packfs, one superblock a tree and node.

`floe.mount.mounter.TreeMounter` is what others use, and `floe.mount.modelmount` what `floe model mount` does with it.
Nothing is imported here: the mount process (`floe.mount.helper`) must start fast.
"""
