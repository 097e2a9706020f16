"""How to make a model call cheaper. The host is met only through the MODEL that is handed in."""
