"""The portable mount: a tree presented through pyfuse3, where the kernel has no EROFS or the user is not root.

`python -m floe.fuse.portable` is one mount of one tree: it reads the request, answers when the tree is mounted, and
serves it in the background until it is unmounted. Only this package imports pyfuse3, an optional dependency.
"""
