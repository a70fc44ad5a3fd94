"""The MNIST MLP, written once on Keras 3 and trained on JAX or PyTorch."""

from blacksmith.registry import Experiment, Needs

EXPERIMENT = Experiment(
    name="keras/mnist",
    summary="MNIST MLP written once on Keras 3, on JAX or PyTorch",
    configs=f"{__name__}.configs",
    modes={
        "train": f"{__name__}.train:train",
        "eval": f"{__name__}.evaluate:evaluate",
        "export": f"{__name__}.evaluate:export",
    },
    backends={
        "jax": Needs("jax", ("keras", "jax")),
        "torch": Needs("torch", ("keras", "torch")),
    },
    checkpoint_format="keras-arrays-2",
    uses_keras=True,
    weights="arrays.safetensors",
)
