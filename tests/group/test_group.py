"""One batch over several processes: the same bits for any number of them, any cut, any order, and failures
that all learn of. Processes are threads here; those of MPI and gloo are in test_processes.py."""

from __future__ import annotations

import copy
import hashlib
import pickle
import threading

import batchnorm
import ml_dtypes
import numpy as np
import pytest
from batchnorm import BatchNorm, Moments, batch_norm_backward, batch_norm_train, moments, recalibrate
from batchnorm.distributed import Group, LocalGroup, torch_group
from batchnorm.settings import flag

from support.checks import running_on
from support.processes import run

pytestmark = pytest.mark.quick

N = 12
CUTS = ([], [5], [3, 4], [1, 1, 9, 12])  # ranks without samples among them
SHAPES = {"NCHW": ((N, 6, 5, 3), 1), "NHWC": ((N, 5, 3, 6), 3), "rows": ((N, 70), 1), "few": ((N, 5), 1)}


def problem(dtype, shape, seed=0, ratio=1):
    random = np.random.default_rng(seed)
    return [random.normal(loc, 2, shape).astype(dtype) for loc in (3 * ratio, 0, 1)]


def bits(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def on_ranks(cuts, order, function):
    """What function(rank, indices of its samples) returns on each rank, and the indices."""
    parts = np.split(np.asarray(order), cuts)
    return LocalGroup(len(parts)).run(lambda rank: function(rank, parts[rank.rank])), parts


def put_together(shape, parts, results, name):
    whole = np.zeros(shape, results[0][name].dtype)
    for indices, result in zip(parts, results, strict=True):
        whole[indices] = result[name]
    return whole


BY_SAMPLE = ("mask", "weights", "lengths", "residual")


def train(x, dy, cuts, order, gamma_rows=False, **options):
    """Results of a forward and a backward, of the whole batch; and of each rank alone."""
    axis = options.get("channel_axis", 1)
    c = x.shape[axis]
    random = np.random.default_rng(9)
    gamma, beta = random.normal(1, 0.3, (2, N, c) if gamma_rows else (2, c)).astype(np.float32)

    def one(rank, mine):
        own = {k: v[mine] if k in BY_SAMPLE else v for k, v in options.items()}
        if "renorm" in own:
            own["renorm"] = {
                k: np.copy(v) if isinstance(v, np.ndarray) else v for k, v in own["renorm"].items()
            }
        mean, var = np.zeros(c), np.ones(c)
        weight, shift = (gamma[mine], beta[mine]) if gamma_rows else (gamma, beta)
        y, saved = batch_norm_train(
            x[mine], weight, shift, running_mean=mean, running_var=var, group=rank, num_threads=1, **own
        )
        g = batch_norm_backward(dy[mine], saved, all_reduce=True, num_threads=1)
        renorm = own.get("renorm", {})
        same = [
            mean,
            var,
            saved.mean,
            saved.var,
            saved.inv_std,
            saved.count,
            *map(np.asarray, renorm.values()),
        ]
        local = batch_norm_backward(dy[mine], saved, needs=("dgamma", "dbeta"), num_threads=1)
        return {
            "y": y, "dx": g.dx, "dgamma": g.dgamma, "dbeta": g.dbeta, "dresidual": g.dresidual,
            "same": [np.array(v) for v in same], "local": [local.dgamma, local.dbeta],
        }  # fmt: skip

    results, parts = on_ranks(cuts, order, one)
    for other in results[1:]:
        assert bits(other["same"]) == bits(results[0]["same"])
    whole = {name: put_together(x.shape, parts, results, name) for name in ("y", "dx")}
    if "residual" in options:
        whole["dresidual"] = put_together(x.shape, parts, results, "dresidual")
    for name in ("dgamma", "dbeta"):
        if gamma_rows:
            whole[name] = put_together(gamma.shape, parts, results, name)
        else:
            assert len({bits([r[name]]) for r in results}) == 1
            whole[name] = results[0][name]
    return whole, results[0]["same"], [r["local"] for r in results]


RANDOM = np.random.default_rng(4)
OPTIONS = {
    "plain": {},
    "activation": {"activation": "silu"},
    "residual": {"activation": "relu", "residual": True},
    "keep y": {"keep": "y", "activation": "leaky_relu"},
    "mask": {"mask": RANDOM.random((N, 5, 3)) < 0.6},
    "elements": {"mask": RANDOM.random((N, 6, 5, 3)) < 0.6},
    "lengths": {"lengths": RANDOM.integers(0, 4, N), "lengths_axis": 3},
    "weights": {"weights": RANDOM.random((N, 5, 3)) * 10.0 ** RANDOM.integers(-30, 30, (N, 1, 1))},
    "weights, elements": {"weights": RANDOM.random(N), "mask": RANDOM.random((N, 6, 5, 3)) < 0.6},
    "renorm": {"renorm": {"rmax": 3, "dmax": 5}},
    "renorm of its own": {"renorm": {"mean": np.zeros(6), "std": np.ones(6), "decay": 0.9, "rmax": 3}},
    "given": {"mean": np.arange(6.0), "var": np.arange(1.0, 7)},
    "gamma of each sample": {"gamma_rows": True},
    "gamma of each sample, curve": {"gamma_rows": True, "activation": "tanh", "residual": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_any_cut_and_order_give_the_same_bits(dtype, options):
    x, dy, z = problem(dtype, (N, 6, 5, 3))
    options = options | ({"residual": z} if "residual" in options else {})
    expected, same, _ = train(x, dy, [], range(N), **options)
    for cuts in CUTS:
        for order in (range(N), np.random.default_rng(len(cuts)).permutation(N)):
            got, others, local = train(x, dy, cuts, order, **options)
            for name, value in got.items():
                assert bits([value]) == bits([expected[name]]), name
            assert bits(others) == bits(same)
            if "gamma_rows" not in options:
                for i, name in enumerate(("dgamma", "dbeta")):
                    total = np.sum([np.float64(each[i]) for each in local], axis=0)
                    np.testing.assert_allclose(total, expected[name], rtol=1e-4, atol=1e-4)


DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
# 16 bits do not hold a spread of 1e-5 of the mean.
RATIOS = [(d, r) for d in DTYPES for r in (0, 1, 1e5) if r < 1e3 or np.dtype(d).itemsize > 2]


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize(("dtype", "ratio"), RATIOS, ids=str)
def test_it_is_the_result_of_one_process(dtype, layout, ratio):
    shape, axis = SHAPES[layout]
    x, dy, _ = problem(dtype, shape, ratio=ratio)
    got, (mean, var, *_), _ = train(x, dy, [3, 4], range(N), channel_axis=axis)
    random = np.random.default_rng(9)
    gamma, beta = random.normal(1, 0.3, (2, shape[axis])).astype(np.float32)
    running_mean, running_var = np.zeros(shape[axis]), np.ones(shape[axis])
    y, saved = batch_norm_train(
        x, gamma, beta, running_mean=running_mean, running_var=running_var, channel_axis=axis
    )
    g = batch_norm_backward(dy, saved)
    within = {"float64": 1e-9, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[np.dtype(dtype).name]
    for value, want in ((got["y"], y), (got["dx"], g.dx), (got["dgamma"], g.dgamma), (got["dbeta"], g.dbeta)):
        np.testing.assert_allclose(np.float64(value), np.float64(want), rtol=within, atol=within)
    np.testing.assert_allclose(mean, running_mean, rtol=1e-14)
    np.testing.assert_allclose(var, running_var, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e200, 1e-250])
def test_data_whose_squares_leave_the_range(scale):
    x, dy, _ = problem(np.float64, (N, 3, 4))
    x *= scale
    one, same, _ = train(x, dy, [], range(N), eps=0.0)
    two, others, _ = train(x, dy, [5, 8], range(N), eps=0.0)
    assert bits(one.values()) == bits(two.values()) and bits(same) == bits(others)
    np.testing.assert_allclose(same[2], x.mean(axis=(0, 2)), rtol=1e-12)


@pytest.mark.parametrize("renorm", [None, {"rmin": 0.5, "dmax": 1.0}], ids=str)
def test_weights_that_sum_to_less_than_two(renorm):
    """Which values count must not follow from the sum of weights, also on a rank that has none."""
    x, dy, _ = problem(np.float32, (N, 6, 5, 3))
    weights = np.full(N, 0.01)
    options = {"weights": weights} | ({"renorm": renorm} if renorm else {})
    want, *_ = train(x, dy, [], range(N), **options)
    assert np.isfinite(want["dgamma"]).all() and want["dgamma"].all()
    for cuts in ([0], [N], [1, 1, 9, 12]):
        got, *_ = train(x, dy, cuts, range(N), **options)
        for name, value in got.items():
            assert bits([value]) == bits([want[name]]), name


def test_a_rank_that_leaves_out_weights_of_one():
    x, dy, _ = problem(np.float32, (2, 3))
    gamma = np.ones(3, np.float32)

    def step(rank, mine):
        weights = None if rank.rank == 1 else np.ones(len(mine))
        _, saved = batch_norm_train(x[mine], gamma, gamma, weights=weights, group=rank)
        return batch_norm_backward(dy[mine], saved, all_reduce=True).dgamma

    (want,), _ = on_ranks([], range(2), step)
    for cuts in ([1], [2], [0]):
        got, _ = on_ranks(cuts, range(2), step)
        assert all(bits([g]) == bits([want]) for g in got) and want.all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("order", [(2, 0, 1, 3), (3, 2, 1, 0), (1, 2, 3, 0), (2, 3, 0, 1)], ids=str)
def test_samples_that_are_not_slowest_in_memory(order, dtype):
    """`order`: the axes in memory, slowest first. A rank of one sample has another view of it."""
    shape = (N, 6, 5, 7)
    for seed in range(3):
        values, dy, _ = problem(dtype, shape, seed)
        back = np.argsort(order)
        x = np.ascontiguousarray(values.transpose(order)).transpose(back)

        def step(rank, mine, x=x, dy=dy):
            part = x[mine[0] : mine[-1] + 1] if mine.size else x[:0]
            y, saved = batch_norm_train(part, group=rank)
            g = batch_norm_backward(dy[mine], saved, needs=("dx", "dgamma"), all_reduce=True)
            return y, g.dx, [g.dgamma, saved.var.copy()]

        expected, _ = on_ranks([], range(N), step)
        for cuts in ([1], [N - 1], [0, 1, 7], list(range(1, N))):
            results, _ = on_ranks(cuts, range(N), step)
            for i in range(2):
                assert bits([np.concatenate([r[i] for r in results])]) == bits([expected[0][i]])
            assert all(bits(r[2]) == bits(expected[0][2]) for r in results)


def test_given_statistics_with_y_kept_on_uneven_ranks():
    """Which channels y does not tell must not follow from how many samples a rank has."""
    x = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float16)
    gamma = np.array([300, 3000, 1], np.float32)

    def step(rank, mine):
        given = {"mean": np.zeros(3), "var": np.ones(3)}
        _, saved = batch_norm_train(x[mine], gamma, np.zeros(3), **given, keep="y", group=rank)
        g = batch_norm_backward(x[mine], saved, needs=("dgamma",), all_reduce=True)
        return g.dgamma, saved.kept_channels.tolist()

    (want,), _ = on_ranks([], range(600), step)
    for cuts in ([1], [599], [0, 30]):
        results, _ = on_ranks(cuts, range(600), step)
        assert all(bits([g]) == bits([want[0]]) and kept == want[1] for g, kept in results)


def test_instruction_set_and_threads_do_not_matter(isa):
    seen = set()
    for threads in (1, 3):
        with running_on(threads=threads, tuning="parallel_elements=0"):
            for layout, (shape, axis) in SHAPES.items():
                x, dy, _ = problem(np.float32, shape)

                def step(rank, mine, x=x, dy=dy, axis=axis):
                    y, saved = batch_norm_train(x[mine], channel_axis=axis, group=rank)
                    return y, batch_norm_backward(dy[mine], saved).dx

                ((y, dx),), _ = on_ranks([], range(N), step)
                seen.add((layout, bits([y, dx])))
    with running_on(isa="baseline"):
        for layout, (shape, axis) in SHAPES.items():
            x, dy, _ = problem(np.float32, shape)
            y, saved = batch_norm_train(x, channel_axis=axis, group=LocalGroup(1)[0])
            seen.add((layout, bits([y, batch_norm_backward(dy, saved).dx])))
    assert len(seen) == len(SHAPES)


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("options", [{}, {"nodata": 7}, {"weights": np.arange(N) % 3}], ids=str)
def test_moments(dtype, options):
    x = np.random.default_rng(0).integers(0, 50, (N, 3, 4)).astype(dtype)
    expected = moments(x, ddof=1, **options)
    for cuts in CUTS:

        def measure(rank, mine):
            own = options | ({"weights": options["weights"][mine]} if "weights" in options else {})
            return moments(x[mine], ddof=1, group=rank, **own)

        results, _ = on_ranks(cuts, range(N), measure)
        assert len({bits(r) for r in results}) == 1
        if dtype is not np.float32 and "weights" not in options:
            assert bits(results[0]) == bits(expected)
        np.testing.assert_allclose(results[0], expected, rtol=1e-13)
    (kept,), _ = on_ranks([], range(N), lambda rank, mine: moments(x, keepdims=True, group=rank))
    assert kept.mean.shape == (1, 3, 1)


def test_moments_of_nothing_anywhere():
    results, _ = on_ranks([1], range(N), lambda rank, mine: moments(np.zeros((0, 2, 3)), group=rank))
    assert np.isnan(results).all()


def test_allreduce_of_accumulators():
    x = np.random.default_rng(0).normal(1e4, 1, (N, 2, 3, 4)).astype(np.float32)
    expected = Moments.merged(Moments(channel_axis=(1, 2)).update(x[i : i + 1]) for i in range(N))

    def total(rank, mine):
        own = Moments(channel_axis=(1, 2))
        for i in mine:
            own.update(x[i : i + 1])
        before = own.to_array()
        merged = own.allreduce(rank)
        assert (own.to_array() == before).all()
        return merged

    for cuts in CUTS:
        results, _ = on_ranks(cuts, range(N), total)
        for merged in results:
            assert merged.channel_axis == (1, 2) and merged.counts.shape == (2, 3)
            assert bits([merged.mean, merged.var]) == bits([expected.mean, expected.var])
    nothing, _ = on_ranks([3], range(N), lambda rank, mine: Moments().allreduce(rank))
    assert [m.channels for m in nothing] == [None, None]

    def other(rank, mine):
        with pytest.raises(ValueError, match=r"channels of shapes \[\(3,\), \(2,\)\], expected the same"):
            Moments().update(np.ones((4, 3 - rank.rank))).allreduce(rank)

    on_ranks([3], range(N), other)


def test_a_flat_state_of_another_machine():
    total = Moments().update(X)
    there = Moments.from_array(total.to_array().astype(">f8"))
    assert bits([there.mean, there.var]) == bits([total.mean, total.var])
    with pytest.raises(TypeError, match="array is float32, expected an array of float64"):
        Moments.from_array(total.to_array().astype(np.float32))


# ---- the layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"zero_debias": True}, {"decay": None}, {"warmup": True, "renorm": {"rmax": 2}}]
)
def test_a_layer_trains_to_the_same_bits(options):
    x, dy, _ = problem(np.float32, (N, 4, 5))

    def steps(rank, mine):
        layer = BatchNorm(4, group=rank, **options)
        for i in range(3):
            y = layer(x[mine] + i)
            dx = layer.backward(dy[mine], all_reduce=True)
            for p in layer.parameters():
                p.value -= 0.1 * p.grad
        state = layer.state_dict()
        return y, dx, [state[name] for name in sorted(state) if state[name].dtype.kind == "f"]

    (one,), _ = on_ranks([], range(N), steps)
    for cuts in CUTS:
        results, parts = on_ranks(cuts, range(N), steps)
        for k in (0, 1):
            assert bits([np.concatenate([r[k] for r in results])]) == bits([one[k]])
        assert len(parts) == len(results) and {bits(r[2]) for r in results} == {bits(one[2])}


def test_what_needs_no_exchange_asks_for_none():
    class Silent:
        def allgather(self, array, /):
            raise AssertionError("an exchange")

    x, dy, _ = problem(np.float32, (N, 4, 5))
    layer = BatchNorm(4, group=Silent(), allow_initial_statistics=True)
    layer(x, training=False)
    _, saved = layer(x, training=False, return_saved=True)
    layer.backward(dy, saved)
    layer.freeze()
    layer(x)
    layer.backward(dy)
    layer.unfreeze().diagnose(x)
    layer.recalibrate([x])
    _, saved = batch_norm_train(x, mean=np.zeros(4), var=np.ones(4), group=Silent())
    batch_norm_backward(dy, saved)
    with pytest.raises(AssertionError, match="an exchange"):
        layer(x)


def test_the_group_is_no_part_of_the_state():
    group = LocalGroup(1)[0]
    layer = BatchNorm(4, group=group, name="conv1.bn")
    layer(np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32))
    for function in (pickle.dumps, copy.copy, copy.deepcopy):
        message = r"conv1.bn: group is of type .*LocalRank.*neither pickled nor copied; set bn.group = None"
        with pytest.raises(TypeError, match=message):
            function(layer)
    assert layer.clone().group is group and layer.clone(share="stats").running is layer.running
    assert layer.apply(layer.state_dict(), np.ones((N, 4), np.float32)).saved.group is group
    assert not [name for name in layer.state_dict() if "group" in name]
    layer.group = None
    assert pickle.loads(pickle.dumps(layer)).group is None


def test_history_of_running_statistics_of_a_group():
    x, _, _ = problem(np.float32, (N, 4, 5))

    def step(rank, mine):
        layer = BatchNorm(4, group=rank, history=5)
        layer(x[mine])
        return layer.history.batch_mean[0], layer.running_mean

    results, _ = on_ranks([3, 3], range(N), step)
    assert len({bits(r) for r in results}) == 1


@pytest.mark.parametrize("one_by_one", [False, True])
def test_recalibrate_a_network(one_by_one):
    batches = [problem(np.float32, (6, 3), seed)[0] for seed in range(7)]

    def of(rank, mine):
        layers = {"first": BatchNorm(3), "second": BatchNorm(3)}
        forward = lambda x: layers["second"](np.abs(layers["first"](x)))  # noqa: E731
        recalibrate(layers, forward, [batches[i] for i in mine], one_by_one=one_by_one, group=rank)
        return [
            (v.running_mean, v.running_var, v.running.num_values, v.running.num_updates)
            for v in layers.values()
        ]

    expected = of(None, range(7))
    for cuts in ([], [3], [2, 2, 6]):
        parts = np.split(np.arange(7), cuts)
        for got in LocalGroup(len(parts)).run(lambda rank, parts=parts: of(rank, parts[rank.rank])):
            for layer, want in zip(got, expected, strict=True):
                assert bits(layer[:3]) == bits(want[:3]) and layer[3] == want[3]


def test_recalibrate_a_layer():
    x, _, _ = problem(np.float32, (N, 4, 5))
    expected = BatchNorm(4).recalibrate([x[i] for i in np.arange(N).reshape(4, 3)])

    def of(rank, mine):
        layer = BatchNorm(4).recalibrate([x[i] for i in mine.reshape(-1, 3)], group=rank)
        again = BatchNorm().recalibrate(Moments().update(x[mine]) if mine.size else Moments(), group=rank)
        return layer.running_mean, layer.running_var, again.num_features

    for cuts in ([], [3], [0, 9]):
        results, _ = on_ranks(cuts, range(N), of)
        for mean, var, channels in results:
            assert bits([mean, var]) == bits([expected.running_mean, expected.running_var]) and channels == 4


# ---- failures ----------------------------------------------------------------------------------------------


def outcomes(ranks, function):
    """What each rank raises; the group is in step afterwards, as an exchange shows."""
    group = LocalGroup(ranks)

    def one(rank):
        try:
            function(rank)
        except BaseException as error:
            return error, rank.allgather(np.array([float(rank.rank)]))
        return None, rank.allgather(np.array([float(rank.rank)]))

    results = group.run(one)
    for _, after in results:
        assert [float(a[0]) for a in after] == list(range(ranks))
    return [error for error, _ in results]


X, DY, _ = problem(np.float32, (N, 4, 5))


def broken_forward(**wrong):
    def call(rank):
        arguments = {"x": X, "running_mean": np.zeros(4), "running_var": np.ones(4), "group": rank}
        arguments |= wrong if rank.rank == 1 else {}
        arguments["x"], out = np.array(arguments["x"]), np.full_like(X, 7)
        if isinstance(arguments["x"], np.ndarray) and arguments["x"].shape == X.shape and "out" not in wrong:
            arguments["out"] = out if arguments["x"].dtype == X.dtype else None
        try:
            batch_norm_train(**arguments)
        finally:
            if rank.rank != 1:
                assert (out == 7).all() and not arguments["running_mean"].any()

    return call


FAULTS = {
    "kind": ({"x": X.astype(np.float32), "gamma": "g"}, TypeError, "gamma is 'g' (str)"),
    "shape": ({"gamma": np.ones(3, np.float32)}, ValueError, "gamma has shape (3,), expected (4,)"),
    "value": ({"eps": -1.0}, ValueError, "eps is -1, expected a finite number >= 0"),
    "check of the core": ({"gamma": np.full(4, np.nan)}, ValueError, "gamma is nan at channel 0"),
    "read-only": ({"running_mean": np.broadcast_to(0.0, 4)}, ValueError, "running_mean is read-only"),
    "decay": ({"decay": 2.0}, ValueError, "decay is 2, expected a number in [0, 1]"),
}


@pytest.mark.parametrize(("wrong", "kind", "message"), FAULTS.values(), ids=FAULTS)
def test_a_rank_that_fails_fails_all(wrong, kind, message):
    zero, own, two = outcomes(3, broken_forward(**wrong))
    assert type(own) is kind and message in str(own)
    for other in (zero, two):
        assert type(other) is RuntimeError and str(other) == f"rank 1 of the group failed: {own}"


def test_ranks_that_differ():
    cases = {
        "another dtype of x on rank 1": {"x": X.astype(np.float64)},
        "another number of channels on rank 1": {
            "x": X[:, :3],
            "running_mean": np.zeros(3),
            "running_var": np.ones(3),
        },
        "other options on rank 1": {"eps": 1e-3},
    }
    for what, wrong in cases.items():
        for error in outcomes(3, broken_forward(**wrong)):
            assert type(error) is ValueError and f"group has {what} than on rank 0, expected the same" in str(
                error
            )

    def other_call(rank):
        moments(X, group=rank) if rank.rank == 2 else batch_norm_train(X, group=rank)

    for error in outcomes(3, other_call):
        assert "group has another call on rank 2 than on rank 0" in str(error)


def test_failures_of_moments_and_backward():
    def measure(rank):
        moments(X, nodata="none" if rank.rank == 0 else None, group=rank)

    first, second = outcomes(2, measure)
    assert type(first) is TypeError and str(second) == f"rank 0 of the group failed: {first}"

    def back(rank):
        _, saved = batch_norm_train(X, group=rank)
        batch_norm_backward(DY[:1] if rank.rank == 1 else DY, saved)

    first, second = outcomes(2, back)
    assert type(second) is ValueError and str(first) == f"rank 1 of the group failed: {second}"

    def needs(rank):
        _, saved = batch_norm_train(X, np.ones(4), np.ones(4), group=rank)
        batch_norm_backward(DY, saved, all_reduce=rank.rank == 0)

    for error in outcomes(2, needs):
        assert "group has other options on rank 1" in str(error)


def test_failures_of_layers():
    def layer_of(rank):
        return BatchNorm(4, group=rank, name="conv1.bn", on_nonfinite="raise")

    def channels(rank):
        layer_of(rank)(X[:, :3] if rank.rank == 0 else X)

    first, second = outcomes(2, channels)
    assert "conv1.bn: x has 3 channels" in str(first) and "conv1.bn: rank 0 of the group failed" in str(
        second
    )

    def kind(rank):
        layer_of(rank)("x" if rank.rank == 1 else X)

    first, second = outcomes(2, kind)
    assert type(second) is TypeError and type(first) is RuntimeError

    def nonfinite(rank):
        layer, x = layer_of(rank), X.copy()
        x[0, 2] = np.inf if rank.rank == 1 else 0
        before = layer.state_dict()
        try:
            layer(x)
        finally:
            assert all((before[name] == value).all() for name, value in layer.state_dict().items())

    for error in outcomes(2, nonfinite):
        assert type(error) is ValueError and "cannot hold at channel 2" in str(error)

    def no_forward(rank):
        layer = layer_of(rank)
        if rank.rank == 1:
            layer(X, training=False, stats="batch", update=True)
        else:
            layer(X)
        layer.backward(DY)

    first, second = outcomes(2, no_forward)
    assert "rank 1 of the group failed" in str(first) and "eval mode" in str(second)

    def calibrate(rank):
        layer = layer_of(None)
        recalibrate([layer], layer, [X, None] if rank.rank == 1 else [X], group=rank)

    first, second = outcomes(2, calibrate)
    assert type(second) is TypeError and str(first).startswith("rank 1 of the group failed: ")

    def empty(rank):
        layer_of(None).recalibrate([], group=rank)

    for error in outcomes(2, empty):
        assert "hold no values" in str(error)


def test_a_failure_of_a_call_that_exchanges_nothing_is_ones_own():
    """The others do not wait, so it must not wait for them."""
    given = {"mean": np.zeros(4), "var": np.ones(4)}

    def forward(rank):
        batch_norm_train(X, np.ones(3 if rank.rank == 1 else 4), **given, group=rank)

    def backward_of(**options):
        def call(rank):
            _, saved = batch_norm_train(X, np.ones(4), np.ones(4), group=rank, **options.get("forward", {}))
            needs = options.get("needs")
            batch_norm_backward(DY[:1] if rank.rank == 1 else DY, saved, needs=needs)

        return call

    def layer(*steps, **wrong):
        def call(rank):
            bn = BatchNorm(4, decay=0.0, group=rank)
            bn(X)
            bn.freeze()
            bn(X[:, :3] if wrong.get("forward") and rank.rank == 1 else X)
            bn.backward(DY, **(wrong["backward"] if wrong.get("backward") and rank.rank == 1 else {}))

        return call

    def of_eval(rank):
        bn = BatchNorm(4, decay=0.0, group=rank)
        bn(X)
        _, saved = bn.eval()(X, return_saved=True)
        bn.backward(DY, saved, accumulate="yes" if rank.rank == 1 else None)

    calls = {
        "given statistics": (forward, "gamma has shape"),
        "backward of given ones": (backward_of(forward=given), "dy has shape"),
        "parameters alone": (backward_of(needs=("dgamma", "dbeta")), "dy has shape"),
        "frozen forward": (layer(forward=True), "x has 3 channels"),
        "frozen backward": (layer(backward={"accumulate": "yes"}), "accumulate is 'yes'"),
        "frozen backward, in the core": (layer(backward={"out": np.zeros(3)}), "out has dtype float64"),
        "a forward in eval": (of_eval, "accumulate is 'yes'"),
    }
    for name, (call, message) in calls.items():
        first, second = outcomes(2, call)
        assert first is None and message in str(second), name


def test_failures_that_a_layer_tells(monkeypatch):
    def mode(**wrong):
        return lambda rank: BatchNorm(4, group=rank)(X, **(wrong if rank.rank == 1 else {}))

    def without_group(rank):
        bn = BatchNorm(4, group=rank)
        bn(X)
        bn.group = None
        bn.backward(DY, accumulate="yes" if rank.rank == 1 else None)

    def other_saved(rank):
        bn = BatchNorm(4, group=rank)
        bn(X)
        bn.backward(DY, "no Saved" if rank.rank == 1 else None)

    def interrupted(rank):
        bn = BatchNorm(4, group=rank)
        bn(X)
        bn.backward(DY, accumulate=KeyboardInterrupt("Ctrl-C") if rank.rank == 1 else None)

    def raises(name, value):
        raise value

    monkeypatch.setattr(
        "batchnorm.layer.flag",
        lambda *given: (
            raises(*given)
            if given[0] == "accumulate" and isinstance(given[1], KeyboardInterrupt)
            else flag(*given)
        ),
    )
    for call, message in (
        (mode(stats="bacth"), "stats is 'bacth'"),
        (mode(training="yes"), "training is 'yes'"),
        (without_group, "accumulate is 'yes'"),
        (other_saved, "saved is 'no Saved'"),
        (interrupted, "Ctrl-C"),
    ):
        first, second = outcomes(2, call)
        assert message in str(second) and str(first) == f"rank 1 of the group failed: {second}"


def test_a_failure_between_two_exchanges_is_told():
    """y does not tell x of a channel with gamma 0, so backward exchanges twice."""
    gamma = np.array([0, 1, 1, 1], np.float32)

    class Interrupted:
        def __init__(self, rank):
            self.rank, self.calls = rank, 0

        def allgather(self, array, /):
            self.calls += 1
            gathered = self.rank.allgather(array)
            if self.calls == 2 and self.rank.rank == 1:
                raise KeyboardInterrupt("Ctrl-C")
            return gathered

    def backward(rank):
        _, saved = batch_norm_train(X, gamma, np.zeros(4), keep="y", group=Interrupted(rank))
        out = np.full_like(DY, 7)
        try:
            batch_norm_backward(DY, saved, out=out)
        finally:
            assert (out == 7).all()

    first, second = outcomes(2, backward)
    assert type(second) is KeyboardInterrupt
    assert type(first) is RuntimeError and "rank 1 of the group failed: KeyboardInterrupt: Ctrl-C" in str(
        first
    )


OTHERS = {
    "decay": {"decay": 0.5},
    "decay of each channel": {"decay": np.full(4, 0.9)},
    "ddof": {"running_ddof": 0},
    "statistics given": {"mean": np.zeros(4), "var": np.ones(4)},
    "no running statistics": {"running_mean": None, "running_var": None},
    "renorm": {"renorm": True},
    "what becomes of Inf": {"on_nonfinite": "raise"},
}


@pytest.mark.parametrize("wrong", OTHERS.values(), ids=OTHERS)
def test_options_that_differ(wrong):
    for error in outcomes(2, broken_forward(**wrong)):
        assert type(error) is ValueError and "group has other options on rank 1 than on rank 0" in str(error)


def test_numbers_of_renorm_that_differ():
    for name in ("rmin", "rmax", "dmax"):

        def call(rank, name=name):
            options = {"rmin": 0.5, "rmax": 2.0, "dmax": 2.0} | ({name: 1.0} if rank.rank else {})
            batch_norm_train(X, running_mean=np.zeros(4), running_var=np.ones(4), renorm=options, group=rank)

        for error in outcomes(2, call):
            assert "group has other options on rank 1 than on rank 0" in str(error)


def test_one_value_in_all_ranks():
    def one(rank):
        batch_norm_train(np.ones((int(rank.rank == 1), 4), np.float32), group=rank)

    for error in outcomes(3, one):
        assert type(error) is ValueError and "one value per channel" in str(error)

    def two(rank):
        _, saved = batch_norm_train(np.full((1, 4), rank.rank, np.float32), group=rank)
        assert saved.count.tolist() == [3] * 4 and saved.mean.tolist() == [1] * 4

    assert outcomes(3, two) == [None] * 3

    def nothing(rank):
        y, saved = batch_norm_train(np.ones((0, 4), np.float32), group=rank)
        assert y.shape == (0, 4) and np.isnan(saved.mean).all()
        assert batch_norm_backward(y, saved).dx.shape == (0, 4)

    assert outcomes(2, nothing) == [None] * 2


def test_an_exception_of_the_group_passes_through():
    class Interrupted:
        def __init__(self, calls):
            self.calls = calls

        def allgather(self, array, /):
            self.calls -= 1
            if self.calls < 0:
                raise KeyboardInterrupt
            return [array]

    for x in (X, np.ascontiguousarray(np.repeat(X, 200, axis=2))):  # with the GIL, and without
        mean, var = np.zeros(4), np.ones(4)
        with pytest.raises(KeyboardInterrupt):
            batch_norm_train(x, running_mean=mean, running_var=var, group=Interrupted(0))
        with pytest.raises(KeyboardInterrupt):  # before the second round, about the mean
            batch_norm_train(x.astype(float) + 1e6, running_mean=mean, running_var=var, group=Interrupted(1))
        assert not mean.any() and (var == 1).all()
        y, saved = batch_norm_train(x, group=Interrupted(1))
        with pytest.raises(KeyboardInterrupt):
            batch_norm_backward(y, saved)


class ProcessGroup:  # what torch's is called
    def allgather(self, output, input, options): ...


class Returns:
    def __init__(self, value):
        self.value = value

    def allgather(self, array, /):
        return self.value


NO_GROUPS = {
    "object": (object(), TypeError, "group is of type object, expected None or an object with allgather"),
    "torch": (
        ProcessGroup(),
        TypeError,
        r"a torch.distributed ProcessGroup, .*use batchnorm.distributed.torch_group",
    ),
    "class": (Returns, TypeError, "expected an instance"),
    "no function": (type("G", (), {"allgather": 3})(), TypeError, "expected an instance"),
    "no list": (Returns(3), TypeError, r"allgather returned 3 \(int\), expected a list of arrays"),
    "no array": (
        Returns(["a"]),
        TypeError,
        r"returned 'a' \(str\) of rank 0, expected a one-dimensional float64",
    ),
    "two dimensions": (
        Returns([np.ones((2, 2))]),
        TypeError,
        "of rank 0, expected a one-dimensional float64",
    ),
    "nobody": (Returns([]), ValueError, "group has gathered nothing, expected an array from each rank"),
    "others alone": (
        Returns([np.zeros(2)]),
        TypeError,
        "no array that equals this rank's own, .*intracommunicator",
    ),
    "float32": (
        Returns([np.zeros(2, np.float32)]),
        TypeError,
        "an array of float32, 1-dimensional, of rank 0",
    ),
    "integers": (Returns([np.zeros(2, int)]), TypeError, "an array of int64, 1-dimensional, of rank 0"),
}


@pytest.mark.parametrize(("group", "kind", "message"), NO_GROUPS.values(), ids=NO_GROUPS)
def test_what_is_no_group(group, kind, message):
    with pytest.raises(kind, match=message):
        batch_norm_train(X, group=group)
    with pytest.raises(kind, match=message):
        moments(X, group=group)
    if not isinstance(group, Returns):
        with pytest.raises(kind, match=message):
            BatchNorm(4, group=group)


def test_what_does_not_go_with_a_group():
    alone = LocalGroup(1)[0]
    with pytest.raises(ValueError, match="virtual_batch_size is given with group, expected one of them"):
        batch_norm_train(X, virtual_batch_size=2, group=alone)
    with pytest.raises(
        ValueError, match="group is given with the channels on axis 0, expected the samples there"
    ):
        batch_norm_train(X, channel_axis=0, group=alone)
    with pytest.raises(ValueError, match="group is given with the channels on axis 0"):
        moments(X, channel_axis=0, group=alone)
    with pytest.raises(ValueError, match="keep is y with a group and a gamma or beta of each sample"):
        batch_norm_train(X, np.ones((N, 4)), keep="y", group=alone)
    _, saved = batch_norm_train(X, group=alone)
    with pytest.raises(
        ValueError, match="saved is of a forward with a group, expected one of a single process"
    ):
        batchnorm.batch_norm_double_backward(DY, saved, ddx=DY)
    assert saved.group is alone and batch_norm_train(X).saved.group is None


def test_local_groups():
    assert isinstance(LocalGroup(1)[0], Group) and len(LocalGroup(3)) == 3
    assert repr(LocalGroup(3)[-1]) == "LocalRank(2 of 3)"
    with pytest.raises(TypeError, match="size is str, expected an int >= 1"):
        LocalGroup("3")
    with pytest.raises(ValueError, match="size is 0, expected an int >= 1"):
        LocalGroup(0)
    with pytest.raises(TypeError, match="a LocalRank is one thread's"):
        copy.copy(LocalGroup(1)[0])

    def leaves(rank):
        if rank.rank == 0:
            raise OSError("the disk is full")
        with pytest.raises(RuntimeError, match="rank 1 waited for one whose thread has ended"):
            rank.allgather(np.zeros(1))

    with pytest.raises(OSError, match="the disk is full"):
        LocalGroup(2).run(leaves)

    def ends(rank):
        if rank.rank != 2:
            moments(X, group=rank)

    with pytest.raises(RuntimeError, match="waited for one whose thread has ended"):
        LocalGroup(3).run(ends)
    group = LocalGroup(2)
    with pytest.raises(RuntimeError, match="waited for one whose thread has ended"):
        group.run(lambda rank: rank.rank or moments(X, group=rank))
    assert [len(all_) for all_ in group.run(lambda rank: rank.allgather(np.zeros(1)))] == [2, 2]
    before = threading.active_count()
    assert LocalGroup(4).run(lambda rank: rank.rank) == [0, 1, 2, 3] and threading.active_count() == before


def test_ctrl_c_ends_ranks_that_wait(monkeypatch):
    later, ended = threading.Event(), threading.Event()

    def one(rank):
        if rank.rank == 0:
            later.wait(30)
            return
        try:
            rank.allgather(np.zeros(1))
        except RuntimeError:
            ended.set()

    def join(thread):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", join)
        with pytest.raises(KeyboardInterrupt):
            LocalGroup(2).run(one)
    assert ended.wait(30)
    later.set()


def test_torch_group_without_torch():
    done = run("""
        import sys
        sys.modules["torch"] = None
        import batchnorm.distributed
        batchnorm.distributed.torch_group()
    """)
    expected = 'ImportError: torch_group needs PyTorch: pip install "batchnorm[torch]"'
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(expected)


def test_torch_group_without_processes():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if torch.distributed.is_initialized():
        pytest.skip("torch.distributed is initialised")
    with pytest.raises(
        RuntimeError, match=r"has no processes, expected to be initialised; call torch\.distributed\.init"
    ):
        torch_group()
