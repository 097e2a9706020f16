"""More about caches: what of a model can be kept, and a run as a picture."""

from __future__ import annotations

from ..errors import input_error
from .caching import GROUP
from .declare import Node, Output, integer, socket


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
