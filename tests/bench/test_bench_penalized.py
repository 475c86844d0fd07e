"""The bench of penalized networks: what is moved is moved by a pixel at most, with its label."""

import torch


def test_moved_images_are_windows_of_the_image_and_its_frame(bench):
    penalized = bench("penalized")
    images = torch.arange(2 * 30 * 4 * 5, dtype=torch.float32).reshape(30, 2, 4, 5)
    found = penalized.moved(images, 3)
    assert found.shape == images.shape
    ways = set()
    for before, after in zip(images, found, strict=True):
        fits = []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                wanted = torch.full_like(before, float(images.min()))
                for y in range(4):
                    for x in range(5):
                        if 0 <= y + down < 4 and 0 <= x + right < 5:
                            wanted[:, y, x] = before[:, y + down, x + right]
                if torch.equal(after, wanted):
                    fits.append((down, right))
        assert len(fits) == 1
        ways |= set(fits)
    assert len(ways) > 5
    assert torch.equal(found, penalized.moved(images, 3))
    assert not torch.equal(found, penalized.moved(images, 4))
