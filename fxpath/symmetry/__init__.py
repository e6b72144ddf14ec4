"""Neuron-wise rescaling: which channels share a scale, and models rescaled by it."""
