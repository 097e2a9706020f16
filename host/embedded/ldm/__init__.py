"""Transformers and codecs of the embedded host, written against the published checkpoint layouts."""
