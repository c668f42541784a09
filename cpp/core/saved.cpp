// The public face of Saved.
#include "saved.h"

#include <utility>

namespace batchnorm {

Group::~Group() = default;

Saved::Saved() : Saved(std::pmr::get_default_resource()) {}
Saved::Saved(std::pmr::memory_resource* memory) : memory_(memory) {}
Saved::~Saved() = default;
Saved::Saved(Saved&& other) noexcept : impl_(std::move(other.impl_)), memory_(other.memory_) {}
Saved& Saved::operator=(Saved&& other) noexcept {
    impl_ = std::move(other.impl_);
    memory_ = other.memory_;
    return *this;
}

bool Saved::empty() const noexcept { return impl_ == nullptr || !impl_->full; }
void Saved::clear() noexcept {
    if (impl_ != nullptr) impl_->full = false;
}
std::size_t Saved::bytes() const noexcept { return impl_ == nullptr ? 0 : sizeof(Impl) + impl_->block.size() + impl_->lost_block.size(); }
std::int64_t Saved::parts() const noexcept { return empty() ? 0 : impl_->parts.count; }
std::int64_t Saved::channels() const noexcept { return empty() ? 0 : impl_->geometry.channels; }
bool Saved::updated() const noexcept { return !empty() && impl_->updated; }
bool Saved::reads_residual() const noexcept { return !empty() && impl_->reads_residual(); }

namespace {

std::span<const double> per_channel(const Saved::Impl* s, double* Saved::Impl::* values) {
    if (s == nullptr || !s->full || s->*values == nullptr) return {};
    return {s->*values, index(s->parts.count * s->geometry.channels)};
}

}  // namespace

std::span<const double> Saved::mean() const noexcept { return per_channel(get(), &Impl::mean); }
std::span<const double> Saved::var() const noexcept { return per_channel(get(), &Impl::var); }
std::span<const double> Saved::inv_std() const noexcept { return per_channel(get(), &Impl::inv_std); }
std::span<const double> Saved::count() const noexcept { return per_channel(get(), &Impl::count); }
std::span<const double> Saved::values() const noexcept { return per_channel(get(), &Impl::values); }
std::span<const double> Saved::r() const noexcept { return per_channel(get(), &Impl::r); }
std::span<const double> Saved::d() const noexcept { return per_channel(get(), &Impl::d); }
std::span<const std::int64_t> Saved::kept_channels() const noexcept { return empty() ? std::span<const std::int64_t>() : impl_->lost; }

inline namespace v0_2 {
Saved::Impl& prepared(Saved& saved) {
    if (saved.impl_ == nullptr) saved.impl_ = std::make_unique<Saved::Impl>(saved.memory_);
    saved.impl_->full = false;
    return *saved.impl_;
}
}  // namespace v0_2

}  // namespace batchnorm
