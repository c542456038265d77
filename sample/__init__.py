"""Inference alone: torch, diffusers, transformers, safetensors. Never lightning, wandb or datasets."""
