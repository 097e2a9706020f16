"""Feature distance: the formula, the hooks, the tiny model's judgement, refusals."""

from __future__ import annotations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.metrics.features import TokenDistances, grid_weights, measure_blocks, parse_blocks, token_distance
from rectiflow.tests.models.small_models import MODELS, random

EVERY_BLOCK = "double:0-2, single:0-5"


def distance(tiny, image, reference, **changed):
    inputs = {"sigma": 0.2, "blocks": "double:1-2, single:0-2", "seed": 0, **changed}
    return tiny.node("RectiflowFeatureDistance", image=image, reference=reference, **inputs)


def test_blocks_are_read_as_written():
    assert parse_blocks("double:1-2, single:5") == (("double", 1), ("double", 2), ("single", 5))
    assert parse_blocks("single : 3 - 4,single:4,") == (("single", 3), ("single", 4))


@pytest.mark.parametrize("text", [
    "", " , ", "double", "triple:1", "single:-1", "single:4-2", "single:1-99999999999", "single:1;2", "single:１",
])
def test_other_blocks_are_refused(text):
    with pytest.raises(NodeInputError, match="here: input 'blocks'"):
        parse_blocks(text, "here")


def test_token_distance_is_one_minus_the_cosine():
    one = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [1.0, 1.0]]])
    other = torch.tensor([[[0.0, 2.0], [-5.0, 0.0], [3.0, 4.0], [1.0, 0.0]]])
    assert token_distance(one, other)[0].tolist() == pytest.approx([1.0, 2.0, 0.0, 1 - 0.5**0.5], abs=1e-6)


def test_conditions_in_one_call_are_averaged():
    """Rows of a call: for every condition the pictures, then their references."""
    record = TokenDistances((("double", 0),), pictures=1)
    same, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    record.take(("double", 0), torch.cat([same, same, same, other]))
    assert record.by_block()[("double", 0)].tolist() == [[0.5]]


def test_grid_weights_are_means_over_a_tokens_pixels():
    weights = torch.zeros(1, 8, 8)
    weights[:, :4, :2] = 1
    assert grid_weights(weights, (2, 2))[0].tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_equal_pictures_are_at_distance_nothing_and_order_does_not_matter(tiny):
    cat, face = tiny.picture(), tiny.picture("smiling face")
    assert distance(tiny, cat, cat, blocks=EVERY_BLOCK)[0] < 1e-6  # rows of one batch differ by rounding at most
    there, back = distance(tiny, cat, face)[0], distance(tiny, face, cat)[0]
    assert there == pytest.approx(back, rel=1e-4) and there > 0.1


def test_the_tiny_model_ranks_changes_as_people_do(tiny):
    """More noise is further; a faint change is nearer than another thing, a mirrored cat nearer than a face, though PSNR says less."""
    cat = tiny.picture()
    grain = torch.randn(cat.shape, generator=torch.Generator().manual_seed(0))
    changed = [(cat + amount * grain).clamp(0, 1) for amount in (0.05, 0.1, 0.2)]
    batch = torch.cat([*changed, cat.flip(2), tiny.picture("smiling face")])
    _, report, heat = distance(tiny, batch, cat)
    little, more, much, mirrored, face = (float(word) for word in report.splitlines()[-2].split()[1:])
    assert little < more < much < face and mirrored < face
    assert heat.shape == batch.shape


def test_a_batch_and_its_pictures_one_by_one_are_judged_alike(tiny):
    cat, face = tiny.picture(), tiny.picture("smiling face")
    together = distance(tiny, torch.cat([cat * 0.5, face]), cat)[0]
    alone = (distance(tiny, cat * 0.5, cat)[0] + distance(tiny, face, cat)[0]) / 2
    assert together == pytest.approx(alone, rel=1e-4)


def test_a_mask_looks_where_the_change_is(tiny):
    cat = tiny.picture()
    changed = cat.clone()
    changed[:, 8:24, 8:24] = 0.5
    here = torch.zeros(1, 64, 64)
    here[:, 8:24, 8:24] = 1
    inside, outside = (distance(tiny, changed, cat, mask=mask)[0] for mask in (here, 1 - here))
    assert inside > 4 * outside


def test_linking_the_tiny_model_is_the_default(tiny):
    cat, face = tiny.picture(), tiny.picture("smiling face")
    linked = distance(tiny, cat, face, model=tiny.model, vae=tiny.vae, conditioning=tiny.prompt(""))
    assert linked[0] == distance(tiny, cat, face)[0]


def test_an_earlier_patch_of_a_block_still_runs_and_the_model_stays_as_it_was(tiny):
    seen = []

    def earlier(args, extra):
        seen.append(args["img"].shape)
        return extra["original_block"](args)

    patched = tiny.model.clone()
    patched.set_model_patch_replace(earlier, "dit", "single_block", 1)
    cat = tiny.picture()
    plain = distance(tiny, cat, tiny.picture("smiling face"))
    found = distance(
        tiny, cat, tiny.picture("smiling face"), model=patched, vae=tiny.vae, conditioning=tiny.prompt(""), blocks="double:1-2, single:0-2"
    )
    assert len(seen) == 1 and found[0] == plain[0]
    measured = measure_blocks(patched, TokenDistances((("single", 1),), 1))
    slots = [model.model_options["transformer_options"]["patches_replace"]["dit"] for model in (patched, measured)]
    assert len(slots[0]) == 1 and len(slots[1]) == 2 and "patches_replace" not in tiny.model.model_options["transformer_options"]


@pytest.mark.parametrize(("changed", "message"), [
    ({"blocks": "single:6"}, "single:6; |single:6'; "),
    ({"model": "linked"}, "'vae'"),
    ({"sigma": float("nan")}, "'sigma'"),
    ({"mask": torch.ones(1, 32, 32)}, "'mask'"),
    ({"mask": torch.zeros(1, 64, 64)}, "'mask'"),
    ({"image": torch.zeros(1, 60, 60, 3), "reference": torch.ones(1, 60, 60, 3)}, "'image'"),
])
def test_what_cannot_be_compared_is_refused(tiny, changed, message):
    inputs = {"image": tiny.picture(), "reference": tiny.picture(), **changed}
    with pytest.raises(NodeInputError, match=f"Feature Distance: .*({message})"):
        distance(tiny, **inputs)


class Encoder:
    """A CLIP_VISION by ComfyUI 0.3.64's protocol: a class token and 4×4 tokens, each the colours of its square of the squeezed picture."""

    def __init__(self, tokens: int = 17):
        self.tokens = tokens

    def encode_image(self, image, crop=True):
        assert not crop
        squares = torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1), 4).flatten(2).movedim(1, 2)  # (b, 16, 3)
        first = torch.ones(len(image), self.tokens - 16, 3) * torch.rand(len(image), 1, 3)  # must not count
        return {"penultimate_hidden_states": torch.cat([first, squares], 1)}


def test_an_image_encoder_may_be_the_eye(tiny):
    cat, changed = tiny.picture(), tiny.picture().clone()
    changed[:, :16, :16] = torch.tensor([1.0, 0.0, 0.0])  # one of sixteen squares, white before
    found, report, shown = distance(tiny, torch.cat([cat, changed]), cat, clip_vision=Encoder())
    red = torch.tensor([1.0, 0.0, 0.0])
    expected = 1 - float(torch.cosine_similarity(cat[0, :16, :16].mean((0, 1)), red, dim=0))
    assert found == pytest.approx(expected / 16 / 2, abs=1e-4) and expected > 0.3
    assert report.splitlines()[0].split() == ["layer:-2", "0.0000", f"{expected / 16:.4f}"]
    assert shown.shape == (2, 64, 64, 3) and float(shown[0].max()) < 0.05
    corner = torch.zeros(1, 64, 64)
    corner[:, :16, :16] = 1
    assert distance(tiny, changed, cat, clip_vision=Encoder(), mask=corner)[0] == pytest.approx(expected, abs=1e-4)
    assert distance(tiny, changed, cat, clip_vision=Encoder(16), mask=1 - corner)[0] == pytest.approx(0, abs=1e-6)


def test_encoders_that_cannot_be_the_eye(tiny):
    with pytest.raises(NodeInputError, match="'clip_vision'.*18 tokens"):
        distance(tiny, tiny.picture(), tiny.picture(), clip_vision=Encoder(18))
    with pytest.raises(NodeInputError, match="'model'.*one eye"):
        distance(tiny, tiny.picture(), tiny.picture(), clip_vision=Encoder(), model=tiny.model)


def measured_family(metrics_host, family: str, blocks: str) -> TokenDistances:
    """One measuring call on a small random model of another family; pictures are latents here, 16 channels of 6×8 cells."""
    from rectiflow.host.embedded import sd, use_host
    from rectiflow.nodes.metrics import RectiflowFeatureDistance

    with use_host(metrics_host), torch.inference_mode():
        model = sd.load_diffusion_model_state_dict(MODELS[family]().state_dict())
        conditioning = [[random(1, 5, 20, seed=2), {"pooled_output": random(1, 12, seed=3)}]]
        distances = TokenDistances(parse_blocks(blocks), pictures=2)
        latent = random(4, 16, 6, 8, seed=1)
        latent[3] = latent[1]  # the second picture equals its reference
        RectiflowFeatureDistance._measure(model, conditioning, latent, 0.2, 0, distances)
    return distances


def test_sd3s_joint_blocks_answer_with_their_image_tokens(metrics_host):
    maps = measured_family(metrics_host, "sd3", "double:0-1").summary((6, 8)).maps
    assert maps.shape == (2, 3, 4)
    assert float(maps[0].min()) > 1e-3 and float(maps[1].max()) < 1e-6


def test_a_model_without_block_hooks_is_refused(metrics_host):
    distances = measured_family(metrics_host, "lumina2", "double:0")
    with pytest.raises(NodeInputError, match="here: input 'blocks' got 'double:0'.*Lumina 2"):
        distances.by_block("here")
