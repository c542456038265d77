"""The published weights of the metrics' networks, against other implementations; `pytest -m network` fetches them.

Inception takes torch-fidelity, and LPIPS torchvision beside torchmetrics: where they are not installed it is skipped.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from priorguide.sample.agreement import Asked
from priorguide.sample.distances import frechet_distance
from priorguide.sample.feature_networks import Clip, TransformersVision, features_of
from priorguide.sample.inception import Inception
from priorguide.sample.kernels import kernel_distance
from priorguide.sample.lpips import Lpips

pytestmark = [pytest.mark.network, pytest.mark.timeout(1800)]
DINOV2, CLIP = "facebook/dinov2-base", "openai/clip-vit-base-patch32"


def smooth(count: int, side: int, seed: int = 0) -> Tensor:
    """Pictures (count, 3, side, side) with whole 255ths, as files have them."""
    coarse = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return (pixels * 255).round() / 255


def as_bytes(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)


def hub_file(url: str) -> Path:
    """Where torch.hub keeps a file that it has fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def assert_alike(found: Tensor, wanted: Tensor, relative: float) -> None:
    """Row by row, in the norm of the wanted row."""
    gap = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert gap.max() < relative, f"{gap.max():.2e}"


@pytest.fixture(scope="module")
def inceptions():
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    reference = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    return Inception.from_pretrained(hub_file(theirs.URL_INCEPTION_V3)), reference


@pytest.mark.parametrize("side", [32, 299, 400])
def test_inception_as_torch_fidelity_has_it(inceptions, side):
    ours, reference = inceptions
    pixels = smooth(4, side)
    with torch.no_grad():
        assert_alike(ours.features(pixels), reference(as_bytes(pixels))[0], 1e-4)


def test_fid_and_kid_as_torch_fidelity_and_torchmetrics_have_them(inceptions):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.kid import poly_mmd

    ours, _ = inceptions
    a, b = (features_of(ours, smooth(128, 75, seed))[:, :64].double() for seed in (1, 2))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert frechet_distance(a, b) == pytest.approx(next(iter(theirs.values())), rel=1e-4)
    assert kernel_distance(a, b, standardise=False).value == pytest.approx(poly_mmd(a, b).item(), rel=1e-4)


def test_dinov2_as_transformers_has_it():
    from transformers import AutoImageProcessor, AutoModel

    ours = TransformersVision.from_pretrained(DINOV2)
    processor, model = AutoImageProcessor.from_pretrained(DINOV2), AutoModel.from_pretrained(DINOV2).eval()
    pixels = smooth(4, 300)
    found = features_of(ours, pixels)
    with torch.no_grad():
        assert_alike(found, model(ours.preprocessor(pixels)).last_hidden_state[:, 0], 1e-4)
        taken = processor(images=list(as_bytes(pixels)), return_tensors="pt").pixel_values
        assert_alike(found, model(taken).last_hidden_state[:, 0], 2e-2)  # it rounds to bytes once resized


def test_clip_as_transformers_has_it():
    from transformers import CLIPModel, CLIPProcessor

    ours = Clip.from_pretrained(CLIP)
    model, processor = CLIPModel.from_pretrained(CLIP).eval(), CLIPProcessor.from_pretrained(CLIP)
    pixels, texts = smooth(3, 224), ["a photograph of a cat", "a red shoe", ""]
    tokens = processor(text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = model(pixel_values=ours.preprocessor(pixels), **tokens)
    assert_alike(features_of(ours, pixels), wanted.image_embeds, 1e-4)
    assert_alike(ours.texts(texts), wanted.text_embeds, 1e-4)
    cosines = wanted.logits_per_image.diagonal() / model.logit_scale.exp()
    found = Asked(text=texts, clip=ours, metrics=["clip_text"]).scores(pixels)["clip_text"]
    torch.testing.assert_close(found, cosines.detach(), rtol=1e-4, atol=1e-5)


def test_lpips_as_torchmetrics_has_it():
    pytest.importorskip("torchvision")
    import torchmetrics
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    a, b = smooth(1, 96, 1), smooth(1, 96, 2)
    wanted = learned_perceptual_image_patch_similarity(a, b, net_type="alex", normalize=True)
    heads = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    ours = Lpips.from_pretrained(hub_file("alexnet-owt-7be5be79.pth"), heads)
    assert ours(a, b).item() == pytest.approx(wanted.item(), rel=1e-4)
