"""The MNIST MLP, written once on Keras 3 and trained on JAX or PyTorch."""

from blacksmith.registry import Experiment, Needs

_ENTRY = f"{__name__}.train:main"

EXPERIMENT = Experiment(
    name="keras/mnist",
    summary="MNIST MLP written once on Keras 3, on JAX or PyTorch",
    configs=f"{__name__}.configs",
    modes={"train": _ENTRY, "eval": _ENTRY, "export": _ENTRY},
    backends={
        "jax": Needs("jax", ("keras", "jax")),
        "torch": Needs("torch", ("keras", "torch")),
    },
    checkpoint_format="keras-arrays-1",
    uses_keras=True,
)
