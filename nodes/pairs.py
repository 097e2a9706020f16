"""Pairs palette: pictures joined to the noise they came from, for reflow and one-step distillation."""

from __future__ import annotations

from .declare import Node, Output, integer, number, seed_input, socket, text

GROUP = "training"
_PAIRS = Output("FLOW_PAIRS", "pairs", "Noise and picture of each run, for training.")


def _below_output(path: str, where: str):
    """The file that `path` names below the output folder; nothing outside it is read."""
    from pathlib import Path

    from ..errors import input_error
    from ..host import get_output_directory

    root = Path(get_output_directory()).resolve()
    found = (root / path).resolve() if "\0" not in path else root
    if not found.is_relative_to(root) or not found.is_file():
        raise input_error(where, "path", path, "a file below the output folder", "Give the path that Flow Pair Generator reported.")
    return found


class RectiflowFlowPairGenerator(Node):
    """Samples pictures from seeded noise and saves each with its noise's seed: the pairs that reflow straightens a model with."""

    TITLE = "Flow Pair Generator"
    GROUP = GROUP
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["reflow", "rectified flow", "instaflow", "distillation data", "coupling"]
    INPUTS = (
        socket("model", "MODEL", "The flow whose coupling the pairs are."),
        socket("positive", "CONDITIONING", "The prompt; its hash is kept."),
        socket("negative", "CONDITIONING", "Asked only where cfg is not 1."),
        number("cfg", 1.0, 0.0, 100.0, "Guidance, which the pairs keep for good: a model trained on them needs none of it.", step=0.1),
        socket("sampler", "SAMPLER", "A deterministic one; with noise of its own the pairs are no coupling."),
        socket("sigmas", "SIGMAS", "From 1 down to 0; too few steps and the pairs are those of the solver, not of the flow."),
        socket("latent", "LATENT", "An empty latent: its size is what counts."),
        integer("count", 16, 1, 1000000, "Pairs to make."),
        seed_input("Pair i starts from the noise of seed + i."),
        text("path", "rectiflow/pairs", "Name below the output folder; a number and .safetensors are added."),
        integer("batch", 4, 1, 256, "Pairs in one run; the pairs do not depend on it.", optional=True, advanced=True),
    )
    OUTPUTS = (_PAIRS, Output("STRING", "report", "What was made, and the file."))

    def run(self, model, positive, negative, cfg, sampler, sigmas, latent, count, seed, path, batch=4):
        from pathlib import Path

        import torch

        from ..host import ProgressBar, fix_empty_latent_channels, get_output_directory, get_save_image_path, sample_custom, sampler_object
        from ..samplers.pair_store import PairStore
        from ..samplers.pairs import facts_of, save_pairs
        from ..samplers.stochastic import RowNoise
        from ..samplers.walk import check_sigmas

        check_sigmas(sigmas, self.TITLE)
        empty = torch.zeros_like(fix_empty_latent_channels(model, latent["samples"])[:1])
        to_model, bar = model.get_model_object("process_latent_in"), ProgressBar(count)

        def drawn(noise, first_seed, solver=sampler, along=sigmas):
            start = empty.expand_as(noise)
            return sample_custom(model, noise, cfg, solver, along, positive, negative, start, disable_pbar=True, seed=first_seed)

        def sample(noise, first_seed):
            made = to_model(drawn(noise, first_seed))
            bar.update(len(noise))
            return made

        folder, name, counter, below, _ = get_save_image_path(path, get_output_directory())
        probe = drawn(RowNoise(empty.float().cpu(), seed).draw(), seed, sampler_object("euler"), torch.stack((sigmas[0], sigmas[0] * 0)))
        store = PairStore(Path(folder), facts_of(positive, negative, cfg, sampler, sigmas), empty, seed, probe)
        pairs, kept = store.make(sample, count, batch)
        file = f"{name}_{counter:05}_.safetensors"
        save_pairs(pairs, Path(folder) / file)
        store.forget()
        resumed = f"\n{kept} of them were there from an interrupted run" if kept else ""
        return (pairs, f"{pairs.line()}\n{Path(below, file).as_posix()}{resumed}")


class RectiflowFlowPairsLoad(Node):
    """Loads pairs that Flow Pair Generator saved."""

    TITLE = "Load Flow Pairs"
    GROUP = GROUP
    SEARCH_ALIASES = ["reflow", "pairs"]
    INPUTS = (
        text("path", "", "Below the output folder, as the generator's report says: rectiflow/pairs_00001_.safetensors."),
        integer("count", 0, 0, 1000000, "The first so many; 0 takes all."),
    )
    OUTPUTS = (_PAIRS, Output("STRING", "report", "What the file holds."))

    def run(self, path, count):
        from ..samplers.pairs import load_pairs

        pairs = load_pairs(_below_output(path, self.TITLE), self.TITLE, count)
        return (pairs, pairs.line())
