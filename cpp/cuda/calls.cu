// The calls of cuda.hpp: checked as on the CPU, then handed to the kernels of x's storage type.
#include "calls.h"
#include "core/check.h"

namespace batchnorm::cuda {
namespace {

// The call on the GPU's arrays: nothing of them is read here.
template <class CallOf>
CallOf on_device(const CallOf& call) {
    CallOf c = call;
    c.execution.device = true;
    c.execution.check_values = false;
    return c;
}

[[noreturn]] void refuse_integers() { check::not_served("x", "has an integer storage type", "a floating one; convert it first"); }

// What a GPU takes, marked as its own.
Forward served(const Forward& f) {
    if (is_integer(f.x.dtype)) refuse_integers();
    if (f.saved != nullptr && f.keep == Keep::y)
        check::not_served("keep", "is y", "x: which channels' x must be kept, the CPU would wait for");
    if (f.running.on_nonfinite == OnNonfinite::raise) {
        check::not_served("on_nonfinite", "is 'raise'", "'propagate' or 'skip': the CPU would wait for what the GPU finds");
    }
    return on_device(f);
}

template <class F>
void with_storage(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::float32:
            return f.template operator()<float>();
        case Dtype::float64:
            return f.template operator()<double>();
        case Dtype::float16:
            return f.template operator()<Float16>();
        case Dtype::bfloat16:
            return f.template operator()<Bfloat16>();
        default:
            refuse_integers();
    }
}

}  // namespace

inline namespace v0_2 {

void batch_norm(const Forward& call, const Stream& stream) {
    const Forward f = served(call);
    const Call checked = check::inference(f);
    with_storage(f.x.dtype, [&]<class T>() { forward<T>(f, checked, stream, "batch_norm"); });
}

void batch_norm_train(const Forward& call, const Stream& stream) {
    const Forward f = served(call);
    const Call checked = check::training(f);
    with_storage(f.x.dtype, [&]<class T>() { forward<T>(f, checked, stream, "batch_norm_train"); });
}

void batch_norm_backward(const Backward& call, const Stream& stream) {
    const Backward b = on_device(call);
    const Saved::Impl& s = check::backward(b);
    with_storage(b.kept.dtype, [&]<class T>() { backward<T>(b, s, stream); });
}

void moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof, const Stream& stream,
             const Positions& positions) {
    const Call call = check::moments(x, mean, var, ddof, 0, positions, nullptr, 0, true);
    with_storage(x.dtype, [&]<class T>() { moments<T>(x, call, mean, var, ddof, stream, positions); });
}

}  // namespace v0_2

}  // namespace batchnorm::cuda
