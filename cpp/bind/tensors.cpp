#include "bind/tensors.h"

#include <numeric>

namespace batchnorm::bind {
namespace {

std::string strides_text(const Array& a) { return shape_text({a.strides, static_cast<std::size_t>(a.ndim)}); }

// Whether several elements are one: some stride does not step over all that the smaller ones reach.
bool repeats_elements(const Array& a) {
    if (a.contiguous || a.size() == 0) return false;
    std::vector<std::pair<py::ssize_t, py::ssize_t>> axes;
    for (int i = 0; i < a.ndim; ++i) {
        if (a.shape[i] > 1) axes.emplace_back(std::abs(a.strides[i]), a.shape[i]);
    }
    std::sort(axes.begin(), axes.end());
    py::ssize_t extent = 0;
    for (const auto& [stride, n] : axes) {
        if (stride <= extent) return true;
        extent += stride * (n - 1);
    }
    return false;
}

bool is_same(const Array& a, const Array& b) { return a.data == b.data && std::equal(a.strides, a.strides + a.ndim, b.strides); }

// Whether two arrays have an element in common; undecided counts as yes.
bool share_memory(PyObject* a, PyObject* b) {
    try {
        return py::module_::import("numpy").attr("shares_memory")(py::handle(a), py::handle(b), 100'000).cast<bool>();
    } catch (py::error_already_set&) {
        return true;
    }
}

// Axis `i` of x in a result whose channels are moved from axis `from` to axis `to`, as numpy.moveaxis does.
int moved_axis(int i, int from, int to) {
    if (i == from) return to;
    const int other = i < from ? i : i - 1;
    return other < to ? other : other + 1;
}

}  // namespace

Tensors::~Tensors() {
    for (std::size_t i = 0; i < n_; ++i) Py_XDECREF(items_[i].owned);
}

Tensors::Item& Tensors::add(const Array& array, const char* name, Place place, Role role) {
    Item& item = items_[n_];
    item.array = array;
    item.name = name;
    item.role = role;
    item.owned = nullptr;
    arrays_[n_] = &item.array;
    places_[n_] = place;
    ++n_;
    return item;
}

void Tensors::image(PyObject* dtype, int to) {
    kind_ = Views::image;
    result_dtype_ = dtype;
    from_ = subject_.where.first();
    to_ = to;
}

// An image's result as if its channels were where x has them.
void Tensors::move(Item& item) {
    if (!moved(item)) return;
    for (int i = 0; i < item.array.ndim; ++i) {
        item.shape[i] = item.array.shape[moved_axis(i, from_, to_)];
        item.strides[i] = item.array.strides[moved_axis(i, from_, to_)];
    }
    item.array.shape = item.shape.data();
    item.array.strides = item.strides.data();
    item.array.contiguous = false;
}

std::string Tensors::wanted_shape() const {
    std::vector<py::ssize_t> shape(static_cast<std::size_t>(subject_.x.ndim));
    for (int i = 0; i < subject_.x.ndim; ++i) shape[moved_axis(i, from_, to_)] = subject_.x.shape[i];
    return shape_text(shape) + " as x has" + (from_ == to_ ? "" : say(" with the channels on axis ", to_));
}

// The array of a fresh output.
void Tensors::make(Item& item) {
    const Array& x = items_[0].array;
    py::object made;
    if (kind_ == Views::alike || from_ == to_) {
        made = new_like(x, result_dtype_);
    } else {
        std::array<py::ssize_t, kMaxDims> shape;
        for (int i = 0; i < x.ndim; ++i) shape[moved_axis(i, from_, to_)] = x.shape[i];
        made = new_array({shape.data(), static_cast<std::size_t>(x.ndim)}, result_dtype_);
    }
    replace(item, std::move(made));
}

void Tensors::replace(Item& item, py::object by) {
    const bool loose = item.array.loose;
    Py_XDECREF(item.owned);
    item.owned = by.release().ptr();
    if (loose) {
        item.array = shape_of(item.owned);  // of bool, which is no storage type
        item.array.dtype = Dtype::uint8;
        item.array.loose = true;
    } else {
        item.array = *as_array(item.owned, Kinds::any);
    }
    move(item);
}

void Tensors::check_output(const Array& out, const char* name) const {
    const auto fail = [&](const std::string& what) { value_error(name, name + what); };
    if (!out.writable) fail(say(" is read-only, expected a writable array of shape ", wanted_shape()));
    if (repeats_elements(out)) {
        fail(say(" has strides ", strides_text(out), " for shape ", shape_text(out),
                 ", so that several of its elements are one, expected a writable array of separate elements"));
    }
    if (!out.direct) fail(" is not aligned to its element size, expected an aligned array");
}

void Tensors::write(const char* name, PyObject* out, Tensor& view) {
    if (out == Py_None) {
        Item& item = add({}, name, {nullptr, &view}, Role::fresh);
        item.array.loose = false;
        return make(item);
    }
    const std::optional<Array> found = known_array(out);
    if (!found && (!is_ndarray(out) || is_masked(out))) {
        type_error(name, say(name, is_ndarray(out) ? " is a masked array" : " is " + kind_of(out),
                             ", expected a writable ndarray of shape ", wanted_shape()));
    }
    const bool image = kind_ == Views::image;
    const Dtype wanted = image ? *storage_type(py::detail::array_descriptor_proxy(result_dtype_)->type_num) : subject_.x.dtype;
    if (!found || found->dtype != wanted) {
        const std::string expected = py::str(dtype_of(wanted));
        type_error(name,
                   say(name, " has dtype ", dtype_text(out), ", expected ", expected, image ? ", dtype= of the result" : " as x has"));
    }
    Item& item = add(*found, name, {nullptr, &view}, Role::given);
    if (found->ndim == subject_.x.ndim) move(item);
    if (!same_shape(item.array, subject_.x)) value_error(name, say(name, " has shape ", shape_text(*found), ", expected ", wanted_shape()));
    check_output(item.array, name);
}

void Tensors::read(const char* name, PyObject* value, ConstTensor& view) {
    const Array a = tensor(value, name);
    const Dtype wanted = kind_ == Views::image ? items_[1].array.dtype : subject_.x.dtype;
    if (a.dtype != wanted) {
        const std::string of = kind_ == Views::image ? "the result" : "x";
        const std::string expected = py::str(dtype_of(wanted));
        type_error(name, say(name, " has dtype ", dtype_text(value), ", expected ", expected, " as ", of, " has; use ", name, ".astype('",
                             expected, "')"));
    }
    Item& item = add(a, name, {&view, nullptr}, Role::read);
    if (a.ndim == subject_.x.ndim) move(item);
    if (!same_shape(item.array, subject_.x)) value_error(name, say(name, " has shape ", shape_text(a), ", expected ", wanted_shape()));
}

void Tensors::mask(const Array& elements, ConstTensor& view) { add(elements, "mask", {&view, nullptr}, Role::mask); }

// Whether the first n have a common view, and x's is as it must be.
bool Tensors::together(std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        if (!items_[i].array.direct) return false;
    }
    if (!CommonView({arrays_.data(), n}, {places_.data(), n}, subject_.where).find(layout_, kind_)) return false;
    if (as_before_ != nullptr && !layout_.like(*as_before_)) return false;
    return !samples_first_ || layout_.samples_first(items_[0].array);
}

void Tensors::see(bool samples_first, const Layout* as_before, bool any_cut) {
    samples_first_ = samples_first && items_[0].array.size() != 0;
    any_cut_ = any_cut && samples_first_;
    as_before_ = items_[0].array.size() == 0 ? nullptr : as_before;
    if (!together(n_)) settle();
}

py::object Tensors::result(std::size_t i) const {
    const Item& item = items_[i];
    py::object made = py::reinterpret_borrow<py::object>(item.array.object);
    if (!reordered_ || item.role != Role::fresh || kind_ == Views::image) return made;
    py::object like_x = new_like(subject_.x);
    copy_into(like_x, made.ptr());
    return like_x;
}

// Axes of an array, slowest first.
std::vector<int> Tensors::memory_order(const Array& a) const {
    std::vector<int> order(static_cast<std::size_t>(a.ndim));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return std::abs(a.strides[i]) > std::abs(a.strides[j]); });
    return order;
}

// All axes of x in an order that has a view: as before, or by index with the channel axes behind each other.
std::vector<int> Tensors::whole_order() const {
    const ChannelAxes& where = subject_.where;
    std::vector<int> order;
    if (as_before_ != nullptr) {
        order.assign(as_before_->axes.begin(), as_before_->axes.begin() + as_before_->outer);
    } else {
        for (int i = 0; i < where.first(); ++i) order.push_back(i);
    }
    order.insert(order.end(), where.axes.begin(), where.axes.begin() + where.n);
    if (as_before_ != nullptr) {
        order.insert(order.end(), as_before_->axes.begin() + as_before_->outer, as_before_->axes.begin() + as_before_->n);
    }
    for (int i = 0; i < subject_.x.ndim; ++i) {
        if (std::find(order.begin(), order.end(), i) == order.end()) order.push_back(i);
    }
    return order;
}

namespace {

// Strides in bytes of an array without gaps whose axes lie in this order.
void fill_strides(const Array& like, std::span<const int> order, std::int64_t size, std::array<py::ssize_t, kMaxDims>& strides) {
    py::ssize_t step = size;
    for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
        strides[*axis] = step;
        step *= like.shape[*axis];
    }
}

}  // namespace

py::object Tensors::copy_of_x(std::span<const int> order) const {
    const Array& x = subject_.x;
    std::array<py::ssize_t, kMaxDims> strides;
    fill_strides(x, order, x.element_size(), strides);
    py::object copy = new_array({x.shape, static_cast<std::size_t>(x.ndim)}, dtype_of(x.dtype), strides.data());
    copy_into(copy, x.object);
    return copy;
}

// Whether an x that lies like this would do, with as many of the tensors.
bool Tensors::x_fits(const Array& x, std::size_t n) {
    const Array* const before = arrays_[0];
    arrays_[0] = &x;
    const bool direct = items_[0].array.direct;
    items_[0].array.direct = x.direct;
    const bool fits = together(n);
    items_[0].array.direct = direct;
    arrays_[0] = before;
    return fits;
}

// Copies x where it has no view: in its own order, if that helps. An image's result that is not made like x decides too how x is read, and
// so does an out= with a group, if it can.
void Tensors::settle_x() {
    const bool with_result = kind_ == Views::image && (items_[1].role == Role::given || from_ != to_);
    if (any_cut_ && n_ > 1 && items_[1].role == Role::given && settle_x(2)) return;
    settle_x(with_result ? 2 : 1);
}

// Whether there is a view with as many of the tensors now.
bool Tensors::settle_x(std::size_t n) {
    if (x_fits(subject_.x, n)) return true;
    std::vector<std::vector<int>> orders{memory_order(subject_.x)};
    if (any_cut_ && as_before_ == nullptr) {  // as a single sample lies, which needs no copy
        orders.push_back(orders[0]);
        std::stable_partition(orders[1].begin(), orders[1].end(), [](int axis) { return axis == 0; });
    }
    orders.push_back(whole_order());
    if (kind_ == Views::image) orders.push_back(memory_order(items_[1].array));
    for (const auto& order : orders) {
        Array copy = subject_.x;
        std::array<py::ssize_t, kMaxDims> strides;
        fill_strides(copy, order, copy.element_size(), strides);
        copy.strides = strides.data();
        copy.direct = true;
        copy.contiguous = false;
        if (!x_fits(copy, n)) continue;
        refuse_shared(items_[0]);
        replace(items_[0], copy_of_x(order));
        reordered_ = order != orders[0];
        for (std::size_t i = 1; i < n_; ++i) {
            if (items_[i].role == Role::fresh) make(items_[i]);
        }
        return true;
    }
    return false;
}

void Tensors::refuse_overlap(const Item& out, const Item& other) {
    value_error(out.name, say(out.name, " overlaps ", other.name, " without being the same array, expected ", other.name,
                              " itself (in place) or a separate array"));
}

// An output that takes another's place in another order.
void Tensors::refuse_reordered(const Item& out) const {
    const auto range = [](const Array& a) {
        const char *low = static_cast<const char*>(a.data), *high = low + a.element_size();
        for (int i = 0; i < a.ndim; ++i) (a.strides[i] < 0 ? low : high) += (a.shape[i] - 1) * a.strides[i];
        return std::pair(low, high);
    };
    const auto [low, high] = range(out.array);
    for (std::size_t i = 0; i < n_; ++i) {
        const Item& other = items_[i];
        const auto [other_low, other_high] = range(other.array);
        if (&other == &out || other.role == Role::fresh || is_same(out.array, other.array)) continue;
        if (low < other_high && other_low < high) refuse_overlap(out, other);
    }
}

// A tensor that is to be copied because of its memory is safe from any output then, but as little overlap is meant as without the copy.
void Tensors::refuse_shared(const Item& read) const {
    for (std::size_t i = 1; i < n_; ++i) {
        const Item& out = items_[i];
        if (out.role != Role::given) continue;
        if (is_same(out.array, read.array) || !share_memory(out.array.object, read.array.object)) continue;
        refuse_overlap(out, read);
    }
}

void Tensors::refuse_strides(const Item& out) const {
    const Array original = out.role == Role::given ? shape_of(out.array.object) : out.array;
    bool by_sample = false;
    for (int i = 1; i < out.array.ndim; ++i) {
        by_sample |= samples_first_ && items_[0].owned != nullptr && out.array.shape[i] > 1 &&
                     std::abs(out.array.strides[i]) > std::abs(out.array.strides[0]);
    }
    const std::string why =
        by_sample ? ", whose samples, axis 0, are not the slowest in memory, as parts and a gamma or beta of each sample need"
                  : ", which cannot be written in one pass over memory together with x of strides " + strides_text(subject_.x);
    std::string use = by_sample ? "numpy.empty(x.shape, x.dtype)" : "numpy.empty_like(x)";
    if (kind_ == Views::image) {
        const std::string dtype = py::str(dtype_of(original.dtype));
        use = say("numpy.empty(", shape_text(original), ", '", dtype, "')");
    }
    value_error(out.name, say(out.name, " has strides ", strides_text(original), " for shape ", shape_text(original), why, " (channel ",
                              subject_.axes(), "); use ", use, ", or leave ", out.name, "= away and assign, ", out.name, "[...] = result"));
}

// Makes the tensors have a common view, x leading, in the order in which they were added.
void Tensors::settle() {
    settle_x();
    for (std::size_t i = 1; i < n_; ++i) {
        Item& item = items_[i];
        if (together(i + 1)) continue;
        if (item.role == Role::read || item.role == Role::mask) {
            const Array& model = kind_ == Views::image && item.role == Role::read ? items_[1].array : items_[0].array;
            PyObject* const from = item.array.object;
            py::object copy = item.role == Role::mask ? new_like(model, py::dtype("?").ptr()) : new_like(model);
            copy_into(copy, from);
            refuse_shared(item);
            replace(item, std::move(copy));
            if (together(i + 1)) continue;
        }
        refuse_reordered(item);
        refuse_strides(item);
    }
    if (!together(n_)) value_error("x", say("x has strides ", strides_text(subject_.x), ", which cannot be read; use x.copy()"));
}

}  // namespace batchnorm::bind
