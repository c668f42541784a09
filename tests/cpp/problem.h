// A call of the library with its options, its data, and everything that forward and backward make of it. reference.h says what that should
// be.
#pragma once

#include <map>

#include "tensors.h"

namespace test {

struct Problem {
    Dtype dtype = Dtype::float32;
    Shape shape{};
    int64_t part_outer = 0, rows = 0;  // rows of gamma and beta
    enum Reference { none, running, own, moving } renorm = none;
    bool mask = false, weights = false, elements = false;
    Activation activation = Activation::none;
    bool residual = false, given = false;
    Keep keep = Keep::x;
    bool gamma = true, beta = true;
    double slope = 0.25, eps = 1e-5;
    enum Decay { one, each, seen, nothing } decay = one;  // of the running statistics; nothing: there are none
    std::uint64_t seed = 1;

    bool has_running() const { return decay != nothing || renorm == running; }
    bool smooth() const { return activation >= Activation::sigmoid; }
    bool keeps_y() const { return keep == Keep::y; }
    // Whether the library takes it: y tells x only without a residual, behind leaky_relu or no activation.
    bool possible() const {
        if (keeps_y() && (residual || (activation != Activation::none && activation != Activation::leaky_relu))) return false;
        if ((mask && elements) || (part_outer > 0 && part_outer * shape.inner < 2) || (rows > 0 && !(gamma && beta))) return false;
        const int64_t group = rows == 0 ? 1 : shape.outer / rows;
        return rows == 0 || (shape.outer % rows == 0 && (part_outer == 0 || part_outer >= shape.outer || part_outer % group == 0));
    }
};

inline std::string text(const Problem& p) {
    constexpr const char* kRenorm[] = {"", " renorm by running", " renorm by its own", " renorm by a moving reference"};
    constexpr const char* kActivation[] = {"", " relu", " leaky_relu", " relu6", " sigmoid", " tanh", " silu"};
    constexpr const char* kDecay[] = {"", " decays", " seen", " no running"};
    std::string s = std::string(format(p.dtype).name) + " " + text(p.shape) + " parts of " + std::to_string(p.part_outer) + ", " +
                    std::to_string(p.rows) + " rows" + kRenorm[p.renorm] + kActivation[static_cast<int>(p.activation)] + kDecay[p.decay];
    const bool options[] = {p.mask, p.weights, p.elements, p.residual, p.given, p.keeps_y(), !p.gamma, !p.beta};
    constexpr const char* kOptions[] = {" mask", " weights", " elements", " residual", " given", " keep y", " no gamma", " no beta"};
    for (size_t i = 0; i < std::size(options); ++i) s += options[i] ? kOptions[i] : "";
    return s + " eps " + std::to_string(p.eps) + " seed " + std::to_string(p.seed);
}

// The arguments of a problem. What does not count is NaN.
struct Data {
    Vector x, dy, z, ddx, ddz, gamma, beta, ddgamma, ddbeta, given_mean, given_var, running_mean, running_var, decays, seen, own_mean,
        own_std, weights, elements;
    std::vector<std::uint8_t> mask;

    explicit Data(const Problem& p) : p_(p) {
        const Shape& s = p.shape;
        Random random(p.seed);
        for (int64_t c = 0; c < s.channels; ++c) {
            given_mean.push_back(random.next(Dtype::float64));
            given_var.push_back(random.next(Dtype::float64) + 9);
            running_mean.push_back(0.5);
            running_var.push_back(9 + random.next(Dtype::bfloat16));
            decays.push_back(static_cast<double>(c % 5) / 4);
            seen.push_back(static_cast<double>(c * 10));
            own_mean.push_back(random.next(Dtype::float64) / 2);
            own_std.push_back(random.next(Dtype::float64) / 3 + 4);
        }
        for (int64_t r = 0; r < std::max<int64_t>(p.rows, 1); ++r) {
            for (int64_t c = 0; c < s.channels; ++c) {
                const double lost = p.keeps_y() && p.beta && c % 5 == 1 ? 0x1p-24 : 1;  // a channel that y does not tell
                gamma.push_back(random.next(Dtype::float32) / 4 * lost);
                beta.push_back(random.next(Dtype::float32));
                ddgamma.push_back(random.next(Dtype::float32)), ddbeta.push_back(random.next(Dtype::float32));
            }
        }
        for (int64_t at = 0; at < s.count(); ++at) {
            if (p.mask) mask.push_back(at % 3 == 2 ? 0 : static_cast<std::uint8_t>(1 + at % 255));
            if (p.weights) weights.push_back(p.mask && at % 3 == 2 ? kNaN : at % 7 == 0 ? 0.1 : 1.5 * static_cast<double>(at % 5));
        }
        for (int64_t e = 0; e < s.elements(); ++e) {
            const int64_t o = e / s.inner / s.channels, c = s.channel(static_cast<size_t>(e)), at = o * s.inner + e % s.inner;
            const bool is = c % 3 == 0 || (c % 3 == 1 ? at % 3 != 2 : o > s.outer / 3);
            if (p.elements) elements.push_back(is ? 1 + static_cast<double>(e % 255) : 0);
            const auto put = [&](Vector& v, double value) { v.push_back(counts(o, c, e % s.inner) ? rounded(p.dtype, value) : kNaN); };
            put(x, random.next(p.dtype) + static_cast<double>(c % 5));
            for (Vector* const v : {&dy, &z, &ddx, &ddz}) put(*v, random.next(p.dtype));
        }
    }
    bool counts(int64_t o, int64_t c, int64_t i) const {
        if (p_.elements) return elements[p_.shape.at(o, c, i)] != 0;
        return !p_.mask || mask[static_cast<size_t>(o * p_.shape.inner + i)] != 0;
    }
    double weight(int64_t position) const { return p_.weights ? weights[static_cast<size_t>(position)] : 1; }

private:
    Problem p_;
};

// All results by name, as doubles.
struct Outcome : std::map<std::string, Vector> {
    // Of what both have.
    bool same_bits(const Outcome& other) const {
        return std::all_of(begin(), end(), [&](const auto& v) { return !other.contains(v.first) || same(v.second, other.of(v.first)); });
    }
    const Vector& of(const std::string& name) const { return find(name)->second; }
};

// Around lanes (16), folded rows (64 channels), tiles, 2 and 3 rows beyond a multiple of 4, and above what is shared between threads; 2,048
// channels are the most of one work item.
constexpr Shape kShapes[] = {{2, 1, 1},     {2, 3, 1},     {1, 3, 2},    {7, 2, 3},    {2, 5, 15},   {3, 2, 16},    {2, 17, 17},
                             {5, 15, 1},    {5, 16, 1},    {129, 17, 1}, {2, 63, 4},   {3, 64, 5},   {3, 64, 1},    {6, 70, 1},
                             {2, 65, 33},   {40, 33, 1},   {4, 40, 210}, {700, 65, 1}, {2, 2, 9000}, {1, 2, 40001}, {13000, 3, 1},
                             {17, 2050, 1}, {3, 1, 12000}, {2100, 4, 4}, {48, 7, 9},   {60, 65, 3},  {12, 3, 700}};

// Work in the smallest pieces, shared or not, from the front or backwards, stored past the caches or not.
constexpr const char* kTunings[] = {
    "l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=0",
    "l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=1000000000",
    "cached_bytes=0,stream_run_bytes=0,fetch_bytes=0,parallel_elements=0",
    "l2_bytes=0,group_bytes=5000,map_bytes=5000,cached_bytes=0,stream_run_bytes=0,parallel_elements=1000000000",
    "l2_bytes=1125899906842624,cached_bytes=1125899906842624,group_bytes=1125899906842624,map_bytes=1125899906842624",
};

// Options drawn at random, that go together.
inline Problem random_problem(Random& random, Dtype dtype, const Shape& shape) {
    Problem p;
    do {
        p = {.dtype = dtype, .shape = shape};
        const auto one_in = [&](int64_t n) { return random.below(n) == 0; };
        const int64_t group = one_in(2) ? 1 : std::min<int64_t>(shape.outer, 1 + random.below(6));
        p.rows = one_in(2) && shape.elements() / group < 20000 ? shape.outer / group : 0;
        if (one_in(2)) p.part_outer = group * (1 + random.below(std::max<int64_t>(shape.outer / group, 1)));
        if (shape.count() > 1000 && p.part_outer < shape.outer / 20) p.part_outer = 0;
        p.renorm = static_cast<Problem::Reference>(random.below(4));
        p.mask = one_in(3), p.weights = one_in(3), p.elements = one_in(4);
        p.activation = static_cast<Activation>(random.below(7));
        p.residual = one_in(2), p.given = one_in(4), p.gamma = !one_in(5), p.beta = !one_in(5);
        p.keep = one_in(2) ? Keep::y : Keep::x;
        p.eps = one_in(4) ? 3 : 1e-5;
        p.decay = static_cast<Problem::Decay>(random.below(4));
        p.seed = static_cast<std::uint64_t>(random.below(1000));
    } while (!p.possible());
    return p;
}

inline Vector vector(std::span<const double> v) { return {v.begin(), v.end()}; }

// Layout of gamma, beta and their gradients, and of statistics.
constexpr Layout kSpread{"spread", true, true, 3, false, 2};

// What follows from a forward and its backward: the same by batch_norm, by a Saved made of the statistics, and the second order.
inline void run_more(const Problem& p, const Data& d, const Layout& layout, Forward f, Backward b, Outcome& out) {
    const auto tensor = [&](const auto&... values) { return Array(p.dtype, layout, p.shape, values...); };
    const Shape rows{std::max<int64_t>(p.rows, 1), p.shape.channels, 1};
    const Array ddx = tensor(d.ddx), ddz = tensor(d.ddz), ddgamma(Dtype::float64, kSpread, rows, d.ddgamma),
                ddbeta(Dtype::float32, kSpread, rows, d.ddbeta);
    Array y = tensor(), ddy = tensor(), dx = tensor(), dz = tensor(), dgamma(Dtype::float32, kSpread, rows),
          dbeta(Dtype::float64, kSpread, rows);
    DoubleBackward s{.dy = b.dy, .kept = b.kept, .saved = b.saved, .residual = b.residual, .ddx = ddx, .ddy = ddy, .dx = dx};
    s.ddgamma = ddgamma.rows<ConstRows>(b.dgamma.rows), s.ddbeta = ddbeta.rows<ConstRows>(b.dbeta.rows);
    s.dgamma = dgamma.rows<Rows>(b.dgamma.rows), s.dbeta = dbeta.rows<Rows>(b.dbeta.rows);
    if (p.residual) s.ddresidual = ddz, s.dresidual = dz;
    batch_norm_double_backward(s);
    out["ddy"] = ddy.finish(), out["second dx"] = dx.finish(), out["second dgamma"] = dgamma.finish(), out["second dbeta"] = dbeta.finish();
    if (p.residual) out["second dz"] = dz.finish();
    // What is not asked for is not written, and the rest is the same.
    const Vector blank = dx.values(), blank_dgamma = dgamma.values(), blank_dbeta = dbeta.values();
    const bool wants_dx = p.seed & 1, wants_dz = p.residual && p.seed & 2, wants_dgamma = p.seed & 4, wants_dbeta = p.seed & 8;
    Backward some{.dy = b.dy, .kept = b.kept, .saved = b.saved, .residual = b.residual};
    if (wants_dx) some.dx = dx;
    if (wants_dz) some.dresidual = dz;
    if (wants_dgamma) some.dgamma = dgamma.rows<Rows>(b.dgamma.rows);
    if (wants_dbeta) some.dbeta = dbeta.rows<Rows>(b.dbeta.rows);
    batch_norm_backward(some);
    CHECK(same(dx.finish(), wants_dx ? out.of("dx") : blank) && same(dz.finish(), wants_dz ? out.of("dz") : blank));
    CHECK(same(dgamma.finish(), wants_dgamma ? out.of("dgamma") : blank_dgamma));
    CHECK(same(dbeta.finish(), wants_dbeta ? out.of("dbeta") : blank_dbeta));
    if (p.renorm != Problem::none || p.part_outer != 0 || p.keeps_y()) return;
    f.running = {}, f.y = y;
    if (p.given && !p.weights) batch_norm(f), CHECK(same(y.finish(), out.of("y")));
    if (p.residual && p.activation != Activation::none) return;  // it would want the residual
    Saved made;
    f.mean = out.of("mean"), f.saved = &made;
    save(f, out.of("inv_std"), !p.given);
    CHECK(same(vector(made.mean()), out.of("mean")) && same(vector(made.count()), out.of("count")));
    batch_norm_backward({.dy = b.dy, .kept = b.kept, .saved = &made, .dx = dx, .dbeta = dbeta.rows<Rows>(b.dbeta.rows)});
    CHECK(same(dx.finish(), out.of("dx")) && same(dbeta.finish(), out.of("dbeta")));
}

// What carries a call out.
struct Machine {
    void (*train)(const Forward&);
    void (*backward)(const Backward&);
};
inline constexpr Machine kCpu{batch_norm_train, batch_norm_backward};

// Where outputs go: arrays of their own; y to x, dx to dy; or y to the residual, dx to x and the residual's gradient to dy.
enum class Place { apart, first, second };

inline Outcome run(const Problem& p, const Data& d, const Layout& layout, Place place = Place::apart, const Machine& on = kCpu) {
    const Shape& s = p.shape;
    const Shape row{1, s.channels, 1}, rows{std::max<int64_t>(p.rows, 1), s.channels, 1};
    const bool apart = place == Place::apart, over_z = place == Place::second && p.residual;
    const auto tensor = [&](const Vector& v) { return Array(p.dtype, layout, s, v); };
    const auto elsewhere = [&](std::uint64_t seed) { return apart && s.channels > 1 ? unlike(layout, p.seed / seed) : layout; };
    Outcome out;

    Array x = tensor(d.x), z(p.dtype, elsewhere(1), s, d.z), dy(p.dtype, elsewhere(3), s, d.dy);
    Array y = apart ? Array(p.dtype, elsewhere(2), s) : tensor(over_z ? d.z : d.x);
    const Array gamma(Dtype::float32, kSpread, rows, d.gamma), beta(Dtype::float64, kSpread, rows, d.beta);
    const Array elements(Dtype::uint8, layout.rows ? kRows[4] : kRuns[2], s,
                         p.elements ? d.elements : Vector(static_cast<size_t>(s.elements())));
    Array running_mean(Dtype::float32, kSpread, row, d.running_mean), running_var(Dtype::float64, kSpread, row, d.running_var);
    Array own_mean(Dtype::float64, kSpread, row, d.own_mean), own_std(Dtype::float32, kSpread, row, d.own_std);
    Saved saved;
    Forward f;
    f.x = apart || over_z ? x : y;
    f.y = y;
    if (p.residual) f.residual = over_z ? y : z;
    if (p.given) f.mean = d.given_mean, f.var = d.given_var;
    if (p.gamma) f.gamma = gamma.rows<ConstRows>(p.rows);
    if (p.beta) f.beta = beta.rows<ConstRows>(p.rows);
    f.eps = p.eps;
    f.activation = p.activation;
    f.slope = p.slope;
    f.positions = {d.mask, d.weights, p.elements ? ConstTensor(elements.view()) : ConstTensor()};
    f.part_outer = p.part_outer * (layout.rows ? s.inner : 1);
    f.renorm.enabled = p.renorm != Problem::none;
    if (p.renorm >= Problem::own) f.renorm.mean = own_mean.rows<Rows>(0).values, f.renorm.std = own_std.rows<Rows>(0).values;
    if (p.renorm == Problem::moving) f.renorm.decay = 0.875;
    f.renorm.rmin = 0.75, f.renorm.rmax = 1.25, f.renorm.dmax = 0.5;
    if (p.has_running()) f.running.mean = running_mean.rows<Rows>(0).values, f.running.var = running_var.rows<Rows>(0).values;
    f.running.decay = 0.75;
    if (p.decay == Problem::each) f.running.decays = d.decays;
    if (p.decay == Problem::seen) f.running.seen = d.seen;
    f.keep = p.keep;
    f.saved = &saved;
    on.train(f);
    out["mean"] = vector(saved.mean()), out["var"] = vector(saved.var()), out["inv_std"] = vector(saved.inv_std());
    out["count"] = vector(saved.count()), out["r"] = vector(saved.r()), out["d"] = vector(saved.d());
    out["lost"] = Vector(saved.kept_channels().begin(), saved.kept_channels().end());
    out["y"] = y.values();
    out["running_mean"] = running_mean.finish(), out["running_var"] = running_var.finish();
    out["own_mean"] = own_mean.finish(), out["own_std"] = own_std.finish();

    Array dx(p.dtype, elsewhere(5), s), dz(p.dtype, elsewhere(7), s);
    Array dgamma(Dtype::float32, kSpread, rows), dbeta(Dtype::float64, kSpread, rows);
    Backward b;
    Array& kept = p.keeps_y() ? y : x;
    b.dy = dy;
    b.kept = kept;
    b.saved = &saved;
    if (saved.reads_residual()) b.residual = z;
    b.dx = apart ? dx : place == Place::first ? dy : kept;
    if (p.residual) b.dresidual = place == Place::second ? dy : dz;
    b.dgamma = dgamma.rows<Rows>(p.rows), b.dbeta = dbeta.rows<Rows>(p.rows);
    on.backward(b);
    out["dx"] = apart ? dx.finish() : place == Place::first ? dy.finish() : kept.finish();
    if (p.residual) out["dz"] = place == Place::second ? dy.finish() : dz.finish();
    out["dgamma"] = dgamma.finish(), out["dbeta"] = dbeta.finish();
    if (apart && s.elements() < 2000 && &on == &kCpu) run_more(p, d, layout, f, b, out);
    if (&kept != &y || place != Place::second) CHECK(same(y.finish(), out["y"]));
    return out;
}

}  // namespace test
