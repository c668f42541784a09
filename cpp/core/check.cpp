#include "check.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "gate.h"
#include "memory.h"
#include "overlap.h"
#include "saved.h"
#include "tuning.h"

namespace batchnorm::check {
namespace {

// ---- words -------------------------------------------------------------------------------------------------------------------------

struct Fault {
    std::string argument, got, expected, remedy{};
    Error::Kind kind = Error::value;
};
[[noreturn]] void fail(const Fault& f) {
    std::string text = f.argument;
    text.append(" ").append(f.got).append(", expected ").append(f.expected);
    if (!f.remedy.empty()) text.append("; ").append(f.remedy);
    throw Error(f.kind, f.argument, text);
}

std::string number(double v) {
    char text[40];
    const auto [end, error] = std::to_chars(text, text + sizeof text, v);
    return {text, end};
}

// Text of a caller's without what would end the message or the line.
std::string printable(std::string_view text) {
    std::string s(text);
    std::replace_if(s.begin(), s.end(), [](char c) { return (c >= 0 && c < ' ') || c == 0x7f; }, '?');
    return s;
}

std::string quoted(std::string_view name) {
    std::string s("'");
    s.append(printable(name)).append("'");
    return s;
}

// Built by append: g++ 12 warns of an overlap in "(" + std::string&& (GCC bug 105651, fixed in 13).
std::string dims(int64_t outer, int64_t channels, int64_t inner) {
    std::string s("(");
    s.append(std::to_string(outer)).append(", ").append(std::to_string(channels)).append(", ").append(std::to_string(inner)).append(")");
    return s;
}

// ---- tensors -----------------------------------------------------------------------------------------------------------------------

// Byte offsets must fit 64 bits, which also keeps all index arithmetic below in range.
constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 16;

// Whether steps along these (size, stride) stay within what can be addressed.
[[gnu::always_inline]] inline bool reachable(std::initializer_list<std::pair<int64_t, int64_t>> axes) {
    int64_t reach = 0, steps = 0;
    for (const auto& [extent, stride] : axes) {
        if (stride == std::numeric_limits<int64_t>::min() || __builtin_mul_overflow(extent - 1, std::abs(stride), &steps) ||
            __builtin_add_overflow(reach, steps, &reach) || reach > kMost) {
            return false;
        }
    }
    return true;
}

void aligned(const void* data, int64_t size, const char* name) {
    if (reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(size) == 0) return;
    fail({name, "is not aligned", "its address to be a multiple of its element size of " + std::to_string(size) + " bytes"});
}

// A span of values that are there.
template <class T>
void given(std::span<T> v, const char* name) {
    if (v.data() == nullptr && !v.empty()) fail({name, "has no data", "an array of " + std::to_string(v.size()) + " values"});
}

template <bool writable>
void tensor(const AnyView<writable>& v, const char* name) {
    if (v.dtype < Dtype::float32 || v.dtype > Dtype::uint16)
        fail({name, "has no known storage type", "one that Dtype names", "", Error::type});
    if (v.outer < 0 || v.channels < 0 || v.inner < 0) {
        fail({name, "has sizes " + dims(v.outer, v.channels, v.inner), "none to be negative"});
    }
    if (v.channels == 0) fail({name, "has 0 channels", "at least 1"});
    if (v.outer == 0 || v.inner == 0) return;
    if (v.inner > kMost / v.outer || v.channels > kMost / (v.outer * v.inner)) {
        fail({name, "has sizes " + dims(v.outer, v.channels, v.inner), "no more elements than can be addressed"});
    }
    if (v.data == nullptr) fail({name, "has no data", "an array of (outer, channels, inner) = " + dims(v.outer, v.channels, v.inner)});
    if (!reachable({{v.outer, v.outer_stride}, {v.channels, v.channel_stride}, {v.inner, v.inner_stride}})) {
        fail({name, "has strides " + dims(v.outer_stride, v.channel_stride, v.inner_stride),
              "strides that reach no further than can be addressed"});
    }
    aligned(v.data, element_size(v.dtype), name);
}

bool is_ncs(int64_t inner, int64_t inner_stride) { return inner > 1 && inner_stride == 1; }
bool is_nsc(int64_t channels, int64_t channel_stride) { return channels == 1 || channel_stride == 1; }

template <bool writable>
bool fits(const AnyView<writable>& v, kernels::Direction d) {
    return d == kernels::ncs ? v.inner == 1 || v.inner_stride == 1 : is_nsc(v.channels, v.channel_stride);
}

enum class Storage { floating, any };

Geometry geometry(const ConstTensor& x, Storage storage = Storage::floating) {
    if (storage == Storage::floating && is_integer(x.dtype) && x.dtype <= Dtype::uint16) {
        fail({"x", "has an integer storage type", "a floating one: integers have no gradients",
              "convert it, or normalise it with batch_norm, whose y is floating", Error::type});
    }
    tensor(x, "x");
    Geometry g{kernels::ncs, x.outer, x.channels, x.inner, x.dtype};
    if (g.count() == 0) return g;
    if (is_ncs(x.inner, x.inner_stride)) {
        g.direction = kernels::ncs;
    } else if (is_nsc(x.channels, x.channel_stride)) {
        g.direction = kernels::nsc;
    } else if (x.inner == 1) {
        g.direction = kernels::ncs;  // runs of one element: slow, but served
    } else {
        fail({"x", "has strides " + dims(x.outer_stride, x.channel_stride, x.inner_stride) + " of (outer, channels, inner)",
              "1 for inner or for channels"});
    }
    return g;
}

template <bool writable>
void same_shape(const AnyView<writable>& v, const char* name, const Geometry& g, const char* of = "x") {
    if (v.outer != g.outer || v.channels != g.channels || v.inner != g.inner) {
        fail({name, "has (outer, channels, inner) " + dims(v.outer, v.channels, v.inner),
              dims(g.outer, g.channels, g.inner) + " as " + of + " has"});
    }
    if (v.dtype != g.dtype) fail({name, "has another storage type than " + std::string(of), "the same", "", Error::type});
    tensor(v, name);
    if (g.count() != 0 && !fits(v, g.direction)) {
        fail({name, "has strides " + dims(v.outer_stride, v.channel_stride, v.inner_stride),
              std::string("1 for ") + (g.direction == kernels::ncs ? "inner" : "channels") + " as " + of + " has"});
    }
}

// An output must not write one element twice.
void distinct_elements(const Tensor& v, const char* name) {
    if (v.outer == 0 || v.inner == 0) return;
    std::pair<int64_t, int64_t> d[3] = {{v.outer, v.outer_stride}, {v.channels, v.channel_stride}, {v.inner, v.inner_stride}};
    for (auto& [n, stride] : d) stride = n > 1 ? std::abs(stride) : 0;
    std::sort(d, d + 3, [](const auto& a, const auto& b) { return a.second < b.second; });
    int64_t extent = 0;  // of the smaller strides
    for (const auto& [n, stride] : d) {
        if (n > 1 && stride <= extent) fail({name, "has strides that reach one element twice", "distinct elements"});
        if (n > 1) extent += (n - 1) * stride;
    }
}

// ---- values per channel --------------------------------------------------------------------------------------------------------------

enum class Values { any, finite, non_negative, positive };

// A first look at contiguous values, in a form that compilers turn into vector code: of very many channels it would be felt otherwise.
template <class V>
bool all_good(const V* values, int64_t n, V least) {
    int64_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad += !(values[i] >= least && values[i] <= std::numeric_limits<V>::max());
    return bad == 0;
}
template <bool writable>
bool all_good(const AnyChannels<writable>& v, Values values) {
    if (v.stride != 1 || values == Values::positive) return false;
    const bool any_sign = values == Values::finite;
    if (v.is_double) return all_good(static_cast<const double*>(v.data), v.size, any_sign ? std::numeric_limits<double>::lowest() : 0.0);
    return all_good(static_cast<const float*>(v.data), v.size, any_sign ? std::numeric_limits<float>::lowest() : 0.0f);
}

// Whether these values can be read: what a pointer or stride of a caller's own making may not allow.
template <bool writable>
[[gnu::noinline]] void memory(const AnyChannels<writable>& v, const char* name) {
    if (v.data == nullptr) fail({name, "has no data", "an array of " + std::to_string(v.size) + " values"});
    if (!reachable({{v.size, v.stride}})) {
        fail({name, "has stride " + std::to_string(v.stride), "a stride that reaches no further than can be addressed"});
    }
    aligned(v.data, v.is_double ? 8 : 4, name);
}

// `sample`: of rows per sample, which; else -1.
template <bool writable>
void channels(const AnyChannels<writable>& v, const char* name, int64_t n_channels, Values values = Values::any, int64_t sample = -1) {
    if (v.size != n_channels) {
        fail({name, "has " + std::to_string(v.size) + " values", std::to_string(n_channels) + ", one per channel of x"});
    }
    const bool everyday = v.data != nullptr && v.stride == 1 && (reinterpret_cast<std::uintptr_t>(v.data) & (v.is_double ? 7 : 3)) == 0;
    if (!everyday) memory(v, name);
    if (values == Values::any || all_good(v, values)) return;
    const auto bad = [&](double value, int64_t c, const char* expected) {
        std::string got = "is ";
        got.append(number(value));
        got.append(" at ");
        if (sample >= 0) got.append("sample ").append(std::to_string(sample)).append(", ");
        fail({name, got.append("channel ").append(std::to_string(c)), expected});
    };
    for (int64_t c = 0; c < v.size; ++c) {
        const double value = at(v, c);
        if (!std::isfinite(value)) bad(value, c, "finite values");
        if (values == Values::non_negative && value < 0) bad(value, c, "values >= 0");
        if (values == Values::positive && value <= 0) bad(value, c, "values > 0");
    }
}

void required(bool present, const char* name) {
    if (!present) fail({name, "is missing", "it to be given", "", Error::type});
}

// Rows of samples: equally many rows of outer each.
template <bool writable>
void rows(const AnyRows<writable>& v, const char* name, const Geometry& g, Values values) {
    if (!v) return;
    if (v.rows < 0 || (v.rows > 0 && g.outer % v.rows != 0)) {
        fail({name, "has " + std::to_string(v.rows) + " rows", "0 or a number that divides the outer size " + std::to_string(g.outer)});
    }
    if (v.rows > 1 && v.values.size > 0 && !reachable({{v.rows, v.row_stride}, {v.values.size, v.values.stride}})) {
        fail({name, "has row_stride " + std::to_string(v.row_stride), "strides that reach no further than can be addressed"});
    }
    for (int64_t r = 0; r < std::max<int64_t>(v.rows, 1); ++r) channels(row_of(v, r), name, g.channels, values, v.rows == 0 ? -1 : r);
}

void eps(double value) {
    if (!std::isfinite(value) || value < 0) fail({"eps", "is " + number(value), "a finite number >= 0"});
}

// A given variance that would be divided by.
template <bool writable>
void divisor(const AnyChannels<writable>& var, const char* name, double eps) {
    for (int64_t c = 0; eps == 0 && c < var.size; ++c) {
        if (at(var, c) != 0) continue;
        fail({"eps", std::string("is 0 and ") + name + " is 0 at channel " + std::to_string(c), "more than 0, to divide by their sum",
              "pass an eps such as 1e-5"});
    }
}

void decay(double value, const char* name = "decay", const std::string& where = "") {
    if (!(value >= 0 && value <= 1)) fail({name, "is " + number(value) + where, "a number in [0, 1], the weight of the old value"});
}

void ddof(int value, const char* name) {
    if (value != 0 && value != 1) fail({name, "is " + std::to_string(value), "0 (divide by n) or 1 (divide by n - 1)"});
}

void separate_elements(const Channels& v, const char* name) {
    if (v.size > 1 && v.stride == 0) {
        fail({name, "has stride 0, so that its channels are one element", "separate elements", std::string("copy ") + name});
    }
}

void activation(Activation activation, double value, Dtype dtype) {
    if (activation < Activation::none || activation > Activation::silu) fail({"activation", "is not known", "one that Activation names"});
    if (activation != Activation::leaky_relu) return;
    const bool good = dtype == Dtype::float64 ? std::isfinite(value) : std::isfinite(static_cast<float>(value));
    if (!good) fail({"slope", "is " + number(value), "a finite number that the type x computes in can hold"});
}

void call_threads(int n) {
    if (n < 0) fail({"num_threads", "is " + std::to_string(n), "at least 1, or 0 for the default"});
}

void execution(const Execution& e) { call_threads(e.num_threads); }

void no_group(const Execution& e, const char* what) {
    if (e.group != nullptr) fail({"group", std::string("is given to ") + what, "none", "drop it"});
}

// Samples, whose sums are taken apart.
void samples(int64_t sample_outer, Call& call) {
    const int64_t outer = call.geometry.outer;
    if (sample_outer < 1 || outer % sample_outer != 0) {
        fail({"sample_outer", "is " + std::to_string(sample_outer), "a number >= 1 that divides the outer size " + std::to_string(outer)});
    }
    call.sample_outer = sample_outer;
}

// What a forward with a group takes.
void of_group(const Forward& f, Call& call) {
    if (f.execution.group == nullptr) return;
    samples(f.execution.sample_outer, call);
    if (f.part_outer > 0) {
        fail({"part_outer", "is given with a group", "none: a part has statistics of its own, which no other rank has values of",
              "drop one of them"});
    }
    if (call.group_outer != 0 && call.group_outer != call.sample_outer) {
        fail({"sample_outer", "is " + std::to_string(call.sample_outer),
              std::to_string(call.group_outer) + ", the rows of outer that a row of gamma and beta is for"});
    }
    const bool rows = (f.gamma && f.gamma.rows != 0) || (f.beta && f.beta.rows != 0);
    if (f.keep == Keep::y && rows) {
        fail({"keep", "is y with a group and a gamma or beta of each sample", "x",
              "because ranks would differ in the channels of which x is kept"});
    }
}

// ---- what counts -----------------------------------------------------------------------------------------------------------------------

// Sizes and parts, and how much of each counts. A mask leaves the values at the others alone, weights included.
Call counted(const Geometry& g, const Positions& p, int64_t part_outer = 0, bool device = false) {
    Call call;
    call.geometry = g;
    call.parts = {g.outer, g.outer, 1};
    if (part_outer < 0) fail({"part_outer", "is " + std::to_string(part_outer), "a number >= 0"});
    if (part_outer > 0 && part_outer < g.outer) {
        call.parts.rows = part_outer;
        call.parts.count = (g.outer + part_outer - 1) / part_outer;
        // A shorter last part of a single value per channel joins the one before.
        const int64_t last = call.parts.size(call.parts.count - 1);
        if (last < part_outer && last * g.inner < 2) --call.parts.count;
    }
    call.counts = Counts(g, call.parts);
    if (!p) return call;
    const auto size = [&](std::size_t n, const char* name) {
        if (n != 0 && (g.count() == 0 || g.count() % static_cast<int64_t>(n) != 0)) {
            fail({name, "has " + std::to_string(n) + " values",
                  "one for each of the " + std::to_string(g.count()) + " positions of x, or a number that divides that"});
        }
    };
    size(p.mask.size(), "mask");
    size(p.weights.size(), "weights");
    given(p.mask, "mask");
    given(p.weights, "weights");
    if (p.element_mask) {
        if (!p.mask.empty()) fail({"element_mask", "is given with mask", "one of them", "exclude the positions in element_mask"});
        if (p.element_mask.dtype != Dtype::uint8) fail({"element_mask", "is not of uint8", "a byte per element", "", Error::type});
        if (p.element_mask.outer != g.outer || p.element_mask.channels != g.channels || p.element_mask.inner != g.inner) {
            fail({"element_mask", "has other sizes than x", dims(g.outer, g.channels, g.inner)});
        }
        tensor(p.element_mask, "element_mask");
    }
    if (g.count() == 0 || device) return call;
    if (const int64_t bad = call.counts.count(g, p); bad >= 0) {
        fail({"weights", "holds " + number(p.weights[index(bad)]) + " at position " + std::to_string(bad), "finite values >= 0"});
    }
    call.counts.each([](int64_t, double weight) {
        if (!std::isfinite(weight)) fail({"weights", "sum to more than a double holds", "smaller ones"});
    });
    return call;
}

void groups(const ConstRows& gamma, const ConstRows& beta, Call& call) {
    const int64_t n = std::max(gamma ? gamma.rows : 0, beta ? beta.rows : 0);
    if (n == 0 || call.geometry.outer == 0) return;
    for (const auto& [v, name] : {std::pair{&gamma, "gamma"}, {&beta, "beta"}}) {
        if (*v && v->rows != 0 && v->rows != n) {
            fail({name, "has " + std::to_string(v->rows) + " rows", std::to_string(n) + " as the other parameter has, or 0"});
        }
    }
    call.group_outer = call.geometry.outer / n;
    if (call.parts.rows % call.group_outer != 0) {
        fail({"part_outer", "is " + std::to_string(call.parts.rows),
              "a multiple of the " + std::to_string(call.group_outer) + " rows of outer of a sample of gamma and beta"});
    }
}

// ---- overlaps ------------------------------------------------------------------------------------------------------

// What a call writes may overlap nothing else it uses.
template <class Written>
class Apart {
public:
    Apart(const Written& written, const char* name) : written_(written), range_(range_of(written)), name_(name) {}
    template <class V>
    const Apart& from(const V& v, const char* name) const {
        if (range_.meets(range_of(v)) && share_element(block_of(written_), block_of(v))) {
            fail({name_, std::string("overlaps ") + name, "separate arrays"});
        }
        return *this;
    }
    // The same array is fine: in place.
    const Apart& but_in_place(const ConstTensor& v, const char* name) const {
        if (!range_.meets(range_of(v)) || same_elements(block_of(written_), block_of(v))) return *this;
        if (share_element(block_of(written_), block_of(v))) {
            fail({name_, std::string("overlaps ") + name + " without being the same array",
                  std::string(name) + " itself (in place) or a separate array"});
        }
        return *this;
    }
    const Apart& from(const Positions& p) const { return from(p.mask, "mask").from(p.weights, "weights").from(p.element_mask, "mask"); }

private:
    const Written& written_;
    Range range_;
    const char* name_;
};

void forward_overlaps(const Forward& f) {
    if (f.execution.disjoint) return;
    const bool renews = f.renorm.decay >= 0;
    Apart(f.y, "out")
        .but_in_place(f.x, "x")
        .but_in_place(f.residual, "residual")
        .from(f.positions)
        .from(f.mean, "mean")
        .from(f.var, "var")
        .from(f.gamma, "gamma")
        .from(f.beta, "beta")
        .from(f.running.mean, "running_mean")
        .from(f.running.var, "running_var")
        .from(f.renorm.mean, "renorm mean")
        .from(f.renorm.std, "renorm std")
        .from(f.running.seen, "seen")
        .from(f.running.decays, "decay");
    struct Written {
        const Channels& v;
        const char* name;
        bool is;
    };
    const Written written[] = {{f.running.mean, "running_mean", true},
                               {f.running.var, "running_var", true},
                               {f.renorm.mean, "renorm mean", renews},
                               {f.renorm.std, "renorm std", renews}};
    for (const Written& w : written) {
        if (!w.v || !w.is) continue;
        const Apart apart(w.v, w.name);
        apart.from(f.x, "x")
            .from(f.residual, "residual")
            .from(f.gamma, "gamma")
            .from(f.beta, "beta")
            .from(f.positions)
            .from(f.running.seen, "seen")
            .from(f.running.decays, "decay");
        for (const Written& other : written) {
            if (&other.v != &w.v) apart.from(other.v, other.name);
        }
    }
}

// ---- forward -------------------------------------------------------------------------------------------------------

void running_arrays(const Running& r, int64_t n, bool device) {
    if (static_cast<bool>(r.mean) != static_cast<bool>(r.var)) {
        fail({r.mean ? "running_var" : "running_mean", "is missing", "running_mean and running_var or neither"});
    }
    if (!r.mean) {
        if (r.seen || r.decays) {
            fail({r.seen ? "seen" : "decay", "is given without running statistics", "running_mean and running_var as well", "drop it"});
        }
        return;
    }
    channels(r.mean, "running_mean", n);
    channels(r.var, "running_var", n);
    separate_elements(r.mean, "running_mean");
    separate_elements(r.var, "running_var");
    ddof(r.ddof, "running_ddof");
    if (r.on_nonfinite < OnNonfinite::propagate || r.on_nonfinite > OnNonfinite::skip) {
        fail({"on_nonfinite", "is not known", "one that OnNonfinite names"});
    }
    if (r.decays && r.seen) fail({"decay", "is given with seen", "one of them", "drop one"});
    if (r.seen) {
        channels(r.seen, "seen", n, device ? Values::any : Values::non_negative);
    } else if (r.decays) {
        channels(r.decays, "decay", n);
        for (int64_t c = 0; c < n && !device; ++c) decay(at(r.decays, c), "decay", " at channel " + std::to_string(c));
    } else {
        decay(r.decay);
    }
}

void renorm(const Forward& f, int64_t n) {
    const Renorm& r = f.renorm;
    const auto of = [&](Values values) { return f.execution.device ? Values::any : values; };
    if (!r.enabled) {
        if (r.decay >= 0) fail({"renorm.decay", "is given without renormalisation", "renorm.enabled"});
        return;
    }
    if (static_cast<bool>(r.mean) != static_cast<bool>(r.std)) {
        fail({r.mean ? "renorm std" : "renorm mean", "is missing", "mean and std of the reference or neither"});
    }
    if (r.mean) {
        channels(r.mean, "renorm mean", n, of(Values::finite));
        channels(r.std, "renorm std", n, of(Values::positive));
    } else if (!f.running.mean) {
        fail({"renorm", "is given without a reference", "running statistics, or mean and std of a reference", ""});
    } else {
        channels(f.running.mean, "running_mean", n, of(Values::finite));
        channels(f.running.var, "running_var", n, of(Values::non_negative));
        if (!f.execution.device) divisor(f.running.var, "running_var", f.eps);
    }
    if (!(r.rmin >= 0 && r.rmin <= 1)) fail({"rmin", "is " + number(r.rmin), "a number in [0, 1]"});
    if (!(r.rmax >= 1)) fail({"rmax", "is " + number(r.rmax), "a number >= 1"});
    if (!(r.dmax >= 0)) fail({"dmax", "is " + number(r.dmax), "a number >= 0"});
    if (r.decay < 0) return;
    decay(r.decay, "renorm decay");
    if (!r.mean) fail({"renorm decay", "is given without a reference of its own", "mean and std as well", "drop it"});
    separate_elements(r.mean, "renorm mean");
    separate_elements(r.std, "renorm std");
}

void keep(const Forward& f) {
    if (f.keep != Keep::x && f.keep != Keep::y) fail({"keep", "is not known", "one that Keep names"});
    if (f.saved == nullptr || f.keep == Keep::x) return;
    const std::string why = "y does not tell x";
    if (f.residual) fail({"keep", "is y with a residual, behind which " + why, "x", "or add the residual outside"});
    if (f.activation == Activation::none) return;
    if (f.activation != Activation::leaky_relu) {
        fail({"keep", "is y with an activation behind which " + why, "x, or leaky_relu, or no activation",
              "or apply the activation outside"});
    }
    if (!(f.slope >= 0x1p-60 && f.slope <= 0x1p60)) {
        fail({"slope", "is " + number(f.slope), "a number from 2**-60 to 2**60, so that y tells x", "or keep x"});
    }
}

}  // namespace

// A batch that statistics can be had from, or nothing at all.
void enough_values(const Forward& f, const Call& call) {
    if (f.mean) return;
    int64_t most = 0;
    double heaviest = 0;
    call.counts.each([&](int64_t positions, double weight) {
        most = std::max(most, positions);
        if (positions >= 2) heaviest = std::max(heaviest, weight);
    });
    if (most == 1) {
        fail({"x",
              std::string("has one value per channel") + (f.positions ? " that counts" : "") +
                  (f.execution.group != nullptr ? " in all ranks" : "") + ", from which no variance can be had",
              "at least 2",
              "use a larger batch, normalise with running statistics (batch_norm, or the layer's eval mode), or normalise another axis"});
    }
    if (most > 1 && f.running.mean && heaviest <= f.running.ddof) {
        fail({"weights", "sum to " + number(heaviest),
              "more than running_ddof = " + std::to_string(f.running.ddof) + " for the running variance, var * n / (n - running_ddof)",
              "use running_ddof = 0, or larger weights"});
    }
}

namespace {

// What batch_norm asks of y if x is of integers.
void image(const Forward& f, const Geometry& g) {
    if (is_integer(f.y.dtype)) fail({"y", "has an integer storage type", "a floating one", "", Error::type});
    const bool to_runs = g.direction == kernels::nsc && (g.inner == 1 || f.y.inner_stride == 1);
    Geometry wanted = g;
    wanted.dtype = f.y.dtype;
    if (to_runs && !fits(f.y, g.direction)) wanted.direction = kernels::ncs;
    same_shape(f.y, "y", wanted);
    if (f.residual) same_shape(f.residual, "residual", geometry(ConstTensor(f.y)), "y");  // it is added to y by itself
    if (f.saved != nullptr) fail({"saved", "is given with x of integers, which have no gradients", "none", "drop it, or convert x"});
}

// What both kinds of forward ask for.
Call forward(const Forward& f, Storage storage) {
    const Geometry g = geometry(f.x, storage);
    Call call = counted(g, f.positions, f.part_outer, f.execution.device);
    if (static_cast<bool>(f.mean) != static_cast<bool>(f.var)) {
        fail({f.mean ? "var" : "mean", "is missing", "mean and var or neither"});
    }
    if (f.mean) {
        const bool values = f.execution.check_values;
        channels(f.mean, "mean", g.channels, values ? Values::finite : Values::any);
        channels(f.var, "var", g.channels, values ? Values::non_negative : Values::any);
        if (values) divisor(f.var, "var", f.eps);
    }
    const Values affine = f.execution.check_values ? Values::finite : Values::any;
    rows(f.gamma, "gamma", g, affine);
    rows(f.beta, "beta", g, affine);
    groups(f.gamma, f.beta, call);
    eps(f.eps);
    if (is_integer(g.dtype)) {
        image(f, g);
    } else {
        same_shape(f.y, "y", g);
        if (f.residual) same_shape(f.residual, "residual", g);
    }
    distinct_elements(f.y, "y");
    activation(f.activation, f.slope, g.dtype);
    execution(f.execution);
    return call;
}

}  // namespace

Call inference(const Forward& f) {
    required(static_cast<bool>(f.mean), "mean");
    required(static_cast<bool>(f.var), "var");
    Call call = forward(f, Storage::any);
    if (!f.positions.weights.empty()) {
        fail({"weights", "are given to batch_norm, which takes no statistics", "none", "drop them, or exclude positions by a mask"});
    }
    if (f.running.mean || f.renorm.enabled || f.renorm.decay >= 0) {
        fail({f.running.mean ? "running_mean" : "renorm", "is given to batch_norm, which takes no statistics", "none",
              "use batch_norm_train, which takes mean and var too"});
    }
    keep(f);
    no_group(f.execution, "batch_norm, which takes no statistics");
    forward_overlaps(f);
    return call;
}

Call training(const Forward& f) {
    Call call = forward(f, Storage::floating);
    running_arrays(f.running, call.geometry.channels, f.execution.device);
    renorm(f, call.geometry.channels);
    keep(f);
    of_group(f, call);
    if (f.execution.group == nullptr) enough_values(f, call);
    forward_overlaps(f);
    return call;
}

Call saving(const Forward& f, const ConstChannels& inv_std) {
    const Geometry g = geometry(f.x);
    Call call = counted(g, f.positions);
    required(static_cast<bool>(f.mean), "mean");
    required(static_cast<bool>(inv_std), "inv_std");
    channels(f.mean, "mean", g.channels);
    channels(inv_std, "inv_std", g.channels);
    rows(f.gamma, "gamma", g, Values::finite);
    rows(f.beta, "beta", g, Values::finite);
    groups(f.gamma, f.beta, call);
    activation(f.activation, f.slope, g.dtype);
    if (f.residual) same_shape(f.residual, "residual", g);
    if (f.saved == nullptr) fail({"saved", "is missing", "a Saved to fill"});
    return call;
}

// ---- backward ------------------------------------------------------------------------------------------------------

namespace {

const Saved::Impl& held(const Saved* saved, bool device) {
    if (saved == nullptr || saved->empty()) {
        throw Misuse("saved is empty, expected what a forward pass left; call batch_norm_train with it first");
    }
    if (saved->get()->device != device) {
        throw Misuse(device ? "saved is of a forward on the CPU, expected one on a GPU"
                            : "saved is of a forward on a GPU, expected one on the CPU");
    }
    return *saved->get();
}

template <bool writable>
void parameter(const AnyRows<writable>& v, const char* name, const SavedRows& forward, const Geometry& g, Values values = Values::any) {
    if (!v) return;
    rows(v, name, g, values);
    const int64_t expected = forward ? forward.rows : 0;
    if (v.rows != expected)
        fail({name, "has " + std::to_string(v.rows) + " rows", std::to_string(expected) + " as the forward's parameter"});
    if constexpr (writable) separate_elements(v.values, name);
}

void forward_residual(const Saved::Impl& s, const Geometry& g, const ConstTensor& residual) {
    if (residual) same_shape(residual, "residual", g, "the forward's x");
    if (s.reads_residual() && !residual) {
        fail({"residual", "is missing", "that of the forward: behind it x does not tell the activation's derivative"});
    }
    if (residual && !s.reads_residual()) fail({"residual", "is given", "none: backward does not need it here", "drop it"});
}

}  // namespace

const Saved::Impl& backward(const Backward& b) {
    const Saved::Impl& s = held(b.saved, b.execution.device);
    const Geometry g = s.call(b.kept).geometry;
    same_shape(b.kept, s.keep == Keep::x ? "x" : "y", g, "the forward's");
    same_shape(b.dy, "dy", g);
    forward_residual(s, g, b.residual);
    for (const auto& [v, name] : {std::pair{&b.dx, "dx"}, {&b.dresidual, "dresidual"}}) {
        if (!*v) continue;
        same_shape(*v, name, g);
        distinct_elements(*v, name);
    }
    if (b.dresidual && !s.has_residual) fail({"dresidual", "is given", "none: the forward had no residual", "drop it"});
    parameter(b.dgamma, "dgamma", s.gamma, g);
    parameter(b.dbeta, "dbeta", s.beta, g);
    execution(b.execution);
    if ((s.sample_outer != 0) != (b.execution.group != nullptr)) {
        fail({"group", s.sample_outer != 0 ? "is missing" : "is given",
              s.sample_outer != 0 ? "that of the forward" : "none, as in the forward"});
    }
    if (b.all_reduce && b.execution.group == nullptr) fail({"all_reduce", "is true without a group", "false"});
    if (b.execution.disjoint) return s;
    if (b.dx) Apart(b.dx, "out").but_in_place(b.dy, "dy").but_in_place(b.kept, "x").but_in_place(b.residual, "residual");
    if (b.dresidual) {  // it may be written before x has been read
        Apart(b.dresidual, "out_residual")
            .but_in_place(b.dy, "dy")
            .but_in_place(b.residual, "residual")
            .from(b.kept, "x")
            .from(b.dx, "out");
    }
    for (const auto& [v, name] : {std::pair{&b.dgamma, "dgamma"}, {&b.dbeta, "dbeta"}}) {
        if (!*v) continue;
        Apart(*v, name).from(b.dy, "dy").from(b.kept, "x").from(b.residual, "residual").from(b.dx, "out").from(b.dresidual, "out_residual");
    }
    if (b.dgamma) Apart(b.dgamma, "dgamma").from(b.dbeta, "dbeta");
    return s;
}

const Saved::Impl& double_backward(const DoubleBackward& b) {
    const Saved::Impl& s = held(b.saved, b.execution.device);
    if (s.sample_outer != 0) {
        fail({"saved", "is of a forward with a group", "one of a single process: the double backward is not served for a group"});
    }
    const Geometry g = s.call(b.kept).geometry;
    same_shape(b.kept, s.keep == Keep::x ? "x" : "y", g, "the forward's");
    same_shape(b.dy, "dy", g);
    forward_residual(s, g, b.residual);
    if (b.ddx) same_shape(b.ddx, "ddx", g);
    if (b.ddresidual) {
        same_shape(b.ddresidual, "ddresidual", g);
        if (!s.has_residual) fail({"ddresidual", "is given", "none: the forward had no residual", "drop it"});
    }
    const Values values = b.execution.check_values ? Values::finite : Values::any;
    parameter(b.ddgamma, "ddgamma", s.gamma, g, values);
    parameter(b.ddbeta, "ddbeta", s.beta, g, values);
    parameter(b.dgamma, "dgamma", s.gamma, g);
    parameter(b.dbeta, "dbeta", s.beta, g);
    const std::pair<const Tensor*, const char*> outputs[] = {{&b.ddy, "ddy"}, {&b.dx, "dx"}, {&b.dresidual, "dresidual"}};
    for (const auto& [v, name] : outputs) {
        if (!*v) continue;
        same_shape(*v, name, g);
        distinct_elements(*v, name);
    }
    const std::pair<Block, const char*> written[] = {{block_of(b.ddy), "ddy"},
                                                     {block_of(b.dx), "dx"},
                                                     {block_of(b.dresidual), "dresidual"},
                                                     {block_of(b.dgamma), "dgamma"},
                                                     {block_of(b.dbeta), "dbeta"}};
    for (const auto& w : written) {
        if (b.execution.disjoint) break;
        const Apart apart(w.first, w.second);
        apart.from(b.dy, "dy").from(b.kept, "x").from(b.residual, "residual").from(b.ddx, "ddx").from(b.ddresidual, "ddresidual");
        apart.from(b.ddgamma, "ddgamma").from(b.ddbeta, "ddbeta");
        for (const auto& other : written) {
            if (&other != &w) apart.from(other.first, other.second);
        }
    }
    execution(b.execution);
    return s;
}

// ---- moments -------------------------------------------------------------------------------------------------------

Call moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, int64_t delta, int num_threads,
             const Positions& positions, Group* group, int64_t sample_outer, bool device) {
    const Geometry g = geometry(x, Storage::any);
    Call call = counted(g, positions, 0, device);
    call_threads(num_threads);
    if (group != nullptr) samples(sample_outer, call);
    const Channels mean_out(mean), var_out(var);
    channels(mean_out, "mean", g.channels);
    channels(var_out, "var", g.channels);
    Apart(mean_out, "mean").from(var_out, "var").from(x, "x");
    Apart(var_out, "var").from(x, "x");
    if (delta < 0) fail({"ddof", "is " + std::to_string(delta), "an integer >= 0"});
    if (group == nullptr) enough_for(delta, call, positions);
    return call;
}

void enough_for(int64_t delta, const Call& call, const Positions& positions) {
    double heaviest = 0;
    call.counts.each([&](int64_t, double weight) { heaviest = std::max(heaviest, weight); });
    if (call.counts.most() != 0 && heaviest <= static_cast<double>(delta)) {
        fail({"ddof", "is " + std::to_string(delta),
              "less than the " + (positions.weights.empty()
                                      ? std::to_string(call.counts.most()) + " values per channel" + (positions ? " that count" : " of x")
                                      : number(heaviest) + " that the weights sum to")});
    }
}

Call moment_sums(const ConstTensor& x, std::span<double> sums, int num_threads, const Positions& positions) {
    const Geometry g = geometry(x, Storage::any);
    Call call = counted(g, positions);
    call_threads(num_threads);
    const int64_t expected = moment_sums_size(g.channels);
    if (static_cast<int64_t>(sums.size()) != expected) {
        fail({"sums", "has " + std::to_string(sums.size()) + " values",
              "moment_sums_size(" + std::to_string(g.channels) + ") = " + std::to_string(expected) + " for the channels of x"});
    }
    given(sums, "sums");
    Apart(sums, "sums").from(x, "x");
    return call;
}

namespace {

int64_t sums(std::span<const double> sums, const char* name) {
    const auto size = static_cast<int64_t>(sums.size());
    const int64_t channels = size / moment_sums_size(1);
    if (channels < 1 || size != moment_sums_size(channels)) {
        fail({name, "has " + std::to_string(size) + " values", "moment_sums_size(C) = 9 C of C >= 1 channels"});
    }
    given(sums, name);
    return channels;
}

}  // namespace

int64_t merged_sums(std::span<double> into, std::span<const double> others) {
    const int64_t channels = sums(into, "sums"), other_channels = sums(others, "others");
    if (channels != other_channels) {
        fail({"others", "has " + std::to_string(other_channels) + " channels", std::to_string(channels) + " as sums has"});
    }
    if (into.data() != others.data()) Apart(into, "sums").from(others, "others");
    return channels;
}

int64_t sums_to_moments(std::span<const double> from, std::span<double> count, std::span<double> mean, std::span<double> m2) {
    const int64_t n = sums(from, "sums");
    const std::pair<std::span<double>, const char*> outputs[] = {{count, "count"}, {mean, "mean"}, {m2, "m2"}};
    for (const auto& output : outputs) {
        channels(Channels(output.first), output.second, n);
        const Apart apart(output.first, output.second);
        apart.from(from, "sums");
        for (const auto& other : outputs) {
            if (&other != &output) apart.from(other.first, other.second);
        }
    }
    return n;
}

void running_step(const UpdateRunningArgs& a) {
    required(static_cast<bool>(a.running.mean), "running_mean");
    required(static_cast<bool>(a.running.var), "running_var");
    required(static_cast<bool>(a.mean), "mean");
    required(static_cast<bool>(a.var), "var");
    required(static_cast<bool>(a.count), "count");
    const int64_t n = a.running.mean.size;
    running_arrays(a.running, n, false);
    channels(a.mean, "mean", n);
    channels(a.var, "var", n);
    channels(a.count, "count", n, Values::non_negative);
    double most = 0;
    for (int64_t c = 0; c < n; ++c) {
        if (at(a.var, c) < 0) fail({"var", "is " + number(at(a.var, c)) + " at channel " + std::to_string(c), "values >= 0"});
        most = std::max(most, at(a.count, c));
    }
    if (most <= a.running.ddof) fail({"count", "is " + number(most), "more than ddof = " + std::to_string(a.running.ddof)});
    Apart(a.running.mean, "running_mean")
        .from(a.running.var, "running_var")
        .from(a.mean, "mean")
        .from(a.var, "var")
        .from(a.count, "count")
        .from(a.running.seen, "seen")
        .from(a.running.decays, "decay");
    Apart(a.running.var, "running_var")
        .from(a.mean, "mean")
        .from(a.var, "var")
        .from(a.count, "count")
        .from(a.running.seen, "seen")
        .from(a.running.decays, "decay");
}

// ---- the library ---------------------------------------------------------------------------------------------------

void tuning(std::string_view settings) {
    if (const std::string problem = tune::set(settings); !problem.empty()) throw Error(Error::value, "tuning", printable(problem));
}

void thread_count(int n) {
    if (n < 1) fail({"num_threads", "is " + std::to_string(n), "at least 1"});
}

int64_t cache_limit(int64_t otherwise) {
    const char* const value = std::getenv("BATCHNORM_CACHE_LIMIT");
    if (value == nullptr || *value == '\0') return otherwise;
    const std::string_view text = value;
    int64_t bytes = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), bytes);
    if (error != std::errc() || end != text.data() + text.size() || bytes < 0) {
        fail({"environment variable BATCHNORM_CACHE_LIMIT:", "limit is " + quoted(text), "an int >= 0, in bytes"});
    }
    return bytes;
}

const kernels::KernelTable& level(std::string_view name) {
    std::string known;
    for (const auto& l : kernels::levels()) {
        if (l.table->isa == name) {
            if (!l.supported) fail({"isa", "is " + quoted(name), "one that this CPU can run"});
            return *l.table;
        }
        known.append(known.empty() ? "" : ", ").append(quoted(l.table->isa));
    }
    fail({"isa", "is " + quoted(name), "one of " + known});
}

const kernels::KernelTable& active_level() {
    static const std::string problem = [] {
        const char* const settings = std::getenv("BATCHNORM_TUNING");
        return settings == nullptr ? std::string() : tune::set_defaults(settings);
    }();
    if (!problem.empty()) throw Error(Error::value, "BATCHNORM_TUNING", "environment variable BATCHNORM_TUNING: " + problem);
    [[maybe_unused]] static const std::size_t limit = memory::info().limit;  // throws here, where that is allowed, if its variable is junk
    const kernels::KernelTable* const table = kernels::active();
    if (table != nullptr) return *table;
    const char* const name = std::getenv("BATCHNORM_ISA");
    try {
        return level(name == nullptr ? "" : name);
    } catch (const Error& e) {
        throw Error(e.kind, "BATCHNORM_ISA", std::string("environment variable BATCHNORM_ISA: ") + e.what());
    }
}

void not_finite(int64_t channel) {
    fail({"x", "holds NaN, Inf or values whose mean or variance the running statistics cannot hold at channel " + std::to_string(channel),
          "finite statistics (on_nonfinite is raise); nothing was changed", "leave this batch out, or let it be skipped or propagate"});
}

void squares_overflow(const char* name, int64_t channel) {
    fail({name, "holds values at channel " + std::to_string(channel) + " whose squares add up to more than 1.8e308",
          "magnitudes up to 1e150", "add up x * 2.0**-512, then mean * 2.0**512 and std * 2.0**512 are those of x"});
}

void not_served(const char* argument, const std::string& got, const std::string& instead) {
    fail({argument, got + ", which is not served on a GPU", instead});
}

void interrupted() { throw Interrupted("interrupted"); }

void rank_failed(int rank, const std::string& message) {
    throw RankFailed(rank, "rank " + std::to_string(rank) + " of the group failed: " + message);
}

void ranks_differ(int rank, const char* in) {
    fail({"group", std::string("has ") + in + " on rank " + std::to_string(rank) + " than on rank 0",
          "the same call with the same options on all ranks"});
}

void no_ranks() { fail({"group", "has gathered nothing", "an array from each rank"}); }

void not_among_ranks() {
    fail({"group", "has gathered no array that equals this rank's own", "that of each rank, this one too",
          "use an intracommunicator, such as Merge() makes of mpi4py's Intercomm", Error::type});
}

}  // namespace batchnorm::check
