"""The kernels: the only files that import ``triton.language``. Their digest names a build."""
