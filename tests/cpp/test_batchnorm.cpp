// Tests of the C++ library through its public header alone, without a framework: CHECK counts, main prints the counts and returns
// non-zero if anything failed. `test_batchnorm --hash` instead prints one hash of the bits of many results (no check of them), to
// be compared between machines, compilers and settings of BATCHNORM_ISA and OMP_NUM_THREADS.
#include <algorithm>
#include <array>
#include <batchnorm/batchnorm.hpp>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace batchnorm;
using std::int64_t;
using std::size_t;

// ---- checks ----

int64_t passed = 0, failed = 0;
std::string context;  // what is being tested, for the message of a failed check

void check(bool ok, const std::string& what, int line) {
    ++(ok ? passed : failed);
    if (!ok && failed <= 50) std::printf("line %d: %s  [%s]\n", line, what.c_str(), context.c_str());
}
#define CHECK(condition) check((condition), #condition, __LINE__)

// f must throw E with a message that begins with `start`.
template <class E, class F>
void throws(const std::string& start, int line, F f) {
    try {
        f();
        check(false, "no exception, expected: " + start, line);
    } catch (const E& e) {
        check(std::string_view(e.what()).starts_with(start), "got '" + std::string(e.what()) + "', expected '" + start + "...'", line);
    }
}

// ---- storage types ----

template <class T>
struct Format;  // bits of the fraction, and the smallest exponent
template <>
struct Format<float> {
    static constexpr int fraction = 23, low = -126;
    static constexpr const char* name = "float32";
};
template <>
struct Format<double> {
    static constexpr int fraction = 52, low = -1022;
    static constexpr const char* name = "float64";
};
template <>
struct Format<float16> {
    static constexpr int fraction = 10, low = -14;
    static constexpr const char* name = "float16";
};
template <>
struct Format<bfloat16> {
    static constexpr int fraction = 7, low = -126;
    static constexpr const char* name = "bfloat16";
};

template <class T>
double widen(T v) {
    if constexpr (std::is_arithmetic_v<T>) {
        return v;
    } else {
        using F = Format<T>;
        constexpr int kMost = (1 << (15 - F::fraction)) - 1;
        const int exponent = v.bits >> F::fraction & kMost;
        const double fraction = v.bits & ((1 << F::fraction) - 1), sign = v.bits >> 15 ? -1 : 1;
        if (exponent == kMost) return fraction == 0 ? sign * HUGE_VAL : std::numeric_limits<double>::quiet_NaN();
        const double significand = exponent == 0 ? fraction : fraction + (1 << F::fraction);
        return sign * std::ldexp(significand, std::max(exponent, 1) - 1 + F::low - F::fraction);
    }
}

// Values that the format holds exactly; anything finite is rounded to nearest even.
template <class T>
T narrow(double v) {
    if constexpr (std::is_arithmetic_v<T>) {
        return static_cast<T>(v);
    } else {
        using F = Format<T>;
        int exponent = 0;
        std::frexp(v, &exponent);
        const int step = std::max(exponent - 1, F::low) - F::fraction;  // exponent of the last place
        const auto steps = static_cast<int64_t>(std::nearbyint(std::ldexp(std::abs(v), -step)));
        // A carry out of the fraction lands in the exponent, as it must.
        const int64_t bits = (static_cast<int64_t>(step + F::fraction - F::low) << F::fraction) + steps;
        return {static_cast<std::uint16_t>(bits | (std::signbit(v) ? 0x8000 : 0))};
    }
}

// ---- tensors ----

struct Shape {
    int64_t outer, channels, inner;
    int64_t count() const { return outer * inner; }
    int64_t elements() const { return count() * channels; }
};

// How a tensor of (outer, channels, inner) lies in memory.
struct Layout {
    const char* name;
    bool channels_last;     // channels contiguous, else inner
    bool rows = false;      // View::nsc: outer and inner as one
    int64_t gap = 0;        // unused elements after each run, and after each group of runs
    bool reversed = false;  // negative strides, but for the contiguous dimension
};
constexpr std::array kInnerContiguous{Layout{"ncs", false}, Layout{"ncs with gaps", false, false, 3},
                                      Layout{"ncs reversed", false, false, 0, true},
                                      Layout{"ncs reversed with gaps", false, false, 1, true}};
constexpr std::array kChannelsContiguous{Layout{"nsc", true, true}, Layout{"nsc of two levels", true, false},
                                         Layout{"nsc with gaps", true, false, 5}, Layout{"nsc reversed", true, false, 0, true},
                                         Layout{"nsc rows with gaps", true, true, 3}};

// Memory and a view of it. Values are exchanged in the logical order (outer, channels, inner).
template <class T>
class Array {
public:
    Array(const Layout& layout, const Shape& s) : shape_(s) {
        const Shape v = layout.rows ? Shape{s.count(), s.channels, 1} : s;
        const int64_t short_n = layout.channels_last ? v.channels : v.inner, middle_n = layout.channels_last ? v.inner : v.channels;
        const int64_t middle = short_n + layout.gap, outer = middle_n * middle + layout.gap, sign = layout.reversed ? -1 : 1;
        memory_.resize(static_cast<size_t>(v.outer * outer));
        std::memset(static_cast<void*>(memory_.data()), kUntouched, memory_.size() * sizeof(T));
        if (layout.rows && layout.gap == 0) {
            view_ = View<T>::nsc(memory_.data(), v.outer, v.channels);
        } else if (!layout.channels_last && layout.gap == 0 && !layout.reversed) {
            view_ = View<T>::ncs(memory_.data(), v.outer, v.channels, v.inner);
        } else {
            const int64_t first = layout.reversed ? (v.outer - 1) * outer + (middle_n - 1) * middle : 0;
            view_ = {memory_.data() + first, v.outer, v.channels, v.inner, sign * outer, sign * middle, 1};
            if (layout.channels_last) std::swap(view_.channel_stride, view_.inner_stride);
        }
    }
    Array(const Layout& layout, const Shape& s, const std::vector<T>& values) : Array(layout, s) {
        each([&](T& element, size_t i) { element = values[i]; });
    }
    Array(Array&&) = default;  // moved memory stays where it is; a copy's view would point to the original

    View<T> view() const { return view_; }
    std::vector<T> values() const {
        std::vector<T> v(static_cast<size_t>(shape_.elements()));
        each([&](const T& element, size_t i) { v[i] = element; });
        return v;
    }
    // Whether nothing but the elements of the view has been written; forgets their values.
    bool gaps_untouched() {
        each([](T& element, size_t) { std::memset(static_cast<void*>(&element), kUntouched, sizeof(T)); });
        const auto* const bytes = reinterpret_cast<const unsigned char*>(memory_.data());
        return std::all_of(bytes, bytes + memory_.size() * sizeof(T), [](unsigned char b) { return b == kUntouched; });
    }

private:
    static constexpr unsigned char kUntouched = 0x5a;

    // f(element, logical index)
    template <class F>
    void each(F f) const {
        const bool rows = view_.inner != shape_.inner;  // outer and inner as one
        const int64_t outer = rows ? shape_.inner * view_.outer_stride : view_.outer_stride,
                      inner = rows ? view_.outer_stride : view_.inner_stride;
        size_t i = 0;
        for (int64_t n = 0; n < shape_.outer; ++n) {
            for (int64_t c = 0; c < shape_.channels; ++c) {
                for (int64_t k = 0; k < shape_.inner; ++k) f(view_.data[n * outer + c * view_.channel_stride + k * inner], i++);
            }
        }
    }

    Shape shape_;
    std::vector<T> memory_;
    View<T> view_;
};

// Numbers in [-8, 8) with all the significant bits that T has, so that every sum rounds; the same on every machine.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
    template <class T>
    double next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        constexpr int kBits = Format<T>::fraction + 2;  // one is the sign
        const auto integer = static_cast<int64_t>(state_ >> (64 - kBits)) - (int64_t{1} << (kBits - 1));
        return std::ldexp(static_cast<double>(integer), 4 - kBits);
    }

private:
    std::uint64_t state_;
};

// ---- everything the library does with one tensor ----

template <class T>
struct Inputs {
    Shape shape;
    std::vector<T> x, dy, z;                    // (outer, channels, inner)
    std::vector<float> gamma, beta;             // empty: absent
    std::vector<double> given_mean, given_var;  // for inference
    Activation activation = Activation::none;

    Inputs(const Shape& s, bool affine, Activation act, std::uint64_t seed = 1) : shape(s), activation(act) {
        Random random(seed);
        for (int64_t i = 0; i < s.elements(); ++i) {
            x.push_back(narrow<T>(random.next<T>() + static_cast<double>(i / s.inner % s.channels % 5)));
            dy.push_back(narrow<T>(random.next<T>()));
        }
        for (int64_t c = 0; c < s.channels; ++c) {
            if (affine) gamma.push_back(static_cast<float>(random.next<float>() / 4));
            if (affine) beta.push_back(static_cast<float>(random.next<float>()));
            given_mean.push_back(random.next<double>());
            given_var.push_back(random.next<double>() + 9);
        }
        for (int64_t i = 0; i < s.elements(); ++i) z.push_back(narrow<T>(random.next<T>()));
    }
};

template <class T>
struct Results {
    std::vector<double> mean, var, inv_std;
    std::vector<T> y, y_given, dx, dx_fixed;
    std::vector<float> running_mean, running_var, dgamma;
    std::vector<double> dbeta;
    // With a residual.
    std::vector<T> y_z{}, y_z_given{}, dx_z{}, dz{}, dz_alone{};
    std::vector<std::uint8_t> mask{}, mask_given{};
    std::vector<float> dgamma_z{}, dbeta_z{};
    // Where not all positions count, and where they have weights.
    std::vector<double> mean_m{}, var_m{}, inv_std_m{}, mean_w{}, inv_std_w{};
    std::vector<T> y_m{}, y_m_given{}, dx_m{}, dz_m{}, y_w{}, dx_w{};
    std::vector<float> dgamma_m{}, dbeta_m{}, dgamma_w{};

    template <class F>
    void each(F f) const {
        f(mean), f(var), f(inv_std), f(y), f(y_given), f(dx), f(dx_fixed), f(running_mean), f(running_var), f(dgamma), f(dbeta);
        f(y_z), f(y_z_given), f(dx_z), f(dz), f(dz_alone), f(mask), f(mask_given), f(dgamma_z), f(dbeta_z);
        f(mean_m), f(var_m), f(inv_std_m), f(mean_w), f(inv_std_w), f(y_m), f(y_m_given), f(dx_m), f(dz_m), f(y_w), f(dx_w);
        f(dgamma_m), f(dbeta_m), f(dgamma_w);
    }
    std::vector<unsigned char> bytes() const {
        std::vector<unsigned char> all;
        each([&](const auto& v) {
            const auto* const p = reinterpret_cast<const unsigned char*>(v.data());
            all.insert(all.end(), p, p + v.size() * sizeof v[0]);
        });
        return all;
    }
};

ConstChannels absent_if_empty(const std::vector<float>& v) { return v.empty() ? ConstChannels() : ConstChannels(v); }

// The values of an output that is no longer needed.
template <class T>
std::vector<T> finish(Array<T> out) {
    std::vector<T> values = out.values();
    CHECK(out.gaps_untouched());
    return values;
}

// The part of `run` with a residual; in place of it, and of dy.
template <class T>
void run_residual(const Inputs<T>& in, const Layout& layout, bool in_place, Results<T>& r) {
    const auto c = static_cast<size_t>(in.shape.channels);
    const Array<T> x(layout, in.shape, in.x), dy(layout, in.shape, in.dy), z(layout, in.shape, in.z);
    const auto output = [&](const std::vector<T>& source) {
        return in_place ? Array<T>(layout, in.shape, source) : Array<T>(layout, in.shape);
    };
    const auto forward = [&](auto& args, Array<T> y, std::vector<std::uint8_t>& mask) {
        if (in.activation == Activation::relu) mask.assign(static_cast<size_t>(activation_mask_bytes(x.view())), 0);
        args.x = x.view();
        args.y = y.view();
        args.residual = in_place ? ConstTensor(y.view()) : ConstTensor(z.view());
        args.gamma = absent_if_empty(in.gamma);
        args.beta = absent_if_empty(in.beta);
        args.activation = in.activation;
        args.activation_mask = mask;
        if constexpr (std::is_same_v<decltype(args), BatchNormArgs&>) {
            batch_norm(args);
        } else {
            batch_norm_train(args);
        }
        return finish(std::move(y));
    };
    BatchNormTrainArgs train;
    std::vector<double> mean(c), inv_std(c);
    train.mean = mean;
    train.inv_std = inv_std;
    r.y_z = forward(train, output(in.z), r.mask);
    CHECK(mean == r.mean && inv_std == r.inv_std);
    BatchNormArgs given;
    given.mean = in.given_mean;
    given.var = in.given_var;
    r.y_z_given = forward(given, output(in.z), r.mask_given);

    BatchNormBackwardArgs backward;
    Array<T> dx = output(in.dy), dz(layout, in.shape), dz_alone = output(in.dy);
    r.dgamma_z = r.dbeta_z = std::vector<float>(c);
    backward.x = x.view();
    backward.mean = mean;
    backward.inv_std = inv_std;
    backward.gamma = absent_if_empty(in.gamma);
    backward.beta = absent_if_empty(in.beta);
    backward.activation = in.activation;
    backward.activation_mask = r.mask;
    backward.dy = in_place ? ConstTensor(dz_alone.view()) : ConstTensor(dy.view());
    backward.dresidual = dz_alone.view();
    batch_norm_backward(backward);
    backward.dy = in_place ? ConstTensor(dx.view()) : ConstTensor(dy.view());
    backward.dresidual = dz.view();
    backward.dx = dx.view();
    backward.dgamma = r.dgamma_z;
    backward.dbeta = r.dbeta_z;
    batch_norm_backward(backward);
    r.dx_z = finish(std::move(dx));
    r.dz = finish(std::move(dz));
    r.dz_alone = finish(std::move(dz_alone));
}

// Two of three positions count.
bool counts(int64_t position) { return position % 3 != 2; }
std::vector<std::uint8_t> some_positions(const Shape& s) {
    std::vector<std::uint8_t> mask;
    for (int64_t p = 0; p < s.count(); ++p) mask.push_back(counts(p) ? static_cast<std::uint8_t>(1 + p % 255) : 0);
    return mask;
}
std::vector<double> some_weights(const Shape& s) {
    std::vector<double> weights;
    for (int64_t p = 0; p < s.count(); ++p) weights.push_back(p % 7 == 0 ? 0.1 : 0.75 * static_cast<double>(p % 5));
    return weights;
}
template <class T>
T not_a_number() {
    if constexpr (std::is_arithmetic_v<T>) {
        return std::numeric_limits<T>::quiet_NaN();
    } else {
        return {0x7fff};
    }
}
// With NaN where nothing counts.
template <class T>
std::vector<T> spoilt(std::vector<T> values, const Shape& s) {
    for (size_t i = 0; i < values.size(); ++i) {
        const auto e = static_cast<int64_t>(i);
        if (!counts(e / s.inner / s.channels * s.inner + e % s.inner)) values[i] = not_a_number<T>();
    }
    return values;
}

// The part of `run` with a mask, and with weights; in place of x, dy and the residual.
template <class T>
void run_positions(const Inputs<T>& in, const Layout& layout, bool in_place, Results<T>& r) {
    const auto c = static_cast<size_t>(in.shape.channels);
    const std::vector<std::uint8_t> mask = some_positions(in.shape);
    const std::vector<double> weights = some_weights(in.shape);
    const std::vector<T> spoilt_x = spoilt(in.x, in.shape), spoilt_dy = spoilt(in.dy, in.shape);
    for (auto* v : {&r.mean_m, &r.var_m, &r.inv_std_m, &r.mean_w, &r.inv_std_w}) v->resize(c);
    for (auto* v : {&r.dgamma_m, &r.dbeta_m, &r.dgamma_w}) v->resize(c);
    const auto output = [&](const std::vector<T>& source) {
        return in_place ? Array<T>(layout, in.shape, source) : Array<T>(layout, in.shape);
    };
    const auto forward = [&](auto args, const std::vector<T>& values, const Positions& positions) {
        const Array<T> x(layout, in.shape, values);
        Array<T> y = output(values);
        args.x = in_place ? ConstTensor(y.view()) : ConstTensor(x.view());
        args.y = y.view();
        args.gamma = absent_if_empty(in.gamma);
        args.beta = absent_if_empty(in.beta);
        args.activation = in.activation;
        args.positions = positions;
        if constexpr (std::is_same_v<decltype(args), BatchNormArgs>) {
            batch_norm(args);
        } else {
            batch_norm_train(args);
        }
        return finish(std::move(y));
    };
    moments(Array<T>(layout, in.shape, spoilt_x).view(), r.mean_m, r.var_m, 1, 0, {mask, {}});
    BatchNormTrainArgs train;
    train.mean = r.mean_m;
    train.inv_std = r.inv_std_m;
    r.y_m = forward(train, spoilt_x, {mask, {}});
    train.mean = r.mean_w;
    train.inv_std = r.inv_std_w;
    r.y_w = forward(train, in.x, {{}, weights});
    BatchNormArgs given;
    given.mean = in.given_mean;
    given.var = in.given_var;
    r.y_m_given = forward(given, spoilt_x, {mask, {}});

    const auto backward = [&](const std::vector<T>& x_values, const std::vector<T>& dy_values, const Positions& positions, bool weighted) {
        const Array<T> x(layout, in.shape, x_values), dy(layout, in.shape, dy_values);
        const std::vector<std::uint8_t> bits(static_cast<size_t>(activation_mask_bytes(x.view())), 0x5a);
        Array<T> dx = output(dy_values), dz(layout, in.shape);
        BatchNormBackwardArgs a;
        a.x = x.view();
        a.dy = in_place ? ConstTensor(dx.view()) : ConstTensor(dy.view());
        a.dx = dx.view();
        a.mean = weighted ? r.mean_w : r.mean_m;
        a.inv_std = weighted ? r.inv_std_w : r.inv_std_m;
        a.gamma = absent_if_empty(in.gamma);
        a.beta = absent_if_empty(in.beta);
        a.activation = in.activation;
        a.dgamma = weighted ? r.dgamma_w : r.dgamma_m;
        a.positions = positions;
        if (!weighted) {
            a.dbeta = r.dbeta_m;
            a.dresidual = dz.view();
            if (in.activation == Activation::relu) a.activation_mask = bits;
        }
        batch_norm_backward(a);
        if (!weighted) r.dz_m = finish(std::move(dz));
        return finish(std::move(dx));
    };
    r.dx_m = backward(spoilt_x, spoilt_dy, {mask, {}}, false);
    r.dx_w = backward(in.x, in.dy, {{}, weights}, true);
}

template <class T>
Results<T> run(const Inputs<T>& in, const Layout& layout, bool in_place = false) {
    const auto c = static_cast<size_t>(in.shape.channels);
    Results<T> r{std::vector<double>(c),      std::vector<double>(c), std::vector<double>(c), {}, {}, {}, {}, std::vector<float>(c, 0.5f),
                 std::vector<float>(c, 2.0f), std::vector<float>(c),  std::vector<double>(c)};
    const Array<T> x(layout, in.shape, in.x), dy(layout, in.shape, in.dy);
    const ConstChannels gamma = absent_if_empty(in.gamma), beta = absent_if_empty(in.beta);

    moments(x.view(), r.mean, r.var);

    const auto output = [&](const std::vector<T>& source) {
        return in_place ? Array<T>(layout, in.shape, source) : Array<T>(layout, in.shape);
    };
    BatchNormTrainArgs train;
    Array<T> y = output(in.x);
    train.x = in_place ? y.view() : x.view();
    train.y = y.view();
    train.gamma = gamma;
    train.beta = beta;
    train.running_mean = r.running_mean;
    train.running_var = r.running_var;
    train.decay = 0.75;
    train.activation = in.activation;
    std::vector<double> mean(c);
    train.mean = mean;
    train.inv_std = r.inv_std;
    batch_norm_train(train);
    r.y = finish(std::move(y));
    CHECK(mean == r.mean);

    BatchNormArgs given;
    Array<T> y_given = output(in.x);
    given.x = in_place ? y_given.view() : x.view();
    given.y = y_given.view();
    given.mean = in.given_mean;
    given.var = in.given_var;
    given.gamma = gamma;
    given.beta = beta;
    given.activation = in.activation;
    batch_norm(given);
    r.y_given = finish(std::move(y_given));

    for (const Stats stats : {Stats::batch, Stats::fixed}) {
        BatchNormBackwardArgs backward;
        const bool batch = stats == Stats::batch;
        Array<T> dx = output(batch ? in.dy : in.x);  // in place of either
        backward.x = in_place && !batch ? dx.view() : x.view();
        backward.dy = in_place && batch ? dx.view() : dy.view();
        backward.dx = dx.view();
        backward.mean = mean;
        backward.inv_std = r.inv_std;
        backward.gamma = gamma;
        backward.beta = beta;
        backward.stats = stats;
        backward.activation = in.activation;
        backward.dgamma = r.dgamma;
        backward.dbeta = r.dbeta;
        batch_norm_backward(backward);
        (batch ? r.dx : r.dx_fixed) = finish(std::move(dx));
    }
    run_residual(in, layout, in_place, r);
    run_positions(in, layout, in_place, r);
    return r;
}

// ---- against the formulas, in plain double ----

// Unit roundoff of the arithmetic, and of storage. For double, where no wider sums hide it, the rounding of both sides' sums counts.
template <class T>
constexpr bool kIsDouble = std::is_same_v<T, double>;
template <class T>
constexpr double kCompute = kIsDouble<T> ? 1e-14 : 0x1p-24;
template <class T>
const double kStore = kIsDouble<T> ? 0 : std::ldexp(1, -Format<T>::fraction - 1);

bool near(double got, double want, double bound) { return std::abs(got - want) <= bound; }

template <class T>
void compare(const Inputs<T>& in, const Results<T>& r) {
    const Shape& s = in.shape;
    const double n = static_cast<double>(s.count());
    const bool relu = in.activation == Activation::relu;
    const double tiny = std::ldexp(1, Format<T>::low - Format<T>::fraction);  // the smallest subnormal
    bool stats_good = true, y_good = true, given_good = true, sums_good = true, dx_good = true, fixed_good = true, running_good = true;
    for (int64_t channel = 0; channel < s.channels; ++channel) {
        const auto c = static_cast<size_t>(channel);
        const auto each = [&](auto f) {
            for (int64_t k = 0; k < s.outer; ++k) {
                for (int64_t i = 0; i < s.inner; ++i) f(static_cast<size_t>((k * s.channels + channel) * s.inner + i));
            }
        };
        double mean = 0, var = 0;
        each([&](size_t i) { mean += widen(in.x[i]); });
        mean /= n;
        each([&](size_t i) { var += (widen(in.x[i]) - mean) * (widen(in.x[i]) - mean); });
        var /= n;
        const double inv_std = 1 / std::sqrt(var + 1e-5);
        stats_good =
            stats_good && near(r.mean[c], mean, 1e-12) && near(r.var[c], var, 1e-12 * var) && near(r.inv_std[c], inv_std, 1e-12 * inv_std);
        running_good = running_good && near(r.running_mean[c], 0.75 * 0.5 + 0.25 * mean, 1e-7 * (1 + std::abs(mean))) &&
                       near(r.running_var[c], 0.75 * 2 + 0.25 * var * n / (n - 1), 1e-7 * (2 + var * 2));

        const double gamma = in.gamma.empty() ? 1 : in.gamma[c], beta = in.beta.empty() ? 0 : in.beta[c];
        const auto activate = [&](double y) { return relu ? std::max(y, 0.0) : y; };
        // y has five roundings of terms no larger than these, and one to storage.
        const auto y_bound = [&](double x, double m, double inv) {
            const double lost = kIsDouble<T> ? std::abs(m) + 1 / inv : std::abs(m) * 0x1p-24;  // of the mean, rounded
            const double size = std::abs(gamma) * inv * (std::abs(x - m) + lost) + std::abs(beta);
            return 5 * kCompute<T> * size + kStore<T> * 1.001 * size + tiny;
        };
        double sum_dy = 0, sum_dy_xhat = 0, abs_dy = 0;
        const auto masked = [&](size_t i) {
            return relu && !((widen(in.x[i]) - mean) * inv_std * gamma + beta > 0) ? 0.0 : widen(in.dy[i]);
        };
        const auto x_hat = [&](size_t i) { return (widen(in.x[i]) - mean) * inv_std; };
        each([&](size_t i) {
            const double x = widen(in.x[i]);
            y_good = y_good && near(widen(r.y[i]), activate(x_hat(i) * gamma + beta), y_bound(x, mean, inv_std));
            const double inv = 1 / std::sqrt(in.given_var[c] + 1e-5);
            given_good = given_good && near(widen(r.y_given[i]), activate((x - in.given_mean[c]) * inv * gamma + beta),
                                            y_bound(x, in.given_mean[c], inv));
            sum_dy += masked(i);
            sum_dy_xhat += masked(i) * x_hat(i);
            abs_dy += std::abs(masked(i)) * (1 + std::abs(x_hat(i)));
        });
        sums_good = sums_good && near(r.dbeta[c], sum_dy, 1e-14 * abs_dy) &&
                    near(r.dgamma[c], sum_dy_xhat, 1e-13 * abs_dy + 0x1p-24 * std::abs(sum_dy_xhat));
        each([&](size_t i) {
            const double slope = gamma * inv_std, by_x = x_hat(i) * sum_dy_xhat / n;
            const double want = slope * (masked(i) - sum_dy / n - by_x), fixed = slope * masked(i);
            const double sums = kIsDouble<T> ? abs_dy / n * (1 + std::abs(x_hat(i))) : std::abs(sum_dy / n) + std::abs(by_x);
            const double size = std::abs(slope) * (std::abs(masked(i)) + sums);
            dx_good = dx_good && near(widen(r.dx[i]), want, 6 * kCompute<T> * size + kStore<T> * 1.001 * std::abs(want) + tiny);
            fixed_good = fixed_good && near(widen(r.dx_fixed[i]), fixed, (2 * kCompute<T> + kStore<T>)*1.001 * std::abs(fixed) + tiny);
        });
    }
    CHECK(stats_good);
    CHECK(running_good);
    CHECK(y_good);
    CHECK(given_good);
    CHECK(sums_good);
    CHECK(dx_good);
    CHECK(fixed_good);
}

// Around lanes (16), folded rows (64 channels), tiles, and above what is shared between threads (65536 elements); 2,048 channels are
// the most of one work item.
constexpr Shape kShapes[] = {{2, 1, 1},     {2, 3, 1},     {1, 3, 2},     {7, 2, 3},    {2, 5, 15},   {3, 2, 16},
                             {2, 17, 17},   {5, 15, 1},    {5, 16, 1},    {129, 17, 1}, {2, 63, 4},   {3, 64, 5},
                             {2, 65, 33},   {40, 33, 1},   {4, 40, 210},  {700, 65, 1}, {2, 2, 9000}, {1, 2, 40001},
                             {13000, 3, 1}, {17, 2050, 1}, {3, 1, 12000}, {2100, 4, 4}};

// What a residual adds to the results, given those without it.
template <class T>
void compare_residual(const Inputs<T>& in, const Results<T>& r) {
    const Shape& s = in.shape;
    const bool relu = in.activation == Activation::relu;
    const double tiny = std::ldexp(1, Format<T>::low - Format<T>::fraction);
    bool y_good = true, dz_good = true;
    for (size_t i = 0; i < in.x.size(); ++i) {
        const auto c = static_cast<size_t>(static_cast<int64_t>(i) / s.inner % s.channels);
        const double gamma = in.gamma.empty() ? 1 : in.gamma[c], beta = in.beta.empty() ? 0 : in.beta[c];
        const auto good = [&](T got, double mean, double inv_std) {
            const double y = (widen(in.x[i]) - mean) * inv_std * gamma + beta, z = widen(in.z[i]), want = y + z;
            // Five roundings as without a residual, and that of the sum.
            const double lost = kIsDouble<T> ? std::abs(mean) + 1 / inv_std : std::abs(mean) * 0x1p-24;
            const double size = std::abs(gamma) * inv_std * (std::abs(widen(in.x[i]) - mean) + lost) + std::abs(beta) + std::abs(z);
            return near(widen(got), relu ? std::max(want, 0.0) : want, 6 * kCompute<T> * size + kStore<T> * 1.001 * size + tiny);
        };
        y_good = y_good && good(r.y_z[i], r.mean[c], r.inv_std[c]) &&
                 good(r.y_z_given[i], in.given_mean[c], 1 / std::sqrt(in.given_var[c] + 1e-5));
        const double through = relu && !(widen(r.y_z[i]) > 0) ? 0 : widen(in.dy[i]);
        dz_good = dz_good && widen(r.dz[i]) == through && widen(r.dz_alone[i]) == through;
    }
    CHECK(y_good);
    CHECK(dz_good);
    CHECK(r.mask.empty() != relu && r.mask_given.size() == r.mask.size());
}

std::string describe(const char* dtype, const Layout& layout, const Shape& s) {
    return std::string(dtype) + " " + layout.name + " (" + std::to_string(s.outer) + ", " + std::to_string(s.channels) + ", " +
           std::to_string(s.inner) + ")";
}

template <class T>
void test_formulas() {
    for (const Shape& s : kShapes) {
        for (const bool affine : {false, true}) {
            const Inputs<T> in(s, affine, affine ? Activation::relu : Activation::none);
            for (const Layout& layout : {kInnerContiguous[0], kChannelsContiguous[0]}) {
                context = describe(Format<T>::name, layout, s);
                const Results<T> r = run(in, layout);
                compare(in, r);
                compare_residual(in, r);
            }
        }
    }
    // Neither dimension contiguous: every other column of a wider matrix. Slow, but served.
    context = std::string(Format<T>::name) + " every other column";
    const Inputs<T> in({21, 5, 1}, false, Activation::none);
    const Results<T> dense = run(in, kChannelsContiguous[0]);
    std::vector<T> x(210);
    for (size_t i = 0; i < 105; ++i) x[2 * i] = in.x[i];
    View<T> columns{x.data(), 21, 5, 1, 10, 2, 1};
    std::vector<double> mean(5), var(5);
    moments(columns, mean, var);
    for (size_t c = 0; c < 5; ++c) CHECK(near(mean[c], dense.mean[c], 1e-14) && near(var[c], dense.var[c], 1e-13));
    BatchNormArgs given;
    given.x = given.y = columns;
    given.mean = in.given_mean;
    given.var = in.given_var;
    batch_norm(given);
    for (size_t i = 0; i < 105; ++i) CHECK(widen(x[2 * i]) == widen(dense.y_given[i]) && widen(x[2 * i + 1]) == 0);
}

// Sums of multiples of 1/8 are exact in double, and so are mean and variance if the channel's values are base + deviations whose sum
// is 0: no tolerance at all.
template <class T>
void test_exact_statistics() {
    for (const Shape& s : kShapes) {
        if (s.count() % 2 != 0) continue;
        Inputs<T> in(s, false, Activation::none);
        std::vector<double> mean, var;
        for (int64_t c = 0; c < s.channels; ++c) {
            const double base = static_cast<double>(c % 7 * 16), deviation = static_cast<double>(1 + c % 4);
            for (int64_t k = 0; k < s.count(); ++k) {
                in.x[static_cast<size_t>((k / s.inner * s.channels + c) * s.inner + k % s.inner)] =
                    narrow<T>(base + (k % 2 == 0 ? deviation : -deviation));
            }
            mean.push_back(base);
            var.push_back(deviation * deviation);
        }
        for (const Layout& layout : {kInnerContiguous[0], kChannelsContiguous[0]}) {
            context = describe(Format<T>::name, layout, s);
            const Array<T> x(layout, s, in.x);
            std::vector<double> got_mean(mean.size()), got_var(mean.size());
            moments(x.view(), got_mean, got_var);
            CHECK(got_mean == mean);
            CHECK(got_var == var);
            if (s.count() != 2) continue;
            moments(x.view(), got_mean, got_var, 1);
            CHECK(got_var[0] == 2 * var[0]);
        }
    }
}

template <class T>
void test_constant_channel() {
    context = Format<T>::name;
    for (const Layout& layout : {kInnerContiguous[0], kChannelsContiguous[0]}) {
        Inputs<T> in({6, 3, 50}, true, Activation::none);
        std::fill(in.x.begin(), in.x.end(), narrow<T>(6.5));
        const Results<T> r = run(in, layout);
        CHECK(r.mean == std::vector<double>(3, 6.5));
        CHECK(r.var == std::vector<double>(3, 0.0));
        bool beta_exactly = true;
        for (size_t i = 0; i < r.y.size(); ++i) beta_exactly = beta_exactly && widen(r.y[i]) == widen(narrow<T>(in.beta[i / 50 % 3]));
        CHECK(beta_exactly);
    }
}

// ---- residual and mask ----

template <class V>
bool same(const V& a, const V& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
}

constexpr Shape kBitShapes[] = {{3, 5, 7}, {2, 17, 33}, {3, 40, 300}, {2, 3, 20000}, {9, 70, 64}, {1300, 3, 9}};

// Number of an element's bit in a mask, and how many bits there are: runs start at whole bytes, and so do rows, but those of fewer than
// 64 channels follow one another.
struct Bits {
    bool runs;
    Shape s;
    static int64_t whole_bytes(int64_t n) { return (n + 7) / 8 * 8; }
    int64_t row() const { return s.channels < 64 ? s.channels : whole_bytes(s.channels); }
    int64_t of(int64_t n, int64_t c, int64_t i) const {
        return runs ? (n * s.channels + c) * whole_bytes(s.inner) + i : (n * s.inner + i) * row() + c;
    }
    int64_t bytes() const { return ((runs ? s.outer * s.channels * whole_bytes(s.inner) : s.count() * row()) + 7) / 8 + 4; }
};

template <class T>
void check_mask(const std::vector<std::uint8_t>& mask, const std::vector<T>& y, const Shape& s, bool runs) {
    const Bits bits{runs, s};
    CHECK(static_cast<int64_t>(mask.size()) == bits.bytes());
    std::vector<std::uint8_t> want(mask.size());
    for (size_t e = 0; e < y.size(); ++e) {
        const int64_t i = static_cast<int64_t>(e), bit = bits.of(i / s.inner / s.channels, i / s.inner % s.channels, i % s.inner);
        if (widen(y[e]) > 0) want[static_cast<size_t>(bit / 8)] |= static_cast<std::uint8_t>(1 << bit % 8);
    }
    CHECK(mask == want);
}

template <class T>
void test_residual() {
    std::vector<Shape> shapes(std::begin(kBitShapes), std::end(kBitShapes));
    shapes.insert(shapes.end(), {{40, 20, 1}, {33, 63, 1}, {33, 64, 1}, {17, 65, 1}, {5, 2051, 1}, {2, 2, 17}});
    for (const Shape& s : shapes) {
        const Inputs<T> in(s, true, Activation::relu);
        for (const Layout& layout : {kInnerContiguous[0], kInnerContiguous[1], kChannelsContiguous[0], kChannelsContiguous[2]}) {
            if (s.inner == 1 && !layout.channels_last) continue;
            context = describe(Format<T>::name, layout, s) + " residual";
            const Results<T> r = run(in, layout);
            check_mask(r.mask, r.y_z, s, !layout.channels_last);
            check_mask(r.mask_given, r.y_z_given, s, !layout.channels_last);
            // The other gradients are those of what the activation let through.
            Inputs<T> plain = in;
            plain.dy = r.dz;
            plain.activation = Activation::none;
            const Results<T> p = run(plain, layout);
            CHECK(same(r.dx_z, p.dx) && same(r.dgamma_z, p.dgamma));
            for (size_t c = 0; c < p.dbeta.size(); ++c) CHECK(r.dbeta_z[c] == static_cast<float>(p.dbeta[c]));
        }
    }
}

// A forward without a residual has the mask that backward would find out from x; nothing beside its bits is written.
template <class T>
void test_mask_without_residual() {
    for (const Shape& s : kBitShapes) {
        const Inputs<T> in(s, true, Activation::relu);
        for (const Layout& layout : {kInnerContiguous[0], kChannelsContiguous[0]}) {
            context = describe(Format<T>::name, layout, s) + " mask";
            const Array<T> x(layout, s, in.x), dy(layout, s, in.dy);
            Array<T> y(layout, s);
            std::vector<double> inv_std;
            for (const double var : in.given_var) inv_std.push_back(1 / std::sqrt(var + 1e-5));
            const auto bytes = static_cast<size_t>(activation_mask_bytes(x.view()));
            std::vector<std::uint8_t> guarded(bytes + 20, 0xff);
            BatchNormArgs a;
            a.x = x.view();
            a.y = y.view();
            a.mean = in.given_mean;
            a.var = in.given_var;
            a.gamma = in.gamma;
            a.beta = in.beta;
            a.activation = in.activation;
            a.activation_mask = std::span(guarded).subspan(7, bytes);
            batch_norm(a);
            const Bits bits{!layout.channels_last, s};
            const std::vector<T> values = y.values();
            for (size_t e = 0; e < values.size(); ++e) {
                const int64_t i = static_cast<int64_t>(e), bit = bits.of(i / s.inner / s.channels, i / s.inner % s.channels, i % s.inner);
                if (!(widen(values[e]) > 0)) guarded[static_cast<size_t>(7 + bit / 8)] ^= static_cast<std::uint8_t>(1 << bit % 8);
            }
            // Where the bit was 0 it has now become 1, and all others were 1.
            CHECK(guarded == std::vector<std::uint8_t>(bytes + 20, 0xff));
            batch_norm(a);

            BatchNormBackwardArgs b;
            b.x = x.view();
            b.dy = dy.view();
            b.mean = in.given_mean;
            b.inv_std = inv_std;
            b.gamma = in.gamma;
            b.beta = in.beta;
            b.activation = in.activation;
            for (const Stats stats : {Stats::batch, Stats::fixed}) {
                b.stats = stats;
                std::array<std::vector<T>, 2> dx;
                std::array<std::vector<float>, 2> dgamma, dbeta;
                for (const size_t masked : {0, 1}) {
                    Array<T> out(layout, s);
                    dgamma[masked] = dbeta[masked] = std::vector<float>(in.gamma.size());
                    b.activation_mask = masked ? std::span<const std::uint8_t>(a.activation_mask) : std::span<const std::uint8_t>();
                    b.dx = out.view();
                    b.dgamma = dgamma[masked];
                    b.dbeta = dbeta[masked];
                    batch_norm_backward(b);
                    dx[masked] = finish(std::move(out));
                }
                CHECK(same(dx[0], dx[1]) && same(dgamma[0], dgamma[1]) && same(dbeta[0], dbeta[1]));
            }
        }
    }
}

// Runs of one element, in which neither dimension is contiguous: every run has a byte of the mask.
void test_mask_of_single_elements() {
    context = "mask of every other column";
    std::vector<float> x(40), y(40), z(40), dy(40), dx(40), dz(40);
    for (size_t i = 0; i < 40; ++i) x[i] = static_cast<float>(i * i % 7) - 3, z[i] = static_cast<float>(i % 3) - 1, dy[i] = 1 + x[i];
    const auto columns = [](std::vector<float>& v) { return View<float>{v.data(), 4, 5, 1, 10, 2, 1}; };
    const std::vector<float> zero(5), one(5, 1);
    std::vector<std::uint8_t> mask(24);
    CHECK(activation_mask_bytes(columns(x)) == 24);
    BatchNormArgs a;
    a.x = columns(x);
    a.y = columns(y);
    a.residual = columns(z);
    a.mean = zero;
    a.var = one;
    a.eps = 0;
    a.activation = Activation::relu;
    a.activation_mask = mask;
    batch_norm(a);
    BatchNormBackwardArgs b;
    b.x = columns(x);
    b.dy = columns(dy);
    b.dx = columns(dx);
    b.dresidual = columns(dz);
    b.mean = zero;
    b.inv_std = one;
    b.stats = Stats::fixed;
    b.activation = Activation::relu;
    b.activation_mask = mask;
    batch_norm_backward(b);
    for (size_t i = 0; i < 40; ++i) {
        const bool used = i % 2 == 0, on = used && x[i] + z[i] > 0;
        CHECK(y[i] == (on ? x[i] + z[i] : 0) && dx[i] == (on ? dy[i] : 0) && dz[i] == dx[i]);
        if (used) CHECK(mask[i / 2] == (on ? 1 : 0));
    }
}

// ---- the same bits, whatever the level, the threads, the strides, the tuning ----

// Work in the smallest pieces, shared or not, from the front or backwards, stored past the caches or not.
constexpr const char* kTunings[] = {
    "l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=0",
    "l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=1000000000",
    "cached_bytes=0,stream_run_bytes=0,fetch_bytes=0,parallel_elements=0",
    "l2_bytes=0,group_bytes=5000,map_bytes=5000,cached_bytes=0,stream_run_bytes=0,parallel_elements=1000000000",
    "l2_bytes=1125899906842624,cached_bytes=1125899906842624,group_bytes=1125899906842624,map_bytes=1125899906842624",
};

template <class T>
void test_same_bits() {
    const std::string best = isa();
    for (const Shape& s : kBitShapes) {
        const Inputs<T> in(s, true, s.inner % 2 == 0 ? Activation::none : Activation::relu);
        const auto family = [&](const auto& layouts) {
            set_isa(best);
            set_num_threads(1);
            const std::vector<unsigned char> want = run(in, layouts[0]).bytes();
            for (const Layout& layout : layouts) {
                context = describe(Format<T>::name, layout, s);
                CHECK(run(in, layout, false).bytes() == want);
                CHECK(run(in, layout, true).bytes() == want);
            }
            for (const std::string& level : isa_levels()) {
                for (const int threads : {1, 2, 3, 7}) {
                    context = describe(Format<T>::name, layouts[0], s) + " " + level + ", " + std::to_string(threads) + " threads";
                    set_isa(level);
                    set_num_threads(threads);
                    CHECK(isa() == level && num_threads() == threads);
                    CHECK(run(in, layouts[0]).bytes() == want);
                }
            }
            for (const char* const settings : kTunings) {
                for (const int threads : {1, 3}) {
                    context = describe(Format<T>::name, layouts[0], s) + " " + settings + ", " + std::to_string(threads) + " threads";
                    set_tuning(settings);
                    set_num_threads(threads);
                    CHECK(run(in, layouts[threads == 1 ? 0 : 1], threads == 3).bytes() == want);
                }
            }
            set_tuning("");
        };
        family(kInnerContiguous);
        family(kChannelsContiguous);
    }
    set_isa(best);
    set_num_threads(1);
}

// The elements of the positions that count, as rows of channels.
template <class T>
std::vector<T> rest(const std::vector<T>& values, const Shape& s) {
    std::vector<T> rows;
    for (int64_t p = 0; p < s.count(); ++p) {
        for (int64_t c = 0; counts(p) && c < s.channels; ++c) {
            rows.push_back(values[static_cast<size_t>((p / s.inner * s.channels + c) * s.inner + p % s.inner)]);
        }
    }
    return rows;
}

// What does not count is as if it were not there.
template <class T>
void test_positions() {
    for (const Shape& s : kShapes) {
        const Inputs<T> in(s, true, Activation::none);
        Inputs<T> fewer(in);
        fewer.x = rest(in.x, s);
        fewer.dy = rest(in.dy, s);
        fewer.z = fewer.x;
        fewer.shape = {static_cast<int64_t>(fewer.x.size()) / s.channels, s.channels, 1};
        const Results<T> want = run(fewer, kChannelsContiguous[0]);
        for (const Layout& layout : {kInnerContiguous[0], kInnerContiguous[1], kChannelsContiguous[0], kChannelsContiguous[2]}) {
            context = describe(Format<T>::name, layout, s);
            const Results<T> got = run(in, layout);
            for (size_t c = 0; c < want.mean.size(); ++c) {
                CHECK(near(got.mean_m[c], want.mean[c], 1e-12) && near(got.inv_std_m[c] / want.inv_std[c], 1, 1e-12));
                CHECK(near(got.dgamma_m[c], want.dgamma[c], 1e-4) && near(got.dbeta_m[c], want.dbeta[c], 1e-4));
            }
            const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
                bool ok = a.size() == b.size();
                for (size_t i = 0; ok && i < a.size(); ++i) {
                    ok = near(widen(a[i]), widen(b[i]), (8 * kCompute<T> + 2 * kStore<T>)*(16 + std::abs(widen(b[i]))));
                }
                return ok;
            };
            CHECK(same(rest(got.y_m, s), want.y) && same(rest(got.y_m_given, s), want.y_given));
            CHECK(same(rest(got.dx_m, s), want.dx) && same(rest(got.dz_m, s), want.dz));
            for (const std::vector<T>* const v : {&got.y_m, &got.y_m_given, &got.dx_m, &got.dz_m}) {
                bool zero = true;
                for (int64_t e = 0; e < s.elements(); ++e) {
                    zero &= counts(e / s.inner / s.channels * s.inner + e % s.inner) || widen((*v)[static_cast<size_t>(e)]) == 0;
                }
                CHECK(zero);
            }
        }
    }
}

// Fewer values than positions stand for as many positions each; all equal to 1 change nothing.
void test_values_for_several_positions() {
    const Shape s{4, 5, 6};
    const Inputs<float> in(s, false, Activation::none);
    for (const Layout& layout : {kInnerContiguous[0], kChannelsContiguous[0]}) {
        context = describe("float32", layout, s);
        const Array<float> x(layout, s, in.x);
        const auto statistics = [&](const Positions& positions) {
            std::vector<double> mean(5), var(5);
            moments(x.view(), mean, var, 0, 0, positions);
            mean.insert(mean.end(), var.begin(), var.end());
            return mean;
        };
        for (const size_t n : {1u, 4u, 8u, 12u}) {
            std::vector<std::uint8_t> mask(n), full_mask(24);
            std::vector<double> weights(n), full_weights(24);
            for (size_t i = 0; i < n; ++i) {
                mask[i] = i % 3 != 1;
                weights[i] = 0.5 + static_cast<double>(i);
            }
            for (size_t p = 0; p < 24; ++p) {
                full_mask[p] = mask[p / (24 / n)];
                full_weights[p] = weights[p / (24 / n)];
            }
            CHECK(statistics({mask, {}}) == statistics({full_mask, {}}));
            CHECK(statistics({{}, weights}) == statistics({{}, full_weights}));
            CHECK(statistics({mask, weights}) == statistics({full_mask, full_weights}));
            CHECK(statistics({{}, std::vector<double>(n, 8.0)}) == statistics({}));
        }
    }
}

std::uint64_t hash_of_results() {
    std::uint64_t hash = 14695981039346656037u;  // FNV-1a
    const auto add = [&]<class T>(T) {
        for (const Shape& s : kShapes) {
            const Inputs<T> in(s, true, s.channels % 2 == 0 ? Activation::none : Activation::relu);
            for (const Layout& layout : {kInnerContiguous[1], kChannelsContiguous[0], kChannelsContiguous[2]}) {
                for (const unsigned char byte : run(in, layout).bytes()) hash = (hash ^ byte) * 1099511628211u;
            }
        }
    };
    add(0.0f);
    add(0.0);
    add(float16{});
    add(bfloat16{});
    return hash;
}

// ---- errors ----

// Valid arguments of every operation on a tensor of (4, 3, 5), to be spoilt one by one.
struct Valid {
    static constexpr int64_t kOuter = 4, kChannels = 3, kInner = 5;
    std::vector<float> x = std::vector<float>(120, 1.5f), y = x, dy = x, dx = x, z = x, dz = x;  // twice the size that is used
    std::vector<std::uint8_t> mask = std::vector<std::uint8_t>(16, 0x55);                        // 12 runs of one byte, and 4 spare ones
    std::vector<double> doubles = std::vector<double>(60);
    std::vector<float> mean{1, 2, 3}, var{1, 2, 3}, gamma{1, 2, 3}, beta{1, 2, 3}, running_mean{1, 2, 3}, running_var{1, 2, 3},
        dgamma{1, 2, 3}, dbeta{1, 2, 3}, two{1, 2};
    std::vector<double> out_mean{7, 8, 9}, out_inv_std{7, 8, 9}, out_two{7, 8}, r{7, 8, 9}, d{7, 8, 9};

    static View<float> view(std::vector<float>& v) { return View<float>::ncs(v.data(), kOuter, kChannels, kInner); }
    BatchNormArgs inference() {
        BatchNormArgs a;
        a.x = view(x);
        a.y = view(y);
        a.mean = mean;
        a.var = var;
        a.gamma = gamma;
        a.beta = beta;
        return a;
    }
    BatchNormTrainArgs train() {
        BatchNormTrainArgs a;
        a.x = view(x);
        a.y = view(y);
        a.gamma = gamma;
        a.beta = beta;
        a.running_mean = running_mean;
        a.running_var = running_var;
        a.mean = out_mean;
        a.inv_std = out_inv_std;
        return a;
    }
    BatchNormBackwardArgs backward() {
        BatchNormBackwardArgs a;
        a.x = view(x);
        a.dy = view(dy);
        a.dx = view(dx);
        a.mean = mean;
        a.inv_std = var;
        a.gamma = gamma;
        a.beta = beta;
        a.dgamma = dgamma;
        a.dbeta = dbeta;
        return a;
    }
    // The same with a residual, an activation and a mask.
    template <class Args>
    Args masked(Args a) {
        a.activation = Activation::relu;
        a.activation_mask = mask;
        if constexpr (std::is_same_v<Args, BatchNormBackwardArgs>) {
            a.dresidual = view(dz);
        } else {
            a.residual = view(z);
        }
        return a;
    }
    BatchNormArgs masked_inference() { return masked(inference()); }
    BatchNormTrainArgs masked_train() { return masked(train()); }
    BatchNormBackwardArgs masked_backward() { return masked(backward()); }
    BatchNormTrainArgs renorm() {
        BatchNormTrainArgs a = train();
        a.renorm.mean = mean;
        a.renorm.std = var;
        a.renorm.r = r;
        a.renorm.d = d;
        return a;
    }
    ChannelSumsArgs sums() {
        ChannelSumsArgs a;
        a.a = view(x);
        a.b = view(dy);
        a.shift = mean;
        a.sum_a = out_mean;
        a.sum_ab = out_inv_std;
        return a;
    }
    CombineArgs combination() {
        CombineArgs a;
        a.a = view(x);
        a.b = view(dy);
        a.out = view(dx);
        a.k_a = mean;
        a.center = var;
        a.k_b = gamma;
        a.k_0 = beta;
        a.activation = Activation::relu;
        a.inv_std = running_var;
        a.gamma = gamma;
        a.beta = beta;
        return a;
    }
    UpdateRunningArgs update() {
        UpdateRunningArgs a;
        a.running_mean = running_mean;
        a.running_var = running_var;
        a.mean = mean;
        a.var = var;
        a.count = 20;
        return a;
    }
    std::vector<unsigned char> bytes() const {
        std::vector<unsigned char> all;
        const auto add = [&](const auto&... v) {
            const auto one = [&](const auto& w) {
                const auto* const p = reinterpret_cast<const unsigned char*>(w.data());
                all.insert(all.end(), p, p + w.size() * sizeof w[0]);
            };
            (one(v), ...);
        };
        add(x, y, dy, dx, z, dz, mask, doubles, mean, var, gamma, beta, running_mean, running_var, dgamma, dbeta, two, out_mean,
            out_inv_std, out_two, r, d);
        return all;
    }
};

void call(const BatchNormArgs& a) { batch_norm(a); }
void call(const BatchNormTrainArgs& a) { batch_norm_train(a); }
void call(const BatchNormBackwardArgs& a) { batch_norm_backward(a); }
void call(const UpdateRunningArgs& a) { update_running(a); }
void call(const ChannelSumsArgs& a) { channel_sums(a); }
void call(const CombineArgs& a) { combine(a); }

// `spoil` changes valid arguments (or values they refer to); the call must then throw this message and change nothing.
template <class Args, class Spoil>
void refuses(Args (Valid::*make)(), const std::string& message, int line, Spoil spoil) {
    Valid valid;
    Args args = (valid.*make)();
    spoil(valid, args);
    const std::vector<unsigned char> before = valid.bytes();
    throws<std::invalid_argument>(message, line, [&] { call(args); });
    check(valid.bytes() == before, "something was modified: " + message, line);
}
#define REFUSES(operation, message, ...) \
    refuses(&Valid::operation, message, __LINE__, [&]([[maybe_unused]] Valid& v, [[maybe_unused]] auto& a) { __VA_ARGS__; })

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void test_errors_of_tensors() {
    context = "errors of tensors";
    const int64_t huge = int64_t{1} << 40;
    REFUSES(inference, "x has sizes (-4, 3, 5), expected none to be negative", a.x.outer = -4);
    REFUSES(inference, "x has sizes (4, -3, 5), expected none to be negative", a.x.channels = -3);
    REFUSES(inference, "x has sizes (4, 3, -5), expected none to be negative", a.x.inner = -5);
    REFUSES(train, "x has 0 channels, expected at least 1", a.x.channels = 0);
    REFUSES(train, "x has sizes (1099511627776, 3, 1099511627776), more elements than can be addressed", a.x.outer = a.x.inner = huge);
    REFUSES(train, "x has sizes (1099511627776, 1099511627776, 1), more elements", (a.x.outer = a.x.channels = huge, a.x.inner = 1));
    REFUSES(backward, "x has no data, expected an array of (outer, channels, inner) = (4, 3, 5)", a.x.data = nullptr);
    REFUSES(inference, "x is not aligned to its element size of 4 bytes", a.x.data = static_cast<const char*>(a.x.data) + 2);
    REFUSES(inference, "x has strides (30, 10, 2) of (outer, channels, inner), expected 1 for inner or for channels",
            (a.x.outer_stride = 30, a.x.channel_stride = 10, a.x.inner_stride = 2));

    REFUSES(inference, "y has (outer, channels, inner) (4, 3, 4), expected (4, 3, 5) as x has", a.y.inner = 4);
    REFUSES(inference, "y has (outer, channels, inner) (0, 0, 1), expected (4, 3, 5) as x has", a.y = Tensor());
    REFUSES(inference, "y has another storage type than x, expected the same", a.y = View<double>::ncs(v.doubles.data(), 4, 3, 5));
    REFUSES(train, "y has another storage type than x", a.y = View<double>::ncs(v.doubles.data(), 4, 3, 5));
    REFUSES(train, "y has no data", a.y.data = nullptr);
    REFUSES(train, "y is not aligned", a.y.data = static_cast<char*>(a.y.data) + 1);
    REFUSES(train, "y has strides (15, 1, 3), expected 1 for inner as x has", (a.y.channel_stride = 1, a.y.inner_stride = 3));
    REFUSES(inference, "y has strides (15, 5, 1), expected 1 for channels as x has", (a.x.channel_stride = 1, a.x.inner_stride = 3));
    REFUSES(inference, "y has strides that reach one element twice, expected distinct elements", a.y.outer_stride = 0);
    REFUSES(train, "y has strides that reach one element twice", a.y.channel_stride = 4);
    REFUSES(backward, "dx has strides that reach one element twice", a.dx.outer_stride = -14);
    REFUSES(backward, "dy has (outer, channels, inner) (3, 3, 5), expected (4, 3, 5) as x has", a.dy.outer = 3);
    REFUSES(backward, "dy has another storage type", a.dy.dtype = Dtype::float16);
    REFUSES(backward, "dy has no data", a.dy.data = nullptr);
    REFUSES(backward, "dy has strides (15, 1, 3), expected 1 for inner", (a.dy.channel_stride = 1, a.dy.inner_stride = 3));
    REFUSES(backward, "dx has (outer, channels, inner) (4, 2, 5), expected (4, 3, 5) as x has", a.dx.channels = 2);
    REFUSES(backward, "dx has another storage type", a.dx.dtype = Dtype::bfloat16);
    REFUSES(backward, "dx has strides (15, 1, 3), expected 1 for inner", (a.dx.channel_stride = 1, a.dx.inner_stride = 3));

    REFUSES(inference, "y partly overlaps x, expected the same array (in place) or a separate one", a.y.data = v.x.data() + 1);
    REFUSES(inference, "y partly overlaps x", (a.y.data = v.x.data(), a.y.outer_stride = 16));
    REFUSES(train, "y partly overlaps x", a.y.data = v.x.data() + 59);
    REFUSES(backward, "dx partly overlaps dy", a.dx.data = v.dy.data() + 15);
    REFUSES(backward, "dx partly overlaps x", a.dx.data = v.x.data() + 15);
    REFUSES(inference, "y overlaps mean, expected separate arrays", a.mean = std::span(v.y).subspan(59, 3));
    REFUSES(inference, "y overlaps var, expected separate arrays", a.var = std::span(v.y).subspan(2, 3));
    REFUSES(inference, "y overlaps gamma", a.gamma = std::span(v.y).first(3));
    REFUSES(train, "y overlaps beta", a.beta = std::span(v.y).first(3));
    REFUSES(train, "y overlaps running_mean", a.running_mean = std::span(v.y).first(3));
    REFUSES(train, "y overlaps running_var", a.running_var = std::span(v.y).first(3));
    REFUSES(train, "x overlaps running_mean", a.running_mean = std::span(v.x).first(3));
    REFUSES(train, "x overlaps running_var", a.running_var = std::span(v.x).first(3));
    REFUSES(train, "gamma overlaps running_mean", a.running_mean = v.gamma);
    REFUSES(train, "beta overlaps running_var", a.running_var = v.beta);
    REFUSES(backward, "dx overlaps mean", a.mean = std::span(v.dx).first(3));
    REFUSES(backward, "dx overlaps inv_std", a.inv_std = std::span(v.dx).first(3));
    REFUSES(backward, "dx overlaps gamma", a.gamma = std::span(v.dx).first(3));
    REFUSES(backward, "dx overlaps beta", a.beta = std::span(v.dx).first(3));
}

// Floats in the memory of the mask.
std::span<float> within_mask(Valid& v) { return {reinterpret_cast<float*>(v.mask.data()), 3}; }

void test_errors_of_residual() {
    context = "errors of residual and mask";
    REFUSES(masked_inference, "residual has (outer, channels, inner) (4, 3, 4), expected (4, 3, 5) as x has", a.residual.inner = 4);
    REFUSES(masked_train, "residual has (outer, channels, inner) (3, 3, 5), expected (4, 3, 5) as x has", a.residual.outer = 3);
    REFUSES(masked_inference, "residual has another storage type than x, expected the same", a.residual.dtype = Dtype::float64);
    REFUSES(masked_train, "residual has another storage type", a.residual.dtype = Dtype::float16);
    REFUSES(masked_train, "residual is not aligned", a.residual.data = static_cast<const char*>(a.residual.data) + 1);
    REFUSES(masked_inference, "residual has strides (15, 1, 3), expected 1 for inner as x has",
            (a.residual.channel_stride = 1, a.residual.inner_stride = 3));
    REFUSES(masked_inference, "y partly overlaps residual, expected the same array (in place) or a separate one",
            a.residual.data = v.y.data() + 15);
    REFUSES(masked_train, "y partly overlaps residual", (a.residual.data = v.y.data(), a.residual.outer_stride = 16));
    REFUSES(masked_train, "residual overlaps mean", (a.residual.data = v.doubles.data(), a.mean = std::span(v.doubles).first(3)));
    REFUSES(masked_train, "residual overlaps inv_std", (a.residual.data = v.doubles.data(), a.inv_std = std::span(v.doubles).first(3)));
    REFUSES(masked_train, "residual overlaps running_mean", a.running_mean = std::span(v.z).first(3));
    REFUSES(masked_train, "residual overlaps running_var", a.running_var = std::span(v.z).subspan(57, 3));

    REFUSES(masked_inference, "activation_mask is given without activation relu, leaky_relu or relu6, of which it tells; drop one of them",
            a.activation = Activation::none);
    REFUSES(masked_train, "activation_mask is given without activation relu", a.activation = Activation::none);
    REFUSES(masked_backward, "activation_mask is given without activation relu", a.activation = Activation::none);
    REFUSES(masked_inference, "activation_mask has 15 bytes, expected activation_mask_bytes(x) = 16",
            a.activation_mask = std::span(v.mask).first(15));
    REFUSES(masked_train, "activation_mask has 12 bytes, expected activation_mask_bytes(x) = 16",
            a.activation_mask = std::span(v.mask).first(12));
    REFUSES(masked_backward, "activation_mask has 1 bytes, expected activation_mask_bytes(x) = 16",
            a.activation_mask = std::span(v.mask).first(1));
    const auto on = [](std::vector<float>& floats) { return std::span(reinterpret_cast<std::uint8_t*>(floats.data()), 16); };
    REFUSES(masked_inference, "activation_mask overlaps x, expected separate arrays", a.activation_mask = on(v.x));
    REFUSES(masked_inference, "activation_mask overlaps y, expected separate arrays", a.activation_mask = on(v.y));
    REFUSES(masked_inference, "activation_mask overlaps residual, expected separate arrays", a.activation_mask = on(v.z));
    REFUSES(masked_inference, "activation_mask overlaps mean, expected separate arrays", a.mean = within_mask(v));
    REFUSES(masked_inference, "activation_mask overlaps gamma", (std::fill(v.mask.begin(), v.mask.end(), 0), a.gamma = within_mask(v)));
    REFUSES(masked_train, "activation_mask overlaps x", a.activation_mask = on(v.x));
    REFUSES(masked_train, "activation_mask overlaps y", a.activation_mask = on(v.y));
    REFUSES(masked_train, "activation_mask overlaps residual", a.activation_mask = on(v.z));
    REFUSES(masked_train, "activation_mask overlaps beta", a.beta = within_mask(v));
    REFUSES(masked_train, "activation_mask overlaps running_mean", a.running_mean = within_mask(v));
    REFUSES(masked_train, "activation_mask overlaps running_var", a.running_var = within_mask(v));
    REFUSES(masked_backward, "activation_mask overlaps dx", a.activation_mask = on(v.dx));
    REFUSES(masked_backward, "activation_mask overlaps dresidual", a.activation_mask = on(v.dz));
    REFUSES(masked_backward, "activation_mask overlaps dgamma", a.dgamma = within_mask(v));
    REFUSES(masked_backward, "activation_mask overlaps dbeta", a.dbeta = within_mask(v));

    REFUSES(masked_backward,
            "activation_mask is missing, expected the forward's: after a residual, x does not tell where the activation was on",
            a.activation_mask = {});
    REFUSES(masked_backward, "residual is missing, expected the forward's", (a.activation = Activation::tanh, a.activation_mask = {}));
    REFUSES(masked_backward, "residual and activation_mask are given, which tell the same; drop one of them",
            a.residual = Valid::view(v.z));
    REFUSES(masked_backward, "residual is given without an activation, for which alone it is read; drop it",
            (a.activation = Activation::none, a.activation_mask = {}, a.residual = Valid::view(v.z)));
    const auto with_residual = [](Valid& v, BatchNormBackwardArgs& a) { a.activation_mask = {}, a.residual = Valid::view(v.z); };
    REFUSES(masked_backward, "residual has (outer, channels, inner) (4, 2, 5)", (with_residual(v, a), a.residual.channels = 2));
    REFUSES(masked_backward, "dx partly overlaps residual", (with_residual(v, a), a.residual.data = v.dx.data() + 15));
    REFUSES(masked_backward, "residual overlaps dgamma", (with_residual(v, a), a.dgamma = std::span(v.z).first(3)));
    REFUSES(masked_inference, "activation_mask is given without activation relu", a.activation = Activation::silu);
    REFUSES(masked_inference, "activation is not known, expected one that Activation names", a.activation = static_cast<Activation>(7));
    REFUSES(masked_train, "slope is inf, expected a finite number that the type x computes in can hold",
            (a.activation = Activation::leaky_relu, a.slope = std::numeric_limits<double>::infinity()));
    REFUSES(masked_backward, "slope is 99999999", (a.activation = Activation::leaky_relu, a.slope = 1e39));
    REFUSES(masked_backward, "dresidual has (outer, channels, inner) (4, 2, 5), expected (4, 3, 5) as x has", a.dresidual.channels = 2);
    REFUSES(masked_backward, "dresidual has another storage type", a.dresidual.dtype = Dtype::bfloat16);
    REFUSES(masked_backward, "dresidual has strides (15, 1, 3), expected 1 for inner",
            (a.dresidual.channel_stride = 1, a.dresidual.inner_stride = 3));
    REFUSES(masked_backward, "dresidual has strides that reach one element twice", a.dresidual.outer_stride = 0);
    REFUSES(masked_backward, "dresidual partly overlaps dy, expected the same array (in place) or a separate one",
            a.dresidual.data = v.dy.data() + 15);
    REFUSES(masked_backward, "dresidual overlaps x, expected separate arrays", a.dresidual.data = v.x.data() + 1);
    REFUSES(masked_backward, "dx and dresidual overlap, expected two separate arrays", a.dresidual = a.dx);
    REFUSES(masked_backward, "dx and dresidual overlap", a.dresidual.data = v.dx.data() + 59);
    REFUSES(masked_backward, "dx and dresidual overlap", (a.dx = Valid::view(v.dy), a.dresidual = a.dx));
    REFUSES(masked_backward, "dresidual overlaps mean", a.mean = std::span(v.dz).first(3));
    REFUSES(masked_backward, "dresidual overlaps inv_std", a.inv_std = std::span(v.dz).first(3));
    REFUSES(masked_backward, "dresidual overlaps gamma", a.gamma = std::span(v.dz).first(3));
    REFUSES(masked_backward, "dresidual overlaps beta", a.beta = std::span(v.dz).first(3));
    REFUSES(masked_backward, "dresidual overlaps dgamma", a.dgamma = std::span(v.dz).first(3));
    REFUSES(masked_backward, "dresidual overlaps dbeta", a.dbeta = std::span(v.dz).first(3));

    Valid v;
    const auto x = Valid::view(v.x);
    CHECK(activation_mask_bytes(x) == 16 && activation_mask_bytes(View<double>::ncs(nullptr, 0, 3, 5)) == 4);
    CHECK(activation_mask_bytes(View<float>::nsc(v.x.data(), 20, 3)) == 8 + 4);
    throws<std::invalid_argument>("x has 0 channels, expected at least 1", __LINE__, [] { activation_mask_bytes(View<float>{}); });
    call(v.masked_inference());  // what is spoilt above is valid
    call(v.masked_train());
    call(v.masked_backward());
}

void test_errors_of_positions() {
    context = "errors of positions";
    const std::vector<std::uint8_t> three(3, 1), one_counts{0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, none(20, 0);
    const std::vector<double> small(20, 0.01), negative{1, -1, 1, 1}, inf(20, HUGE_VAL), large(20, 1e308), two(4, 0.1);
    REFUSES(inference, "mask has 3 values, expected one for each of the 20 positions of x, or a number that divides that",
            a.positions.mask = three);
    REFUSES(train, "weights has 3 values, expected one", a.positions.weights = std::span(small).first(3));
    REFUSES(train, "weights is -1.000000 at 1, expected finite values >= 0", a.positions.weights = negative);
    REFUSES(train, "weights is inf at 19, expected finite values >= 0", a.positions.weights = inf);
    REFUSES(train, "weights sum to more than a double holds", a.positions.weights = large);
    REFUSES(train, "x has one value per channel", a.positions.mask = one_counts);
    REFUSES(backward, "x has one value per channel", a.positions.mask = one_counts);
    REFUSES(train, "weights sum to 0.200000, expected more than running_ddof = 1", a.positions.weights = small);
    REFUSES(inference, "weights are given to batch_norm", a.positions.weights = small);
    REFUSES(backward, "weights are given with fixed statistics", (a.stats = Stats::fixed, a.positions.weights = small));
    REFUSES(masked_train, "activation_mask overlaps mask or weights, expected separate arrays",
            (std::fill(v.mask.begin(), v.mask.end(), 1), a.positions.mask = std::span<const std::uint8_t>(v.mask).first(4)));
    REFUSES(train, "y overlaps mask, expected separate arrays",
            a.positions.mask = std::span(reinterpret_cast<const std::uint8_t*>(v.y.data()) + 8, 20));
    REFUSES(
        backward, "dx overlaps weights, expected separate arrays",
        (v.doubles.assign(60, 1), a.positions.weights = std::span<const double>(v.doubles).first(20), a.dx.data = v.doubles.data() + 4));
    Valid v;
    throws<std::invalid_argument>("ddof is 1, expected less than the 1 values per channel", __LINE__,
                                  [&] { moments(Valid::view(v.x), v.out_mean, v.out_inv_std, 1, 0, {one_counts, {}}); });
    throws<std::invalid_argument>("ddof is 2, expected less than the 2.000000 that the weights sum to", __LINE__,
                                  [&] { moments(Valid::view(v.x), v.out_mean, v.out_inv_std, 2, 0, {{}, two}); });
    std::vector<std::uint8_t> pixels(60, 7);
    const auto image = View<std::uint8_t>::ncs(pixels.data(), 4, 3, 5);
    throws<std::invalid_argument>("a mask is given with x of integers", __LINE__,
                                  [&] { moments(image, v.out_mean, v.out_inv_std, 0, 0, {none, {}}); });
    throws<std::invalid_argument>("weights are given with x of integers", __LINE__,
                                  [&] { moments(image, v.out_mean, v.out_inv_std, 0, 0, {{}, two}); });
    // Nothing counts.
    BatchNormTrainArgs train = v.train();
    train.positions.mask = none;
    batch_norm_train(train);
    CHECK(std::isnan(v.out_mean[0]) && v.running_mean[0] == 1 && v.y[0] == 0 && v.y[59] == 0 && v.y[60] == 1.5f);
    BatchNormBackwardArgs backward = v.backward();
    backward.positions.mask = none;
    batch_norm_backward(backward);
    CHECK(v.dgamma[0] == 0 && v.dbeta[2] == 0 && v.dx[0] == 0 && v.dx[59] == 0 && v.dx[60] == 1.5f);
}

void test_errors_of_channels() {
    context = "errors of per-channel arguments";
    REFUSES(inference, "mean is missing", a.mean = {});
    REFUSES(inference, "var is missing", a.var = {});
    REFUSES(inference, "mean has 2 values, expected 3, one per channel of x", a.mean = v.two);
    REFUSES(inference, "var has 2 values, expected 3", a.var = v.two);
    REFUSES(inference, "gamma has 2 values, expected 3", a.gamma = v.two);
    REFUSES(inference, "beta has 2 values, expected 3", a.beta = v.two);
    REFUSES(inference, "mean is nan at channel 1, expected finite values", v.mean[1] = kNaN);
    REFUSES(inference, "var is inf at channel 2, expected finite values", v.var[2] = HUGE_VALF);
    REFUSES(inference, "var is -0.5", v.var[0] = -0.5f);
    REFUSES(inference, "gamma is -inf at channel 0", v.gamma[0] = -HUGE_VALF);
    REFUSES(train, "beta is nan at channel 2", v.beta[2] = kNaN);
    REFUSES(train, "gamma has 2 values, expected 3", a.gamma = v.two);
    REFUSES(train, "mean has 2 values, expected 3, one per channel of x", a.mean = v.out_two);
    REFUSES(train, "inv_std has 0 values, expected 3, one per channel of x", a.inv_std = {});
    REFUSES(backward, "mean is missing", a.mean = {});
    REFUSES(backward, "inv_std is missing", a.inv_std = {});
    REFUSES(backward, "mean has 2 values, expected 3", a.mean = v.two);
    REFUSES(backward, "inv_std has 2 values, expected 3", a.inv_std = v.two);
    REFUSES(backward, "gamma is nan at channel 0", v.gamma[0] = kNaN);
    REFUSES(backward, "beta has 2 values, expected 3", a.beta = v.two);
    REFUSES(backward, "dgamma has 2 values, expected 3", a.dgamma = v.two);
    REFUSES(backward, "dbeta has 2 values, expected 3", a.dbeta = v.two);

    REFUSES(train, "running_var is missing, expected running_mean and running_var or neither", a.running_var = {});
    REFUSES(train, "running_mean is missing, expected running_mean and running_var or neither", a.running_mean = {});
    REFUSES(train, "running_mean has 2 values, expected 3", a.running_mean = v.two);
    REFUSES(train, "running_var has 2 values, expected 3", a.running_var = v.two);
    REFUSES(train, "running_var has stride 0, expected one element per channel", a.running_var.stride = 0);
    REFUSES(train, "running_mean and running_var overlap, expected two separate arrays", a.running_var = v.running_mean);
    REFUSES(train, "running_mean and running_var overlap",
            (a.running_mean = std::span(v.dx).first(3), a.running_var = std::span(v.dx).subspan(2, 3)));
    REFUSES(update, "running_mean is missing", a.running_mean = {});
    REFUSES(update, "running_var is missing", a.running_var = {});
    REFUSES(update, "mean is missing", a.mean = {});
    REFUSES(update, "var is missing", a.var = {});
    REFUSES(update, "running_var has 2 values, expected 3", a.running_var = v.two);
    REFUSES(update, "mean has 2 values, expected 3", a.mean = v.two);
    REFUSES(update, "var has 2 values, expected 3", a.var = v.two);
    REFUSES(update, "running_mean and running_var overlap", a.running_mean = v.running_var);
    REFUSES(update, "running_mean and running_var overlap",
            (a.running_mean.size = a.running_var.size = 1, a.running_mean.stride = a.running_var.stride = 0,
             a.running_var.data = a.running_mean.data));
    REFUSES(update, "var is -0.5", v.var[0] = -0.5f);
}

void test_errors_of_numbers() {
    context = "errors of numbers";
    for (const double eps : {-1e-5, -HUGE_VAL, HUGE_VAL, double{kNaN}}) {
        REFUSES(inference, "eps is ", a.eps = eps);
        REFUSES(train, "eps is ", a.eps = eps);
    }
    REFUSES(inference, "eps is -1.000000, expected a finite number >= 0", a.eps = -1);
    for (const double decay : {-0.1, 1.5, double{kNaN}}) {
        REFUSES(train, "decay is ", a.decay = decay);
        REFUSES(update, "decay is ", a.decay = decay);
    }
    REFUSES(train, "decay is 2.000000, expected a number in [0, 1]", a.decay = 2);
    REFUSES(train, "running_ddof is 2, expected 0 or 1", a.running_ddof = 2);
    REFUSES(train, "running_ddof is -1, expected 0 or 1", a.running_ddof = -1);
    REFUSES(train, "x has one value per channel, from which no variance can be had", (a.x.outer = a.x.inner = a.y.outer = a.y.inner = 1));
    REFUSES(backward, "x has one value per channel, expected at least 2 with batch statistics",
            (a.x.outer = a.x.inner = a.dy.outer = a.dy.inner = a.dx.outer = a.dx.inner = 1));
    REFUSES(update, "ddof is 2, expected 0 or 1", a.ddof = 2);
    REFUSES(update, "count is 1, expected more than ddof = 1", a.count = 1);
    REFUSES(update, "count is 0, expected more than ddof = 0", (a.count = 0, a.ddof = 0));

    for (const int n : {-1, -3, std::numeric_limits<int>::min()}) {
        const std::string message = "num_threads is " + std::to_string(n) + ", expected at least 1, or 0 for the default";
        REFUSES(inference, message, a.num_threads = n);
        REFUSES(train, message, a.num_threads = n);
        REFUSES(backward, message, a.num_threads = n);
    }

    Valid v;
    const auto x = Valid::view(v.x);
    const auto refuses_moments = [&](const char* message, std::span<double> mean, std::span<double> var, int64_t ddof, int line) {
        const std::vector<unsigned char> before = v.bytes();
        throws<std::invalid_argument>(message, line, [&] { moments(x, mean, var, ddof); });
        check(v.bytes() == before, "something was modified", line);
    };
    refuses_moments("mean has 2 values, expected 3, one per channel of x", v.out_two, v.out_inv_std, 0, __LINE__);
    refuses_moments("var has 2 values, expected 3, one per channel of x", v.out_mean, v.out_two, 0, __LINE__);
    refuses_moments("ddof is -1, expected >= 0", v.out_mean, v.out_inv_std, -1, __LINE__);
    refuses_moments("ddof is 20, expected less than the 20 values per channel of x", v.out_mean, v.out_inv_std, 20, __LINE__);
    throws<std::invalid_argument>("num_threads is -1, expected at least 1, or 0 for the default", __LINE__,
                                  [&] { moments(x, v.out_mean, v.out_inv_std, 0, -1); });

    const int threads = num_threads();
    throws<std::invalid_argument>("num_threads is 0, expected at least 1", __LINE__, [] { set_num_threads(0); });
    throws<std::invalid_argument>("num_threads is -3, expected at least 1", __LINE__, [] { set_num_threads(-3); });
    CHECK(num_threads() == threads);
    const std::string level = isa();
    throws<std::invalid_argument>("isa is 'sse9', expected one of 'baseline'", __LINE__, [] { set_isa("sse9"); });
    throws<std::invalid_argument>("isa is '', expected one of 'baseline'", __LINE__, [] { set_isa(""); });
    const std::vector<std::string> usable = isa_levels();
    for (const std::string& name : isa_built()) {
        if (std::find(usable.begin(), usable.end(), name) != usable.end()) continue;
        throws<std::invalid_argument>("isa is '" + name + "', which this CPU cannot run", __LINE__, [&] { set_isa(name); });
    }
    CHECK(isa() == level);
}

void test_tuning() {
    context = "tuning";
    set_tuning("");
    const std::string defaults = tuning();
    CHECK(defaults.starts_with("l2_bytes=") && defaults.find(",parallel_elements=49152") != std::string::npos);
    set_tuning("map_bytes=77,l2_bytes=0");
    CHECK(tuning().starts_with("l2_bytes=0,cached_bytes=") && tuning().find(",map_bytes=77,") != std::string::npos);
    const std::string before = tuning();
    throws<std::invalid_argument>("tuning has 'l4_bytes', expected one of l2_bytes, cached_bytes, stream_run_bytes, group_bytes, ",
                                  __LINE__, [] { set_tuning("l2_bytes=5,l4_bytes=1"); });
    for (const char* const number : {"", "many", "-1", "1.5", " 1", "1125899906842625", "99999999999999999999"}) {
        throws<std::invalid_argument>(std::string("tuning has l2_bytes='") + number + "', expected an integer from 0 to 2^50", __LINE__,
                                      [&] { set_tuning(std::string("map_bytes=5,l2_bytes=") + number); });
    }
    CHECK(tuning() == before);
    set_tuning("");
    CHECK(tuning() == defaults);
    set_tuning(before);
    CHECK(tuning() == before);
    set_tuning("");
}

// A number of threads for one call changes neither its result nor the default.
void test_threads_of_a_call() {
    context = "num_threads of a call";
    set_tuning("parallel_elements=0");
    const int threads = num_threads();
    std::vector<unsigned char> want;
    for (const int n : {0, 1, 2, 3, 7, 100000}) {
        Valid v;
        for (size_t i = 0; i < v.x.size(); ++i) v.x[i] = static_cast<float>(i * i % 7), v.z[i] = static_cast<float>(i % 5) - 2;
        BatchNormTrainArgs train = v.masked_train();
        BatchNormBackwardArgs backward = v.masked_backward();
        train.num_threads = backward.num_threads = n;
        batch_norm_train(train);
        batch_norm_backward(backward);
        BatchNormArgs given = v.masked_inference();
        given.y = Valid::view(v.dy);
        given.num_threads = n;
        batch_norm(given);
        moments(train.x, v.out_mean, v.out_inv_std, 0, n);
        if (n == 0) want = v.bytes();
        CHECK(v.bytes() == want && num_threads() == threads);
    }
    set_tuning("");
}

void test_errors_of_renorm() {
    context = "errors of renorm";
    REFUSES(renorm, "renorm.std is missing, expected renorm.mean and renorm.std or neither", a.renorm.std = {});
    REFUSES(renorm, "renorm.mean is missing, expected renorm.mean and renorm.std or neither", a.renorm.mean = {});
    REFUSES(renorm, "renorm.mean has 2 values, expected 3", a.renorm.mean = v.two);
    REFUSES(renorm, "renorm.std has 2 values, expected 3", a.renorm.std = v.two);
    REFUSES(renorm, "renorm.mean is nan at channel 1", v.mean[1] = kNaN);
    REFUSES(renorm, "renorm.std is inf at channel 2", v.var[2] = HUGE_VALF);
    REFUSES(renorm, "renorm.std is 0.000000 at channel 1, expected > 0", v.var[1] = 0);
    REFUSES(renorm, "rmin is 1.5", a.renorm.rmin = 1.5);
    REFUSES(renorm, "rmin is -0.5", a.renorm.rmin = -0.5);
    REFUSES(renorm, "rmax is 0.5", a.renorm.rmax = 0.5);
    REFUSES(renorm, "rmax is nan", a.renorm.rmax = kNaN);
    REFUSES(renorm, "dmax is -1", a.renorm.dmax = -1);
    REFUSES(renorm, "r has 2 values, expected 3", a.renorm.r = v.out_two);
    REFUSES(renorm, "d has 0 values, expected 3", a.renorm.d = {});
    REFUSES(renorm, "r and d overlap", a.renorm.d = v.r);
    REFUSES(renorm, "mean and r overlap", a.renorm.r = v.out_mean);
    REFUSES(renorm, "inv_std and d overlap", a.renorm.d = v.out_inv_std);
    REFUSES(renorm, "r and running_mean overlap", a.running_mean = v.r);
    REFUSES(renorm, "d and running_var overlap", a.running_var = v.d);
    const auto doubles = [](Valid& v) { return View<double>::ncs(v.doubles.data(), 4, 3, 5); };
    REFUSES(renorm, "y overlaps r", (a.x = a.y = doubles(v), a.renorm.r = std::span(v.doubles).first(3)));
    REFUSES(renorm, "x overlaps d", {
        a.x = doubles(v);
        static std::vector<double> y(60);
        a.y = View<double>::ncs(y.data(), 4, 3, 5);
        a.renorm.d = std::span(v.doubles).first(3);
    });
    REFUSES(renorm, "y overlaps renorm.mean", a.renorm.mean = std::span<const float>(v.y).first(3));
    REFUSES(renorm, "y overlaps renorm.std", a.renorm.std = std::span<const float>(v.y).first(3));
    REFUSES(renorm, "renorm.mean overlaps mean", a.renorm.mean = std::span<const double>(v.out_mean));
    REFUSES(renorm, "renorm.std overlaps inv_std",
            (std::fill(v.out_inv_std.begin(), v.out_inv_std.end(), 1.0), a.renorm.std = std::span<const double>(v.out_inv_std)));
    REFUSES(renorm, "renorm.mean overlaps r", a.renorm.mean = std::span<const double>(v.r));
    REFUSES(renorm, "renorm.std overlaps d", (std::fill(v.d.begin(), v.d.end(), 1.0), a.renorm.std = std::span<const double>(v.d)));
}

void test_errors_of_primitives() {
    context = "errors of channel_sums and combine";
    REFUSES(sums, "a has 0 channels", a.a.channels = 0);
    REFUSES(sums, "a has strides (2, 2, 2) of (outer, channels, inner), expected 1",
            a.a.outer_stride = a.a.channel_stride = a.a.inner_stride = 2);
    REFUSES(sums, "b has (outer, channels, inner) (4, 3, 4), expected (4, 3, 5) as a has", a.b.inner = 4);
    REFUSES(sums, "b has another storage type than a", a.b.dtype = Dtype::float64);
    REFUSES(sums, "b has strides (15, 1, 3), expected 1 for inner as a has", (a.b.channel_stride = 1, a.b.inner_stride = 3));
    REFUSES(sums, "shift has 2 values, expected 3", a.shift = v.two);
    REFUSES(sums, "sum_a has 2 values, expected 3", a.sum_a = v.out_two);
    REFUSES(sums, "sum_ab has 0 values, expected 3", a.sum_ab = {});
    REFUSES(sums, "sum_a and sum_ab overlap", a.sum_ab = v.out_mean);
    REFUSES(sums, "num_threads is -1", a.num_threads = -1);
    REFUSES(combination, "b has another storage type than a", a.b.dtype = Dtype::float64);
    REFUSES(combination, "out has (outer, channels, inner) (3, 3, 5), expected (4, 3, 5) as a has", a.out.outer = 3);
    REFUSES(combination, "out has strides that reach one element twice", a.out.channel_stride = 0);
    REFUSES(combination, "activation is not known, expected one that Activation names", a.activation = static_cast<Activation>(77));
    for (ConstChannels CombineArgs::* vector : {&CombineArgs::k_a, &CombineArgs::center, &CombineArgs::k_b, &CombineArgs::k_0,
                                                &CombineArgs::inv_std, &CombineArgs::gamma, &CombineArgs::beta}) {
        REFUSES(combination, "", a.*vector = v.two);
        REFUSES(combination, "out overlaps ", a.*vector = std::span<const float>(v.dx).first(3));
    }
    REFUSES(combination, "k_b has 2 values, expected 3", a.k_b = v.two);
    REFUSES(combination, "num_threads is -1", a.num_threads = -1);
    REFUSES(combination, "out partly overlaps a", a.out.data = v.x.data() + 1);
    REFUSES(combination, "out partly overlaps b", a.out.data = v.dy.data() + 1);
}

// ---- moments of many batches ----

template <class T>
void test_moment_sums() {
    for (const Shape& s : kShapes) {
        if (s.count() < 2 || s.outer < 2) continue;
        context = describe(Format<T>::name, kInnerContiguous[0], s);
        Inputs<T> in(s, false, Activation::none);
        const size_t size = static_cast<size_t>(moment_sums_size(s.channels)), channels = static_cast<size_t>(s.channels);
        const int64_t per_image = s.channels * s.inner;
        std::vector<double> forwards(size), backwards(size), batch(size);
        for (int64_t n = 0; n < s.outer; ++n) {
            moment_sums(View<T>::ncs(in.x.data() + n * per_image, 1, s.channels, s.inner), batch);
            merge_moment_sums(forwards, batch);
            moment_sums(View<T>::ncs(in.x.data() + (s.outer - 1 - n) * per_image, 1, s.channels, s.inner), batch);
            merge_moment_sums(backwards, batch);
        }
        CHECK(moment_count(forwards) == static_cast<double>(s.count()));
        std::vector<double> mean(channels), m2(channels), other_mean(channels), other_m2(channels), var(channels);
        moments_from_sums(forwards, mean, m2);
        moments_from_sums(backwards, other_mean, other_m2);
        CHECK(same(mean, other_mean) && same(m2, other_m2));
        moments(View<T>::ncs(in.x.data(), s.outer, s.channels, s.inner), other_mean, var);
        bool close = true;
        for (size_t c = 0; c < channels; ++c) {
            close = close && std::abs(mean[c] - other_mean[c]) <= 1e-13 * (std::abs(mean[c]) + std::sqrt(var[c]));
            close = close && std::abs(m2[c] / static_cast<double>(s.count()) - var[c]) <= 1e-11 * var[c];
        }
        CHECK(close);
        merge_moment_sums(forwards, forwards);
        moments_from_sums(forwards, other_mean, other_m2);
        CHECK(same(mean, other_mean) && other_m2[0] == 2 * m2[0] && moment_count(forwards) == static_cast<double>(2 * s.count()));
    }
}

void test_moment_sums_of_nothing() {
    context = "sums of nothing";
    std::vector<double> sums(static_cast<size_t>(moment_sums_size(3)), 7.0), mean(3), m2(3);
    moment_sums(View<float>::ncs(nullptr, 0, 3, 5), sums);
    CHECK(sums == std::vector<double>(sums.size(), 0.0) && moment_count(sums) == 0);
    moments_from_sums(sums, mean, m2);
    CHECK(std::isnan(mean[0]) && std::isnan(m2[2]));
}

void test_errors_of_moment_sums() {
    context = "errors of moment_sums";
    Valid v;
    const auto x = Valid::view(v.x);
    std::vector<double> sums(21, 7.0), other(21, 7.0), two(15), mean(3), m2(3);
    const auto refuses_sums = [&](const std::string& message, int line, auto f) {
        throws<std::invalid_argument>(message, line, f);
        check(sums == std::vector<double>(21, 7.0) && mean == std::vector<double>(3), "something was modified", line);
    };
    refuses_sums("sums has 15 values, expected moment_sums_size(3) = 21 for the channels of x", __LINE__, [&] { moment_sums(x, two); });
    refuses_sums("num_threads is -1", __LINE__, [&] { moment_sums(x, sums, -1); });
    refuses_sums("x has 0 channels", __LINE__, [&] { moment_sums(View<float>{}, sums); });
    std::vector<double> doubles(21, 7.0);
    refuses_sums("x overlaps sums, expected separate arrays", __LINE__,
                 [&] { moment_sums(View<double>::nsc(doubles.data(), 7, 3), doubles); });
    const std::span<double> all(doubles);
    const std::string expected = " values, expected moment_sums_size(C) = 3 + 6 C of C >= 1 channels";
    for (const size_t n : {size_t{0}, size_t{3}, size_t{20}}) {
        const std::string has = "has " + std::to_string(n) + expected;
        refuses_sums("sums " + has, __LINE__, [&] { merge_moment_sums(all.first(n), sums); });
        refuses_sums("others " + has, __LINE__, [&] { merge_moment_sums(sums, all.first(n)); });
        refuses_sums("sums " + has, __LINE__, [&] { moments_from_sums(all.first(n), mean, m2); });
        refuses_sums("sums " + has, __LINE__, [&] { moment_count(all.first(n)); });
    }
    refuses_sums("others has 2 channels, expected 3 as sums has", __LINE__, [&] { merge_moment_sums(sums, two); });
    std::vector<double> longer(22);
    refuses_sums("others overlaps sums, expected separate arrays", __LINE__,
                 [&] { merge_moment_sums(std::span(longer).first(21), std::span(longer).last(21)); });
    refuses_sums("mean has 2 values, expected 3", __LINE__, [&] { moments_from_sums(sums, std::span(m2).first(2), m2); });
    refuses_sums("m2 has 2 values, expected 3", __LINE__, [&] { moments_from_sums(sums, mean, std::span(m2).first(2)); });
    refuses_sums("mean and m2 overlap", __LINE__, [&] { moments_from_sums(sums, mean, mean); });
    refuses_sums("sums overlaps mean", __LINE__, [&] { moments_from_sums(sums, std::span(sums).first(3), m2); });
    refuses_sums("sums overlaps m2", __LINE__, [&] { moments_from_sums(sums, mean, std::span(sums).last(3)); });
}

// ---- edges ----

void test_renorm() {
    context = "renorm";
    Valid v, plain;
    for (size_t i = 0; i < v.x.size(); ++i) plain.x[i] = v.x[i] = static_cast<float>(i * i % 7);
    batch_norm_train(plain.train());
    BatchNormTrainArgs a = v.renorm();
    a.renorm.rmax = 1.25;
    a.renorm.dmax = 0.5;
    batch_norm_train(a);
    CHECK(v.out_mean == plain.out_mean && v.out_inv_std == plain.out_inv_std && v.running_var == plain.running_var);
    for (size_t c = 0; c < 3; ++c) {
        const double std = 1 / v.out_inv_std[c], mean = v.out_mean[c], reference_mean = v.mean[c], reference_std = v.var[c];
        const double r = std::min(std / reference_std, 1.25), d = std::clamp((mean - reference_mean) / reference_std, -0.5, 0.5);
        CHECK(near(v.r[c], r, 1e-15) && near(v.d[c], d, 1e-15));
        const double y = (v.x[5 * c] - mean) / std * r * v.gamma[c] + (v.beta[c] + v.gamma[c] * d);
        CHECK(near(v.y[5 * c], y, 1e-6));
    }
    // Limits that leave nothing to correct.
    a.renorm.rmin = a.renorm.rmax = 1;
    a.renorm.dmax = 0;
    batch_norm_train(a);
    CHECK(v.y == plain.y);
}

void test_primitives() {
    context = "channel_sums and combine";
    Valid v;
    for (size_t i = 0; i < v.x.size(); ++i) v.x[i] = static_cast<float>(i * i % 7) - 3, v.dy[i] = static_cast<float>(i * i % 11);
    channel_sums(v.sums());
    combine(v.combination());
    for (size_t c = 0; c < 3; ++c) {
        double sum_a = 0, sum_ab = 0;
        for (size_t n = 0; n < 4; ++n) {
            for (size_t s = 0; s < 5; ++s) {
                const size_t i = n * 15 + c * 5 + s;
                const double b = v.dy[i], about = v.var[c];
                sum_a += v.x[i];
                sum_ab += v.x[i] * (b - v.mean[c]);
                const double a = (b - about) * v.running_var[c] * v.gamma[c] + v.beta[c] > 0 ? v.x[i] : 0;
                CHECK(v.dx[i] == a * v.mean[c] + (b - about) * v.gamma[c] + v.beta[c]);
            }
        }
        CHECK(v.out_mean[c] == sum_a && v.out_inv_std[c] == sum_ab);
    }
    // Absent numbers: sums about 0, and a copy of a; b is then not read.
    ChannelSumsArgs sums = v.sums();
    sums.shift = {};
    channel_sums(sums);
    CHECK(v.out_inv_std[0] != 0);
    CombineArgs copy = v.combination();
    copy.k_a = copy.k_b = copy.k_0 = {};
    copy.activation = Activation::none;
    v.dy.assign(v.dy.size(), kNaN);
    combine(copy);
    for (size_t i = 0; i < 60; ++i) CHECK(v.dx[i] == v.x[i]);
    // No values.
    sums.a = sums.b = View<float>::ncs(nullptr, 0, 3, 5);
    channel_sums(sums);
    CHECK(v.out_mean[1] == 0 && v.out_inv_std[2] == 0);
    copy.a = copy.b = copy.out = View<float>::ncs(nullptr, 0, 3, 5);
    combine(copy);
}

// Every activation, its forward and backward, with and without a residual: v is x, or x + z.
template <class T>
void test_activations() {
    const auto act = [](Activation a, double v) {
        switch (a) {
            case Activation::leaky_relu:
                return std::pair(v > 0 ? v : v * 0.25, v > 0 ? 1 : 0.25);
            case Activation::relu6:
                return std::pair(std::clamp(v, 0.0, 6.0), v > 0 && v < 6 ? 1.0 : 0.0);
            case Activation::sigmoid:
                return std::pair(1 / (1 + std::exp(-v)), std::exp(-v) / std::pow(1 + std::exp(-v), 2));
            case Activation::tanh:
                return std::pair(std::tanh(v), 1 - std::tanh(v) * std::tanh(v));
            default:
                const double s = 1 / (1 + std::exp(-v));
                return std::pair(v * s, s + v * s * (1 - s));
        }
    };
    const std::vector<float> zero(3), one(3, 1);
    const double bound = 8 * (kCompute<T> + kStore<T>);
    for (const Shape& s : {Shape{2, 3, 41}, Shape{70, 3, 1}}) {
        const Inputs<T> in(s, false, Activation::none);
        for (const Activation a : {Activation::leaky_relu, Activation::relu6, Activation::sigmoid, Activation::tanh, Activation::silu}) {
            for (const bool with_z : {false, true}) {
                context = std::string("activation ") + std::to_string(static_cast<int>(a)) + " of " + Format<T>::name;
                std::vector<T> x = in.x, y = x, dy = in.dy, dx = x, z = in.z, dz = x;
                const auto view = [&](std::vector<T>& v) { return View<T>::ncs(v.data(), s.outer, s.channels, s.inner); };
                BatchNormArgs forward;
                forward.x = view(x);
                forward.y = view(y);
                forward.mean = zero;
                forward.var = one;
                forward.eps = 0;
                forward.activation = a;
                forward.slope = 0.25;
                BatchNormBackwardArgs backward;
                backward.x = view(x);
                backward.dy = view(dy);
                backward.dx = view(dx);
                backward.mean = zero;
                backward.inv_std = one;
                backward.stats = Stats::fixed;
                backward.activation = a;
                backward.slope = 0.25;
                if (with_z) {
                    forward.residual = backward.residual = view(z);
                    backward.dresidual = view(dz);
                }
                batch_norm(forward);
                batch_norm_backward(backward);
                bool good = true;
                for (size_t i = 0; i < x.size(); ++i) {
                    const double v = widen(x[i]) + (with_z ? widen(z[i]) : 0);
                    const auto [value, slope] = act(a, v);
                    good = good && near(widen(y[i]), value, bound * (1 + std::abs(v))) &&
                           near(widen(dx[i]), slope * widen(dy[i]), 2 * bound * (1 + std::abs(widen(dy[i])))) &&
                           (!with_z || widen(dz[i]) == widen(dx[i]));
                }
                CHECK(good);
            }
        }
    }
}

void test_empty() {
    context = "no values";
    for (const Shape s : {Shape{0, 3, 5}, Shape{4, 3, 0}, Shape{0, 3, 1}}) {
        Valid v;
        const auto empty = View<float>::ncs(nullptr, s.outer, s.channels, s.inner);
        moments(empty, v.out_mean, v.out_inv_std);
        CHECK(std::isnan(v.out_mean[2]) && std::isnan(v.out_inv_std[0]));
        BatchNormTrainArgs train = v.train();
        train.x = train.y = empty;
        v.out_mean = v.out_inv_std = {7, 8, 9};
        batch_norm_train(train);
        CHECK(std::isnan(v.out_mean[2]) && std::isnan(v.out_inv_std[0]));
        CHECK(v.running_mean == Valid().running_mean && v.running_var == Valid().running_var);
        BatchNormArgs given = v.inference();
        given.x = given.y = empty;
        batch_norm(given);
        BatchNormBackwardArgs backward = v.backward();
        backward.x = backward.dy = backward.dx = empty;
        batch_norm_backward(backward);
        CHECK(v.dgamma == std::vector<float>(3, 0.0f) && v.dbeta == std::vector<float>(3, 0.0f));
    }
}

void test_one_value() {
    context = "one value per channel";
    Valid v;
    v.x[0] = 3;
    std::vector<double> mean(1), var(1);
    moments(View<float>::ncs(v.x.data(), 1, 1, 1), mean, var);
    CHECK(mean[0] == 3 && var[0] == 0);
    BatchNormBackwardArgs a = v.backward();  // as after inference
    a.x.outer = a.x.inner = a.dy.outer = a.dy.inner = a.dx.outer = a.dx.inner = 1;
    a.stats = Stats::fixed;
    batch_norm_backward(a);
    CHECK(v.dx[5] == 1.5f * 2 * 2 && v.dbeta[1] == 1.5f);
}

void test_optional_outputs() {
    context = "absent outputs";
    for (const Stats stats : {Stats::batch, Stats::fixed}) {
        Valid all;
        for (size_t i = 0; i < all.x.size(); ++i) all.x[i] = static_cast<float>(i * i % 7), all.dy[i] = static_cast<float>(i * i % 11);
        const auto run_with = [&](bool dx, bool dgamma, bool dbeta) {
            Valid v = all;
            BatchNormBackwardArgs a = v.backward();
            a.stats = stats;
            if (!dx) a.dx = {};
            if (!dgamma) a.dgamma = {};
            if (!dbeta) a.dbeta = {};
            batch_norm_backward(a);
            return v;
        };
        const Valid full = run_with(true, true, true);
        for (int needs = 0; needs < 8; ++needs) {
            const bool dx = needs & 1, dgamma = needs & 2, dbeta = needs & 4;
            const Valid v = run_with(dx, dgamma, dbeta);
            CHECK(v.dx == (dx ? full : all).dx && v.dgamma == (dgamma ? full : all).dgamma && v.dbeta == (dbeta ? full : all).dbeta);
        }
    }
}

void test_update_running() {
    context = "update_running";
    std::vector<double> mean{10, 20}, var{1, 2}, batch_mean{2, 4}, batch_var{8, 16};
    UpdateRunningArgs a;
    a.running_mean = mean;
    a.running_var = var;
    a.mean = batch_mean;
    a.var = batch_var;
    a.decay = 0.75;
    a.count = 5;
    update_running(a);
    CHECK(mean == (std::vector<double>{8, 16}));
    CHECK(var == (std::vector<double>{0.75 + 0.25 * 10, 1.5 + 0.25 * 20}));
    a.ddof = 0;
    a.decay = 0;
    update_running(a);
    CHECK(mean == batch_mean && var == batch_var);
    a.decay = 1;
    batch_mean = {0, 0};
    update_running(a);
    CHECK(mean == (std::vector<double>{2, 4}));

    // Two columns of one array, and strides that run backwards.
    std::vector<float> table{10, 1, 20, 2}, batch{4, 2};
    a.running_mean = Channels(table.data(), false, 2, 2);
    a.running_var = Channels(table.data() + 1, false, 2, 2);
    a.mean = ConstChannels(batch.data() + 1, false, 2, -1);
    a.var = batch;
    a.decay = 0.5;
    update_running(a);
    CHECK(table == (std::vector<float>{6, 2.5, 12, 2}));

    Valid v;
    std::vector<double> columns{1, 1, 2, 2, 3, 3};
    BatchNormTrainArgs train = v.train();
    batch_norm_train(train);
    Valid w;
    train = w.train();
    train.running_mean = Channels(columns.data() + 4, true, 3, -2);
    train.running_var = Channels(columns.data() + 5, true, 3, -2);
    batch_norm_train(train);
    for (size_t c = 0; c < 3; ++c) {
        const double old = static_cast<double>(3 - c);
        CHECK(columns[4 - 2 * c] == 0.9 * old + (1 - 0.9) * 1.5 && columns[5 - 2 * c] == 0.9 * old);
        CHECK(v.running_mean[c] == static_cast<float>(0.9 * static_cast<double>(c + 1) + (1 - 0.9) * 1.5));
    }
}

// A poll that says stop abandons a long call; statistics stay as they were. It is asked every 50 ms, so the call is made longer until it
// is interrupted: by the slowest storage type, on one thread.
void test_interrupt() {
    context = "interrupt";
    const int threads = num_threads();
    const std::string level = isa();
    set_isa("baseline");
    for (const int n_threads : {1, 2}) {
        set_num_threads(n_threads);
        set_interrupt_poll([] { return true; });
        bool interrupted = false;
        for (int64_t inner = 1 << 14; !interrupted && inner <= 1 << 20; inner *= 4) {
            std::vector<float16> x(static_cast<size_t>(16 * 16 * inner), float16{0x3c01});
            Valid v;
            v.running_mean = v.running_var = std::vector<float>(16, 0.5f);
            v.out_mean = v.out_inv_std = std::vector<double>(16, 7);
            BatchNormTrainArgs a = v.train();
            a.gamma = a.beta = {};
            a.x = a.y = View<float16>::ncs(x.data(), 16, 16, inner);
            try {
                batch_norm_train(a);
            } catch (const Interrupted& e) {
                interrupted = true;
                CHECK(std::string_view(e.what()) == "interrupted");
                CHECK(v.running_mean == std::vector<float>(16, 0.5f) && v.running_var == std::vector<float>(16, 0.5f));
                CHECK(v.out_mean == std::vector<double>(16, 7) && v.out_inv_std == std::vector<double>(16, 7));
            }
        }
        CHECK(interrupted);
        set_interrupt_poll(nullptr);
    }
    set_num_threads(threads);
    set_isa(level);
}

// Pixels of n images with hw pixels of 3 channels each, and what batch_norm of them as doubles gives, channels first.
template <class T>
void test_image() {
    context = "integers";
    const int64_t n = 3, channels = 3, hw = 37;
    using Limits = std::numeric_limits<T>;
    std::vector<T> x(static_cast<size_t>(n * channels * hw));
    std::vector<double> planes(x.size());
    for (int64_t i = 0; i < n * hw * channels; ++i) {
        const int64_t value = i % 11 == 0 ? Limits::min() : i % 13 == 0 ? Limits::max() : Limits::min() + i * 37 % 251;
        x[static_cast<size_t>(i)] = static_cast<T>(value);
        const int64_t pixel = i / channels;
        planes[static_cast<size_t>((pixel / hw * channels + i % channels) * hw + pixel % hw)] = static_cast<double>(value);
    }
    const std::vector<double> mean{1.5, 100, -7}, var{2, 30, 400}, gamma{1, -2, 0.5}, beta{0, 1, 2};
    std::vector<double> want(x.size()), got64(x.size()), got_mean(3), got_var(3), want_mean(3), want_var(3);
    const auto planes_view = View<const double>::ncs(planes.data(), n, channels, hw);
    batch_norm(
        {.x = planes_view, .y = View<double>::ncs(want.data(), n, channels, hw), .mean = mean, .var = var, .gamma = gamma, .beta = beta});
    // Exact integers below 2^53, one division each.
    for (size_t c = 0; c < 3; ++c) {
        int64_t total = 0, total_sq = 0;
        for (size_t i = c; i < x.size(); i += 3) {
            total += x[i];
            total_sq += static_cast<int64_t>(x[i]) * x[i];
        }
        want_mean[c] = static_cast<double>(total) / static_cast<double>(n * hw);
        want_var[c] = static_cast<double>(n * hw * total_sq - total * total) / static_cast<double>(n * hw * n * hw);
    }
    const View<const T> pixels{x.data(), n, channels, hw, channels * hw, 1, channels};
    for (const std::string& isa : isa_levels()) {
        set_isa(isa);
        batch_norm(
            {.x = pixels, .y = View<double>::ncs(got64.data(), n, channels, hw), .mean = mean, .var = var, .gamma = gamma, .beta = beta});
        CHECK(got64 == want);
        std::vector<float> got(x.size()), rounded(want.begin(), want.end());
        batch_norm(
            {.x = pixels, .y = View<float>::ncs(got.data(), n, channels, hw), .mean = mean, .var = var, .gamma = gamma, .beta = beta});
        CHECK(got == rounded);
        // The same layout, and back to planes by hand.
        batch_norm({.x = View<const T>::nsc(x.data(), n * hw, channels),
                    .y = View<float>::nsc(got.data(), n * hw, channels),
                    .mean = mean,
                    .var = var,
                    .gamma = gamma,
                    .beta = beta});
        bool same = true;
        for (int64_t i = 0; i < n * hw * channels; ++i) {
            const int64_t pixel = i / channels;
            same = same &&
                   got[static_cast<size_t>(i)] == rounded[static_cast<size_t>((pixel / hw * channels + i % channels) * hw + pixel % hw)];
        }
        CHECK(same);
        moments(pixels, got_mean, got_var);
        CHECK(got_mean == want_mean && got_var == want_var);
    }
}

void test_errors_of_images() {
    context = "errors of integers";
    std::vector<std::uint8_t> x(60, 7);
    std::vector<float> y(60);
    std::vector<double> v(3, 1);
    const View<const std::uint8_t> image = View<const std::uint8_t>::nsc(x.data(), 20, 3);
    const View<float> result = View<float>::nsc(y.data(), 20, 3);
    const auto refuses = [&](const char* start, BatchNormArgs a) {
        a.mean = a.var = v;
        throws<std::invalid_argument>(start, __LINE__, [&] { batch_norm(a); });
    };
    refuses("residual is given with x of integers", {.x = image, .y = result, .residual = result});
    refuses("activation is given with x of integers", {.x = image, .y = result, .activation = Activation::relu});
    refuses("y has an integer storage type", {.x = image, .y = View<std::uint8_t>::nsc(x.data(), 20, 3)});
    refuses("y has (outer, channels, inner) (10, 3, 1)", {.x = image, .y = View<float>::nsc(y.data(), 10, 3)});
    refuses("y overlaps x", {.x = View<const std::uint8_t>::nsc(reinterpret_cast<std::uint8_t*>(y.data()), 20, 3), .y = result});
    refuses("y has strides", {.x = View<const std::uint8_t>::ncs(x.data(), 2, 3, 10), .y = View<float>{y.data(), 2, 3, 10, 30, 1, 3}});
    throws<std::invalid_argument>("x has an integer storage type", __LINE__,
                                  [&] { batch_norm_train({.x = image, .y = result, .mean = v, .inv_std = v}); });
    throws<std::invalid_argument>("x has an integer storage type", __LINE__,
                                  [&] { batch_norm_backward({.dy = result, .x = image, .mean = v, .inv_std = v}); });
    CHECK(y == std::vector<float>(60));
}

void test_information() {
    context = "information";
    CHECK(isa_built().front() == "baseline" && isa_levels().front() == "baseline");
    CHECK(!isa_reason().empty() && !openmp_runtime().empty() && !compiler().empty() && !version().empty());
    CHECK(num_threads() >= 1);
}

template <class T>
void test_type() {
    test_formulas<T>();
    test_exact_statistics<T>();
    test_constant_channel<T>();
    test_residual<T>();
    test_mask_without_residual<T>();
    test_same_bits<T>();
    test_positions<T>();
    test_moment_sums<T>();
    test_activations<T>();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2 && std::string_view(argv[1]) == "--hash") {
        try {
            std::printf("%016llx\n", static_cast<unsigned long long>(hash_of_results()));
            return 0;
        } catch (const std::exception& e) {
            std::fprintf(stderr, "%s\n", e.what());
            return 1;
        }
    }
    test_information();
    set_num_threads(1);  // but where threads are the point
    test_type<float>();
    test_type<double>();
    test_type<float16>();
    test_type<bfloat16>();
    test_image<std::uint8_t>();
    test_image<std::int16_t>();
    test_image<std::uint16_t>();
    test_errors_of_images();
    test_errors_of_tensors();
    test_errors_of_residual();
    test_errors_of_renorm();
    test_errors_of_primitives();
    test_values_for_several_positions();
    test_errors_of_positions();
    test_renorm();
    test_primitives();
    test_errors_of_channels();
    test_errors_of_numbers();
    test_mask_of_single_elements();
    test_tuning();
    test_threads_of_a_call();
    test_empty();
    test_one_value();
    test_optional_outputs();
    test_update_running();
    test_moment_sums_of_nothing();
    test_errors_of_moment_sums();
    test_interrupt();
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
    return failed == 0 ? 0 : 1;
}
