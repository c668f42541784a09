"""Rasters, bands first, with other no-data in each band."""

import numpy as np
from batchnorm import Moments, dataset_moments

rng = np.random.default_rng(0)
tiles = [rng.normal(300, 20, (3, 16, 16)).astype(np.float32) for _ in range(4)]
for tile in tiles:
    tile[0, :4] = -9999
    tile[2, 8:] = -9999
m = Moments(channel_axis=0, nodata=-9999)
for tile in tiles:
    m.update(tile)
assert m.counts.tolist() == [768, 1024, 512] and abs(m.mean - 300).max() < 3
try:
    m.count  # noqa: B018
except ValueError as error:
    assert "counts" in str(error)
else:
    raise SystemExit("one count for channels that differ")
whole = dataset_moments(tiles, channel_axis=0, nodata=-9999)
assert np.array_equal(whole.mean, m.mean) and np.array_equal(whole.counts, m.counts)
masked = dataset_moments(range(4), read=lambda i: np.ma.masked_equal(tiles[i], -9999), channel_axis=0)
assert np.array_equal(masked.var, m.var)
per_band = Moments(channel_axis=0, nodata=[-9999, np.nan, -9999]).update(tiles[0])
assert per_band.counts.tolist() == [192, 256, 128]
assert np.array_equal(Moments.from_array(m.to_array()).mean, m.mean)
