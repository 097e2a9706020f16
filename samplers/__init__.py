"""How to move along the flow: schedules, conversions, solvers. Meets the host only through `model(x, sigma)`."""
