// oneDNN as a contestant (protocol.h): forward_training, forward_inference with given statistics, backward; scale and shift; ReLU and
// residual + ReLU fused with their workspace where oneDNN has that on CPUs, otherwise as further primitives in the same call.
//
//     onednn_peer plain|blocked THREADS      plain: the case's own memory order; blocked: nChw16c, oneDNN's favourite
//
// The library may be built on OpenMP, or on SYCL and TBB; the latter finds its CPU device through OCL_ICD_FILENAMES and takes as many
// threads as CPUs it is pinned to. Running statistics are not updated: oneDNN has no such primitive, and theirs are C values.
#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_map>

#include "oneapi/dnnl/dnnl.hpp"
#include "protocol.h"

namespace {

using bench::Buffer;
using bench::Case;
using bench::Unsupported;
using dnnl::memory;
using Tag = memory::format_tag;
using Flags = dnnl::normalization_flags;

constexpr float kEps = 1e-5f;

std::uint16_t to_bfloat16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // round to nearest, ties to even
}

class Onednn {
public:
    explicit Onednn(bool blocked) : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_), blocked_(blocked) {}

    void prepare(const Case& c) {
        drop();
        describe(c);
        channel("gamma", 4, 1.0f);
        channel("beta", 5, 0.0f);
        channel("mean", 6, 0.0f);
        channel("var", 7, 1.0f);
        tensor("x", 1);
        tensor("y", 0);
        if (c.residual()) tensor("z", 3);
        if (c.op != "backward") {
            steps_ = forward(c.op == "forward" ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference);
            results_ = {"y"};
            return;
        }
        tensor("dy", 2);
        tensor("dx", 0);
        channel("dgamma", 0, 0.0f);
        channel("dbeta", 0, 0.0f);
        for (const auto& step : forward(dnnl::prop_kind::forward_training)) step();
        stream_.wait();
        steps_ = backward();
        results_ = {"dx", "dgamma", "dbeta"};
        if (c.residual()) results_.push_back("dz");
    }

    void run() {
        for (const auto& step : steps_) step();
        stream_.wait();
    }

    std::vector<double> sample(std::int64_t count) {
        run();
        std::vector<double> out;
        for (const auto& name : results_) sample_of(memories_.at(name), count, out);
        return out;
    }

    void drop() {
        steps_.clear();
        memories_.clear();
        buffers_.clear();
    }

private:
    using Step = std::function<void()>;
    using Arguments = std::unordered_map<int, memory>;

    // Axes as oneDNN wants them, (N, C, H, W), in the memory order of the case; `tensor_` may be blocked, `plain_` never is.
    void describe(const Case& c) {
        case_.emplace(c);
        if (c.outputs == "returned") throw Unsupported("oneDNN returns nothing: its caller brings the memory");
        if (c.dtype != "float32" && c.dtype != "bfloat16") throw Unsupported("this contestant has float32 and bfloat16 alone");
        type_ = c.dtype == "float32" ? memory::data_type::f32 : memory::data_type::bf16;
        if (blocked_ && c.inner == 1) throw Unsupported("nChw16c is a blocking of NCHW");
        const bool ncs = c.inner > 1;
        const memory::dims dims = ncs ? memory::dims{c.outer, c.channels, c.inner, 1} : memory::dims{c.outer, c.channels, 1, 1};
        plain_ = memory::desc(dims, type_, ncs ? Tag::nchw : Tag::nhwc);
        tensor_ = blocked_ ? memory::desc(dims, type_, Tag::nChw16c) : plain_;
    }

    memory& own(const std::string& name, const memory::desc& desc) {
        buffers_.emplace_back(desc.get_size());
        std::memset(buffers_.back().as<char>(), 0, desc.get_size());
        return memories_.insert_or_assign(name, memory(desc, engine_, buffers_.back().as<void>())).first->second;
    }

    void reorder(memory& from, memory& to) {
        dnnl::reorder(from, to).execute(stream_, from, to);
        stream_.wait();
    }

    // Seed 0 is an output. Inputs are written in the case's memory order and brought into the contestant's.
    void tensor(const std::string& name, std::uint32_t seed) {
        memory& to = own(name, tensor_);
        if (seed == 0) return;
        const Buffer values(plain_.get_size());
        for (std::int64_t i = 0; i < case_->elements(); ++i) {
            const float v = bench::uniform(static_cast<std::uint32_t>(i), seed) * 1.5f + 0.5f;
            if (type_ == memory::data_type::f32)
                values.as<float>()[i] = v;
            else
                values.as<std::uint16_t>()[i] = to_bfloat16(v);
        }
        memory from(plain_, engine_, values.as<void>());
        reorder(from, to);
    }

    void channel(const std::string& name, std::uint32_t seed, float offset) {
        own(name, memory::desc({case_->channels}, memory::data_type::f32, Tag::a));
        float* values = buffers_.back().as<float>();
        for (std::int64_t i = 0; i < case_->channels; ++i) values[i] = 0.5f * bench::uniform(static_cast<std::uint32_t>(i), seed) + offset;
    }

    Flags flags(bool inference) const {
        Flags f = Flags::use_scale | Flags::use_shift;
        if (inference) f |= Flags::use_global_stats;
        if (fused_) f |= case_->residual() ? Flags::fuse_norm_add_relu : Flags::fuse_norm_relu;
        return f;
    }

    // The forward primitive, fused with the activation if oneDNN can, otherwise plain; fused_ says which.
    dnnl::batch_normalization_forward::primitive_desc describe_forward(dnnl::prop_kind kind) {
        const bool inference = kind == dnnl::prop_kind::forward_inference;
        fused_ = case_->relu();
        if (fused_) {
            dnnl::batch_normalization_forward::primitive_desc pd(engine_, kind, tensor_, tensor_, kEps, flags(inference),
                                                                 dnnl::primitive_attr(), true);
            if (pd) return pd;
        }
        fused_ = false;
        return {engine_, kind, tensor_, tensor_, kEps, flags(inference)};
    }

    Step step(const dnnl::primitive& primitive, Arguments arguments) {
        return [this, primitive, arguments = std::move(arguments)] { primitive.execute(stream_, arguments); };
    }

    Step binary(dnnl::algorithm algorithm, const std::string& a, const std::string& b, const std::string& to, bool relu) {
        dnnl::primitive_attr attributes;
        if (relu) {
            dnnl::post_ops after;
            after.append_eltwise(dnnl::algorithm::eltwise_relu, 0.0f, 0.0f);
            attributes.set_post_ops(after);
        }
        const dnnl::binary::primitive_desc pd(engine_, algorithm, tensor_, tensor_, tensor_, attributes);
        return step(dnnl::binary(pd),
                    {{DNNL_ARG_SRC_0, memories_.at(a)}, {DNNL_ARG_SRC_1, memories_.at(b)}, {DNNL_ARG_DST, memories_.at(to)}});
    }

    Step relu_in_place(const std::string& name) {
        const dnnl::eltwise_forward::primitive_desc pd(engine_, dnnl::prop_kind::forward_training, dnnl::algorithm::eltwise_relu, tensor_,
                                                       tensor_, 0.0f, 0.0f);
        return step(dnnl::eltwise_forward(pd), {{DNNL_ARG_SRC, memories_.at(name)}, {DNNL_ARG_DST, memories_.at(name)}});
    }

    std::vector<Step> forward(dnnl::prop_kind kind) {
        forward_desc_ = describe_forward(kind);
        Arguments arguments = {{DNNL_ARG_SRC, memories_.at("x")},       {DNNL_ARG_DST, memories_.at("y")},
                               {DNNL_ARG_SCALE, memories_.at("gamma")}, {DNNL_ARG_SHIFT, memories_.at("beta")},
                               {DNNL_ARG_MEAN, memories_.at("mean")},   {DNNL_ARG_VARIANCE, memories_.at("var")}};
        if (fused_ && forward_desc_.workspace_desc().get_size() > 0)
            arguments.insert({DNNL_ARG_WORKSPACE, own("workspace", forward_desc_.workspace_desc())});
        if (fused_ && case_->residual()) arguments.insert({DNNL_ARG_SRC_1, memories_.at("z")});
        std::vector<Step> steps = {step(dnnl::batch_normalization_forward(forward_desc_), arguments)};
        if (!fused_ && case_->residual()) steps.push_back(binary(dnnl::algorithm::binary_add, "y", "z", "y", true));
        if (!fused_ && case_->activation == "relu") steps.push_back(relu_in_place("y"));
        return steps;
    }

    std::vector<Step> backward() {
        const dnnl::batch_normalization_backward::primitive_desc pd(engine_, dnnl::prop_kind::backward, tensor_, tensor_, tensor_, kEps,
                                                                    flags(false), forward_desc_);
        std::vector<Step> steps;
        std::string dy = "dy";
        if (case_->residual()) own("dz", tensor_);
        if (case_->relu() && !fused_) {  // eltwise_relu's backward reads its output: dz = dy where y > 0
            if (!case_->residual()) own("dz", tensor_);
            steps.push_back(relu_backward("dy", "y", "dz"));
            dy = "dz";
        }
        Arguments arguments = {{DNNL_ARG_SRC, memories_.at("x")},           {DNNL_ARG_DIFF_DST, memories_.at(dy)},
                               {DNNL_ARG_SCALE, memories_.at("gamma")},     {DNNL_ARG_SHIFT, memories_.at("beta")},
                               {DNNL_ARG_MEAN, memories_.at("mean")},       {DNNL_ARG_VARIANCE, memories_.at("var")},
                               {DNNL_ARG_DIFF_SRC, memories_.at("dx")},     {DNNL_ARG_DIFF_SCALE, memories_.at("dgamma")},
                               {DNNL_ARG_DIFF_SHIFT, memories_.at("dbeta")}};
        if (fused_) arguments.insert({DNNL_ARG_WORKSPACE, memories_.at("workspace")});
        if (fused_ && case_->residual()) arguments.insert({DNNL_ARG_DIFF_SRC_1, memories_.at("dz")});
        steps.push_back(step(dnnl::batch_normalization_backward(pd), arguments));
        return steps;
    }

    Step relu_backward(const std::string& dy, const std::string& y, const std::string& to) {
        const auto kind = dnnl::algorithm::eltwise_relu_use_dst_for_bwd;
        const dnnl::eltwise_forward::primitive_desc hint(engine_, dnnl::prop_kind::forward_training, kind, tensor_, tensor_, 0.0f, 0.0f);
        const dnnl::eltwise_backward::primitive_desc pd(engine_, kind, tensor_, tensor_, tensor_, 0.0f, 0.0f, hint);
        return step(dnnl::eltwise_backward(pd),
                    {{DNNL_ARG_DST, memories_.at(y)}, {DNNL_ARG_DIFF_DST, memories_.at(dy)}, {DNNL_ARG_DIFF_SRC, memories_.at(to)}});
    }

    void sample_of(memory& from, std::int64_t count, std::vector<double>& out) {
        const memory::dims dims = from.get_desc().get_dims();
        const bool is_tensor = dims.size() == 4;
        const memory::desc plain(dims, memory::data_type::f32, !is_tensor ? Tag::a : case_->inner > 1 ? Tag::nchw : Tag::nhwc);
        const Buffer values(plain.get_size());
        memory to(plain, engine_, values.as<void>());
        reorder(from, to);
        const auto size = static_cast<std::int64_t>(plain.get_size() / sizeof(float));
        for (std::int64_t i = 0; i < count; ++i) out.push_back(values.as<float>()[i * (size - 1) / std::max<std::int64_t>(1, count - 1)]);
    }

    dnnl::engine engine_;
    dnnl::stream stream_;
    bool blocked_, fused_ = false;
    std::optional<Case> case_;
    memory::data_type type_ = memory::data_type::f32;
    memory::desc plain_, tensor_;
    dnnl::batch_normalization_forward::primitive_desc forward_desc_;
    std::vector<Buffer> buffers_;
    std::map<std::string, memory> memories_;
    std::vector<std::string> results_;
    std::vector<Step> steps_;
};

const char* runtime_name(unsigned runtime) {
    switch (runtime) {
        case DNNL_RUNTIME_OMP:
            return "OpenMP";
        case DNNL_RUNTIME_TBB:
            return "TBB";
        case DNNL_RUNTIME_SEQ:
            return "one thread";
        default:
            return "SYCL";
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::string order = argc > 1 ? argv[1] : "";
    if (argc != 3 || (order != "plain" && order != "blocked")) {
        std::cerr << "usage: onednn_peer plain|blocked THREADS, with requests on standard input (protocol.h)\n";
        return 2;
    }
    // The number of threads is OMP_NUM_THREADS, or that of the CPUs this process is pinned to: see the top.
    const dnnl_version_t* v = dnnl_version();
    std::optional<Onednn> peer;
    try {
        peer.emplace(order == "blocked");
    } catch (const std::exception& e) {
        bench::say("{\"absent\": " + bench::quoted(std::string("oneDNN finds no CPU engine: ") + e.what()) + "}");
        return 0;
    }
    bench::say("{\"version\": \"" + std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch) + " (" +
               runtime_name(v->cpu_runtime) + ")\"}");
    return bench::serve([&](const std::string& verb, const bench::Words& words) -> std::string {
        if (verb == "time") return "{\"seconds\": " + bench::list(bench::timed([&] { peer->run(); }, words)) + "}";
        if (verb == "sample") return "{\"sample\": " + bench::list(peer->sample(std::stoll(words.at("count")))) + "}";
        if (verb == "case") peer->prepare(Case(words));
        if (verb == "drop") peer->drop();
        return "{\"ok\": true}";
    });
}
