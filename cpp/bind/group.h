// A group of processes as Python has it, an object with allgather(array), as the core's Group. Used by operations.cpp.
#pragma once

#include "bind/arguments.h"

namespace batchnorm::bind {

class PythonGroup final : public Group {
public:
    // TypeError for what has no allgather, or one that is called in another way.
    explicit PythonGroup(PyObject* object);

    // Takes the GIL for it. What Python raises goes through the core as py::error_already_set.
    std::vector<std::vector<double>> allgather(std::span<const double> mine) override;

    // Runs f. If that throws while the others wait for this process, and not in the core, which tells them itself, they learn why.
    template <class F>
    py::object told(const F& f) {
        try {
            return f();
        } catch (py::error_already_set& e) {
            if (awaited_) tell(py::str(e.value()));
            throw;
        } catch (const std::exception& e) {
            if (awaited_) tell(e.what());
            throw;
        }
    }
    // Whether the others come to an exchange in this call.
    void expect(bool exchanges) { awaited_ = exchanges; }
    void enter() { awaited_ = false; }
    void tell(const std::string& message) noexcept;

private:
    py::object allgather_;
    bool awaited_ = false;
};

}  // namespace batchnorm::bind
