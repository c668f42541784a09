// batchnorm: batch normalization on the CPU. The public C++ interface; standard headers only.
//
// Every tensor with one channel axis is a View of (outer, channels, inner): NCHW is (N, C, H*W), NHWC is (N*H*W, C, 1), a matrix of
// rows is (N, C, 1). Either inner or channels must be contiguous (stride 1). With n = outer * inner values per channel and the
// population variance (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1):
//
//     y = act((x - mean) / sqrt(var + eps) * gamma + beta)
//
// Statistics are computed and returned in double. Results depend on the inputs only: same bits for any number of threads,
// instruction set or alignment. Bad arguments throw std::invalid_argument, whose message names the argument, before anything is
// written. All functions may be called from several threads at once.
#pragma once

#include <cstdint>
#include <limits>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#if defined(BATCHNORM_SHARED) && defined(__GNUC__)
#define BATCHNORM_API __attribute__((visibility("default")))
#else
#define BATCHNORM_API
#endif

namespace batchnorm {

// Storage formats without arithmetic of their own: IEEE binary16, and the upper half of a binary32.
struct float16 {
    std::uint16_t bits;
};
struct bfloat16 {
    std::uint16_t bits;
};

// The integers, last, are images: moments() and batch_norm() read them, nothing is written as them.
enum class Dtype { float32, float64, float16, bfloat16, uint8, int16, uint16 };

constexpr bool is_integer(Dtype t) { return t >= Dtype::uint8; }

template <class T>
inline constexpr bool is_integer_storage =
    std::is_same_v<T, std::uint8_t> || std::is_same_v<T, std::int16_t> || std::is_same_v<T, std::uint16_t>;

template <class T>
inline constexpr bool is_storage = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, float16> ||
                                   std::is_same_v<T, bfloat16> || is_integer_storage<T>;

template <class T>
    requires is_storage<T>
inline constexpr Dtype dtype_of = std::is_same_v<T, float>          ? Dtype::float32
                                  : std::is_same_v<T, double>       ? Dtype::float64
                                  : std::is_same_v<T, float16>      ? Dtype::float16
                                  : std::is_same_v<T, bfloat16>     ? Dtype::bfloat16
                                  : std::is_same_v<T, std::uint8_t> ? Dtype::uint8
                                  : std::is_same_v<T, std::int16_t> ? Dtype::int16
                                                                    : Dtype::uint16;

// A tensor as (outer, channels, inner) with strides in elements (they may be negative). Does not own the data.
template <class T>
    requires is_storage<std::remove_const_t<T>>
struct View {
    T* data = nullptr;
    std::int64_t outer = 0, channels = 0, inner = 1;
    std::int64_t outer_stride = 0, channel_stride = 1, inner_stride = 1;

    // Contiguous (outer, channels, inner), as in NCHW with inner = H*W.
    static View ncs(T* data, std::int64_t outer, std::int64_t channels, std::int64_t inner) {
        return {data, outer, channels, inner, channels * inner, inner, 1};
    }
    // Contiguous rows of channels, as in NHWC with rows = N*H*W, or a matrix.
    static View nsc(T* data, std::int64_t rows, std::int64_t channels) { return {data, rows, channels, 1, channels, 1, 1}; }
};

// A view whose storage type is a value, so that one function serves all; made from a View.
template <bool writable>
struct AnyView {
    using Data = std::conditional_t<writable, void*, const void*>;
    Data data = nullptr;
    Dtype dtype = Dtype::float32;
    std::int64_t outer = 0, channels = 0, inner = 1;
    std::int64_t outer_stride = 0, channel_stride = 1, inner_stride = 1;

    AnyView() = default;
    template <class T>
        requires(!writable || !std::is_const_v<T>)
    AnyView(const View<T>& v)  // NOLINT: implicit on purpose
        : data(v.data),
          dtype(dtype_of<std::remove_const_t<T>>),
          outer(v.outer),
          channels(v.channels),
          inner(v.inner),
          outer_stride(v.outer_stride),
          channel_stride(v.channel_stride),
          inner_stride(v.inner_stride) {}
    template <bool other>
        requires(other && !writable)
    AnyView(const AnyView<other>& v)  // NOLINT: implicit on purpose
        : data(v.data),
          dtype(v.dtype),
          outer(v.outer),
          channels(v.channels),
          inner(v.inner),
          outer_stride(v.outer_stride),
          channel_stride(v.channel_stride),
          inner_stride(v.inner_stride) {}
    explicit operator bool() const { return data != nullptr; }
};
using ConstTensor = AnyView<false>;
using Tensor = AnyView<true>;

// One value per channel, float or double, with a stride in elements; does not own them. Default-constructed means absent.
template <bool writable>
struct AnyChannels {
    using Data = std::conditional_t<writable, void*, const void*>;
    Data data = nullptr;
    bool is_double = false;
    std::int64_t size = -1, stride = 1;

    AnyChannels() = default;
    AnyChannels(Data d, bool dbl, std::int64_t n, std::int64_t s) : data(d), is_double(dbl), size(n), stride(s) {}
    template <class V>
        requires(std::is_same_v<std::remove_const_t<V>, float> || std::is_same_v<std::remove_const_t<V>, double>) &&
                    (!writable || !std::is_const_v<V>)
    AnyChannels(std::span<V> values)  // NOLINT: implicit on purpose
        : data(values.data()), is_double(std::is_same_v<std::remove_const_t<V>, double>), size(static_cast<std::int64_t>(values.size())) {}
    template <class V>
        requires(std::is_same_v<V, float> || std::is_same_v<V, double>)
    AnyChannels(std::vector<V>& values) : AnyChannels(std::span<V>(values)) {}  // NOLINT: implicit on purpose
    template <class V>
        requires(std::is_same_v<V, float> || std::is_same_v<V, double>) && (!writable)
    AnyChannels(const std::vector<V>& values) : AnyChannels(std::span<const V>(values)) {}  // NOLINT: implicit on purpose
    template <class V>
    AnyChannels(std::vector<V>&&) = delete;  // would refer to values that are gone
    explicit operator bool() const { return size >= 0; }
};
using ConstChannels = AnyChannels<false>;
using Channels = AnyChannels<true>;

// relu max(v, 0); leaky_relu v > 0 ? v : slope v (Maas, Hannun and Ng 2013); relu6 min(max(v, 0), 6) (Krizhevsky 2010); sigmoid 1 / (1 +
// exp(-v)); tanh; silu v sigmoid(v) (Elfwing, Uchibe and Doya 2017, arXiv:1702.03118). Where the derivative jumps, at 0 and for relu6 at
// 6, backward takes the one of the flat side (leaky_relu: slope). NaN stays NaN.
enum class Activation { none, relu, leaky_relu, relu6, sigmoid, tanh, silu };

// How the statistics of the forward pass came about: from the batch itself (gradients flow through them) or given.
enum class Stats { batch, fixed };

// Which positions count, and how often. A position is one (outer, inner) of x's view, number outer * inner_size + inner. Each span has one
// value per position, or fewer: then each value stands for as many consecutive positions. Empty means that all count, once.
//     mask     0 excludes: what tensors hold there is not used, outputs get 0 there, and the others are the whole batch
//     weights  finite, >= 0: the statistics are those of a batch in which each position occurs that often (k is as good as k copies). All
//              positions are normalised and all gradients come in, unless all weights are 0, which is as if all were excluded
// n, the number of values per channel, becomes the sum of the weights of the positions that count.
struct Positions {
    std::span<const std::uint8_t> mask{};
    std::span<const double> weights{};
};

// Where relu, leaky_relu or relu6 let values through unchanged, one bit per element: written by the forward functions, read by
// batch_norm_backward, which without it finds out from x. After a residual it cannot, unless it is given the residual, as the smooth
// activations need it. activation_mask_bytes(x) is its size, a function of shape and memory order.
BATCHNORM_API std::int64_t activation_mask_bytes(const ConstTensor& x);

// Normalise with given statistics. y may be x or the residual itself (in place); no other overlap.
//
// Integer x, an image, gives y of any floating type: what float64 x of these values would give, rounded to float, and from there to 16
// bits. There is no residual and no activation then, and y may have its channels first where x has them last: x as {data, n, channels, hw,
// channels * hw, 1, channels} of n images with hw pixels each, y as View::ncs(data, n, channels, hw).
struct BatchNormArgs {
    ConstTensor x{};
    Tensor y{};                     // x's shape and dtype (of integer x: see above)
    ConstTensor residual{};         // added before the activation; x's shape and dtype, or absent
    ConstChannels mean{}, var{};    // finite; var >= 0
    ConstChannels gamma{}, beta{};  // absent: 1 and 0
    double eps = 1e-5;              // finite, >= 0
    Activation activation = Activation::none;
    double slope = 0.01;  // of leaky_relu, for v <= 0; finite, within float's range unless x is double; may be 0 or negative
    std::span<std::uint8_t> activation_mask{};  // out, activation_mask_bytes(x) bytes, with relu, leaky_relu or relu6 only; empty: none.
                                                // Bits between runs stay; those of positions that do not count may be anything.
    int num_threads = 0;                        // for this call; 0: num_threads()
    bool disjoint = false;  // the caller has checked that no output shares an element with another argument; address ranges may overlap
    Positions positions{};  // a mask alone
};
BATCHNORM_API void batch_norm(const BatchNormArgs& args);

// Batch renormalisation (Ioffe 2017, arXiv:1702.03275, algorithm 1): y = act(x_hat * r * gamma + (beta + gamma * d)) with
//     r = clip(std / reference std, rmin, rmax),  d = clip((mean - reference mean) / reference std, -dmax, dmax)
// and std = sqrt(var + eps). Backward takes r and d for constants: batch_norm_backward with gamma * r for gamma and beta + gamma * d for
// beta gives dx, dbeta, and dgamma = r * its dgamma + d * dbeta.
struct Renorm {
    ConstChannels mean{}, std{};  // the reference, both or neither (no renormalisation); finite, std > 0
    double rmin = 0, rmax = std::numeric_limits<double>::infinity();  // 0 <= rmin <= 1 <= rmax
    double dmax = std::numeric_limits<double>::infinity();            // >= 0
    std::span<double> r{}, d{};                                       // out, C each
};

// Normalise with the batch's own statistics, which are returned, and update running statistics in place:
//     running = decay * running + (1 - decay) * batch,  with var * n / (n - running_ddof) for the variance.
// One value per channel is an error. An empty batch (n = 0, also if no position counts) gives NaN statistics and updates nothing.
struct BatchNormTrainArgs {
    ConstTensor x{};
    Tensor y{};
    ConstTensor residual{};
    ConstChannels gamma{}, beta{};
    Channels running_mean{}, running_var{};  // both or neither
    double decay = 0.9;                      // weight of the old value, in [0, 1]
    int running_ddof = 1;                    // 0 or 1
    double eps = 1e-5;
    Activation activation = Activation::none;
    double slope = 0.01;
    Renorm renorm{};
    std::span<double> mean{}, inv_std{};        // out, C each: what backward needs, unrounded
    std::span<std::uint8_t> activation_mask{};  // out
    int num_threads = 0;
    bool disjoint = false;
    Positions positions{};
};
BATCHNORM_API void batch_norm_train(const BatchNormTrainArgs& args);

// Gradients. With x_hat = (x - mean) * inv_std and dy multiplied by the activation's derivative first:
//     dbeta = sum dy, dgamma = sum dy * x_hat,
//     Stats::batch  dx = gamma * inv_std * (dy - w * dbeta / n - w * x_hat * dgamma / n), w the position's weight, 1 without
//     Stats::fixed  dx = gamma * inv_std * dy
// The residual's gradient is that dy. Outputs that are absent are not computed. dx or dresidual may be dy or the residual itself.
struct BatchNormBackwardArgs {
    ConstTensor dy{}, x{};
    ConstChannels mean{}, inv_std{};  // as the forward returned them; NaN is passed on
    ConstChannels gamma{}, beta{};    // beta is read only with an activation
    Stats stats = Stats::batch;
    Activation activation = Activation::none;
    double slope = 0.01;
    std::span<const std::uint8_t> activation_mask{};  // the forward's; empty: the activation's input is recomputed from x and the residual
    ConstTensor residual{};                           // the forward's, with an activation and instead of its mask, or absent
    Tensor dx{}, dresidual{};
    Channels dgamma{}, dbeta{};
    int num_threads = 0;
    bool disjoint = false;
    Positions positions{};  // the forward's; with fixed statistics a mask alone
};
BATCHNORM_API void batch_norm_backward(const BatchNormBackwardArgs& args);

// Mean and variance (sum of squared deviations / (n - ddof)) per channel, in double. n = 0 gives NaN; 0 < n <= ddof is an error. Of
// integer x both are the correctly rounded ones.
BATCHNORM_API void moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof = 0, int num_threads = 0,
                           const Positions& positions = {});

// The two passes of backward by themselves, of which other gradients can be made (second-order ones, say). a and b have one shape and
// storage type.
//
// sum_a = sum a and sum_ab = sum a * (b - shift) per channel, in double. No values (n = 0) give 0.
struct ChannelSumsArgs {
    ConstTensor a{}, b{};
    ConstChannels shift{};                // absent: 0
    std::span<double> sum_a{}, sum_ab{};  // out, C each
    int num_threads = 0;
};
BATCHNORM_API void channel_sums(const ChannelSumsArgs& args);

// out = a * k_a + (b - center) * k_b + k_0 with numbers per channel, four roundings in double for double data and in float for the rest
// (the part of center that a float cannot hold goes into k_0), then one to storage. With an activation, a counts only where the forward
// pass let values through, and there as its slope says: a * act'((b - center) * inv_std * gamma + beta). out may be a or b itself.
struct CombineArgs {
    ConstTensor a{}, b{};
    Tensor out{};
    ConstChannels k_a{}, center{}, k_b{}, k_0{};  // absent: 1, 0, 0, 0; of a alone without k_b and k_0, b is not read
    Activation activation = Activation::none;
    double slope = 0.01;                       // of leaky_relu
    ConstChannels inv_std{}, gamma{}, beta{};  // read only with an activation; absent: 1, 1, 0
    int num_threads = 0;
    bool disjoint = false;  // as in BatchNormArgs
};
BATCHNORM_API void combine(const CombineArgs& args);

// Moments of more data than one call sees. moment_sums makes of a batch its count, and of each channel sum x and sum x^2, in
// moment_sums_size(C) doubles; merge_moment_sums adds `others` to `sums`, in any order and grouping; moments_from_sums makes of the result
// mean and m2, the sum of squared deviations: divide by moment_count(sums), or that less 1. Every sum is three doubles, so that merging
// rounds by 2^-159 of the largest sum alone, and m2 keeps its digits for |mean| / std far beyond 1e6. For |x| below 1e150. Batches without
// values add nothing; of nothing, mean and m2 are NaN.
constexpr std::int64_t moment_sums_size(std::int64_t channels) { return 3 + 6 * channels; }
BATCHNORM_API void moment_sums(const ConstTensor& x, std::span<double> sums, int num_threads = 0, const Positions& positions = {});
BATCHNORM_API void merge_moment_sums(std::span<double> sums, std::span<const double> others);  // others may be sums itself
BATCHNORM_API void moments_from_sums(std::span<const double> sums, std::span<double> mean, std::span<double> m2);
BATCHNORM_API double moment_count(std::span<const double> sums);

// The running-statistics step of batch_norm_train by itself; `var` is the population variance of `count` values.
struct UpdateRunningArgs {
    Channels running_mean{}, running_var{};
    ConstChannels mean{}, var{};
    double decay = 0.9;
    std::int64_t count = 0;
    int ddof = 1;
};
BATCHNORM_API void update_running(const UpdateRunningArgs& args);

// Threads that a call may use; at least 1. The default is OMP_NUM_THREADS, or else the CPUs this process may run on (affinity), but no
// more than a container's CPU quota.
BATCHNORM_API int num_threads();
BATCHNORM_API void set_num_threads(int n);

// What decides how work is laid out: cache sizes, thresholds, each "name=number". Changes speed, never a result. For experiments; the
// defaults come from the machine, or from the environment variable BATCHNORM_TUNING. A name or number that cannot be throws.
BATCHNORM_API std::string tuning();                        // all of them, "name=number,name=number"
BATCHNORM_API void set_tuning(std::string_view settings);  // those named; "" restores the defaults

// Instruction-set levels: "baseline", "avx2", "avx512". A level that this machine or build lacks throws.
BATCHNORM_API std::string isa();
BATCHNORM_API void set_isa(std::string_view name);
BATCHNORM_API std::vector<std::string> isa_levels();  // those this machine can run, best last
BATCHNORM_API std::vector<std::string> isa_built();   // those in this build
BATCHNORM_API std::string isa_reason();               // why isa() is in use
BATCHNORM_API std::string openmp_runtime();           // e.g. "libgomp (OpenMP 4.5)"
BATCHNORM_API std::string compiler();                 // e.g. "g++ 12.2.0"
BATCHNORM_API std::string version();

// Called now and then, between tiles, on the thread that entered the library during long calls; true abandons the call with
// Interrupted. Outputs are then partly written, statistics and running statistics not at all.
BATCHNORM_API void set_interrupt_poll(bool (*poll)());
struct BATCHNORM_API Interrupted : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace batchnorm
