// The library as a whole: what it says of itself, threads, tuning, interrupts.
#include <cfenv>
#include <chrono>

#include "example.h"

namespace test {
namespace {

TEST(information) {
    CHECK(isa_built().front() == "baseline" && isa_levels().front() == "baseline" && num_threads() == 1);
    const std::string number = version();
    CHECK(!openmp_runtime().empty() && !compiler().empty() && std::count(number.begin(), number.end(), '.') == 2);
    for (const std::string& level : isa_levels()) {
        set_isa(level);
        CHECK(isa() == level && isa_reason() == "set_isa()");
    }
}

TEST(tuning_is_set_by_name) {
    const std::string defaults = tuning();
    CHECK(defaults.starts_with("l2_bytes=") && defaults.find(",parallel_elements=49152") != std::string::npos);
    set_tuning("map_bytes=77,l2_bytes=0");
    const std::string changed = tuning();
    CHECK(changed.starts_with("l2_bytes=0,cached_bytes=") && changed.find(",map_bytes=77,") != std::string::npos);
    set_tuning("");
    CHECK(tuning() == defaults);
    set_tuning(changed);
    CHECK(tuning() == changed);
}

TEST(names_of_any_bytes_leave_the_message_whole) {
    using namespace std::string_literals;
    THROWS(Error, "isa is 'avx?2?', expected one of 'baseline'", set_isa("avx\0002\n"s));
    THROWS(Error, "tuning has 'l2?_bytes', expected one of l2_bytes", set_tuning("l2\000_bytes=1"s));
}

// The caller's mode changes no bit, and is as before afterwards, flags included.
TEST(the_floating_point_mode_is_the_librarys_own) {
    set_tuning("parallel_elements=0");
    const auto results = [](int n_threads, int mode) {
        Example e;
        for (float& v : e.dy) v *= 1e-40f;  // denormals
        Forward f = e.all(e.saved);
        Backward b = e.back();
        f.execution.num_threads = b.execution.num_threads = n_threads;
        std::fesetround(mode);
        batch_norm_train(f);
        batch_norm_backward(b);
        update_running(e.update());
        CHECK(std::fegetround() == mode);
        std::fesetround(FE_TONEAREST);
        return e.bytes();
    };
    for (const int n : {1, 3}) {
        const auto want = results(n, FE_TONEAREST);
        std::feclearexcept(FE_ALL_EXCEPT);
        for (const int mode : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) CHECK(results(n, mode) == want);
        CHECK(std::fetestexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW) == 0);
    }
    set_tuning("");
}

// A number of threads for one call changes neither its result nor the default.
TEST(threads_of_a_call) {
    set_tuning("parallel_elements=0");
    Floats want;
    for (const int n : {0, 1, 2, 3, 7, 100000}) {
        Example e;
        Forward f = e.all(e.saved);
        f.execution.num_threads = n;
        batch_norm_train(f);
        Backward b = e.back();
        b.execution.num_threads = n;
        batch_norm_backward(b);
        if (n == 0) want = e.dx;
        CHECK(e.dx == want && num_threads() == 1);
    }
}

// ---- interrupts: the poll is asked every 50 ms, so that calls are made longer until they are interrupted ----

struct Long {
    std::vector<float16> x, y;
    Floats half = Floats(16, 0.5f), running_mean = half, running_var = half, own_mean = half, own_std = half;
    Saved saved;
    Forward f;

    Long(int64_t outer, bool in_rows) : x(static_cast<size_t>(outer * 1024), float16{0x3c01}), y(x) {
        const auto view = [&](auto& v) { return in_rows ? rows(v, 16) : View<float16>::ncs(v.data(), outer, 16, 64); };
        f.x = view(x), f.y = view(y), f.saved = &saved;
        f.running = {.mean = running_mean, .var = running_var};
        f.renorm = {.enabled = true, .mean = own_mean, .std = own_std, .decay = 0.5};
    }
    bool unchanged() const { return running_mean == half && running_var == half && own_mean == half && own_std == half; }
};

// Whether a call that gets longer and longer is interrupted, by the slowest storage type on the slowest level.
template <class Prepare>
void test_interrupt(bool in_rows, int n_threads, const Prepare& prepare) {
    set_isa("baseline");
    set_num_threads(n_threads);
    for (int64_t outer = 1024; outer <= 1 << 16; outer *= 4) {
        Long l(outer, in_rows);
        prepare(l.f, outer * (in_rows ? 64 : 1));
        set_interrupt_poll(nullptr);
        Forward small = l.f;
        small.x.outer = small.y.outer = 64, small.running = {}, small.renorm = {}, small.part_outer = 0, small.execution.num_threads = 1;
        batch_norm_train(small);
        CHECK(!l.saved.empty());
        set_interrupt_poll([] { return true; });
        try {
            batch_norm_train(l.f);
        } catch (const Interrupted& e) {
            CHECK(std::string_view(e.what()) == "interrupted" && l.unchanged() && l.saved.empty());
            return;
        }
    }
    FAIL("not interrupted");
}

TEST(interrupt) {
    for (const bool in_rows : {false, true}) {
        for (const int n_threads : {1, 2}) test_interrupt(in_rows, n_threads, [](Forward&, int64_t) {});
    }
}

TEST(interrupt_in_the_middle_of_parts) {
    for (const bool in_rows : {false, true}) {
        for (const int64_t parts : {3, 64, 1024}) {
            for (const bool raises : {false, true}) {
                context = (in_rows ? "rows, " : "runs, ") + std::to_string(parts) + " parts" + (raises ? ", raise" : "");
                test_interrupt(in_rows, raises ? 1 : 2, [&](Forward& f, int64_t outer) {
                    f.part_outer = outer / parts;
                    if (raises) f.running.on_nonfinite = OnNonfinite::raise;
                });
            }
        }
    }
}

TEST(interrupted_moments_write_nothing) {
    set_isa("baseline");
    set_interrupt_poll([] { return true; });
    Vector mean(16, 7), var(16, 7), sums(static_cast<size_t>(moment_sums_size(16)), 7);
    const auto until_interrupted = [](const auto& call) {
        for (int64_t outer = 1 << 14; outer <= 1 << 18; outer *= 4) {
            const Long l(outer, false);
            call(l.f.x);
        }
    };
    THROWS(Interrupted, "interrupted", until_interrupted([&](const ConstTensor& x) {
               moments(x, mean, var);
               mean = var = Vector(16, 7);
           }));
    THROWS(Interrupted, "interrupted", until_interrupted([&](const ConstTensor& x) {
               moment_sums(x, sums);
               sums.assign(sums.size(), 7);
           }));
    CHECK(mean == Vector(16, 7) && var == mean && sums == Vector(sums.size(), 7));
}

// A channel is an item by itself there, so that the poll must be asked inside of it; in every thread.
TEST(interrupt_of_double_backward) {
    for (const int64_t channels : {1, 40}) {
        std::vector<double> x(size_t{1} << 21, 1), gradient(x.size()), dgamma(static_cast<size_t>(channels), 7), dbeta = dgamma;
        const auto view = [&](std::vector<double>& v) { return View<double>::ncs(v.data(), 1, channels, (int64_t{1} << 21) / channels); };
        Saved saved;
        set_interrupt_poll(nullptr);
        batch_norm_train({.x = view(x), .y = view(gradient), .activation = Activation::silu, .saved = &saved});
        set_interrupt_poll([] { return true; });
        DoubleBackward d{.dy = view(x), .kept = view(x), .saved = &saved, .ddx = view(x), .ddy = view(gradient)};
        d.dgamma = dgamma, d.dbeta = dbeta, d.execution.num_threads = channels > 1 ? 3 : 1;
        const auto begin = std::chrono::steady_clock::now();
        THROWS(Interrupted, "interrupted", batch_norm_double_backward(d));
        CHECK(std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(500));
        CHECK(dgamma == Vector(dgamma.size(), 7) && dbeta == dgamma);
    }
}

}  // namespace
}  // namespace test
