"""Speed measured on the spot, beside the ceilings of the machine it runs on: what `mxconv bench` prints."""
