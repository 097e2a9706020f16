"""Attention at other sizes and at other costs: rotary positions beyond the training size, and attention over fewer keys."""
