"""Every editor by name: those whose outcome is merged into the weights, and those whose outcome is kept beside them."""

from __future__ import annotations

from kvllm.editing.adalora import AdaLoraEditor
from kvllm.editing.editor import Editor
from kvllm.editing.lora import FullEditor, LoraEditor
from kvllm.editing.neurons import NeuronEditor
from kvllm.editing.soft_prompts import METHODS

EDITORS: dict[str, type[Editor]] = {
    "adalora": AdaLoraEditor,
    "lora": LoraEditor,
    "full": FullEditor,
    "neurons": NeuronEditor,
}
KEPT = METHODS
