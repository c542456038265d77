import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from priorguide.sample.agreement import Asked
from priorguide.sample.feature_networks import Clip, Preprocessor, TransformersVision, classifies, features_of
from priorguide.sample.inception import Inception
from priorguide.sample.lpips import Lpips
from priorguide.sample.text import tiny_text

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
CLIP_PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def picture(*size: int, channels: int = 3) -> Tensor:
    """Smooth pixels (1, channels, *size), whole 255ths, as a file holds them."""
    coarse = torch.rand(1, channels, 8, 9, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(0.2 + 0.6 * coarse, size, mode="bicubic").mul(255).round() / 255


def as_file(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels[0] * 255).byte().permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a random CLIP."""
    torch.manual_seed(0)
    _, tokenizer = tiny_text()
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    text |= dict(num_attention_heads=2, max_position_embeddings=8, eos_token_id=len(tokenizer) - 1)
    config = CLIPConfig(text_config=text, vision_config=SMALL | {"intermediate_size": 32}, projection_dim=12)
    folder = tmp_path_factory.mktemp("clip")
    for part in (CLIPModel(config), tokenizer, CLIP_PROCESSOR):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "processor",
    [
        CLIP_PROCESSOR,
        BitImageProcessorPil(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 30}),
        ViTImageProcessorPil(size={"height": 28, "width": 24}),
    ],
    ids=["clip", "dinov2", "vit"],
)
@pytest.mark.parametrize("size", [(120, 170), (90, 61), (16, 16)])
def test_pictures_are_taken_as_the_models_own_preprocessor_does(tmp_path, processor, size):
    processor.save_pretrained(tmp_path)
    pixels = picture(*size)
    wanted = processor(images=as_file(pixels), return_tensors="pt").pixel_values
    found = Preprocessor.read(tmp_path)(pixels)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 2 / 255 / 0.25  # Pillow rounds after each axis
    assert (found - wanted).abs().mean() < 0.4 / 255 / 0.25


def test_preprocessors_in_older_and_newer_words(tmp_path):
    about = {"size": 28, "crop_size": 24, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    assert Preprocessor.read(tmp_path) == Preprocessor((24, 24), 28, (0.5,) * 3, (0.2,) * 3, "bilinear")
    del about["crop_size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    assert Preprocessor.read(tmp_path) == Preprocessor((28, 28), None, (0.5,) * 3, (0.2,) * 3, "bilinear")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": about}))
    assert Preprocessor.read(tmp_path).size == (28, 28)


@pytest.mark.parametrize("about", [{"size": {"longest_edge": 28}}, {"size": 28, "resample": 0}, {"crop_size": 28}])
def test_preprocessors_that_are_refused(tmp_path, about):
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config.json"):
        Preprocessor.read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must resize to a height and width, or the shortest edge before a crop"):
        Preprocessor.read(tmp_path)


def test_dinov2_gives_the_class_token(tmp_path):
    model = Dinov2Model(Dinov2Config(**SMALL)).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    network = TransformersVision.from_pretrained(str(tmp_path))
    pixels = torch.rand(5, 3, 40, 36)
    with torch.no_grad():
        wanted = model(network.preprocessor(pixels)).last_hidden_state[:, 0]
    torch.testing.assert_close(features_of(network, pixels, batch_size=2), wanted)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    grey = pixels[:, :1]
    torch.testing.assert_close(features_of(network, grey), features_of(network, grey.expand(-1, 3, -1, -1)))
    assert not classifies(network)
    with pytest.raises(ValueError, match="load it with classes=True"):
        network(pixels)
    with pytest.raises(ValueError, match=r"\(B, 1 or 3, H, W\), got \(5, 4, 8, 8\)"):
        network.features(torch.rand(5, 4, 8, 8))


def test_a_classifier_with_and_without_its_classes(tmp_path):
    model = ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=32, num_labels=7)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    pixels = torch.rand(3, 3, 28, 28)
    plain, classes = (TransformersVision.from_pretrained(str(tmp_path), classes=classes) for classes in (False, True))
    with torch.no_grad():
        wanted = model(classes.preprocessor(pixels), output_hidden_states=True)
        torch.testing.assert_close(classes(pixels), wanted.logits)
    last = model.vit.layernorm(wanted.hidden_states[-1])[:, 0]  # no pooler's weights are there, so none are made up
    torch.testing.assert_close(features_of(plain, pixels), last)
    torch.testing.assert_close(features_of(classes, pixels), last)
    assert (classifies(plain), classifies(classes), classes.num_classes) == (False, True, 7)


def test_a_pooler_that_is_there_is_used(tmp_path):
    model = ViTModel(ViTConfig(**SMALL, intermediate_size=32)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    network, pixels = TransformersVision.from_pretrained(str(tmp_path)), torch.rand(3, 3, 28, 28)
    with torch.no_grad():
        wanted = model(network.preprocessor(pixels)).pooler_output
    torch.testing.assert_close(features_of(network, pixels), wanted)


def test_clip_as_transformers_has_it(clip):
    network, model = Clip.from_pretrained(str(clip)), CLIPModel.from_pretrained(clip).eval()
    pixels, texts = torch.rand(3, 3, 30, 30), ["a cat", "", "a sentence that is far longer than the tower"]
    tokens = tiny_text()[1](texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(pixel_values=network.preprocessor(pixels), **tokens)
    torch.testing.assert_close(features_of(network, pixels), wanted.image_embeds)
    torch.testing.assert_close(network.texts(texts, batch_size=2), wanted.text_embeds)
    alone = TransformersVision.from_pretrained(str(clip))  # CLIP's picture tower as any vision model
    torch.testing.assert_close(nn.functional.normalize(features_of(alone, pixels)), wanted.image_embeds)


def test_clip_compares_pictures_and_texts(clip):
    network = Clip.from_pretrained(str(clip))
    made, target = torch.rand(4, 3, 28, 28), torch.rand(4, 3, 28, 28)
    image, texts, others = torch.rand(4, 1, 20, 20), ["a", "b", "c", "d"], ["e", "f", "g", "h"]
    e, to, of = (features_of(network, pixels) for pixels in (made, target, image))
    text, before = network.texts(texts), network.texts(others)

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    found = Asked(text=texts, image=image, image_text=others, clip=network).scores(made)
    assert found.keys() == {"clip_text", "clip_image", "clip_direction"}
    torch.testing.assert_close(found["clip_text"], cosine(e, text))
    torch.testing.assert_close(found["clip_image"], cosine(e, of))
    torch.testing.assert_close(found["clip_direction"], cosine(e - of, text - before))
    found = Asked(target, texts, image, clip=network).scores(made)
    torch.testing.assert_close(found["clip_image"], cosine(e, to))
    torch.testing.assert_close(found["clip_direction"], cosine(e - of, to - of))
    assert Asked(target, texts, image, clip=network).scores(target)["clip_direction"].tolist() == pytest.approx([1] * 4)
    assert Asked(text=texts, clip=network, metrics=["psnr"]).scores(made) == {}
    assert Asked(clip=network).scores(made) == {}

    clips = torch.stack([made, target], 2)
    of_clips = Asked(text=texts, image=image, image_text=others, clip=network).scores(clips)
    each = [Asked(text=texts, image=image, image_text=others, clip=network).scores(frame) for frame in (made, target)]
    for name, values in of_clips.items():
        torch.testing.assert_close(values, (each[0][name] + each[1][name]) / 2)


def test_inception_has_the_published_weights_names_and_sizes(tmp_path):
    network = Inception()
    state = network.state_dict()
    assert sum(p.numel() for p in network.parameters()) == 21_785_568
    assert state["Mixed_6c.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    save_file({name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "i.safetensors")
    found = Inception.from_pretrained(tmp_path / "i.safetensors")
    pixels = torch.rand(2, 3, 20, 24)
    features = features_of(found, pixels)
    assert features.shape == (2, 2048) and not classifies(found)
    torch.testing.assert_close(features_of(network, (pixels * 255).round() / 255), features)
    with pytest.raises(ValueError, match="does not fit Inception: it has besides head"):
        save_file(network.state_dict() | {"head": torch.zeros(1)}, tmp_path / "other.safetensors")
        Inception.from_pretrained(tmp_path / "other.safetensors")


def test_lpips_by_definition(tmp_path):
    torch.manual_seed(0)
    own = Lpips()
    trunk = {name: torch.randn_like(value) / 20 for name, value in own.state_dict().items() if "heads" not in name}
    heads = {f"lin{i}.model.1.weight": torch.rand_like(head) for i, head in enumerate(own.heads)}
    save_file(trunk | {"classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "trunk.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    network = Lpips.from_pretrained(tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors")
    a, b = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    assert network(a, a).tolist() == [0, 0, 0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
    x, y = ((p - mean[:, None, None]) / std[:, None, None] for p in (a, b))
    total = torch.zeros(3)
    for i, (name, stride, padding) in enumerate((("0", 4, 2), ("3", 1, 2), ("6", 1, 1), ("8", 1, 1), ("10", 1, 1))):
        if name in ("3", "6"):
            x, y = nn.functional.max_pool2d(x, 3, 2), nn.functional.max_pool2d(y, 3, 2)
        weight, bias = trunk[f"features.{name}.weight"], trunk[f"features.{name}.bias"]
        x, y = (nn.functional.conv2d(p, weight, bias, stride, padding).relu() for p in (x, y))
        gap = (nn.functional.normalize(x) - nn.functional.normalize(y)) ** 2
        total += nn.functional.conv2d(gap, heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    torch.testing.assert_close(network(a, b), total, rtol=1e-2, atol=0)  # the authors' shift and scale are rounded
    found = Asked(a, perceptual=network).scores(b)
    torch.testing.assert_close(found["lpips"], network(b, a))
