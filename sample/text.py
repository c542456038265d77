"""Prompts as the frozen text encoders of latent diffusion take them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def null_tokens(pad: int, length: int = 77, bos: int = 49406, eos: int = 49407) -> Tensor:
    """Token ids (1, length) of the empty prompt. Stable Diffusion 1.x pads with `eos`, 2.x (open_clip) with 0; all are
    attended, so it matters."""
    return torch.tensor([[bos, eos, *[pad] * (length - 2)]])


@torch.no_grad()
def encode_tokens(text_encoder: nn.Module, ids: Tensor) -> Tensor:
    """Token ids (B, N) as float32 contexts (B, N, D): the last hidden state after the final norm."""
    device = next(text_encoder.parameters()).device
    return text_encoder(ids.to(device)).last_hidden_state.float()


def encode_text(
    text: Sequence[str] | Tensor,
    text_encoder: nn.Module | None,
    tokenizer: Any,
    encode: Callable[[nn.Module, Tensor], Tensor] = encode_tokens,
) -> Tensor:
    """Contexts (B, N, D) of prompts, of token ids (B, N), or as they are where they are encoded already.

    encode: what makes contexts of token ids. ValueError where the encoder, or for prompts the tokenizer, is not there.
    """
    if isinstance(text, Tensor) and text.is_floating_point():
        return text
    if text_encoder is None:
        raise ValueError("this model came without its text encoder, so text must be given encoded, as floats (B, N, D)")
    if isinstance(text, Tensor):
        return encode(text_encoder, text)
    if isinstance(text, str) or not all(isinstance(prompt, str) for prompt in text):
        raise ValueError(f"text must be a list of prompts, or a tensor of them encoded, got {type(text).__name__}")
    if tokenizer is None:
        raise ValueError("this model came without a tokenizer (an original file has none): give one as `tokenizer`")
    tokens = tokenizer(list(text), padding="max_length", truncation=True, return_tensors="pt")
    return encode(text_encoder, tokens.input_ids)


def null_text(text_encoder: nn.Module, tokenizer: Any) -> Tensor:
    """The context (1, N, D) of the empty prompt."""
    return encode_text([""], text_encoder, tokenizer)


def tiny_text(width: int = 16, length: int = 8) -> tuple[nn.Module, Any]:
    """A random text encoder and a tokenizer of single bytes, for tests and trial runs."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    return CLIPTextModel(config).requires_grad_(False).eval(), tokenizer
