"""Weights to codes and scales: the scheme table, the numeric definition (reference.py), stored forms, and the fast CPU path."""
