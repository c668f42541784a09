// A sum of doubles that keeps K times their 53 bits: K doubles that add up to it. Plain scalar arithmetic for what is merged over many
// calls (moment_sums.cpp); knows nothing else.
#pragma once

#include <cmath>

#include "kernels/host_device.h"

namespace batchnorm {

template <int K>
struct Expansion {
    double part[K];

    // TwoSum (Knuth, The Art of Computer Programming, vol. 2, 4.2.2) from part to part: each takes what the one before had to round away
    // (SumK of Ogita, Rump and Oishi, SIAM J. Sci. Comput. 26, 2005). Exact until the last part rounds, 2^(-53 K) of the largest value the
    // sum has had. Once the first part is not finite it is the sum, and the others stay what they were.
    BATCHNORM_HOST_DEVICE void add(double x) {
        for (int i = 0; i + 1 < K; ++i) {
            const double s = part[i] + x, b = s - part[i];
            const double error = (part[i] - (s - b)) + (x - b);
            part[i] = s;
            x = std::isfinite(s) ? error : 0;
        }
        part[K - 1] += x;
    }
    template <int L>
    BATCHNORM_HOST_DEVICE void add(const Expansion<L>& other) {
        for (int i = 0; i < L; ++i) add(other.part[i]);
    }
    // a * b, exactly unless it leaves the range of doubles: Dekker's product (Numerische Mathematik 18, 1971) of Veltkamp's halves.
    void add_product(double a, double b) {
        const double p = a * b;
        const Halves x(a), y(b);
        const double error = ((x.high * y.high - p) + x.high * y.low + x.low * y.high) + x.low * y.low;
        add(p);
        if (std::isfinite(error)) add(error);
    }
    // a * b * c, likewise
    void add_product(double a, double b, double c) {
        Expansion<2> bc{};
        bc.add_product(b, c);
        for (const double v : bc.part) add_product(a, v);
    }
    // By a power of two, which is exact.
    Expansion scaled(double power) const {
        Expansion e = *this;
        for (double& v : e.part) v *= power;
        return e;
    }
    // The sum as one double: a function of the sum, not of how the parts share it, unless it lies within 2^(-53 K) of the middle between
    // two doubles.
    BATCHNORM_HOST_DEVICE double total() const {
        Expansion e = *this;
        if (!std::isfinite(e.part[0])) return e.part[0];
        for (int pass = 0; pass + 1 < K; ++pass) {
            for (int i = K - 1; i > 0; --i) {
                const double s = e.part[i - 1] + e.part[i], b = s - e.part[i - 1];
                e.part[i] = (e.part[i - 1] - (s - b)) + (e.part[i] - b);
                e.part[i - 1] = s;
            }
        }
        double sum = e.part[K - 1];
        for (int i = K - 2; i >= 0; --i) sum += e.part[i];
        return sum;
    }

private:
    struct Halves {
        double high, low;
        explicit Halves(double x) {
            const double shifted = 134217729 * x;  // 2^27 + 1
            high = shifted - (shifted - x);
            low = x - high;
        }
    };
};

}  // namespace batchnorm
