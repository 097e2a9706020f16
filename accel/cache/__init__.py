"""One engine for every caching policy: part of the network is not run on some visits, and what it would have given is forecast.

    policy.py     what a policy decides, what it may know of its run, and the limits that hold for all of them
    gate.py       what gates share; confidence.py  CG-Taylor; first_block.py, modulated.py, input_change.py, magnitude.py  one rule each
    calibration.py  uncached runs that find their thresholds and curves
    interval.py   plain reuse; taylor.py  TaylorSeer: each paper one file
    forecast.py   a polynomial in the step, kept as a ladder of differences
    clock.py      sigma → fractional step; store.py  what is kept, per condition; visits.py  one sampling run
    targets.py    what of a call is kept and put back: its output, the last block's tokens, or the offset of a range of blocks
    binding.py    the wrappers that hang on a MODEL; report.py  what happened
"""
