"""Running statistics: the update inside `batch_norm_train`, `update_running` by itself, and who stays out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train

from support import reference, tolerances
from support.checks import excess, same_bits
from support.problem import ACTIVATIONS, DTYPES, Problem, rng

pytestmark = pytest.mark.quick
FLOAT32, FLOAT64 = DTYPES[:2]
P = Problem(4, 5, (23,))


def pair(channels=5, dtype=FLOAT64):
    g = rng("running", channels)
    return [a.astype(dtype) for a in (g.standard_normal(channels), g.uniform(0.5, 2, channels))]


def update(x, running, **options):
    return train(x, running_mean=running[0], running_var=running[1], **options)


def assert_step(p, running, before, decay, seen=None, ddof=1):
    c = p.call()
    f = reference.forward(c)
    want = reference.running(c, f, *before, decay, seen, ddof)
    off = tolerances.batch_errors(c, f, p.dtype, ddof)
    for got, wanted, old, error in zip(running, want, before, off, strict=True):
        size = np.abs(np.float64(old)) + np.abs(wanted)
        bound = tolerances.running_error(got.dtype, 0.5, size * 2, size * 2, 2 * error)
        assert excess(got, wanted, bound) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("running_dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("ddof", [0, 1])
def test_the_step(dtype, running_dtype, ddof):
    for decay, size, positions in itertools.product(
        (0, 0.1, 0.9, 0.999, 1, np.array([0, 0.25, 0.5, 0.75, 1])),
        (None, 2, 3),
        ("all", "mask", "weights", "mask per channel"),
    ):
        p = replace(P, dtype=dtype, size=size, positions=positions)
        running, before = pair(dtype=running_dtype), pair(dtype=running_dtype)
        more = {"running_mean": running[0], "running_var": running[1], "decay": decay, "running_ddof": ddof}
        y, saved = p.train(**more)
        assert_step(p, running, before, decay, ddof=ddof)
        assert saved.updated and same_bits(y, p.train()[0]), "running statistics must not change y"


@pytest.mark.parametrize("size", [None, 3])
def test_a_cumulative_average_is_the_average_of_all_batches(size):
    """decay=None: after any batches the statistics are those of all values, of each channel on its own."""
    batches = [replace(P, seed=s, dtype=FLOAT64, positions="mask per channel") for s in range(4)]
    running, seen = [np.zeros(5), np.ones(5)], np.zeros(5)
    total, mean = np.zeros(5), np.zeros(5)
    for p in batches:
        _, saved = replace(p, size=size).train(
            running_mean=running[0], running_var=running[1], decay=None, seen=seen
        )
        n = saved.count if size is None else saved.count.sum(axis=0, where=saved.count > 1)
        batch = (
            saved.mean
            if size is None
            else np.where(saved.count > 1, saved.mean * saved.count, 0).sum(axis=0) / np.maximum(n, 1)
        )
        enters = n > 1
        seen = seen + np.where(enters, n, 0)
        total += np.where(enters, n * batch, 0)
        mean = np.divide(total, seen, out=mean, where=seen > 0)
    assert np.allclose(running[0], mean, rtol=1e-13)
    assert seen[-2] == 0 and running[1][-2] == 1, "nothing ever counted in the last channel but one"


def test_seen_is_a_number_or_one_per_channel():
    for seen in (0, 10, 2.5, np.float32(3), np.arange(5.0)):
        running, before = pair(), pair()
        update(P.x, running, decay=None, seen=seen)
        assert_step(P, running, before, None, seen=np.asarray(seen, float))


@pytest.mark.parametrize("running_dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("ddof", [0, 1])
def test_update_running_is_the_same_step(ddof, running_dtype):
    for positions, decay, seen in (
        ("all", 0.25, None),
        ("all", None, 7),
        ("mask per channel", 0.9, None),
        ("weights", None, np.arange(5.0)),
    ):
        p = replace(P, positions=positions)
        inside, alone = pair(dtype=running_dtype), pair(dtype=running_dtype)
        how = {"decay": decay} | ({} if seen is None else {"seen": seen})
        _, saved = p.train(running_mean=inside[0], running_var=inside[1], running_ddof=ddof, **how)
        count = saved.count if positions != "all" else int(saved.count[0])
        var = np.nan_to_num(saved.var), np.nan_to_num(saved.mean)
        assert batchnorm.update_running(*alone, var[1], var[0], count=count, ddof=ddof, **how) is None
        assert same_bits(inside[0], alone[0]) and same_bits(inside[1], alone[1])


def test_unbiased_variance_in_exact_numbers():
    x = np.float32([[-1, 3], [1, 5]])  # population variance 1, unbiased 2
    running = np.zeros(2), np.zeros(2)
    update(x, running, decay=0.5)
    assert running[0].tolist() == [0, 2] and running[1].tolist() == [1, 1]
    update(x, running, decay=0.5, running_ddof=0)
    assert running[0].tolist() == [0, 3] and running[1].tolist() == [1, 1]
    update(x, running)
    assert np.allclose(running[0], [0, 0.9 * 3 + 0.1 * 4]) and np.allclose(running[1], 0.9 + 0.2)


def test_decay_one_keeps_every_bit_and_zero_takes_the_batch():
    for dtype in (FLOAT32, FLOAT64):
        running, before = pair(dtype=dtype), pair(dtype=dtype)
        update(P.x, running, decay=1)
        assert all(same_bits(a, b) for a, b in zip(running, before, strict=True))
    running = pair()
    saved = update(P.x, running, decay=0, running_ddof=0).saved
    assert same_bits(running[0], saved.mean) and same_bits(running[1], saved.var)


def test_inference_after_decay_zero_is_training():
    p = replace(P, dtype=FLOAT64, activation="relu")
    running = pair()
    y = p.train(running_mean=running[0], running_var=running[1], decay=0, running_ddof=0)[0]
    assert same_bits(batchnorm.batch_norm(p.x, *running, *p.parameters, activation="relu"), y)


# ---- parts -----------------------------------------------------------------------------------------------


def test_parts_enter_by_their_average():
    """Two parts of 4 and 2 values: means 1.5 and 10, weighted by n; each part's own unbiased variance."""
    x = np.array([0, 1, 2, 3, 9, 11.0])[:, None]
    running = np.zeros(1), np.zeros(1)
    update(x, running, virtual_batch_size=4, decay=0)
    assert np.isclose(running[0][0], (4 * 1.5 + 2 * 10) / 6, rtol=1e-15)
    assert np.isclose(running[1][0], (4 * 5 / 3 + 2 * 2) / 6, rtol=1e-15)


@pytest.mark.parametrize("std", [1e-8, 1e-9, 1e-11])
def test_a_small_variance_of_parts_is_not_had_back_from_inv_std(std):
    x = (rng("small").standard_normal((8, 2, 100)) * std).astype(np.float32)
    running = np.zeros(2), np.zeros(2)
    update(x, running, virtual_batch_size=4, decay=0)
    want = np.mean([part.astype(FLOAT64).var(axis=(0, 2), ddof=1) for part in (x[:4], x[4:])], axis=0)
    assert np.allclose(running[1], want, rtol=1e-10)


# ---- renormalisation -------------------------------------------------------------------------------------


def test_renorm_reads_the_running_pair_before_it_is_updated():
    p = replace(P, dtype=FLOAT64, eps=1e-3)
    running, before = pair(), pair()
    options = {"running_mean": running[0], "running_var": running[1], "decay": 0.75}
    _, saved = p.train(renorm=True, **options)
    std = np.sqrt(before[1] + 1e-3)
    assert np.allclose(saved.r, 1 / saved.inv_std / std, rtol=1e-12) and np.allclose(
        saved.d, (saved.mean - before[0]) / std
    )
    assert_step(p, running, before, 0.75)
    limits = {"rmin": 0.5, "rmax": 1.25, "dmax": 0.25}
    _, limited = p.train(renorm=limits, running_mean=before[0], running_var=before[1])
    assert np.allclose(limited.r, np.clip(saved.r, 0.5, 1.25)) and np.allclose(
        limited.d, np.clip(saved.d, -0.25, 0.25)
    )


@pytest.mark.parametrize("size", [None, 2])
def test_a_reference_of_its_own_moves_by_its_own_decay(size):
    """Its std is sqrt(var + eps) of the batch, also with a large eps."""
    p = replace(P, dtype=FLOAT64, eps=3.0, size=size)
    mean, std = np.full(5, 0.5), np.full(5, 2.0)
    running, before = pair(), pair()
    _, saved = p.train(
        renorm={"mean": mean, "std": std, "decay": 0.5},
        running_mean=running[0],
        running_var=running[1],
        decay=0.75,
    )
    parts = np.atleast_2d(saved.mean), np.atleast_2d(saved.var)
    assert np.allclose(mean, 0.25 + 0.5 * parts[0].mean(axis=0), rtol=1e-13)
    assert np.allclose(std, 1 + 0.5 * np.sqrt(parts[1].mean(axis=0) + 3), rtol=1e-13)
    assert_step(p, running, before, 0.75)
    fixed = mean.copy(), std.copy()
    p.train(renorm={"mean": mean, "std": std})
    assert same_bits(mean, fixed[0]) and same_bits(std, fixed[1]), "without a decay it is only read"


def test_without_limits_renormalised_training_is_inference():
    p = replace(P, dtype=FLOAT64, eps=1e-3)
    running = pair()
    y = p.train(renorm=True, running_mean=running[0].copy(), running_var=running[1].copy())[0]
    assert np.allclose(
        y, batchnorm.batch_norm(p.x, *running, *p.parameters, eps=1e-3), rtol=1e-12, atol=1e-12
    )


# ---- who stays out ---------------------------------------------------------------------------------------


def test_channels_without_two_values_stay_as_they_are():
    x = rng("few").standard_normal((6, 4, 5))
    mask = np.ones(x.shape, bool)
    mask[:, 1], mask[:, 2], mask[:, 3] = False, False, False
    mask[2, 2, 1] = mask[0, 3, 0] = mask[5, 3, 4] = True  # none, one and two values
    x[~mask] = np.nan
    for ddof, keep in itertools.product((0, 1), "xy"):
        running, before = pair(4), pair(4)
        beta = np.arange(4.0)
        y, saved = update(x, running, mask=mask, beta=beta, running_ddof=ddof, keep=keep)
        assert saved.count.tolist() == [30, 0, 1, 2]
        assert (
            np.isnan(saved.mean[1])
            and np.isnan(saved.var[1])
            and saved.mean[2] == x[2, 2, 1]
            and saved.var[2] == 0
        )
        assert not y[~mask].any() and y[2, 2, 1] == 2, "of a single value x_hat is 0"
        for new, old in zip(running, before, strict=True):
            assert same_bits(new[1:3], old[1:3]) and (new[[0, 3]] != old[[0, 3]]).all()
        got = backward(np.ones_like(x), saved, needs=("dx", "dgamma", "dbeta"))
        assert not got.dx[~mask].any() and got.dx[2, 2, 1] == 0 and np.isfinite(got.dx).all()
        assert got.dgamma[1] == got.dgamma[2] == 0 and got.dbeta.tolist() == [30, 0, 1, 2]


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_single_value_has_x_hat_0_whatever_eps(eps):
    x = np.array([[1.0, 5], [3, -9999]])
    y, saved = train(x, mask=np.array([[True, True], [True, False]]), eps=eps)
    assert y[0, 1] == 0 and y[1, 1] == 0 and np.isfinite(y).all()
    assert not backward(np.ones_like(x), saved).dx[:, 1].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("each", [False, True], ids=["positions", "elements"])
def test_what_does_not_count_may_hold_anything(each, activation):
    for shape, axis in (((6, 5, 19), 1), ((6, 19, 5), -1), ((40, 70), -1)):
        tensors = [rng("hold", seed).standard_normal(shape).astype(FLOAT32) for seed in range(3)]
        of = shape if each else tuple(1 if i == axis % len(shape) else n for i, n in enumerate(shape))
        mask = rng("mask").random(of) < 0.7
        results = []
        for held in (0, np.nan, np.inf):
            x, dy, z = (np.where(mask, t, FLOAT32.type(held)) for t in tensors)
            for residual in (z, None):
                call = {"channel_axis": axis, "mask": mask, "activation": activation, "residual": residual}
                y, saved = train(x, **call)
                got = backward(dy, saved)
                results.append([y, saved.mean, saved.var, got.dx])
        for i in range(2, 6):
            assert all(same_bits(a, b) for a, b in zip(results[i], results[i % 2], strict=True))


def test_parts_without_values_leave_the_average_alone():
    x = rng("parts").standard_normal((9, 3, 4))
    mask = np.ones((9, 4), bool)
    mask[3:6] = False
    mask[6:] = False
    mask[7, 2] = True  # full, empty, a single value
    running, alone = pair(3), pair(3)
    y, saved = update(x, running, mask=mask, virtual_batch_size=3, decay=0.5)
    want = update(x[:3], alone, decay=0.5)
    assert saved.count[:, 0].tolist() == [12, 0, 1] and np.isnan(saved.mean[1]).all()
    assert all(same_bits(a, b) for a, b in zip(running, alone, strict=True))
    assert same_bits(y[:3], want.y) and not y[3:].any()
    assert not backward(x, saved).dx[3:].any()


@pytest.mark.parametrize("positions", ["mask and weights", "weights and mask per channel"])
@pytest.mark.parametrize("scale", [1, 1e-300, 1e290])
def test_weights_of_what_does_not_count_are_not_read(positions, scale):
    p = replace(P, positions=positions)
    options = p.options()
    options["weights"] = options["weights"] * scale
    want = train(p.x, *p.parameters, **options)
    gone = ~np.moveaxis(np.broadcast_to(p.call().mask, p.data.x.shape), 1, -1).any(axis=-1)
    assert gone.any()
    for value in (np.nan, -np.inf, -1.0, 1e300):
        options["weights"][gone] = value
        got = train(p.x, *p.parameters, **options)
        assert same_bits(got.y, want.y) and same_bits(got.saved.var, want.saved.var)
        assert same_bits(backward(p.dy, got.saved).dx, backward(p.dy, want.saved).dx)


def test_nothing_counts():
    x = np.full((3, 5, 4), np.nan, np.float32)
    for options in (
        {"mask": np.zeros((3, 4), bool)},
        {"lengths": np.zeros(3, int)},
        {"weights": np.zeros(3)},
        {"mask": np.zeros(x.shape, bool)},
    ):
        running, before = pair(), pair()
        y, saved = update(x, running, beta=np.ones(5), **options)
        assert not y.any() and np.isnan(saved.mean).all() and not saved.count.any() and not saved.updated
        assert all(same_bits(a, b) for a, b in zip(running, before, strict=True))
        got = backward(np.ones_like(x), saved)
        assert not got.dx.any() and not got.dbeta.any()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 3), {}), ((1, 3, 1), {}), ((4, 3), {"virtual_batch_size": 1}),
        ((4, 3), {"mask": np.array([True, False, False, False])}),
        ((4, 3), {"mask": np.eye(4, 3, dtype=bool)}), ((4, 3), {"weights": np.array([0, 0, 2.0, 0])}),
    ],
    ids=str,
)  # fmt: skip
def test_a_batch_in_which_no_channel_has_two_values_is_an_error(shape, options):
    x, running, before = rng("one").standard_normal(shape), pair(3), pair(3)
    out = np.full_like(x, 7)
    with pytest.raises(ValueError, match=r"one value per channel|no channel.*two values|single value"):
        update(x, running, out=out, **options)
    assert (out == 7).all() and all(same_bits(a, b) for a, b in zip(running, before, strict=True))
    for ddof in (0, 1):  # it can be normalised by given statistics, and still none can be had from it
        given = {"mean": np.zeros(3), "var": np.ones(3), "running_ddof": ddof}
        assert not update(x, running, **given, **options).saved.updated
        assert all(same_bits(a, b) for a, b in zip(running, before, strict=True))


def test_weights_that_sum_to_no_more_than_ddof():
    """n - 1 is no divisor: an error with ddof 1, and none with ddof 0 or without running statistics."""
    x = np.array([[1.0], [2.0], [4.0]])
    for weights in (np.array([0.25, 0.25, 0.5]), np.array([0.1, 0.2, 0.3])):
        running = np.zeros(1), np.ones(1)
        with pytest.raises(ValueError, match=r"weights sum to .*running_ddof"):
            update(x, running, weights=weights, decay=0)
        assert running[0][0] == 0 and running[1][0] == 1
        mean = (weights @ x)[0] / weights.sum()
        var = (weights @ (x - mean) ** 2)[0] / weights.sum()
        for _, saved in (
            train(x, weights=weights),
            update(x, running, weights=weights, decay=0, running_ddof=0),
        ):
            assert np.isclose(saved.mean[0], mean) and np.isclose(saved.var[0], var)
        assert np.isclose(running[0][0], mean) and np.isclose(running[1][0], var)


# ---- non-finite values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [None, 2])
def test_on_nonfinite(value, size):
    p = replace(P, size=size)
    x = p.x
    x[3, 3, 4] = value
    clean, before = pair(), pair()
    update(p.x, clean, virtual_batch_size=size)
    running = pair()
    saved = update(x, running, virtual_batch_size=size).saved
    assert saved.updated
    for new, old in zip(running, clean, strict=True):
        assert not np.isfinite(new[3]) and same_bits(np.delete(new, 3), np.delete(old, 3))
    running = pair()
    y, saved = update(x, running, virtual_batch_size=size, on_nonfinite="skip")
    assert not saved.updated and all(same_bits(a, b) for a, b in zip(running, before, strict=True))
    assert np.isfinite(np.delete(y, 3, 1)).all()
    out = np.full_like(x, 7)
    with pytest.raises(ValueError, match="channel 3"):
        update(x, running, virtual_batch_size=size, on_nonfinite="raise", out=out)
    assert (out == 7).all() and all(same_bits(a, b) for a, b in zip(running, before, strict=True))
    for how in ("skip", "raise"):
        again = pair()
        assert update(p.x, again, virtual_batch_size=size, on_nonfinite=how).saved.updated
        assert all(same_bits(a, b) for a, b in zip(again, clean, strict=True))


def test_nan_already_there_stays_in_its_channel():
    running = pair()
    running[0][1], running[1][3] = np.nan, np.nan
    update(P.x, running)
    assert np.isnan(running[0]).tolist() == [False, True, False, False, False]
    assert np.isnan(running[1]).tolist() == [False, False, False, True, False]


# ---- where they lie --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [2, 3, -1, -2])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_strided_arrays_are_updated_in_place(stride, dtype):
    plain, bases = pair(dtype=dtype), [np.full(5 * abs(stride), 77, dtype) for _ in range(2)]
    views = [base[::stride] for base in bases]
    for view, values in zip(views, plain, strict=True):
        view[...] = values
    update(P.x, views)
    update(P.x, plain)
    for view, base, values in zip(views, bases, plain, strict=True):
        assert same_bits(view, values)
        view[...] = 77
        assert np.all(base == 77)
    table = np.zeros((5, 2))
    update(P.x, table.T)
    other = [np.zeros(5), np.zeros(5)]
    update(P.x, other)
    assert same_bits(table[:, 0], other[0]) and same_bits(table[:, 1], other[1])


def test_given_statistics_and_the_update_are_apart():
    """Frozen statistics normalise; what the batch has enters the running ones, weights and all."""
    for options in ({}, {"weights": np.arange(1.0, 5)}, {"virtual_batch_size": 2}):
        running, alone = pair(), pair()
        y, saved = update(P.x, running, mean=np.zeros(5), var=np.ones(5), **options)
        update(P.x, alone, **options)
        assert all(same_bits(a, b) for a, b in zip(running, alone, strict=True))
        assert same_bits(y, batchnorm.batch_norm(P.x, np.zeros(5), np.ones(5))) and not saved.mean.any()
        frozen = pair()
        update(P.x, frozen, mean=frozen[0], var=frozen[1], **options)
        assert all(same_bits(a, b) for a, b in zip(frozen, alone, strict=True)), (
            "the statistics themselves may be updated"
        )
