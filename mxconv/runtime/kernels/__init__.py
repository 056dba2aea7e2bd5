"""Triton kernels of the runtime; each is held to its plain-torch twin."""
