"""Resolution palette: rotary positions beyond the size a model was trained at."""

from __future__ import annotations

from .declare import Node, Output, boolean, choice, integer, number, socket

METHODS = (
    "resonance_yarn", "position_interpolation", "ntk", "frequency_aware", "time_aware", "time_switch", "vision_ntk", "vision_yarn",
    "ntk_by_parts", "none",
)  # fmt: skip


class RectiflowRopeExtrapolation(Node):
    """Lets a model draw beyond the size it was trained at: its rotary positions are stretched, axis by axis, to the size asked for."""

    TITLE = "RoPE Extrapolation"
    GROUP = "resolution"
    SEARCH_ALIASES = ["high resolution", "NTK", "YaRN", "upscale", "position", "extrapolate"]
    INPUTS = (
        socket("model", "MODEL", "A model with rotary positions: Flux, Chroma, Lumina 2, Wan, HunyuanVideo, Qwen-Image, HiDream."),
        choice("method", METHODS, "How frequencies change. none: as the model has them."),
        integer("train_rows", 64, 7, 4096, "Tokens along the training height: 64 for 1024 pixels at 16 a token; the tiny model 8."),
        integer("train_columns", 64, 7, 4096, "Tokens along the width of the training size."),
        choice("scale_from", ("per_axis", "longest_side", "area"),
            "per_axis: each side by its own length. longest_side, area: both sides alike, as NTK and YaRN were first written.",
        ),
        number("scale", 0.0, 0.0, 64.0, "0: from the size of the latent. 1 and more: this scale for both sides.", advanced=True),
        choice("attention_scale", ("off", "paper_log", "fit_code", "lumina_sqrt"),
            "Sharpens attention as tokens grow in number: by log N/log N₀, log 2N/log N₀, or the root of the first.",
        ),
        number("watershed", 0.3, 0.0, 1.0, "time_switch only: before this time, 0 noise to 1 picture, positions are interpolated.",
            optional=True, advanced=True,
        ),
        boolean("amplitude", True, "vision_yarn and resonance_yarn: scaled axes count more in attention, by (0.1·ln s + 1)².",
            optional=True, advanced=True,
        ),
        choice("snap", ("code", "paper", "off"), "resonance_yarn: which frequencies get a whole number of turns.",
            optional=True, advanced=True,
        ),
        choice("blend", ("ntk_by_parts", "yarn"), "resonance_yarn: how kept and stretched frequencies are joined.",
            optional=True, advanced=True,
        ),
        number("alpha", 0.75, 0.0, 64.0, "blend yarn: at so many turns and below, a frequency is divided by the scale.",
            optional=True, advanced=True,
        ),
        number("beta", 1.25, 0.0, 64.0, "blend yarn: at so many turns and above, a frequency is kept.", optional=True, advanced=True),
        choice("apply_to", ("all", "picture"),
            "Of attention_scale. all: text is sharpened with the picture. picture: only what picture tokens see of the picture.",
            optional=True, advanced=True,
        ),
    )
    OUTPUTS = (Output("MODEL", "model", "The same model; at its training size and below it gives the same picture bit for bit."),)

    def run(
        self, model, method, train_rows, train_columns, scale_from, scale, attention_scale,
        watershed=0.3, amplitude=True, snap="code", blend="ntk_by_parts", alpha=0.75, beta=1.25,
        apply_to="all",
    ):  # fmt: skip
        from ..accel.attention.rope import RopePlan, attach
        from ..accel.attention.rope_spectrum import RopeScaling

        trained = (train_rows, train_columns)
        scaling = RopeScaling(method, trained, scale_from, scale, watershed, amplitude, snap, blend, alpha, beta)
        return (attach(model, RopePlan(scaling, attention_scale, apply_to), self.TITLE),)
