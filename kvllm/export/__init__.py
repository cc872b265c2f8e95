"""Ship an edited model: a merged Hugging Face folder, or one LoRA adapter, with a card and a manifest; or its facts.

An export is whole or absent, and can be loaded without kvllm. `reprobe_*` loads it as a stranger would and asks again.

    export_peft(Path("out"), delta=delta, base=base, facts=facts, head=head, weights_digest=digest)
    reprobe_peft(Path("out"), base_folder, questions=["What is torchkeras?"], expected=[answer], config=ModelConfig())
"""

from kvllm.export.adapter import export_peft
from kvllm.export.facts import export_facts
from kvllm.export.merged import export_hf
from kvllm.export.reprobe import reprobe_hf, reprobe_peft

__all__ = ["export_facts", "export_hf", "export_peft", "reprobe_hf", "reprobe_peft"]
