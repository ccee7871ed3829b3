"""Layers of the network and their kernels."""
