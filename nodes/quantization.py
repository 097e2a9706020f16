"""Quantisation palette: models in fewer bits, and what that costs in decibels."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, boolean, choice, integer, number, seed_input, socket, steps_of, text

GROUP = "model patches"
_MODEL = Output("MODEL", "model", "The model with quantised layers; the given one is unchanged.")
_REPORT = Output("STRING", "report", "A table; link it to Preview Any.")


class RectiflowQuantCalibrate(Node):
    """Samples a few pictures and notes what enters each linear layer: Quantize chooses rotations and smoothing by it."""

    TITLE = "Quant Calibrate"
    GROUP = GROUP
    SEARCH_ALIASES = ["calibration", "activation statistics", "LRQ-DiT", "quantize"]
    INPUTS = (
        socket("model", "MODEL", "The model to quantise, in 16 or 32 bits."),
        socket("positive", "CONDITIONING", "A prompt of the kind the model will be used with."),
        socket("latent_image", "LATENT", "An empty latent of the usual size."),
        socket("sigmas", "SIGMAS", "A short schedule from 1 to 0; 4 to 10 steps are enough."),
        seed_input("Noise of the first run; run i takes seed + i."),
        integer("num_runs", 1, 1, 64, "Pictures to sample. More see more outliers."),
        text("layers", "", "Regular expression: only layers whose names it finds. Empty: every linear layer of the blocks."),
        socket("negative", "CONDITIONING", "With it the guided run is watched, both prompts.", optional=True),
        number("cfg", 1.0, 0.0, 100.0, "Guidance of the runs where negative is linked.", step=0.1, optional=True),
        integer("rows", 1024, 0, 65536, "Tokens of each layer that are kept, over all runs, for rounding compensated in Quantize. Takes 2 "
            "bytes a channel each. 0: none.", optional=True, advanced=True,
        ),
    )  # fmt: skip
    OUTPUTS = (
        Output("QUANT_STATS", "stats", "For Quantize."),
        Output("STRING", "report", "Tokens, largest magnitude and root mean square of what enters each layer."),
    )

    def run(self, model, positive, latent_image, sigmas, seed, num_runs, layers, negative=None, cfg=1.0, rows=1024):
        from ..accel.quant.attach import chosen_layers
        from ..accel.quant.calibration import watching
        from ..host import ProgressBar, fix_empty_latent_channels, prepare_noise, sample_custom, sampler_object

        if len(sigmas) < 2:
            raise input_error(self.TITLE, "sigmas", f"{len(sigmas)} values", "at least one step", "Link a schedule from 1 to 0.")
        latent = fix_empty_latent_channels(model, latent_image["samples"])
        guided, bar = (cfg, negative) if negative is not None else (1.0, positive), ProgressBar(num_runs)
        with watching(chosen_layers(model, layers, "", self.TITLE), rows) as stats:
            for number_of_run in range(num_runs):
                noise = prepare_noise(latent, seed + number_of_run)
                sampler = sampler_object("euler")
                sample_custom(
                    model, noise, guided[0], sampler, sigmas, positive, guided[1], latent, disable_pbar=True, seed=seed + number_of_run
                )
                bar.update(1)
        stats.check(self.TITLE)
        return (stats, stats.table())


class RectiflowQuantize(Node):
    """Keeps the weights of linear layers in 8, 6, 4, 3 or 2 bits and computes with integers. On a CPU 8 bits are also faster."""

    TITLE = "Quantize"
    GROUP = GROUP
    SEARCH_ALIASES = ["int8", "W8A8", "W4A8", "TLQ", "LRQ-DiT", "compress", "low memory", "hadamard"]
    INPUTS = (
        socket("model", "MODEL", "A model in 16 or 32 bits."),
        choice("weight_bits", ("8", "6", "4", "3", "2"), "Of a code. 8 looks the same; 4 is a quarter of 16 bits; 2 is for trials."),
        choice("act_bits", ("8", "16", "6", "4"), "Bits of activations, a token at its own range. 16 leaves them alone."),
        choice("group_size", ("32", "16", "64", "128", "0"), "Weights that share a scale, below 8 bits. 0: a grid a row."),
        choice("method", ("tlq", "uniform"), "Below 8 bits. tlq: steps that grow with the magnitude. uniform: equal steps."),
        choice("rotation", ("auto", "none", "hadamard", "hadamard_block", "convrot", "dual", "threshold"),
            "auto: what errs least on the calibration. convrot: files load in newer cores. threshold: the paper's rule.",
        ),
        number("j_threshold", 1.0, 0.0, 100.0, "For threshold: layers whose input is larger get the dual rotation.", advanced=True),
        number("smooth_alpha", 0.5, 0.0, 1.0, "Share of the weights in smoothing, where it lowers the error. 0 is off."),
        boolean("protect_down", True, "Keeps down-projections in full precision when act_bits is below 8."),
        number("keep_below_db", 0.0, 0.0, 100.0, "Layers whose error is worse than this stay in full precision. 0: none.", step=0.5),
        text("include", "", "Regular expression: only layers whose names it finds."),
        text("exclude", "", "Regular expression: layers to leave alone.", advanced=True),
        choice("lora", ("before", "bypass", "requant"), "LoRAs. before: those linked here go into the codes. bypass: all stay beside them, "
            "exact. requant: all are rounded into the codes, at 4 bits with much noise.", default="bypass",
        ),
        seed_input("Of the rotations' random signs."),
        socket("stats", "QUANT_STATS", "From Quant Calibrate.", optional=True),
        choice("mode", ("packed", "simulate"), "packed: computes with the codes. simulate: the same numbers in floating point, slower, to "
            "compare with and where a kernel is missing. Training simulates by itself.", optional=True, advanced=True,
        ),
        choice(
            "rounding", ("auto", "compensated", "nearest"), "compensated: codes make up for each other's errors on the rows of stats; "
            "as many bytes, 2 dB nearer at 4 bits. auto: that, below 8 bits.", optional=True,
        ),
        integer("directions", 0, 0, 256, "Principal directions of each layer's input that are not rounded, by rows of stats. 16 gain 2 dB "
            "at 8 bits for 1 to 2 % of a large model's bytes.", optional=True,
        ),
    )  # fmt: skip
    OUTPUTS = (_MODEL, _REPORT)

    def run(
        self, model, weight_bits, act_bits, group_size, method, rotation, j_threshold, smooth_alpha, protect_down, keep_below_db, include,
        exclude, lora, seed, stats=None, mode="packed", rounding="auto", directions=0,
    ):  # fmt: skip
        from ..accel.compressed.writing import changed_weight
        from ..accel.modules import NETWORK, own_weight
        from ..accel.quant.attach import chosen_layers, put_on
        from ..accel.quant.recipe import QuantScheme, quantised_layers, report_table
        from .compressed_files import with_changes

        scheme = QuantScheme(
            int(weight_bits), int(act_bits), int(group_size), method, rotation, j_threshold, smooth_alpha, protect_down, keep_below_db,
            "requant" if lora == "requant" else "bypass", seed, mode == "simulate", rounding, directions,
        )  # fmt: skip
        layers = chosen_layers(model, include, exclude, self.TITLE)
        step = steps_of(len(layers))

        keys = {name: f"{NETWORK}{name}.weight" for name in layers}
        # A LoRA in front of a wrapper (a mask, say) cannot stay beside the codes, which have the wrapper in them.
        inside = {name for name, key in keys.items() if lora == "before" or key in model.weight_wrapper_patches}

        def weight_of(name: str):
            weight, layer = own_weight(model, name, layers[name]), layers[name]
            if name not in inside:
                return weight
            return changed_weight(model, layer, "weight", keys[name], weight.float(), lambda key, of: with_changes(model, key, of))

        made, reports = quantised_layers(layers, weight_of, scheme, stats, self.TITLE, step)
        patched = put_on(model, made, inside, layers.__getitem__)
        return (patched, report_table(scheme, reports, model.model_size(), patched.size))


class RectiflowQuantReport(Node):
    """Compares two models step by step on the same states: how far the velocity is off, in dB, at each sigma."""

    TITLE = "Quant Report"
    GROUP = GROUP
    SEARCH_ALIASES = ["SQNR", "quantization error", "compare models", "quality"]
    INPUTS = (
        socket("reference", "MODEL", "The model before."),
        socket("model", "MODEL", "The model after."),
        socket("positive", "CONDITIONING", "The prompt."),
        socket("negative", "CONDITIONING", "The negative prompt; asked only where cfg is not 1."),
        socket("latent_image", "LATENT", "An empty latent: its size is what counts."),
        socket("sigmas", "SIGMAS", "The schedule both are sampled with."),
        number("cfg", 1.0, 0.0, 100.0, "Guidance.", step=0.1),
        seed_input("Of the noise."),
    )
    OUTPUTS = (
        Output("STRING", "report", "Velocity error at each sigma, and of the final latent."),
        Output("IMAGE", "plot", "The same as a curve."),
        Output("FLOAT", "mean_db", "Mean over the steps; 35 and more is hard to see."),
    )

    def run(self, reference, model, positive, negative, latent_image, sigmas, cfg, seed):
        from ..accel.quant.compare import recording_sampler, replaying_sampler, velocity_table
        from ..host import KSAMPLER, fix_empty_latent_channels, prepare_noise, sample_custom, sampler_object
        from ..metrics.plot import Chart, Series, line_chart

        if len(sigmas) < 2:
            raise input_error(self.TITLE, "sigmas", f"{len(sigmas)} values", "at least one step", "Link a schedule from 1 to 0.")
        latent = fix_empty_latent_channels(reference, latent_image["samples"])
        noise = prepare_noise(latent, seed)

        def sample(which, sampler):
            return sample_custom(which, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=seed)

        visited, found = [], []
        exact = sample(reference, KSAMPLER(recording_sampler(visited)))
        sample(model, KSAMPLER(replaying_sampler(visited, found)))
        own = sample(model, sampler_object("euler"))
        distance = float((own - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        chart = Chart("Velocity error of the changed model", "sigma", "SQNR in dB")
        plot = line_chart([Series("velocity", tuple(found))], chart)
        return (velocity_table(found, distance), plot, sum(value for _, value in found) / len(found))


class RectiflowKeepSensitiveLayers(Node):
    """Finds the layers whose rounded activations change the velocity most, and lets as few as needed compute without rounding."""

    TITLE = "Keep Sensitive Layers"
    GROUP = GROUP
    SEARCH_ALIASES = ["mixed precision", "sensitive layers", "quantization error", "act_bits", "quality"]
    INPUTS = (
        socket("reference", "MODEL", "The model before Quantize."),
        socket("model", "MODEL", "The quantised model."),
        socket("positive", "CONDITIONING", "A prompt of the kind the model will be used with."),
        socket("negative", "CONDITIONING", "The negative prompt; asked only where cfg is not 1."),
        socket("latent_image", "LATENT", "An empty latent: its size is what counts."),
        socket("sigmas", "SIGMAS", "A short schedule from 1 to 0; 4 to 10 steps are enough."),
        number("cfg", 1.0, 0.0, 100.0, "Guidance you sample with: it multiplies errors.", step=0.1),
        seed_input("Of the noise."),
        number("target_db", 35.0, 1.0, 100.0, "Mean velocity SQNR to reach. Each layer that is kept costs speed, not bytes.", step=0.5),
    )
    OUTPUTS = (
        Output("MODEL", "model", "The same codes; the layers that are kept take activations as they are."),
        Output("STRING", "report", "What each layer's rounding does, and which are kept."),
        Output("FLOAT", "mean_db", "Mean over the steps with these layers kept."),
    )

    def run(self, reference, model, positive, negative, latent_image, sigmas, cfg, seed, target_db):
        from ..accel.quant.attach import quantised_parts, with_activations
        from ..accel.quant.compare import recording_sampler
        from ..accel.quant.linear import FULL
        from ..accel.quant.sensitivity import calls_needed, sensitivity_sampler, sensitivity_table
        from ..host import KSAMPLER, fix_empty_latent_channels, prepare_noise, sample_custom

        if len(sigmas) < 2:
            raise input_error(self.TITLE, "sigmas", f"{len(sigmas)} values", "at least one step", "Link a schedule from 1 to 0.")
        parts = {name: part for name, part in quantised_parts(model).items() if part.act_bits < FULL}
        if not parts:
            remedy = "Link the model behind Quantize; without rounded activations there is nothing to keep."
            raise input_error(self.TITLE, "model", "no layer that rounds activations", "a model with act_bits of 4, 6 or 8", remedy)
        latent = fix_empty_latent_channels(reference, latent_image["samples"])
        noise = prepare_noise(latent, seed)
        step = steps_of(calls_needed(len(sigmas) - 1, len(parts)))
        visited, found = [], []
        for which, sampler in (
            (reference, recording_sampler(visited)),
            (model, sensitivity_sampler(visited, parts, target_db, found, self.TITLE, step)),
        ):
            sample_custom(which, noise, cfg, KSAMPLER(sampler), sigmas, positive, negative, latent, disable_pbar=True, seed=seed)
        return (with_activations(model, found[0].kept, FULL), sensitivity_table(found[0], parts), found[0].reached)
