"""The same MNIST MLP inside Lightning's Trainer."""

from blacksmith.registry import Experiment, Needs

_ENTRY = f"{__name__}.train:main"

EXPERIMENT = Experiment(
    name="lightning/mnist",
    summary="the same Keras 3 MLP inside Lightning's Trainer",
    configs="blacksmith.experiments.keras.mnist.configs",
    modes={"train": _ENTRY, "eval": _ENTRY, "export": _ENTRY},
    backends={"torch": Needs("lightning", ("keras", "torch", "lightning"))},
    checkpoint_format="keras-arrays-1",
    uses_keras=True,
)
