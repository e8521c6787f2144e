// One decode step of a Lille model on the CPU: token in, logits out, one pass over the weights.
//
// fast_decode.py compiles this file and calls decode_step; model.py computes the same in PyTorch.
// Weights W are float, bfloat16 or int8 with a scale for every BLOCK of a row; the cache C is float
// or bfloat16. Arithmetic is float; int8 weights are multiplied by activations rounded to 16 bits,
// in integers within a block. Every `omp for` ends with a barrier: five per layer.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

struct bfloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

static void store(float* at, float value) { *at = value; }
static void store(bfloat16* at, float value) {  // rounds to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    at->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

extern "C" {
struct Matrix {  // rows of weights, row-major
    const void* data;
    const void* scales;  // of int8 weights: bfloat16 (rows, padded(n) / BLOCK)
};
struct Layer {
    const float *attention_norm, *feed_forward_norm;
    Matrix qkv, out, gate, up, down;
};
struct Model {
    int64_t n_embd, n_layers, n_heads, n_kv_heads, vocab_size, block_size, ffn_dim;
    int64_t interleaved;  // rope_style "lille"
    int64_t weight_type;  // 0 float, 1 bfloat16, 2 int8
    float eps;
    const Layer* layers;
    const float* norm;
    Matrix embeddings;  // also the output head
    const float *cos, *sin;  // (block_size, D)
};
}

constexpr int64_t AHEAD = 2048;  // bytes that weights are read early
constexpr int64_t BLOCK = 32;    // int8 weights that share a scale
static int64_t padded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }  // of int8 rows

typedef float floats __attribute__((vector_size(32)));  // eight; GCC and Clang, any processor
typedef int32_t ints __attribute__((vector_size(32)));

static floats load(const float* at) {
    floats values;
    std::memcpy(&values, at, sizeof values);
    return values;
}
static floats load(const bfloat16* at) {
#ifdef __AVX2__  // GCC converts vectors of unequal width one element at a time
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
    return (floats)_mm256_slli_epi32(bits, 16);
#else
    typedef uint16_t halves __attribute__((vector_size(16)));
    halves bits;
    std::memcpy(&bits, at, sizeof bits);
    return (floats)(__builtin_convertvector(bits, ints) << 16);
#endif
}

static float sum_of(floats s) {
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

// w . x in float. One stream of memory in order, and four sums that do not wait for each other.
template <class W>
static float dot(const W* w, const float* x, int64_t n) {
    floats s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        for (size_t line = 0; line < 32 * sizeof(W); line += 64)
            __builtin_prefetch((const char*)(w + i) + AHEAD + line);
        s0 += load(w + i) * load(x + i);
        s1 += load(w + i + 8) * load(x + i + 8);
        s2 += load(w + i + 16) * load(x + i + 16);
        s3 += load(w + i + 24) * load(x + i + 24);
    }
    float sum = sum_of((s0 + s1) + (s2 + s3));
    for (; i < n; i++) sum += float(w[i]) * x[i];
    return sum;
}

// w . x of a BLOCK, in eight sums; at most 32 * 127 * 32767, so 32 bits hold them.
static floats dot_of_block(const int8_t* w, const int16_t* x) {
#ifdef __AVX2__
    const auto half = [&](int64_t i) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + i)));
        return _mm256_madd_epi16(wide, _mm256_loadu_si256((const __m256i*)(x + i)));
    };
    return (floats)_mm256_cvtepi32_ps(_mm256_add_epi32(half(0), half(16)));
#else
    ints sums = {};
    for (int64_t i = 0; i < BLOCK; i++) sums[i % 8] += int32_t(w[i]) * x[i];
    return __builtin_convertvector(sums, floats);
#endif
}

// Vectors (batch, n), and their products with the rows of a matrix (rows, n).
template <class W>
struct Vectors {
    const float* const values;
    const int64_t n;
    Vectors(const float* values, int64_t, int64_t n) : values(values), n(n) {}
    float dot_row(const Matrix& matrix, int64_t row, int64_t b) const {
        return dot(static_cast<const W*>(matrix.data) + row * n, values + b * n, n);
    }
};
template <>
struct Vectors<int8_t> {  // the largest value of each vector becomes ±32767
    const int64_t n;      // padded with zeros, as the rows of the matrix
    std::vector<int16_t> values;
    std::vector<float> scales;
    Vectors(const float* x, int64_t batch, int64_t width)
        : n(padded(width)), values(batch * n), scales(batch) {
        for (int64_t b = 0; b < batch; b++, x += width) {
            float largest = 1e-30f, sum = 0;
            for (int64_t i = 0; i < width; i++) {
                largest = std::fmax(largest, std::fabs(x[i]));
                sum += x[i] * 0;
            }
            scales[b] = largest / 32767;
            if (!(sum == 0)) {  // NaN or infinity: products are NaN, as of floats
                scales[b] = NAN;
                continue;
            }
            for (int64_t i = 0; i < width; i++)
                values[b * n + i] = int16_t(std::lrint(x[i] * (32767 / largest)));
        }
    }
    float dot_row(const Matrix& matrix, int64_t row, int64_t b) const {
        const int8_t* const w = static_cast<const int8_t*>(matrix.data) + row * n;
        const bfloat16* const s = static_cast<const bfloat16*>(matrix.scales) + row * (n / BLOCK);
        floats sum = {};
        for (int64_t i = 0; i < n; i += BLOCK) {
            if (i % 64 == 0) __builtin_prefetch((const char*)(w + i) + AHEAD);
            sum += dot_of_block(w + i, &values[b * n + i]) * float(s[i / BLOCK]);
        }
        return sum_of(sum) * scales[b];
    }
};

static void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    const float factor = 1 / std::sqrt(sum / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

// model.apply_rope of one head; `before` is memory for a copy of it.
static void rotate(
    float* x, const float* cos, const float* sin, int64_t width, bool interleaved, float* before) {
    std::memcpy(before, x, width * sizeof(float));
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = -before[interleaved ? 2 * i + 1 : half + i];
        const float second = before[interleaved ? 2 * i : i];
        x[i] = before[i] * cos[i] + first * sin[i];
        x[half + i] = before[half + i] * cos[half + i] + second * sin[half + i];
    }
}

// Attention of one query q (D) over keys and values (length, D).
template <class C>
static void attend(
    const float* q, const C* keys, const C* values, int64_t length, int64_t width, float* scores,
    float* out) {
    const float factor = 1 / std::sqrt(float(width));
    float largest = -INFINITY, total = 0;
    for (int64_t t = 0; t < length; t++) {
        scores[t] = dot(keys + t * width, q, width) * factor;
        largest = scores[t] > largest ? scores[t] : largest;
    }
    for (int64_t i = 0; i < width; i++) out[i] = 0;
    for (int64_t t = 0; t < length; t++) {
        const float weight = std::exp(scores[t] - largest);
        total += weight;
        for (int64_t i = 0; i < width; i++) out[i] += weight * float(values[t * width + i]);
    }
    for (int64_t i = 0; i < width; i++) out[i] /= total;
}

template <class W, class C>
static void step(
    const Model& m, const int64_t* tokens, const int64_t* lengths, int64_t batch, C* keys,
    C* values, float* logits, int64_t threads) {
    const int64_t n = m.n_embd, heads = m.n_heads, kv_heads = m.n_kv_heads, width = n / heads;
    const int64_t all_heads = heads + 2 * kv_heads, ffn = m.ffn_dim;
    std::vector<float> x(batch * n), qkv(batch * all_heads * width), y(batch * n), h(batch * ffn);
    for (int64_t b = 0; b < batch; b++) {
        const bool is_int8 = sizeof(W) == 1;
        const int64_t stride = is_int8 ? padded(n) : n, at = tokens[b] * stride;
        const W* row = static_cast<const W*>(m.embeddings.data) + at;
        const bfloat16* scales = static_cast<const bfloat16*>(m.embeddings.scales);
        for (int64_t i = 0; i < n; i++)
            x[b * n + i] = float(row[i]) * (is_int8 ? float(scales[(at + i) / BLOCK]) : 1.0f);
    }

#pragma omp parallel num_threads(threads)
    {  // every thread computes the norms: cheaper than another barrier
        std::vector<float> normed(batch * n), scores(m.block_size), head_copy(width);
        const auto norm_rows = [&](const float* weight) {
            for (int64_t b = 0; b < batch; b++)
                rms_norm(&x[b * n], weight, n, m.eps, &normed[b * n]);
            return Vectors<W>(normed.data(), batch, n);
        };
        // The cache is (n_layers, B, K, block_size, D).
        const auto offset = [&](int64_t layer, int64_t b, int64_t kv_head) {
            return ((layer * batch + b) * kv_heads + kv_head) * m.block_size * width;
        };
        for (int64_t l = 0; l < m.n_layers; l++) {
            const Layer& layer = m.layers[l];
            const Vectors<W> to_attention = norm_rows(layer.attention_norm);
#pragma omp for schedule(static)
            for (int64_t head = 0; head < all_heads; head++) {
                float* const first = &qkv[head * width];
                for (int64_t i = 0; i < width; i++) {
                    for (int64_t b = 0; b < batch; b++) {
                        first[b * all_heads * width + i] =
                            to_attention.dot_row(layer.qkv, head * width + i, b);
                    }
                }
                for (int64_t b = 0; b < batch; b++) {
                    float* const part = first + b * all_heads * width;
                    const int64_t at = lengths[b] * width;
                    if (head < heads + kv_heads) {
                        const float *cos = m.cos + at, *sin = m.sin + at;
                        rotate(part, cos, sin, width, m.interleaved, head_copy.data());
                    }
                    if (head < heads) continue;
                    C* const cache = (head < heads + kv_heads ? keys : values) +
                                     offset(l, b, (head - heads) % kv_heads) + at;
                    for (int64_t i = 0; i < width; i++) store(cache + i, part[i]);
                }
            }
#pragma omp for schedule(static)
            for (int64_t item = 0; item < batch * heads; item++) {
                const int64_t b = item / heads, head = item % heads;
                const int64_t start = offset(l, b, head / (heads / kv_heads));
                attend(
                    &qkv[(b * all_heads + head) * width], keys + start, values + start,
                    lengths[b] + 1, width, scores.data(), &y[b * n + head * width]);
            }
            const Vectors<W> attended(y.data(), batch, n);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < n; row++) {
                for (int64_t b = 0; b < batch; b++)
                    x[b * n + row] += attended.dot_row(layer.out, row, b);
            }
            const Vectors<W> to_feed_forward = norm_rows(layer.feed_forward_norm);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < ffn; row++) {
                for (int64_t b = 0; b < batch; b++) {
                    const float gate = to_feed_forward.dot_row(layer.gate, row, b);
                    const float up = to_feed_forward.dot_row(layer.up, row, b);
                    h[b * ffn + row] = gate / (1 + std::exp(-gate)) * up;
                }
            }
            const Vectors<W> hidden(h.data(), batch, ffn);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < n; row++) {
                for (int64_t b = 0; b < batch; b++)
                    x[b * n + row] += hidden.dot_row(layer.down, row, b);
            }
        }
        const Vectors<W> to_head = norm_rows(m.norm);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m.vocab_size; row++) {
            for (int64_t b = 0; b < batch; b++)
                logits[b * m.vocab_size + row] = to_head.dot_row(m.embeddings, row, b);
        }
    }
}

// Logits (batch, vocab_size) after `tokens`, whose keys and values go to positions `lengths` of the
// cache. Returns 0, or 1 + the first batch row whose token or length is out of range.
extern "C" int64_t decode_step(
    const Model* m, const int64_t* tokens, const int64_t* lengths, int64_t batch, void* keys,
    void* values, float* logits, int64_t cache_type, int64_t threads) {
    for (int64_t b = 0; b < batch; b++) {
        const bool valid_token = tokens[b] >= 0 && tokens[b] < m->vocab_size;
        if (!valid_token || lengths[b] < 0 || lengths[b] >= m->block_size) return b + 1;
    }
    const auto run = [&](auto weight, auto cache) {
        using C = decltype(cache);
        step<decltype(weight), C>(
            *m, tokens, lengths, batch, static_cast<C*>(keys), static_cast<C*>(values), logits,
            threads);
    };
    const auto run_with_weights = [&](auto weight) {
        cache_type == 0 ? run(weight, float()) : run(weight, bfloat16());
    };
    switch (m->weight_type) {
        case 0: run_with_weights(float()); break;
        case 1: run_with_weights(bfloat16()); break;
        default: run_with_weights(int8_t());
    }
    return 0;
}
