"""One slider between quality and speed."""

from __future__ import annotations

from ..errors import input_error
from .caching import CACHE_OUTPUTS, GROUP, MODEL
from .declare import Node, Output, number, socket, text


class RectiflowAccelerate(Node):
    """Makes a model faster by one number: a preset of its family, or a recording of your own model, says which steps to compute."""

    TITLE = "Accelerate"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache", "speed", "faster", "auto", "TeaCache", "TaylorSeer", "quality"]
    INPUTS = (
        MODEL,
        number("speed", 1.5, 1.0, 4.0, "Steps of the run over steps computed. 1 is off; 1.5 to 2 keeps the picture; 3 and more changes it.",
            step=0.05,
        ),
        socket("recording", "CACHE_RECORDING", "From Schedule Record: the steps are searched on your own model instead of the preset.",
            optional=True,
        ),
        socket("after", "LATENT", "With recording: the output of the sampler that took the recorded model.", optional=True),
        text("schedule", "", "Text of Schedule Search, replayed as it stands; speed is not asked then.", optional=True, advanced=True),
    )
    OUTPUTS = (
        *CACHE_OUTPUTS,
        Output("STRING", "text", "What was chosen, what it was measured on, and what else is on the model."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}  # the graph cache gives equal nodes one output; each needs a report of its own

    def run(self, model, speed, recording=None, after=None, schedule="", unique_id=None):
        from ..accel.cache.accelerate import calibrated, from_preset, replayed
        from ..accel.cache.binding import attach
        from ..accel.cache.report import CacheLog
        from ..accel.cache.schedule import read_schedule
        from ..host import running_prompt

        if recording is not None and schedule.strip():
            remedy = "Keep the recording to search anew, or the schedule to replay it."
            raise input_error(self.TITLE, "schedule", "a schedule and a recording", "one of the two", remedy)
        if recording is not None:
            chosen = calibrated(model, recording, speed, self.TITLE)
        elif schedule.strip():
            chosen = replayed(model, read_schedule(schedule, self.TITLE))
        else:
            chosen = from_preset(model, speed, self.TITLE)
        log = CacheLog(running_prompt)
        return (attach(model, chosen.plan, log, self.TITLE), log, chosen.text)
