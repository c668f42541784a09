// The tensors of one call: their checks against x, the arrays made for them, and their common view. Used by operations.cpp.
#pragma once

#include "bind/arguments.h"

namespace batchnorm::bind {

// The tensors of one call and their common view: x, then those that are written, then those that are read. What has no view together
// with the others is copied if it is read, in the order of x's memory; outputs are never.
class Tensors {
public:
    Tensors(const Subject& s, const char* name, ConstTensor& view) : subject_(s) { add(s.x, name, {&view, nullptr}); }
    ~Tensors();
    Tensors(const Tensors&) = delete;

    // x and its result are of different types, and the result has its channels on axis `to`.
    void image(PyObject* dtype, int to);
    // An output: `out`, or if it is None, a new array.
    void write(const char* name, PyObject* out, Tensor& view);
    // A tensor of x's shape and type, or those of an image's result.
    void read(const char* name, PyObject* value, ConstTensor& view);
    // Elements that count: x's shape, any strides.
    void mask(const Array& elements, ConstTensor& view);

    // Finds the view. `samples_first`: the samples must be the slowest axis of `outer`; `as_before`: x must lie in memory like this.
    void see(bool samples_first, const Layout* as_before = nullptr, bool any_cut = false);
    const Layout& layout() const { return layout_; }
    // After the call: the array of an output, the caller's or a new one in the memory order of x. i counts from 1.
    py::object result(std::size_t i) const;

private:
    enum class Role { x, fresh, given, read, mask };
    struct Item {
        Array array;
        const char* name;
        Role role;
        PyObject* owned;
        // An image's result, seen in the order of x's axes.
        std::array<py::ssize_t, kMaxDims> shape, strides;
    };
    Item& add(const Array& array, const char* name, Place place, Role role = Role::x);
    bool moved(const Item& item) const { return from_ != to_ && item.role != Role::x && item.role != Role::mask; }
    void move(Item& item);
    void check_output(const Array& out, const char* name) const;
    bool together(std::size_t n);
    bool x_fits(const Array& x, std::size_t n);
    void settle();
    void settle_x();
    bool settle_x(std::size_t n);
    [[noreturn]] static void refuse_overlap(const Item& out, const Item& other);
    void refuse_reordered(const Item& out) const;
    void refuse_shared(const Item& read) const;
    [[noreturn]] void refuse_strides(const Item& out) const;
    void replace(Item& item, py::object by);
    void make(Item& item);
    py::object copy_of_x(std::span<const int> order) const;
    std::vector<int> memory_order(const Array& a) const;
    std::vector<int> whole_order() const;
    std::string wanted_shape() const;

    const Subject& subject_;
    std::array<Item, kMaxTogether> items_;
    std::array<const Array*, kMaxTogether> arrays_;
    std::array<Place, kMaxTogether> places_;
    std::size_t n_ = 0;
    Layout layout_;
    Views kind_ = Views::alike;
    PyObject* result_dtype_ = nullptr;  // of an image; borrowed
    int from_ = 0, to_ = 0;
    bool samples_first_ = false, any_cut_ = false, reordered_ = false;  // reordered: x was copied to another order of axes
    const Layout* as_before_ = nullptr;
};

}  // namespace batchnorm::bind
