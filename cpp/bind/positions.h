// Which positions count, and how often: mask, lengths and weights as the core takes them. Their shapes are read by rank, never by size
// (docs: the rank of x, of x without its channel axes, or one axis for the samples). Used by operations.cpp; looks at no tensor's values.
#pragma once

#include <memory>

#include "bind/tensors.h"

namespace batchnorm::bind {

class PositionArguments {
public:
    // Checks kinds and shapes.
    PositionArguments(const Arguments& a, const Subject& s);
    // A mask that may differ from channel to channel is one of the tensors. Before Tensors::see.
    void add_to(Tensors& tensors, Positions& to) const;
    // The others in the order of x's memory; they live as long as this. After Tensors::see.
    void flatten(const Layout& layout, Positions& to);
    // Whether any element is left out.
    bool exclude() const { return mask_ || steps_axis_ >= 0; }
    // Moves an index of x to one that counts, near it; false if there is none near.
    bool find_counting(py::ssize_t* index) const;
    // Where a value of the flat weights stands in the caller's.
    std::string weights_index(std::int64_t i) const;

private:
    // An array over x's axes: the step in bytes along each, 0 where one value serves the whole axis.
    struct Spread {
        Array array;
        std::array<py::ssize_t, kMaxDims> steps;
        bool by_channel = false;
        explicit operator bool() const { return array.object != nullptr; }
    };
    template <class T>
    struct Buffer {
        std::array<T, 512 / sizeof(T)> small;
        std::unique_ptr<T[]> large;
        T* of(std::int64_t n);
        const T* data() const { return large ? large.get() : small.data(); }
    };

    void spread(Spread& to, const Array& given, const char* name);
    [[noreturn]] void explain_shape(const Array& given, const char* name) const;
    void set_mask(PyObject* value);
    void set_weights(PyObject* value);
    void set_lengths(PyObject* value, PyObject* axis);
    void set_steps(PyObject* lengths, int axis);
    int steps_axis(PyObject* axis) const;
    template <class T, class From>
    std::span<const T> flat(const Spread& values, const Layout& layout, Buffer<T>& buffer);
    std::span<const std::uint8_t> flat_lengths(const Layout& layout);
    // Axes in memory order up to the last of those that `varies`; the values behind stand for many positions each.
    template <class Varies>
    std::span<const std::int8_t> leading(const Layout& layout, Varies varies) const;

    const Subject& subject_;
    Spread mask_, weights_;
    int steps_axis_ = -1;  // of lengths; -1 without
    Layout layout_;
    Buffer<std::int64_t> lengths_;
    Buffer<std::uint8_t> bytes_;
    Buffer<double> doubles_;
    Owned owned_;
};

}  // namespace batchnorm::bind
