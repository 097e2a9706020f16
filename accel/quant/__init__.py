"""Weights and activations in fewer bits: rotations, quantisers with their error in decibels, and the linear layer that runs on them."""
