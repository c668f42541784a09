#include "backward.h"
#include "forward.h"

namespace batchnorm::cuda {
template void forward<float>(const Forward&, const Call&, const Stream&, const char*);
template void backward<float>(const Backward&, const Saved::Impl&, const Stream&);
template void moments<float>(const ConstTensor&, const Call&, std::span<double>, std::span<double>, int64_t, const Stream&,
                             const Positions&);
}  // namespace batchnorm::cuda
