"""`rectiflow train`: recipes are read strictly, a run goes on, and its average becomes a weight file that the node loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rectiflow.cli import main
from rectiflow.tiny.emoji import BACKGROUNDS, EMOJI_SETS, EmojiLook, load_emoji
from rectiflow.tiny.weights import load_weights
from rectiflow.train.checkpoints import RunFolder
from rectiflow.train.recipes.tiny import vocabulary_things

RECIPE = """
recipe = "tiny"
name = "t"
dtype = "fp32"
[look]
largest_zoom = 1.05
[train]
steps = 2
batch = 2
save_every = 1
validate_every = 0
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Both sets as the packages have them: a half transparent square in a colour of its own for every thing."""
    folder = tmp_path_factory.mktemp("emoji")
    for package, name in EMOJI_SETS.values():
        (folder / package / "img" / name / "64").mkdir(parents=True)
        rows = []
        for number, short in enumerate(vocabulary_things().values()):
            picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            picture.paste((number * 2 % 256, 100, 255 - number, 128), (8, 8, 56, 56))
            picture.save(folder / package / "img" / name / "64" / f"{number}.png")
            rows.append({"short_names": [short], "image": f"{number}.png"})
        (folder / package / "emoji.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_a_picture_is_blended_with_its_background(pictures):
    look = EmojiLook(largest_zoom=1.0, mirror=0.0, white=1.0)
    emoji = load_emoji(pictures, vocabulary_things(), look)
    rgb, captions = emoji.compose(torch.tensor([0, 125]), look, torch.Generator().manual_seed(0))
    assert captions == ["twemoji cat on white", "noto cat on white"] and len(emoji) == 250
    assert rgb[:, :, 0, 0].eq(1.0).all()
    assert rgb[0, :, 32, 32].tolist() == pytest.approx([127 / 255 * 2 - 1, (50 + 127) / 255 * 2 - 1, 1.0], abs=0.02)  # half over white
    assert set(BACKGROUNDS) == {"white", "red", "blue", "green", "yellow", "black"}


def test_a_run_goes_on_and_its_average_is_a_weight_file(recipe, pictures, tmp_path, capsys):
    common = [str(recipe), "--pictures", str(pictures), "--out", str(tmp_path)]
    assert main(["train", *common, "--steps-this-run", "1"]) == 0
    assert main(["train", *common]) == 0
    assert "resumed at step 1" in capsys.readouterr().out
    folder = RunFolder(tmp_path / "rf_train" / "t")
    assert folder.steps()[0] == 2
    assert main(["train", *common, "--export", str(tmp_path / "weights.safetensors")]) == 0
    made, shipped = load_weights(tmp_path / "weights.safetensors"), load_weights()
    assert {name: value.shape for name, value in made.transformer.items()} == {name: v.shape for name, v in shipped.transformer.items()}
    average = folder.read(2).part("ema")
    assert torch.equal(made.text_embedding, average["text"])
    assert torch.equal(made.transformer["img_in.weight"], average["network.img_in.weight"].half())
    assert main(["train", *common, "--finish", "2"]) == 0
    assert folder.steps()[0] == 4 and folder.description(4)["config"]["optim"]["decay_steps"] == 2


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("recipe = ", "not TOML"), ("recipe = 'other'", "there is tiny"), ("recipe = 'tiny'\nnmae = 'a'", "'nmae' is not known"),
        ("recipe = 'tiny'\n[train]\nstep = 3", "step"), ("recipe = 'tiny'\n[train.optim]\nkind = 'best'", "adamw"),
        ("recipe = 'tiny'\n[look]\nzoom = 2", "zoom"),
        ("recipe = 'tiny'\ndtype = 'fp8'", "bf16"), ("recipe = 'tiny'\npictures = 'nowhere'\n[train]\nsteps = 1", "npm pack"),
    ],
)  # fmt: skip
def test_recipes_are_read_strictly(text, complaint, tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    assert main(["train", str(path), "--out", str(tmp_path)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_name_cannot_leave_the_output_folder(tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    path.write_text("recipe = 'tiny'\nname = '../../up'")
    assert main(["train", str(path), "--out", str(tmp_path)]) == 2
    assert "'..'" in capsys.readouterr().err


def test_nothing_to_export_is_said(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--out", str(tmp_path / "empty"), "--export", str(tmp_path / "w")]) == 2
    assert "train first" in capsys.readouterr().err
