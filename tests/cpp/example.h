// A small call, (4, 3, 5) floats in runs, with all that it may take; what is a view of (4, 3, 5) has twice the memory.
#pragma once

#include "tensors.h"

namespace test {

using Floats = std::vector<float>;
constexpr float kNaNf = std::numeric_limits<float>::quiet_NaN(), kInff = std::numeric_limits<float>::infinity();

template <class V>
auto runs(V& v) {
    return View<std::remove_pointer_t<decltype(v.data())>>::ncs(v.data(), 4, 3, 5);
}
template <class V>
auto rows(V& v, int64_t channels) {
    return View<std::remove_pointer_t<decltype(v.data())>>::nsc(v.data(), static_cast<int64_t>(v.size()) / channels, channels);
}

struct Example {
    Floats x = Floats(120), y = Floats(120, 7), z = x, dy = x, dx = y, dz = y, ddx = y, ddz = y;
    Floats mean{1, 2, 3}, var{1, 2, 3}, gamma{1, -2, 0.5f}, beta{0.5f, 0, 1}, running_mean{1, 2, 3}, running_var{1, 2, 3},
        own_mean{1, 2, 3}, own_std{1, 2, 3};
    Floats dgamma{7, 8, 9}, dbeta{7, 8, 9}, many = Floats(12, 0.75f), two{1, 2};
    Vector seen{1, 2, 3}, decays{0, 0.5, 1}, count{20, 20, 20}, weights = Vector(20, 2.0);
    std::vector<std::uint8_t> mask = std::vector<std::uint8_t>(20, 1), elements = std::vector<std::uint8_t>(60);
    Saved saved;

    Example() {
        for (size_t i = 0; i < x.size(); ++i) {
            const auto n = static_cast<float>(i);
            x[i] = static_cast<float>(i * i % 7) + n / 64, z[i] = static_cast<float>(i % 5) - 2, dy[i] = static_cast<float>(i * i % 11) - 3;
            if (i < 60) elements[i] = i % 4 != 0;
        }
    }
    Forward inference() { return {.x = runs(x), .y = runs(y), .mean = mean, .var = var, .gamma = gamma, .beta = beta}; }
    Forward plain() { return {.x = runs(x), .y = runs(y), .gamma = gamma, .beta = beta}; }
    Forward train() {
        Forward f = plain();
        f.residual = runs(z), f.activation = Activation::leaky_relu, f.running.mean = running_mean, f.running.var = running_var;
        return f;
    }
    Forward renorm() {
        Forward f = train();
        f.renorm = {.enabled = true, .mean = own_mean, .std = own_std, .decay = 0.5};
        return f;
    }
    Forward samples() {  // gamma and beta of 4 samples
        Forward f = train();
        f.gamma = f.beta = ConstRows(ConstChannels(many.data(), false, 3, 1), 4, 3);
        return f;
    }
    Forward saving() {
        Forward f = inference();
        f.var = {}, f.residual = runs(z), f.saved = &saved;
        return f;
    }
    // Everything that a Saved copies.
    Forward all(Saved& to) {
        Forward f = train();
        f.activation = Activation::relu, f.renorm.enabled = true, f.part_outer = 2, f.saved = &to;
        f.positions.weights = weights, f.positions.element_mask = View<std::uint8_t>::ncs(elements.data(), 4, 3, 5);
        return f;
    }
    Backward back() {
        Backward b{.dy = runs(dy), .kept = runs(x), .saved = &saved, .dx = runs(dx), .dgamma = dgamma, .dbeta = dbeta};
        if (saved.reads_residual()) b.residual = runs(z);
        return b;
    }
    // Of a forward without running statistics.
    Backward after(Forward f) {
        Floats y_of_its_own(60);
        f.y = runs(y_of_its_own), f.running = {}, f.saved = &saved;
        batch_norm_train(f);
        Backward b = back();
        if (f.residual) b.dresidual = runs(dz);
        return b;
    }
    Backward backward() { return after(train()); }
    Backward backward_of_tanh() {
        Forward f = train();
        f.activation = Activation::tanh;
        return after(f);
    }
    DoubleBackward second() {
        const Backward b = backward_of_tanh();
        DoubleBackward d{
            .dy = b.dy, .kept = b.kept, .saved = b.saved, .residual = b.residual, .ddx = runs(ddx), .ddy = runs(y), .dx = b.dx};
        d.ddresidual = runs(ddz), d.ddgamma = gamma, d.ddbeta = beta, d.dresidual = b.dresidual, d.dgamma = dgamma, d.dbeta = dbeta;
        return d;
    }
    UpdateRunningArgs update() { return {.running = {.mean = running_mean, .var = running_var}, .mean = mean, .var = var, .count = count}; }

    // All that a call could change.
    std::vector<unsigned char> bytes() const {
        std::vector<unsigned char> all{saved.empty(), static_cast<unsigned char>(saved.bytes())};
        const auto one = [&](const auto& v) {
            const auto* const p = reinterpret_cast<const unsigned char*>(v.data());
            all.insert(all.end(), p, p + v.size() * sizeof v[0]);
        };
        const auto add = [&](const auto&... vectors) { (one(vectors), ...); };
        add(x, y, z, dy, dx, dz, ddx, ddz, mean, var, gamma, beta, running_mean, running_var, own_mean, own_std, dgamma, dbeta, many, two);
        add(seen, decays, count, weights, mask, elements, saved.mean(), saved.inv_std());
        return all;
    }
};

}  // namespace test
