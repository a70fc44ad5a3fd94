"""Fine-tuning Llama on SST-2 in a plain PyTorch loop."""

from blacksmith.registry import Experiment, Needs

EXPERIMENT = Experiment(
    name="pytorch/llama",
    summary="Llama fine-tuned on SST-2 with LoRA, the shared prompt prefix computed once per batch",
    configs=f"{__name__}.configs",
    modes={
        "train": f"{__name__}.train:train",
        "eval": f"{__name__}.evaluate:evaluate",
        "export": f"{__name__}.evaluate:export",
    },
    backends={"torch": Needs("llama", ("torch", "transformers", "peft", "datasets", "accelerate", "gguf"))},
    checkpoint_format="llama-peft-4",
    external_weights="adapter_config.json",
)
