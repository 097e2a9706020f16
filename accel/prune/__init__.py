"""Smaller models: which blocks, heads and neurons can go, as a plan that is applied, recovered (train/) and saved.

    plan.py       PrunePlan: what is kept, as JSON bound to one model
    identity.py   which model this is, whatever hangs on it at the moment
    apply.py      a plan on a MODEL: blocks that hand their tokens on
    gates.py      a function around every block, to measure or to mix
    scores.py     how much each block matters; select.py  from numbers to a plan
    width.py      numbers of heads and neurons, what is kept of them, masks
    ecodiff.py    masks that can be learned
    compact.py    narrower layers;  lora.py  LoRAs for them
"""
