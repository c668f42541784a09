// Calls with any sizes, strides, null pointers and numbers: they succeed, or throw what the header says.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "any_call.h"

namespace test {
namespace {

TEST(calls_of_any_kind) {
    int64_t outcomes[3] = {};
    const int64_t n = quick ? 5'000 : 100'000;
    for (int64_t i = 0; i < n; ++i) {
        Random random(static_cast<std::uint64_t>(i));
        std::vector<std::uint8_t> bytes(static_cast<size_t>(random.below(220)));
        for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(random.below(256));
        context = "string " + std::to_string(i);
        ++outcomes[AnyCall(bytes).run()];
    }
    bad_calls += outcomes[AnyCall::refused];
    CHECK(outcomes[AnyCall::made] > n / 50 && outcomes[AnyCall::refused] > n / 10 && outcomes[AnyCall::not_tried] < n / 2);
}

// Of libFuzzer: files of the folder that BATCHNORM_CALLS names.
TEST(calls_that_were_kept) {
    const char* const folder = std::getenv("BATCHNORM_CALLS");
    if (folder == nullptr) return;
    int64_t files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        std::ifstream file(entry.path(), std::ios::binary);
        const std::vector<char> text{std::istreambuf_iterator<char>(file), {}};
        context = entry.path().filename().string();
        AnyCall({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}).run();
        ++files;
    }
    bad_calls += files;
    CHECK(files > 0);
}

}  // namespace
}  // namespace test
