#include "check.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "gate.h"
#include "memory.h"
#include "positions.h"
#include "tuning.h"

namespace batchnorm::check {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string quoted(std::string_view name) {
    std::string s("'");
    s.append(name).append("'");
    return s;
}

// Built by append: g++ 12 warns of an overlap in "(" + std::string&& (GCC bug 105651, fixed in 13).
std::string dims(std::int64_t outer, std::int64_t channels, std::int64_t inner) {
    std::string s("(");
    s.append(std::to_string(outer)).append(", ").append(std::to_string(channels)).append(", ").append(std::to_string(inner)).append(")");
    return s;
}

// Byte range [first, last) that a strided block touches, in unsigned arithmetic so that no pointer is formed outside an object.
struct Range {
    std::uintptr_t first, last;
    bool overlaps(const Range& o) const { return first < o.last && o.first < last; }
};

template <bool writable>
Range range_of(const AnyView<writable>& v) {
    const auto base = reinterpret_cast<std::uintptr_t>(v.data);
    if (v.outer == 0 || v.channels == 0 || v.inner == 0) return {base, base};
    std::int64_t low = 0, high = 0;
    for (const auto& [n, stride] : {std::pair{v.outer, v.outer_stride}, {v.channels, v.channel_stride}, {v.inner, v.inner_stride}}) {
        (stride < 0 ? low : high) += (n - 1) * stride;
    }
    const std::int64_t size = element_size(v.dtype);
    return {base + static_cast<std::uintptr_t>(low * size), base + static_cast<std::uintptr_t>((high + 1) * size)};
}

template <bool writable>
Range range_of(const AnyChannels<writable>& v) {
    const auto base = reinterpret_cast<std::uintptr_t>(v.data);
    const std::int64_t size = v.is_double ? 8 : 4, extent = (v.size - 1) * v.stride;
    return {base + static_cast<std::uintptr_t>(std::min<std::int64_t>(extent, 0) * size),
            base + static_cast<std::uintptr_t>((std::max<std::int64_t>(extent, 0) + 1) * size)};
}

template <bool writable>
void tensor(const AnyView<writable>& v, const char* name) {
    const std::string n = name;
    if (v.outer < 0 || v.channels < 0 || v.inner < 0) {
        fail(n + " has sizes " + dims(v.outer, v.channels, v.inner) + ", expected none to be negative");
    }
    if (v.channels == 0) fail(n + " has 0 channels, expected at least 1");
    if (v.outer == 0 || v.inner == 0) return;
    // count and byte offsets must fit 64 bits, which also keeps all index arithmetic below in range.
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / 16;
    if (v.inner > kMost / v.outer || v.channels > kMost / (v.outer * v.inner)) {
        fail(n + " has sizes " + dims(v.outer, v.channels, v.inner) + ", more elements than can be addressed");
    }
    if (v.data == nullptr) fail(n + " has no data, expected an array of (outer, channels, inner) = " + dims(v.outer, v.channels, v.inner));
    const std::int64_t size = element_size(v.dtype);
    std::int64_t reach = 0;
    for (const auto& [extent, stride] : {std::pair{v.outer, v.outer_stride}, {v.channels, v.channel_stride}, {v.inner, v.inner_stride}}) {
        std::int64_t steps;
        if (stride == std::numeric_limits<std::int64_t>::min() || __builtin_mul_overflow(extent - 1, std::abs(stride), &steps) ||
            __builtin_add_overflow(reach, steps, &reach) || reach > kMost) {
            fail(n + " has strides " + dims(v.outer_stride, v.channel_stride, v.inner_stride) +
                 ", which reach further than can be addressed");
        }
    }
    if (reinterpret_cast<std::uintptr_t>(v.data) % static_cast<std::uintptr_t>(size) != 0) {
        fail(n + " is not aligned to its element size of " + std::to_string(size) + " bytes");
    }
}

bool is_ncs(std::int64_t inner, std::int64_t inner_stride) { return inner > 1 && inner_stride == 1; }
bool is_nsc(std::int64_t channels, std::int64_t channel_stride) { return channels == 1 || channel_stride == 1; }

template <bool writable>
bool fits(const AnyView<writable>& v, kernels::Direction d) {
    return d == kernels::ncs ? v.inner == 1 || v.inner_stride == 1 : is_nsc(v.channels, v.channel_stride);
}

enum class Storage { floating, any };

Geometry geometry(const ConstTensor& x, const char* name = "x", Storage storage = Storage::floating) {
    if (storage == Storage::floating && is_integer(x.dtype)) {
        fail(std::string(name) + " has an integer storage type, expected a floating one: integers have no gradients; convert it, or " +
             "normalise it with batch_norm, whose y is floating");
    }
    tensor(x, name);
    Geometry g{kernels::ncs, x.outer, x.channels, x.inner, x.dtype};
    g.counting = g.count();
    g.weight = static_cast<double>(g.count());
    if (g.count() == 0) return g;
    if (is_ncs(x.inner, x.inner_stride)) {
        g.direction = kernels::ncs;
    } else if (is_nsc(x.channels, x.channel_stride)) {
        g.direction = kernels::nsc;
    } else if (x.inner == 1) {
        g.direction = kernels::ncs;  // runs of one element: slow, but served
    } else {
        fail(name + (" has strides " + dims(x.outer_stride, x.channel_stride, x.inner_stride)) +
             " of (outer, channels, inner), expected 1 for inner or for channels");
    }
    return g;
}

template <bool writable>
void same_shape(const AnyView<writable>& v, const char* name, const Geometry& g, const char* of = "x") {
    const std::string n = name;
    if (v.outer != g.outer || v.channels != g.channels || v.inner != g.inner) {
        fail(n + " has (outer, channels, inner) " + dims(v.outer, v.channels, v.inner) + ", expected " +
             dims(g.outer, g.channels, g.inner) + " as " + of + " has");
    }
    if (v.dtype != g.dtype) fail(n + " has another storage type than " + of + ", expected the same");
    tensor(v, name);
    if (g.count() != 0 && !fits(v, g.direction)) {
        fail(n + " has strides " + dims(v.outer_stride, v.channel_stride, v.inner_stride) + ", expected 1 for " +
             (g.direction == kernels::ncs ? "inner" : "channels") + " as " + of + " has");
    }
}

// An output must not write one element twice.
void distinct_elements(const Tensor& v, const char* name) {
    if (v.outer == 0 || v.inner == 0) return;
    struct {
        std::int64_t n, stride;
    } d[3] = {{v.outer, std::abs(v.outer_stride)}, {v.channels, std::abs(v.channel_stride)}, {v.inner, std::abs(v.inner_stride)}};
    std::sort(d, d + 3, [](auto a, auto b) { return a.stride < b.stride; });
    std::int64_t extent = 0;  // of the smaller strides
    for (const auto& [n, stride] : d) {
        if (n > 1 && stride <= extent) fail(std::string(name) + " has strides that reach one element twice, expected distinct elements");
        if (n > 1) extent += (n - 1) * stride;
    }
}

template <bool writable>
void no_partial_overlap(const Tensor& out, const char* out_name, const AnyView<writable>& in, const char* in_name) {
    if (!range_of(out).overlaps(range_of(in))) return;
    const bool same = out.data == in.data && (out.outer == 1 || out.outer_stride == in.outer_stride) &&
                      (out.channels == 1 || out.channel_stride == in.channel_stride) &&
                      (out.inner == 1 || out.inner_stride == in.inner_stride);
    if (!same) fail(std::string(out_name) + " partly overlaps " + in_name + ", expected the same array (in place) or a separate one");
}

enum class Values { any, finite, non_negative };

// A first look at contiguous values, in a form that compilers turn into vector code: of very many channels it would be felt otherwise.
template <class V>
bool all_good(const V* values, std::int64_t n, V least) {
    std::int64_t bad = 0;
    for (std::int64_t i = 0; i < n; ++i) bad += !(values[i] >= least && values[i] <= std::numeric_limits<V>::max());
    return bad == 0;
}
template <bool writable>
bool all_good(const AnyChannels<writable>& v, Values values) {
    if (v.stride != 1) return false;
    const bool any_sign = values == Values::finite;
    if (v.is_double) return all_good(static_cast<const double*>(v.data), v.size, any_sign ? std::numeric_limits<double>::lowest() : 0.0);
    return all_good(static_cast<const float*>(v.data), v.size, any_sign ? std::numeric_limits<float>::lowest() : 0.0f);
}

template <bool writable>
void channels(const AnyChannels<writable>& v, const char* name, std::int64_t n_channels, Values values = Values::any) {
    const std::string n = name;
    if (v.size != n_channels)
        fail(n + " has " + std::to_string(v.size) + " values, expected " + std::to_string(n_channels) + ", one per channel of x");
    if (values == Values::any || all_good(v, values)) return;
    for (std::int64_t c = 0; c < v.size; ++c) {
        const double value = at(v, c);
        if (!std::isfinite(value))
            fail(n + " is " + std::to_string(value) + " at channel " + std::to_string(c) + ", expected finite values");
        if (values == Values::non_negative && value < 0) {
            fail(n + " is " + std::to_string(value) + " at channel " + std::to_string(c) + ", expected values >= 0");
        }
    }
}

void required(bool present, const char* name) {
    if (!present) fail(std::string(name) + " is missing");
}

void optional_affine(const ConstChannels& gamma, const ConstChannels& beta, std::int64_t n_channels) {
    if (gamma) channels(gamma, "gamma", n_channels, Values::finite);
    if (beta) channels(beta, "beta", n_channels, Values::finite);
}

void eps(double value) {
    if (!std::isfinite(value) || value < 0) fail("eps is " + std::to_string(value) + ", expected a finite number >= 0");
}

void decay(double value) {
    if (!(value >= 0 && value <= 1)) fail("decay is " + std::to_string(value) + ", expected a number in [0, 1]");
}

void separate_elements(const Channels& v, const char* name) {
    if (v.size > 1 && v.stride == 0) fail(std::string(name) + " has stride 0, expected one element per channel");
}

// Two vectors that are written share no element. Interleaved ones (two columns of one array) share an address range only.
void separate(const Channels& a, const char* a_name, const Channels& b, const char* b_name) {
    separate_elements(a, a_name);
    separate_elements(b, b_name);
    if (!range_of(a).overlaps(range_of(b))) return;
    const std::int64_t size = a.is_double ? 8 : 4;
    const auto offset = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(b.data) - reinterpret_cast<std::uintptr_t>(a.data));
    const bool interleaved =
        a.is_double == b.is_double && a.stride == b.stride && a.stride != 0 && offset % size == 0 && (offset / size) % a.stride != 0;
    if (!interleaved) fail(std::string(a_name) + " and " + b_name + " overlap, expected two separate arrays");
}

void running(const Channels& mean, const Channels& var, std::int64_t n_channels) {
    channels(mean, "running_mean", n_channels);
    channels(var, "running_var", n_channels);
    separate(mean, "running_mean", var, "running_var");
}

// No written vector may touch a tensor that is read or written. By address ranges: see `disjoint` in the arguments.
template <class Statistic>
void apart(const Range& tensor_range, const char* tensor_name, const Statistic& v, const char* name) {
    if (tensor_range.overlaps(range_of(v))) fail(std::string(tensor_name) + " overlaps " + name + ", expected separate arrays");
}

Range range_of(std::span<const std::uint8_t> bytes) {
    const auto base = reinterpret_cast<std::uintptr_t>(bytes.data());
    return {base, base + bytes.size()};
}

// Counts the positions that count. A mask leaves the values at the others alone, weights included.
void positions(const Positions& p, Geometry& g) {
    const std::int64_t count = g.count();
    const auto size = [&](std::size_t n, const char* name) {
        if (n != 0 && (count == 0 || count % static_cast<std::int64_t>(n) != 0)) {
            fail(std::string(name) + " has " + std::to_string(n) + " values, expected one for each of the " + std::to_string(count) +
                 " positions of x, or a number that divides that");
        }
    };
    size(p.mask.size(), "mask");
    size(p.weights.size(), "weights");
    if (p.mask.empty() && p.weights.empty()) return;
    if (is_integer(g.dtype)) {
        fail((p.mask.empty() ? "weights are" : "a mask is") +
             std::string(" given with x of integers, expected none; drop it, or convert x") + " to a floating type");
    }
    const Counted c = count_positions(p, count);
    if (c.bad >= 0) {
        fail("weights is " + std::to_string(p.weights[static_cast<std::size_t>(c.bad)]) + " at " + std::to_string(c.bad) +
             ", expected finite values >= 0");
    }
    if (!std::isfinite(c.weight)) fail("weights sum to more than a double holds, expected smaller ones");
    g.counting = c.positions;
    g.weight = c.weight;
}

void no_weights(const Positions& p, const char* why) {
    if (!p.weights.empty()) fail(std::string("weights are given ") + why + "; drop them");
}

void call_threads(int n) {
    if (n < 0) fail("num_threads is " + std::to_string(n) + ", expected at least 1, or 0 for the default");
}

void activation(Activation activation, double value, const Geometry& g) {
    if (activation < Activation::none || activation > Activation::silu) fail("activation is not known, expected one that Activation names");
    if (activation != Activation::leaky_relu) return;
    const bool fits = g.dtype == Dtype::float64 ? std::isfinite(value) : std::isfinite(static_cast<float>(value));
    if (!fits) fail("slope is " + std::to_string(value) + ", expected a finite number that the type x computes in can hold");
}

// A mask that is given has the right size and an activation to tell of.
void mask(std::span<const std::uint8_t> bytes, Activation activation, const Geometry& g) {
    if (bytes.empty()) return;
    if (!piecewise_linear(activation)) {
        fail("activation_mask is given without activation relu, leaky_relu or relu6, of which it tells; drop one of them");
    }
    if (static_cast<std::int64_t>(bytes.size()) != mask_bytes(g)) {
        fail("activation_mask has " + std::to_string(bytes.size()) +
             " bytes, expected activation_mask_bytes(x) = " + std::to_string(mask_bytes(g)));
    }
}

// The residual is read like x, and y may be written over it in place.
void residual(const ConstTensor& z, const Tensor& y, const Geometry& g, bool disjoint) {
    if (!z) return;
    same_shape(z, "residual", g);
    if (!disjoint) no_partial_overlap(y, "y", z, "residual");
}

// After a residual, x alone does not tell the activation's derivative.
void backward_residual(const BatchNormBackwardArgs& a, const Geometry& g) {
    if (a.residual) {
        same_shape(a.residual, "residual", g);
        if (a.activation == Activation::none) fail("residual is given without an activation, for which alone it is read; drop it");
        if (!a.activation_mask.empty()) fail("residual and activation_mask are given, which tell the same; drop one of them");
    } else if (a.dresidual && a.activation != Activation::none && a.activation_mask.empty()) {
        fail(std::string(piecewise_linear(a.activation) ? "activation_mask" : "residual") +
             " is missing, expected the forward's: after a residual, x does not tell where the activation was on");
    }
}

// What says which positions count is read while outputs are written.
void positions_apart(const Positions& p, const Tensor& out, const char* out_name) {
    const auto one = [&](const void* data, std::size_t bytes, const char* name) {
        const auto base = reinterpret_cast<std::uintptr_t>(data);
        if (out && bytes != 0 && range_of(out).overlaps({base, base + bytes})) {
            fail(std::string(out_name) + " overlaps " + name + ", expected separate arrays");
        }
    };
    one(p.mask.data(), p.mask.size(), "mask");
    one(p.weights.data(), p.weights.size_bytes(), "weights");
}

// A mask that is written touches no other array, nor the positions.
template <class... Read>
void mask_apart(std::span<const std::uint8_t> bytes, const Positions& p, const Read&... others) {
    if (bytes.empty()) return;
    const auto first = reinterpret_cast<std::uintptr_t>(p.weights.data());
    if (range_of(bytes).overlaps(range_of(p.mask)) || range_of(bytes).overlaps({first, first + p.weights.size_bytes()})) {
        fail("activation_mask overlaps mask or weights, expected separate arrays");
    }
    const auto one = [&](const auto& v, const char* name) {
        if (v && range_of(bytes).overlaps(range_of(v)))
            fail(std::string("activation_mask overlaps ") + name + ", expected separate arrays");
    };
    (one(others.first, others.second), ...);
}

// The reference of batch renormalisation is read, r and d are written like mean and inv_std, which are given.
void renorm(const Renorm& n, const BatchNormTrainArgs& a, const Channels& mean, const Channels& inv_std, const Geometry& g) {
    if (static_cast<bool>(n.mean) != static_cast<bool>(n.std)) {
        fail(std::string(n.mean ? "renorm.std" : "renorm.mean") + " is missing, expected renorm.mean and renorm.std or neither");
    }
    if (!n.mean) return;
    channels(n.mean, "renorm.mean", g.channels, Values::finite);
    channels(n.std, "renorm.std", g.channels, Values::finite);
    for (std::int64_t c = 0; c < n.std.size; ++c) {
        if (at(n.std, c) <= 0)
            fail("renorm.std is " + std::to_string(at(n.std, c)) + " at channel " + std::to_string(c) + ", expected > 0");
    }
    if (!(n.rmin >= 0 && n.rmin <= 1)) fail("rmin is " + std::to_string(n.rmin) + ", expected a number in [0, 1]");
    if (!(n.rmax >= 1)) fail("rmax is " + std::to_string(n.rmax) + ", expected a number >= 1");
    if (!(n.dmax >= 0)) fail("dmax is " + std::to_string(n.dmax) + ", expected a number >= 0");
    const Channels r(n.r), d(n.d);
    channels(r, "r", g.channels);
    channels(d, "d", g.channels);
    separate(r, "r", d, "d");
    for (const auto& [v, name] : {std::pair{&r, "r"}, {&d, "d"}}) {
        separate(mean, "mean", *v, name);
        separate(inv_std, "inv_std", *v, name);
        apart(range_of(n.mean), "renorm.mean", *v, name);
        apart(range_of(n.std), "renorm.std", *v, name);
        if (a.running_mean) separate(*v, name, a.running_mean, "running_mean");
        if (a.running_var) separate(*v, name, a.running_var, "running_var");
        if (a.disjoint) continue;
        apart(range_of(a.y), "y", *v, name);
        apart(range_of(a.x), "x", *v, name);
        if (a.residual) apart(range_of(a.residual), "residual", *v, name);
    }
    for (const auto& [v, name] : {std::pair{&mean, "mean"}, {&inv_std, "inv_std"}}) {  // the reference is read again after them
        apart(range_of(n.mean), "renorm.mean", *v, name);
        apart(range_of(n.std), "renorm.std", *v, name);
    }
    if (a.disjoint) return;
    apart(range_of(a.y), "y", n.mean, "renorm.mean");
    apart(range_of(a.y), "y", n.std, "renorm.std");
}

// What batch_norm asks of y, residual and activation if x is of integers.
void image(const BatchNormArgs& a, const Geometry& g) {
    if (a.residual) fail("residual is given with x of integers, expected none; drop it, or convert x to a floating type");
    if (a.activation != Activation::none) {
        fail("activation is given with x of integers, expected none; drop it, or convert x to a floating type");
    }
    if (is_integer(a.y.dtype)) fail("y has an integer storage type, expected a floating one");
    const bool to_runs = g.direction == kernels::nsc && (g.inner == 1 || a.y.inner_stride == 1);
    Geometry wanted = g;
    wanted.dtype = a.y.dtype;
    if (to_runs && !fits(a.y, g.direction)) wanted.direction = kernels::ncs;
    same_shape(a.y, "y", wanted);
    if (!a.disjoint && range_of(a.y).overlaps(range_of(a.x))) fail("y overlaps x, expected separate arrays");
}

}  // namespace

Geometry arguments(const BatchNormArgs& a) {
    Geometry g = geometry(a.x, "x", Storage::any);
    no_weights(a.positions, "to batch_norm, which takes no statistics");
    positions(a.positions, g);
    required(static_cast<bool>(a.mean), "mean");
    required(static_cast<bool>(a.var), "var");
    channels(a.mean, "mean", g.channels, Values::finite);
    channels(a.var, "var", g.channels, Values::non_negative);
    optional_affine(a.gamma, a.beta, g.channels);
    eps(a.eps);
    if (is_integer(g.dtype)) {
        image(a, g);
    } else {
        same_shape(a.y, "y", g);
    }
    distinct_elements(a.y, "y");
    residual(a.residual, a.y, g, a.disjoint);
    activation(a.activation, a.slope, g);
    mask(a.activation_mask, a.activation, g);
    call_threads(a.num_threads);
    if (a.disjoint) return g;
    no_partial_overlap(a.y, "y", a.x, "x");
    positions_apart(a.positions, a.y, "y");
    mask_apart(a.activation_mask, a.positions, std::pair{a.x, "x"}, std::pair{a.y, "y"}, std::pair{a.residual, "residual"},
               std::pair{a.mean, "mean"}, std::pair{a.var, "var"}, std::pair{a.gamma, "gamma"}, std::pair{a.beta, "beta"});
    const Range y = range_of(a.y);
    for (const auto& [v, name] : {std::pair{&a.mean, "mean"}, {&a.var, "var"}, {&a.gamma, "gamma"}, {&a.beta, "beta"}}) {
        if (*v) apart(y, "y", *v, name);
    }
    return g;
}

Geometry arguments(const BatchNormTrainArgs& a) {
    Geometry g = geometry(a.x);
    positions(a.positions, g);
    optional_affine(a.gamma, a.beta, g.channels);
    if (static_cast<bool>(a.running_mean) != static_cast<bool>(a.running_var)) {
        fail(std::string(a.running_mean ? "running_var" : "running_mean") +
             " is missing, expected running_mean and running_var or neither");
    }
    eps(a.eps);
    decay(a.decay);
    if (a.running_ddof != 0 && a.running_ddof != 1) fail("running_ddof is " + std::to_string(a.running_ddof) + ", expected 0 or 1");
    if (g.counting == 1) {
        fail(
            "x has one value per channel, from which no variance can be had, expected at least 2; use batch_norm with running statistics, "
            "or a larger batch");
    }
    if (a.running_mean && g.counting > 0 && g.weight <= a.running_ddof) {
        fail("weights sum to " + std::to_string(g.weight) + ", expected more than running_ddof = " + std::to_string(a.running_ddof) +
             " for the running variance; use running_ddof = 0, or larger weights");
    }
    same_shape(a.y, "y", g);
    distinct_elements(a.y, "y");
    const Channels mean(a.mean), inv_std(a.inv_std);
    channels(mean, "mean", g.channels);
    channels(inv_std, "inv_std", g.channels);
    separate(mean, "mean", inv_std, "inv_std");
    if (a.running_mean) {
        running(a.running_mean, a.running_var, g.channels);
        for (const auto& [v, name] : {std::pair{&mean, "mean"}, {&inv_std, "inv_std"}}) {
            separate(*v, name, a.running_mean, "running_mean");
            separate(*v, name, a.running_var, "running_var");
        }
    }
    renorm(a.renorm, a, mean, inv_std, g);
    residual(a.residual, a.y, g, a.disjoint);
    activation(a.activation, a.slope, g);
    mask(a.activation_mask, a.activation, g);
    call_threads(a.num_threads);
    if (a.disjoint) return g;
    no_partial_overlap(a.y, "y", a.x, "x");
    positions_apart(a.positions, a.y, "y");
    mask_apart(a.activation_mask, a.positions, std::pair{a.x, "x"}, std::pair{a.y, "y"}, std::pair{a.residual, "residual"},
               std::pair{mean, "mean"}, std::pair{inv_std, "inv_std"}, std::pair{a.gamma, "gamma"}, std::pair{a.beta, "beta"},
               std::pair{a.running_mean, "running_mean"}, std::pair{a.running_var, "running_var"});
    const Range y = range_of(a.y);
    for (const auto& [v, name] : {std::pair{&mean, "mean"}, {&inv_std, "inv_std"}}) {
        apart(y, "y", *v, name);
        apart(range_of(a.x), "x", *v, name);
        if (a.residual) apart(range_of(a.residual), "residual", *v, name);
    }
    for (const auto& [v, name] : {std::pair{&a.gamma, "gamma"}, {&a.beta, "beta"}}) {
        if (*v) apart(y, "y", *v, name);
    }
    for (const auto& [v, name] : {std::pair{&a.running_mean, "running_mean"}, {&a.running_var, "running_var"}}) {
        if (!*v) continue;
        apart(y, "y", *v, name);
        apart(range_of(a.x), "x", *v, name);
        if (a.residual) apart(range_of(a.residual), "residual", *v, name);
        if (a.gamma) apart(range_of(a.gamma), "gamma", *v, name);
        if (a.beta) apart(range_of(a.beta), "beta", *v, name);
    }
    return g;
}

Geometry arguments(const BatchNormBackwardArgs& a) {
    Geometry g = geometry(a.x);
    if (a.stats == Stats::fixed) no_weights(a.positions, "with fixed statistics, which they do not enter");
    positions(a.positions, g);
    same_shape(a.dy, "dy", g);
    required(static_cast<bool>(a.mean), "mean");
    required(static_cast<bool>(a.inv_std), "inv_std");
    channels(a.mean, "mean", g.channels);
    channels(a.inv_std, "inv_std", g.channels);
    optional_affine(a.gamma, a.beta, g.channels);
    if (a.stats == Stats::batch && g.counting == 1) {
        fail(
            "x has one value per channel, expected at least 2 with batch statistics; use Stats::fixed for a forward with given statistics");
    }
    for (const auto& [v, name] : {std::pair{&a.dgamma, "dgamma"}, {&a.dbeta, "dbeta"}}) {
        if (!*v) continue;
        channels(*v, name, g.channels);
        separate_elements(*v, name);
    }
    if (a.dgamma && a.dbeta) separate(a.dgamma, "dgamma", a.dbeta, "dbeta");
    if (a.dx) {
        same_shape(a.dx, "dx", g);
        distinct_elements(a.dx, "dx");
    }
    if (a.dresidual) {
        same_shape(a.dresidual, "dresidual", g);
        distinct_elements(a.dresidual, "dresidual");
    }
    activation(a.activation, a.slope, g);
    mask(a.activation_mask, a.activation, g);
    backward_residual(a, g);
    call_threads(a.num_threads);
    if (a.disjoint) return g;
    for (const auto& [v, name] : {std::pair{&a.dgamma, "dgamma"}, {&a.dbeta, "dbeta"}}) {
        if (!*v) continue;
        apart(range_of(a.x), "x", *v, name);
        apart(range_of(a.dy), "dy", *v, name);
        if (a.residual) apart(range_of(a.residual), "residual", *v, name);
        if (a.dx) apart(range_of(a.dx), "dx", *v, name);
        if (a.dresidual) apart(range_of(a.dresidual), "dresidual", *v, name);
        mask_apart(a.activation_mask, a.positions, std::pair{*v, name});
    }
    for (const auto& [out, out_name] : {std::pair{&a.dx, "dx"}, {&a.dresidual, "dresidual"}}) {
        if (!*out) continue;
        no_partial_overlap(*out, out_name, a.dy, "dy");
        positions_apart(a.positions, *out, out_name);
        if (a.residual) no_partial_overlap(*out, out_name, a.residual, "residual");
        if (out == &a.dx) no_partial_overlap(*out, out_name, a.x, "x");
        mask_apart(a.activation_mask, a.positions, std::pair{*out, out_name});
        for (const auto& [v, name] : {std::pair{&a.mean, "mean"}, {&a.inv_std, "inv_std"}, {&a.gamma, "gamma"}, {&a.beta, "beta"}}) {
            if (*v) apart(range_of(*out), out_name, *v, name);
        }
    }
    // It may be written before x has been read.
    if (a.dresidual && range_of(a.dresidual).overlaps(range_of(a.x))) fail("dresidual overlaps x, expected separate arrays");
    if (a.dx && a.dresidual && range_of(a.dx).overlaps(range_of(a.dresidual)))
        fail("dx and dresidual overlap, expected two separate arrays");
    return g;
}

Geometry arguments(const ChannelSumsArgs& a) {
    const Geometry g = geometry(a.a, "a");
    same_shape(a.b, "b", g, "a");
    if (a.shift) channels(a.shift, "shift", g.channels);
    call_threads(a.num_threads);
    const Channels sum_a(a.sum_a), sum_ab(a.sum_ab);
    channels(sum_a, "sum_a", g.channels);
    channels(sum_ab, "sum_ab", g.channels);
    separate(sum_a, "sum_a", sum_ab, "sum_ab");
    return g;
}

Geometry arguments(const CombineArgs& a) {
    const Geometry g = geometry(a.a, "a");
    same_shape(a.b, "b", g, "a");
    same_shape(a.out, "out", g, "a");
    distinct_elements(a.out, "out");
    activation(a.activation, a.slope, g);
    call_threads(a.num_threads);
    for (const auto& [v, name] : {std::pair{&a.k_a, "k_a"},
                                  {&a.center, "center"},
                                  {&a.k_b, "k_b"},
                                  {&a.k_0, "k_0"},
                                  {&a.inv_std, "inv_std"},
                                  {&a.gamma, "gamma"},
                                  {&a.beta, "beta"}}) {
        if (!*v) continue;
        channels(*v, name, g.channels);
        if (!a.disjoint) apart(range_of(a.out), "out", *v, name);
    }
    if (a.disjoint) return g;
    no_partial_overlap(a.out, "out", a.a, "a");
    no_partial_overlap(a.out, "out", a.b, "b");
    return g;
}

Geometry moments_arguments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof, int num_threads,
                           const Positions& counting) {
    Geometry g = geometry(x, "x", Storage::any);
    positions(counting, g);
    call_threads(num_threads);
    const Channels mean_out(mean), var_out(var);
    channels(mean_out, "mean", g.channels);
    channels(var_out, "var", g.channels);
    separate(mean_out, "mean", var_out, "var");
    if (ddof < 0) fail("ddof is " + std::to_string(ddof) + ", expected >= 0");
    if (g.counting != 0 && g.weight <= static_cast<double>(ddof)) {
        fail("ddof is " + std::to_string(ddof) + ", expected less than the " +
             (counting.weights.empty() ? std::to_string(g.counting) + " values per channel of x"
                                       : std::to_string(g.weight) + " that the weights sum to"));
    }
    return g;
}

Geometry moment_sums_arguments(const ConstTensor& x, std::span<double> sums, int num_threads, const Positions& counting) {
    Geometry g = geometry(x, "x", Storage::any);
    positions(counting, g);
    call_threads(num_threads);
    const std::int64_t expected = moment_sums_size(g.channels);
    if (static_cast<std::int64_t>(sums.size()) != expected) {
        fail("sums has " + std::to_string(sums.size()) + " values, expected moment_sums_size(" + std::to_string(g.channels) +
             ") = " + std::to_string(expected) + " for the channels of x");
    }
    apart(range_of(x), "x", Channels(sums), "sums");
    return g;
}

std::int64_t sums(std::span<const double> sums, const char* name) {
    const auto size = static_cast<std::int64_t>(sums.size());
    const std::int64_t channels = (size - moment_sums_size(0)) / (moment_sums_size(1) - moment_sums_size(0));
    if (channels < 1 || size != moment_sums_size(channels)) {
        fail(std::string(name) + " has " + std::to_string(size) +
             " values, expected moment_sums_size(C) = " + std::to_string(moment_sums_size(0)) + " + " +
             std::to_string(moment_sums_size(1) - moment_sums_size(0)) + " C of C >= 1 channels");
    }
    return channels;
}

std::int64_t merged_sums(std::span<double> into, std::span<const double> others) {
    const std::int64_t channels = sums(into, "sums"), other_channels = sums(others, "others");
    if (channels != other_channels) {
        fail("others has " + std::to_string(other_channels) + " channels, expected " + std::to_string(channels) + " as sums has");
    }
    if (into.data() != others.data()) apart(range_of(ConstChannels(others)), "others", Channels(into), "sums");
    return channels;
}

std::int64_t sums_to_moments(std::span<const double> from, std::span<double> mean, std::span<double> m2) {
    const std::int64_t n = sums(from, "sums");
    const Channels mean_out(mean), m2_out(m2);
    channels(mean_out, "mean", n);
    channels(m2_out, "m2", n);
    separate(mean_out, "mean", m2_out, "m2");
    apart(range_of(ConstChannels(from)), "sums", mean_out, "mean");
    apart(range_of(ConstChannels(from)), "sums", m2_out, "m2");
    return n;
}

void arguments(const UpdateRunningArgs& a) {
    required(static_cast<bool>(a.running_mean), "running_mean");
    required(static_cast<bool>(a.running_var), "running_var");
    required(static_cast<bool>(a.mean), "mean");
    required(static_cast<bool>(a.var), "var");
    running(a.running_mean, a.running_var, a.running_mean.size);
    channels(a.mean, "mean", a.running_mean.size);
    channels(a.var, "var", a.running_mean.size);
    for (std::int64_t c = 0; c < a.var.size; ++c) {
        if (at(a.var, c) < 0)
            fail("var is " + std::to_string(at(a.var, c)) + " at channel " + std::to_string(c) + ", expected values >= 0");
    }
    decay(a.decay);
    if (a.ddof != 0 && a.ddof != 1) fail("ddof is " + std::to_string(a.ddof) + ", expected 0 or 1");
    if (a.count <= a.ddof) fail("count is " + std::to_string(a.count) + ", expected more than ddof = " + std::to_string(a.ddof));
}

Geometry mask_geometry(const ConstTensor& x) { return geometry(x); }

void tuning(std::string_view settings) {
    if (const std::string problem = tune::set(settings); !problem.empty()) fail(problem);
}

void thread_count(int n) {
    if (n < 1) fail("num_threads is " + std::to_string(n) + ", expected at least 1");
}

std::int64_t cache_limit(std::int64_t otherwise) {
    const char* const value = std::getenv("BATCHNORM_CACHE_LIMIT");
    if (value == nullptr || *value == '\0') return otherwise;
    const std::string_view text = value;
    std::int64_t bytes = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), bytes);
    if (error != std::errc() || end != text.data() + text.size() || bytes < 0) {
        fail("environment variable BATCHNORM_CACHE_LIMIT: limit is " + quoted(text) + ", expected an int >= 0, in bytes");
    }
    return bytes;
}

const kernels::KernelTable& level(std::string_view name) {
    std::string known;
    for (const auto& l : kernels::levels()) {
        if (l.table->isa == name) {
            if (!l.supported) fail("isa is " + quoted(name) + ", which this CPU cannot run");
            return *l.table;
        }
        known.append(known.empty() ? "" : ", ").append(quoted(l.table->isa));
    }
    fail("isa is " + quoted(name) + ", expected one of " + known);
}

const kernels::KernelTable& active_level() {
    static const std::string problem = [] {
        const char* const settings = std::getenv("BATCHNORM_TUNING");
        return settings == nullptr ? std::string() : tune::set_defaults(settings);
    }();
    if (!problem.empty()) fail("environment variable BATCHNORM_TUNING: " + problem);
    [[maybe_unused]] static const std::size_t limit = memory::info().limit;  // throws here, where that is allowed, if its variable is junk
    const kernels::KernelTable* const table = kernels::active();
    if (table != nullptr) return *table;
    const char* const name = std::getenv("BATCHNORM_ISA");
    try {
        return level(name == nullptr ? "" : name);
    } catch (const std::invalid_argument& e) {
        fail(std::string("environment variable BATCHNORM_ISA: ") + e.what());
    }
}

void interrupted() { throw Interrupted("interrupted"); }

}  // namespace batchnorm::check
