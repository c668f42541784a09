// What the ranks of a group tell each other in one call: whether they are well and make the same call, then exact sums. Used by the
// drivers; knows no tensor.
//
// An array that is sent starts with a status, 0, followed by what all ranks must have in common, by what a rank may have of its own, and
// the sums. A rank that has failed sends a status of 1; all then send a text, its message.
#pragma once

#include <bit>
#include <string_view>
#include <vector>

#include "types.h"

namespace batchnorm {

class Exchange {
public:
    enum Kind { training, measuring, gradients, gradients_of_lost };
    // Options in a word: equal ones have equal words, and others hardly ever.
    class Options {
    public:
        Options& operator<<(double value) {
            word_ = (word_ ^ std::bit_cast<std::uint64_t>(value + 0.0)) * 0x9e3779b97f4a7c15u;
            word_ ^= word_ >> 29;
            return *this;
        }
        Options& operator<<(const ConstChannels& values) {
            *this << static_cast<double>(values.size);
            for (int64_t c = 0; values && c < values.size; ++c) *this << at(values, c);
            return *this;
        }
        double word() const { return static_cast<double>(word_ >> 11); }

    private:
        std::uint64_t word_ = 1;
    };
    static constexpr std::size_t kWords = 8;  // of an array, before its sums
    // What all ranks must have in common.
    struct Same {
        Kind kind;
        Dtype dtype;
        int64_t channels;
        double option;
    };
    // One rank's contribution. scale: by which its sums are multiplied, a power of two; infinite if it has none. weighted: whether its
    // values count as often as weights say.
    struct Part {
        double scale;
        bool weighted;
        std::vector<double> array;
        const double* sums() const { return array.data() + kWords; }
    };

    // expected: whether the call comes to an exchange at all.
    Exchange(Group& group, bool expected) : group_(group), expected_(expected ? 1 : 0) {}

    // Every rank's part, in the order of ranks. Throws if a rank has failed or is in another call. Then no other exchange is expected but
    // those that expect() has said.
    std::vector<Part> gather(const Same& same, double scale, bool weighted, std::span<const double> sums);
    void expect() { ++expected_; }
    // This rank fails: those that wait for it learn why.
    void fail(const char* message) noexcept;

private:
    Group& group_;
    int expected_;  // exchanges to come, of which the others know too
    int round_ = 0;
};

// Runs f(exchange), null without a group; the others learn of what it throws.
template <class F>
void together(Group* group, bool exchanges, const F& f) {
    if (group == nullptr) return f(static_cast<Exchange*>(nullptr));
    Exchange exchange(*group, exchanges);
    try {
        f(&exchange);
    } catch (const std::exception& e) {
        exchange.fail(e.what());
        std::rethrow_exception(std::current_exception());
    } catch (...) {
        exchange.fail("an exception of another kind");
        std::rethrow_exception(std::current_exception());
    }
}

}  // namespace batchnorm
