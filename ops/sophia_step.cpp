// SophiaG's two updates on the CPU, each one call for all parameters that share their types.
//
// sophia_reference.py compiles this file; its `sophia_step`, `sophia_hessian` and
// `round_stochastic` are the same in PyTorch. Parameters T and moments M are float or bfloat16, arithmetic is float.
// Every element is computed alone and the counts are integers, so the number of threads changes
// nothing. NaNs must propagate: do not compile with -ffast-math.

#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat16 {
    uint16_t bits;
};

struct Row {  // one parameter; the columns of the table that the Triton kernels read
    void *param, *grad, *exp_avg, *hessian;
    const float* step;
    int64_t count, first_block, number;
};

struct Table {
    const Row* rows;
    const int32_t* block_rows;  // the row of each block
    int64_t n_blocks, block_size, threads;
};

static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float load(float x) { return x; }
static float load(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t hash32(uint32_t x) {
    x += 0x1E3779B9;
    x = (x ^ (x >> 16)) * 0x45D9F3B;
    x = (x ^ (x >> 16)) * 0x45D9F3B;
    return x ^ (x >> 16);
}

// Adds `noise` below the bits that stay and truncates; the sum could make a NaN infinite.
static void store(bfloat16* at, float x, uint32_t noise) {
    const uint32_t bits = bits_of(x);
    at->bits = uint16_t((x == x ? bits + noise : bits | 0x400000) >> 16);
}
static void store(float* at, float x, uint32_t) { *at = x; }

static void store_nearest(float* at, float x) { *at = x; }
static void store_nearest(bfloat16* at, float x) {  // ties to even
    store(at, x, 0x7fff + ((bits_of(x) >> 16) & 1));
}

struct StepSettings {
    float lr, keep, beta1, gain, rho_bs, eps, scale;
    bool cautious;
};
struct HessianSettings {
    float decay, gain, scale;
    bool squared;  // the gradients hold squares already
};

// m = beta1 m + (1 - beta1) s g; u = clip(m / max(rho bs h, eps), 1), or 0 where `cautious` and
// u s g <= 0; p = p (1 - lr wd) - lr u.
template <class T, class M>
static int32_t update(
    const StepSettings s, T* __restrict__ p, const T* __restrict__ g, M* __restrict__ m,
    M* __restrict__ h, int64_t n, uint32_t first, uint32_t seed) {
    int32_t unclipped = 0;
    for (int64_t i = 0; i < n; i++) {
        const float scaled = s.scale * load(g[i]);
        const float new_m = s.beta1 * load(m[i]) + s.gain * scaled;
        float bound = s.rho_bs * load(h[i]);
        bound = bound < s.eps ? s.eps : bound;  // comparisons let a NaN through
        const float ratio = new_m / bound;
        float step = ratio > 1 ? 1.0f : ratio < -1 ? -1.0f : ratio;
        step = s.cautious && step * scaled <= 0 ? 0.0f : step;
        unclipped += ratio > -1 && ratio < 1;
        store_nearest(&p[i], load(p[i]) * s.keep - s.lr * step);
        store(&m[i], new_m, hash32((first + uint32_t(i)) ^ seed) & 0xffff);
    }
    return unclipped;
}

// h = decay h + gain (s g)^2, or decay h + gain s g.
template <class T, class M>
static int32_t update(
    const HessianSettings s, T* __restrict__, const T* __restrict__ g, M* __restrict__,
    M* __restrict__ h, int64_t n, uint32_t first, uint32_t seed) {
    for (int64_t i = 0; i < n; i++) {
        const float scaled = s.scale * load(g[i]);
        const float new_h = s.decay * load(h[i]) + s.gain * scaled * (s.squared ? 1.0f : scaled);
        store(&h[i], new_h, hash32((first + uint32_t(i)) ^ seed) & 0xffff);
    }
    return 0;
}

template <class T, class M, class Settings>
static int64_t run(const Table& table, const Settings settings, uint32_t moment) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(table.threads) reduction(+ : total)
    for (int64_t block = 0; block < table.n_blocks; block++) {
        const Row& row = table.rows[table.block_rows[block]];
        const int64_t start = (block - row.first_block) * table.block_size;
        const int64_t left = row.count - start;
        const uint32_t step = uint32_t(*row.step) + 1 - moment;  // a step is counted afterwards
        total += update<T, M>(
            settings, (T*)row.param + start, (const T*)row.grad + start, (M*)row.exp_avg + start,
            (M*)row.hessian + start, left < table.block_size ? left : table.block_size,
            uint32_t(start), hash32(step ^ hash32(uint32_t(row.number * 2 + moment))));
    }
    return total;
}

template <class Settings>
static int64_t run(
    const Table& table, const Settings settings, int64_t param_type, int64_t moment_type,
    uint32_t moment) {
    const auto with_params = [&](auto param) {
        using T = decltype(param);
        if (moment_type == 0) return run<T, float>(table, settings, moment);
        return run<T, bfloat16>(table, settings, moment);
    };
    return param_type == 0 ? with_params(float()) : with_params(bfloat16());
}

// One step with a finite `scale`; returns the number of coordinates that it did not clip. The caller
// counts the step. Types: 0 float, 1 bfloat16; the gradient has the parameter's.
extern "C" int64_t sophia_step(
    const Row* rows, const int32_t* block_rows, int64_t n_blocks, int64_t block_size,
    int64_t param_type, int64_t moment_type, int64_t threads, double scale,
    double lr, double weight_decay, double beta1, double rho_bs, double eps, int64_t cautious) {
    const StepSettings settings = {
        float(lr), float(1 - lr * weight_decay), float(beta1), float(1 - beta1), float(rho_bs),
        float(eps), float(scale), cautious != 0};
    const Table table = {rows, block_rows, n_blocks, block_size, threads};
    return run(table, settings, param_type, moment_type, 0);
}

extern "C" void sophia_hessian(
    const Row* rows, const int32_t* block_rows, int64_t n_blocks, int64_t block_size,
    int64_t param_type, int64_t moment_type, int64_t threads, double scale,
    double decay, double gain, int64_t squared) {
    const HessianSettings settings = {float(decay), float(gain), float(scale), squared != 0};
    const Table table = {rows, block_rows, n_blocks, block_size, threads};
    run(table, settings, param_type, moment_type, 1);
}
