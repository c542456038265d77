"""Inference alone: torch, diffusers, transformers, safetensors. Never lightning, wandb or datasets."""

import logging

# diffusers imports bitsandbytes where it is installed, which then warns of an optional package that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
