// Calls that a string of bytes describes: sizes, strides, pointers, types, numbers and names of any kind, in any combination. A call may
// succeed or throw an Error or Misuse; an Error changes nothing; nothing else may happen. Used by test_any_call.cpp, on random bytes and
// on those that were kept, and by fuzz.cpp, under libFuzzer.
//
// The library cannot know how much memory a pointer has behind it. So each argument has a stretch of memory of its own, and a call whose
// arguments reach beyond theirs is made only if it must be refused: because a size is negative or beyond any memory, or because two
// tensors have different sizes.
#pragma once

#include <array>
#include <optional>

#include "tensors.h"

namespace test {

using Wide = __int128;

class AnyCall {
public:
    explicit AnyCall(std::span<const std::uint8_t> bytes) : bytes_(bytes), memory_(in_doubles_ ? numbers(double{}) : numbers(float{})) {}

    // How it ended: made, refused, or not tried.
    enum Outcome { made, refused, not_tried };
    Outcome run() {
        const auto which = which_ = below(12);
        outer_ = 1 + below(5), channels_ = 1 + below(18), inner_ = 1 + below(5);  // 3,600 bytes at most
        in_rows_ = below(2) == 1;
        dtype_ = which > 8 && !odd() ? Dtype::float64 : static_cast<Dtype>(below(which == 0 || which == 6 ? 7 : 4));
        Saved saved, other;
        switch (which) {
            case 0:
                return call([f = forward(nullptr)] { batch_norm(f); });
            case 1:
            case 2:
            case 3:
                return call([f = forward(odd() ? nullptr : &saved)] { batch_norm_train(f); });
            case 4:
                return call([f = forward(odd() ? nullptr : &saved), s = channels<false>(), batch = below(2) == 1] { save(f, s, batch); });
            case 5: {
                const UpdateRunningArgs a{
                    .running = running(), .mean = channels<false>(), .var = channels<false>(), .count = channels<false>()};
                return call([&] { update_running(a); });
            }
            case 6: {
                const ConstTensor x = tensor<false>();
                const auto mean = doubles(channels_), var = doubles(channels_);
                const Positions p = positions();
                const int64_t ddof = below(3) - odd();
                const int threads = static_cast<int>(below(4)) - odd();
                if (below(2) == 0) return call([&] { moments(x, mean, var, ddof, threads, p); });
                const auto sums = doubles(9 * channels_);
                return call([&] { moment_sums(x, sums, threads, p); });
            }
            case 7: {
                const auto a = doubles(9 * channels_), b = doubles(9 * channels_), c = doubles(channels_), d = doubles(channels_),
                           e = doubles(channels_);
                if (below(2) == 0) return call([&] { merge_moment_sums(a, b); });
                return call([&] { moments_from_sums(a, c, d, e); });
            }
            case 8: {
                const std::string text(reinterpret_cast<const char*>(bytes_.data()) + at_, std::min<size_t>(bytes_.size() - at_, 40));
                const auto settings = tuning();
                const Outcome outcome = call([&] { below(2) == 0 ? set_tuning(text) : set_isa(text); });
                set_tuning(settings);
                return outcome;
            }
            default:
                return back(saved, which != 11);
        }
    }

private:
    static constexpr size_t kArguments = 24, kStretch = 1024;  // of 8 bytes each

    // Modest numbers, different ones.
    template <class T>
    static const std::vector<std::uint64_t>& numbers(T) {
        static const std::vector<std::uint64_t> all = [] {
            std::vector<std::uint64_t> words(kArguments * kStretch);
            std::vector<T> values(words.size() * 8 / sizeof(T));
            for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(i * 37 % 101) / 16 + T{0.5};
            std::memcpy(words.data(), values.data(), words.size() * 8);
            return words;
        }();
        return all;
    }

    // ---- bytes to choices: those that are not there are 0, which is the usual ----

    std::uint8_t next() { return at_ < bytes_.size() ? bytes_[at_++] : 0; }
    int64_t below(int64_t n) { return next() % n; }
    bool odd() { return next() % 24 == 23; }
    int64_t number() {
        static constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
        static constexpr int64_t k[] = {-1,
                                        0,
                                        1,
                                        2,
                                        3,
                                        4,
                                        5,
                                        7,
                                        16,
                                        17,
                                        60,
                                        100,
                                        -2,
                                        -7,
                                        -16,
                                        int64_t{1} << 20,
                                        int64_t{1} << 31,
                                        int64_t{1} << 40,
                                        int64_t{1} << 59,
                                        int64_t{1} << 62,
                                        kMin,
                                        kMax,
                                        -kMax};
        return k[below(std::size(k))];
    }
    double real() {
        static constexpr double k[] = {0, -0.0, 1, -1, 0.5, 2, 1e-5, 1e300, -1e300, 1e-320, kNaN, kInf, -kInf, 1e39};
        return k[below(std::size(k))];
    }
    template <class E>
    E named(int64_t n) {  // one of a list of names, or none of them
        return static_cast<E>(odd() ? number() : below(n));
    }

    // ---- arguments ----

    // Memory of its own, or of another argument.
    char* stretch() {
        const size_t i = odd() ? static_cast<size_t>(below(kArguments)) : used_++ % kArguments;
        first_ = reinterpret_cast<char*>(memory_.data() + i * kStretch);
        if (odd()) return nullptr;
        return first_ + kStretch * 4 + (odd() ? below(64) : 0);
    }
    // Whether so many bytes about `data` are its own; null is refused, whatever its size.
    void reaches(const void* data, Wide low, Wide high) {
        if (data == nullptr) return;
        const auto place = static_cast<const char*>(data) - first_;
        if (place + low < 0 || place + high > static_cast<Wide>(kStretch * 8)) beyond_ = true;
    }
    // The same of values, which are looked at before all tensors are; what no memory could hold is refused first.
    void values_reach(const void* data, Wide low, Wide high) {
        const bool before = beyond_;
        reaches(data, low, high);
        if (beyond_ && high - low < (Wide{1} << 62)) values_beyond_ = true;
        beyond_ = before;
    }
    static std::pair<Wide, Wide> span_of(std::initializer_list<std::pair<int64_t, int64_t>> dimensions) {
        constexpr Wide far = Wide{1} << 100;  // beyond all memory, and there is room for sums and items
        Wide low = 0, high = 0;
        for (const auto& [n, stride] : dimensions) {
            if (n < 1) return {0, -1};
            (stride < 0 ? low : high) += std::clamp(static_cast<Wide>(n - 1) * stride, -far, far);
        }
        return {low, high};
    }

    template <bool writable>
    AnyView<writable> tensor(std::optional<Dtype> dtype = {}) {
        AnyView<writable> v;
        v.outer = outer_, v.channels = channels_, v.inner = inner_;
        if (in_rows_) {
            v.outer_stride = channels_ * inner_, v.channel_stride = 1, v.inner_stride = channels_;
        } else {
            v.outer_stride = channels_ * inner_, v.channel_stride = inner_, v.inner_stride = 1;
        }
        v.dtype = odd() ? named<Dtype>(7) : dtype.value_or(dtype_);
        for (int64_t* const size : {&v.outer, &v.channels, &v.inner}) {
            if (odd()) *size = number();
        }
        for (int64_t* const stride : {&v.outer_stride, &v.channel_stride, &v.inner_stride}) {
            if (odd()) *stride = number();
        }
        v.data = stretch();
        const auto [low, high] = span_of({{v.outer, v.outer_stride}, {v.channels, v.channel_stride}, {v.inner, v.inner_stride}});
        const Wide item = v.dtype < Dtype::float32 || v.dtype > Dtype::uint16 ? 8 : static_cast<Wide>(format(v.dtype).size);
        reaches(v.data, low * item, high * item + item);
        if (v.outer < 0 || v.channels < 0 || v.inner < 0) impossible_ = true;
        if (static_cast<Wide>(std::max<int64_t>(v.outer, 1)) * std::max<int64_t>(v.channels, 1) >
            (Wide{1} << 62) / std::max<int64_t>(v.inner, 1))
            impossible_ = true;
        if (v.outer != outer_ || v.channels != channels_ || v.inner != inner_) {
            ++others_;
        } else {
            ++usual_;
        }
        return v;
    }
    template <bool writable = true>
    AnyChannels<writable> channels() {
        AnyChannels<writable> v(nullptr, in_doubles(), odd() ? number() : channels_, odd() ? number() : 1);
        v.data = stretch();
        const auto [low, high] = span_of({{v.size, v.stride}});
        values_reach(v.data, low * 8, high * 8 + 8);
        return v;
    }
    template <bool writable>
    AnyRows<writable> rows() {
        const bool samples = below(4) == 3;
        const AnyChannels<writable> row = channels<writable>();
        AnyRows<writable> v(row, samples ? outer_ : odd() ? number() : 0, samples ? channels_ : odd() ? number() : 0);
        values_beyond_ |= v.rows > 1000;  // read one by one
        const auto [low, high] = span_of({{std::max<int64_t>(v.rows, 1), v.row_stride}, {row.size, row.stride}});
        values_reach(row.data, low * 8, high * 8 + 8);
        return v;
    }
    std::span<double> doubles(int64_t n) {
        const int64_t size = odd() ? std::abs(number() % 2000) : n;
        char* const p = stretch();
        const auto place = p == nullptr ? 0 : (p - first_) % 8;  // a span of misaligned doubles is none
        values_reach(p, 0, size * 8);
        return {reinterpret_cast<double*>(p == nullptr ? p : p - place), static_cast<size_t>(size)};
    }
    bool in_doubles() { return in_doubles_ != odd(); }  // floats read as doubles are no numbers, and the other way round

    Positions positions() {
        Positions p;
        const auto count = static_cast<size_t>(outer_ * inner_);
        const auto bytes = [&] {
            const size_t n = odd() ? static_cast<size_t>(std::abs(number() % 200)) : count;
            char* const data = stretch();
            values_reach(data, 0, static_cast<Wide>(n));
            return std::span<const std::uint8_t>{reinterpret_cast<std::uint8_t*>(data), n};
        };
        const auto which = below(8);
        if (which == 4 || which == 6) p.mask = bytes();
        if (which == 5 || which == 6) p.weights = doubles(static_cast<int64_t>(count));
        if (which == 7 || odd()) p.element_mask = tensor<false>(Dtype::uint8), looks_first_ = true;
        return p;
    }
    Running running() {
        Running r;
        r.mean = channels(), r.var = channels();
        r.decay = odd() ? real() : 0.9;
        if (odd()) r.decays = channels<false>();
        if (odd()) r.seen = channels<false>();
        r.ddof = odd() ? static_cast<int>(number()) : static_cast<int>(below(2));
        r.on_nonfinite = named<OnNonfinite>(3);
        return r;
    }
    Forward forward(Saved* saved) {
        Forward f;
        f.x = tensor<false>();
        f.y = odd() ? Tensor() : tensor<true>(is_integer(dtype_) ? static_cast<Dtype>(below(4)) : dtype_);
        if (below(3) == 2) f.residual = tensor<false>(f.y.dtype);
        if (below(3) != 1) f.mean = channels<false>(), f.var = channels<false>();
        if (odd()) f.var = {};
        if (below(2) == 1) f.gamma = rows<false>();
        if (below(2) == 1) f.beta = rows<false>();
        f.eps = odd() ? real() : 1e-5;
        f.activation = named<Activation>(7);
        f.slope = odd() ? real() : 0.01;
        f.positions = positions();
        f.part_outer = odd() ? number() : below(3);
        if (below(3) == 2) f.running = running();
        if (below(4) == 3) {
            f.renorm.enabled = !odd();
            if (below(2) == 1) f.renorm.mean = channels(), f.renorm.std = channels(), f.renorm.decay = odd() ? real() : 0.5;
            for (double* const limit : {&f.renorm.rmin, &f.renorm.rmax, &f.renorm.dmax}) {
                if (odd()) *limit = real();
            }
        }
        f.keep = named<Keep>(2);
        f.saved = saved;
        f.execution = execution();
        return f;
    }
    Execution execution() {
        Execution e;
        e.num_threads = odd() ? static_cast<int>(number()) : static_cast<int>(below(3));
        e.check_values = !odd();
        return e;
    }
    // Backward of a forward that is good, or of none.
    Outcome back(Saved& saved, bool first_order) {
        std::vector<double> x(static_cast<size_t>(outer_ * channels_ * inner_), 0.5), y(x.size());
        for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(i * i % 13);
        std::vector<double> gamma(static_cast<size_t>(channels_), 1.5), beta(gamma);
        bool with_residual = below(3) == 2;
        if (dtype_ == Dtype::float64 && outer_ * inner_ > 1 && !odd()) {
            const auto view = [&](auto& v) {
                return in_rows_ ? View<double>{v.data(), outer_, channels_, inner_, channels_ * inner_, 1, channels_}
                                : View<double>::ncs(v.data(), outer_, channels_, inner_);
            };
            Forward f{
                .x = view(x), .y = view(y), .gamma = gamma, .beta = beta, .activation = static_cast<Activation>(below(7)), .saved = &saved};
            if (with_residual) f.residual = view(x);
            batch_norm_train(f);
        }
        const Saved* const given = odd() ? nullptr : &saved;
        const ConstTensor dy = tensor<false>(), kept = tensor<false>(),
                          residual = (saved.reads_residual() != odd()) ? tensor<false>() : ConstTensor();
        const Tensor dx = below(4) == 3 ? Tensor() : tensor<true>(), dz = with_residual || odd() ? tensor<true>() : Tensor();
        const Rows dgamma = rows<true>(), dbeta = rows<true>();
        if (first_order) {
            const Backward b{dy, kept, given, residual, dx, dz, dgamma, dbeta, below(8) == 7, execution()};
            return call([&] { batch_norm_backward(b); });
        }
        DoubleBackward b{.dy = dy, .kept = kept, .saved = given, .residual = residual, .ddx = tensor<false>(), .ddy = tensor<true>()};
        if (with_residual || odd()) b.ddresidual = tensor<false>();
        if (below(2) == 1) b.ddgamma = rows<false>(), b.ddbeta = rows<false>();
        b.dx = dx, b.dresidual = dz, b.dgamma = dgamma, b.dbeta = dbeta, b.execution = execution();
        return call([&] { batch_norm_double_backward(b); });
    }

    template <class F>
    Outcome call(const F& f) {
        const bool must_be_refused = !looks_first_ && (impossible_ || (others_ > 0 && usual_ > 0));
        if (values_beyond_ || (beyond_ && !must_be_refused)) return not_tried;
        const std::vector<std::uint64_t> before = memory_;
        try {
            f();
            check(!beyond_, "a call that cannot be good was made, number " + std::to_string(which_), __FILE__, __LINE__);
            return made;
        } catch (const Error& e) {
            check(!e.argument.empty() && std::string_view(e.what()).find("expected") != std::string_view::npos, e.what(), __FILE__,
                  __LINE__);
            CHECK(memory_ == before);
        } catch (const Misuse&) {
            CHECK(memory_ == before);
        }
        return refused;
    }

    std::span<const std::uint8_t> bytes_;
    size_t at_ = 0, used_ = 0;
    bool in_doubles_ = bytes_.empty() || bytes_.back() % 2 == 0;
    std::vector<std::uint64_t> memory_;
    char* first_ = nullptr;  // of the stretch that was taken last
    int64_t outer_ = 1, channels_ = 1, inner_ = 1, which_ = 0;
    Dtype dtype_ = Dtype::float32;
    bool in_rows_ = false, beyond_ = false, values_beyond_ = false, impossible_ = false;
    bool looks_first_ = false;    // an element mask is counted before other tensors are looked at
    int usual_ = 0, others_ = 0;  // tensors of the usual sizes, and of others
};

}  // namespace test
