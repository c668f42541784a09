// Every message of core/check.cpp: valid arguments are spoilt one at a time; the call must say so and change nothing.
#include "example.h"

namespace test {
namespace {

void inference(const Forward& f) { batch_norm(f); }
void train(const Forward& f) { batch_norm_train(f); }
void renorm(const Forward& f) { batch_norm_train(f); }
void samples(const Forward& f) { batch_norm_train(f); }
void saving(const Forward& f) { save(f, f.mean, true); }
void backward(const Backward& b) { batch_norm_backward(b); }
void backward_of_tanh(const Backward& b) { batch_norm_backward(b); }
void second(const DoubleBackward& b) { batch_norm_double_backward(b); }
void update(const UpdateRunningArgs& a) { update_running(a); }

template <class Make, class Call, class Spoil>
void refuses(const Make& make, const Call& call, Error::Kind kind, const std::string& start, int line, const Spoil& spoil) {
    Example e;
    auto a = make(e);
    spoil(e, a);
    const std::vector<unsigned char> before = e.bytes();
    refused(kind, start, __FILE__, line, [&] { call(a); });
    check(e.bytes() == before, "something was changed: " + start, __FILE__, line);
}
#define REFUSES(kind, operation, start, ...)                                                                             \
    refuses([](Example& e) { return e.operation(); }, [](const auto& a) { operation(a); }, Error::kind, start, __LINE__, \
            [&]([[maybe_unused]] Example& e, [[maybe_unused]] auto& a) { __VA_ARGS__; })
#define BAD_VALUE(operation, start, ...) REFUSES(value, operation, start, __VA_ARGS__)
#define BAD_TYPE(operation, start, ...) REFUSES(type, operation, start, __VA_ARGS__)

TEST(what_is_spoilt_below_is_valid) {
    Example e;
    batch_norm(e.inference());
    for (const Forward& f : {e.train(), e.renorm(), e.samples()}) batch_norm_train(f);
    save(e.saving(), e.mean, true);
    batch_norm_backward(e.backward());
    batch_norm_backward(e.backward_of_tanh());
    batch_norm_double_backward(e.second());
    update_running(e.update());
    CHECK(e.saved.parts() == 1 && e.saved.channels() == 3);
}

TEST(errors_of_tensors) {
    const int64_t huge = int64_t{1} << 40, least = std::numeric_limits<int64_t>::min();
    BAD_VALUE(inference, "x has sizes (-4, 3, 5), expected none to be negative", a.x.outer = -4);
    BAD_VALUE(inference, "x has sizes (4, -3, 5), expected none to be negative", a.x.channels = -3);
    BAD_VALUE(inference, "x has sizes (4, 3, -5), expected none to be negative", a.x.inner = -5);
    BAD_VALUE(train, "x has 0 channels, expected at least 1", a.x.channels = 0);
    BAD_VALUE(train, "x has sizes (1099511627776, 3, 1099511627776), expected no more elements than", a.x.outer = a.x.inner = huge);
    BAD_VALUE(train, "x has sizes (1099511627776, 1099511627776, 5), expected no more", a.x.outer = a.x.channels = huge);
    BAD_VALUE(train, "x has strides (4611686018427387904, 5, 1), expected strides that reach no further", a.x.outer_stride = huge << 22);
    BAD_VALUE(train, "x has strides (-9223372036854775808, 5, 1), expected", a.x.outer_stride = least);
    BAD_VALUE(saving, "x has no data, expected an array of (outer, channels, inner) = (4, 3, 5)", a.x.data = nullptr);
    BAD_VALUE(inference, "x is not aligned, expected its address to be a multiple of its element size of 4 bytes", a.x.data = &e.mask[1]);
    BAD_VALUE(inference, "x has strides (15, 5, 2) of (outer, channels, inner), expected 1 for inner or for channels",
              a.x.inner_stride = 2);
    BAD_TYPE(train, "x has an integer storage type, expected a floating one: integers have no gradients", a.x.dtype = Dtype::uint8);
    BAD_TYPE(saving, "x has an integer storage type", a.x.dtype = Dtype::int16);

    BAD_VALUE(inference, "y has (outer, channels, inner) (4, 3, 4), expected (4, 3, 5) as x has", a.y.inner = 4);
    BAD_VALUE(inference, "y has (outer, channels, inner) (0, 0, 1), expected (4, 3, 5) as x has", a.y = Tensor());
    BAD_TYPE(inference, "y has another storage type than x, expected the same", a.y.dtype = Dtype::float64);
    BAD_VALUE(train, "y has no data", a.y.data = nullptr);
    BAD_VALUE(train, "y is not aligned", a.y.data = &e.mask[1]);
    BAD_VALUE(train, "y has strides (15, 5, 3), expected 1 for inner as x has", a.y.inner_stride = 3);
    BAD_VALUE(inference, "y has strides (15, 5, 1), expected 1 for channels as x has", (a.x.channel_stride = 1, a.x.inner_stride = 3));
    BAD_VALUE(inference, "y has strides that reach one element twice, expected distinct elements", a.y.outer_stride = 0);
    BAD_VALUE(train, "y has strides that reach one element twice", a.y.channel_stride = 4);
    BAD_VALUE(train, "residual has (outer, channels, inner) (3, 3, 5), expected (4, 3, 5) as x has", a.residual.outer = 3);
    BAD_TYPE(train, "residual has another storage type than x, expected the same", a.residual.dtype = Dtype::float16);
    BAD_VALUE(saving, "residual has strides (15, 5, 3), expected 1 for inner as x has", a.residual.inner_stride = 3);

    BAD_VALUE(backward, "x has (outer, channels, inner) (4, 3, 4), expected (4, 3, 5) as the forward's has", a.kept.inner = 4);
    BAD_VALUE(backward, "x has (outer, channels, inner) (0, 0, 1), expected (4, 3, 5) as the forward's has", a.kept = {});
    BAD_VALUE(backward, "dy has (outer, channels, inner) (3, 3, 5), expected (4, 3, 5) as x has", a.dy.outer = 3);
    BAD_TYPE(backward, "dy has another storage type than x", a.dy.dtype = Dtype::float16);
    BAD_VALUE(backward, "dy has no data", a.dy.data = nullptr);
    BAD_VALUE(backward, "dx has (outer, channels, inner) (4, 2, 5), expected (4, 3, 5) as x has", a.dx.channels = 2);
    BAD_VALUE(backward, "dx has strides that reach one element twice", a.dx.outer_stride = -14);
    BAD_TYPE(backward, "dresidual has another storage type", a.dresidual.dtype = Dtype::bfloat16);
    BAD_VALUE(backward, "dresidual has strides that reach one element twice", a.dresidual.outer_stride = 0);
    BAD_VALUE(backward, "residual is given, expected none: backward does not need it here; drop it", a.residual = runs(e.z));
    BAD_VALUE(backward_of_tanh, "residual has (outer, channels, inner) (4, 2, 5), expected (4, 3, 5) as the", a.residual.channels = 2);
    BAD_VALUE(backward_of_tanh, "residual is missing, expected that of the forward", a.residual = {});
    BAD_VALUE(second, "x has (outer, channels, inner) (4, 3, 4)", a.kept.inner = 4);
    BAD_VALUE(second, "dy has (outer, channels, inner) (3, 3, 5)", a.dy.outer = 3);
    BAD_VALUE(second, "residual is missing", a.residual = {});
    BAD_VALUE(second, "ddx has (outer, channels, inner) (4, 3, 4), expected (4, 3, 5) as x has", a.ddx.inner = 4);
    BAD_TYPE(second, "ddresidual has another storage type", a.ddresidual.dtype = Dtype::float64);
    BAD_VALUE(second, "ddy has (outer, channels, inner) (4, 3, 4)", a.ddy.inner = 4);
    BAD_VALUE(second, "dresidual has strides that reach one element twice", a.dresidual.outer_stride = 0);

    // A forward without a residual has no gradient of it.
    Example plain;
    Backward b = plain.after(plain.plain());
    b.dresidual = runs(plain.dz);
    REFUSED(value, "dresidual is given, expected none: the forward had no residual; drop it", batch_norm_backward(b));
    DoubleBackward d{.dy = b.dy, .kept = b.kept, .saved = b.saved, .ddresidual = runs(plain.ddz)};
    REFUSED(value, "ddresidual is given, expected none: the forward had no residual; drop it", batch_norm_double_backward(d));
}

// ---- overlaps: every output with everything else, each put at the same memory, two floats apart ----

template <class Args>
struct Member {
    const char* name;
    bool written;
    void (*put)(Args&, float*);
};
constexpr auto three = [](float* p) { return std::span<float>(p, 3); };

template <class Args, size_t n, class Make, class Call>
void test_overlaps(const Member<Args> (&members)[n], const Make& make, const Call& call) {
    Vector memory(64, std::bit_cast<double>(0x3f8000003f800000));  // pairs of 1.0f
    auto* const p = reinterpret_cast<float*>(memory.data());
    for (const auto& w : members) {
        for (const auto& o : members) {
            const bool allowed = std::string_view(o.name).starts_with("given ") && !std::string_view(w.name).starts_with("out");
            if (!w.written || &w == &o || allowed) continue;
            Example e;
            Args a = make(e);
            w.put(a, p), o.put(a, p + 2);
            context = std::string(w.name) + " and " + o.name;
            try {
                call(a);
                FAIL("an overlap was not seen");
            } catch (const Error& error) {
                const std::string message = error.what(), other = std::string(o.name).starts_with("given ") ? o.name + 6 : o.name;
                const bool either =
                    message.starts_with(w.name + std::string(" overlaps ") + other) || message.starts_with(other + " overlaps " + w.name);
                if (!CHECK(either && error.kind == Error::value)) std::printf("%s\n", message.c_str());
            }
        }
    }
    CHECK(memory == Vector(64, memory[0]));
}

TEST(errors_of_overlap) {
    const Member<Forward> forward[] = {
        {"out", true, [](auto& f, float* p) { f.y.data = p; }},
        {"running_mean", true, [](auto& f, float* p) { f.running.mean = three(p); }},
        {"running_var", true, [](auto& f, float* p) { f.running.var = three(p); }},
        {"renorm mean", true, [](auto& f, float* p) { f.renorm.mean = three(p); }},
        {"renorm std", true, [](auto& f, float* p) { f.renorm.std = three(p); }},
        {"x", false, [](auto& f, float* p) { f.x.data = p; }},
        {"residual", false, [](auto& f, float* p) { f.residual.data = p; }},
        {"gamma", false, [](auto& f, float* p) { f.gamma = ConstRows(ConstChannels(p, false, 3, 1), 4, 3); }},
        {"beta", false, [](auto& f, float* p) { f.beta = three(p); }},
        {"mask", false, [](auto& f, float* p) { f.positions.mask = {reinterpret_cast<std::uint8_t*>(p), 20}; }},
        {"weights", false, [](auto& f, float* p) { f.positions.weights = {reinterpret_cast<double*>(p), 20}, f.running.ddof = 0; }},
        {"seen", false, [](auto& f, float* p) { f.running.seen = three(p); }},
        {"decay", false, [](auto& f, float* p) { f.running.decays = three(p); }},
        {"given mean", false, [](auto& f, float* p) { f.mean = f.var = three(p); }},
        {"given var", false, [](auto& f, float* p) { f.var = three(p), f.mean = three(p + 60); }}};
    test_overlaps(forward, [](Example& e) { return e.renorm(); }, train);
    const Member<Backward> back[] = {{"out", true, [](auto& b, float* p) { b.dx.data = p; }},
                                     {"out_residual", true, [](auto& b, float* p) { b.dresidual.data = p; }},
                                     {"dgamma", true, [](auto& b, float* p) { b.dgamma = three(p); }},
                                     {"dbeta", true, [](auto& b, float* p) { b.dbeta = three(p); }},
                                     {"dy", false, [](auto& b, float* p) { b.dy.data = p; }},
                                     {"x", false, [](auto& b, float* p) { b.kept.data = p; }},
                                     {"residual", false, [](auto& b, float* p) { b.residual.data = p; }}};
    test_overlaps(back, [](Example& e) { return e.backward_of_tanh(); }, backward);
    const Member<DoubleBackward> twice[] = {{"ddy", true, [](auto& b, float* p) { b.ddy.data = p; }},
                                            {"dx", true, [](auto& b, float* p) { b.dx.data = p; }},
                                            {"dresidual", true, [](auto& b, float* p) { b.dresidual.data = p; }},
                                            {"dgamma", true, [](auto& b, float* p) { b.dgamma = three(p); }},
                                            {"dbeta", true, [](auto& b, float* p) { b.dbeta = three(p); }},
                                            {"dy", false, [](auto& b, float* p) { b.dy.data = p; }},
                                            {"x", false, [](auto& b, float* p) { b.kept.data = p; }},
                                            {"residual", false, [](auto& b, float* p) { b.residual.data = p; }},
                                            {"ddx", false, [](auto& b, float* p) { b.ddx.data = p; }},
                                            {"ddresidual", false, [](auto& b, float* p) { b.ddresidual.data = p; }},
                                            {"ddgamma", false, [](auto& b, float* p) { b.ddgamma = three(p); }},
                                            {"ddbeta", false, [](auto& b, float* p) { b.ddbeta = three(p); }}};
    test_overlaps(twice, [](Example& e) { return e.second(); }, second);
    const Member<UpdateRunningArgs> step[] = {{"running_mean", true, [](auto& a, float* p) { a.running.mean = three(p); }},
                                              {"running_var", true, [](auto& a, float* p) { a.running.var = three(p); }},
                                              {"mean", false, [](auto& a, float* p) { a.mean = three(p); }},
                                              {"var", false, [](auto& a, float* p) { a.var = three(p); }},
                                              {"count", false, [](auto& a, float* p) { a.count = three(p), a.running.ddof = 0; }},
                                              {"seen", false, [](auto& a, float* p) { a.running.seen = three(p); }},
                                              {"decay", false, [](auto& a, float* p) { a.running.decays = three(p); }}};
    test_overlaps(step, [](Example& e) { return e.update(); }, update);
    // The same array is in place. Reversed, or with another stride of outer or inner, it is not; nor is a part of it.
    BAD_VALUE(train, "out overlaps x without being the same array, expected x itself (in place) or", a.y.data = e.x.data() + 45);
    BAD_VALUE(inference, "out overlaps x without", (a.y.data = e.x.data() + 45, a.y.outer_stride = -15));
    BAD_VALUE(inference, "out overlaps x without", (a.y.data = e.x.data(), a.y.outer_stride = 16));
    BAD_VALUE(inference, "out overlaps x without",
              (a.x = View<float>{e.x.data(), 2, 3, 4, 48, 1, 3}, a.y = View<float>{e.x.data(), 2, 3, 4, 48, 1, 6}));
    BAD_VALUE(train, "out overlaps residual without being the same array, expected residual itself", a.residual.data = e.y.data() + 15);
    BAD_VALUE(train, "out overlaps mask",
              a.positions.element_mask = View<std::uint8_t>{reinterpret_cast<std::uint8_t*>(e.y.data()), 4, 3, 5, 0, 0, 1});
    BAD_VALUE(train, "running_var overlaps x", a.running.var = Channels(e.x.data() + 59, false, 3, -20));
    BAD_VALUE(backward, "out overlaps dy without", (a.dx.data = e.dy.data() + 45, a.dx.outer_stride = -15));
    BAD_VALUE(backward, "out_residual overlaps x, expected separate arrays", a.dresidual.data = e.x.data());
    BAD_VALUE(backward, "out_residual overlaps out", (a.dx = runs(e.dy), a.dresidual = a.dx));
    // Who vouches is believed.
    Example e;
    Backward b = e.backward();
    b.execution.disjoint = true, b.dgamma = std::span(e.dx).first(3);
    batch_norm_backward(b);
}

// What Python never passes: pointers, strides and names of a caller's own making. test_any_call.cpp tries them in any combination.
TEST(errors_of_memory_and_names) {
    const int64_t huge = int64_t{1} << 62;
    const auto dtype = static_cast<Dtype>(99);
    BAD_TYPE(train, "x has no known storage type, expected one that Dtype names", a.x.dtype = dtype);
    BAD_TYPE(inference, "x has no known storage type", a.x.dtype = static_cast<Dtype>(-1));
    BAD_VALUE(inference, "mean has no data, expected an array of 3 values", a.mean.data = nullptr);
    BAD_VALUE(inference, "mean has stride 4611686018427387904, expected a stride that reaches no further than can be",
              a.mean.stride = huge);
    BAD_VALUE(inference, "var has stride -9223372036854775808, expected", a.var.stride = std::numeric_limits<int64_t>::min());
    BAD_VALUE(inference, "mean is not aligned, expected its address to be a multiple of its element size of 4", a.mean.data = &e.mask[1]);
    BAD_VALUE(train, "gamma has no data", a.gamma.values.data = nullptr);
    BAD_VALUE(samples, "gamma has row_stride 4611686018427387904, expected strides that reach no further", a.gamma.row_stride = huge);
    BAD_VALUE(train, "running_mean has no data", a.running.mean.data = nullptr);
    BAD_VALUE(renorm, "renorm std has no data", a.renorm.std.data = nullptr);
    BAD_VALUE(train, "mask has no data, expected an array of 20 values", (a.positions.mask = {static_cast<std::uint8_t*>(nullptr), 20}));
    BAD_VALUE(train, "weights has no data", (a.positions.weights = {static_cast<double*>(nullptr), 20}));
    BAD_VALUE(train, "on_nonfinite is not known, expected one that OnNonfinite names",
              a.running.on_nonfinite = static_cast<OnNonfinite>(3));
    BAD_VALUE(train, "keep is not known, expected one that Keep names", a.keep = static_cast<Keep>(-1));
    BAD_VALUE(backward, "dgamma has no data", a.dgamma.values.data = nullptr);
    BAD_VALUE(second, "ddbeta has no data", a.ddbeta.values.data = nullptr);
    BAD_VALUE(update, "count has no data", a.count.data = nullptr);
    Example e;
    Vector out(3), sums(27);
    const std::span<double> none(static_cast<double*>(nullptr), 27);
    REFUSED(value, "mean has no data", moments(runs(e.x), none.first(3), out));
    REFUSED(value, "sums has no data", moment_sums(runs(e.x), none));
    REFUSED(value, "sums has no data", merge_moment_sums(none, sums));
    REFUSED(value, "others has no data", merge_moment_sums(sums, none));
    REFUSED(value, "sums has no data", moments_from_sums(none, out, out, out));
    REFUSED(value, "count has no data", moments_from_sums(sums, none.first(3), out, out));
}

TEST(errors_of_channels) {
    BAD_TYPE(inference, "mean is missing, expected it to be given", a.mean = {});
    BAD_TYPE(inference, "var is missing", a.var = {});
    BAD_VALUE(train, "var is missing, expected mean and var or neither", a.mean = e.mean);
    BAD_VALUE(train, "mean is missing, expected mean and var or neither", a.var = e.mean);
    BAD_VALUE(inference, "mean has 2 values, expected 3, one per channel of x", a.mean = e.two);
    BAD_VALUE(inference, "var has 2 values, expected 3", a.var = e.two);
    BAD_VALUE(train, "gamma has 2 values, expected 3", a.gamma = e.two);
    BAD_VALUE(inference, "beta has 2 values, expected 3", a.beta = e.two);
    BAD_VALUE(inference, "mean is nan at channel 1, expected finite values", e.mean[1] = kNaNf);
    BAD_VALUE(inference, "var is inf at channel 2, expected finite values", e.var[2] = kInff);
    BAD_VALUE(inference, "var is -0.5 at channel 0, expected values >= 0", e.var[0] = -0.5f);
    BAD_VALUE(inference, "gamma is -inf at channel 0", e.gamma[0] = -kInff);
    BAD_VALUE(train, "beta is nan at channel 2", e.beta[2] = kNaNf);
    BAD_VALUE(samples, "gamma is nan at sample 2, channel 1, expected finite values", e.many[7] = kNaNf);
    BAD_VALUE(samples, "gamma has 3 rows, expected 0 or a number that divides the outer size 4", a.gamma.rows = 3);
    BAD_VALUE(samples, "gamma has -1 rows", a.gamma.rows = -1);
    BAD_VALUE(samples, "beta has 2 rows, expected 4 as the other parameter has, or 0", a.beta.rows = 2);
    BAD_VALUE(samples, "part_outer is 3, expected a multiple of the 2 rows of outer", (a.gamma.rows = a.beta.rows = 2, a.part_outer = 3));
    BAD_VALUE(train, "part_outer is -1, expected a number >= 0", a.part_outer = -1);
    BAD_TYPE(saving, "mean is missing", a.mean = {});
    BAD_VALUE(saving, "mean has 2 values, expected 3", a.mean = e.two);
    BAD_VALUE(saving, "gamma is nan at channel 0", e.gamma[0] = kNaNf);
    BAD_VALUE(saving, "beta has 2 values", a.beta = e.two);
    BAD_VALUE(saving, "saved is missing, expected a Saved to fill", a.saved = nullptr);
    BAD_VALUE(backward, "dgamma has 2 values, expected 3", a.dgamma = e.two);
    BAD_VALUE(backward, "dbeta has 2 values, expected 3", a.dbeta = e.two);
    BAD_VALUE(backward, "dgamma has 4 rows, expected 0 as the forward's", a.dgamma = Rows(Channels(e.many.data(), false, 3, 1), 4, 3));
    BAD_VALUE(backward, "dbeta has stride 0, so that its channels are one element, expected separate", a.dbeta.values.stride = 0);
    BAD_VALUE(second, "ddgamma is nan at channel 1", e.gamma[1] = kNaNf);
    BAD_VALUE(second, "ddbeta has 2 values", a.ddbeta = e.two);
    BAD_VALUE(second, "ddgamma has 4 rows, expected 0 as", a.ddgamma = ConstRows(ConstChannels(e.many.data(), false, 3, 1), 4, 3));
    BAD_VALUE(second, "dgamma has 2 values", a.dgamma = e.two);
    BAD_VALUE(second, "dbeta has stride 0", a.dbeta.values.stride = 0);
    Example other;
    REFUSED(type, "inv_std is missing", save(other.saving(), {}, true));
    REFUSED(value, "inv_std has 2 values, expected 3", save(other.saving(), other.two, true));
    REFUSED(value, "dgamma has 0 rows, expected 4 as the forward's parameter", batch_norm_backward(other.after(other.samples())));
}

TEST(errors_of_running_statistics) {
    BAD_VALUE(train, "running_var is missing, expected running_mean and running_var or neither", a.running.var = {});
    BAD_VALUE(train, "running_mean is missing, expected running_mean and running_var or neither", a.running.mean = {});
    BAD_VALUE(train, "running_mean has 2 values, expected 3", a.running.mean = e.two);
    BAD_VALUE(train, "running_var has 2 values, expected 3", a.running.var = e.two);
    BAD_VALUE(train, "running_var has stride 0, so that its channels are one element", a.running.var.stride = 0);
    BAD_VALUE(train, "running_mean has stride 0", a.running.mean.stride = 0);
    BAD_VALUE(train, "seen is given without running statistics", (a.running = {}, a.running.seen = e.seen));
    BAD_VALUE(train, "decay is given without running statistics", (a.running = {}, a.running.decays = e.decays));
    BAD_VALUE(train, "decay is given with seen, expected one of them; drop one", (a.running.decays = e.decays, a.running.seen = e.seen));
    BAD_VALUE(train, "seen has 2 values", a.running.seen = e.two);
    BAD_VALUE(train, "seen is -2 at channel 1, expected values >= 0", (e.seen[1] = -2, a.running.seen = e.seen));
    BAD_VALUE(train, "decay has 2 values", a.running.decays = e.two);
    BAD_VALUE(train, "decay is 1.5 at channel 1, expected a number in [0, 1]", (e.decays[1] = 1.5, a.running.decays = e.decays));
    BAD_VALUE(train, "running_ddof is 2, expected 0 (divide by n) or 1 (divide by n - 1)", a.running.ddof = 2);
    BAD_TYPE(update, "running_mean is missing", a.running.mean = {});
    BAD_TYPE(update, "running_var is missing", a.running.var = {});
    BAD_TYPE(update, "mean is missing", a.mean = {});
    BAD_TYPE(update, "var is missing", a.var = {});
    BAD_TYPE(update, "count is missing", a.count = {});
    BAD_VALUE(update, "running_var has 2 values, expected 3", a.running.var = e.two);
    BAD_VALUE(update, "mean has 2 values, expected 3", a.mean = e.two);
    BAD_VALUE(update, "var has 2 values, expected 3", a.var = e.two);
    BAD_VALUE(update, "count has 2 values, expected 3", a.count = e.two);
    BAD_VALUE(update, "count is nan at channel 0", e.count[0] = kNaN);
    BAD_VALUE(update, "var is -0.5 at channel 0, expected values >= 0", e.var[0] = -0.5f);
    BAD_VALUE(update, "running_mean has stride 0", a.running.mean.stride = 0);
    BAD_VALUE(update, "running_ddof is -1, expected 0", a.running.ddof = -1);
    BAD_VALUE(update, "count is 1, expected more than ddof = 1", e.count.assign(3, 1));
    BAD_VALUE(update, "count is 0, expected more than ddof = 0", (e.count.assign(3, 0), a.running.ddof = 0));
    for (const double decay : {-0.1, 1.5, kNaN}) {
        BAD_VALUE(train, "decay is ", a.running.decay = decay);
        BAD_VALUE(update, "decay is ", a.running.decay = decay);
    }
    BAD_VALUE(train, "decay is 2, expected a number in [0, 1], the weight of the old value", a.running.decay = 2);
    BAD_VALUE(inference, "running_mean is given to batch_norm, which takes no statistics",
              a.running = {.mean = e.running_mean, .var = e.running_var});
    BAD_VALUE(inference, "renorm is given to batch_norm, which takes no statistics", a.renorm.decay = 0.5);

    BAD_VALUE(inference, "renorm is given to batch_norm", a.renorm.enabled = true);
    BAD_VALUE(train, "renorm.decay is given without renormalisation, expected renorm.enabled", a.renorm.decay = 0.5);
    BAD_VALUE(renorm, "renorm std is missing, expected mean and std of the reference or neither", a.renorm.std = {});
    BAD_VALUE(renorm, "renorm mean is missing, expected mean and std of the reference or neither", a.renorm.mean = {});
    BAD_VALUE(renorm, "renorm mean has 2 values, expected 3", a.renorm.mean = e.two);
    BAD_VALUE(renorm, "renorm std has 2 values, expected 3", a.renorm.std = e.two);
    BAD_VALUE(renorm, "renorm mean is nan at channel 1", e.own_mean[1] = kNaNf);
    BAD_VALUE(renorm, "renorm std is inf at channel 2", e.own_std[2] = kInff);
    BAD_VALUE(renorm, "renorm std is 0 at channel 1, expected values > 0", e.own_std[1] = 0);
    BAD_VALUE(renorm, "renorm is given without a reference, expected running statistics, or",
              (a.renorm = {.enabled = true}, a.running = {}));
    BAD_VALUE(renorm, "running_mean is nan at channel 0", (a.renorm = {.enabled = true}, e.running_mean[0] = kNaNf));
    BAD_VALUE(renorm, "running_var is -1 at channel 2, expected values >= 0", (a.renorm = {.enabled = true}, e.running_var[2] = -1));
    BAD_VALUE(inference, "eps is 0 and var is 0 at channel 1, expected more than 0, to divide by their sum; pass an eps such as 1e-5",
              (a.eps = 0, e.var[1] = 0));
    BAD_VALUE(renorm, "eps is 0 and running_var is 0 at channel 2", (a.renorm = {.enabled = true}, a.eps = 0, e.running_var[2] = 0));
    BAD_VALUE(renorm, "renorm decay is given without a reference of its own, expected mean and std as well",
              a.renorm.mean = a.renorm.std = {});
    BAD_VALUE(renorm, "renorm decay is 1.5, expected a number in [0, 1]", a.renorm.decay = 1.5);
    BAD_VALUE(renorm, "renorm std has stride 0", a.renorm.std.stride = 0);
    BAD_VALUE(renorm, "renorm mean has stride 0", a.renorm.mean.stride = 0);
    BAD_VALUE(renorm, "rmin is 1.5, expected a number in [0, 1]", a.renorm.rmin = 1.5);
    BAD_VALUE(renorm, "rmin is -0.5", a.renorm.rmin = -0.5);
    BAD_VALUE(renorm, "rmax is 0.5, expected a number >= 1", a.renorm.rmax = 0.5);
    BAD_VALUE(renorm, "rmax is nan", a.renorm.rmax = kNaN);
    BAD_VALUE(renorm, "dmax is -1, expected a number >= 0", a.renorm.dmax = -1);
}

TEST(errors_of_numbers) {
    for (const double eps : {-1e-5, -kInf, kInf, kNaN}) BAD_VALUE(train, "eps is ", a.eps = eps);
    BAD_VALUE(inference, "eps is -1, expected a finite number >= 0", a.eps = -1);
    BAD_VALUE(train, "x has one value per channel, from which no variance can be had, expected at least 2; use a larger batch",
              (a.x.outer = a.x.inner = a.y.outer = a.y.inner = 1, a.residual = {}));
    BAD_VALUE(inference, "activation is not known, expected one that Activation names", a.activation = static_cast<Activation>(7));
    BAD_VALUE(saving, "activation is not known", a.activation = static_cast<Activation>(-1));
    BAD_VALUE(train, "slope is inf, expected a finite number that the type x computes in can hold", a.slope = kInf);
    BAD_VALUE(train, "slope is 1e+39, expected", a.slope = 1e39);
    BAD_VALUE(saving, "slope is nan", (a.activation = Activation::leaky_relu, a.slope = kNaN));
    for (const int n : {-1, std::numeric_limits<int>::min()}) {
        const std::string message = "num_threads is " + std::to_string(n) + ", expected at least 1, or 0 for the default";
        BAD_VALUE(inference, message, a.execution.num_threads = n);
        BAD_VALUE(train, message, a.execution.num_threads = n);
        BAD_VALUE(backward, message, a.execution.num_threads = n);
        BAD_VALUE(second, message, a.execution.num_threads = n);
    }
    struct : Group {
        std::vector<Vector> allgather(std::span<const double>) override { return {}; }
    } nobody;
    BAD_VALUE(train, "group has gathered nothing, expected an array from each rank", a.execution.group = &nobody);
    BAD_VALUE(inference, "group is given to batch_norm, which takes no statistics, expected none; drop it", a.execution.group = &nobody);
    BAD_VALUE(backward, "group is given, expected none, as in the forward", a.execution.group = &nobody);
    BAD_VALUE(backward, "all_reduce is true without a group, expected false", a.all_reduce = true);
    BAD_VALUE(train, "sample_outer is 0, expected a number >= 1 that divides the outer size 4",
              (a.execution.group = &nobody, a.execution.sample_outer = 0));
    BAD_VALUE(train, "sample_outer is 3, expected a number >= 1 that divides", (a.execution.group = &nobody, a.execution.sample_outer = 3));
    BAD_VALUE(train, "part_outer is given with a group, expected none: a part has statistics of its own",
              (a.execution.group = &nobody, a.part_outer = 2));
    BAD_VALUE(samples, "sample_outer is 2, expected 1, the rows of outer that a row of gamma and beta is for",
              (a.execution.group = &nobody, a.execution.sample_outer = 2));
    BAD_VALUE(samples, "keep is y with a group and a gamma or beta of each sample, expected x",
              (a.execution.group = &nobody, a.keep = Keep::y, a.saved = &e.saved, a.residual = {}));
    const auto keep_y = [](Example& e, Forward& a) { a.keep = Keep::y, a.saved = &e.saved, a.residual = {}; };
    BAD_VALUE(train, "keep is y with a residual, behind which y does not tell x, expected x", (keep_y(e, a), a.residual = runs(e.z)));
    BAD_VALUE(train, "keep is y with an activation behind which y does not tell x, expected x, or leaky_relu, or no activation",
              (keep_y(e, a), a.activation = Activation::silu));
    BAD_VALUE(inference, "keep is y with an activation", (keep_y(e, a), a.activation = Activation::relu));
    for (const double slope : {0.0, -0.5, 1e-19, 2e18}) BAD_VALUE(train, "slope is ", (keep_y(e, a), a.slope = slope));
}

TEST(errors_of_positions) {
    std::vector<std::uint8_t> one_counts(20);
    one_counts[7] = 1;
    const Vector small(20, 0.01), negative{1, -1, 1, 1}, inf(20, kInf), large(20, 1e308), few(4, 0.1), unit(20, 0.05);
    BAD_VALUE(inference, "mask has 3 values, expected one for each of the 20 positions of x, or a number that",
              a.positions.mask = {e.mask.data(), 3});
    BAD_VALUE(train, "weights has 3 values, expected one", a.positions.weights = {small.data(), 3});
    BAD_VALUE(saving, "weights has 3 values, expected one", a.positions.weights = {small.data(), 3});
    BAD_VALUE(train, "weights holds -1 at position 1, expected finite values >= 0", a.positions.weights = negative);
    BAD_VALUE(train, "weights holds inf at position 19, expected finite values >= 0", a.positions.weights = inf);
    BAD_VALUE(train, "weights sum to more than a double holds, expected smaller ones", a.positions.weights = large);
    BAD_VALUE(train, "x has one value per channel that counts, from which no variance can be had", a.positions.mask = one_counts);
    BAD_VALUE(train, "weights sum to 0.2, expected more than running_ddof = 1 for the running variance", a.positions.weights = small);
    BAD_VALUE(train, "weights sum to 1, expected more than running_ddof = 1", a.positions.weights = unit);
    BAD_VALUE(inference, "weights are given to batch_norm, which takes no statistics, expected none; drop them",
              a.positions.weights = small);
    BAD_VALUE(train, "element_mask is given with mask, expected one of them", a.positions = {e.mask, {}, runs(e.elements)});
    BAD_TYPE(train, "element_mask is not of uint8, expected a byte per element", a.positions.element_mask = runs(e.z));
    BAD_VALUE(train, "element_mask has other sizes than x, expected (4, 3, 5)", a.positions.element_mask = rows(e.elements, 3));
    BAD_VALUE(train, "element_mask has strides (4611686018427387904, 5, 1), expected strides that reach no further",
              a.positions.element_mask = View<std::uint8_t>{e.elements.data(), 4, 3, 5, int64_t{1} << 62, 5, 1});
    Example e;
    Vector mean(3), var(3), sums(27);
    const auto x = runs(e.x);
    REFUSED(value, "ddof is 1, expected less than the 1 values per channel that count", moments(x, mean, var, 1, 0, {one_counts, {}}));
    REFUSED(value, "ddof is 2, expected less than the 2 that the weights sum to", moments(x, mean, var, 2, 0, {{}, few}));
    REFUSED(value, "ddof is 1, expected less than the 1 that the weights sum to", moments(x, mean, var, 1, 0, {{}, unit}));
    REFUSED(value, "mask has 3 values", moment_sums(x, sums, 0, {{e.mask.data(), 3}, {}}));
}

TEST(errors_of_moments) {
    Example e;
    const auto x = runs(e.x);
    Vector two(2), fifteen(15), mean{7, 8, 9}, var{7, 8, 9}, sums(27, 7.0), doubles(60);
    const std::span<double> all(sums), tensor(doubles);
    REFUSED(value, "mean has 2 values, expected 3, one per channel of x", moments(x, two, var));
    REFUSED(value, "var has 2 values, expected 3, one per channel of x", moments(x, mean, two));
    REFUSED(value, "ddof is -1, expected an integer >= 0", moments(x, mean, var, -1));
    REFUSED(value, "ddof is 20, expected less than the 20 values per channel of x", moments(x, mean, var, 20));
    REFUSED(value, "num_threads is -1, expected at least 1, or 0", moments(x, mean, var, 0, -1));
    REFUSED(value, "mean overlaps var, expected separate arrays", moments(x, mean, mean));
    REFUSED(value, "mean overlaps x", moments(runs(doubles), tensor.first(3), var));
    REFUSED(value, "var overlaps x", moments(runs(doubles), mean, tensor.last(3)));
    REFUSED(value, "sums has 15 values, expected moment_sums_size(3) = 27 for the channels of x", moment_sums(x, fifteen));
    REFUSED(value, "num_threads is -1", moment_sums(x, sums, -1));
    REFUSED(value, "x has 0 channels", moment_sums(View<float>{}, sums));
    REFUSED(value, "sums overlaps x, expected separate arrays", moment_sums(rows(sums, 3), sums));
    for (const size_t n : {0, 8, 26}) {
        const std::string has = "has " + std::to_string(n) + " values, expected moment_sums_size(C) = 9 C of C >= 1 channels";
        REFUSED(value, "sums " + has, merge_moment_sums(all.first(n), sums));
        REFUSED(value, "others " + has, merge_moment_sums(sums, all.first(n)));
        REFUSED(value, "sums " + has, moments_from_sums(all.first(n), e.count, mean, var));
    }
    Vector far(60), held(27), more(27);
    for (size_t i = 0; i < far.size(); ++i) far[i] = i % 5 < 2 ? 1 : 1e153;
    moment_sums(runs(far), held), moment_sums(runs(far), more);
    far[0] = 1e300;
    REFUSED(value, "x holds values at channel 0 whose squares add up to more than 1.8e308, expected magnitudes up to 1e150; add up x * 2",
            moment_sums(runs(far), sums));
    for (int i = 0; i < 3; ++i) merge_moment_sums(more, more);
    REFUSED(value, "others holds values at channel 0 whose squares", (merge_moment_sums(held, more), merge_moment_sums(held, more)));
    REFUSED(value, "others has 2 channels, expected 3 as sums has", merge_moment_sums(sums, all.first(18)));
    REFUSED(value, "sums overlaps others", merge_moment_sums(tensor.first(27), tensor.subspan(1, 27)));
    REFUSED(value, "count has 2 values, expected 3", moments_from_sums(sums, two, mean, var));
    REFUSED(value, "mean has 2 values, expected 3", moments_from_sums(sums, e.count, two, var));
    REFUSED(value, "m2 has 2 values, expected 3", moments_from_sums(sums, e.count, mean, two));
    REFUSED(value, "mean overlaps m2", moments_from_sums(sums, e.count, mean, mean));
    REFUSED(value, "count overlaps mean", moments_from_sums(sums, mean, mean, var));
    REFUSED(value, "mean overlaps sums", moments_from_sums(sums, e.count, all.first(3), var));
    REFUSED(value, "m2 overlaps sums", moments_from_sums(sums, e.count, mean, all.last(3)));
    CHECK(mean == (Vector{7, 8, 9}) && var == mean && sums == Vector(27, 7.0) && e.count == Vector(3, 20));
}

TEST(errors_of_images) {
    std::vector<std::uint8_t> x(60, 7);
    Example e;
    const auto bad = [&](Error::Kind kind, const char* start, Forward f, int line) {
        f.mean = f.var = e.mean;
        refused(kind, start, __FILE__, line, [&] { batch_norm(f); });
    };
    const auto image = rows(x, 3);
    const auto result = View<float>::nsc(e.y.data(), 20, 3);
    auto* const within = reinterpret_cast<std::uint8_t*>(e.y.data());
    bad(Error::type, "y has an integer storage type, expected a floating one", {.x = image, .y = image}, __LINE__);
    bad(Error::value, "y has (outer, channels, inner) (4, 3, 5)", {.x = image, .y = runs(e.y)}, __LINE__);
    bad(Error::value, "out overlaps x", {.x = View<std::uint8_t>::nsc(within, 20, 3), .y = result}, __LINE__);
    bad(Error::value, "y has strides", {.x = runs(x), .y = View<float>{e.y.data(), 4, 3, 5, 15, 1, 3}}, __LINE__);
    bad(Error::type, "residual has another storage type than y", {.x = image, .y = result, .residual = image}, __LINE__);
    bad(Error::value, "residual has strides (0, 2, 1), expected 1 for channels as y has",
        {.x = View<std::uint8_t>{x.data(), 1, 3, 1, 0, 2, 1},
         .y = View<float>::nsc(e.y.data(), 1, 3),
         .residual = View<float>{e.x.data(), 1, 3, 1, 0, 2, 1}},
        __LINE__);
    bad(Error::value, "saved is given with x of integers, which have no gradients", {.x = image, .y = result, .saved = &e.saved}, __LINE__);
    CHECK(e.y == Example().y && e.saved.empty());
}

TEST(errors_of_state) {
    Example e;
    Backward b = e.backward();
    DoubleBackward d = e.second();
    const Saved nothing;
    for (const Saved* const saved : {static_cast<const Saved*>(nullptr), &nothing}) {
        b.saved = d.saved = saved;
        THROWS(Misuse, "saved is empty, expected what a forward pass left; call batch_norm_train with it first", batch_norm_backward(b));
        THROWS(Misuse, "saved is empty, expected what a forward pass left", batch_norm_double_backward(d));
    }
    static_assert(!std::is_base_of_v<std::invalid_argument, Misuse> && std::is_base_of_v<std::invalid_argument, Error>);
}

TEST(errors_of_the_library) {
    const std::string level = isa(), before = tuning();
    REFUSED(value, "num_threads is 0, expected at least 1", set_num_threads(0));
    REFUSED(value, "num_threads is -3, expected at least 1", set_num_threads(-3));
    REFUSED(value, "isa is 'sse9', expected one of 'baseline'", set_isa("sse9"));
    REFUSED(value, "isa is '', expected one of 'baseline'", set_isa(""));
    const std::vector<std::string> usable = isa_levels();
    for (const std::string& name : isa_built()) {
        if (std::find(usable.begin(), usable.end(), name) != usable.end()) continue;
        REFUSED(value, "isa is '" + name + "', expected one that this CPU can run", set_isa(name));
    }
    REFUSED(value, "tuning has 'l4_bytes', expected one of l2_bytes, cached_bytes, stream_run_bytes, ",
            set_tuning("l2_bytes=5,l4_bytes=1"));
    for (const char* const number : {"", "many", "-1", "1.5", " 1", "1125899906842625", "99999999999999999999"}) {
        const std::string message = std::string("tuning has l2_bytes='") + number + "', expected an integer from 0 to 2^50";
        REFUSED(value, message, set_tuning(std::string("map_bytes=5,l2_bytes=") + number));
    }
    CHECK(num_threads() == 1 && isa() == level && tuning() == before);
}

}  // namespace
}  // namespace test
