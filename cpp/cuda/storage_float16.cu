#include "backward.h"
#include "forward.h"

namespace batchnorm::cuda {
template void forward<Float16>(const Forward&, const Call&, const Stream&, const char*);
template void backward<Float16>(const Backward&, const Saved::Impl&, const Stream&);
template void moments<Float16>(const ConstTensor&, const Call&, std::span<double>, std::span<double>, int64_t, const Stream&,
                               const Positions&);
}  // namespace batchnorm::cuda
