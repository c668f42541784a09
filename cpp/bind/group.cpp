#include "bind/group.h"

#include <cstring>

namespace batchnorm::bind {
namespace {

// Whether a class of this name is among those of the object: torch.distributed is not imported to ask.
bool is_a(PyObject* object, const char* name) {
    for (const py::handle type : py::reinterpret_borrow<py::tuple>(Py_TYPE(object)->tp_mro)) {
        if (std::strcmp(py::str(type.attr("__name__")).cast<std::string>().c_str(), name) == 0) return true;
    }
    return false;
}

std::vector<double> values_of_rank(py::handle array, py::ssize_t rank) {
    const bool is_array = py::isinstance<py::array>(array);
    const auto any = is_array ? py::reinterpret_borrow<py::array>(array) : py::array();
    if (!is_array || any.ndim() != 1 || any.dtype().kind() != 'f' || any.dtype().itemsize() != sizeof(double)) {
        const std::string dtype = py::str(any.dtype());
        const std::string got = is_array ? say("an array of ", dtype, ", ", any.ndim(), "-dimensional,") : kind_of(array.ptr());
        type_error("group", say("group.allgather returned ", got, " of rank ", rank,
                                ", expected a one-dimensional float64 array, as that rank passed it"));
    }
    const py::array_t<double, py::array::c_style | py::array::forcecast> values(any);  // in this machine's byte order
    return {values.data(), values.data() + values.size()};
}

}  // namespace

PythonGroup::PythonGroup(PyObject* object) {
    if (is_a(object, "ProcessGroup")) {
        type_error("group",
                   "group is a torch.distributed ProcessGroup, whose allgather has other arguments, expected an object with "
                   "allgather(array); use batchnorm.distributed.torch_group(group)");
    }
    if (!py::hasattr(object, "allgather")) {
        type_error("group", say("group is ", kind_of(object),
                                ", expected None or an object with allgather(array): an mpi4py communicator, "
                                "batchnorm.distributed.torch_group() or LocalGroup"));
    }
    allgather_ = py::handle(object).attr("allgather");
    if (PyType_Check(object) != 0 || PyCallable_Check(allgather_.ptr()) == 0) {
        type_error("group", say("group is ", kind_of(object), ", expected an instance whose allgather(array) can be called"));
    }
}

std::vector<std::vector<double>> PythonGroup::allgather(std::span<const double> mine) {
    const py::gil_scoped_acquire gil;
    // An array of its own each time: groups may keep it.
    py::array_t<double> sent(static_cast<py::ssize_t>(mine.size()), mine.data());
    const py::object all = allgather_(sent);
    if (PySequence_Check(all.ptr()) == 0) {
        type_error("group", say("group.allgather returned ", kind_of(all.ptr()), ", expected a list of arrays, one of each rank"));
    }
    std::vector<std::vector<double>> values;
    for (const py::handle array : py::reinterpret_borrow<py::sequence>(all)) {
        values.push_back(values_of_rank(array, static_cast<py::ssize_t>(values.size())));
    }
    return values;
}

void PythonGroup::tell(const std::string& message) noexcept {
    try {
        fail(*this, message);
    } catch (...) {  // its own exception says more
    }
}

}  // namespace batchnorm::bind
