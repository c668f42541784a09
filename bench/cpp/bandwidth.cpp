// The roof: how fast this machine copies (b = a) and adds (triad, c = a + s * b) arrays of a case's size, with stores through the
// caches and past them. A contestant like the others (protocol.h); shares no code with the library that it judges.
//
//     bandwidth THREADS        requests: case ..., time kernel=copy|copy-nt|triad|triad-nt ..., drop
#include <omp.h>

#include <algorithm>
#include <optional>

#include "protocol.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using bench::Buffer;

// What one store instruction past the caches writes. Without such instructions the -nt kernels do not exist.
#if defined(__AVX512F__)
using Vector = __m512;
void stream(float* to, Vector v) { _mm512_stream_ps(to, v); }
#elif defined(__AVX__)
using Vector = __m256;
void stream(float* to, Vector v) { _mm256_stream_ps(to, v); }
#elif defined(__x86_64__)
using Vector = __m128;
void stream(float* to, Vector v) { _mm_stream_ps(to, v); }
#else
typedef float Vector __attribute__((vector_size(16)));
#endif

#if defined(__x86_64__)
constexpr bool kCanStream = true;
void fence() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
void stream(float*, Vector) {}
void fence() {}
#endif

constexpr std::int64_t kLanes = sizeof(Vector) / sizeof(float);
constexpr std::int64_t kBlock = 64 / sizeof(float);  // floats of a cache line: threads share none
constexpr std::int64_t kAlone = 16384;               // floats up to which one thread is faster than a team

struct Arrays {
    std::int64_t floats;  // a multiple of kBlock
    Buffer a, b, c;

    explicit Arrays(std::int64_t bytes)
        : floats((bytes / 4 + kBlock - 1) / kBlock * kBlock),
          a(static_cast<std::size_t>(floats) * 4),
          b(static_cast<std::size_t>(floats) * 4),
          c(static_cast<std::size_t>(floats) * 4) {}
};

// Runs body(first, last) on each thread's share of [0, floats), the same share every time, so that pages are near who uses them.
template <class Body>
void share(std::int64_t floats, Body body) {
#pragma omp parallel if (floats > kAlone)
    {
        const std::int64_t blocks = floats / kBlock, n = omp_get_num_threads(), i = omp_get_thread_num();
        body(blocks * i / n * kBlock, blocks * (i + 1) / n * kBlock);
    }
}

void copy(const Arrays& m) {
    share(m.floats, [a = m.a.as<float>(), b = m.b.as<float>()](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; i += kLanes) *reinterpret_cast<Vector*>(b + i) = *reinterpret_cast<const Vector*>(a + i);
    });
}

void copy_nt(const Arrays& m) {
    share(m.floats, [a = m.a.as<float>(), b = m.b.as<float>()](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; i += kLanes) stream(b + i, *reinterpret_cast<const Vector*>(a + i));
        fence();
    });
}

void triad(const Arrays& m) {
    share(m.floats, [a = m.a.as<float>(), b = m.b.as<float>(), c = m.c.as<float>()](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; i += kLanes)
            *reinterpret_cast<Vector*>(c + i) = *reinterpret_cast<const Vector*>(a + i) + 0.5f * *reinterpret_cast<const Vector*>(b + i);
    });
}

void triad_nt(const Arrays& m) {
    share(m.floats, [a = m.a.as<float>(), b = m.b.as<float>(), c = m.c.as<float>()](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; i += kLanes)
            stream(c + i, *reinterpret_cast<const Vector*>(a + i) + 0.5f * *reinterpret_cast<const Vector*>(b + i));
        fence();
    });
}

void fill(const Arrays& m) {
    share(m.floats, [a = m.a.as<float>(), b = m.b.as<float>(), c = m.c.as<float>()](std::int64_t first, std::int64_t last) {
        std::fill(a + first, a + last, 1.0f);
        std::fill(b + first, b + last, 2.0f);
        std::fill(c + first, c + last, 0.0f);
    });
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2 || std::atoi(argv[1]) < 1) {
        std::cerr << "usage: bandwidth THREADS, with requests on standard input (protocol.h)\n";
        return 2;
    }
    omp_set_num_threads(std::atoi(argv[1]));
    std::map<std::string, void (*)(const Arrays&)> kernels = {{"copy", copy}, {"triad", triad}};
    if (kCanStream) kernels.insert({{"copy-nt", copy_nt}, {"triad-nt", triad_nt}});
    std::string names;
    for (const auto& [name, kernel] : kernels) names += (names.empty() ? "" : ", ") + bench::quoted(name);
    bench::say("{\"version\": \"copy and triad, " + std::to_string(sizeof(Vector) * 8) + "-bit vectors, " + argv[1] +
               " threads\", \"kernels\": [" + names + "]}");

    std::optional<Arrays> arrays;
    return bench::serve([&](const std::string& verb, const bench::Words& words) -> std::string {
        if (verb == "time") {
            const auto kernel = kernels.at(words.at("kernel"));
            return "{\"seconds\": " + bench::list(bench::timed([&] { kernel(arrays.value()); }, words)) + "}";
        }
        arrays.reset();
        if (verb == "case") {
            const bench::Case c(words);
            arrays.emplace(c.elements() * (c.dtype == "float64" ? 8 : c.dtype == "float32" ? 4 : 2));
            fill(*arrays);
        }
        return "{\"ok\": true}";
    });
}
