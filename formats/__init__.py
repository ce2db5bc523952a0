"""Other people's files: weights and adapters, tokenizers, rows, images as cached features."""

from formats.adapters import load_adapter, save_adapter
from formats.checkpoint import find_device, fingerprint, load_llava, not_finite, save_llava
from formats.features import encode_images
from formats.readers import (
    Conversation, Pair, Prompt, captions_of, read_captions, read_conversations, read_pairs,
    read_prompts,
)
from formats.rows import DataError, open_image, report_skipped
from formats.state import latest_state, load_state, save_state

__all__ = [
    "Conversation", "DataError", "Pair", "Prompt", "captions_of", "encode_images", "find_device",
    "fingerprint", "latest_state", "load_adapter", "load_llava", "load_state", "not_finite",
    "open_image", "read_captions", "read_conversations", "read_pairs", "read_prompts",
    "report_skipped", "save_adapter", "save_llava", "save_state",
]
