// Saved: what it holds, whose memory, and what it is after calls that fail.
#include <type_traits>
#include <utility>

#include "example.h"

namespace test {
namespace {

static_assert(std::is_nothrow_move_constructible_v<Saved> && std::is_nothrow_move_assignable_v<Saved>);
static_assert(!std::is_copy_constructible_v<Saved> && !std::is_copy_assignable_v<Saved>);
static_assert(std::is_default_constructible_v<Backward> && std::is_default_constructible_v<DoubleBackward>);

// Counts, and refuses once `left` allocations have been made.
class Counting : public std::pmr::memory_resource {
public:
    int64_t made = 0, held = 0, left = 1'000'000;

private:
    void* do_allocate(size_t bytes, size_t alignment) override {
        if (left-- == 0) throw std::bad_alloc();
        ++made;
        held += static_cast<int64_t>(bytes);
        return std::pmr::new_delete_resource()->allocate(bytes, alignment);
    }
    void do_deallocate(void* p, size_t bytes, size_t alignment) override {
        held -= static_cast<int64_t>(bytes);
        std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
    }
    bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

Floats gradient(Example& e, const Saved& saved) {
    Backward b = e.back();
    b.saved = &saved;
    batch_norm_backward(b);
    return e.dx;
}
// A forward of n samples.
void fill(Saved& saved, int64_t n) {
    Example e;
    Forward f = e.all(saved);
    for (ConstTensor* const v : {&f.x, &f.residual}) v->outer = n;
    f.y.outer = n;
    f.positions = {};
    batch_norm_train(f);
}

TEST(saved_says_what_it_holds) {
    Example e;
    Saved& saved = e.saved;
    CHECK(saved.empty() && saved.parts() == 0 && saved.channels() == 0 && saved.bytes() == 0 && saved.mean().empty() && !saved.updated());
    saved.clear();
    Forward f = e.all(saved);
    batch_norm_train(f);
    CHECK(!saved.empty() && saved.parts() == 2 && saved.channels() == 3 && saved.updated() && !saved.reads_residual());
    for (const auto& v : {saved.mean(), saved.var(), saved.inv_std(), saved.count(), saved.r(), saved.d()}) CHECK(v.size() == 6);
    CHECK(saved.kept_channels().empty() && saved.count()[0] == 14);
    f.renorm.enabled = false, f.running = {}, f.part_outer = 0, f.activation = Activation::tanh;
    batch_norm_train(f);
    CHECK(saved.parts() == 1 && saved.r().empty() && saved.d().empty() && !saved.updated() && saved.reads_residual());
    f.residual = {}, f.activation = Activation::none, f.keep = Keep::y;
    e.gamma[1] = 0;
    batch_norm_train(f);
    CHECK(saved.kept_channels().size() == 1 && saved.kept_channels()[0] == 1);
    const size_t bytes = saved.bytes();
    saved.clear();
    CHECK(saved.empty() && saved.parts() == 0 && saved.inv_std().empty() && saved.kept_channels().empty() && saved.bytes() == bytes);
    // Made of statistics it has no bits: with a residual and an activation backward asks for it.
    f = e.saving();
    f.activation = Activation::relu;
    save(f, e.var, false);
    CHECK(saved.reads_residual() && saved.parts() == 1 && saved.var()[1] == 0.25 && saved.count()[2] == 20);
}

TEST(saved_moves) {
    Example e;
    Saved a;
    batch_norm_train(e.all(a));
    const Floats want = gradient(e, a);
    const double* const mean = a.mean().data();
    Saved b = std::move(a);
    CHECK(a.empty() && a.bytes() == 0 && b.mean().data() == mean && gradient(e, b) == want);  // NOLINT: what is left is empty
    THROWS(Misuse, "saved is empty", gradient(e, a));
    Saved c;
    c = std::move(b);
    CHECK(b.empty() && c.mean().data() == mean && gradient(e, c) == want);  // NOLINT
    batch_norm_train(Example().all(b));                                     // one that was moved from can be filled again
    CHECK(gradient(e, b) == want && gradient(e, c) == want);
    std::swap(b, c);
    CHECK(c.mean().data() != mean && b.mean().data() == mean);
}

TEST(saved_refers_to_nothing_of_the_callers) {
    Example e;
    Saved saved;
    Floats want;
    {
        Example gone;
        batch_norm_train(gone.all(saved));
        want = gradient(gone, saved);
        for (Floats* const v : {&gone.gamma, &gone.beta, &gone.z, &gone.running_mean}) std::fill(v->begin(), v->end(), 100.0f);
        std::fill(gone.weights.begin(), gone.weights.end(), 0.0), std::fill(gone.elements.begin(), gone.elements.end(), 0);
        CHECK(gradient(gone, saved) == want);
    }
    CHECK(gradient(e, saved) == want);
}

TEST(saved_is_filled_again_without_allocating) {
    Counting memory;
    {
        Saved saved(&memory);
        fill(saved, 4);
        const int64_t made = memory.made;
        CHECK(made > 0 && static_cast<int64_t>(saved.bytes()) >= memory.held);
        for (const int64_t samples : {4, 2, 4, 3, 4}) fill(saved, samples);
        CHECK(memory.made == made);
        fill(saved, 8);
        CHECK(memory.made > made);
        // What keeping y adds is in that memory too.
        Example e;
        Forward f = e.all(saved);
        f.keep = Keep::y, f.residual = {}, f.activation = Activation::leaky_relu;
        e.gamma[2] = 0;
        batch_norm_train(f);
        const int64_t before = memory.made;
        batch_norm_train(f);
        CHECK(memory.made == before && saved.kept_channels().size() == 1);
    }
    CHECK(memory.held == 0);
}

TEST(saved_after_calls_that_fail) {
    Counting memory;
    Example e;
    Saved saved(&memory);
    batch_norm_train(e.all(saved));
    const Floats want = gradient(e, saved);
    Forward f = e.all(saved);
    f.eps = -1;
    REFUSED(value, "eps is -1", batch_norm_train(f));
    CHECK(gradient(e, saved) == want);
    f.mean = e.mean;
    REFUSED(type, "inv_std is missing", save(f, {}, true));
    CHECK(gradient(e, saved) == want);
    // Statistics that are refused, and memory that there is not, empty it.
    f = e.all(saved);
    f.running.on_nonfinite = OnNonfinite::raise;
    e.x[1] = kInff;
    const Floats y = e.y, running = e.running_var;
    REFUSED(value, "x holds NaN, Inf or values whose mean or variance the running statistics cannot hold at channel 0",
            batch_norm_train(f));
    CHECK(e.y == y && e.running_var == running && saved.empty());
    fill(saved, 4);
    memory.left = 0;
    THROWS(std::bad_alloc, "", fill(saved, 8));
    CHECK(saved.empty());
    THROWS(Misuse, "saved is empty", gradient(e, saved));
    memory.left = 1000;
    fill(saved, 8);
    CHECK(!saved.empty());
}

}  // namespace
}  // namespace test
