"""Runs that are described by a file: `rectiflow train CONFIG`."""
