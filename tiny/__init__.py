"""The small trained model that ships: 13.4 M parameters in Flux's layout, a text encoder of two tables, a linear codec.

It draws 64×64 pictures of 125 things in two styles on six backgrounds, so that every node can be run, seen and measured on
two CPU cores. This room imports torch and safetensors alone; nodes/tiny.py joins it with a host. Facts: docs/tiny.md.
"""
