"""Calls of core nodes with fixed inputs, made on this host and on real ComfyUI; imported by both, so it needs torch alone."""

from __future__ import annotations

import torch


class PixelCodec:
    """A lossless latent codec: 8×8 pixels a latent place, 192 channels. Enough of a VAE for every node that only calls it."""

    downscale_ratio = 8

    def encode(self, pixels):
        return torch.nn.functional.pixel_unshuffle(pixels[..., :3].movedim(-1, 1), 8)

    def decode(self, latent):
        return torch.nn.functional.pixel_shuffle(latent, 8).movedim(1, -1)


class WordClip:
    """A text encoder whose "tokens" are word lengths in chunks of three; its tensors show exactly which tokens it was given."""

    parts = ("g", "l", "t5xxl")

    def tokenize(self, text):
        lengths = [len(word) for word in text.split()] or [0]
        chunks = [lengths[i : i + 3] + [0] * (3 - len(lengths[i : i + 3])) for i in range(0, len(lengths), 3)]
        return {part: [list(chunk) for chunk in chunks] for part in self.parts}

    def encode_from_tokens_scheduled(self, tokens, add_dict=None):
        rows = [torch.tensor(tokens[part], dtype=torch.float32).reshape(1, -1, 3) for part in self.parts]
        return [[torch.cat(rows, 1), {"pooled_output": torch.tensor([[len(tokens[part]) for part in self.parts]]), **(add_dict or {})}]]


def image(seed, batch=1, height=24, width=32, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def mask(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def latent(seed, batch=1, channels=4, height=8, width=10, **extra):
    return {"samples": torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)), **extra}


def conditioning(seed, tokens=5, entries=1, pooled=True, **options):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(entries):
        extra = {"pooled_output": torch.randn(1, 6, generator=generator)} if pooled else {}
        made.append([torch.randn(1, tokens, 4, generator=generator), {**extra, **options}])
    return made


def blob(height, width, top, left, size):
    hole = torch.zeros(1, height, width)
    hole[:, top : top + size, left : left + size] = 1.0
    return hole


def _resizing():
    methods = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
    for method in methods:
        for crop in ("disabled", "center"):
            for width, height in ((48, 20), (13, 40), (16, 0), (0, 9)):
                yield "ImageScale", {"image": image(1, 2), "upscale_method": method, "width": width, "height": height, "crop": crop}
        yield "ImageScaleBy", {"image": image(2), "upscale_method": method, "scale_by": 0.37}
        yield "ImageScaleBy", {"image": image(2, channels=4), "upscale_method": method, "scale_by": 1.61}
        yield "ImageScaleToTotalPixels", {"image": image(3), "upscale_method": method, "megapixels": 0.01}
    for method in (*methods[:4], "bislerp"):
        for width, height, crop in ((128, 64, "disabled"), (0, 96, "disabled"), (72, 0, "center"), (8, 200, "center"), (0, 0, "disabled")):
            given = {"samples": latent(4, 2), "upscale_method": method, "width": width, "height": height, "crop": crop}
            yield "LatentUpscale", given
        yield "LatentUpscaleBy", {"samples": latent(5), "upscale_method": method, "scale_by": 1.45}
    yield "FluxKontextImageScale", {"image": image(6, height=30, width=40)}
    yield "FluxKontextImageScale", {"image": image(6, height=90, width=20)}


def _pictures():
    yield "ImageInvert", {"image": image(1)}
    yield "ImageBatch", {"image1": image(1), "image2": image(2, 3)}
    yield "ImageBatch", {"image1": image(1), "image2": image(2, height=50, width=30)}
    yield "EmptyImage", {"width": 7, "height": 5, "batch_size": 2, "color": 0x12FE80}
    for x, y in ((0, 0), (10, 20), (500, 500)):
        yield "ImageCrop", {"image": image(1), "width": 9, "height": 30, "x": x, "y": y}
    for rotation in ("none", "90 degrees", "180 degrees", "270 degrees"):
        yield "ImageRotate", {"image": image(1, 2), "rotation": rotation}
        yield "LatentRotate", {"samples": latent(1, 2), "rotation": rotation}
    for flip in ("x-axis: vertically", "y-axis: horizontally"):
        yield "ImageFlip", {"image": image(1, 2), "flip_method": flip}
        yield "LatentFlip", {"samples": latent(1, 2), "flip_method": flip}
    yield "RepeatImageBatch", {"image": image(1, 2), "amount": 3}
    for index, length in ((0, 1), (1, 9), (4, 2), (77, 3)):
        yield "ImageFromBatch", {"image": image(1, 5), "batch_index": index, "length": length}
    for left, top, right, bottom, feathering in ((8, 0, 16, 8, 5), (0, 0, 8, 0, 11), (8, 8, 8, 8, 40), (0, 0, 0, 0, 4), (8, 8, 0, 0, 0)):
        sides = {"left": left, "top": top, "right": right, "bottom": bottom, "feathering": feathering}
        yield "ImagePadForOutpaint", {"image": image(1, 2), **sides}
    yield "RebatchImages", {"images": [image(1, 3), image(2, 1), image(3, 4)], "batch_size": [3]}
    for x, y, resize in ((0, 0, False), (5, 7, False), (30, 22, False), (3, 2, True)):
        place = {"x": x, "y": y, "resize_source": resize}
        yield "ImageCompositeMasked", {"destination": image(1, 2), "source": image(2, 1, 10, 12), **place}
        yield "ImageCompositeMasked", {"destination": image(1), "source": image(2, 1, 10, 12, 4), **place, "mask": mask(3, 1, 6, 5)}
        place = {"x": 8 * x, "y": 8 * y, "resize_source": resize}
        yield "LatentCompositeMasked", {"destination": latent(1, 2), "source": latent(2, 2, 4, 4, 5), **place, "mask": mask(3, 2, 16, 16)}


def _masks():
    yield "SolidMask", {"value": 0.3, "width": 5, "height": 4}
    yield "MaskToImage", {"mask": mask(1, 2, 5, 6)}
    for channel in ("red", "green", "blue", "alpha"):
        yield "ImageToMask", {"image": image(1, channels=4), "channel": channel}
    yield "ImageColorToMask", {"image": (image(1) * 2).round() / 2, "color": 0x80FF00}
    yield "InvertMask", {"mask": mask(1, 2, 5, 6)}
    yield "CropMask", {"mask": mask(1, 2, 20, 30), "x": 25, "y": 3, "width": 9, "height": 9}
    for operation in ("multiply", "add", "subtract", "and", "or", "xor"):
        yield "MaskComposite", {"destination": mask(1, 2, 9, 8), "source": mask(2, 1, 5, 6), "x": 4, "y": 6, "operation": operation}
        yield "MaskComposite", {"destination": mask(1, 9, 8), "source": mask(2, 3, 3), "x": 0, "y": 0, "operation": operation}
    for left, top, right, bottom in ((3, 0, 0, 0), (0, 2, 4, 0), (5, 4, 3, 2), (99, 99, 99, 99)):
        yield "FeatherMask", {"mask": mask(1, 2, 12, 16), "left": left, "top": top, "right": right, "bottom": bottom}
    for tapered in (True, False):
        for expand in (0, 1, 4, -1, -3, 60):
            yield "GrowMask", {"mask": mask(1, 2, 12, 16), "expand": expand, "tapered_corners": tapered}
            yield "GrowMask", {"mask": blob(20, 24, 4, 20, 6), "expand": expand, "tapered_corners": tapered}
    yield "ThresholdMask", {"mask": mask(1, 2, 5, 6), "value": 0.6}


def _latents():
    yield "EmptyLatentImage", {"width": 100, "height": 40, "batch_size": 3}
    yield "EmptySD3LatentImage", {"width": 96, "height": 48, "batch_size": 2}
    codec = PixelCodec()
    yield "VAEEncode", {"pixels": image(1, 2, 16, 24, 4), "vae": codec}
    yield "VAEDecode", {"samples": latent(1, 2, 192, 2, 3), "vae": codec}
    for height, width in ((24, 32), (29, 38), (33, 40)):
        for grow in (0, 1, 2, 5, 6, 9):
            given = {"pixels": image(1, 1, height, width), "vae": codec, "grow_mask_by": grow}
            yield "VAEEncodeForInpaint", {**given, "mask": blob(height, width, 5, 0, 9)}
            yield "VAEEncodeForInpaint", {**given, "mask": mask(2, 1, 11, 17)}
    yield "VAEEncodeForInpaint", {"pixels": image(1, 2, channels=4).contiguous()[..., :3], "vae": codec, "mask": mask(2, 2, 24, 32)}
    yield "SetLatentNoiseMask", {"samples": latent(1, 2), "mask": mask(2, 3, 64, 80)}
    batches = (
        latent(1, 3),
        latent(1, 3, batch_index=[4, 6, 9]),
        latent(1, 3, noise_mask=mask(2, 1, 1, 16, 16), note="kept"),
        latent(1, 4, noise_mask=mask(2, 2, 1, 16, 16), batch_index=[0, 1, 2, 3]),
    )
    for batch in batches:
        yield "RepeatLatentBatch", {"samples": batch, "amount": 3}
        for index, length in ((0, 1), (1, 2), (50, 64)):
            yield "LatentFromBatch", {"samples": batch, "batch_index": index, "length": length}
        for other in (latent(7, 2), latent(7, 1, height=12, width=9, batch_index=[5])):
            yield "LatentBatch", {"samples1": batch, "samples2": other}
        for behavior in ("random", "fixed"):
            yield "LatentBatchSeedBehavior", {"samples": batch, "seed_behavior": behavior}
        yield "LatentAdd", {"samples1": batch, "samples2": latent(7, height=5, width=5)}
        yield "LatentSubtract", {"samples1": batch, "samples2": latent(7)}
        yield "LatentMultiply", {"samples": batch, "multiplier": -1.7}
    for ratio in (0.0, 0.25, 1.0):
        yield "LatentInterpolate", {"samples1": latent(1), "samples2": latent(2, height=9), "ratio": ratio}
    for x, y in ((0, 0), (16, 8), (160, 160)):
        yield "LatentCrop", {"samples": latent(1, height=20, width=30), "width": 64, "height": 80, "x": x, "y": y}
    half = mask(3, 1, 1, 64, 80).round()
    mixed = [latent(1, 3), latent(2, 2, noise_mask=half), latent(3, 1, height=9), latent(4, 5, height=9, batch_index=[9, 8, 7, 6, 5])]
    for size in (1, 2, 4, 9):
        yield "RebatchLatents", {"latents": mixed, "batch_size": [size]}


def _conditionings():
    for tokens in (3, 5, 8):
        for strength in (0.0, 0.3, 1.0):
            given = {"conditioning_to": conditioning(1, 5, 2), "conditioning_to_strength": strength}
            yield "ConditioningAverage", {**given, "conditioning_from": conditioning(2, tokens)}
    plain = conditioning(3, pooled=False)
    yield "ConditioningAverage", {"conditioning_to": plain, "conditioning_from": conditioning(2), "conditioning_to_strength": 0.4}
    yield "ConditioningAverage", {"conditioning_to": conditioning(2), "conditioning_from": plain, "conditioning_to_strength": 0.4}
    yield "ConditioningConcat", {"conditioning_to": conditioning(1, 5, 2), "conditioning_from": conditioning(2, 3)}
    yield "ConditioningCombine", {"conditioning_1": conditioning(1), "conditioning_2": conditioning(2, 3)}
    yield "ConditioningZeroOut", {"conditioning": conditioning(1, 5, 2, conditioning_lyrics=torch.ones(2), note="kept")}
    yield "ConditioningSetTimestepRange", {"conditioning": conditioning(1), "start": 0.2, "end": 0.7}
    for bounds in ("default", "mask bounds"):
        yield "ConditioningSetMask", {"conditioning": conditioning(1), "mask": mask(2, 5, 6), "strength": 0.5, "set_cond_area": bounds}
    yield "FluxGuidance", {"conditioning": conditioning(1, 5, 2), "guidance": 2.5}
    yield "FluxDisableGuidance", {"conditioning": conditioning(1, guidance=3.5)}
    for method in ("offset", "index", "uxo/uno"):
        yield "FluxKontextMultiReferenceLatentMethod", {"conditioning": conditioning(1), "reference_latents_method": method}
    yield "ReferenceLatent", {"conditioning": conditioning(1)}
    yield "ReferenceLatent", {"conditioning": conditioning(1, reference_latents=[torch.ones(1)]), "latent": latent(2)}
    clip = WordClip()
    yield "CLIPTextEncode", {"clip": clip, "text": "a cat on blue"}
    for system in ("superior", "alignment"):
        yield "CLIPTextEncodeLumina2", {"clip": clip, "system_prompt": system, "user_prompt": "a cat"}
    yield "CLIPTextEncodeFlux", {"clip": clip, "clip_l": "a cat", "t5xxl": "a cat that sits on blue", "guidance": 4.0}
    for padding in ("none", "empty_prompt"):
        for prompts in (("a", "b", "c"), ("", "", ""), ("one two three four", "x", ""), ("", "one two three four five six seven", "t")):
            yield "CLIPTextEncodeSD3", {"clip": clip, **dict(zip(("clip_l", "clip_g", "t5xxl"), prompts)), "empty_padding": padding}
    inpaint = {"positive": conditioning(1), "negative": conditioning(2), "vae": PixelCodec(), "pixels": image(1, 1, 24, 32)}
    for noise_mask in (True, False):
        yield "InpaintModelConditioning", {**inpaint, "mask": blob(24, 32, 3, 5, 8), "noise_mask": noise_mask}


def _schedules():
    sigmas = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1, 0.0])
    for step in (0, 2, 5, 9):
        yield "SplitSigmas", {"sigmas": sigmas, "step": step}
    for denoise in (0.0, 0.3, 0.5, 1.0):
        yield "SplitSigmasDenoise", {"sigmas": sigmas, "denoise": denoise}
    yield "FlipSigmas", {"sigmas": sigmas}
    yield "FlipSigmas", {"sigmas": sigmas[:3]}
    yield "FlipSigmas", {"sigmas": sigmas[:0]}
    yield "SetFirstSigma", {"sigmas": sigmas, "sigma": 0.9}
    for spacing in ("linear", "cosine", "sine"):
        for start, end, steps in ((-1.0, 0.0, 3), (0.8, 0.3, 2), (0.5, 0.6, 4), (-1.0, 0.0, 1)):
            bounds = {"start_at_sigma": start, "end_at_sigma": end, "spacing": spacing}
            yield "ExtendIntermediateSigmas", {"sigmas": sigmas, "steps": steps, **bounds}


def _values():
    for value in (None, "text", 3, 2.5, True, [1, "a"], {"k": [1]}, torch.Size([1, 2])):
        yield "PreviewAny", {"source": value}
    yield "PrimitiveString", {"value": "a"}
    yield "PrimitiveInt", {"value": 7}
    yield "DisableNoise", {}


def all_cases():
    """(number, class id, inputs) of every call, in a fixed order."""
    groups = (_resizing, _pictures, _masks, _latents, _conditionings, _schedules, _values)
    return [(number, *case) for number, case in enumerate(case for group in groups for case in group())]


def plain(value):
    """Outputs as containers, numbers, text and tensors, which torch.save keeps and torch.load(weights_only=True) reads."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor) or value is None or isinstance(value, (str, int, float, bool)):
        return value
    return f"<{type(value).__name__}>"
