"""The same MNIST MLP inside Lightning's Trainer."""

from blacksmith.registry import Experiment, Needs

EXPERIMENT = Experiment(
    name="lightning/mnist",
    summary="the same Keras 3 MLP inside Lightning's Trainer",
    configs="blacksmith.experiments.keras.mnist.configs",
    modes={
        "train": f"{__name__}.train:train",
        "eval": "blacksmith.experiments.keras.mnist.evaluate:evaluate",
        "export": "blacksmith.experiments.keras.mnist.evaluate:export",
    },
    backends={"torch": Needs("lightning", ("keras", "torch", "lightning"))},
    checkpoint_format="keras-arrays-2",
    uses_keras=True,
    weights="arrays.safetensors",
)
