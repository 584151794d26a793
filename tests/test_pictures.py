"""Pictures are drawn, and what is drawn lies where it should."""

import numpy as np
import torch
from PIL import Image

from data import pictures
from data.toy import scene as scene_of
from rf import RectifiedFlow
from toy2d import GaussianMixture, load_mixture, trajectory

WHITE = [(255, 255, 255)]


def flow(mixture, frames=49):
    noise = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    return trajectory(mixture.field(RectifiedFlow()), noise, torch.linspace(1, 0, frames))


def test_pictures_are_drawn(tmp_path):
    m = load_mixture("spiral")
    field, scene, zs = m.field(RectifiedFlow()), scene_of(m), flow(m)
    sheet = pictures.draw_flow(scene, zs)
    assert (
        sheet.size
        == pictures.draw_field(scene, field, field, dict.fromkeys((0.9, 0.5, 0.1), 0)).size
    )
    pictures.save_gif(tmp_path / "flow.gif", scene, zs[::16])
    with Image.open(tmp_path / "flow.gif") as gif:
        assert gif.n_frames == 4
    x = m.sample(100)[0]
    assert len(pictures.draw_samples(scene, x, x, pictures.hues(x)).getcolors(1 << 20)) > 50
    canvas = pictures.Canvas(scene)
    u, v = canvas.pixels(torch.tensor([[0.0, canvas.extent]]))[0]
    assert (u, v) == (canvas.size / 2, 0)  # up is up


def test_a_mixture_of_far_modes_is_drawn():
    """Between them its density is 0 in float64."""
    far = GaussianMixture([[1000, 0], [-1000, 0]], torch.eye(2).expand(2, 2, 2) / 4, [1, 1])
    field = far.field(RectifiedFlow())
    pictures.draw_field(scene_of(far), field, field, {0.5: 0.0})


def test_a_walk_that_lands_fills_the_ring_and_one_that_misses_does_not():
    """The pixel where the exact path ends is bright in the first panel and dark in the second."""
    m = load_mixture("ring")
    exact = torch.tensor([[[0.0, 0.0]], [[1.0, 0.5]]])  # one particle that ends off the modes
    walks = {"lands": exact, "misses": torch.tensor([[[0.0, 0.0]], [[-1.0, 0.5]]])}
    sheet = np.asarray(pictures.draw_walks(scene_of(m), exact, walks)).astype(int)
    (u, v), side = pictures.Canvas(scene_of(m), 480).pixels(exact[-1])[0] / 2, 480
    left, right = (sheet[int(40 + v), int(8 + u + k * (side + 8))].sum() for k in (0, 1))
    assert left > right + 200


def test_pictures_become_bytes_and_sheets():
    values = torch.arange(256, dtype=torch.uint8)
    grey = (values.float() / 127.5 - 1).reshape(1, 1, 16, 16)
    images = pictures.to_uint8(grey)
    assert images.shape == (1, 16, 16, 3) and images.dtype == np.uint8  # one channel is grey
    assert (images[0, ..., 1].ravel() == values.numpy()).all()
    extreme = torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 3, 1, 1)
    assert pictures.to_uint8(extreme).tolist() == [[[[0, 128, 255]]]]
    sheet = pictures.draw_sheet(images.repeat(6, 0), 3, ["a", "b"])
    assert sheet.size == (90 + 3 * 66 + 2, 2 * 66 + 2)
    assert sheet.getpixel((92, 2)) == (0, 0, 0) and sheet.getpixel((92 + 63, 2 + 63)) == (255,) * 3
