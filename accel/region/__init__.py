"""Part of the image's tokens go through the network, the others repeat or continue their velocity (RAS).

A plan is a frozen description, a RegionRun the state of one sampling; binding.py hangs the two on a MODEL.
"""
