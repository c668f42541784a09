#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "check.h"

namespace batchnorm {
namespace {

// Words of an array before the sums.
enum Word { status, kind, round_number, dtype, channels, option, scale, weighted, words };
static_assert(words == Exchange::kWords);
constexpr const char* kWhat[] = {
    "", "another call", "another round of it", "another dtype of x", "another number of channels", "other options"};

// A message has a fixed size, so that all arrays that are exchanged at a time are of one length: a double per byte.
constexpr std::size_t kMessage = 1000;

std::vector<double> as_values(std::string_view message) {
    std::vector<double> values(kMessage, 0);
    for (std::size_t i = 0; i < std::min(message.size(), kMessage); ++i) values[i] = static_cast<unsigned char>(message[i]);
    return values;
}
std::string as_text(const std::vector<double>& values) {
    std::string text;
    for (const double v : values) {
        if (v > 0 && v < 256) text.push_back(static_cast<char>(static_cast<unsigned char>(v)));
    }
    if (text.size() < kMessage) return text;
    while ((text.back() & 0xc0) == 0x80) text.pop_back();  // UTF-8 that may be cut
    if ((text.back() & 0x80) != 0) text.pop_back();
    return text;
}

using All = std::vector<std::vector<double>>;

// Throws if a rank has failed.
void hear(Group& group, const All& all) {
    const auto failed = [](const std::vector<double>& of_rank) { return of_rank.empty() || of_rank[status] != 0; };
    const auto first = std::find_if(all.begin(), all.end(), failed);
    if (first == all.end()) return;
    const auto rank = static_cast<std::size_t>(first - all.begin());
    const All texts = group.allgather(as_values(""));
    check::rank_failed(static_cast<int>(rank), rank < texts.size() ? as_text(texts[rank]) : "");
}

// Throws if a rank has failed, or what all ranks sent has not `mine` among it: an mpi4py intercommunicator gathers those of the other side.
void check_all(Group& group, const std::vector<double>& mine, const All& all) {
    if (all.empty()) check::no_ranks();
    const auto own = [&](const std::vector<double>& of_rank) {
        return of_rank.size() == mine.size() && std::memcmp(of_rank.data(), mine.data(), mine.size() * sizeof(double)) == 0;
    };
    if (std::none_of(all.begin(), all.end(), own)) check::not_among_ranks();
    hear(group, all);
}

}  // namespace

std::vector<Exchange::Part> Exchange::gather(const Same& same, double own_scale, bool has_weights, std::span<const double> sums) {
    std::vector<double> mine(words);
    mine[kind] = same.kind;
    mine[round_number] = round_++;
    mine[dtype] = static_cast<double>(same.dtype);
    mine[channels] = static_cast<double>(same.channels);
    mine[option] = same.option;
    mine[scale] = own_scale;
    mine[weighted] = has_weights ? 1 : 0;
    mine.insert(mine.end(), sums.begin(), sums.end());
    expected_ = std::max(expected_ - 1, 0);  // of which the others learn even if this one throws
    All all = group_.allgather(mine);
    const int later = std::exchange(expected_, 0);
    check_all(group_, mine, all);
    const auto word = [](const std::vector<double>& of_rank, std::size_t i) { return i < of_rank.size() ? of_rank[i] : -1; };
    for (std::size_t rank = 0; rank < all.size(); ++rank) {
        for (std::size_t i = kind; i <= option; ++i) {
            if (word(all[rank], i) != word(all[0], i)) check::ranks_differ(static_cast<int>(rank), kWhat[i]);
        }
        if (all[rank].size() != all[0].size()) check::ranks_differ(static_cast<int>(rank), kWhat[option]);
    }
    std::vector<Part> parts;
    for (std::vector<double>& of_rank : all) {
        const double of_scale = of_rank[scale];
        const bool has = of_rank[weighted] != 0;
        parts.push_back({of_scale, has, std::move(of_rank)});
    }
    expected_ = later;
    return parts;
}

void Exchange::fail(const char* message) noexcept {
    if (std::exchange(expected_, 0) == 0) return;
    try {
        batchnorm::fail(group_, message);
    } catch (...) {  // its own exception says more
    }
}

inline namespace v0_2 {

void fail(Group& group, std::string_view message) {
    std::vector<double> mine(words, 0);
    mine[status] = 1;
    group.allgather(mine);
    group.allgather(as_values(message));
}

std::vector<std::vector<double>> gather(Group& group, std::span<const double> mine) {
    std::vector<double> sent(1, 0);
    sent.insert(sent.end(), mine.begin(), mine.end());
    All all = group.allgather(sent);
    check_all(group, sent, all);
    for (std::vector<double>& of_rank : all) of_rank.erase(of_rank.begin());
    return all;
}

}  // namespace v0_2

}  // namespace batchnorm
