"""A vision model small enough to be made in a test. Not a test module."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from tests.tiny_llama import config_of, make_tokenizer

SIDE, PATCH = 16, 4  # pixels
TOKENS = (SIDE // PATCH) ** 2  # of an image
# as hubs keep them for such models: contents are lists of parts
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}<|assistant|>"
)


def make_llava(folder: Path) -> Any:
    """Write a Llava of two layers for each of its halves, with its processor, to `folder`; returns the model."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = make_tokenizer(folder, "<image>")
    torch.manual_seed(6)
    language = config_of(tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
        initializer_range=0.3,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=tokenizer.token_to_id("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=TOKENS,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that what is seen counts in what is said
        for weight in model.model.multi_modal_projector.parameters():
            weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "extra_special_tokens": {"image_token": "<image>"}, "chat_template": TEMPLATE})
    )
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "LlavaProcessor", "patch_size": PATCH, "num_additional_image_tokens": 1,
                    "vision_feature_select_strategy": "default", "image_token": "<image>"})
    )  # fmt: skip
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE},
                    "crop_size": {"height": SIDE, "width": SIDE}})
    )  # fmt: skip
    return model


def picture(color: str, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> str:
    """The data URL of an image of one colour with a white corner."""
    from PIL import Image

    image = Image.new("RGB", size, color)
    image.paste("white", (0, 0, size[0] // 3, size[1] // 3))
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def seen(text: str, *urls: str) -> list[dict[str, Any]]:
    """A user's message with images, then a text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
