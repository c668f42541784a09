// DLPack (dmlc/dlpack, dlpack.h, version 0.8, which all of its exporters still speak): capsules to what they hold, and back. Used by
// gpu.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace batchnorm::bind {

namespace py = pybind11;

namespace dlpack {

struct Device {
    std::int32_t type, id;
};
struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t *shape, *strides;  // strides in elements; null: without gaps
    std::uint64_t byte_offset;
};
struct Managed {
    Tensor tensor;
    void* context;
    void (*deleter)(Managed*);
};

inline constexpr const char *kFresh = "dltensor", *kUsed = "used_dltensor";

}  // namespace dlpack

// What a capsule holds: its keeper, address, shape, strides in elements, (code, bits), (device type, index).
inline py::tuple read_capsule(const py::capsule& capsule) {
    auto* const managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kFresh));
    if (managed == nullptr) throw py::error_already_set();
    if (PyCapsule_SetName(capsule.ptr(), dlpack::kUsed) != 0) throw py::error_already_set();
    const py::capsule keeper(managed, [](void* p) {
        auto* const m = static_cast<dlpack::Managed*>(p);
        if (m->deleter != nullptr) m->deleter(m);
    });
    const dlpack::Tensor& t = managed->tensor;
    const std::vector<std::int64_t> shape(t.shape, t.shape + t.ndim);
    std::vector<std::int64_t> strides(shape.size());
    std::int64_t step = 1;
    for (std::size_t i = shape.size(); i-- > 0; step *= std::max<std::int64_t>(shape[i], 1)) {
        strides[i] = t.strides != nullptr ? t.strides[i] : step;
    }
    const auto address = t.data == nullptr ? 0 : reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
    return py::make_tuple(keeper, address, shape, strides, py::make_tuple(t.dtype.code, t.dtype.bits),
                          py::make_tuple(t.device.type, t.device.id));
}

// A capsule of an array that `owner` keeps.
inline py::object make_capsule(const py::object& owner, std::uintptr_t pointer, const std::vector<std::int64_t>& shape,
                               const std::vector<std::int64_t>& strides, std::pair<int, int> dtype, std::pair<int, int> device) {
    struct Held {
        dlpack::Managed managed;
        std::vector<std::int64_t> shape, strides;
        py::object owner;
    };
    auto held = std::make_unique<Held>(Held{{}, shape, strides, owner});
    held->managed.tensor = {reinterpret_cast<void*>(pointer),
                            {device.first, device.second},
                            static_cast<std::int32_t>(shape.size()),
                            {static_cast<std::uint8_t>(dtype.first), static_cast<std::uint8_t>(dtype.second), 1},
                            held->shape.data(),
                            held->strides.data(),
                            0};
    held->managed.context = held.get();
    held->managed.deleter = [](dlpack::Managed* m) {
        const py::gil_scoped_acquire acquire;  // consumers delete on any thread
        delete static_cast<Held*>(m->context);
    };
    PyObject* const capsule = PyCapsule_New(&held->managed, dlpack::kFresh, [](PyObject* c) {
        if (PyCapsule_IsValid(c, dlpack::kFresh) == 0) return;  // taken
        auto* const m = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(c, dlpack::kFresh));
        m->deleter(m);
    });
    if (capsule == nullptr) throw py::error_already_set();
    held.release();
    return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace batchnorm::bind
