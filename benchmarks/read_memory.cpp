// Reads floats as a decode step reads weights: the bound of timing.limits.

#include <cstdint>
#include <cstring>

typedef float floats __attribute__((vector_size(32)));  // eight; GCC and Clang, any processor

// Sum of `data` (n); every thread reads `streams` places in turn and asks for them `ahead` bytes
// early. What is left over at the end of a stream, below 256 bytes, is not read.
extern "C" float read_memory(
    const float* data, int64_t n, int64_t streams, int64_t ahead, int64_t threads) {
    const int64_t length = n / (threads * streams) / 64 * 64;
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        const float* const first = data + thread * streams * length;
        floats sums[8] = {};
        for (int64_t i = 0; i < length; i += 64) {
            for (int64_t stream = 0; stream < streams; stream++) {
                const float* const at = first + stream * length + i;
                for (int64_t k = 0; k < 8; k++) {
                    if (ahead && k % 2 == 0) __builtin_prefetch((const char*)(at + 8 * k) + ahead);
                    floats values;
                    std::memcpy(&values, at + 8 * k, sizeof values);
                    sums[k] += values;
                }
            }
        }
        for (const floats& sum : sums)
            for (int64_t k = 0; k < 8; k++) total += sum[k];
    }
    return total;
}
