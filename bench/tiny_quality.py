"""How often the tiny model draws what the prompt says: `python bench/tiny_quality.py --pictures DIR [--weights FILE] [--cfg 1 2 3]`.

One picture a thing and style on white, 20 Euler steps in fp32. Its nearest among 2000 copies of the training pictures (four zooms, plain
and mirrored; 4×4-averaged pixels, Euclidean) tells what it shows. Columns: the right thing, the right thing and style, the right thing
among the 8 nearest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.tiny.clip import TinyTextEncoder
from rectiflow.tiny.codec import LinearCodec
from rectiflow.tiny.emoji import FRAME, Emoji, EmojiLook, load_emoji
from rectiflow.tiny.text import STYLES, Vocabulary
from rectiflow.tiny.weights import FLUX_SIZES, WEIGHTS_FILE, load_weights
from rectiflow.train.recipes.tiny import vocabulary_things
from table import write_table

ZOOMS = (1.0, 1.08, 1.17, 1.25)
STEPS = 20
AT_ONCE = 50


def copies(emoji: Emoji) -> torch.Tensor:
    """(pictures, copies, 768): every picture on white at every zoom, in the middle, plain and mirrored, averaged over 4×4 pixels."""
    found = []
    for zoom in ZOOMS:
        index = emoji.sizes.index(round(FRAME / zoom))
        layers = F.pad(emoji.pixels[index].float() / 255.0, _margins(emoji.sizes[index]))
        rgb = (layers[:, :3] + 1.0 - layers[:, 3:]).clamp(0.0, 1.0)
        found += [cells(rgb), cells(rgb.flip(-1))]
    return torch.stack(found, dim=1)


def _margins(size: int) -> tuple[int, int, int, int]:
    before = (FRAME - size) // 2
    return before, FRAME - size - before, before, FRAME - size - before


def cells(rgb: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(rgb, 4).flatten(1)


@torch.inference_mode()
def draw(weights, captions: list[str], cfg: float, seed: int) -> torch.Tensor:
    """Pictures (n, 3, 64, 64) in 0…1 of the captions."""
    network = Flux(FluxParams(**FLUX_SIZES), dtype=torch.float32)
    network.load_state_dict({name: value.float() for name, value in weights.transformer.items()})
    encoder = TinyTextEncoder(weights.text_embedding, weights.style_embedding)
    codec = LinearCodec(weights.codec_basis, weights.codec_scale, weights.codec_mean)
    vocabulary = Vocabulary.load()
    noise = torch.randn((len(captions), 16, 16, 16), generator=torch.Generator().manual_seed(seed))
    pictures = []
    for start in range(0, len(captions), AT_ONCE):
        given = captions[start : start + AT_ONCE]
        texts = given + [""] * (len(given) if cfg != 1.0 else 0)
        context, pooled = encoder(torch.tensor([vocabulary.parse(text).ids for text in texts]))
        x = noise[start : start + AT_ONCE]
        sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
        for sigma, following in zip(sigmas, sigmas[1:]):
            both = x.repeat(len(texts) // len(given), 1, 1, 1)
            velocity = network(both, sigma.expand(len(texts)), context, pooled)
            if cfg != 1.0:
                conditional, empty = velocity.chunk(2)
                velocity = empty + cfg * (conditional - empty)
            x = x + (following - sigma) * velocity
        pictures.append(codec.decode(x).clamp(-1.0, 1.0) * 0.5 + 0.5)
    return torch.cat(pictures)


def scores(pictures: torch.Tensor, emoji: Emoji, known: torch.Tensor) -> tuple[float, float, float]:
    """Shares of right things, right things and styles, and right things among the 8 nearest."""
    distances = torch.cdist(cells(pictures), known.flatten(0, 1))  # (n, pictures · copies)
    nearest = distances.topk(8, largest=False).indices // known.shape[1]
    right = torch.tensor([[emoji.things[row] == emoji.things[at] for row in rows] for at, rows in enumerate(nearest.tolist())])
    style = torch.tensor([emoji.styles[rows[0]] == emoji.styles[at] for at, rows in enumerate(nearest.tolist())])
    return float(right[:, 0].float().mean()), float((right[:, 0] & style).float().mean()), float(right.any(1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FILE)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="keep the figures as bench/results/tiny_quality.csv")
    parser.add_argument("--grid", type=Path, help="write the pictures of the last cfg as one PNG")
    given = parser.parse_args()
    emoji = load_emoji(given.pictures, vocabulary_things(), EmojiLook())
    known, weights = copies(emoji), load_weights(given.weights)
    captions = [f"{STYLES[style]} {thing} on white" for thing, style in zip(emoji.things, emoji.styles)]
    rows = []
    for cfg in given.cfg:
        pictures = draw(weights, captions, cfg, given.seed)
        rows.append((given.weights.name, cfg, given.seed, *(round(score, 3) for score in scores(pictures, emoji, known))))
        print(*rows[-1], flush=True)
    if given.table:
        write_table("tiny_quality", ("weights", "cfg", "seed", "right_thing", "right_thing_and_style", "right_among_8"), rows)
    if given.grid:
        from PIL import Image

        pixels = (pictures * 255.0 + 0.5).byte().reshape(10, 25, 3, FRAME, FRAME).permute(0, 3, 1, 4, 2).reshape(10 * FRAME, 25 * FRAME, 3)
        Image.fromarray(pixels.numpy()).save(given.grid)


if __name__ == "__main__":
    main()
