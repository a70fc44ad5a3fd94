"""Models the NeRF scene in `blacksmith/datasets/blender/anvil/` and renders it with Blender's Cycles.

Run once by a maintainer in a separate environment, since Blender's wheel needs Python 3.11 and numpy 1:

    pip install '.[scene]'
    python tools/make_anvil.py OUTPUT_DIR

The bundled images were rendered with bpy 4.5.15 (Blender 4.5 LTS). On a headless Debian, bpy also needs
`apt-get install libxrender1 libxi6 libxxf86vm1 libxfixes3 libxkbcommon0 libsm6 libgl1 libegl1`.

The scene is an anvil on an oak stump, with a hammer, a hot bar, a chain and a horseshoe. There is no model
file: everything is lofted from cross-sections, and all randomness is seeded. The output has the layout of the
"NeRF synthetic" scenes: `transforms_{train,val,test}.json` and RGBA images with straight alpha. A world unit
is about 30 cm, z is up, and everything lies within [-1.3, 1.3]^3.
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import bpy  # isort: skip (it makes bmesh and mathutils importable)
import bmesh
import numpy as np
from mathutils import Matrix, Vector
from PIL import Image

RESOLUTION = 200
SAMPLES = 256
CAMERA_RADIUS = 4.0311
CAMERA_ANGLE_X = 0.6911112070083618
FRAMES = {"train": 100, "val": 20, "test": 20}
SEED = 7

BOTTOM = -1.02  # bottom of the stump
STUMP_TOP = -0.27
STUMP_RADIUS = 0.72
FACE = 0.58  # height of the anvil's face

Section = list[tuple[float, float, float]]
Value = float | Sequence[float] | bpy.types.NodeSocket


# Geometry


def loft(sections: Sequence[Section], caps: bool = True, closed: bool = False) -> bmesh.types.BMesh:
    """Skins outlines with equal numbers of points; `caps` fills the ends, `closed` joins them."""
    mesh = bmesh.new()
    rows = [[mesh.verts.new(point) for point in section] for section in sections]
    count = len(rows[0])
    for lower, upper in zip(rows, rows[1:] + rows[:1] if closed else rows[1:]):
        for i in range(count):
            j = (i + 1) % count
            mesh.faces.new((lower[i], lower[j], upper[j], upper[i]))
    if caps and not closed:
        mesh.faces.new(rows[0][::-1])
        mesh.faces.new(rows[-1])
    bmesh.ops.recalc_face_normals(mesh, faces=mesh.faces)
    return mesh


def superellipse(half_x: float, half_y: float, power: float, count: int = 64) -> list[tuple[float, float]]:
    """An outline between an ellipse (power 2) and a rectangle (a large power)."""

    def squared(value: float) -> float:
        return math.copysign(abs(value) ** (2 / power), value)

    angles = [2 * math.pi * (i + 0.5) / count for i in range(count)]
    return [(squared(math.cos(angle)) * half_x, squared(math.sin(angle)) * half_y) for angle in angles]


def tube(
    path: Sequence[Vector], outline: Sequence[tuple[float, float]], closed: bool = False
) -> bmesh.types.BMesh:
    """Sweeps an outline along a path in the xy plane."""
    up = Vector((0, 0, 1))
    sections = []
    for i, point in enumerate(path):
        before = path[i - 1] if closed or i > 0 else point
        after = path[(i + 1) % len(path)] if closed or i + 1 < len(path) else point
        side = (after - before).normalized().cross(up).normalized()
        sections.append([tuple(point + side * u + up * v) for u, v in outline])
    return loft(sections, closed=closed)


def box(low: Sequence[float], high: Sequence[float]) -> bmesh.types.BMesh:
    """An axis-aligned box between two corners."""
    (x0, y0, z0), (x1, y1, z1) = low, high
    return loft([[(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)] for z in (z0, z1)])


def add(
    name: str,
    mesh: bmesh.types.BMesh,
    material: bpy.types.Material | None,
    place: Matrix | None = None,
    bevel: float = 0.0,
    cutters: Sequence[bpy.types.Object] = (),
) -> bpy.types.Object:
    """Adds a mesh to the scene, cut by `cutters` and with sharp edges rounded by `bevel`."""
    data = bpy.data.meshes.new(name)
    mesh.to_mesh(data)
    mesh.free()
    thing = bpy.data.objects.new(name, data)
    bpy.context.scene.collection.objects.link(thing)
    if material is not None:
        data.materials.append(material)
    if place is not None:
        thing.matrix_world = place
    for cutter in cutters:
        cut = thing.modifiers.new("cut", "BOOLEAN")
        cut.object = cutter
        cutter.hide_render = True
    if bevel:
        rounding = thing.modifiers.new("bevel", "BEVEL")
        rounding.width = bevel
        rounding.segments = 3
        rounding.limit_method = "ANGLE"
        rounding.angle_limit = math.radians(35)
        rounding.harden_normals = True
    data.shade_smooth()
    data.set_sharp_from_angle(angle=math.radians(35))
    return thing


def frame(origin: Vector, x: Vector, y: Vector) -> Matrix:
    """The transform with the given origin and x axis, and y as close to the given one as possible."""
    x = x.normalized()
    y = (y - x * y.dot(x)).normalized()
    matrix = Matrix((x, y, x.cross(y))).transposed().to_4x4()
    matrix.translation = origin
    return matrix


# Materials


class Shader:
    """Builds a material or a world, with short names for the few nodes needed here."""

    def __init__(self, owner: bpy.types.Material | bpy.types.World) -> None:
        self.owner = owner
        owner.use_nodes = True
        self.tree = owner.node_tree
        sky = isinstance(owner, bpy.types.World)
        self.surface = self.tree.nodes["Background" if sky else "Principled BSDF"]
        # The position in object coordinates, or the direction for the sky.
        self.place = self.node("ShaderNodeTexCoord").outputs["Generated" if sky else "Object"]
        self.normal = self.node("ShaderNodeNewGeometry").outputs["Normal"]

    def node(
        self, kind: str, inputs: dict[str | int, Value] | None = None, **settings: object
    ) -> bpy.types.Node:
        """Adds a node; `inputs` are values or outputs of other nodes."""
        node = self.tree.nodes.new(kind)
        for key, value in settings.items():
            setattr(node, key, value)
        for key, value in (inputs or {}).items():
            self.set(node.inputs[key], value)
        return node

    def set(self, socket: bpy.types.NodeSocket, value: Value) -> None:
        """Sets an input to a value or links it to an output."""
        if isinstance(value, bpy.types.NodeSocket):
            self.tree.links.new(value, socket)
        else:
            socket.default_value = value

    def math(self, operation: str, *values: Value) -> bpy.types.NodeSocket:
        """A scalar operation."""
        return self.node("ShaderNodeMath", dict(enumerate(values)), operation=operation).outputs[0]

    def axis(self, name: str, vector: Value | None = None) -> bpy.types.NodeSocket:
        """One coordinate of a vector, by default of the position."""
        return self.node("ShaderNodeSeparateXYZ", {0: vector or self.place}).outputs[name]

    def noise(
        self, scale: Sequence[float] | float, detail: float = 3.0, distortion: float = 0.0
    ) -> bpy.types.NodeSocket:
        """Noise of about 0.3 to 0.7, stretched where the three scales differ."""
        scales = (scale, scale, scale) if isinstance(scale, (int, float)) else scale
        place = self.node("ShaderNodeVectorMath", {0: self.place, 1: scales}, operation="MULTIPLY").outputs[0]
        inputs = {"Vector": place, "Scale": 1.0, "Detail": detail, "Distortion": distortion}
        return self.node("ShaderNodeTexNoise", inputs).outputs[0]

    def ramp(self, value: Value, stops: Sequence[tuple[float, Sequence[float]]]) -> bpy.types.NodeSocket:
        """Maps a scalar to a color, linear between stops of (position, linear RGB)."""
        node = self.node("ShaderNodeValToRGB", {0: value})
        while len(node.color_ramp.elements) < len(stops):
            node.color_ramp.elements.new(1.0)
        for element, (position, color) in zip(node.color_ramp.elements, stops):
            element.position = position
            element.color = (*color, 1.0)
        return node.outputs[0]

    def step(
        self, value: Value, low: float, high: float, to_low: float = 0.0, to_high: float = 1.0
    ) -> bpy.types.NodeSocket:
        """A smooth step between two thresholds."""
        inputs = {"Value": value, "From Min": low, "From Max": high, "To Min": to_low, "To Max": to_high}
        return self.node("ShaderNodeMapRange", inputs, interpolation_type="SMOOTHSTEP").outputs[0]

    def mix(self, factor: Value, first: Value, second: Value) -> bpy.types.NodeSocket:
        """A mix of two colors."""
        node = self.node("ShaderNodeMix", data_type="RGBA")
        # Sockets of a mix node share names across data types; 0, 6 and 7 are those for colors.
        for index, value in ((0, factor), (6, first), (7, second)):
            value = value if isinstance(value, (float, bpy.types.NodeSocket)) else (*value, 1.0)
            self.set(node.inputs[index], value)
        return node.outputs[2]

    def scale(self, color: Value, factor: Value) -> bpy.types.NodeSocket:
        """A darker or lighter color."""
        return self.node("ShaderNodeVectorMath", {0: color, "Scale": factor}, operation="SCALE").outputs[0]

    def bump(self, height: Value, distance: float) -> bpy.types.NodeSocket:
        """A normal for a rough surface."""
        return self.node("ShaderNodeBump", {"Height": height, "Distance": distance}).outputs[0]

    def finish(self, **inputs: Value) -> bpy.types.Material:
        """Sets the inputs of the surface (spaces in names become _) and returns the material."""
        for key, value in inputs.items():
            if key == "Base_Color" and not isinstance(value, bpy.types.NodeSocket):
                value = (*value, 1.0)
            self.set(self.surface.inputs[key.replace("_", " ")], value)
        return self.owner


def forged(shader: Shader) -> bpy.types.NodeSocket:
    """The color of forged iron: blue-black scale with some rust."""
    scale = shader.ramp(shader.noise(9.0, 5.0), [(0.3, (0.022, 0.026, 0.034)), (0.72, (0.105, 0.108, 0.115))])
    rust = shader.step(shader.noise(5.0, 6.0), 0.56, 0.7, 0.0, 0.75)
    return shader.mix(rust, scale, (0.16, 0.062, 0.026))


def steel_material(name: str, polish: Callable[[Shader], bpy.types.NodeSocket]) -> bpy.types.Material:
    """Iron that is bright and polished where `polish` is 1, forged and dark where it is 0."""
    shader = Shader(bpy.data.materials.new(name))
    where = polish(shader)
    streaks = shader.math("MULTIPLY", shader.noise((3.0, 60.0, 60.0), 2.0), 0.1)
    bright = shader.ramp(shader.noise(4.0, 5.0), [(0.3, (0.50, 0.505, 0.52)), (0.7, (0.72, 0.715, 0.70))])
    dents = shader.math("MULTIPLY", shader.noise(14.0, 4.0), shader.math("SUBTRACT", 1.03, where))
    return shader.finish(
        Base_Color=shader.mix(where, forged(shader), bright),
        Metallic=shader.step(where, 0.0, 1.0, 0.55, 1.0),
        # Rough enough that the highlight is a smooth lobe a radiance field can hold.
        Roughness=shader.math("ADD", shader.step(where, 0.0, 1.0, 0.5, 0.27), streaks),
        Normal=shader.bump(dents, 0.03),
    )


def wood_material(
    name: str, rings: float, bright: Sequence[float], dark: Sequence[float]
) -> bpy.types.Material:
    """Wood with its grain along the local z axis and `rings` growth rings per unit around it."""
    shader = Shader(bpy.data.materials.new(name))
    x, y, z = (shader.axis(axis) for axis in "XYZ")
    # The rings vary slowly along the trunk and are neither quite round nor centered.
    squares = [shader.math("POWER", value, 2.0) for value in (shader.math("ADD", x, 0.06), y)]
    wobble = shader.math("MULTIPLY", shader.noise((3.0, 3.0, 0.7), 3.0), 0.16)
    radius = shader.math("ADD", shader.math("SQRT", shader.math("ADD", *squares)), wobble)
    ring = shader.math("FRACT", shader.math("MULTIPLY", radius, rings))
    late = shader.math("POWER", ring, 2.5)  # a ring darkens slowly and ends sharply
    fiber = shader.noise((22.0, 22.0, 1.3), 5.0, 0.4)
    patches = shader.noise((3.5, 3.5, 1.2), 2.0)
    along = shader.math("SUBTRACT", 1.0, shader.math("ABSOLUTE", shader.axis("Z", shader.normal)))
    along = shader.step(along, 0.3, 0.8)  # 1 where the surface runs with the grain, 0 on end grain
    late = shader.math("MULTIPLY", late, shader.step(along, 0.0, 1.0, 0.85, 0.45))
    fiber = shader.step(fiber, 0.3, 0.72, 0.0, 0.75)
    fiber = shader.math("MULTIPLY", fiber, shader.step(along, 0.0, 1.0, 0.3, 1.0))
    grain = shader.math("ADD", late, fiber)
    color = shader.mix(grain, bright, dark)
    color = shader.scale(color, shader.step(patches, 0.3, 0.7, 0.72, 1.2))
    # Dirt gathers at the foot of the trunk.
    if name == "stump":
        color = shader.scale(color, shader.step(z, BOTTOM, BOTTOM + 0.35, 0.5, 1.0))
        color = shader.scale(color, shader.step(along, 0.0, 1.0, 1.3, 1.0))
    return shader.finish(Base_Color=color, Roughness=0.62, Normal=shader.bump(grain, -0.012))


def plain_material(
    name: str, color: Sequence[float], metallic: float, roughness: float
) -> bpy.types.Material:
    """Paint or metal of one color, with a little wear."""
    shader = Shader(bpy.data.materials.new(name))
    wear = shader.step(shader.noise(16.0, 4.0), 0.3, 0.7, 0.75, 1.15)
    return shader.finish(
        Base_Color=shader.scale(color, wear),
        Metallic=metallic,
        Roughness=roughness,
        Normal=shader.bump(shader.noise(24.0, 3.0), 0.01),
    )


def iron_material() -> bpy.types.Material:
    """Forged iron for the small parts."""
    shader = Shader(bpy.data.materials.new("iron"))
    return shader.finish(
        Base_Color=shader.scale(forged(shader), 1.15),
        Metallic=0.6,
        Roughness=0.45,
        Normal=shader.bump(shader.noise(18.0, 4.0), 0.015),
    )


def hot_material(cold: float, hot: float) -> bpy.types.Material:
    """Iron that starts to glow at local x = `cold` and is yellow at x = `hot`."""
    shader = Shader(bpy.data.materials.new("hot"))
    heat = shader.math("ADD", shader.axis("X"), shader.math("MULTIPLY", shader.noise(12.0, 3.0), 0.08))
    heat = shader.node("ShaderNodeMapRange", {"Value": heat, "From Min": cold, "From Max": hot}).outputs[0]
    glow = shader.ramp(
        heat,
        [
            (0.0, (0.0, 0.0, 0.0)),
            (0.25, (0.10, 0.006, 0.001)),
            (0.5, (0.55, 0.04, 0.004)),
            (0.8, (0.95, 0.22, 0.015)),
            (1.0, (1.0, 0.46, 0.06)),
        ],
    )
    return shader.finish(
        Base_Color=shader.scale(forged(shader), 0.6),
        Metallic=0.3,
        Roughness=0.5,
        Emission_Color=glow,
        Emission_Strength=1.0,
    )


# The parts of the scene


def stump_radius(angle: float) -> float:
    """The stump's radius, which is not quite constant."""
    return STUMP_RADIUS + 0.014 * math.sin(2 * angle + 0.6) + 0.009 * math.sin(5 * angle + 2.0)


def on_stump(angle: float, height: float, out: float = 0.0) -> Vector:
    """A point on the stump's side, or `out` in front of it."""
    radius = stump_radius(angle) + out
    return Vector((radius * math.cos(angle), radius * math.sin(angle), height))


def build_stump(iron: bpy.types.Material, rng: np.random.Generator) -> None:
    """The stump with drying cracks, two iron bands and their rivets."""
    wood = wood_material("stump", 17.0, (0.36, 0.18, 0.072), (0.10, 0.04, 0.016))
    cracks = [
        (a, rng.uniform(0.07, 0.2), rng.uniform(0.3, 0.75)) for a in (0.5, 1.45, 2.3, 3.3, 4.15, 4.9, 5.75)
    ]
    count = 480
    # Axe marks: fine ripples around the trunk that shift with height.
    ripples = [(int(n), rng.uniform(0, 2 * math.pi)) for n in rng.integers(24, 150, size=16)]

    def outline(height: float, shrink: float) -> Section:
        depth = STUMP_TOP - height
        points = []
        for i in range(count):
            angle = 2 * math.pi * i / count
            radius = stump_radius(angle) - shrink
            radius += sum(0.0008 * math.sin(n * angle + phase + 1.5 * depth) for n, phase in ripples)
            for where, deep, length in cracks:
                away = abs(
                    (angle - where - 0.05 * math.sin(6 * depth + where) + math.pi) % (2 * math.pi) - math.pi
                )
                radius -= deep * max(0.0, 1 - depth / length) * max(0.0, 1 - away / 0.035)
            radius += 0.035 * max(0.0, (depth - 0.55) / 0.2) ** 2  # the root flare
            points.append((radius * math.cos(angle), radius * math.sin(angle), height))
        return points

    levels = [(BOTTOM, 0.02), (BOTTOM + 0.02, 0.0)]
    levels += [(float(height), 0.0) for height in np.linspace(BOTTOM + 0.04, STUMP_TOP - 0.03, 24)]
    levels += [(STUMP_TOP - 0.012, 0.004), (STUMP_TOP - 0.003, 0.012), (STUMP_TOP, 0.022)]
    add("stump", loft([outline(*level) for level in levels]), wood)

    for height in (-0.40, -0.89):
        profile = [(0.028, -0.048), (0.028, 0.048), (-0.03, 0.048), (-0.03, -0.048)]
        flare = 0.012 if height < -0.6 else 0.0
        sections = []
        for i in range(180):
            angle = 2 * math.pi * i / 180
            sections.append([tuple(on_stump(angle, height + up, out + flare)) for out, up in profile])
        add("band", loft(sections, closed=True), iron, bevel=0.008)
        for i in range(14):
            rivet = bmesh.new()
            bmesh.ops.create_uvsphere(rivet, u_segments=20, v_segments=12, radius=0.027)
            angle = 2 * math.pi * (i + 0.5) / 14
            add("rivet", rivet, iron, Matrix.Translation(on_stump(angle, height, 0.026 + flare)))


def build_anvil() -> None:
    """The anvil: feet and waist, the body with face, step and holes, and the horn."""
    base, waist, neck = STUMP_TOP, STUMP_TOP + 0.36, FACE - 0.25

    def near_face(shader: Shader) -> bpy.types.NodeSocket:
        chips = shader.math("MULTIPLY", shader.noise(9.0, 4.0), 0.07)
        return shader.step(shader.math("ADD", shader.axis("Z"), chips), FACE - 0.035, FACE + 0.015)

    body = steel_material("anvil", near_face)
    sections = []
    for height in [*np.linspace(base, base + 0.13, 5), *np.linspace(base + 0.14, neck + 0.05, 40)]:
        down = min(1.0, max(0.0, (waist - height) / (waist - base - 0.13)))
        up = max(0.0, (height - waist) / (neck - waist))
        front = 0.25 + 0.27 * down**2.2 + 0.29 * up**2.4
        back = 0.25 + 0.27 * down**2.2 + 0.26 * up**2.2
        side = 0.145 + 0.17 * down**2.4 + 0.03 * up**2
        edge = 0.02 * max(0.0, 1 - (height - base) / 0.02)  # a chamfer around the bottom
        section = []
        for x, y in superellipse(1.0, 1.0, 5.0 + 2.0 * down, 128):
            # Seen from above, the foot is concave between its four toes.
            long = (front if x > 0 else back) * (1 - 0.12 * down * (1 - y * y)) - edge
            wide = side * (1 - 0.2 * down * (1 - x * x)) - edge
            section.append((x * long - 0.06, y * wide, float(height)))
        sections.append(section)
    add("waist", loft(sections), body)

    silhouette = [
        (-0.94, 0.0), (0.34, 0.0), (0.34, -0.055), (0.51, -0.055), (0.51, -0.315),
        (0.40, -0.33), (-0.38, -0.30), (-0.60, -0.20), (-0.94, -0.15),
    ]  # fmt: skip
    sections = [[(x, y, FACE + z) for x, z in silhouette] for y in (-0.185, 0.185)]
    hardy = add("hardy", box((-0.80, -0.052, FACE - 0.4), (-0.696, 0.052, FACE + 0.1)), None)
    pritchel = bmesh.new()
    bmesh.ops.create_cone(pritchel, segments=32, radius1=0.03, radius2=0.03, depth=0.6, cap_ends=True)
    pritchel = add("pritchel", pritchel, None, Matrix.Translation((-0.865, 0.11, FACE)))
    add("body", loft(sections), body, bevel=0.014, cutters=(hardy, pritchel))

    def above(shader: Shader) -> bpy.types.NodeSocket:
        facing = shader.math("ADD", shader.axis("Z", shader.normal), shader.noise(7.0, 4.0))
        return shader.step(facing, -0.25, 0.55)

    sections = []
    length = 0.66
    for u in [*np.linspace(0, 0.9, 28), *(1 - 0.1 * np.linspace(1, 0.004, 16)[1:] ** 2)]:
        slim = (1 - u) ** 0.72
        top = FACE - 0.062 + 0.035 * u * u
        high = 0.012 + 0.125 * slim
        outline = superellipse(0.012 + 0.165 * slim, high, 2.0 + 2.2 * max(0.0, 1 - u / 0.35) ** 2, 72)
        sections.append([(0.49 + length * u, y, top - high + z) for y, z in outline])
    add("horn", loft(sections), steel_material("horn", above))


def build_hammer() -> None:
    """A cross-peen hammer on the face, its handle in the air."""

    def ends(shader: Shader) -> bpy.types.NodeSocket:
        wear = shader.math("MULTIPLY", shader.noise(9.0, 4.0), 0.08)
        return shader.step(shader.math("ADD", shader.math("ABSOLUTE", shader.axis("X")), wear), 0.165, 0.2)

    head = [
        (-0.205, 0.05, 0.05, 6), (-0.2, 0.062, 0.062, 6), (-0.13, 0.066, 0.066, 6), (-0.115, 0.06, 0.06, 4),
        (-0.08, 0.05, 0.052, 3), (-0.06, 0.058, 0.062, 5), (0.06, 0.058, 0.062, 5), (0.08, 0.053, 0.056, 4),
        (0.14, 0.055, 0.036, 5), (0.2, 0.06, 0.015, 5), (0.208, 0.056, 0.008, 5),
    ]  # fmt: skip
    sections = [[(x, y, z) for y, z in superellipse(wide, high, power, 72)] for x, wide, high, power in head]
    # Local x runs along the head, local y along the handle.
    aim = math.radians(243)
    along = Vector((math.cos(aim), math.sin(aim), 0.03))
    place = frame(Vector((-0.32, 0.03, FACE + 0.064)), Vector((-math.sin(aim), math.cos(aim), 0)), along)
    add("head", loft(sections), steel_material("hammer", ends), place, bevel=0.006)

    ash = wood_material("handle", 60.0, (0.62, 0.36, 0.15), (0.30, 0.13, 0.045))
    red = plain_material("red", (0.48, 0.028, 0.02), 0.0, 0.38)
    stations = [
        (-0.085, 0.028, 0.020), (0.06, 0.03, 0.022), (0.1, 0.024, 0.02), (0.25, 0.023, 0.02),
        (0.5, 0.031, 0.025), (0.66, 0.033, 0.027),
    ]  # fmt: skip
    tip = [(0.66, 0.034, 0.028), (0.76, 0.038, 0.03), (0.79, 0.037, 0.029), (0.803, 0.028, 0.021)]
    for name, part, material in (("handle", stations, ash), ("grip", tip, red)):
        sections = []
        wide, high = (np.array([station[i] for station in part]) for i in (1, 2))
        for at in np.linspace(part[0][0], part[-1][0], 40):
            w, h = (float(np.interp(at, [station[0] for station in part], sizes)) for sizes in (wide, high))
            # The handle's own z runs along it, like the grain.
            sections.append([(x, y, float(at)) for x, y in superellipse(w, h, 2.4, 40)])
        turn = Matrix((place.col[0].xyz, -place.col[2].xyz, place.col[1].xyz)).transposed().to_4x4()
        turn.translation = place.translation
        add(name, loft(sections), material, turn)


def build_bar() -> None:
    """A square bar across the face, twisted at the cold end and glowing at the pointed end."""
    half, start, end = 0.03, -0.5, 0.42
    sections = []
    for x in np.linspace(start, end, 160):
        turns = 1.5 * min(1.0, max(0.0, (x - start - 0.06) / 0.3))
        size = half * min(1.0, 0.12 + (end - x) / 0.17)
        cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
        section = []
        for u, v in superellipse(size, size, 9.0, 32):
            section.append((float(x), u * cos - v * sin, u * sin + v * cos))
        sections.append(section)
    place = frame(Vector((0.14, 0.03, FACE + 0.031)), Vector((0.22, -1.0, 0)), Vector((1.0, 0.22, 0)))
    add("bar", loft(sections), hot_material(-0.08, 0.40), place)


def build_chain(iron: bpy.types.Material) -> None:
    """A chain that hangs from two staples on the stump's side."""
    first, last, high, sag = math.radians(-128), math.radians(-28), -0.475, 0.27
    curve = []
    for t in np.linspace(0, 1, 400):
        curve.append(on_stump(first + (last - first) * t, high - sag * (1 - (2 * t - 1) ** 2), 0.047))
    travelled = np.concatenate([[0], np.cumsum([(b - a).length for a, b in itertools.pairwise(curve)])])
    links = 2 * round(travelled[-1] / 0.088 / 2) + 1
    wire = superellipse(0.0125, 0.0125, 2.0, 12)
    shape = []  # a stadium: two half circles and the straight parts between
    for i in range(40):
        angle = 2 * math.pi * i / 40
        x, y = 0.031 * math.cos(angle), 0.031 * math.sin(angle)
        shape.append(Vector((x + math.copysign(0.026, x), y, 0)))
    for i in range(links):
        at = int(np.searchsorted(travelled, travelled[-1] * (i + 0.5) / links))
        tangent = curve[min(at + 3, 399)] - curve[max(at - 3, 0)]
        outward = Vector((curve[at].x, curve[at].y, 0)).normalized()
        across = tangent.cross(outward) if i % 2 else outward
        add("link", tube(shape, wire, closed=True), iron, frame(curve[at], tangent, across))
    for angle in (first, last):
        outward = on_stump(angle, 0.0).normalized()
        arc = [Vector((0.036 * math.cos(a), 0.065 * math.sin(a), 0)) for a in np.linspace(0, math.pi, 24)]
        staple = tube(arc, superellipse(0.016, 0.016, 2.0, 12))
        add("staple", staple, iron, frame(on_stump(angle, high + 0.005), Vector((0, 0, 1)), outward))


def build_horseshoe() -> None:
    """A rusty horseshoe on a nail at the back of the stump."""
    shader = Shader(bpy.data.materials.new("rust"))
    rust = shader.ramp(
        shader.noise(11.0, 6.0),
        [(0.3, (0.07, 0.032, 0.02)), (0.5, (0.26, 0.09, 0.03)), (0.7, (0.42, 0.17, 0.06))],
    )
    rust = shader.finish(
        Base_Color=rust, Metallic=0.2, Roughness=0.6, Normal=shader.bump(shader.noise(20.0, 5.0), 0.02)
    )
    path = []
    for t in np.linspace(-1, 1, 48):
        angle = t * math.radians(128)
        path.append(Vector((0.155 * math.sin(angle), 0.175 * math.cos(angle) - 0.03, 0)))
    shoe = tube(path, superellipse(0.034, 0.016, 5.0, 32))
    angle = math.radians(118)
    outward = on_stump(angle, 0.0)
    outward.z = 0
    sideways = Vector((0, 0, 1)).cross(outward)
    holes = []
    for t in (-0.78, -0.6, -0.42, 0.42, 0.6, 0.78):
        a = t * math.radians(128)
        x, y = 0.155 * math.sin(a), 0.175 * math.cos(a) - 0.03
        place = frame(on_stump(angle, -0.66, 0.035), sideways.normalized(), Vector((0, 0, 1)))
        holes.append(add("hole", box((x - 0.01, y - 0.01, -0.1), (x + 0.01, y + 0.01, 0.1)), None, place))
    add("horseshoe", shoe, rust, place, cutters=holes)
    nail = bmesh.new()
    bmesh.ops.create_cone(nail, segments=20, radius1=0.016, radius2=0.016, depth=0.10, cap_ends=True)
    bmesh.ops.create_cone(
        nail, segments=20, radius1=0.03, radius2=0.024, depth=0.02, cap_ends=True,
        matrix=Matrix.Translation((0, 0, 0.05)),
    )  # fmt: skip
    brass = plain_material("brass", (0.75, 0.48, 0.16), 1.0, 0.3)
    add("nail", nail, brass, place @ Matrix.Translation((0, 0.095, 0.02)), bevel=0.004)


def build_lights() -> None:
    """Four fixed area lights beyond the cameras, in a gray sky with a soft bright patch behind each.

    Reflections show the patches and not the lights, which would clip to white in steel.
    """
    world = bpy.data.worlds.new("world")
    bpy.context.scene.world = world
    sky = Shader(world)
    up = sky.step(sky.axis("Z"), -0.5, 0.6)
    color = sky.mix(up, (0.10, 0.085, 0.075), (0.30, 0.34, 0.40))
    for name, place, size, power, patch, tint in (
        ("key", (3.6, -4.2, 4.6), 2.6, 590.0, 1.6, (1.0, 0.86, 0.70)),
        ("fill", (-5.4, -1.6, 3.2), 3.0, 320.0, 1.15, (0.70, 0.83, 1.0)),
        ("rim", (1.4, 5.4, 3.6), 2.4, 450.0, 1.4, (1.0, 0.93, 0.84)),
        ("top", (-1.2, 0.8, 6.6), 2.2, 230.0, 0.7, (1.0, 1.0, 1.0)),
    ):
        light = bpy.data.lights.new(name, "AREA")
        light.size = size
        light.energy = power
        light.color = tint
        lamp = bpy.data.objects.new(name, light)
        lamp.visible_camera = False
        lamp.visible_glossy = False
        lamp.matrix_world = look_at(Vector(place))
        bpy.context.scene.collection.objects.link(lamp)
        inputs = {0: sky.place, 1: Vector(place).normalized()}
        near = sky.node("ShaderNodeVectorMath", inputs, operation="DOT_PRODUCT").outputs["Value"]
        near = sky.step(near, math.cos(math.radians(38)), math.cos(math.radians(10)), 0.0, patch)
        bright = sky.scale(tint, near)
        color = sky.node("ShaderNodeVectorMath", {0: color, 1: bright}, operation="ADD").outputs[0]
    sky.set(sky.surface.inputs["Color"], color)


def look_at(origin: Vector) -> Matrix:
    """Camera to world, OpenGL axes: x right, y up, looking along -z at the world's origin."""
    back = origin.normalized()
    right = Vector((0, 0, 1)).cross(back).normalized()
    return frame(origin, right, back.cross(right))


def build_scene(resolution: int = RESOLUTION, samples: int = SAMPLES) -> None:
    """Resets Blender, models the scene and configures the renderer."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    rng = np.random.default_rng(SEED)
    iron = iron_material()
    build_stump(iron, rng)
    build_anvil()
    build_hammer()
    build_bar()
    build_chain(iron)
    build_horseshoe()
    build_lights()

    scene = bpy.context.scene
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.sensor_fit = "HORIZONTAL"
    camera.data.angle = CAMERA_ANGLE_X
    scene.collection.objects.link(camera)
    scene.camera = camera

    scene.render.engine = "CYCLES"
    scene.render.threads_mode = "FIXED"
    scene.render.threads = 1
    scene.render.use_persistent_data = True
    scene.render.resolution_x = scene.render.resolution_y = resolution
    scene.render.film_transparent = True
    scene.render.dither_intensity = 0.0  # dithering is noise that differs between views
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"
    scene.view_settings.view_transform = "Standard"
    cycles = scene.cycles
    cycles.device = "CPU"
    cycles.samples = samples
    cycles.use_adaptive_sampling = True
    cycles.adaptive_threshold = 0.015
    cycles.adaptive_min_samples = 32
    cycles.use_denoising = False  # a denoiser smears texture differently in each view
    cycles.max_bounces = 6
    cycles.sample_clamp_direct = 12.0
    cycles.sample_clamp_indirect = 2.5
    cycles.filter_width = 1.2
    cycles.caustics_reflective = False


# Cameras


def camera_positions(split: str) -> np.ndarray:
    """Camera positions of a split on the upper half of a sphere: [count, 3]."""
    count = FRAMES[split]
    rng = np.random.default_rng([SEED, list(FRAMES).index(split)])
    index = np.arange(count)
    if split == "train":  # a Fibonacci spiral, uniform in area, with some jitter
        height = 0.02 + 0.97 * (index + rng.uniform(0, 1, count)) / count
        azimuth = index * math.pi * (3 - math.sqrt(5)) + rng.normal(0, 0.08, count)
    elif split == "val":
        height = rng.uniform(0.05, 0.97, count)
        azimuth = rng.uniform(0, 2 * math.pi, count)
    else:  # one smooth orbit that rises and falls twice
        azimuth = 2 * math.pi * (index + 0.5) / count
        height = np.sin(np.radians(32 + 20 * np.sin(2 * azimuth)))
    flat = np.sqrt(1 - height**2)
    return CAMERA_RADIUS * np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), height], axis=1)


def render_view(matrix: Matrix, target: Path, seed: int = 0) -> None:
    """Renders one view to an optimized RGBA PNG; fully transparent pixels are 0 in all channels."""
    scene = bpy.context.scene
    scene.camera.matrix_world = matrix
    scene.cycles.seed = seed
    with tempfile.TemporaryDirectory() as folder:
        scene.render.filepath = str(Path(folder) / "view.png")
        bpy.ops.render.render(write_still=True)
        pixels = np.array(Image.open(scene.render.filepath).convert("RGBA"))
    pixels[pixels[..., 3] == 0] = 0
    Image.fromarray(pixels).save(target, optimize=True)


def main() -> None:
    """Renders every split and writes its camera file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    output = parser.parse_args().output
    build_scene()
    start = time.perf_counter()
    for split in FRAMES:
        (output / split).mkdir(parents=True, exist_ok=True)
        frames = []
        for index, position in enumerate(camera_positions(split)):
            matrix = look_at(Vector(position))
            name = f"r_{index:03d}"
            render_view(matrix, output / split / f"{name}.png", seed=index)
            rows = [[round(value, 8) for value in row] for row in matrix]
            frames.append({"file_path": f"./{split}/{name}", "transform_matrix": rows})
        transforms = {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}
        (output / f"transforms_{split}.json").write_text(json.dumps(transforms, indent=1) + "\n")
        print(f"{split}: {len(frames)} views, {time.perf_counter() - start:.0f} s so far", flush=True)


if __name__ == "__main__":
    main()
