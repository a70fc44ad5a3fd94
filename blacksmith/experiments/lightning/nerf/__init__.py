"""Radiance fields in Lightning: from posed images to new views, videos and meshes."""

from blacksmith.registry import Experiment, Needs

EXPERIMENT = Experiment(
    name="lightning/nerf",
    summary="radiance field of a Blender scene: voxel grid, or the NeRF paper's networks",
    configs=f"{__name__}.configs",
    modes={
        "train": f"{__name__}.train:train",
        "eval": f"{__name__}.evaluate:evaluate",
        "export": f"{__name__}.evaluate:export",
        "view": f"{__name__}.evaluate:view",
    },
    backends={
        "torch": Needs(
            "nerf",
            ("torch", "lightning", "PIL", "torchmetrics", "av", "scipy", "skimage", "trimesh", "viser"),
        )
    },
    checkpoint_format="nerf-lightning-2",
)
