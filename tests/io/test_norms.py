"""The table of formats: names to arrays and back, what they do not hold, and layers of it."""

from __future__ import annotations

import numpy as np
import pytest
from batchnorm import BatchNorm, formats
from batchnorm.formats import FORMATS, Norm, arrays_of, find, from_layer, lost, to_layer

from support.models import C, images, library, same_function, trained
from support.refusals import refused

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")]

ROLES = ("gamma", "beta", "mean", "var")
NAMED = [name for name in FORMATS if name not in ("onnx", "caffe")]


def vectors(seed=0):
    random = np.random.default_rng(seed)
    return [random.uniform(0.5, 2, C).astype(np.float32) for _ in ROLES]


def numbers(norm):
    return [getattr(norm, role) for role in ROLES]


def equal(a, b):
    return all(
        (x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in zip(a, b, strict=True)
    )


# ---- names, written as the libraries write them ------------------------------------------------------------

G, B, M, V = vectors()
# What the library's own objects hold, the name of the norm there, its format, the counter.
DICTIONARIES = {
    "PyTorch state_dict": (
        {"layer1.0.bn1.weight": G, "layer1.0.bn1.bias": B, "layer1.0.bn1.running_mean": M,
         "layer1.0.bn1.running_var": V, "layer1.0.bn1.num_batches_tracked": np.array(7), "fc.weight": G},
        "layer1.0.bn1", "pytorch", 7,
    ),
    "of DistributedDataParallel": (
        {"module.bn.weight": G, "module.bn.bias": B, "module.bn.running_mean": M, "module.bn.running_var": V},
        "bn", "pytorch", None,
    ),
    "of torch.compile": (
        {"_orig_mod.a.bn.weight": G, "_orig_mod.a.bn.bias": B, "_orig_mod.a.bn.running_mean": M,
         "_orig_mod.a.bn.running_var": V}, "a.bn", "pytorch", None,
    ),
    "of a compiled submodule in DistributedDataParallel": (
        {f"module.a._orig_mod.bn.{k}": v for k, v in
         {"weight": G, "bias": B, "running_mean": M, "running_var": V}.items()}, "a.bn", "pytorch", None,
    ),
    "of FSDP and a checkpointed block": (
        {f"_fsdp_wrapped_module.a._checkpoint_wrapped_module.bn.{k}": v for k, v in
         {"weight": G, "bias": B, "running_mean": M, "running_var": V}.items()}, "a.bn", "pytorch", None,
    ),
    "a layer alone": ({"weight": G, "bias": B, "running_mean": M, "running_var": V}, "", "pytorch", None),
    "Keras paths": (
        {"sequential/bn/gamma": G, "sequential/bn/beta": B, "sequential/bn/moving_mean": M,
         "sequential/bn/moving_variance": V}, "sequential/bn", "keras", None,
    ),
    "Keras 2 names": (
        {"bn/gamma:0": G, "bn/beta:0": B, "bn/moving_mean:0": M, "bn/moving_variance:0": V},
        "bn", "keras", None,
    ),
    "TF1 slim": (
        {"net/conv1/BatchNorm/gamma": G, "net/conv1/BatchNorm/beta": B, "net/conv1/BatchNorm/moving_mean": M,
         "net/conv1/BatchNorm/moving_variance": V, "net/conv1/weights": G},
        "net/conv1/BatchNorm", "tensorflow", None,
    ),
    "TF1 with a counter": (
        {"bn/gamma": G, "bn/beta": B, "bn/moving_mean": M, "bn/moving_variance": V,
         "bn/moving_mean/biased": M, "bn/moving_mean/local_step": np.float32(12)}, "bn", "tensorflow", 12,
    ),
    "Flax": (
        {"params": {"BatchNorm_0": {"scale": G, "bias": B}, "Dense_0": {"kernel": G, "bias": B}},
         "batch_stats": {"BatchNorm_0": {"mean": M, "var": V}}}, "BatchNorm_0", "flax", None,
    ),
    "Haiku": (
        {"params": {"net/~/batch_norm": {"scale": G[None, None], "offset": B[None, None]}},
         "state": {"net/~/batch_norm/~/mean_ema": {"average": M[None, None], "hidden": M[None, None],
                                                   "counter": np.int32(9)},
                   "net/~/batch_norm/~/var_ema": {"average": V[None, None], "hidden": V[None, None],
                                                  "counter": np.int32(9)}}}, "net/~/batch_norm", "haiku", 9,
    ),
    "MXNet": (
        {"arg:bn0_gamma": G, "arg:bn0_beta": B, "aux:bn0_moving_mean": M, "aux:bn0_moving_var": V},
        "bn0", "mxnet", None,
    ),
    "Gluon": (
        {"net_batchnorm0_gamma": G, "net_batchnorm0_beta": B, "net_batchnorm0_running_mean": M,
         "net_batchnorm0_running_var": V}, "net_batchnorm0", "gluon", None,
    ),
    "Gluon 2": (
        {"features.1.gamma": G, "features.1.beta": B, "features.1.running_mean": M,
         "features.1.running_var": V}, "features.1", "gluon", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DICTIONARIES)
def test_names_of_other_libraries(case):
    arrays, name, format, count = DICTIONARIES[case]
    found = find(arrays)
    assert list(found) == [name]
    norm = found[name]
    assert (norm.format, norm.num_updates, norm.unsure, norm.fault) == (format, count, "", "")
    assert equal(numbers(norm), [G, B, M, V]) and norm.name == name
    assert equal(numbers(find(arrays, format)[name]), [G, B, M, V])
    layer = to_layer(norm)
    row = FORMATS[format]
    own = (layer.eps, layer.decay, layer.running_ddof, layer.channel_axis, layer.name)
    assert own == (row.eps, row.decay, row.running_ddof, row.channel_axis, name or None)


@pytest.mark.parametrize("format", NAMED)
def test_there_and_back(format):
    for options in ({}, {"dtype": np.float64}):
        debiased, ddof = format == "haiku", FORMATS[format].running_ddof  # as all is there
        layer = trained(decay=0.97, eps=2e-4, running_ddof=ddof, zero_debias=debiased, **options)
        norm = from_layer(layer)
        arrays = arrays_of(norm, format)
        back = find({**arrays, "other": np.ones(3)})["bn1"]
        assert back.format == format and equal(numbers(back), numbers(norm))
        assert back.num_updates == (200 if "-" not in FORMATS[format].names.split() else None)
        again = to_layer(back, eps=2e-4, decay=0.97, channel_axis=1)
        assert again.dtype == layer.dtype and same_function(layer, again, 0)
        before = layer.running_mean.copy()
        x = images(77, dtype=layer.dtype)
        assert np.array_equal(layer(x), again(x))  # training goes on
        assert np.array_equal(layer.running_mean, again.running_mean) and (before != layer.running_mean).all()
        assert np.array_equal(layer.running_var, again.running_var)
        layer.running_mean[:] = before


def test_a_norm_keeps_its_numbers_while_the_layer_goes_on():
    layer = trained()
    norm, names = from_layer(layer), ("gamma", "beta", "mean", "var")
    before = {name: getattr(norm, name).copy() for name in names}
    layer(images(77))
    for parameter in layer.parameters():
        parameter.value[:] += 1
    assert all(np.array_equal(getattr(norm, name), before[name]) for name in names)


def test_haiku_gets_the_averages_before_their_debias_too():
    layer = trained(decay=0.97, zero_debias=True, running_ddof=0)
    arrays = arrays_of(from_layer(layer), "haiku")
    for name, value in (("mean", layer.running_mean), ("var", layer.running_var)):
        hidden = value * (1 - 0.97**layer.running.num_updates)
        np.testing.assert_allclose(arrays[f"bn1/~/{name}_ema/hidden"], hidden, rtol=1e-6)


@pytest.mark.parametrize("format", NAMED)
@pytest.mark.parametrize(
    "absent", [{"scale": False}, {"center": False}, {"scale": False, "center": False}], ids=str
)
def test_absent_gamma_or_beta(format, absent):
    layer = trained(running_ddof=FORMATS[format].running_ddof, **absent)
    back = find(arrays_of(from_layer(layer), format))["bn1"]
    kept = format in ("pytorch", "batchnorm", "keras", "tensorflow")
    assert (back.gamma is None) == (kept and "scale" in absent)
    assert (back.beta is None) == (kept and "center" in absent)
    assert same_function(layer, to_layer(back, eps=layer.eps, channel_axis=1))


def test_several_formats_at_once_and_their_order():
    arrays = {}
    for i, format in enumerate([*NAMED[::-1]]):
        arrays |= arrays_of(Norm(f"n{i}", M, V, G, B, num_updates=3), format)
    found = find(arrays)
    assert {name: norm.format for name, norm in found.items()} == {
        f"n{i}": f for i, f in enumerate(NAMED[::-1])
    }
    places = [list(arrays).index(norm.keys["mean"]) for norm in found.values()]
    assert places == sorted(places)
    assert list(find(arrays, "flax")) == [f"n{NAMED[::-1].index('flax')}"]


def test_wrapped_twins_keep_their_names():
    state = {"weight": G, "bias": B, "running_mean": M, "running_var": V}
    for prefixes in (["", "module."], ["module.", ""]):
        found = find({f"{p}bn.{k}": v for p in prefixes for k, v in state.items()})
        assert list(found) == [f"{p}bn" for p in prefixes] and found["bn"].keys["mean"] == "bn.running_mean"


def test_what_only_looks_like_a_batch_norm():
    state = {"ln.weight": G, "ln.bias": B, "obs.mean": M, "obs.count": np.array(3), "x.running_mean": M}
    state |= {"im.running_mean": np.ones((3, 4)), "im.running_var": np.ones((3, 4))}
    state |= {"y.running_mean": M, "y.running_var": V[:3], "z.running_mean": M[:0], "z.running_var": V[:0]}
    assert find(state) == {}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a.running_mean": M, "a.running_var": V}, "neither weight nor bias"),
        ({"in1.weight": G, "in1.bias": B, "in1.running_mean": M, "in1.running_var": V}, "name says so"),
        (
            {
                "b.instance_norm.weight": G,
                "b.instance_norm.running_mean": M,
                "b.instance_norm.running_var": V,
            },
            "name",
        ),
        ({"obs/mean": M, "obs/var": V}, "may be other statistics"),
    ],
)
def test_look_alikes_are_marked(arrays, said):
    (norm,) = find(arrays).values()
    assert said in norm.unsure and not norm.fault
    to_layer(norm)


@pytest.mark.parametrize("name", ["main.bn", "inception.bn1", "begin", "plain.1", "resin2"])
def test_names_that_hold_in_are_not_instances(name):
    (norm,) = find({f"{name}.weight": G, f"{name}.running_mean": M, f"{name}.running_var": V}).values()
    assert norm.unsure == ""


def test_an_array_of_another_shape_is_a_fault():
    (norm,) = find({"a.weight": np.ones((C, 2)), "a.running_mean": M, "a.running_var": V}).values()
    with pytest.raises(
        ValueError, match=r"a.weight has shape \(5, 2\), expected \(5,\), that of a.running_mean"
    ):
        to_layer(norm)


@pytest.mark.parametrize(
    "twins", [("params/a/{}", "state/params/a/{}"), ("arg:a_{}", "a_{}"), ("a/{}:0", "a/{}")]
)
def test_two_arrays_of_one_name_are_a_fault(twins):
    """Unless they are the same one."""
    first, second = (
        {
            way.format(n): v
            for n, v in zip(("gamma", "beta", "moving_mean", "moving_var"), (G, B, M, V), strict=True)
        }
        for way in twins
    )
    (norm,) = find(first | second).values()
    assert not norm.fault
    second[twins[1].format("gamma")] = G + 1
    (norm,) = find(first | second).values()
    with pytest.raises(ValueError, match=r"gamma.* and .*gamma are both a.gamma, expected one of them: drop"):
        to_layer(norm)


def test_dtypes_are_widened():
    half = {
        "a.weight": G.astype(np.float16),
        "a.running_mean": M.astype(np.float16),
        "a.running_var": V.astype(">f4"),
    }
    (norm,) = find(half).values()
    assert {v.dtype.str for v in (norm.gamma, norm.mean, norm.var)} == {np.dtype(np.float32).str}
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    (norm,) = find({k: v.astype(bfloat16) for k, v in half.items()}).values()
    assert norm.mean.dtype == np.float32 and np.array_equal(norm.mean, M.astype(np.float16).astype(bfloat16))
    found = find({**half, "a.running_var": V.astype(np.complex64), "b.running_mean": M, "b.running_var": V})
    assert not found["b"].fault and np.array_equal(found["b"].mean, M)  # one bad array is no other's fault
    with pytest.raises(ValueError, match=r"a.running_var has dtype complex64, expected real numbers"):
        to_layer(found["a"])


@pytest.mark.parametrize("count", [-1, np.nan, np.ones(2), 2.0**70])
def test_counters_that_count_nothing(count):
    with pytest.raises(ValueError, match=r"a.num_batches_tracked is .*, expected the number of updates"):
        find({"a.running_mean": M, "a.running_var": V, "a.num_batches_tracked": np.array(count)})


ERRORS = [
    (lambda: find([1]), TypeError, "arrays is of type list, expected a mapping of names to arrays"),
    (lambda: find({}, "torch"), ValueError, "format is 'torch', expected None, 'batchnorm', 'pytorch'"),
    (lambda: find({}, 3), TypeError, r"format is 3 \(int\), expected"),
    (lambda: arrays_of(Norm("a", M, V), "onnx"), ValueError, "'onnx', which has no named arrays"),
    (lambda: arrays_of(Norm("a", M, V), "kera"), ValueError, "format is 'kera'.*did you mean 'keras'"),
    (lambda: lost(Norm("a", M, V), None), TypeError, "format is None, expected"),
    (lambda: to_layer(M), TypeError, "norm is of type numpy.ndarray, expected a Norm"),
    (lambda: to_layer(Norm("a", M * np.nan, V)), ValueError, "mean of 'a' is nan at channel 0, expected fin"),
    (
        lambda: to_layer(Norm("a", M, -V)),
        ValueError,
        "var of 'a' is .* at channel .*, expected at least -1e-05, -eps",
    ),
    (lambda: to_layer(Norm("a", M, V), momentum=0.1), TypeError, "momentum.*pass decay=0.9"),
    (lambda: to_layer(Norm("a", M, V), dtype=np.float64), TypeError, "no argument 'dtype', which the norm"),
    (lambda: to_layer(Norm("a", M, V), name=3), TypeError, r"name is 3 \(int\), expected a str"),
    (
        lambda: to_layer(Norm("a", M, V, eps=0.1), eps=5.0),
        ValueError,
        "at least 4.9, what var . eps allows as eps goes",
    ),
    (lambda: from_layer(BatchNorm()), RuntimeError, "from_layer.. needs the channel count"),
    (lambda: from_layer(BatchNorm((2, 3), channel_axis=(1, 2))), ValueError, r"=\(1, 2\), expected one"),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS, ids=range(len(ERRORS)))
def test_errors(call, error, match):
    refused(call, error, match, lambda: (G, B, M, V))


# ---- eps ---------------------------------------------------------------------------------------------------


def test_variances_down_to_minus_eps_are_taken():
    var = np.array([-9e-6, 0, 1e-5, 1, 2], np.float64)
    layer = to_layer(Norm("a", np.zeros(C), var, eps=1e-5))
    assert layer.running_var.min() == 0 and 0 < layer.eps < 1.1e-6
    np.testing.assert_allclose(layer.running_var + layer.eps, var + 1e-5, rtol=1e-12)
    np.testing.assert_allclose(layer.scale_shift()[0], 1 / np.sqrt(var + 1e-5), rtol=1e-12)


@pytest.mark.parametrize("eps", [0, 1e-7, 1e-3, 0.4])
def test_another_eps_leaves_the_function(eps):
    norm = Norm("a", *np.split(np.linspace(0.5, 3, 2 * C), 2), eps=1e-5)
    one, other = to_layer(norm), to_layer(norm, eps=eps)
    assert other.eps == eps
    np.testing.assert_allclose(one.scale_shift(), other.scale_shift(), rtol=1e-12)


def test_eps_that_the_file_does_not_hold_is_what_is_said():
    norm = Norm("a", M, V)
    assert to_layer(norm, eps=0.1).eps == 0.1 and np.array_equal(to_layer(norm, eps=0.1).running_var, V)


# ---- statistics that are known, cold or initial ------------------------------------------------------------


def test_what_is_known_of_the_statistics():
    zeros, ones = np.zeros(C, np.float32), np.ones(C, np.float32)
    with pytest.raises(RuntimeError, match="never updated"):
        to_layer(Norm("a", zeros, ones, num_updates=0))(images(), training=False)
    assert "never_updated" in to_layer(Norm("a", zeros, ones)).report().codes
    assert to_layer(Norm("a", M, V)).report().ok  # no counter, but no initial values
    assert to_layer(Norm("a", M, V, num_updates=0)).report().ok
    assert to_layer(Norm("a", M, V, num_updates=10**6)).report().ok
    assert to_layer(Norm("a", M, V, num_updates=5)).report().codes == ("cold",)
    assert to_layer(Norm("a", M, V, num_updates=5, zero_debias=True)).report().ok
    assert to_layer(Norm("a", M, V, num_updates=7), decay=0.5).report().ok


def test_options_of_the_layer():
    layer = to_layer(Norm("a", M, V, G), data_format="NHWC", activation="relu", decay=None, name="b")
    assert (layer.data_format, layer.activation, layer.decay, layer.name) == ("NHWC", "relu", None, "b")
    assert layer.beta is None and layer(images(axis=-1)).min() == 0


@pytest.mark.parametrize("given", [{}, {"gamma": G, "beta": B}], ids=["plain", "affine"])
def test_gamma_and_beta_that_a_layer_is_told_to_have(given):
    # MXNet's fix_gamma, of which its files say nothing: gamma counts as 1.
    norm = Norm("a", M, V, **given, format="mxnet")
    layer = to_layer(norm, scale=False, center=True)
    assert layer.gamma is None and np.array_equal(layer.beta, given.get("beta", np.zeros(C)))
    assert np.array_equal(to_layer(norm, scale=True).gamma, given.get("gamma", np.ones(C)))


# ---- the libraries themselves ------------------------------------------------------------------------------


def steps_of(apply, variables, layer):
    """Training of another library's layer beside ours, then inference."""
    for seed in range(3):
        y, variables = apply(variables, images(seed, axis=-1), True)
        np.testing.assert_allclose(layer(images(seed, axis=-1)), y, rtol=1e-6, atol=2e-6)
    y, _ = apply(variables, images(9, axis=-1), False)
    np.testing.assert_allclose(layer(images(9, axis=-1), training=False), y, rtol=1e-6, atol=2e-6)
    return variables


@pytest.mark.slow
def test_flax():
    jax, nn = library("jax"), library("flax.linen")
    model = nn.BatchNorm(momentum=0.9, epsilon=1e-3)
    start = model.init(jax.random.key(0), images(axis=-1), use_running_average=False)
    start["batch_stats"]["mean"], start["params"]["scale"] = M, G

    def apply(variables, x, training):
        y, new = model.apply(variables, x, use_running_average=not training, mutable=["batch_stats"])
        return y, {**variables, **new}

    (norm,) = find(start).values()
    assert norm.format == "flax" and np.array_equal(norm.mean, M) and np.array_equal(norm.gamma, G)
    layer = to_layer(norm, eps=1e-3, decay=0.9)
    variables = steps_of(apply, start, layer)
    (norm,) = find(variables).values()
    np.testing.assert_allclose(layer.running_var, norm.var, rtol=1e-5)
    back = arrays_of(from_layer(layer, "BatchNorm_0"), "flax")
    assert {"params/BatchNorm_0/scale", "batch_stats/BatchNorm_0/var"} <= set(back)


@pytest.mark.slow
def test_haiku():
    jax, hk = library("jax"), library("haiku")
    model = hk.transform_with_state(
        lambda x, training: hk.BatchNorm(True, True, 0.9, eps=1e-3)(x, is_training=training)
    )
    params, state = model.init(jax.random.key(0), images(axis=-1), True)

    def apply(variables, x, training):
        y, new = model.apply(variables["params"], variables["state"], None, x, training)
        return y, {**variables, "state": new}

    variables = {"params": params, "state": state}
    for seed in range(5, 7):  # from where nothing is known on
        _, variables = apply(variables, images(seed, axis=-1), True)
    (norm,) = find(variables).values()
    assert (norm.name, norm.format, norm.num_updates) == ("batch_norm", "haiku", 2) and norm.zero_debias
    layer = to_layer(norm, eps=1e-3, decay=0.9)
    variables = steps_of(apply, variables, layer)
    (norm,) = find(variables).values()
    np.testing.assert_allclose(layer.running_var, norm.var, rtol=1e-5)
    np.testing.assert_allclose(layer.running_mean, norm.mean, rtol=1e-5)
    back = arrays_of(from_layer(layer, "batch_norm"), "haiku")
    for module, values in variables["state"].items():
        for name, value in values.items():
            np.testing.assert_allclose(back.pop(f"{module}/{name}"), value.ravel(), rtol=1e-5)
    assert sorted(back) == ["batch_norm/offset", "batch_norm/scale"]


# ---- what is lost ------------------------------------------------------------------------------------------


def test_what_formats_cannot_hold():
    layer = BatchNorm(C, eps=0.5, decay=0.8, activation="relu", renorm={"rmax": 3.0}, virtual_batch_size=2,
                      channel_axis=-1, zero_debias=True, keep="x")  # fmt: skip
    layer(images(axis=-1))
    norm = from_layer(layer)
    other = ["activation='relu'", "renorm={'rmin': 0.0, 'rmax': 3.0, 'dmax': inf, 'decay': None}",
             "virtual_batch_size=2"]  # fmt: skip
    assert list(norm.other) == ["activation", "renorm", "virtual_batch_size"]
    assert lost(norm, "pytorch") == [
        "eps=0.5 (pytorch: 1e-05 unless told)", "decay=0.8 (pytorch: 0.9 unless told)",
        "channel_axis=-1 (pytorch: 1 unless told)", "zero_debias=True", *other,
    ]  # fmt: skip
    assert lost(norm, "keras") == [
        "eps=0.5 (keras: 0.001 unless told)",
        "decay=0.8 (keras: 0.99 unless told)",
        "running_ddof=1 (keras: 0 unless told)",
        "num_updates=1",
        "zero_debias=True",
        *other,
    ]
    assert lost(norm, "batchnorm") == other
    assert lost(Norm("a", M, V), "pytorch") == [] == lost(from_layer(BatchNorm(3)), "pytorch")


OWN = [{}, {"decay": None}, {"warmup": True, "decay": 0.99}, {"activation": "leaky_relu", "slope": 0.3},
       {"renorm": {"rmax": 3.0}, "virtual_batch_size": 2}, {"zero_debias": True}, {"keep": "y"}]  # fmt: skip


@pytest.mark.parametrize("options", OWN, ids=str)
def test_a_layer_of_this_package_comes_back_whole(options):
    layer = trained(steps=7, **options)
    for norm in (from_layer(layer), *find({"bn1": layer.state_dict()}).values()):
        again = to_layer(norm)
        kept = {"keep": "x"}  # where memory is saved is no property of the function
        assert str({**again.state_dict(), **kept}) == str({**layer.state_dict(), **kept})
        state = layer.state_dict()
        assert np.array_equal(layer(images(8)), again(images(8)))
        assert np.array_equal(layer.running_mean, again.running_mean)
        layer.load_state_dict(state)
    assert ("decay=None" in lost(from_layer(layer), "pytorch")) == (
        "decay" in options and not options["decay"]
    )


def test_the_module_says_its_names():
    assert all(hasattr(formats, name) for name in formats.__all__)
