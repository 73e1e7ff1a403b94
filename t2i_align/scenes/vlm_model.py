"""A tiny vision-language model of the world: stock LLaVA layout, whole words, 1.7 M parameters.

    64 x 64 picture -> FocalNet, stride 8 -> 64 tokens of width 128 -> projector -> Llama, 4 layers

FocalNet is the vision tower because it is convolutional inside (shapes are learnt from few
pictures), stock, and yields token sequences as LLaVA expects; its zero padding tells a token where
it is. The folder loads with AutoModelForImageTextToText and AutoProcessor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from t2i_align.scenes.grammar import COLORS, NUMBERS
from t2i_align.scenes.questions import FOREIGN
from t2i_align.scenes.render import CLASSES, SIDE
from t2i_align.scenes.vlm_pictures import GRID, PATCH

WIDTH = 128
TOWER: dict[str, Any] = {
    "model_type": "focalnet",
    "image_size": SIDE,
    "patch_size": 4,
    "embed_dim": WIDTH // 2,
    "hidden_sizes": [WIDTH // 2, WIDTH],
    "hidden_size": WIDTH,  # what LLaVA's projector asks for; FocalNet itself has no such field
    "depths": [2, 3],
    "focal_levels": [2, 2],
    "focal_windows": [3, 3],
    "use_conv_embed": True,
    "drop_path_rate": 0.0,
}
LANGUAGE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<user> ' if message['role'] == 'user' else '<assistant> ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else ' ' + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def vocabulary() -> list[str]:
    """Every word the model knows, special tokens first; words of :data:`FOREIGN` stay unknown."""
    numbers = ["one", *NUMBERS.values(), "many"]
    small = (
        "a an and answer are below above by can color colors does each exactly figure how image in "
        "is it left no not of on only or photo picture please right same see show shows than that "
        "the there they this to two what where which with yes you"
    ).split()
    marks = ['"', "'", ".", ",", "?", "!", ":", ";", "-", "(", ")"]
    words = [*small, *numbers, *COLORS, *CLASSES, *(f"{c}s" for c in CLASSES), *marks]
    assert not set(words) & set(FOREIGN)
    return [*SPECIAL, *dict.fromkeys(words)]


def tokenizer() -> Any:
    """A stock fast tokenizer, one token a word, case folded; other words are ``<unk>``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary())}
    core: Any = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    cut: Any = pre_tokenizers
    core.pre_tokenizer = cut.Sequence([cut.WhitespaceSplit(), cut.Punctuation()])
    build: Any = PreTrainedTokenizerFast
    return build(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(SPECIAL[4:]),
        padding_side="left",
        model_max_length=LANGUAGE["max_position_embeddings"],
    )


def processor() -> Any:
    """A stock LlavaProcessor: 64 x 64 pixels in [-1, 1], 64 ``<image>`` tokens, chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images: Any = CLIPImageProcessor
    build: Any = LlavaProcessor
    return build(
        image_processor=images(
            size={"height": SIDE, "width": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def new_model(seed: int) -> Any:
    """A fresh LlavaForConditionalGeneration."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    words = {word: i for i, word in enumerate(vocabulary())}
    ids = {
        f"{k}_token_id": words[w] for k, w in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))
    }
    build: Any = LlavaConfig
    config = build(
        vision_config=TOWER,
        text_config=LANGUAGE | {"vocab_size": len(words)} | ids,
        image_token_index=words["<image>"],
        image_seq_length=GRID * GRID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    generation: Any = model.generation_config
    for name, value in ids.items():
        setattr(generation, name, value)
    generation.do_sample, generation.max_new_tokens = False, 2
    return model


def save_folder(model: Any, out: Path) -> None:
    """Weights in float16 and the processor, as stock transformers reads them."""
    model.eval().half().save_pretrained(out)
    processor().save_pretrained(out)
    for file in out.glob("*.safetensors"):  # written for their owner alone
        file.chmod(0o644)
