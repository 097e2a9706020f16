"""Files of compressed models: saving, loading, and what a file says about itself."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, boolean, choice, socket, text

GROUP = "model patches"
_REPORT = Output("STRING", "report", "A table; link it to Preview Any.")


def with_changes(model, key: str, weight):
    """`weight`, float32, with the patches and then the wrappers that MODEL has under `key`; itself where it has none.

    The sum of the patches is the host's own, on a module that holds nothing else.
    """
    import torch

    from ..host import ModelPatcher

    weight = weight.detach()
    if key in model.patches:
        holder = torch.nn.Module()
        holder.weight = torch.nn.Parameter(weight.float().clone(), requires_grad=False)
        alone = ModelPatcher(holder, weight.device, weight.device)
        alone.patches = {"weight": list(model.patches[key])}
        alone.patch_weight_to_device("weight")
        weight = holder.weight.data
    for wrapper in model.weight_wrapper_patches.get(key, ()):
        weight = wrapper(weight.clone())
    return weight


def _base(model) -> str:
    """How the network of MODEL is built again."""
    from ..tiny.weights import FLUX_SIZES

    config = model.model.model_config.unet_config
    same = all(list(got) == value if isinstance(value, list) else got == value for got, value in (
        (config.get(name), value) for name, value in FLUX_SIZES.items()
    ))  # fmt: skip
    return "tiny" if same else "detect"


class RectiflowSaveCompressed(Node):
    """Saves a pruned, narrowed or quantised model below the output folder, as small as it is in memory."""

    TITLE = "Save Compressed"
    GROUP = GROUP
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["save model", "int8_tensorwise", "quantized", "pruned", "safetensors"]
    INPUTS = (
        socket("model", "MODEL", "From Quantize, Apply Prune Plan, Recover Pruned or several of them."),
        text("filename_prefix", "rectiflow/compressed", "Name below the output folder; a number and .safetensors are added."),
        choice("format", ("rectiflow", "core_int8", "plain"), "rectiflow: as the model is. core_int8: W8A8 for a ComfyUI that knows "
            "int8_tensorwise. plain: numbers without codes.",
        ),
        choice("dtype", ("same", "float16", "bfloat16", "float32"), "Of the weights that are not quantised."),
    )  # fmt: skip
    OUTPUTS = (
        Output("STRING", "path", "Of the file, below the output folder; for Load Compressed."),
        Output("STRING", "report", "What was written."),
    )

    def run(self, model, filename_prefix, format, dtype):
        from pathlib import Path

        from ..accel.compressed.tensor_file import write_tensors
        from ..accel.compressed.writing import compressed_tensors
        from ..host import get_output_directory, get_save_image_path

        tensors, metadata, manifest = compressed_tensors(
            model, format, dtype, _base(model), lambda key, weight: with_changes(model, key, weight), self.TITLE
        )
        folder, name, counter, below, _ = get_save_image_path(filename_prefix, get_output_directory())
        taken = [int(path.stem.rsplit("_", 2)[-2]) for path in Path(folder).glob(f"{name}_*_.safetensors") if _counted(path.stem)]
        file = f"{name}_{max([counter - 1, *taken]) + 1:05}_.safetensors"
        try:
            write_tensors(Path(folder) / file, tensors, metadata)
        except OSError as error:
            remedy = "Make room, or choose another folder; what stood there is as it was."
            raise input_error(self.TITLE, "filename_prefix", f"{file}: {error.strerror}", "a folder with room", remedy) from error
        size = (Path(folder) / file).stat().st_size
        blocks = sum(manifest.counts[holder] - len(kept) for holder, kept in manifest.kept.items())
        parts = [f"{len(manifest.quant)} quantised layers", f"{blocks} blocks less", f"{len(manifest.width)} narrower layers"]
        parts += [f"{len(manifest.low_rank)} factored layers"] if manifest.low_rank else []
        parts += [f"{len(manifest.maps)} linear maps"] if manifest.maps else []
        report = f"{file}: {size / 2**20:.2f} MiB, {', '.join(parts)}, {format}, others in {manifest.dtype}"
        return (Path(below, file).as_posix(), report)


def _counted(stem: str) -> bool:
    parts = stem.rsplit("_", 2)
    return len(parts) == 3 and parts[1].isdecimal()


def _found(path: str, where: str):
    """A file below the output folder, or one of the host's diffusion models."""
    from pathlib import Path

    from ..host import get_full_path, get_output_directory

    root = Path(get_output_directory()).resolve()
    clean = path.strip() if "\0" not in path else ""
    own = (root / clean).resolve() if clean else root
    if clean and own.is_relative_to(root) and own.is_file():
        return own
    listed = get_full_path("diffusion_models", clean) if clean else None
    if listed is None:
        allowed = "a file below the output folder or in models/diffusion_models"
        raise input_error(where, "path", path, allowed, "Give the path that Save Compressed reported.")
    return Path(listed)


_PATH = text("path", "rectiflow/compressed_00001_.safetensors", "As Save Compressed gives it; or a file's name in models/diffusion_models.")


class RectiflowLoadCompressed(Node):
    """Loads a file of Save Compressed, or an int8 file of the core, bit for bit as it was saved."""

    TITLE = "Load Compressed"
    GROUP = GROUP
    SEARCH_ALIASES = ["load model", "int8_tensorwise", "quantized", "pruned", "unet"]
    INPUTS = (
        _PATH,
        boolean("compact_numbering", False, "On numbers the blocks that are there from 0. Off: as in the whole model, so that LoRAs fit.",
            optional=True, advanced=True,
        ),
    )  # fmt: skip
    OUTPUTS = (Output("MODEL", "model", "The model; its quantised layers hold codes, no full weights."), _REPORT)

    def run(self, path, compact_numbering=False):
        import torch

        from ..accel.compressed.building import built_model
        from ..accel.compressed.description import describe
        from ..accel.compressed.reading import read_model

        loaded = read_model(_found(path, self.TITLE), self.TITLE)
        report = describe(loaded)
        with torch.inference_mode(False):
            return (built_model(loaded, _maker(loaded.manifest), self.TITLE, compact_numbering), report)


_DEPTHS = (("depth", "double_blocks"), ("depth_single_blocks", "single_blocks"))


def _maker(manifest):
    """What builds a network from a state dict on this host."""
    from ..accel.compressed.manifest import DTYPES
    from ..accel.compressed.writing import FILE_PREFIX
    from ..host import build_flux_model, load_diffusion_model_state_dict
    from ..tiny.codec import LinearCodec
    from ..tiny.weights import FLUX_SIZES, load_weights
    from .tiny import tiny_latent

    dtype = DTYPES[manifest.dtype]

    def tiny(state):
        shipped = load_weights()
        codec = LinearCodec(shipped.codec_basis, shipped.codec_scale, shipped.codec_mean)
        numbers = {tuple(key.split(".")[:2]) for key in state}
        depths = {size: sum(holder == part for part, *_ in numbers) for size, holder in _DEPTHS}
        return build_flux_model(state, {**FLUX_SIZES, **depths}, tiny_latent(codec), dtype=dtype)

    def detected(state):
        return load_diffusion_model_state_dict({FILE_PREFIX + name: t for name, t in state.items()}, model_options={"dtype": dtype})

    return tiny if manifest.base["kind"] == "tiny" else detected


class RectiflowCompressionInfo(Node):
    """Says what a compressed file holds: blocks, widths, formats, bits a weight, what it was made from. Builds no model."""

    TITLE = "Compression Info"
    GROUP = GROUP
    SEARCH_ALIASES = ["manifest", "quantized", "pruned", "inspect file"]
    INPUTS = (_PATH,)
    OUTPUTS = (_REPORT,)

    def run(self, path):
        from ..accel.compressed.description import describe
        from ..accel.compressed.reading import read_model

        return (describe(read_model(_found(path, self.TITLE), self.TITLE)),)
