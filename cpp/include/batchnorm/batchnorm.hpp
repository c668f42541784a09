// batchnorm: batch normalization on the CPU. The public C++ interface; standard headers only.
//
// Every tensor with one channel axis is a View of (outer, channels, inner): NCHW is (N, C, H*W), NHWC is (N*H*W, C, 1), a matrix of
// rows is (N, C, 1). Either inner or channels must be contiguous (stride 1). With n = outer * inner values per channel and the
// population variance (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1):
//
//     y = act((x - mean) / sqrt(var + eps) * gamma + beta)
//
// Statistics are computed and returned in double; double data may reach from 1e-300 to 1e300, of which var is 0 or infinite where a double
// does not hold it. Where var and eps are both 0, x_hat is 0 (of given statistics that is an error). Results depend on the inputs only:
// same bits for any number of threads, instruction set or alignment, any floating-point mode of the caller's. Bad arguments throw Error,
// whose message names the argument, before anything is written. All functions may be called from several threads at once.
//
// A call is described by one struct, Forward or Backward. Each member is an independent choice, and all of them combine; what is left
// out means the plain thing.
#pragma once

#if __cplusplus < 202002L
#error "batchnorm.hpp needs C++20: compile with -std=c++20"
#else  // to the end, so that this is the only error here

#include <cstdint>
#include <limits>
#include <memory>
#include <memory_resource>
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
// A program compiled with the header of another minor version does not link: the structs below go by reference, and grow.
inline namespace v0_2 {

// A bad argument. `kind` is type for what is of the wrong sort, value for a wrong size, number or combination.
struct BATCHNORM_API Error : std::invalid_argument {
    enum Kind { type, value };
    Kind kind;
    std::string argument;
    Error(Kind k, std::string name, const std::string& message) : std::invalid_argument(message), kind(k), argument(std::move(name)) {}
};
// A call in the wrong state: a Saved that is empty.
struct BATCHNORM_API Misuse : std::logic_error {
    using std::logic_error::logic_error;
};

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
    requires is_storage<std::remove_const_t<T> >
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
          dtype(dtype_of<std::remove_const_t<T> >),
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

// gamma, beta and their gradients: one value per channel, or a row of them for each sample, `rows` samples of equally many rows of
// x's outer; rows 0 is one row for all. Row r starts at element r * row_stride.
template <bool writable>
struct AnyRows {
    AnyChannels<writable> values{};  // of one row
    std::int64_t rows = 0, row_stride = 0;

    AnyRows() = default;
    AnyRows(AnyChannels<writable> row, std::int64_t n, std::int64_t stride) : values(row), rows(n), row_stride(stride) {}
    template <class V>
        requires std::is_constructible_v<AnyChannels<writable>, V&&>
    AnyRows(V&& row) : values(std::forward<V>(row)) {}  // NOLINT: implicit on purpose
    explicit operator bool() const { return static_cast<bool>(values); }
};
using ConstRows = AnyRows<false>;
using Rows = AnyRows<true>;

// relu max(v, 0); leaky_relu v > 0 ? v : slope v (Maas, Hannun and Ng 2013); relu6 min(max(v, 0), 6) (Krizhevsky 2010); sigmoid 1 / (1 +
// exp(-v)); tanh; silu v sigmoid(v) (Elfwing, Uchibe and Doya 2017, arXiv:1702.03118). Where the derivative jumps, at 0 and for relu6 at
// 6, backward takes the one of the flat side (leaky_relu: slope). NaN stays NaN.
enum class Activation { none, relu, leaky_relu, relu6, sigmoid, tanh, silu };

// Which values count, and how often. A position is one (outer, inner) of x's view, number outer * inner_size + inner. Each span has one
// value per position, or fewer: then each value stands for as many consecutive positions. Absent means that all count, once.
//     mask          0 excludes: what tensors hold there is not used, outputs get 0 there, and the others are the whole batch
//     element_mask  the same for single elements: uint8, x's sizes, any strides (0 repeats a value). Each channel then has its own n
//     weights       finite, >= 0: the statistics are those of a batch in which each position occurs that often (k is as good as k
//                   copies). All positions are normalised and all gradients come in. Where the mask excludes, they may be anything
// n, the number of values of a part and channel, is the sum of the weights of those that count. Without any, mean and var are NaN; of a
// single one, x_hat is 0. Neither enters running statistics.
struct Positions {
    std::span<const std::uint8_t> mask{};
    std::span<const double> weights{};
    ConstTensor element_mask{};  // not together with mask
    explicit operator bool() const { return !mask.empty() || !weights.empty() || element_mask; }
};

// Batch renormalisation (Ioffe 2017, arXiv:1702.03275, algorithm 1): y = act(x_hat * r * gamma + (beta + gamma * d)) with
//     r = clip(std / reference std, rmin, rmax),  d = clip((mean - reference mean) / reference std, -dmax, dmax)
// and std = sqrt(var + eps). Backward takes r and d for constants.
struct Renorm {
    bool enabled = false;
    Channels mean{}, std{};  // the reference, finite, std > 0; absent: the running pair, sqrt(running var + eps)
    double rmin = 0, rmax = std::numeric_limits<double>::infinity();  // 0 <= rmin <= 1 <= rmax
    double dmax = std::numeric_limits<double>::infinity();            // >= 0
    double decay = -1;  // of mean and std, which are then written as running statistics are; < 0: they are only read
};

// What happens when NaN or Inf would enter the running statistics: they take it (it stays in its channel); the call throws before
// anything is written; or the batch is left out of them.
enum class OnNonfinite { propagate, raise, skip };

// Running statistics, updated in place once the call cannot fail any more:
//     running = decay * running + (1 - decay) * batch,  with var * n / (n - ddof) for the variance.
// Of several parts the batch is their average, weighted by n. A channel without two values stays as it is.
struct Running {
    Channels mean{}, var{};  // both or neither
    double decay = 0.9;      // weight of the old value, in [0, 1]
    ConstChannels decays{};  // the same for each channel, instead of decay
    ConstChannels seen{};    // values that each channel's statistics hold: decay = seen / (seen + n), the cumulative average
    int ddof = 1;            // 0 or 1
    OnNonfinite on_nonfinite = OnNonfinite::propagate;
};

// Ranks (processes, as a rule) that hold parts of one batch, each some of its samples: any number of them, also none. With a group the
// statistics, running statistics, dx and, on demand, dgamma and dbeta are those of the whole batch: the same bits for any number of ranks
// and any distribution of the samples. Every rank makes the same call, with the same options; the call then exchanges sums, on the thread
// that made it. A rank whose call fails before its exchange makes the others throw RankFailed, and nothing is changed anywhere; they are
// not told of what allgather itself throws, nor of memory that runs out while it is decided whether another exchange follows.
class BATCHNORM_API Group {
public:
    virtual ~Group();
    // The values of every rank, this one's among them, in the order of ranks. Lengths differ only where a rank has failed, or calls
    // something else. What it throws ends the call.
    virtual std::vector<std::vector<double> > allgather(std::span<const double> mine) = 0;
};
// Another rank has failed, with this message.
struct BATCHNORM_API RankFailed : std::runtime_error {
    int rank;
    RankFailed(int r, const std::string& message) : std::runtime_error(message), rank(r) {}
};
// For a rank that cannot come to make its call: that of the others throws RankFailed.
BATCHNORM_API void fail(Group& group, std::string_view message);
// For what the calls here do not do, such as merging sums of moments: the values of every rank, which may be of any length, in the order of
// ranks; throws RankFailed if one has failed.
BATCHNORM_API std::vector<std::vector<double> > gather(Group& group, std::span<const double> mine);

struct Execution {
    int num_threads = 0;       // for this call; 0: num_threads()
    bool disjoint = false;     // the caller vouches that outputs overlap nothing they may not
    bool check_values = true;  // whether NaN, Inf and negative variances in per-channel arguments are refused
    Group* group = nullptr;
    std::int64_t sample_outer = 1;  // with a group: rows of x's outer that are one sample; of NHWC, as rows, H*W
    bool device = false;            // of cuda.hpp's calls: arrays are a GPU's, so that values are neither looked at nor counted
};

// What backward needs of x. With y it recovers x from the output, (y - offset) / slope per channel, and x itself is stored of channels
// where that would lose more than a third of the digits (|gamma| small against |beta|): with leaky_relu (slope from 2^-60 to 2^60) or
// no activation, and without a residual.
enum class Keep { x, y };

// What a forward pass leaves for backward besides x (or y): statistics, copies of gamma, beta and positions, a bit per element where a
// piecewise linear activation after a residual was on. It refers to nothing of the caller's. A second forward of the same sizes
// allocates nothing. A failed check leaves it as it was; Interrupted, std::bad_alloc and
// OnNonfinite::raise empty it. Reading it is safe from any thread.
class BATCHNORM_API Saved {
public:
    Saved();
    explicit Saved(std::pmr::memory_resource* memory);
    ~Saved();
    Saved(Saved&&) noexcept;
    Saved& operator=(Saved&&) noexcept;

    bool empty() const noexcept;
    void clear() noexcept;               // memory is kept
    std::size_t bytes() const noexcept;  // held
    std::int64_t parts() const noexcept;
    std::int64_t channels() const noexcept;
    // parts * channels values each: count is the sum of the weights of so many values. r and d are empty without renormalisation.
    std::span<const double> mean() const noexcept, var() const noexcept, inv_std() const noexcept, count() const noexcept;
    std::span<const double> values() const noexcept, r() const noexcept, d() const noexcept;
    std::span<const std::int64_t> kept_channels() const noexcept;  // those whose x is stored (Keep::y)
    bool updated() const noexcept;                                 // whether running statistics took this batch
    bool reads_residual() const noexcept;                          // whether backward wants the forward's residual

    struct Impl;
    Impl* get() const noexcept { return impl_.get(); }

private:
    std::unique_ptr<Impl> impl_;
    std::pmr::memory_resource* memory_;
    friend Impl& prepared(Saved& saved);  // for the drivers
};

// One forward call.
struct Forward {
    ConstTensor x{};
    Tensor y{};                   // x's shape and dtype; may be x or the residual itself (in place), no other overlap
    ConstTensor residual{};       // added before the activation; x's shape and dtype
    ConstChannels mean{}, var{};  // given statistics: finite, var >= 0. Both or neither
    ConstRows gamma{}, beta{};    // absent: 1 and 0
    double eps = 1e-5;            // finite, >= 0
    Activation activation = Activation::none;
    double slope = 0.01;  // of leaky_relu, for v <= 0; finite, within float's range unless x is double
    Positions positions{};
    std::int64_t part_outer = 0;  // rows of outer that are a batch of their own (ghost batches); 0: all. A last part may be shorter; with
                                  // a single value per channel it joins the one before
    Renorm renorm{};
    Running running{};
    Keep keep = Keep::x;
    Saved* saved = nullptr;  // receives what backward needs
    Execution execution{};
};

// Normalise with given statistics; mean and var are required.
//
// Integer x, an image, gives y of any floating type: what float64 x of these values would give, rounded to float, and from there to 16
// bits. y may have its channels first where x has them last: x as {data, n, channels, hw, channels * hw, 1, channels} of n images with hw
// pixels each, y as View::ncs(data, n, channels, hw). A residual has y's type. There is no `saved` then.
BATCHNORM_API void batch_norm(const Forward& call);

// Normalise with the batch's own statistics, part by part, or with mean and var if they are given, and update running statistics by
// the batch's. It is an error if no part and channel has two values, unless nothing counts at all, which gives NaN statistics, y = 0
// and no update. `seen` of running and parts that are ragged: see there.
BATCHNORM_API void batch_norm_train(const Forward& call);

// One backward call. With x_hat = (x - mean) * inv_std and g = dy times the activation's derivative (0 where nothing counts):
//     dbeta = sum g, dgamma = sum g * (r x_hat + d),
//     batch statistics  dx = gamma r inv_std (g - w * sum g / n - w * x_hat * sum (g x_hat) / n), w the position's weight, 1 without
//     given statistics  dx = gamma r inv_std g
// The residual's gradient is g. Outputs that are absent are not computed. Of dx and dresidual one may be dy or the residual itself, and
// dx the kept tensor.
struct Backward {
    ConstTensor dy{}, kept{};  // kept: the forward's x, or its y with Keep::y
    const Saved* saved = nullptr;
    ConstTensor residual{};  // the forward's, if saved->reads_residual()
    Tensor dx{}, dresidual{};
    Rows dgamma{}, dbeta{};   // with as many rows as the forward's gamma and beta had, or none if those were absent
    bool all_reduce = false;  // with a group: dgamma and dbeta are the group's, not this rank's. Rows of samples are whole as they are
    Execution execution{};    // of a forward with a group: with the same
};
BATCHNORM_API void batch_norm_backward(const Backward& call);

// Makes the Saved of a forward that was not ours, from its arguments (of which y, var, eps, renorm, running, part_outer and keep are not
// read) and inv_std = 1 / sqrt(var + eps). batch_statistics: whether mean and inv_std are the batch's own. With a residual and an
// activation backward wants the residual.
BATCHNORM_API void save(const Forward& call, const ConstChannels& inv_std, bool batch_statistics);

// Gradients of <ddx, dx> + <ddgamma, dgamma> + <ddbeta, dbeta> + <ddresidual, dresidual> with respect to dy, x, gamma, beta and the
// residual, r and d being constants. Computed in double throughout, whatever the storage. Outputs overlap nothing.
struct DoubleBackward {
    ConstTensor dy{}, kept{};  // as for backward
    const Saved* saved = nullptr;
    ConstTensor residual{};           // the forward's, if saved->reads_residual()
    ConstTensor ddx{}, ddresidual{};  // absent: 0
    ConstRows ddgamma{}, ddbeta{};    // absent: 0
    Tensor ddy{}, dx{}, dresidual{};  // outputs; absent: not computed
    Rows dgamma{}, dbeta{};
    Execution execution{};
};
BATCHNORM_API void batch_norm_double_backward(const DoubleBackward& call);

// Mean and variance (sum of squared deviations / (n - ddof)) per channel, in double. n <= ddof gives NaN, and is an error if no channel
// has more, unless all have none. Of integer x without weights both are the correctly rounded ones. With a group they are the whole
// batch's.
BATCHNORM_API void moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof = 0, int num_threads = 0,
                           const Positions& positions = {}, Group* group = nullptr, std::int64_t sample_outer = 1);

// Moments of more data than one call sees. moment_sums makes of a batch, for each channel, its count, sum x and sum x^2, in
// moment_sums_size(C) doubles; merge_moment_sums adds `others` to `sums`, in any order and grouping; moments_from_sums makes of the result
// count, mean and m2, the sum of squared deviations: divide by count, or that less 1. Every sum is three doubles, so that merging
// rounds by 2^-159 of the largest sum alone, and m2 keeps its digits for |mean| / std far beyond 1e6. For |x| below 1e150; squares that
// add up to more than 1.8e308 are an error. Batches without values add nothing; of nothing, mean and m2 are NaN.
constexpr std::int64_t moment_sums_size(std::int64_t channels) { return 9 * channels; }
BATCHNORM_API void moment_sums(const ConstTensor& x, std::span<double> sums, int num_threads = 0, const Positions& positions = {});
BATCHNORM_API void merge_moment_sums(std::span<double> sums, std::span<const double> others);  // others may be sums itself
BATCHNORM_API void moments_from_sums(std::span<const double> sums, std::span<double> count, std::span<double> mean, std::span<double> m2);

// The running-statistics step of batch_norm_train by itself; `var` is the population variance of `count` values of each channel. Channels
// of fewer than two values, or not more than ddof, stay as they are.
struct UpdateRunningArgs {
    Running running{};
    ConstChannels mean{}, var{};
    ConstChannels count{};
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

}  // namespace v0_2
}  // namespace batchnorm

#endif
