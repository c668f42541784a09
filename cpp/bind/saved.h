// batchnorm.Saved: what a forward pass leaves for backward, as a Python object. It holds the core's Saved and, unless keep is None, the
// tensor that backward reads again, whose overwriting it notices. Made and read by operations.cpp.
#pragma once

#include "bind/positions.h"

namespace batchnorm::bind {

enum class Keeps : std::uint8_t { nothing, x, y };

// The bytes of some elements of an array, to notice that it was overwritten. Elements that do not count may be.
class Fingerprint {
public:
    void take(const Array& a, const PositionArguments& positions);
    bool matches(const Array& a) const;

private:
    static constexpr std::uint64_t kSamples = 16;
    std::uint64_t n_ = 0;
    std::int64_t size_ = 0;                       // of an element
    std::array<std::int64_t, kSamples> offsets_;  // in bytes
    std::array<std::uint64_t, kSamples> bytes_;   // of a GPU: its change_mark
};

// A copy of gamma or beta in the object's own memory.
struct Parameter {
    bool present = false, is_double = false;
    std::int64_t rows = -1;  // -1: one row for all
    std::size_t word = 0;    // where it starts
};

// The part that CPython reads and writes.
struct SavedHead {
    PyObject_VAR_HEAD PyObject *dict, *weakrefs;
    PyObject* owner;   // the layer that made it, or None
    long long serial;  // its number among those
    char shares;       // whether dx needs the other processes of the group
};

struct SavedObject : SavedHead {
    PyObject* tensor;    // what `keeps` says; nullptr if there is none, or no more
    PyObject* residual;  // the forward's, if backward reads it
    PyObject* group;     // the forward's processes, or nullptr
    const char* lost;    // why there is no tensor, if there was to be one
    const char* lost_residual;
    std::unique_ptr<std::pmr::memory_resource> memory;  // of a GPU
    batchnorm::Saved saved;
    Fingerprint mark, residual_mark;
    ChannelAxes where;
    Layout layout;  // how x lay in memory, or its copy, when the forward read it
    Dtype dtype;
    int ndim;
    Keeps keeps;
    bool has_residual, has_parts;
    Activation activation;
    double slope, eps;  // eps NaN: not known
    Parameter gamma, beta;

    // Its shape, then gamma and beta.
    std::int64_t* words() { return reinterpret_cast<std::int64_t*>(this + 1); }
    std::span<const py::ssize_t> shape() { return {reinterpret_cast<const py::ssize_t*>(words()), static_cast<std::size_t>(ndim)}; }
};

// One for a forward of these arguments; empty until the core has filled it.
py::object new_saved(const Subject& s, const Forward& call);
// TypeError for anything else.
SavedObject& saved_of(PyObject* value, const char* function);
// A new reference to what is kept, or a null object.
py::object kept_tensor(SavedObject& s);
py::object kept_residual(SavedObject& s);
// Notes that an output was written over the tensor, or the residual.
void lose_tensor(SavedObject& s, const char* why);
void lose_residual(SavedObject& s, const char* why);

// The type, made once, at import.
PyObject* make_saved_type();

}  // namespace batchnorm::bind
