"""Pictures palette: a latent as what is coarse and what is fine in it, to exchange parts of two pictures."""

from __future__ import annotations

from .declare import Node, Output, socket

GROUP = "pictures"


class RectiflowLatentWaveletSplit(Node):
    """Splits a latent into its coarse half-size band and three bands of detail, one level of the orthonormal Haar transform."""

    TITLE = "Latent Wavelet Split"
    GROUP = GROUP
    SEARCH_ALIASES = ["haar", "wavelet", "frequency", "low band", "ultraflux"]
    INPUTS = (socket("latent", "LATENT", "A latent with even sides; frames of a video are split one by one."),)
    OUTPUTS = (
        Output("LATENT", "LL", "Coarse: sums of 2×2 cells over 2; with the latent's noise mask, if it has one."),
        Output("LATENT", "LH", "Detail: what changes downwards in each 2×2 cells."),
        Output("LATENT", "HL", "Detail: what changes to the right."),
        Output("LATENT", "HH", "Detail: what changes along the diagonals."),
    )

    def run(self, latent):
        from ..samplers.haar import haar_split

        low, *detail = haar_split(latent["samples"], self.TITLE)
        return ({**latent, "samples": low}, *({"samples": band} for band in detail))


class RectiflowLatentWaveletMerge(Node):
    """Joins four bands to a latent: those of one latent give it back, LL of another gives its layout the detail of these."""

    TITLE = "Latent Wavelet Merge"
    GROUP = GROUP
    SEARCH_ALIASES = ["haar", "wavelet", "swap detail", "swap layout", "ultraflux"]
    INPUTS = (
        socket("LL", "LATENT", "The coarse band, from Latent Wavelet Split."),
        socket("LH", "LATENT", "Detail, of the same size or a batch of one."),
        socket("HL", "LATENT", "Detail, likewise."),
        socket("HH", "LATENT", "Detail, likewise."),
    )
    OUTPUTS = (Output("LATENT", "latent", "Twice the sides of its bands, with what else came with LL."),)

    def run(self, LL, LH, HL, HH):
        from ..samplers.haar import haar_merge

        return ({**LL, "samples": haar_merge(*(band["samples"] for band in (LL, LH, HL, HH)), where=self.TITLE)},)
