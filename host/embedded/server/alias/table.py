"""ComfyUI's module name → modules of the embedded host (relative to it) that answer for it, the first that has a name wins."""

from __future__ import annotations

__all__ = ["FORWARDS", "PACKAGES"]

# Names that have modules below them.
PACKAGES = frozenset(
    {
        "comfy", "comfy.comfy_types", "comfy.k_diffusion", "comfy.ldm", "comfy.ldm.modules",
        "comfy.ldm.modules.diffusionmodules", "comfy.ldm.flux", "comfy.ldm.lumina",
        "comfy_execution", "comfy_api", "comfy_api.v0_0_2", "comfy_api.latest", "comfy_extras",
    }
)  # fmt: skip

FORWARDS: dict[str, tuple[str, ...]] = {
    "folder_paths": (".folder_paths",),
    "node_helpers": (".node_helpers",),
    "latent_preview": (".latent_preview",),
    "nodes": (".server.alias.nodes",),
    "server": (".server.alias.prompt_server",),
    "protocol": (".server.alias.prompt_server",),
    "execution": (".execution", ".execution.validation", ".server.alias.prompt_server"),
    "comfyui_version": (".server.alias.version",),
    "comfy.cli_args": (".server.alias.cli_args",),
    "comfy.options": (".server.alias.cli_args",),
    "comfy.comfy_types": (".server.alias.comfy_types",),
    "comfy.comfy_types.node_typing": (".server.alias.comfy_types",),
    "comfy.conds": (".conds",),
    "comfy.k_diffusion.sampling": (".k_diffusion_sampling",),
    "comfy.latent_formats": (".latent_formats",),
    "comfy.ldm.flux.layers": (".ldm.flux",),
    "comfy.ldm.flux.math": (".ldm.flux", ".ldm.attention"),
    "comfy.ldm.flux.model": (".ldm.flux",),
    "comfy.ldm.lumina.model": (".ldm.lumina2",),
    "comfy.ldm.modules.attention": (".ldm.attention",),
    "comfy.ldm.modules.diffusionmodules.mmdit": (".ldm.mmdit",),
    "comfy.lora": (".lora",),
    "comfy.model_base": (".model_base",),
    "comfy.model_detection": (".model_detection",),
    "comfy.model_management": (".model_management",),
    "comfy.model_patcher": (".model_patcher",),
    "comfy.model_sampling": (".model_sampling",),
    "comfy.patcher_extension": (".patcher_extension",),
    "comfy.sample": (".sample",),
    "comfy.sampler_helpers": (".sampler_helpers",),
    "comfy.samplers": (".samplers", ".sampling_function", ".schedulers", ".sampler_names"),
    "comfy.sd": (".sd",),
    "comfy.utils": (".utils",),
    "comfy_execution.caching": (".execution.caching",),
    "comfy_execution.graph": (".execution.graph", ".execution.graph_utils"),
    "comfy_execution.graph_utils": (".execution.graph_utils",),
    "comfy_execution.progress": (".execution.progress",),
    "comfy_execution.utils": (".execution.progress",),
    "comfy_execution.validation": (".execution.validation",),
    "comfy_api.latest": (".server.alias.comfy_api",),
    "comfy_api.v0_0_2": (".server.alias.comfy_api",),
}
