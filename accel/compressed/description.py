"""What a compressed file holds, as text."""

from __future__ import annotations

from .reading import Loaded

__all__ = ["describe"]


def describe(loaded: Loaded) -> str:
    """Lines on blocks, widths and bytes, and a table of the quantised layers."""
    manifest = loaded.manifest
    made = f"made from {manifest.base_sha256_16}" if manifest.arch else "of the core"
    lines = [f"{manifest.arch or 'int8 file'}, {made}; {loaded.size / 2**20:.2f} MiB, others in {manifest.dtype}"]
    for holder, kept in manifest.kept.items():
        gone = [str(number) for number in range(manifest.counts[holder]) if number not in kept]
        lines.append(f"{holder}: {len(kept)} of {manifest.counts[holder]} blocks, without {', '.join(gone)}")
    if loaded.plan is not None and loaded.plan.method:
        lines.append(f"pruned by {loaded.plan.method}")
    if manifest.width:
        lines.append(f"{len(manifest.width)} layers are narrower than the whole model's")
    if manifest.maps:
        lines.append(f"{len(manifest.maps)} MLPs are linear maps: {', '.join(manifest.maps)}")
    if manifest.text_runs:
        runs = ", ".join(f"{first} to {last}" for first, last in manifest.text_runs.items())
        lines.append(f"text is linear over {len(manifest.text_runs)} runs of blocks: {runs}")
    if loaded.low_rank:
        ranks = sorted({layer.rank for layer in loaded.low_rank.values()})
        held = sum(layer.nbytes for layer in loaded.low_rank.values())
        made = f"of rank {', '.join(map(str, ranks))} on {len(manifest.first_of_group)} shared matrices"
        lines.append(f"{len(loaded.low_rank)} factored layers {made}: {held} bytes")
    lines.append(f"other weights: {sum(tensor.nbytes for tensor in loaded.plain.values())} bytes")
    if not loaded.layers:
        return "\n".join([*lines, "no quantised layers"])
    weights = sum(form.rows * form.columns for form in manifest.quant.values())
    stored = sum(layer.nbytes for layer in loaded.layers.values())
    lines.append(f"{len(loaded.layers)} quantised layers: {weights} weights in {stored} bytes, {8 * stored / weights:.2f} bits a weight")
    lines += ["", "| layer | size | format | rotation | bits/weight | LoRA |", "|---|---|---|---|---|---|"]
    for name, form in manifest.quant.items():
        group = f" group {form.group}" if form.group else ""
        full = manifest.width.get(name)
        size = f"{form.rows}×{form.columns}" + (f" of {full['rows']}×{full['columns']}" if full else "")
        rotation = form.rotation + (" + smooth" if form.smooth else "")
        rotation += f", {form.directions} directions beside" if form.directions else ""
        lora = form.lora + (" (one is beside the codes)" if form.beside else "")
        bits = loaded.layers[name].bits_per_weight
        lines.append(f"| {name} | {size} | W{form.bits}A{form.act_bits} {form.layout}{group} | {rotation} | {bits:.2f} | {lora} |")
    return "\n".join(lines)
