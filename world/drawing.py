"""Pictures of scenes: tables of shapes, and `draw`, which makes the picture.

Shapes are vectors drawn with smooth edges, so a scene gives a 72-pixel input for the model and a
large picture for a report.
"""

from collections.abc import Mapping
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFilter

from world.scenes import COLOURS, Scene

# "shape paint numbers, numbers ...; shape paint ...", in percent of the sprite (or of the picture),
# y downwards. poly x y ...; rect and oval x0 y0 x1 y1; pie x0 y0 x1 y1 from to (degrees, clockwise
# from the right); ring and line have their width before the paint. Later shapes cover earlier ones.

PAINT: dict[str, tuple[int, ...]] = {
    "black": (35, 35, 40), "grey": (140, 140, 148), "snow": (250, 250, 250), "brown": (125, 80, 45),
    "orange": (245, 140, 30), "leaf": (50, 130, 50), "glass": (195, 228, 245),
}
DRAWINGS = {
    "car": """poly main 2 68 4 50 24 46 36 26 66 26 80 46 95 50 98 68;
        poly glass 30 46 39 32 49 32 49 46, 54 46 54 32 64 32 74 46; oval black 13 56 37 80;
        oval grey 20 63 30 73; oval black 64 56 88 80; oval grey 71 63 81 73""",
    "bus": """rect main 2 16 98 76; rect glass 8 24 27 44, 31 24 50 44, 54 24 73 44, 78 24 94 70;
        rect dark 2 54 74 60; oval black 14 64 36 86; oval grey 21 71 29 79; oval black 54 64 76 86;
        oval grey 61 71 69 79""",
    "bicycle": """ring 7 main 0 44 42 86, 58 44 100 86; line 6 main 21 65 36 36 70 36 48 65 21 65,
        79 65 66 20; line 6 black 60 20 80 17; line 7 black 27 31 45 31""",
    "house": """rect dark 70 8 82 34; poly dark 50 4 99 48 1 48; rect main 12 48 88 94;
        rect brown 42 62 58 94; rect glass 19 58 35 74, 65 58 81 74""",
    "tree": """rect brown 42 60 58 98; oval main 8 30 58 74, 42 30 92 74, 22 3 78 58;
        oval dark 28 46 40 56, 60 44 72 54, 44 20 56 30""",
    "dog": """line 9 main 18 52 3 26; oval main 12 42 76 74; rect main 16 60 27 94, 32 62 42 94,
        50 62 60 94, 64 56 75 94; oval main 54 14 88 52, 72 28 100 48; oval black 91 28 100 37,
        74 24 81 31; poly dark 56 14 68 18 66 50 52 46""",
    "cat": """line 9 main 66 90 90 88 94 62; oval main 26 46 74 98; poly main 20 36 20 0 46 16,
        80 36 80 0 54 16; oval main 16 10 84 60; oval black 31 27 41 39, 59 27 69 39;
        poly orange 45 41 55 41 50 47; line 3 dark 18 46 36 46, 82 46 64 46, 42 70 42 96,
        58 70 58 96""",
    "duck": """line 5 orange 40 82 40 96 50 96, 56 82 56 96 66 96; poly main 2 40 30 50 20 72;
        oval main 8 44 82 86, 54 6 88 44; rect main 58 30 80 60; poly orange 85 20 100 28 85 34;
        oval black 70 16 78 24; oval dark 24 54 60 76""",
    "boat": """line 5 brown 50 70 50 2; poly snow 55 6 55 60 94 60; poly main 45 14 45 60 10 60,
        2 66 98 66 80 92 20 92; line 4 dark 8 74 92 74""",
    "umbrella": """line 5 brown 50 50 50 86 56 93 64 92 68 84; pie main 2 6 98 102 180 360;
        pie dark 34 6 66 102 180 360; line 5 black 50 6 50 0""",
    "ball": """oval main 6 6 94 94; pie snow 6 6 94 94 0 60, 6 6 94 94 120 180, 6 6 94 94 240 300;
        oval dark 42 42 58 58""",
    "kite": """line 4 black 50 72 42 82 56 88 48 100; poly main 50 0 88 34 50 74 12 34;
        poly dark 50 0 88 34 50 34, 50 74 12 34 50 34; poly main 34 80 46 84 36 92,
        64 80 54 86 62 94""",
    "cup": """ring 9 main 56 38 96 76; rect main 14 28 72 88; oval main 14 78 72 98;
        oval dark 14 18 72 38; oval brown 20 22 66 35""",
    "pot": """line 9 black 0 54 100 54; rect main 14 44 86 84; oval main 14 72 86 94;
        pie dark 12 22 88 70 180 360; oval black 42 12 58 28""",
    "apple": """line 6 brown 50 34 56 6; oval leaf 56 6 86 24; oval main 6 24 60 96, 40 24 94 96;
        oval light 18 38 32 56""",
    "bottle": """rect main 41 8 59 34; rect black 39 0 61 12; poly main 30 50 41 28 59 28 70 50;
        rect main 30 48 70 99; rect snow 30 58 70 80; line 3 dark 36 66 64 66, 36 73 64 73""",
    "chair": """rect main 20 2 31 98, 69 2 80 98, 20 6 80 16, 20 24 80 34;
        poly main 18 50 82 50 90 64 10 64; rect dark 10 62 90 68; rect main 10 66 20 99,
        80 66 90 99""",
    "clock": """line 8 black 26 84 16 98, 74 84 84 98; oval main 8 2 42 34, 58 2 92 34, 10 14 90 94;
        oval dark 21 25 79 83; oval snow 25 29 75 79; line 6 black 50 34 50 55 64 62""",
    "lamp": """line 8 brown 50 50 50 90; oval brown 24 84 76 99; poly main 32 4 68 4 92 54 8 54;
        line 5 dark 12 48 88 48""",
    "bed": """rect brown 0 18 10 92, 90 44 100 92, 6 74 94 82; rect snow 10 56 90 74;
        oval snow 11 40 42 60; poly main 36 48 86 46 92 54 92 78 36 78; line 4 dark 38 56 90 56""",
    "book": """rect snow 20 10 86 96; rect main 14 4 80 88; rect dark 14 4 26 88;
        rect snow 36 20 70 40; line 4 black 40 27 66 27, 40 34 58 34; line 3 grey 28 92 84 92""",
    "hat": """oval main 0 58 100 86; pie main 22 14 78 122 180 360;
        poly dark 23 58 77 58 78 70 22 70""",
    "flower": """line 7 leaf 50 50 50 99; oval leaf 24 72 50 88, 50 66 76 82; oval main 34 0 66 32,
        58 12 90 44, 52 36 84 68, 16 36 48 68, 10 12 42 44, 34 40 66 70; oval orange 38 24 62 48""",
    "tractor": """line 6 black 82 44 82 14; rect glass 20 14 52 46; line 6 black 20 12 20 50,
        52 12 52 50; rect main 12 6 58 15, 10 40 94 68; oval black 0 42 52 94;
        oval main 15 57 37 79; oval black 62 58 96 92; oval main 72 68 86 82""",
}
BACKGROUNDS = {  # pale, so that all six colours stand out
    "street": """rect #c3d3de 0 0 100 100; rect #b3b3b8 2 14 24 62; rect #bdb5ae 26 6 52 62;
        rect #aeb6ba 56 18 76 62; rect #bab4b8 78 4 99 62; rect #cfcfcf 0 62 100 70;
        rect #8f9094 0 70 100 100; rect #e6e6dc 4 84 24 86, 38 84 60 86, 74 84 96 86""",
    "kitchen": """rect #efe2c8 0 0 100 66; line 0.8 #dccba8 0 16 100 16, 0 33 100 33, 0 50 100 50,
        20 0 20 66, 40 0 40 66, 60 0 60 66, 80 0 80 66; rect #c9a77c 0 66 100 72;
        rect #b58f63 0 72 100 100; line 1 #98754c 33 74 33 100, 66 74 66 100""",
    "beach": """rect #bfe3f5 0 0 100 36; oval #fff3b0 80 3 93 16; rect #86c1d6 0 36 100 58;
        line 1 #d8f0f7 6 44 30 44, 52 50 84 50; rect #ecd9a6 0 58 100 100; oval #e2cc92 10 80 40 86,
        60 70 88 75""",
    "farm": """rect #cfe6f2 0 0 100 34; rect #c7cf8c 0 34 100 100; line 1.5 #a9b36e 0 60 100 50,
        0 76 100 64, 0 94 100 80; line 1.5 #9b7a52 0 30 100 30, 0 36 100 36;
        line 2 #9b7a52 10 26 10 42, 36 26 36 42, 62 26 62 42, 88 26 88 42""",
    "park": """rect #d9eef7 0 0 100 26; oval #a5cf9b -20 12 60 70; oval #9cc792 40 14 130 70;
        rect #add6a0 0 42 100 100; poly #e4d9bd 40 42 50 42 84 100 50 100;
        oval #a9d5e6 4 76 38 92""",
    "bedroom": """rect #ead9e2 0 0 100 70; line 1.5 #dfc8d5 12 0 12 70, 37 0 37 70, 62 0 62 70,
        87 0 87 70; rect #c8ad8e 0 70 100 100; line 1 #ad9070 0 80 100 80, 0 90 100 90;
        rect #f6f6f2 70 8 96 44; rect #bcd9ea 73 11 93 41; line 1.5 #f6f6f2 83 10 83 42""",
}
LAYOUT = {  # number: (sprite's side, centres), in cells
    1: (0.84, ((0.5, 0.5),)),
    2: (0.5, ((0.24, 0.5), (0.76, 0.5))),
    3: (0.46, ((0.5, 0.26), (0.24, 0.74), (0.76, 0.74))),
}
JITTER = 2  # pixels in either direction, in a picture of 72


def paint(image: Image.Image, drawing: str, paints: Mapping[str, tuple[int, ...]]) -> None:
    """Draw the primitives of one table entry over the whole of `image`."""
    pen, unit = ImageDraw.Draw(image), image.width / 100
    for primitive in drawing.split(";"):
        shape, *words = primitive.split()
        width = round(float(words.pop(0)) * unit) if shape in ("ring", "line") else 0
        fill = paints.get(words[0], words[0])  # a name, or #rrggbb
        for numbers in " ".join(words[1:]).split(","):
            xy = [float(number) * unit for number in numbers.split()]
            if shape == "poly":
                pen.polygon(xy, fill)
            elif shape == "rect":
                pen.rectangle(xy, fill)
            elif shape == "oval":
                pen.ellipse(xy, fill)
            elif shape == "ring":
                pen.ellipse(xy, None, fill, width)
            elif shape == "pie":
                pen.pieslice(xy[:4], xy[4] / unit, xy[5] / unit, fill)
            else:
                pen.line(xy, fill, width, joint="curve")


@lru_cache(maxsize=None)  # 24 kinds x 6 colours x 3 sizes
def sprite(kind: str, colour: str, side: int) -> Image.Image:
    """Draw one thing as RGBA, `side` pixels wide plus a margin for its rim."""
    main = COLOURS[colour]
    paints = PAINT | {"main": main, "dark": tuple(int(0.62 * c) for c in main),
                      "light": tuple((c + 255) // 2 for c in main)}
    scale = max(4, 96 // side)  # supersampling, so that edges are smooth
    inner = Image.new("RGBA", (side * scale,) * 2)
    paint(inner, DRAWINGS[kind], {name: (*rgb, 255) for name, rgb in paints.items()})
    # A dark rim sets a thing off from any background: its dilated silhouette goes underneath.
    rim, margin = round(0.035 * side * scale), 1 + side // 30
    whole = Image.new("RGBA", ((side + 2 * margin) * scale,) * 2)
    whole.paste(inner, (margin * scale,) * 2)
    shadow = Image.new("RGBA", whole.size, (30, 30, 35, 0))
    shadow.putalpha(whole.getchannel("A").filter(ImageFilter.MaxFilter(2 * rim + 1)))
    return Image.alpha_composite(shadow, whole).reduce(scale)


@lru_cache(maxsize=None)
def background(setting: str, size: int) -> Image.Image:
    image = Image.new("RGB", (4 * size,) * 2)
    paint(image, BACKGROUNDS[setting], {})
    return image.reduce(4)


def draw(scene: Scene, size: int = 72) -> Image.Image:
    """Draw the scene as an RGB image of size x size pixels; the same picture at every size."""
    image, cell, rng = background(scene.type, size).copy(), size / 3, Random(f"draw {scene.seed}")
    for thing in scene.things:
        left, top = (cell * (thing.cell % 3) + rng.randint(-JITTER, JITTER) * size / 72,
                     cell * (thing.cell // 3) + rng.randint(-JITTER, JITTER) * size / 72)
        share, centres = LAYOUT[thing.number]
        drawing = sprite(thing.kind, thing.colour, round(share * cell))
        for x, y in centres:
            corner = (round(left + x * cell - drawing.width / 2),
                      round(top + y * cell - drawing.height / 2))
            image.paste(drawing, corner, drawing)
    return image
