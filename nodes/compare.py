"""Compare palette: how straight a flow is, which solver gets nearest to its true end, and what accelerators make of one model."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, choice, integer, number, socket, text

GROUP = "metrics"
MODELS = 8
FEATURES = "double:1-2, single:0-2"  # Feature Distance's own
_NOISE = socket("noise", "NOISE", "Every run starts from it.")
_GUIDER = socket("guider", "GUIDER", "Model, prompts and guidance, for example from CFGGuider.")


def _runner(guider, noise, latent_image, bar):
    """A function that runs a SAMPLER over SIGMAS, every time from the same noise, under one progress bar of all runs' steps."""
    from ..host import fix_empty_latent_channels, throw_if_interrupted

    latent = {**latent_image, "samples": fix_empty_latent_channels(guider.model_patcher, latent_image["samples"])}
    drawn = noise.generate_noise(latent)

    def advance(step, denoised, x, total) -> None:
        throw_if_interrupted()
        bar.update(1)

    def run(sampler, sigmas):
        mask = latent.get("noise_mask")
        return guider.sample(drawn, latent["samples"], sampler, sigmas, mask, advance, disable_pbar=True, seed=noise.seed)

    return run


class RectiflowFlowStraightness(Node):
    """Measures S(Z): how far the paths of a flow leave the straight line from noise to picture. 0 is straight, one step is then enough."""

    TITLE = "Flow Straightness"
    GROUP = GROUP
    SEARCH_ALIASES = ["reflow", "rectified", "straight", "one step"]
    INPUTS = (
        _NOISE,
        _GUIDER,
        socket("sigmas", "SIGMAS", "Falling; 2 model calls a step and one more. 20 to 50 steps."),
        socket("latent_image", "LATENT", "An empty latent; its batch is the number of paths, 8 or more for a steady figure."),
    )
    OUTPUTS = (
        Output("FLOAT", "straightness", "S, per coordinate, mean over the paths."),
        Output("FLOAT", "relative", "S over the mean squared length of the paths: the share of the motion that leaves the line."),
        Output("STRING", "table", "What every step adds to S."),
        Output("IMAGE", "curve", "The deviation over sigma."),
    )

    def run(self, noise, guider, sigmas, latent_image):
        from ..host import KSAMPLER, ProgressBar
        from ..metrics.plot import Chart, Series, line_chart
        from ..samplers.straightness import PathRecord, sample_recorded, straightness

        record = PathRecord()
        _runner(guider, noise, latent_image, ProgressBar(len(sigmas) - 1))(KSAMPLER(sample_recorded, {"record": record}), sigmas)
        if record.last is None:
            remedy = "Connect the schedule you sample with."
            raise input_error(self.TITLE, "sigmas", "an empty schedule", "2 or more values that fall", remedy)
        found = straightness(record)
        head = f"S {found.value:.5f}, relative {found.relative:.2%}, {len(found.line)} paths, {2 * len(sigmas) - 1} model calls"
        points = tuple(zip(found.sigmas.tolist(), found.deviation.mean(0).tolist()))
        chart = Chart(head, "sigma (1 noise, 0 picture)", "squared deviation from the line")
        return (found.value, found.relative, f"{head}\n{found.table()}", line_chart([Series("", points)], chart))


class RectiflowSolverCompare(Node):
    """Runs several solvers from one noise at equal numbers of model calls: labelled pictures, error against a fine reference, seconds."""

    TITLE = "Solver Compare"
    GROUP = GROUP
    SEARCH_ALIASES = ["solver bench", "sampler comparison", "XY plot", "nfe", "benchmark"]
    INPUTS = (
        _NOISE,
        _GUIDER,
        socket("latent_image", "LATENT", "An empty latent of the size to try; errors are over its batch, the grid shows the first."),
        socket("vae", "VAE", "Decodes the results for the grid and the PSNR."),
        text("solvers", "euler, ab2, rf_solver, heun, rk4",
            "Names separated by commas: euler, midpoint, heun, rk4, ab2, ab3, fireflow, dpmpp_2m_tau, dpmpp_2m_lambda, unipc, rf_solver."),
        text("nfe", "8, 16, 32", "Numbers of model calls; every solver takes as many steps as fit."),
        choice("scheduler", ("uniform", "simple", "beta", "logit_normal_cdf", "linear_quadratic", "sigmoid"),
            "The grid of sigmas, with the model's own shift."),
        integer("reference_steps", 50, 2, 1000, "Steps of the RK4 reference, 4 model calls each; half as many more measure its error."),
        integer("scale", 2, 1, 32, "Enlarges every picture of the grid by this whole number."),
    )
    OUTPUTS = (
        Output("IMAGE", "grid", "A row a solver: the reference, then each number of calls."),
        Output("IMAGE", "plot", "Error over model calls, both axes logarithmic."),
        Output("STRING", "csv", "solver, budget, steps, nfe (counted), seconds, rmse (of the latent), psnr (of the picture, dB)."),
        Output("STRING", "report", "The same as a readable table, and what the reference itself may be off."),
    )

    def run(self, noise, guider, latent_image, vae, solvers, nfe, scheduler, reference_steps, scale):
        from ..host import KSAMPLER, ProgressBar
        from ..metrics.fidelity import psnr
        from ..metrics.solver_sheet import solver_chart, solver_grid, solver_table
        from ..samplers.comparison import compare, parse_budgets, parse_solvers, planned_steps, table_csv
        from ..samplers.model_shift import flow_sigmas, resolve_alpha

        names, budgets = parse_solvers(solvers, self.TITLE), parse_budgets(nfe, self.TITLE)
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        alpha = resolve_alpha(self.TITLE, "from_model", 1.0, model_sampling, None, 65536)
        sample = _runner(guider, noise, latent_image, ProgressBar(planned_steps(names, budgets, reference_steps)))

        def run(function, options, steps: int):
            return sample(KSAMPLER(function, options), flow_sigmas(model_sampling, scheduler, steps, "from_model", alpha, where=self.TITLE))

        comparison = compare(run, names, budgets, reference_steps)
        rows = [finished.row for finished in comparison.runs]
        reference = vae.decode(comparison.reference)
        pictures = [vae.decode(finished.latent) for finished in comparison.runs]
        decibels = [float(psnr(picture, reference, where=self.TITLE).mean()) for picture in pictures]
        return (
            solver_grid(rows, [picture[0] for picture in pictures], decibels, reference[0], (names, budgets), scale),
            solver_chart(rows, names, budgets, comparison.reference_error),
            table_csv(rows, {"psnr": decibels}),
            solver_table(rows, decibels, reference_steps, comparison.reference_error),
        )


class RectiflowModelCompare(Node):
    """Draws one noise with up to eight models and sets size, seconds, model calls and distance to the first side by side."""

    TITLE = "Model Compare"
    GROUP = GROUP
    SEARCH_ALIASES = ["benchmark", "speed", "accelerator comparison", "XY plot", "quality loss", "what did it cost"]
    INPUTS = (
        _NOISE,
        socket("positive", "CONDITIONING", "The same prompt for all."),
        socket("negative", "CONDITIONING", "The same for all; not asked at cfg 1."),
        socket("sampler", "SAMPLER", "How all models are sampled."),
        socket("sigmas", "SIGMAS", "The schedule of all runs."),
        socket("latent_image", "LATENT", "An empty latent; distances are means over its batch, the grid shows its first picture."),
        socket("vae", "VAE", "Decodes the results."),
        number("cfg", 2.0, 0.0, 100.0, "Guidance of all runs; 1 asks no negative prompt.", step=0.1),
        text("labels", "", "One name a line: line 1 belongs to model_1 and so on.", multiline=True),
        integer("rounds", 1, 1, 100, "Timed runs a model, after one that warms up. 3 or more for a figure to quote: the median counts."),
        integer("scale", 2, 1, 32, "Enlarges every picture of the grid by this whole number."),
        socket("model_1", "MODEL", "What the others are measured against: the plain model."),
        *(socket(f"model_{number}", "MODEL", "The same model with something on it.", optional=True) for number in range(2, MODELS + 1)),
    )
    OUTPUTS = (
        Output("IMAGE", "grid", "A picture a model, with what it costs and how near it is."),
        Output("STRING", "table", "A line a model: MiB of weights, seconds, speed, model calls, PSNR, SSIM, feature distance."),
        Output("STRING", "csv", "The same for a spreadsheet."),
        Output("LATENT", "latents", "What each model drew, one after the other; VAE Decode gives the whole pictures."),
    )

    def run(self, noise, positive, negative, sampler, sigmas, latent_image, vae, cfg, labels, rounds, scale, **models):
        import torch

        from ..host import ProgressBar
        from ..metrics.fidelity import figures
        from ..metrics.model_sheet import model_captions, model_csv, model_row, model_table, shrunk
        from ..metrics.picture_grid import GridLayout, picture_grid
        from .metrics import RectiflowFeatureDistance, tiny_eye

        given = {slot: models[f"model_{slot}"] for slot in range(1, MODELS + 1) if models.get(f"model_{slot}") is not None}
        lines = dict(enumerate((line.strip() for line in labels.strip("\n").split("\n")), start=1))
        bar = ProgressBar(len(given) * (rounds + 1) * max(len(sigmas) - 1, 1))
        eye = tiny_eye()
        rows, pictures, latents, timed = [], [], [], {}
        for slot, model in given.items():
            latent, timed[slot] = self._timed(model, (positive, negative, cfg), (noise, latent_image, bar), (sampler, sigmas), rounds)
            picture = vae.decode(latent)[..., :3].float().cpu()
            picture = picture.reshape(-1, *picture.shape[-3:])  # frames of clips count as pictures
            pictures.append(picture)
            near = figures(picture, pictures[0], None, "gaussian", where=self.TITLE)
            seen = RectiflowFeatureDistance().run(shrunk(picture), shrunk(pictures[0]), 0.2, FEATURES, 0, **eye)[0]
            latents.append(latent)
            distances = (float(near.psnr.mean()), float(near.ssim.mean()), seen)
            label = lines.get(slot) or f"model {slot}"
            rows.append(model_row(label, model.model_size(), timed[slot], next(iter(timed.values())), distances))
        grid = picture_grid([batch[0] for batch in pictures], model_captions(rows), GridLayout(scale=scale, gap=8, font_size=12))
        return (grid, model_table(rows, rounds), model_csv(rows), {"samples": torch.cat(latents)})

    @staticmethod
    def _timed(model, guidance, start, steps, rounds: int):
        """The latent of the first run, and the times of the runs after it."""
        from ..host import CFGGuider
        from ..metrics.stopwatch import Stopwatch

        stopwatch = Stopwatch()
        guider = CFGGuider(stopwatch.watch(model))
        guider.set_conds(*guidance[:2])
        guider.set_cfg(guidance[2])
        run = _runner(guider, *start)
        latents = [run(*steps) for _ in range(rounds + 1)]
        return latents[0], stopwatch.warm
