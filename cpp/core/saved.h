// What a Saved holds. Filled by forward.cpp, read by backward.cpp and second_order.cpp.
#pragma once

#include "call.h"

namespace batchnorm {

// One value per channel in some rows, as doubles. Null data: absent.
struct SavedRows {
    double* data = nullptr;
    int64_t rows = 0;  // 0: one row for all

    explicit operator bool() const { return data != nullptr; }
    const double* row(int64_t sample, int64_t channels) const { return data + (rows == 0 ? 0 : sample * channels); }
    ConstRows view(int64_t channels) const { return {ConstChannels(data, true, data == nullptr ? -1 : channels, 1), rows, channels}; }
};

// Memory that is used again as long as it is large enough; uninitialized.
class Block64 {
public:
    explicit Block64(std::pmr::memory_resource* memory) : memory_(memory) {}
    Block64(const Block64&) = delete;
    Block64& operator=(const Block64&) = delete;
    ~Block64() { release(); }
    std::byte* take(std::size_t bytes) {
        if (bytes > size_) {
            release();
            data_ = static_cast<std::byte*>(memory_->allocate(bytes, 64));
            size_ = bytes;
        }
        return data_;
    }
    std::size_t size() const { return size_; }

private:
    void release() {
        if (data_ != nullptr) memory_->deallocate(data_, size_, 64);
        data_ = nullptr;
        size_ = 0;
    }
    std::pmr::memory_resource* memory_;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

struct Saved::Impl {
    explicit Impl(std::pmr::memory_resource* memory) : block(memory), lost_block(memory) {}

    bool full = false;

    Geometry geometry{};
    Parts parts{};
    int64_t group_outer = 0, sample_outer = 0;
    double scale = 0;   // of the weights, if ranks of a group agreed on one
    bool batch = true;  // the statistics are the batch's own
    Keep keep = Keep::x;
    double slope = 0;
    Activation activation = Activation::none;
    bool has_residual = false;
    bool updated = false;
    bool device = false;  // what the pointers below point to is a GPU's

    // parts * channels each; r and d are null without renormalisation. values: how many count, whatever their weights.
    double *mean = nullptr, *var = nullptr, *inv_std = nullptr, *count = nullptr, *values = nullptr, *r = nullptr, *d = nullptr;
    SavedRows gamma{}, beta{};
    // The forward's positions. element_bits and bits in BitLayout; bits tell where a piecewise linear activation was on.
    std::span<const std::uint8_t> mask{};
    std::span<const double> weights{};
    std::uint8_t *element_bits = nullptr, *bits = nullptr;
    // With Keep::y: the channels that y does not tell, and their x, (outer, lost, inner) in the direction of x without gaps.
    std::span<const int64_t> lost{};
    std::byte* lost_x = nullptr;

    // Where all that is.
    Block64 block, lost_block;

    // The forward's call as tensors of backward see it: rows (nsc) may be cut into outer and inner elsewhere, as their gaps demand.
    Call call(const ConstTensor& kept) const {
        Call c{geometry, parts, group_outer, {}, sample_outer};
        if (!other_rows(kept)) return c;
        const auto rows = [&](int64_t outer) { return outer * geometry.inner / kept.inner; };
        c.geometry.outer = c.parts.outer = kept.outer;
        c.geometry.inner = kept.inner;
        c.parts.rows = rows(parts.rows);
        c.group_outer = rows(group_outer);
        c.sample_outer = rows(sample_outer);
        return c;
    }
    bool other_rows(const ConstTensor& v) const {
        if (geometry.direction != kernels::nsc || v.inner < 1 || v.inner == geometry.inner) return false;
        if (geometry.count() % v.inner != 0 || v.outer != geometry.count() / v.inner) return false;
        const auto whole = [&](int64_t outer) { return outer * geometry.inner % v.inner == 0; };
        return whole(parts.rows) && whole(group_outer) && whole(sample_outer);
    }
    bool reads_residual() const { return has_residual && activation != Activation::none && bits == nullptr; }
    ConstTensor lost_tensor(const Geometry& g) const;
};

// A compact tensor of some channels, in the direction of g.
template <class Any>
Any compact(const Geometry& g, int64_t channels, decltype(Any::data) data) {
    Any t;
    t.data = data;
    t.dtype = g.dtype;
    t.outer = g.outer;
    t.channels = channels;
    t.inner = g.inner;
    t.outer_stride = channels * g.inner;
    t.channel_stride = g.direction == kernels::ncs ? g.inner : 1;
    t.inner_stride = g.direction == kernels::ncs ? 1 : channels;
    return t;
}
inline ConstTensor Saved::Impl::lost_tensor(const Geometry& g) const {
    return compact<ConstTensor>(g, static_cast<int64_t>(lost.size()), lost_x);
}

template <class F>
void each_element(const ConstTensor& v, const F& f) {
    for (int64_t o = 0; o < v.outer; ++o) {
        for (int64_t i = 0; i < v.inner; ++i) f(o, i);
    }
}
inline const std::byte* element(const ConstTensor& v, int64_t o, int64_t c, int64_t i) {
    return static_cast<const std::byte*>(v.data) + (o * v.outer_stride + c * v.channel_stride + i * v.inner_stride) * element_size(v.dtype);
}
// Some channels of `from`, side by side; and back to where they belong. Both tensors have the same outer and inner.
inline void copy_channels(const ConstTensor& from, std::span<const int64_t> channels, const Tensor& to, bool back = false) {
    const std::size_t size = index(element_size(to.dtype));
    for (std::size_t k = 0; k < channels.size(); ++k) {
        const auto c = static_cast<int64_t>(k);
        each_element(from, [&](int64_t o, int64_t i) {
            const auto* const source = back ? element(from, o, c, i) : element(from, o, channels[k], i);
            auto* const target = const_cast<std::byte*>(back ? element(to, o, channels[k], i) : element(to, o, c, i));
            std::memcpy(target, source, size);
        });
    }
}

// Cuts arrays out of one block of memory: asked twice in the same order, first for the size, then for the places.
class Cutter {
public:
    explicit Cutter(std::byte* base) : base_(base) {}
    template <class T>
    T* take(int64_t n) {
        T* const p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += (index(n) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
    std::size_t used() const { return used_; }

private:
    std::byte* base_;
    std::size_t used_ = 0;
};

// Places in `cut` for what a forward makes; with `keep` also for what backward needs besides. And what is known of it without its data.
void lay_out(Cutter& cut, const Forward& f, const Call& call, bool keep, Saved::Impl& s);
void describe(const Forward& f, const Call& call, Saved::Impl& s);

}  // namespace batchnorm
