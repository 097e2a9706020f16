"""Metrics palette: how near two pictures are, where they differ, how long sampling takes and what it asks of the model."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, choice, number, seed_input, socket, text

GROUP = "metrics"
_WINDOW = choice("window", ("gaussian", "uniform"),
    "Window of SSIM. gaussian: 11×11, sigma 1.5, as in its paper. uniform: 7×7, scikit-image's default.",
)
_REPORT = Output("STRING", "report", "All figures as a table; link it to Preview Any.")
_MSE = Output("FLOAT", "mse", "Mean squared error, 0 for equal pictures; mean over the batch.")
_PSNR = Output("FLOAT", "psnr", "Peak signal to noise ratio in dB, infinite for equal pictures; mean over the batch.")
_SSIM = Output("FLOAT", "ssim", "Structural similarity, 1 for equal pictures; mean over the batch.")


def tiny_eye() -> dict:
    """The tiny model as model, vae and conditioning of Feature Distance."""
    from .tiny import RectiflowLoadTiny

    model, clip, vae = RectiflowLoadTiny().run()
    return {"model": model, "vae": vae, "conditioning": clip.encode_from_tokens_scheduled(clip.tokenize(""))}


def _colours(image):
    return image[..., :3]


class RectiflowPictureMetrics(Node):
    """Measures how near pictures are to their references: PSNR, SSIM and mean squared error, of the whole, of a mask and outside it."""

    TITLE = "Picture Metrics"
    GROUP = GROUP
    SEARCH_ALIASES = ["psnr", "ssim", "mse", "compare images", "quality"]
    INPUTS = (
        socket("image", "IMAGE", "The pictures to judge."),
        socket("reference", "IMAGE", "What they should look like: one for all, or one a picture; same size."),
        _WINDOW,
        choice("region", ("mask", "outside", "whole"), "What the numbers are of when a mask is linked; the report lists all three."),
        socket("mask", "MASK", "A region of the picture's size: one for all, or one a picture.", optional=True),
    )
    OUTPUTS = (_REPORT, _PSNR, _SSIM, _MSE)

    def run(self, image, reference, window: str, region: str, mask=None):
        from ..metrics.reports import figure_table, measured_regions

        wanted = "whole" if mask is None else region
        found = measured_regions(_colours(image), _colours(reference), mask, window, wanted, self.TITLE)
        chosen = found[wanted]
        return (figure_table(found, window), float(chosen.psnr.mean()), float(chosen.ssim.mean()), float(chosen.mse.mean()))


class RectiflowFeatureDistance(Node):
    """Compares pictures as a flow transformer sees them: by the direction of its block activations. The tiny model, or a model you link."""

    TITLE = "Feature Distance"
    GROUP = GROUP
    SEARCH_ALIASES = ["lpips", "perceptual", "dreamsim", "similarity"]
    INPUTS = (
        socket("image", "IMAGE", "The pictures to judge."),
        socket("reference", "IMAGE", "What they should look like: one for all, or one a picture; same size."),
        number("sigma", 0.2, 0.0, 1.0, "Noise in both pictures as the model sees them. Near 0 texture counts, higher up layout."),
        text("blocks", "double:1-2, single:0-2", "Blocks whose activations count, such as double:1-2, single:5."),
        seed_input("Seed of the noise, the same for both pictures."),
        socket("model", "MODEL", "Any model with block hooks (Flux, SD3 …); without one, the tiny model.", optional=True),
        socket("vae", "VAE", "The linked model's VAE.", optional=True),
        socket("conditioning", "CONDITIONING", "The prompt the linked model sees the pictures with, best an empty one.", optional=True),
        socket("mask", "MASK", "Only this region counts.", optional=True),
        socket("clip_vision", "CLIP_VISION",
            "An image encoder (CLIP, SigLIP, DINOv2) as the eye in place of a model; sigma, blocks and seed are not used.", optional=True,
        ),
    )
    OUTPUTS = (
        Output("FLOAT", "distance", "0 for equal pictures; mean over the batch."),
        Output("STRING", "report", "The distance of every picture and block."),
        Output("IMAGE", "map", "Where the model sees a difference: black none, pale yellow the most."),
    )

    def run(self, image, reference, sigma, blocks, seed, model=None, vae=None, conditioning=None, mask=None, clip_vision=None):
        import torch

        from ..metrics.fidelity import picture_pair, region_weights
        from ..metrics.heat_map import heat_map

        pictures, references = (batch.float() for batch in picture_pair(_colours(image), _colours(reference), self.TITLE))
        size = tuple(pictures.shape[1:3])
        weights = None if mask is None else region_weights(mask, len(pictures), size, self.TITLE)
        given = {"model": model, "vae": vae, "conditioning": conditioning}
        if clip_vision is None:
            distances, cells = self._by_model(pictures, references, sigma, blocks, seed, given)
        else:
            distances, cells = self._by_encoder(pictures, references, clip_vision, given)
        found = distances.summary(cells, weights, self.TITLE)
        colours, scale = heat_map(found.maps)
        enlarged = torch.nn.functional.interpolate(colours.movedim(-1, 1), size=size, mode="nearest").movedim(1, -1)
        return (float(found.each.mean()), f"{found.table()}\nmap: pale yellow is {scale:.4f}", enlarged)

    def _by_model(self, pictures, references, sigma, blocks, seed, given):
        """Distances in the blocks of a flow transformer, and the size of its latents."""
        import torch

        from ..metrics.features import TokenDistances, parse_blocks

        chosen = parse_blocks(blocks, self.TITLE)
        model, vae, conditioning = self._models(**given)
        latent = vae.encode(torch.cat([pictures, references]))
        ratio, (height, width) = vae.spacial_compression_decode(), pictures.shape[1:3]
        if tuple(side * ratio for side in latent.shape[-2:]) != (height, width):
            got = f"{width}×{height} pixels"
            raise input_error(self.TITLE, "image", got, "sides that the VAE encodes whole", "Crop both pictures to multiples of 16 pixels.")
        distances = TokenDistances(chosen, len(pictures))
        self._measure(model, conditioning, latent, sigma, seed, distances)
        return distances, tuple(latent.shape[-2:])

    def _by_encoder(self, pictures, references, clip_vision, given):
        from ..metrics.features import vision_distances

        both = next((name for name, value in given.items() if value is not None), None)
        if both is not None:
            raise input_error(self.TITLE, both, "a link beside clip_vision", "one eye: a model or an image encoder", "Unlink one of them.")
        return vision_distances(clip_vision, pictures, references, self.TITLE)

    def _models(self, model, vae, conditioning):
        given = {"model": model, "vae": vae, "conditioning": conditioning}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            given = tiny_eye()
        elif missing:
            remedy = "Link all three, or none for the tiny model."
            linked = " and ".join(name for name in given if name not in missing)
            raise input_error(self.TITLE, missing[0], None, f"a link, since {linked} has one", remedy)
        return given["model"], given["vae"], given["conditioning"]

    @staticmethod
    def _measure(model, conditioning, latent, sigma: float, seed: int, distances) -> None:
        import torch

        from ..host import CFGGuider, prepare_noise
        from ..metrics.features import OneCall, measure_blocks

        guider = CFGGuider(measure_blocks(model, distances))
        guider.set_conds(conditioning, conditioning)
        guider.set_cfg(1.0)
        noise = prepare_noise(latent[:1], seed).expand_as(latent)
        with torch.no_grad():
            guider.sample(noise, latent, OneCall(), torch.tensor([sigma, 0.0]), disable_pbar=True, seed=seed)


class RectiflowDifferencePicture(Node):
    """Shows where two pictures differ: absolute difference, signed brightness, or 1 − SSIM, as a heat map."""

    TITLE = "Difference Picture"
    GROUP = GROUP
    SEARCH_ALIASES = ["diff", "heat map", "error map"]
    INPUTS = (
        socket("image", "IMAGE", "The pictures to judge."),
        socket("reference", "IMAGE", "What they should look like: one for all, or one a picture; same size."),
        choice("quantity", ("absolute", "signed", "structure"),
            "absolute: mean of the three channels' differences. signed: red where the picture is brighter, blue where darker. "
            "structure: 1 − SSIM.",
        ),
        number("full_scale", 0.0, 0.0, 2.0, "The difference that gets the last colour; 0 takes the largest one in the batch."),
    )
    OUTPUTS = (
        Output("IMAGE", "map", "Black to pale yellow for growing differences; signed: blue, white, red."),
        Output("FLOAT", "full_scale", "The difference that has the last colour."),
    )

    def run(self, image, reference, quantity: str, full_scale: float):
        from ..metrics.heat_map import difference, heat_map

        return heat_map(difference(_colours(image), _colours(reference), quantity, self.TITLE), full_scale, quantity == "signed")


class RectiflowStopwatch(Node):
    """Times every sampling run of a model and counts what it asks of the network. The picture stays bit-identical."""

    TITLE = "Stopwatch"
    GROUP = GROUP
    SEARCH_ALIASES = ["timer", "benchmark", "seconds", "nfe", "profile"]
    INPUTS = (socket("model", "MODEL", "Link it last, behind accelerators, to count the calls that reach the network."),)
    OUTPUTS = (
        Output("MODEL", "model", "The same model, watched."),
        Output("STOPWATCH", "stopwatch", "For Stopwatch Report."),
    )
    # The graph cache gives equal nodes one output; the id makes two stopwatches on one model two.
    HIDDEN = {"unique_id": "UNIQUE_ID"}

    def run(self, model, unique_id=None):
        from ..metrics.stopwatch import Stopwatch

        stopwatch = Stopwatch()
        return (stopwatch.watch(model), stopwatch)


class RectiflowStopwatchReport(Node):
    """Reads a stopwatch after a sampler has run: seconds, evaluations, network calls, the first run apart from the warm ones."""

    TITLE = "Stopwatch Report"
    GROUP = GROUP
    SEARCH_ALIASES = ["timer", "benchmark", "seconds", "nfe"]
    INPUTS = (
        socket("stopwatch", "STOPWATCH", "From Stopwatch."),
        socket("latent", "LATENT", "The timed sampler's output: the report waits for it and is written anew when it runs again."),
    )
    OUTPUTS = (
        _REPORT,
        Output("FLOAT", "seconds", "Of the last run."),
        Output("FLOAT", "warm_seconds", "Mean of the runs after the first; not a number before the second run."),
        Output("INT", "evaluations", "NFE of the last run: latents the solver asked for."),
        Output("INT", "network_calls", "Calls of the network in the last run; guidance may make two an evaluation."),
    )

    def run(self, stopwatch, latent):
        if not stopwatch.runs:
            remedy = "Give the sampler the Stopwatch's own model output."
            raise input_error(self.TITLE, "stopwatch", "a stopwatch without a run", "one whose model has been sampled", remedy)
        last = stopwatch.runs[-1]
        return (stopwatch.report(), last.seconds, stopwatch.warm_seconds(), last.evaluations, last.calls)


class RectiflowInversionReport(Node):
    """Says how well an inversion brought a picture back: MSE, PSNR, SSIM, and how far the last estimate of the picture has drifted."""

    TITLE = "Inversion Report"
    GROUP = "inversion"
    SEARCH_ALIASES = ["reconstruction", "round trip", "psnr", "consistency"]
    INPUTS = (
        _WINDOW,
        socket("source_image", "IMAGE", "The picture that was inverted.", optional=True),
        socket("image", "IMAGE", "The picture that came back.", optional=True),
        socket("source_latent", "LATENT", "The latent that was inverted.", optional=True),
        socket("latent", "LATENT", "The latent that came back.", optional=True),
        socket("last_denoised", "LATENT", "The inversion's denoised_output: what its last step took for the picture.", optional=True),
    )
    OUTPUTS = (
        _REPORT, _MSE, _PSNR, _SSIM,
        Output("FLOAT", "consistency", "RMSE of last_denoised to source_latent; not a number where one of them is not linked."),
    )

    def run(self, window: str, source_image=None, image=None, source_latent=None, latent=None, last_denoised=None):
        from ..metrics.inversion_report import latent_figures, latent_rmse
        from ..metrics.reports import figure_table, measured_regions

        pairs = {}
        if source_image is not None and image is not None:
            pairs |= measured_regions(_colours(image), _colours(source_image), None, window, where=self.TITLE)
        if source_latent is not None and latent is not None:
            pairs["latent"] = latent_figures(latent["samples"], source_latent["samples"], window, self.TITLE)
        if not pairs:
            allowed = "source_image and image, or source_latent and latent"
            raise input_error(self.TITLE, "image", "no pair to compare", allowed, "Link the picture before and after.")
        drift = float("nan")
        if last_denoised is not None and source_latent is not None:
            drift = latent_rmse(last_denoised["samples"], source_latent["samples"], self.TITLE)
        chosen = next(iter(pairs.values()))
        shown = "not measured (link source_latent and last_denoised)" if drift != drift else f"{drift:.4f} RMSE of the last estimate"
        report = f"{figure_table(pairs, window)}\nconsistency: {shown}"
        return (report, float(chosen.mse.mean()), float(chosen.psnr.mean()), float(chosen.ssim.mean()), drift)
