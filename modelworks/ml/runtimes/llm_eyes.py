"""What a vision model sees: the images of messages, decoded within bounds, and the prompt in which they have their tokens.

Images come in the messages themselves, as data URLs; nothing is ever fetched. All of it runs in the replica.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelworks.core.errors import InvalidInput
from modelworks.ml.data.media import MAX_PIXELS, Unreadable, image_header, plain_image, raw

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# what a processor is made of, beside tokenizer.json; the first two say how an image becomes pixels
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class Eyes:
    """`mark` is the text that stands for an image where a chat template does not write one by itself."""

    def __init__(self, folder: Path) -> None:
        """InvalidInput for a processor that transformers does not load from `folder` without code of the model's own."""
        from transformers import AutoProcessor, ProcessorMixin

        try:
            self._processor = AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
            if not isinstance(self._processor, ProcessorMixin):  # where it knows no better, it takes a part for the whole
                raise TypeError("its settings name no processor of texts and images")
            self.mark = str(self._processor.image_token)
        except Exception as error:  # what the many processors raise on settings that are not sound, or on what is missing
            said = " ".join(str(error).split())[:300]
            raise InvalidInput(
                f"transformers cannot load this model's image processor: {said}; save it beside the model by "
                "processor.save_pretrained(FOLDER)",
                code="bad_model",
            ) from None

    def read(self, text: str, messages: list[dict[str, Any]]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The prompt's tokens, those of the images of `messages` among them, and what the model takes beside them.

        `text`: as the chat template made it. InvalidInput names the image that is none, or has too many pixels.
        """
        images = pictures(messages)
        try:
            found = self._processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        except Exception as error:  # a plug's edge; the images are sound, so it is the text that does not fit them
            said = " ".join(str(error).split())[:200]
            raise InvalidInput(
                f"the model's processor refuses these messages ({said}); leave {self.mark!r} out of the text, and do not send "
                "images that are a few pixels wide",
                param="messages",
            ) from None
        ids = found.pop("input_ids")[0].tolist()
        found.pop("attention_mask", None)  # one prompt, without padding
        return ids, dict(found)


def pictures(messages: list[dict[str, Any]]) -> list[Image]:
    """The images of checked messages, in RGB. InvalidInput names the one that cannot be read, or is too much."""
    found: list[tuple[str, bytes]] = []
    for index, message in enumerate(messages):
        parts = message["content"] if isinstance(message["content"], list) else []
        for at, part in enumerate(parts):
            if part["type"] == "image_url":
                found.append((f"messages[{index}].content[{at}]", raw(part["image_url"]["url"].encode())))
    pixels = 0  # of all of them: the headers tell, before anything is decoded
    for place, data in found:
        with _named(place):
            head = image_header(data)
            pixels += head["width"] * head["height"]
            if pixels > MAX_PIXELS:
                raise Unreadable(f"and those before it have more than {MAX_PIXELS} pixels; send smaller ones")
    images = []
    for place, data in found:
        with _named(place):
            images.append(plain_image(data))
    return images


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise InvalidInput(f"{place} {error}", code="invalid_image", param=place) from None
