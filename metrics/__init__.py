"""Figures and pictures that compare results. Torch only; Pillow is imported where text is drawn."""
