"""More about caches: what of a model can be kept, and a run as a picture."""

from __future__ import annotations

from ..errors import input_error
from .caching import GROUP, MODEL, cached_model
from .declare import Node, Output, integer, socket, text


class RectiflowCacheInspect(Node):
    """Says what a cache can keep of a model: its blocks, the granularities that work, and the memory of each at one picture size."""

    TITLE = "Cache Inspect"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache", "blocks", "architecture", "memory"]
    INPUTS = (
        socket("model", "MODEL", "Any model; it is not run."),
        integer("width", 1024, 16, 16384, "Width of the picture, pixels.", step=8),
        integer("height", 1024, 16, 16384, "Height of the picture, pixels.", step=8),
    )
    OUTPUTS = (Output("STRING", "text", "To read; link it to Preview Any."),)

    def run(self, model, width, height):
        from ..accel.cache.inspection import inspect_model

        return (inspect_model(model, width, height).text(),)


class RectiflowCacheTimeline(Node):
    """Draws what a cache did in the last run: a column a visit, computed or forecast for each condition, and the reason."""

    TITLE = "Cache Timeline"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache", "plot", "chart", "report"]
    INPUTS = (
        socket("report", "CACHE_REPORT", "From a cache node."),
        socket("after", "LATENT", "The output of the sampler that took the cached model: the picture waits for it."),
    )
    OUTPUTS = (
        Output("IMAGE", "timeline", "Blue computed, orange forecast; numbers name the reasons below."),
        Output("STRING", "json", "The same as text for other programs."),
    )

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # as Cache Report

    def run(self, report, after):
        from ..accel.cache.timeline import timeline

        if report.last is None:
            remedy = "Link the cache node's own model to the sampler, and the sampler's output to 'after'."
            raise input_error(self.TITLE, "report", "a cache that has not run", "the report of a model that was sampled", remedy)
        return (timeline(report.read()), report.json())


class RectiflowBlockRangeProbe(Node):
    """Samples without skipping and measures which ranges of blocks change least from step to step: what Delta Block Cache may leave out."""

    TITLE = "Block Range Probe"
    GROUP = GROUP
    SEARCH_ALIASES = ["Delta-DiT", "cache", "probe", "calibrate", "blocks"]
    INPUTS = (
        MODEL,
        text("sizes", "0.25, 0.5, 0.75", "Shares of the blocks; of each a front, a middle and a rear range is measured."),
    )
    OUTPUTS = (
        Output("MODEL", "model", "The same model; its pictures are unchanged."),
        Output("CACHE_REPORT", "report", "For Block Range Chart or Cache Report."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}

    def run(self, model, sizes, unique_id=None):
        from ..accel.cache.calibration import read_curve
        from ..accel.cache.range_probe import RangeProbe

        policy = RangeProbe(sizes=read_curve(sizes, self.TITLE, "sizes"))
        return cached_model(model, policy, "block_delta", (0, 0, 0.0, 1.0), {}, self.TITLE)


class RectiflowBlockRangeChart(Node):
    """Draws what Block Range Probe measured: how much of what each range of blocks adds changes in a step. Low is what a cache can hold."""

    TITLE = "Block Range Chart"
    GROUP = GROUP
    SEARCH_ALIASES = ["Delta-DiT", "cache", "plot", "chart", "blocks"]
    INPUTS = (
        socket("report", "CACHE_REPORT", "From Block Range Probe."),
        socket("after", "LATENT", "The output of the sampler that took the probed model: the picture waits for it."),
    )
    OUTPUTS = (
        Output("IMAGE", "chart", "A line a range over the steps."),
        Output("STRING", "text", "Each range with its blocks, as Schedule Record reads them, and which changes least."),
    )

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # as Cache Report

    def run(self, report, after):
        from ..accel.cache.range_probe import change_chart, probed

        record = report.read()
        changes = probed(record, self.TITLE)
        return (change_chart(changes), record.text())
