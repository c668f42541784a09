// The contestants' side of bench/peers/protocol.py for programs in C++: requests are lines of words, answers lines of JSON. Knows
// nothing of what is measured.
#pragma once

#include <sys/mman.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace bench {

// This contestant cannot do the case; the message says why.
struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Words = std::map<std::string, std::string>;

inline std::vector<std::int64_t> numbers(const std::string& list) {
    std::vector<std::int64_t> out;
    std::istringstream in(list);
    for (std::string word; std::getline(in, word, ',');) out.push_back(std::stoll(word));
    return out;
}

struct Case {
    std::string op, dtype, activation, outputs;
    std::vector<std::int64_t> dims;
    std::int64_t outer = 1, channels = 0, inner = 1;

    explicit Case(const Words& words)
        : op(words.at("op")),
          dtype(words.at("dtype")),
          activation(words.at("activation")),
          outputs(words.at("outputs")),
          dims(numbers(words.at("dims"))) {
        const auto axis = static_cast<std::size_t>(std::stoi(words.at("axis")));
        for (std::size_t i = 0; i < dims.size(); ++i) (i < axis ? outer : i == axis ? channels = 1 : inner) *= dims[i];
    }
    std::int64_t elements() const { return outer * channels * inner; }
    bool relu() const { return activation != "none"; }
    bool residual() const { return activation == "residual_relu"; }
};

// Values in [-1, 1): the hash of the index that protocol.py's `uniform` computes.
inline float uniform(std::uint32_t index, std::uint32_t seed) {
    std::uint32_t h = index + seed * 0x9E3779B9u;
    h *= 0x9E3779B1u;
    h ^= h >> 15;
    h *= 0x85EBCA77u;
    h ^= h >> 13;
    return static_cast<float>(h >> 8) * 0x1p-23f - 1.0f;
}

// Memory on huge pages where the system grants them on request, as NumPy asks for its arrays; its pages exist after the first write.
class Buffer {
public:
    explicit Buffer(std::size_t bytes) {
        constexpr std::size_t kHugePage = std::size_t{2} << 20;
        const std::size_t align = bytes >= 2 * kHugePage ? kHugePage : 64;
        const std::size_t rounded = (bytes + align - 1) / align * align;
        data_.reset(std::aligned_alloc(align, rounded ? rounded : align));
        if (!data_) throw std::bad_alloc();
        if (align == kHugePage) madvise(data_.get(), rounded, MADV_HUGEPAGE);  // advice: nothing is lost where it is refused
    }
    template <class T>
    T* as() const {
        return static_cast<T*>(data_.get());
    }

private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> data_;
};

inline std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += c == '\n' ? ' ' : c;
    }
    return out + '"';
}

inline std::string list(const std::vector<double>& values) {
    std::ostringstream out;
    out.precision(9);
    out << '[';
    for (std::size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
    out << ']';
    return out.str();
}

inline void say(const std::string& json) { std::cout << json << std::endl; }

// Seconds per call: `repeat` values, each the mean of `inner` calls.
inline std::vector<double> timed(const std::function<void()>& call, const Words& words) {
    const int warm = std::stoi(words.at("warm")), repeat = std::stoi(words.at("repeat")), inner = std::stoi(words.at("inner"));
    using Clock = std::chrono::steady_clock;
    for (int i = 0; i < warm; ++i) call();
    std::vector<double> seconds;
    for (int r = 0; r < repeat; ++r) {
        const auto start = Clock::now();
        for (int i = 0; i < inner; ++i) call();
        seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count() / inner);
    }
    return seconds;
}

// Answers requests until the input ends. `answer` gets the verb and its words, and returns JSON.
inline int serve(const std::function<std::string(const std::string&, const Words&)>& answer) {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream in(line);
        std::string verb, pair;
        Words words;
        in >> verb;
        while (in >> pair) words[pair.substr(0, pair.find('='))] = pair.substr(pair.find('=') + 1);
        try {
            say(answer(verb, words));
        } catch (const std::exception& e) {
            say("{\"unsupported\": " + quoted(e.what()) + "}");
        }
    }
    return 0;
}

}  // namespace bench
