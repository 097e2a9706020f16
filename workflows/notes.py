"""What a person reads first on every graph: two sentences on what to change."""

from __future__ import annotations

__all__ = ["NOTES"]

NOTES = {
    "quantize_and_save": (
        "One seed with the weights in 32, 8, 4 and 3 bits; a short run tells **Quantize** where outliers are. Change "
        "**weight_bits** and **act_bits**; **Velocity error** says in dB what that costs. **Keep Sensitive Layers** finds what 8 bits "
        "must leave alone to reach **target_db**. The 4-bit model has 16 **directions** beside its codes and is saved; what stays whole is "
        "by now most of it."
    ),
    "width_to_linear": (
        "The three image MLPs of the double blocks become linear maps with an eighth of their weights, fitted to what they do on eight "
        "of the model's own samples; a LoRA then learns what the whole model does there. Change **count** and **streams**; the report says "
        "what each map leaves unsaid. The saved file holds the maps and what was learnt."
    ),
    "text_to_linear": (
        "Of the three double blocks one, then two, read the text of the block before them through linear maps; their own modulation, "
        "projection and MLP of the text go. Change **count** and **runs**; the report says what each run loses. Maps know the prompts that "
        "they were fitted to: combine many. The model with one is saved and loaded again."
    ),
    "quantize_and_train": (
        "Weights of 2 bits, and a LoRA that learns beside them what the whole model does there, from eight of its own samples. The "
        "saved file holds codes and LoRA. Change **weight_bits** to 3, **steps**, and the prompt; eight samples of one prompt teach "
        "little of others."
    ),
    "load_compressed": (
        "A model without one of its nine blocks, in 8 bits, is saved and loaded again; the file is all that the second picture "
        "needs. To load a file of your own, unlink **path** and write its name. **Compression Info** reads it without building the "
        "model."
    ),
    "factored_modulation": (
        "The layers that turn the time into shifts, scales and gates, in low-rank factors; captions say what is left of their bytes. "
        "Change **rank**: 4 shows what goes first, 256 is the whole again. **shared** spends bytes on a mean of all blocks, which at equal "
        "size helps this model less than the rank does."
    ),
    "prune_width": (
        "A fifth of the width goes: once the heads and neurons that learned masks close, which 20 training steps then recover, once the "
        "smallest ones. Change **remove**; raise **iterations** to 60 and combine more prompts to learn better, under another **name**."
    ),
    "timestep_width": (
        "Heads and channel groups that add least at each noise level are left out there; nothing is trained, so the picture soon changes. "
        "The text says what each level keeps. Change **target_flops**: 1 is the plain model; **exec** `mask` draws the same at full cost."
    ),
    "prune_and_recover": (
        "Three of nine blocks are left out, then 20 training steps bring the picture back; no data set is needed. Change **method** "
        "and **remove** of **Prune Score**, or **steps**. **Recover Pruned** goes on where its **name** stopped: change it to begin "
        "anew."
    ),
    "compressed_and_accelerated": (
        "Two of nine blocks go, training brings the picture back, weights become 8 bits, every second step is repeated, then half "
        "of the tokens. **Model Compare** says what each stage gives and costs; raise its **rounds** for steady seconds. Change any "
        "stage."
    ),
    "reflow_a_lora": (
        "The model's own pictures and their noises straighten it: a LoRA of 8 steps on 4 pairs, then a second one for a single step. "
        "A taste: for clean pictures raise **count** to 64, **steps** to 300 and 100, **anneal_steps** to 100, and change both names."
    ),
    "train_a_lora": (
        "A LoRA learns one picture in 30 steps of two examples; the same seed is drawn before and after. **Train** goes on where "
        "its **name** stopped: raise **steps** to train further, change **name** to begin anew. **lora** can be linked to Save "
        "LoRA."
    ),
    "text_to_image": (
        "Change the words in **Prompt**: *style thing on colour*, for example `twemoji rocket on black` (**Tiny Model Words** lists "
        "all). Another **seed** gives another picture; cfg 2 to 3 and 20 to 50 steps suit this model."
    ),
    "taylor_forecast": (
        "Half of the 50 steps are computed, the others are forecast; **Report** says which, and what that took. Change "
        "**interval**: 1 is the plain model, 4 shows where the picture starts to change; **order** 0 repeats steps in place of "
        "continuing their slope."
    ),
    "high_resolution_rope": (
        "A picture of twice the side the model was trained at. Change **method**: `none` is the plain model, where things repeat; "
        "`position_interpolation` stretches all frequencies alike. **train_rows** and **train_columns** are 8 for this model, 64 "
        "for Flux."
    ),
    "accelerate": (
        "One noise at three speeds; the previews have seconds, PSNR and which steps were computed. Change **speed**: 1 is the plain "
        "model, 1.5 can hardly be told from it, 4 changes the picture. **Speed 2: what was chosen** says what that rests on."
    ),
    "several_sizes_at_once": (
        "Three sizes of one prompt in one run of the sampler: **Pack Latents** makes them one sequence in which each picture sees itself "
        "alone, **Unpack Latents** takes it apart (index 0: a list of all). Change the sizes, or link up to six; the preview while "
        "sampling shows the strip of patches."
    ),
    "high_resolution_attention": (
        "Twice the training side, four ways: plain; with positions stretched by **RoPE Extrapolation**; and with cheaper attention "
        "on top. **Grouped Attention** computes 60 % of the pairs here and **Context Drop** 27 %; the reports say so. Groups of 2 "
        "or factor 4 show what goes first. At this size neither is faster: that begins at some thousand tokens."
    ),
    "rettention": (
        "After four steps three of four are sparse: a token sees its square and the squares around it. **Re-ttention** puts back what that "
        "leaves out; beside it the same without. Change **period** (longer ages the correction), **keep** and **form**; the report has the "
        "mass each layer sees. 64 tokens gain no time: that begins at some thousand."
    ),
    "region_adaptive": (
        "After eight steps only half of the tokens are computed; **Map of computed tokens** shows which, bright is often. Change "
        "**sample_ratio**: 1 is the plain model, 0.2 shows where detail goes; **starvation** 0 shows tokens that are never computed "
        "again."
    ),
    "mixed_grain": (
        "A draft says where detail is; in the second run the other half of the picture goes through most blocks as one token for four. "
        "The report has tokens and FLOPs. Change **fine_share** of Grain Map: 1 is the plain model; **end_percent** 1 leaves noise in "
        "coarse regions, **unmerge** `copy` shows what `delta` keeps."
    ),
    "token_skip_mlp": (
        "After three steps the MLPs of every block run for half of the tokens, those whose velocity changed most; the others get "
        "nothing, or what they got last. The report has tokens and FLOPs. Change **ratio**: 1 is the plain model; **router** chooses "
        "other tokens."
    ),
    "region_with_cache": (
        "A cache around region-adaptive sampling: steps the cache answers never reach the regions, and both reports say what they "
        "did. Change **interval** of the cache (1 turns it off) and **sample_ratio** of the regions (1 turns them off)."
    ),
    "gate_against_interval": (
        "One noise, three runs: every step computed, every fourth, and as many again where **Confidence-Gated Taylor** asks. "
        "Reports show where each spends its steps, the numbers how near it comes. Change **threshold** and **interval**; compare at "
        "equal steps."
    ),
    "block_ranges": (
        "A plain run measures how much of what each third of the blocks adds changes in a step; what changes least is what **Delta "
        "Block Cache** should leave out. The second picture leaves the rear third out early and the front third late, at every second "
        "step. Change **early_range** and **late_range** to what the chart shows."
    ),
    "schedule_search": (
        "One picture is sampled whole and recorded, the search picks 7 of its 16 steps, and another prompt is sampled with these. "
        "Change **budget** and watch **What a budget costs**; order 0 finds other steps than order 1. Record four and more for real "
        "use."
    ),
    "invert_with_stock_samplers": (
        "A picture becomes noise, and stock samplers draw it back: **Noise from Latent** hands them the noise, **Flow Inversion "
        "Sigmas** both schedules. Below, where each errs. Change **solver** of the inversion, or the **steps**; more make Euler's "
        "differences fade."
    ),
    "editing_by_parts": (
        "Three editors from their nodes: RF-Inversion goes up and down, Uni-Edit meets both prompts on the way, KV-Edit draws only "
        "what its mask covers. Change **What it shall show**; a later **end_percent**, a lower **alpha** or a smaller mask keep "
        "more of the picture."
    ),
    "exchange_coarse_and_fine": (
        "Two drawings are split into Haar bands; the coarse band of the apple and the detail of the cat become one latent, which is "
        "repainted from half-way noise. Change the prompts, exchange the links of **Latent Wavelet Merge**, or change **denoise**: low "
        "keeps the seams between squares, high forgets the apple."
    ),
    "between_two_pictures": (
        "Two pictures become noise; points on the arc between their noises become pictures again, under a mix of both prompts. "
        "Change **t** of **Noise Slerp** and the strength of the prompt's mix with it. More **steps** bring the ends back closer."
    ),
    "stochastic_and_adaptive": (
        "One noise at the start; three of the samplers add more in every step and so end at other pictures of the same kind. The "
        "last chooses its own steps: a smaller **rtol** and **atol** take more model calls. **eta** 0 makes every one of the others "
        "deterministic."
    ),
    "few_steps": (
        "Four model calls, four rules for weights that were made for few steps; the tiny model was not, so all are rough. Load such "
        "weights instead: **Flow UNet Sampling** says what their output means (InstaFlow: data_minus_noise, multiplier 1000), and "
        "tries it on a picture."
    ),
    "shift_of_the_schedule": (
        "Ten steps each, from one noise; the shift says where they lie. Above 1 they gather near noise, where layout is decided; "
        "below 1 near the picture. Set it in one place only: in the schedule, by **Reshift Sigmas**, or in the model. Change "
        "**to_alpha**."
    ),
    "is_the_flow_straight": (
        "How far the paths from noise to picture leave a straight line, at every sigma. 0 everywhere would be one step to the "
        "picture. Change **cfg**: guidance bends the paths. The previews have the figures, and what is constant along a path."
    ),
    "steering_colourise": (
        "Only brightness is known; the model finds colours that give it. The last picture adds a wish: rather blue in the masked "
        "part. Change the colour, **beta** of **Flow Score Cost** (too much burns), or the **noise_seed**."
    ),
    "steering_class": (
        "No prompt at all: a classifier of two examples says which picture comes out. Put other pictures in the place of the examples, or "
        "change **beta** (how hard) and **sigma_lo** (until when) of **Flow Score Cost**. A CLIP encoder, linked to **Class Score**, tells "
        "classes by what they show."
    ),
    "distil_to_one_step": (
        "Twelve guided pictures and their noises teach a LoRA to jump from noise to picture in one call; the noise shown is not among "
        "them. Raise **count** of the pairs and **steps** of **Train** for sharper jumps, and change its **name** to begin anew."
    ),
    "outpaint_around_a_mask": (
        "Two masks become one: the border and the eyes are drawn anew, the rest is given. Change **operation** to difference or "
        "intersection, **spatial_ratio** of the border, or **resample**: 0 is faster and shows seams."
    ),
    "image_to_image": (
        "Change **denoise**: 0.4 keeps most of the picture, 0.9 nearly nothing of it. Put **Load Image** in place of **Example "
        "Picture** to use a picture of your own, best 64×64."
    ),
    "inpainting": (
        "Change the words in **Prompt** to repaint the masked part as something else; the rest of the face stays as it was. Put "
        "**Load Image** in place of **Example Picture** and draw a mask in its mask editor to use a picture of your own."
    ),
    "flow_as_epsilon_model": (
        "One model on two paths: **Convert Prediction** makes Karras schedules, which are for epsilon models, fit a flow. Change "
        "**scheduler** and **sampler_name** of the three samplers, or the **steps**; with many steps the pictures agree."
    ),
    "masked_completion": (
        "Random blocks of the picture are drawn anew, the rest is given; **Repaint Sampler** takes every step several times to fit "
        "both. Change **task** to outpaint, the **spatial_ratio** or the **seed** of **Video Mask**. For a video the masks run over "
        "time."
    ),
    "one_step_sampling": (
        "One model call against 4 and 28 from the same noise. The tiny model is not distilled, so one step gives the mean of what "
        "the prompt may mean, a blur; load distilled weights (InstaFlow: **Flow UNet Sampling**) in its place and one step is the "
        "picture. cfg stays 1."
    ),
    "samplers_side_by_side": (
        "Five solvers start from one noise and make the same number of model calls (Heun one fewer). Change the steps in the two "
        "**Flow Schedule** nodes (the second has half as many: its solvers call the model twice a step) and watch where the "
        "pictures part."
    ),
    "solver_compare": (
        "Change **solvers** (Flow ODE Sampler's help lists them) and **nfe**, the numbers of model calls each gets; a caption is "
        "the count and the PSNR against the reference. More **reference_steps** make the reference finer; the chart shows how far "
        "it is off itself."
    ),
    "guidance_side_by_side": (
        "One noise, one prompt, five ways to guide: at cfg 8 the plain rule burns the colours, and each option of **Flow Guider** "
        "holds it back in another way. Change **cfg** in all of them, or the **seed**."
    ),
    "steering_masked_edit": (
        "Sunglasses for a face, nothing inverted: **Flow Guider** edits inside the mask, **Flow Edit Cost** keeps the rest. Change "
        "the words in **Edit** or the **seed**; full_until 0.95 with beta 0.3 keeps more of what was under the mask."
    ),
    "steering_inpaint": (
        "The eyes are unknown to the model: it paints them while **FlowChef Sampler** keeps the rest. Another **seed** gives other "
        "eyes; **beta** in **Flow Latent Cost** says how hard the known part is held from the start."
    ),
    "steering_deblur": (
        "**Flow Operator** is the blur that is made and taken back: change its angle and size, or choose gaussian_blur. More "
        "**inner** steps in **FlowChef Sampler** fit the blurred picture closer."
    ),
    "steering_super_resolution": (
        "Sixteen pixels become one, and the model finds a picture that shrinks to the same pixels. Change **factor** in **Flow "
        "Operator** to 2 or 8, or the **seed**; compare with the bicubic enlargement."
    ),
    "invert_and_reconstruct": (
        "The picture is turned into noise and back, by three solvers at 40 model calls each. Lower the steps together (10, 5 and 9) "
        "and watch Euler's picture fade first. Put **Load Image** in place of **Example Picture** to use a picture of your own, "
        "best 64×64."
    ),
    "change_the_background": (
        "FlowEdit moves the picture by the difference of two prompts: change **What it shall show** (*noto cat on black*, *noto fox "
        "on white*). More **skip** keeps more of the picture, until too little changes."
    ),
    "edit_keeping_the_pose": (
        "A cat becomes a dog; the more steps share the old picture's features (**inject_steps**), the more of its pose stays. "
        "Change **What it shall show**, and describe your own picture in **What the picture shows**."
    ),
    "editing_methods": (
        "Six methods edit one picture at about 56 model calls each; the figure is the likeness of the background, the table has costs. "
        "Change the lines of **methods**: RF-Edit keeps more with more inject_steps, FlowEdit with more skip, RF-Inversion with a later "
        "end. Only KV-Edit is told by the mask what may change."
    ),
    "learn_depth": (
        "**Prune Score** says how many blocks go: three of the first five single ones. Every choice of the two that stay gets a chance, "
        "learnt in 24 steps; then 20 steps bring the picture back. Raise **steps** of **Learn Depth** until its rows are clearly pale or "
        "dark; change **name** to begin anew."
    ),
    "pluggable_runs": (
        "Runs of blocks that straight maps nearly replace become one student each, learnt in 20 steps; then all students draw, one "
        "of them, or all in the second half. Change **active_runs** and the percents of **Apply Runs**, or **steps** of **Distill "
        "Runs**."
    ),
}
