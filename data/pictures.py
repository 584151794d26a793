"""All pictures, drawn with Pillow: flows over densities, fields, walks, sheets.

A picture of a flow is a `Scene`, the density p_t as a glow, with particles, trajectories or arrows
above. Nothing here knows a mixture, a network or a data set.
Time, here and everywhere: t = 0 is data, t = 1 is noise. Read next: `data/toy.py`, a caller."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path as File

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FRAME, INK, WARM, GREY = (13, 15, 24), (222, 226, 236), (255, 214, 140), (150, 158, 178)
GLOW = np.array([(13, 15, 24), (22, 32, 66), (38, 58, 112), (74, 92, 150), (128, 140, 184)])
Colours = Sequence[tuple[int, ...]]


# density(z (n,2), t (n,)) -> p_t(z) (n,), and the extent: points are in [-extent, extent]^2
Scene = tuple[Callable[[Tensor, Tensor], Tensor], float]


class Canvas:
    """A panel over a scene. It is drawn at twice its size, then reduced: edges become smooth."""

    def __init__(self, scene: Scene, size: int = 340):
        self.density, self.extent = scene
        self.size = 2 * size
        self.image = Image.new("RGB", (2 * size, 2 * size), FRAME)
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def pixels(self, x: Tensor) -> np.ndarray:
        return ((x.numpy() / self.extent * [1, -1] + 1) * self.size / 2).astype(np.float32)

    def glow(self, t: float) -> "Canvas":
        """Paint the root of p_t as a background: the root keeps the faint parts visible."""
        n = self.size // 4
        axis = torch.linspace(-1, 1, n, dtype=torch.float64) * self.extent
        grid = torch.stack([axis.expand(n, n), -axis[:, None].expand(n, n)], dim=-1).reshape(-1, 2)
        p = self.density(grid, torch.full((n * n,), t)).sqrt()
        level = (p / p.max().clamp(min=1e-300) * (len(GLOW) - 1)).reshape(n, n).numpy()
        colour = [np.interp(level, range(len(GLOW)), channel) for channel in GLOW.T]
        small = Image.fromarray(np.stack(colour, axis=-1).astype(np.uint8))
        self.image.paste(small.resize((self.size,) * 2, Image.Resampling.BICUBIC))
        return self

    def points(self, x: Tensor, colours: Colours, radius=2.5, ring: bool = False) -> "Canvas":
        for centre, colour in zip(self.pixels(x), colours, strict=True):
            style = dict(outline=(*colour, 230), width=3) if ring else dict(fill=(*colour, 200))
            self.pen.ellipse((*(centre - radius), *(centre + radius)), **style)
        return self

    def lines(self, xs: Tensor, colours: Colours, alpha: int = 110, width: int = 2) -> "Canvas":
        """Trajectories xs (steps + 1, n, 2)."""
        for line, colour in zip(self.pixels(xs.transpose(0, 1)), colours, strict=True):
            self.pen.line([tuple(point) for point in line], (*colour, alpha), width)
        return self

    def arrows(self, field: Callable[[Tensor, Tensor], Tensor], t: float) -> "Canvas":
        """A field at t, strong where p_t is large and faint where it is not."""
        axis = (torch.arange(15) / 7 - 1) * 0.93 * self.extent
        x = torch.cartesian_prod(axis, axis)
        ts = torch.full((len(x),), t)
        v, p = field(x, ts), self.density(x, ts)
        v = v * (0.12 * self.extent / v.norm(dim=1, keepdim=True).clamp(min=1.5))
        strength = (p / p.max().clamp(min=1e-30)) ** 0.3
        for tail, head, s in zip(self.pixels(x), self.pixels(x + v), strength, strict=True):
            fill = (*WARM, int(60 + 195 * s))
            self.pen.line((*tail, *head), fill, width=3)
            self.pen.ellipse((*(head - 4), *(head + 4)), fill)
        return self

    def done(self, label: str = "") -> Image.Image:
        image = self.image.resize((self.size // 2,) * 2, Image.Resampling.LANCZOS)
        pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
        pen.text((9, 6), label, INK, font, stroke_width=2, stroke_fill=FRAME)
        return image


def tile(rows: list[list[Image.Image]], title: str = "") -> Image.Image:
    """Panels of one size as a sheet, with a title above."""
    (w, h), gap, top = rows[0][0].size, 8, 40 if title else 8
    sheet = Image.new("RGB", (len(rows[0]) * (w + gap) + gap, len(rows) * (h + gap) + top), FRAME)
    ImageDraw.Draw(sheet).text((gap + 2, 9), title, INK, ImageFont.load_default(19))
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            sheet.paste(panel, (gap + j * (w + gap), top + i * (h + gap)))
    return sheet


def hues(x: Tensor) -> list[tuple[int, ...]]:
    """A bright colour for each point (n,2), by its angle."""
    turn = torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) % 1
    hsv = torch.stack([255 * turn, torch.full_like(turn, 135), torch.full_like(turn, 255)], dim=1)
    rgb = Image.fromarray(hsv.to(torch.uint8).numpy()[None], "HSV").convert("RGB")
    return [tuple(map(int, colour)) for colour in np.asarray(rgb)[0]]


# ---- Flows, all on the RF path. The angle at its start gives a particle its hue
def draw_flow(scene: Scene, zs: Tensor) -> Image.Image:
    """Particles zs (49,n,2) over p_t at five times from 1 to 0, and the first 250 trajectories."""
    colours, panels = hues(zs[0]), []
    for i, t in enumerate(("1, noise", "0.75", "0.50", "0.25", "0, data")):
        canvas = Canvas(scene).glow(1 - i / 4).points(zs[12 * i], colours)
        panels.append(canvas.done(f"t = {t}"))
    panels.append(Canvas(scene).lines(zs[:, :250], colours[:250]).done("trajectories"))
    return tile([panels[:3], panels[3:]], "The learned flow, over the exact density p_t")


def draw_field(scene: Scene, learned, exact, errors: dict[float, float]) -> Image.Image:
    """Draw two fields f(z (n,2), t (n,)), one above the other, at the times in {t: error}."""
    panel = lambda field, t, label: Canvas(scene).glow(t).arrows(field, t).done(label)
    label = "learned, t = {}; relative error {:.1e}".format
    above = [panel(learned, t, label(t, error)) for t, error in errors.items()]
    below = [panel(exact, t, f"exact, t = {t}") for t in errors]
    title = "The learned velocity v(z, t) and the exact u(z, t); samples move against the arrows"
    return tile([above, below], title)


def draw_walks(scene: Scene, exact: Tensor, walks: dict[str, Tensor]) -> Image.Image:
    """Walks (steps + 1, n, 2), each in its panel, over exact paths (T,n,2) from the same noise."""
    colours, n, panels = hues(exact[0]), exact.shape[1], []
    for label, zs in walks.items():
        canvas = Canvas(scene, 480).glow(0).lines(exact, [GREY] * n, 150)
        canvas.points(exact[-1], [(255, 255, 255)] * n, 11, ring=True).lines(zs, colours, 220, 4)
        canvas.points(zs[:-1].flatten(0, 1), colours * (len(zs) - 1), 5).points(zs[-1], colours, 8)
        panels.append(canvas.done(label))
    return tile([panels], "From the same noise; grey: the exact paths, rings: where they end")


def draw_samples(scene: Scene, samples: Tensor, data: Tensor, colours: Colours) -> Image.Image:
    """Samples (n,2) beside data (n,2), over the density at t = 0."""
    left = Canvas(scene, 420).glow(0).points(samples, colours, 2).done(f"{len(samples)} samples")
    right = Canvas(scene, 420).glow(0).points(data, [WARM] * len(data), 2).done("the data")
    return tile([[left, right]], "At t = 0")


def save_gif(file: File, scene: Scene, zs: Tensor) -> None:
    """Particles zs (frames, n, 2) over p_t. With a palette for each frame colours would flicker."""
    images, colours, last = [], hues(zs[0]), len(zs) - 1
    for i, z in enumerate(zs):
        t = 1 - i / last
        canvas = Canvas(scene, 320).glow(t).lines(zs[max(0, i - 5) : i + 1], colours)
        images.append(canvas.points(z, colours, 3).done(f"t = {t:.2f}"))
    palette = tile([images[:: max(1, last // 4)]]).quantize(200)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    pauses = [700] + [60] * (last - 1) + [2500]
    first.save(file, save_all=True, append_images=rest, duration=pauses, loop=0, optimize=True)


# ---- Sheets of images
def to_uint8(x0: Tensor) -> np.ndarray:
    """Images x0 (B,1,H,W) or (B,3,H,W) in [-1, 1] -> uint8 (B,H,W,3), rounded and clipped."""
    x = (x0.float() * 127.5 + 127.5).round().clamp(0, 255)
    return x.to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def to_float(images: Tensor) -> Tensor:
    """uint8 of any shape -> [-1, 1], both ends exactly."""
    return images.float() / 127.5 - 1


def draw_sheet(images: np.ndarray, columns: int, names: Sequence[str] = ()) -> Image.Image:
    """Images uint8 (n,H,W,3), `columns` in a row. Small ones are enlarged; a row has its name."""
    n, h, w, _ = images.shape
    zoom, gap, left = max(1, 64 // h), 2, 90 if names else 0
    h, w = h * zoom + gap, w * zoom + gap
    sheet = Image.new("RGB", (left + columns * w + gap, -(-n // columns) * h + gap), "white")
    for i, image in enumerate(images):
        at = (left + i % columns * w + gap, i // columns * h + gap)
        sheet.paste(Image.fromarray(image).resize((w - gap, h - gap), Image.Resampling.NEAREST), at)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, name in enumerate(names):
        pen.text((6, i * h + h // 2 - 8), name[:12], "black", font)
    return sheet


def draw_captioned(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Images uint8 (n,H,W,3), each over the lines of its caption. Small ones are enlarged."""
    n, h, w, _ = images.shape
    columns, zoom, gap, font = min(n, 8), max(1, 128 // h), 8, ImageFont.load_default(13)
    wrap = textwrap.TextWrapper(zoom * w // 7).fill  # so many characters fit into a line
    texts = ["\n".join(map(wrap, caption.split("\n"))) for caption in captions]
    lines = 1 + max(text.count("\n") for text in texts)
    h, w = zoom * h + 17 * lines + 2 * gap, zoom * w + gap
    sheet = Image.new("RGB", (columns * w + gap, -(-n // columns) * h + gap), (240, 240, 240))
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + i % columns * w, gap + i // columns * h
        big = Image.fromarray(image).resize((w - gap,) * 2, Image.Resampling.NEAREST)
        sheet.paste(big, (x, y))
        pen.text((x, y + w - gap + 2), text, "black", font, spacing=3)
    return sheet
