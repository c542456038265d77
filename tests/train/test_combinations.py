"""Precision x strategy x adapter x optimiser: each works, or is refused with the docs' sentence."""

import itertools
from pathlib import Path

import pytest
import torch
from fits import Pictures, trainer, tuning
from interrupted import fit, held, make_pictures
from oracle import pixel_model
from pairs import log, run

from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.train.adapters import Lora
from priorguide.train.combinations import check_combination, check_size
from priorguide.train.fine_tune import FineTune

DOCS = Path(__file__).parent.parent.parent / "docs" / "many-gpus.md"
WHOLE = {"shared": False, "eight_bit": False, "few_bits": False, "compiled": False}
PARTS = WHOLE | {"shared": True}
REFUSED = [
    ("bf16-true", WHOLE),
    ("16-true", PARTS),
    ("16-mixed", PARTS),
    *[("bf16-mixed", PARTS | {name: True}) for name in ("eight_bit", "few_bits", "compiled")],
]


@pytest.mark.parametrize(("precision", "settings"), REFUSED)
def test_what_is_refused_says_so_in_the_docs(precision, settings):
    with pytest.raises(ValueError) as refused:
        check_combination(precision, **settings)
    told = str(refused.value).replace(f"trainer.precision {precision}", "trainer.precision PRECISION")
    assert told in " ".join(DOCS.read_text().split())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_whole_networks_take_everything_else(precision):
    for chosen in itertools.product((False, True), repeat=3):
        check_combination(precision, **(WHOLE | dict(zip(("eight_bit", "few_bits", "compiled"), chosen, strict=True))))


def test_a_run_is_refused_before_its_first_step(tmp_path):
    tune = tuning()
    with pytest.raises(ValueError, match="trainer.precision bf16-true keeps the weights in 16 bits"):
        trainer(tmp_path, 1, precision="bf16-true").fit(tune, Pictures())
    assert tune.global_step == 0


@pytest.mark.parametrize("model", [pixel_model(), InstructPix2Pix.tiny()], ids=["pixels", "latents"])
def test_pictures_of_another_size_than_the_models_are_refused(tmp_path, model):
    data = Pictures()
    check_size(model, Images(16))
    with pytest.raises(ValueError, match=r"must be 16 x 16 .*, got 12 x 20: make data.init_args.resolution that of"):
        check_size(model, Images(12, 20))
    data.held_part["pixels"] = data.held_part["pixels"][..., ::2, ::2]
    with pytest.raises(ValueError, match="got 8 x 8"):
        trainer(tmp_path, 1).fit(tuning(), data)


class Images:
    def __init__(self, height, width=None):
        self.sides = height, width or height

    def held_out(self, n):
        return {"pixels": torch.zeros(n, 1, *self.sides)}


def test_a_compiled_network_is_refused():
    model = pixel_model()
    model.network = torch.compile(model.network)
    with pytest.raises(ValueError, match="give the model its network, and set compile") as refused:
        FineTune(model)
    assert str(refused.value) in " ".join(DOCS.read_text().split())


COMBINATIONS = [
    {"precision": precision, **adapter, **optimiser}
    for precision in ("32-true", "bf16-mixed")
    for adapter in ({}, {"lora": Lora(rank=2, target_modules=("convolutions",))})
    for optimiser in ({}, {"use_8bit_adam": True})
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_every_combination(tmp_path, kind):
    """Two steps with a comparison, a checkpoint and, resumed, another step; or the sentence, and no checkpoint."""
    pictures = make_pictures(tmp_path / "pictures")
    for number, options in enumerate(COMBINATIONS):
        folder = tmp_path / str(number)
        refused = kind == "fsdp" and "use_8bit_adam" in options
        for steps, resume in ((2, False), (3, True)) if not refused else ((2, False),):
            settings = {"pictures": pictures, "steps": steps, "every": 2, "resume": resume, **options}
            if kind == "one":
                fit(folder=folder, workers=0, **settings)
            else:
                run(folder, codes=(1, 1) if refused else (0, 0), kind=kind, **settings)
        if refused:
            assert "use_8bit_adam is not supported" in log(folder, 0).read_text()
            assert not (folder / "checkpoints").exists()
            continue
        state = held(folder)
        assert state["global_step"] == 3 and len(state["history"][0]) == 1
        assert all(tensor.isfinite().all() for tensor in state["state_dict"].values() if tensor.is_floating_point())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "options",
    [{"lora": Lora(rank=2, base_bits="nf4")}, {"lora": Lora(rank=2, base_bits="int8")}, {"compile": True}],
    ids=["nf4", "int8", "compile"],
)
def test_what_needs_networks_that_are_whole(tmp_path, kind, options):
    settings = {"pictures": make_pictures(tmp_path / "pictures"), "every": 2, "kind": kind, **options}
    folder, refused = tmp_path / "run", kind == "fsdp"
    run(folder, codes=(1, 1) if refused else (0, 0), steps=2, **settings)
    if refused:
        key = "model.compile" if "compile" in options else "model.lora.base_bits"
        assert f"{key} is not supported" in log(folder, 0).read_text()
        return
    run(folder, steps=3, resume=True, **settings)
    state = held(folder)
    assert state["global_step"] == 3 and len(state["history"][0]) == 1
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values() if tensor.is_floating_point())
