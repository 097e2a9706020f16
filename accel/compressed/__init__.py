"""Compressed models as files: pruned, narrowed, quantised ones and mixtures, with a manifest that says how they are built again."""
