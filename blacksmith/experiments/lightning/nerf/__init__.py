"""Radiance fields in Lightning: from posed images to new views, videos and meshes."""

from blacksmith.registry import Experiment, Needs

_ENTRY = f"{__name__}.train:main"

EXPERIMENT = Experiment(
    name="lightning/nerf",
    summary="radiance field of a Blender scene: voxel grid, or the NeRF paper's networks",
    configs=f"{__name__}.configs",
    modes={"train": _ENTRY, "eval": _ENTRY, "export": _ENTRY, "view": _ENTRY},
    backends={
        "torch": Needs(
            "nerf",
            ("torch", "lightning", "PIL", "torchmetrics", "imageio_ffmpeg", "scipy", "skimage", "viser"),
        )
    },
    checkpoint_format="nerf-lightning-2",
)
