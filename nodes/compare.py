"""Compare palette: how straight a flow is, and which solver gets nearest to its true end for the same number of model calls."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, choice, integer, socket, text

GROUP = "metrics"
_NOISE = socket("noise", "NOISE", "Every run starts from it.")
_GUIDER = socket("guider", "GUIDER", "Model, prompts and guidance, for example from CFGGuider.")


def _runner(guider, noise, latent_image, steps: int):
    """A function that runs a SAMPLER over SIGMAS, every time from the same noise, under one progress bar of `steps` steps in all."""
    from ..host import ProgressBar, fix_empty_latent_channels, throw_if_interrupted

    latent = {**latent_image, "samples": fix_empty_latent_channels(guider.model_patcher, latent_image["samples"])}
    drawn, bar = noise.generate_noise(latent), ProgressBar(steps)

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
        from ..host import KSAMPLER
        from ..metrics.plot import Chart, Series, line_chart
        from ..samplers.straightness import PathRecord, sample_recorded, straightness

        record = PathRecord()
        _runner(guider, noise, latent_image, len(sigmas) - 1)(KSAMPLER(sample_recorded, {"record": record}), sigmas)
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
        from ..host import KSAMPLER
        from ..metrics.fidelity import psnr
        from ..metrics.solver_sheet import solver_chart, solver_grid, solver_table
        from ..samplers.comparison import compare, parse_budgets, parse_solvers, planned_steps, table_csv
        from ..samplers.model_shift import flow_sigmas, resolve_alpha

        names, budgets = parse_solvers(solvers, self.TITLE), parse_budgets(nfe, self.TITLE)
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        alpha = resolve_alpha(self.TITLE, "from_model", 1.0, model_sampling, None, 65536)
        sample = _runner(guider, noise, latent_image, planned_steps(names, budgets, reference_steps))

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
