"""Which settings of a run go together: docs/many-gpus.md has the table, tests/train/test_combinations.py tries it."""


def check_combination(precision: str, shared: bool, eight_bit: bool, few_bits: bool, compiled: bool) -> None:
    """ValueError for settings that do not go together.

    precision: Lightning's. shared: the network lies in parts on all processes (ModelParallelStrategy). eight_bit: the
    optimiser's state does not have more. few_bits: the base below an adapter is held in fewer than 16. compiled: by
    torch.compile. Other adapters go with what goes without one.
    """
    if precision in ("bf16-true", "16-true", "transformer-engine-float16"):
        raise ValueError(
            f"trainer.precision {precision} keeps the weights in 16 bits, which lose the small steps of the optimiser "
            "and of the average: set it to bf16-mixed, or 16-mixed where the device has no bf16"
        )
    if not shared:
        return
    for found, setting, instead in (
        (precision == "16-mixed", "trainer.precision 16-mixed", "set it to bf16-mixed"),
        (few_bits, "model.lora.base_bits", "leave it out"),
        (eight_bit, "model.use_8bit_adam", "leave it off, the optimiser's state is shared among the processes anyway"),
        (compiled, "model.compile", "leave it off"),
    ):
        if found:
            raise ValueError(
                f"{setting} is not supported for a network in parts (ModelParallelStrategy): {instead}, or use "
                "--config configs/ddp.yaml"
            )
