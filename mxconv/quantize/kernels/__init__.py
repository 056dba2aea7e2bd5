"""How one tile of weights is encoded on a device; every kernel is held to quantize/reference.py bit for bit."""
