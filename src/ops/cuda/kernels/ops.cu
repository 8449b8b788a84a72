// Kernels of the CUDA backend for f32, bf16 and f16 tensors, dense and row-major from the start of their allocation.
// Every sum is kept in f32 and taken in an order that hangs on the token alone, never on the step around it.
//
// Legend: T tokens, R routed rows, D model width, F expert width, W norm width, hd head width.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

namespace {

constexpr unsigned WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Two neighbouring elements, which are loaded and stored at once.
template <typename E> struct PairOf;
template <> struct PairOf<float> { using type = float2; };
template <> struct PairOf<__nv_bfloat16> { using type = __nv_bfloat162; };
template <> struct PairOf<__half> { using type = __half2; };

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float2 widen(float2 x) { return x; }
__device__ inline float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ inline float2 widen(__half2 x) { return __half22float2(x); }

template <typename E> __device__ inline E narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

__device__ inline float warp_sum(float x) {
    for (unsigned step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (unsigned step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// ---- rows --------------------------------------------------------------------------------------------------------

// y = x / sqrt(mean(x²) + eps) · w for one group of W elements per block. blockDim.x is a multiple of 32 and hangs on
// W alone.
template <typename E>
__device__ void rms_norm(const E *__restrict__ x, const E *__restrict__ w, E *__restrict__ y, unsigned width, float eps) {
    __shared__ float sum_of_warp[WARP];
    const size_t at = size_t(blockIdx.x) * width;
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        const float v = widen(x[at + i]);
        sum += v * v;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) sum_of_warp[threadIdx.x / WARP] = sum;
    __syncthreads();
    float total = 0.0f;
    for (unsigned i = 0; i < blockDim.x / WARP; ++i) total += sum_of_warp[i];
    const float scale = 1.0f / sqrtf(total / float(width) + eps);
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        y[at + i] = narrow<E>(widen(x[at + i]) * scale * widen(w[i]));
    }
}

// Rotates the heads of token blockIdx.x: x [T, width], width = heads · 2 · half; tables [positions, half].
template <typename E>
__device__ void rotate(const E *__restrict__ x, E *__restrict__ y, const unsigned *__restrict__ position_t,
                       const float *__restrict__ cos, const float *__restrict__ sin, unsigned width, unsigned half) {
    const size_t row = size_t(blockIdx.x) * width;
    const size_t table = size_t(position_t[blockIdx.x]) * half;
    for (unsigned j = threadIdx.x; j < width / 2; j += blockDim.x) {
        const unsigned i = j % half;
        const size_t low = row + size_t(j / half) * 2 * half + i;
        const float a = widen(x[low]), b = widen(x[low + half]);
        const float c = cos[table + i], s = sin[table + i];
        y[low] = narrow<E>(a * c - b * s);
        y[low + half] = narrow<E>(b * c + a * s);
    }
}

// h = silu(gate) · up: gate_up [R, 2F] holds both side by side, h is [R, F]. Row blockIdx.x.
template <typename E>
__device__ void silu_mul(const E *__restrict__ gate_up, E *__restrict__ h, unsigned width) {
    const unsigned i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= width) return;
    const size_t row = blockIdx.x;
    const float gate = widen(gate_up[row * 2 * width + i]);
    const float up = widen(gate_up[row * 2 * width + width + i]);
    h[row * width + i] = narrow<E>(gate / (1.0f + expf(-gate)) * up);
}

// sum[t] = Σ weight_r[r] · y[r] over the rows of token t = blockIdx.x, in ascending order: y [R, D], sum [T, D].
// The rows of token t are row_of[starts_t1[t]..starts_t1[t + 1]].
template <typename E>
__device__ void combine(const E *__restrict__ y, const float *__restrict__ weight_r,
                        const unsigned *__restrict__ starts_t1, const unsigned *__restrict__ row_of,
                        E *__restrict__ sum, unsigned width) {
    const unsigned i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= width) return;
    const unsigned t = blockIdx.x;
    float total = 0.0f;
    for (unsigned n = starts_t1[t]; n < starts_t1[t + 1]; ++n) {
        const unsigned row = row_of[n];
        total += weight_r[row] * widen(y[size_t(row) * width + i]);
    }
    sum[size_t(t) * width + i] = narrow<E>(total);
}

// ---- paged keys and values ---------------------------------------------------------------------------------------
//
// A layer's keys are [blocks, kv_heads, hd/2, block_size, 2]: threads that score neighbouring positions load
// neighbouring pairs. Its values are [blocks, kv_heads, block_size, hd]: threads that sum neighbouring elements do.

// Writes k and v, [T, kv_heads · hd], of token blockIdx.x to its slot, block · block_size + offset.
template <typename E>
__device__ void kv_write(const E *__restrict__ k, const E *__restrict__ v, E *__restrict__ k_cache,
                         E *__restrict__ v_cache, const unsigned *__restrict__ slot_t, unsigned kv_heads, unsigned hd,
                         unsigned block_size) {
    const unsigned slot = slot_t[blockIdx.x];
    const unsigned offset = slot % block_size;
    const size_t first_head = size_t(slot / block_size) * kv_heads;
    const unsigned width = kv_heads * hd;
    const size_t from = size_t(blockIdx.x) * width;
    for (unsigned j = threadIdx.x; j < width; j += blockDim.x) {
        const size_t head = first_head + j / hd;
        const unsigned d = j % hd;
        k_cache[((head * (hd / 2) + d / 2) * block_size + offset) * 2 + d % 2] = k[from + j];
        v_cache[(head * block_size + offset) * hd + d] = v[from + j];
    }
}

// Threads of an attention block, and how many positions it takes at once.
constexpr unsigned THREADS = 128;
// Positions of one split. Splits begin at multiples of it, so that a token's sums don't hang on the step.
constexpr unsigned SPLIT = 512;
constexpr unsigned HEAD_DIM_MAX = 256;

// Passed by value; mirrored in attention.rs.
struct Attention {
    unsigned first_token, heads, kv_heads, head_dim, block_size, window, splits;
    float scale;
};

// Softmax over one tile: turns `score` [THREADS] into exp(score - max) and updates the running maximum and sum, with
// `correction` being what earlier sums are to be multiplied by. One warp.
__device__ inline void online_softmax(float *score, float *running_max, float *running_sum,
                                      float *correction) {
    const unsigned lane = threadIdx.x % WARP;
    const float before = *running_max;
    float top = before;
    for (unsigned i = lane; i < THREADS; i += WARP) top = fmaxf(top, score[i]);
    top = warp_max(top);
    float total = 0.0f;
    for (unsigned i = lane; i < THREADS; i += WARP) {
        score[i] = expf(score[i] - top);
        total += score[i];
    }
    total = warp_sum(total);
    __syncwarp();
    if (lane == 0) {
        *correction = expf(before - top);
        *running_sum = *running_sum * *correction + total;
        *running_max = top;
    }
}

// Attention of up to G query heads that share a KV head over one split of what their token sees: blockIdx is (token -
// first_token, KV head and part of its query heads, split). q and out are [T, heads · hd].
//
// With one split `out` is written; with more, the block leaves its unnormalised sum in `part` [tokens, heads, splits,
// hd] and its (maximum, sum of exponentials) in `stats` [tokens, heads, splits] for merge_splits. The tokens of one
// sequence have their block numbers from blocks[table_t[t]] on.
template <typename E, unsigned G>
__device__ void attend(const E *__restrict__ q, const E *__restrict__ k_cache, const E *__restrict__ v_cache,
                       E *__restrict__ out, float *__restrict__ part, float2 *__restrict__ stats,
                       const unsigned *__restrict__ position_t, const unsigned *__restrict__ table_t,
                       const unsigned *__restrict__ blocks, const Attention &a) {
    using Pair = typename PairOf<E>::type;
    __shared__ float2 query[G][HEAD_DIM_MAX / 2];
    __shared__ float score[G][THREADS];
    __shared__ unsigned value_row[THREADS];
    __shared__ float2 summed[G][THREADS];
    __shared__ float top[G], sum[G], correction[G];

    const unsigned tid = threadIdx.x;
    const unsigned t = a.first_token + blockIdx.x;
    const unsigned pairs = a.head_dim / 2;
    const unsigned group = a.heads / a.kv_heads;
    const unsigned parts = (group + G - 1) / G;
    const unsigned kv_head = blockIdx.y / parts;
    const unsigned in_group = blockIdx.y % parts * G;
    const unsigned first_head = kv_head * group + in_group;
    const unsigned heads = min(G, group - in_group);
    const size_t part_row = (size_t(blockIdx.x) * a.heads + first_head) * a.splits + blockIdx.z;

    const unsigned seen = position_t[t] + 1;
    const unsigned begin = max(seen > a.window ? seen - a.window : 0, blockIdx.z * SPLIT);
    const unsigned end = min(seen, (blockIdx.z + 1) * SPLIT);
    if (begin >= end) {
        if (tid < heads) stats[part_row + size_t(tid) * a.splits] = make_float2(-CUDART_INF_F, 0.0f);
        return;
    }

    const Pair *q_pairs = reinterpret_cast<const Pair *>(q) + (size_t(t) * a.heads + first_head) * pairs;
    for (unsigned j = tid; j < G * pairs; j += THREADS) {
        float2 x = make_float2(0.0f, 0.0f);
        if (j < heads * pairs) x = widen(q_pairs[j]);
        query[j / pairs][j % pairs] = make_float2(x.x * a.scale, x.y * a.scale);
    }
    if (tid < G) {
        top[tid] = -CUDART_INF_F;
        sum[tid] = 0.0f;
    }
    __syncthreads();

    // Values are summed by `lanes` groups of threads that take turns at the positions; each thread owns a pair.
    const unsigned lanes = THREADS / pairs;
    const unsigned lane = tid / pairs, pair = tid % pairs;
    const Pair *k_pairs = reinterpret_cast<const Pair *>(k_cache);
    const Pair *v_pairs = reinterpret_cast<const Pair *>(v_cache);
    float2 acc[G];
#pragma unroll
    for (unsigned g = 0; g < G; ++g) acc[g] = make_float2(0.0f, 0.0f);

    for (unsigned first = begin; first < end; first += THREADS) {
        const unsigned count = min(THREADS, end - first);
        float dot[G];
#pragma unroll
        for (unsigned g = 0; g < G; ++g) dot[g] = tid < count ? 0.0f : -CUDART_INF_F;
        if (tid < count) {
            const unsigned position = first + tid;
            const unsigned head_row = blocks[table_t[t] + position / a.block_size] * a.kv_heads + kv_head;
            const unsigned offset = position % a.block_size;
            value_row[tid] = head_row * a.block_size + offset;
            const Pair *key = k_pairs + size_t(head_row) * pairs * a.block_size + offset;
#pragma unroll 8
            for (unsigned i = 0; i < pairs; ++i) {
                const float2 k = widen(key[size_t(i) * a.block_size]);
#pragma unroll
                for (unsigned g = 0; g < G; ++g) dot[g] += query[g][i].x * k.x + query[g][i].y * k.y;
            }
        }
#pragma unroll
        for (unsigned g = 0; g < G; ++g) score[g][tid] = dot[g];
        __syncthreads();

        for (unsigned g = tid / WARP; g < G; g += THREADS / WARP) {
            online_softmax(score[g], &top[g], &sum[g], &correction[g]);
        }
        __syncthreads();

        if (lane < lanes) {
#pragma unroll
            for (unsigned g = 0; g < G; ++g) {
                acc[g].x *= correction[g];
                acc[g].y *= correction[g];
            }
#pragma unroll 4
            for (unsigned p = lane; p < count; p += lanes) {
                const float2 v = widen(v_pairs[size_t(value_row[p]) * pairs + pair]);
#pragma unroll
                for (unsigned g = 0; g < G; ++g) {
                    acc[g].x += score[g][p] * v.x;
                    acc[g].y += score[g][p] * v.y;
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (unsigned g = 0; g < G; ++g) summed[g][tid] = acc[g];
    __syncthreads();
    for (unsigned j = tid; j < heads * pairs; j += THREADS) {
        const unsigned g = j / pairs, i = j % pairs;
        float2 total = make_float2(0.0f, 0.0f);
        for (unsigned l = 0; l < lanes; ++l) {
            total.x += summed[g][l * pairs + i].x;
            total.y += summed[g][l * pairs + i].y;
        }
        if (a.splits == 1) {
            E *to = out + (size_t(t) * a.heads + first_head + g) * a.head_dim + 2 * i;
            to[0] = narrow<E>(total.x / sum[g]);
            to[1] = narrow<E>(total.y / sum[g]);
        } else {
            float *to = part + (part_row + size_t(g) * a.splits) * a.head_dim + 2 * i;
            to[0] = total.x;
            to[1] = total.y;
        }
    }
    if (a.splits > 1 && tid < heads) {
        stats[part_row + size_t(tid) * a.splits] = make_float2(top[tid], sum[tid]);
    }
}

// Merges the splits of one (token - first_token, head) per block. A token with one split that is not empty gets the
// bits that `attend` alone would have written.
template <typename E>
__device__ void merge_splits(const float *__restrict__ part, const float2 *__restrict__ stats, E *__restrict__ out,
                             const Attention &a) {
    const size_t row = (size_t(blockIdx.x) * a.heads + blockIdx.y) * a.splits;
    float top = -CUDART_INF_F;
    for (unsigned s = 0; s < a.splits; ++s) top = fmaxf(top, stats[row + s].x);
    const size_t to = (size_t(a.first_token + blockIdx.x) * a.heads + blockIdx.y) * a.head_dim;
    for (unsigned d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
        float sum = 0.0f, total = 0.0f;
        for (unsigned s = 0; s < a.splits; ++s) {
            const float2 stat = stats[row + s];
            // An empty split left its part unwritten.
            if (stat.y == 0.0f) continue;
            const float scale = expf(stat.x - top);
            sum += scale * stat.y;
            total += scale * part[(row + s) * a.head_dim + d];
        }
        out[to + d] = narrow<E>(total / sum);
    }
}

}  // namespace

// ---- entry points, one per dtype (and query heads per block) -----------------------------------------------------

#define ATTEND(E, NAME, G)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        attend_g##G##_##NAME(const E *q, const E *k_cache, const E *v_cache, E *out, float *part, float2 *stats,      \
                             const unsigned *position_t, const unsigned *table_t, const unsigned *blocks,             \
                             Attention a) {                                                                           \
        attend<E, G>(q, k_cache, v_cache, out, part, stats, position_t, table_t, blocks, a);                          \
    }

#define KERNELS(E, NAME)                                                                                              \
    extern "C" __global__ void rms_norm_##NAME(const E *x, const E *w, E *y, unsigned width, float eps) {             \
        rms_norm<E>(x, w, y, width, eps);                                                                             \
    }                                                                                                                 \
    extern "C" __global__ void rotate_##NAME(const E *x, E *y, const unsigned *position_t, const float *cos,          \
                                             const float *sin, unsigned width, unsigned half) {                       \
        rotate<E>(x, y, position_t, cos, sin, width, half);                                                           \
    }                                                                                                                 \
    extern "C" __global__ void silu_mul_##NAME(const E *gate_up, E *h, unsigned width) {                              \
        silu_mul<E>(gate_up, h, width);                                                                               \
    }                                                                                                                 \
    extern "C" __global__ void combine_##NAME(const E *y, const float *weight_r, const unsigned *starts_t1,           \
                                              const unsigned *row_of, E *sum, unsigned width) {                       \
        combine<E>(y, weight_r, starts_t1, row_of, sum, width);                                                       \
    }                                                                                                                 \
    extern "C" __global__ void kv_write_##NAME(const E *k, const E *v, E *k_cache, E *v_cache,                        \
                                               const unsigned *slot_t, unsigned kv_heads, unsigned hd,                \
                                               unsigned block_size) {                                                 \
        kv_write<E>(k, v, k_cache, v_cache, slot_t, kv_heads, hd, block_size);                                        \
    }                                                                                                                 \
    ATTEND(E, NAME, 1)                                                                                                \
    ATTEND(E, NAME, 2)                                                                                                \
    ATTEND(E, NAME, 4)                                                                                                \
    ATTEND(E, NAME, 8)                                                                                                \
    extern "C" __global__ void merge_splits_##NAME(const float *part, const float2 *stats, E *out, Attention a) {     \
        merge_splits<E>(part, stats, out, a);                                                                         \
    }

KERNELS(float, f32)
KERNELS(__nv_bfloat16, bf16)
KERNELS(__half, f16)
