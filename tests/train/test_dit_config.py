"""DiT's config as a user runs it: a published base, fine-tuned on class folders, to pictures of a bundle."""

import json
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from runs import CONFIGS, small

from priorguide.sample.bundle import Bundle
from priorguide.train.cli import main

PUBLISHED = "facebook/DiT-XL-2-256"


def whole_way(run: Path, monkeypatch) -> Bundle:
    """Compares the run's two candidates and exports the base with it; returns the bundle, loaded again."""
    monkeypatch.setattr("priorguide.train.export.verify_apart", lambda folder: "not verified apart")
    assert main(["compare", str(run), "--scales", "1,1.5"]) == 0
    record = json.loads((run / "comparison" / "record.json").read_text())
    assert {row["prior"] for row in record["rows"]} == {"none", "self", "base"} and record["verdict"]["sentence"]
    export = ["export", str(run), "--prior", "base", "--scale", "1.5"]
    assert main(export) == 1  # the published weights are not for every use
    assert main([*export, "--restricted"]) == 0
    bundle = Bundle.load(run / "bundle")
    recorded = bundle.recorded()
    assert torch.equal(bundle.sample(recorded.condition, recorded.seeds), recorded.pictures)
    assert recorded.pictures.std() > 0.01
    return bundle


def write_published(folder: Path) -> Path:
    """A tiny pipeline in the layout of the published ones: 1000 classes, 8x8 latents of 16x16 pictures."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    shared = network.transformer_blocks[0].norm1.emb.state_dict()
    network.transformer_blocks[1].norm1.emb.load_state_dict(shared)
    DiTPipeline(network, vae, DDIMScheduler()).save_pretrained(folder)
    return folder


def write_class_folders(folder: Path) -> Path:
    """train/ and test/ of class folders, with pictures of several sizes and formats, and what else lies about."""
    for split, count in (("train", 12), ("test", 16)):
        for number, kind in enumerate(("apple pie", "baklava", "Caesar salad")):
            (place := folder / split / kind).mkdir(parents=True)
            for i in range(count):
                size, colour = (24 + i, 40 - i), (80 * number + i, 255 - 9 * i, 90)
                Image.new("RGB", size, colour).save(place / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
            Image.new("L", (20, 20), 30 * number).save(place / "grey.png")
            (place / "notes.txt").write_text("not a picture")
        (folder / split / ".cache").mkdir()
    return folder


def test_class_folders_from_a_published_base(tmp_path, monkeypatch):
    base, pictures = write_published(tmp_path / "base"), write_class_folders(tmp_path / "food")
    text = (CONFIGS / "dit.yaml").read_text()
    assert text.count(PUBLISHED) == 2  # what is fine-tuned, and the prior
    (config := tmp_path / "dit.yaml").write_text(text.replace(PUBLISHED, str(base)))
    content = small(config, tmp_path / "run", base)
    content["trainer"] |= {"accelerator": "cpu", "precision": "32-true"}
    content["model"]["model"]["init_args"]["num_classes"] = 3
    content["data"]["init_args"] |= {"source": str(pictures), "resolution": 16, "num_workers": 0}
    config.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(config)]) == 0
    assert (tmp_path / "run" / "compare" / "panel-00000002.png").is_file()
    bundle = whole_way(tmp_path / "run", monkeypatch)
    assert bundle.model.num_classes == 3 and bundle.model.vae is not None
    assert bundle.guidance.prior.model.num_classes == 1000 and bundle.guidance.prior.model.vae is None
    out = tmp_path / "samples"
    words = ["--condition", "label=2", "--seeds", "0:2", "--steps", "2", "--out", str(out)]
    assert main(["sample", str(tmp_path / "run" / "bundle"), *words]) == 0
    found = sorted(out.rglob("*.png"))
    assert len(found) == 2 and Image.open(found[0]).size == (16, 16)
