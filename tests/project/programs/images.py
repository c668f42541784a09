"""Image statistics in the units that normalize_images wants, and an error for pixel units."""

import numpy as np
from batchnorm import dataset_moments, normalize_images

photos = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
s = dataset_moments(photos, channel_axis=-1, max_value=255)
assert 0 < s.mean.min() and s.std.max() < 0.5
planes = normalize_images(photos, s.mean, s.std)
assert planes.shape == (4, 3, 16, 16) and abs(planes.mean()) < 1e-6 and abs(planes.std() - 1) < 1e-6
pixels = dataset_moments(photos, channel_axis=-1)
try:
    normalize_images(photos, pixels.mean, pixels.std)
except ValueError as error:
    assert "max_value" in str(error)
else:
    raise SystemExit("a mean of 127 of values in [0, 1]")
same = normalize_images(photos, pixels.mean, pixels.std, max_value=1)
np.testing.assert_allclose(same, planes, atol=1e-6)
