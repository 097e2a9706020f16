"""One trainer of velocity models, with pieces that plug into it.

    loop.py         the Trainer: one step, one run, resuming
    config.py       what describes a run; draws.py  randomness without state
    densities.py    how often each sigma is seen; targets.py  what is asked there; losses.py  how far the answer is
    optim.py        AdamW, Muon and their schedules; ema.py  the average of the weights
    validation.py   error by sigma on fixed examples; history.py  what is told; checkpoints.py  what is kept
    recipes/        whole runs described by a file: the tiny model that ships
"""
