"""The MNIST MLP, written once on Keras 3 and trained on JAX or PyTorch."""

from blacksmith.registry import Experiment, Needs

EXPERIMENT = Experiment(
    name="keras/mnist",
    summary="MNIST MLP written once on Keras 3, on JAX or PyTorch",
    configs=f"{__name__}.configs",
    modes=dict.fromkeys(("train", "eval", "export"), f"{__name__}.train:main"),
    backends={
        "jax": Needs("jax", ("keras", "jax")),
        "torch": Needs("torch", ("keras", "torch")),
    },
    checkpoint_format="keras-arrays-2",
    uses_keras=True,
    weights="arrays.safetensors",
)
