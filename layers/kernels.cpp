// Attention over a chain of caches, products with weights as they are held, and the random numbers of a draw, on a CPU.
// Loaded by kernels.py.
//
// Attention is that of FlashAttention 2 (Dao 2023, arXiv 2307.08691): keys come in blocks that stay in the cache, the
// softmax is kept as a running peak and total per query, and no score is held. Where heads are few the keys are split
// between the cores, and what each found is merged by its log-sum-exp (FlashDecoding, Dao et al. 2023), which is also
// how the caches of a chain are merged: one call is the whole of bifurcated attention.
//
// All queries that share keys are folded into one task: rows, heads of a group, positions. Two forms:
//   wide    queries lie in the lanes of a vector; keys and values are scalars, broadcast from where they lie: neither
//           is ever transposed or laid out anew, and peak, total, mask and bias are vertical operations.
//   narrow  for fewer queries than half a vector: the head dimension lies in the lanes.
// A product with a weight is the score product of the same two forms, its outputs in the place of keys.
//
// Letters as in cache.py: N rows, S positions, H query heads, G key/value heads, P = H / G, D head dimension; R rows of
// one cache, L its slots. Scores, sums and the softmax are in fp32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// --- Vectors: all that depends on the instruction set ---

// EMULATE_AVX512: the same code on another CPU, for tests; the compiler makes one vector of two.
#if defined(__AVX512F__) || defined(EMULATE_AVX512)
constexpr int W = 16, TILE = 12;  // floats of a vector; rows of a tile, whose sums fill the registers
#elif defined(__AVX__)
constexpr int W = 8, TILE = 6;
#else
constexpr int W = 4, TILE = 4;
#endif

struct bf16 {
    uint16_t bits;
};

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W), may_alias));
typedef vec loose __attribute__((aligned(4), may_alias));  // at any address

inline vec load(const float* p) { return *(const loose*)p; }
#if defined(__AVX512F__)
inline ivec integers(const int8_t* p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline ivec integers(const uint16_t* p) { return (ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__) && !defined(EMULATE_AVX512)
inline ivec integers(const int8_t* p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline ivec integers(const uint16_t* p) { return (ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
#else
template <class E>
inline ivec integers(const E* p) {
    ivec x;
    for (int i = 0; i < W; i++) x[i] = p[i];
    return x;
}
#endif
inline vec load(const bf16* p) { return (vec)(integers(&p->bits) << 16); }
inline vec load(const int8_t* p) { return __builtin_convertvector(integers(p), vec); }
inline void store(float* p, vec x) { *(loose*)p = x; }
inline vec splat(float x) { return vec{} + x; }
inline vec max(vec a, vec b) { return a > b ? a : b; }

// a[0] + a[1], a[2] + a[3], ..., b[0] + b[1], ...
template <int... I>
inline vec neighbours(vec a, vec b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, 2 * I + 1 ...);
#else
    return __builtin_shuffle(a, b, ivec{2 * I...}) + __builtin_shuffle(a, b, ivec{2 * I + 1 ...});
#endif
}

inline float number(float x) { return x; }
inline float number(int8_t x) { return x; }
inline float number(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline uint32_t rounded(float x) {  // the bits of the nearest bfloat16; ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void put_number(float* p, float x) { *p = x; }
inline void put_number(bf16* p, float x) { p->bits = uint16_t(rounded(x)); }

// e^x for x <= 0, exactly 0 below -87, and nan of nan. x = n ln 2 + r, and a polynomial of r to 2e-7 (Cephes, expf).
inline vec exp(vec x) {
    const float shift = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    vec bounded = max(x, splat(-87)), n = bounded * 1.44269504f + shift;
    ivec power = (ivec)n << 23;
    n -= shift;
    vec r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
    vec p = splat(1.9875691500e-4f) * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return x < -87.0f ? vec{} : x == x ? (vec)((ivec)p + power) : x;
}

inline vec tanh(vec x) {
    vec e = exp((x < 0 ? x : -x) * 2);
    vec y = (1 - e) / (1 + e);
    return x < 0 ? -y : y;
}

// One word is what a product takes from each side at a time: a float, or where there are instructions for it a pair of
// bfloat16 numbers that are neighbours in the sum. PAIR: numbers of a word.
struct Single {
    static constexpr int PAIR = 1;
    static vec multiply_add(vec sum, float a, vec b) { return sum + a * b; }
    static vec join(vec x, vec) { return x; }
    static void put(float* words, long pitch, int d, float x) { words[d * pitch] = x; }
};

#if defined(__AVX512BF16__) || defined(EMULATE_AVX512)
#define PAIRS
struct Double {
    static constexpr int PAIR = 2;
    static ivec round(vec x) { return (ivec)x + 0x7fff + ((ivec)x >> 16 & 1); }
    static vec low(vec x) { return (vec)((ivec)x << 16); }
    static vec high(vec x) { return (vec)((ivec)x & ~0xffff); }
    static vec multiply_add(vec sum, float a, vec b) {
#ifdef __AVX512BF16__
        return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)_mm512_set1_ps(a));
#else
        return sum + low(b) * low(splat_bits(a)) + high(b) * high(splat_bits(a));
#endif
    }
    static vec splat_bits(float a) {
        int32_t bits;
        memcpy(&bits, &a, 4);
        return (vec)(ivec{} + bits);
    }
    static vec join(vec even, vec odd) { return (vec)((round(even) >> 16 & 0xffff) | (round(odd) & ~0xffff)); }
    static void put(float* words, long pitch, int d, float x) { put_number((bf16*)(words + d / 2 * pitch) + d % 2, x); }
};
#endif

// --- Products ---

// out[i][lane] = (ADD: out[i][lane] * rescale[lane]) + sum over j of a[i * row + j * column] * b[j][lane], for I rows
// and V vectors of lanes, which are the pitch of b and out. What lies `ahead` of a is asked for line by line on the
// way, so that reading overlaps with arithmetic; asked for at once, it would not.
template <class M, int I, int V, bool ADD>
inline void tile(const float* a, long row, long column, const float* b, int depth, const float* rescale, float* out,
                 long ahead) {
    const float* next = a + ahead;
    const long step = ahead == 0 ? 0 : column > 1 ? column : 16;
    vec sum[I][V];
#pragma GCC unroll 24
    for (int i = 0; i < I; i++)
        for (int v = 0; v < V; v++) sum[i][v] = ADD ? load(out + (i * V + v) * W) * load(rescale + v * W) : vec{};
    for (int j = 0; j < depth; j++, a += column, b += V * W, next += step) {
        __builtin_prefetch(next);
#pragma GCC unroll 24
        for (int i = 0; i < I; i++)
            for (int v = 0; v < V; v++) sum[i][v] = M::multiply_add(sum[i][v], a[i * row], load(b + v * W));
    }
#pragma GCC unroll 24
    for (int i = 0; i < I; i++)
        for (int v = 0; v < V; v++) store(out + (i * V + v) * W, sum[i][v]);
}

template <class M, int I, int V, bool ADD>
void tiles(const float* a, int rows, long row, long column, const float* b, int depth, const float* rescale,
           float* out, long ahead = 0) {
    int i = 0;
    for (; i + I <= rows; i += I, a += I * row, out += I * V * W)
        tile<M, I, V, ADD>(a, row, column, b, depth, rescale, out, ahead);
    if constexpr (I > 1) {
        constexpr int SMALLER = I % 3 == 0 ? I / 3 * 2 : I / 2;
        if (i < rows) tiles<M, SMALLER, V, ADD>(a, rows - i, row, column, b, depth, rescale, out, ahead);
    }
}

// The sums of W vectors, as one vector.
inline vec sums(vec* x) {
#pragma GCC unroll 4
    for (int n = W; n > 1; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n / 2; i++) {
            vec a = x[2 * i], b = x[2 * i + 1];
            x[i] = neighbours(a, b, std::make_integer_sequence<int, W>());
        }
    return x[0];
}

// out[q * pitch + i] = the sum over j < D of a[i * row + j] * x[q * apart + j], for W / Q rows of a and Q of x. W
// divides D. A row of a is read to its end before the next, as memory is read fastest, in CHAINS sums at once. Of fewer
// rows the last is repeated, so out has room for all.
template <int Q, class E>
inline void dots(const E* a, long row, int rows, const float* x, long apart, long D, float* out, long pitch) {
    constexpr int I = W / Q, CHAINS = Q == 1 ? 4 : 2;
    vec sum[W];
    for (int i = 0; i < I; i++) {
        const E* at = a + std::min(i, rows - 1) * row;
        vec part[CHAINS][Q] = {};
        long j = 0;
        for (; j + CHAINS * W <= D; j += CHAINS * W)
#pragma GCC unroll 16
            for (int k = 0; k < CHAINS * Q; k++)
                part[k / Q][k % Q] += load(at + j + k / Q * W) * load(x + k % Q * apart + j + k / Q * W);
        for (; j < D; j += W)
            for (int q = 0; q < Q; q++) part[0][q] += load(at + j) * load(x + q * apart + j);
        for (int q = 0; q < Q; q++) {
            vec all = part[0][q];
            for (int k = 1; k < CHAINS; k++) all += part[k][q];
            sum[q * I + i] = all;
        }
    }
    vec total = sums(sum);
    for (int q = 0; q < Q; q++) memcpy(out + q * pitch, (float*)&total + q * I, 4 * I);
}

// --- Attention ---

// The largest head; keys of a block, and their room in a row of scores; queries of a task.
constexpr int MOST_D = 256, KEYS = 60, ROW = 64, QUERIES = 128;
constexpr float FLOOR = -1e30f;  // finite, so that a peak can be subtracted from itself
enum Type : int64_t { FLOAT, BFLOAT16, INT8 };

// What kernels.py fills in, in this order. Lengths and strides are in elements.
struct Part {  // one cache; keys, then values. index: a row of the cache for each row of queries; none: its own, causal
    const void* data[2];
    int64_t row[2], head[2], token[2];
    const void* scale[2];  // of int8, in the type of the queries
    int64_t scale_row[2], scale_head[2], scale_token[2];
    const int64_t *start, *index, *length;
    const void* channel;  // [rows,G,D] by which int8 keys are multiplied too, in the type of the queries; or none
    int64_t rows, slots, type;
};
struct Call {
    const void* q;
    int64_t q_row, q_head, q_position;
    void* out;  // [N,S,H,D]
    float* lse;  // [N,H,S]
    const int64_t* input_pos;  // [N,S]
    const float* slopes;
    int64_t N, H, S, D, G, window, type, threads, parts;
};

struct Task {
    int part, row, head, q_begin, q_end, k_begin, k_end, slot;
};

struct Query {
    int n, h, s;
    long flat(const Call& c) const { return (n * c.H + h) * c.S + s; }
};

struct Plan {
    const Call& c;
    const Part* parts;
    float scale, softcap;
    std::vector<std::vector<std::vector<int>>> members;  // [part][row of the cache]: the query rows that continue it
    std::vector<Task> tasks;
    int slots = 0;  // results that a query may have
    std::unique_ptr<float[]> out, lse;  // [slots][N*H*S][D]; [slots][N*H*S]

    int count(int part, int row) const { return int(members[part][row].size() * (c.H / c.G * c.S)); }
    Query query(const Task& task, int i) const {  // rows, then heads of the group, then positions
        int P = c.H / c.G, S = c.S;
        return {members[task.part][task.row][i / (P * S)], task.head * P + i / S % P, i % S};
    }
    // The slots of the cache that a query sees, [begin, end).
    void visible(const Task& task, Query q, int& begin, int& end) const {
        const Part& part = parts[task.part];
        int64_t position = c.input_pos[q.n * c.S + q.s] - part.start[task.row];
        int64_t written = part.length ? std::min(part.length[task.row], part.slots) : part.slots;
        if (!part.index) written = std::min(written, position + 1);
        end = int(std::max<int64_t>(0, written));
        begin = c.window ? int(std::clamp<int64_t>(position - c.window + 1, 0, end)) : 0;
    }
    void span(Task& task) const {
        task.k_begin = INT32_MAX, task.k_end = 0;
        for (int i = task.q_begin; i < task.q_end; i++) {
            int begin, end;
            visible(task, query(task, i), begin, end);
            if (begin < end) task.k_begin = std::min(task.k_begin, begin), task.k_end = std::max(task.k_end, end);
        }
    }
    void add_tasks(int p);
    void make();
};

// Blocks of queries that share a head of keys; the keys in pieces where there are few blocks for the cores.
void Plan::add_tasks(int p) {
    const Part& part = parts[p];
    long blocks = 0;
    for (int r = 0; r < part.rows; r++) blocks += c.G * ((count(p, r) + QUERIES - 1) / QUERIES);
    if (blocks == 0) return;
    long wanted = (4 * c.threads + blocks - 1) / blocks, most = std::max<long>(1, part.slots / 256);
    int pieces = c.threads == 1 ? 1 : int(std::min(wanted, most));
    for (int r = 0; r < part.rows; r++)
        for (int q = (count(p, r) - 1) / QUERIES * QUERIES; q >= 0; q -= QUERIES) {  // the longest first
            Task task{p, r, 0, q, std::min(q + QUERIES, count(p, r)), 0, 0, slots};
            span(task);
            int begin = task.k_begin, end = task.k_end, step = ((end - begin) / pieces / KEYS + 1) * KEYS;
            for (task.head = 0; task.head < c.G; task.head++)
                for (int t = begin, slot = slots; t < end; t += step)
                    task.k_begin = t, task.k_end = std::min(end, t + step), task.slot = slot++, tasks.push_back(task);
        }
    slots += pieces;
}

void Plan::make() {
    for (int p = 0; p < c.parts; p++) {
        members.emplace_back(parts[p].rows);
        for (int n = 0; n < c.N; n++) members[p].at(parts[p].index ? parts[p].index[n] : n).push_back(n);
        add_tasks(p);
    }
    size_t queries = c.N * c.H * c.S;
    lse.reset(new float[slots * queries]);
    std::fill_n(lse.get(), slots * queries, -INFINITY);
    out.reset(new float[slots * queries * c.D]);
}

// What one core works with. Wide: q [words of D][lanes], out [D][lanes]; narrow: q and out [queries][D].
struct alignas(64) Room {
    float q[QUERIES * MOST_D], out[QUERIES * MOST_D], keys[KEYS * MOST_D], values[KEYS * MOST_D];
    float scores[KEYS * 2 * W], rescale[2 * W], key_scale[ROW], value_scale[ROW];
    float peak[QUERIES], total[QUERIES], slope[QUERIES];
    int begin[QUERIES], end[QUERIES], position[QUERIES];  // as slots of the cache
};

template <class E>
const E* tokens(const Part& part, const Task& task, int side, int t) {
    return (const E*)part.data[side] + task.row * part.row[side] + task.head * part.head[side] + t * part.token[side];
}

// What query i of a task is multiplied by in place of the keys; null: by nothing.
template <class T>
const T* channels(const Plan& plan, const Task& task) {
    const void* from = plan.parts[task.part].channel;
    return from ? (const T*)from + (task.row * plan.c.G + task.head) * plan.c.D : nullptr;
}

// The scales of n tokens; of what is not int8, none.
template <class E, class T>
const float* scales(const Part& part, const Task& task, int side, int t, int n, float* to) {
    if constexpr (!std::is_same_v<E, int8_t>) return nullptr;
    const T* from = (const T*)part.scale[side] + task.row * part.scale_row[side] + task.head * part.scale_head[side];
    for (int i = 0; i < n; i++) to[i] = number(from[(t + i) * part.scale_token[side]]);
    return to;
}

// Scores as the softmax takes them: soft cap, distance, what is visible.
inline vec adjusted(const Plan& plan, vec x, vec slope, ivec slot, ivec position, ivec begin, ivec end) {
    if (plan.softcap) x = plan.softcap * tanh(x * (1 / plan.softcap));
    if (plan.c.slopes) x += slope * __builtin_convertvector(slot - position, vec);
    return ((begin <= slot) & (slot < end)) ? x : splat(-INFINITY);
}

// room.scores [n][lanes] of the keys from t0 on become weights, words of M; the running peak and total move on.
template <class M, int V>
void soften(const Plan& plan, Room& room, int first, int t0, int n, bool plain) {
    for (int v = 0; v < V; v++) {
        int i = first + v * W;
        vec peak = load(room.peak + i), top = peak, slope = load(room.slope + i);
        ivec position = *(ivec*)(room.position + i), begin = *(ivec*)(room.begin + i), end = *(ivec*)(room.end + i);
        float* at = room.scores + v * W;
        for (int t = 0; t < n; t++) {
            vec x = load(at + t * V * W) * plan.scale;
            if (!plain) x = adjusted(plan, x, slope, ivec{} + (t0 + t), position, begin, end);
            store(at + t * V * W, x);
            top = max(top, x);
        }
        vec rescale = exp(peak - top), total = load(room.total + i) * rescale;
        for (int t = 0; t < n; t += M::PAIR) {
            vec x = exp(load(at + t * V * W) - top);
            total += x;
            if constexpr (M::PAIR == 2) {
                vec odd = t + 1 < n ? exp(load(at + (t + 1) * V * W) - top) : vec{};
                total += odd;
                x = M::join(x, odd);
            }
            store(at + t / M::PAIR * V * W, x);
        }
        store(room.rescale + v * W, rescale);
        store(room.total + i, total);
        store(room.peak + i, top);
    }
}

// A block of keys for V vectors of queries from `first` on. Rows of keys and columns of values are so many words apart.
template <class M, int V>
void lanes(const Plan& plan, Room& room, int first, int t, int n, const float* k, long row, const float* v,
           long column) {
    int least_begin = INT32_MAX, most_begin = 0, least_end = INT32_MAX, most_end = 0, D = plan.c.D;
    for (int i = first; i < first + V * W; i++) {
        least_begin = std::min(least_begin, room.begin[i]), most_begin = std::max(most_begin, room.begin[i]);
        least_end = std::min(least_end, room.end[i]), most_end = std::max(most_end, room.end[i]);
    }
    if (most_end <= t || t + n <= least_begin) return;
    bool plain = most_begin <= t && t + n <= least_end && !plan.softcap && !plan.c.slopes;
    n = std::min(n, most_end - t);
    constexpr int I = TILE * (3 - V);  // fewer vectors leave registers to more rows
    tiles<M, I, V, false>(k, n, row, 1, room.q + first * D / M::PAIR, D / M::PAIR, nullptr, room.scores,
                        k == room.keys ? 0 : KEYS * row);
    soften<M, V>(plan, room, first, t, n, plain);
    int words = (n + M::PAIR - 1) / M::PAIR;
    tiles<M, I, V, true>(v, D, 1, column, room.scores, words, room.rescale, room.out + first * D,
                       v == room.values ? 0 : KEYS * column);
}

// n tokens in fp32, [n][D].
template <class E>
void widen(const E* from, long pitch, int n, int D, const float* scale, float* to) {
    for (int t = 0; t < n; t++, from += pitch, to += D) {
        float by = scale ? scale[t] : 1;
        int d = 0;
        for (; d + W <= D; d += W) store(to + d, load(from + d) * by);
        for (; d < D; d++) to[d] = number(from[d]) * by;
    }
}

// Keys and values of a block as words; `pitch`: those from a token, or a pair of tokens, to the next.
template <class M, class E, class T>
const float* words(const Plan& plan, Room& room, const Task& task, int side, int t, int n, long& pitch) {
    const Part& part = plan.parts[task.part];
    const E* from = tokens<E>(part, task, side, t);
    int D = plan.c.D;
    pitch = part.token[side] / M::PAIR;
    if constexpr (std::is_same_v<E, float>) return from;
    float* to = side ? room.values : room.keys;
    if constexpr (M::PAIR == 2) {
        if (side == 0) return (const float*)from;
        for (int i = 0; i < n; i += 2, from += 2 * part.token[side])
            for (int d = 0; d < D; d++) {
                uint32_t odd = i + 1 < n ? from[part.token[side] + d].bits : 0, word = odd << 16 | from[d].bits;
                memcpy(to + i / 2 * D + d, &word, 4);
            }
    } else {
        widen(from, part.token[side], n, D, scales<E, T>(part, task, side, t, n, room.key_scale), to);
    }
    pitch = D;
    return to;
}

// The lanes of query i in a task of Q wide ones: where its vectors begin, and their pitch.
inline void place(int i, int Q, int& first, int& pitch) {
    first = i / (2 * W) * 2 * W;
    pitch = Q - first > W ? 2 * W : W;
}

template <class M, class E, class T>
void wide(const Plan& plan, const Task& task, Room& room) {
    const Call& c = plan.c;
    int Q = task.q_end - task.q_begin, D = c.D, first, pitch;
    const T* channel = channels<T>(plan, task);
    for (int i = 0; i < (Q + W - 1) / W * W; i++) {
        Query query = plan.query(task, task.q_begin + std::min(i, Q - 1));  // the last lanes repeat a query
        const T* q = (const T*)c.q + query.n * c.q_row + query.h * c.q_head + query.s * c.q_position;
        place(i, Q, first, pitch);
        for (int d = 0; d < D; d++) {
            float x = number(q[d]) * (channel ? number(channel[d]) : 1);
            M::put(room.q + first * D / M::PAIR + i - first, pitch, d, x);
        }
    }
    for (int t = task.k_begin; t < task.k_end; t += KEYS) {
        int n = std::min(KEYS, task.k_end - t);
        long row, column;
        const float* k = words<M, E, T>(plan, room, task, 0, t, n, row);
        const float* v = words<M, E, T>(plan, room, task, 1, t, n, column);
        for (first = 0; first < Q; first += 2 * W)
            if (Q - first > W)
                lanes<M, 2>(plan, room, first, t, n, k, row, v, column);
            else
                lanes<M, 1>(plan, room, first, t, n, k, row, v, column);
    }
}

// A row of scores of n keys from t0 on becomes weights. Returns what the query's earlier sum is multiplied by.
inline float soften_row(const Plan& plan, Room& room, int i, int t0, int n, const float* scale, float* x) {
    float top = room.peak[i], total = 0;
    ivec slot;
    for (int lane = 0; lane < W; lane++) slot[lane] = t0 + lane;
    for (int t = 0; t < n; t += W, slot += W) {
        vec y = load(x + t) * plan.scale * (scale ? load(scale + t) : splat(1));
        y = adjusted(plan, y, splat(room.slope[i]), slot, ivec{} + room.position[i], ivec{} + room.begin[i],
                     ivec{} + std::min(room.end[i], t0 + n));
        store(x + t, y);
        for (int lane = 0; lane < W; lane++) top = std::max(top, y[lane]);
    }
    vec sum = {};
    for (int t = 0; t < n; t += W) {
        vec y = exp(load(x + t) - top);
        sum += y;
        store(x + t, y);
    }
    for (int lane = 0; lane < W; lane++) total += sum[lane];
    float rescale = std::exp(room.peak[i] - top);
    room.total[i] = room.total[i] * rescale + total;
    room.peak[i] = top;
    return rescale;
}

// out[d] = out[d] * rescale + the sum over n tokens of weight[t] * v[t][d], for C vectors.
template <int C, class E>
inline void weighted(const E* v, long pitch, int n, const float* weight, float rescale, float* out) {
    vec sum[C];
    for (int i = 0; i < C; i++) sum[i] = load(out + i * W) * rescale;
    for (int t = 0; t < n; t++, v += pitch)
        for (int i = 0; i < C; i++) sum[i] += load(v + i * W) * weight[t];
    for (int i = 0; i < C; i++) store(out + i * W, sum[i]);
}

template <int Q, class E>
void score_rows(const E* k, long pitch, int n, const float* q, int D, float* scores) {
    for (int t = 0; t < n; t += W / Q) dots<Q>(k + t * pitch, pitch, n - t, q, D, D, scores + t, ROW);
}

// f(how many, from which on) over n of something: four at a time, then two, then one.
template <class F>
void by_fours(int n, F f) {
    int i = 0;
    for (; i + 4 <= n; i += 4) f(std::integral_constant<int, 4>{}, i);
    for (; i + 2 <= n; i += 2) f(std::integral_constant<int, 2>{}, i);
    if (i < n) f(std::integral_constant<int, 1>{}, i);
}

template <class E, class T>
void narrow(const Plan& plan, const Task& task, Room& room) {
    const Call& c = plan.c;
    const Part& part = plan.parts[task.part];
    int Q = task.q_end - task.q_begin, D = c.D;
    const T* channel = channels<T>(plan, task);
    for (int i = 0; i < Q; i++) {
        Query query = plan.query(task, task.q_begin + i);
        const T* q = (const T*)c.q + query.n * c.q_row + query.h * c.q_head + query.s * c.q_position;
        widen(q, 0, 1, D, nullptr, room.q + i * D);
        for (int d = 0; channel && d < D; d++) room.q[i * D + d] *= number(channel[d]);
    }
    for (int t = task.k_begin; t < task.k_end; t += KEYS) {
        int n = std::min(KEYS, task.k_end - t);
        const E *k = tokens<E>(part, task, 0, t), *v = tokens<E>(part, task, 1, t);
        const float* k_scale = scales<E, T>(part, task, 0, t, n, room.key_scale);
        const float* v_scale = scales<E, T>(part, task, 1, t, n, room.value_scale);
        by_fours(Q, [&](auto rows, int i) {
            score_rows<rows>(k, part.token[0], n, room.q + i * D, D, room.scores + i * ROW);
        });
        for (int i = 0; i < Q; i++) {
            float *weight = room.scores + i * ROW, *out = room.out + i * D;
            float rescale = soften_row(plan, room, i, t, n, k_scale, weight);
            for (int j = 0; v_scale && j < n; j++) weight[j] *= v_scale[j];
            int d = 0;
            for (; d + 8 * W <= D; d += 8 * W) weighted<8>(v + d, part.token[1], n, weight, rescale, out + d);
            for (; d + 4 * W <= D; d += 4 * W) weighted<4>(v + d, part.token[1], n, weight, rescale, out + d);
            for (; d < D; d += W) weighted<1>(v + d, part.token[1], n, weight, rescale, out + d);
        }
    }
}

// The results of a task go to its slot.
inline void finish(const Plan& plan, const Task& task, const Room& room, bool is_wide) {
    const Call& c = plan.c;
    int Q = task.q_end - task.q_begin, D = c.D;
    for (int i = 0; i < Q; i++) {
        Query query = plan.query(task, task.q_begin + i);
        int first = i, pitch = 1;
        if (is_wide) place(i, Q, first, pitch);
        const float* from = room.out + first * D + (i - first);
        float total = room.total[i], scale = total == 0 ? 0 : 1 / total;  // nan stays
        long at = task.slot * c.N * c.H * c.S + query.flat(c);
        plan.lse[at] = total == 0 ? -INFINITY : room.peak[i] + std::log(total);
        for (int d = 0; d < D; d++) plan.out[at * D + d] = from[d * pitch] * scale;
    }
}

template <class E, class T>
void run(const Plan& plan, const Task& task, Room& room) {
    int Q = task.q_end - task.q_begin, padded = (Q + W - 1) / W * W;
    for (int i = 0; i < padded; i++) {
        Query query = plan.query(task, task.q_begin + std::min(i, Q - 1));
        room.peak[i] = FLOOR, room.total[i] = 0;
        room.slope[i] = plan.c.slopes ? plan.c.slopes[query.h] : 0;
        plan.visible(task, query, room.begin[i], room.end[i]);
        room.position[i] = int(plan.c.input_pos[query.n * plan.c.S + query.s] - plan.parts[task.part].start[task.row]);
    }
    std::fill_n(room.out, padded * plan.c.D, 0.0f);
    bool is_wide = Q > W / 2 || plan.c.D % W;
    if (!is_wide)
        narrow<E, T>(plan, task, room);
#ifdef PAIRS
    else if constexpr (std::is_same_v<E, bf16>)
        wide<Double, E, T>(plan, task, room);
#endif
    else
        wide<Single, E, T>(plan, task, room);
    finish(plan, task, room, is_wide);
}

// The results of one query, merged.
template <class T>
void merge(const Plan& plan, long flat) {
    const Call& c = plan.c;
    long queries = c.N * c.H * c.S, n = flat / (c.H * c.S), h = flat / c.S % c.H, s = flat % c.S;
    float peak = FLOOR, total = 0, sum[MOST_D] = {};
    for (int i = 0; i < plan.slots; i++) peak = std::max(peak, plan.lse[i * queries + flat]);
    for (int i = 0; i < plan.slots; i++) {
        float weight = std::exp(plan.lse[i * queries + flat] - peak);
        const float* from = plan.out.get() + (i * queries + flat) * c.D;
        total += weight;
        for (int d = 0; d < c.D && weight > 0; d++) sum[d] += weight * from[d];
    }
    T* to = (T*)c.out + ((n * c.S + s) * c.H + h) * c.D;
    for (int d = 0; d < c.D; d++) put_number(to + d, total == 0 ? 0 : sum[d] / total);
    c.lse[flat] = total == 0 ? -INFINITY : peak + std::log(total);
}

template <class T>
void attend(const Plan& plan) {
    const Call& c = plan.c;
    long queries = c.N * c.H * c.S;
#pragma omp parallel num_threads(c.threads)
    {
        static thread_local Room room;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < plan.tasks.size(); i++) {
            const Task& task = plan.tasks[i];
            if (plan.parts[task.part].type == INT8)
                run<int8_t, T>(plan, task, room);
            else
                run<T, T>(plan, task, room);
        }
#pragma omp for
        for (long i = 0; i < queries; i++) merge<T>(plan, i);
    }
}

// --- Products with weights ---

constexpr int OUTPUTS = 48, INPUTS = 256;  // of a weight's block, widened at a time
constexpr size_t MOST_KEPT = 1 << 20;      // numbers of packed rows that stay in memory between products

// y [rows,outputs] = x [rows,inputs] times the weight's transpose. values: int8 [outputs,inputs], and scales [outputs];
// or with zeros, two 4-bit codes in a byte, the even input in the upper half: (code - 8) * scale + zero, these
// [outputs,inputs / group]; or without scales, in the type of x, for rows that are narrow. 32 divides inputs and group.
struct Product {
    const void* x;
    void* y;
    const int8_t* values;
    const bf16 *scales, *zeros;
    int64_t rows, outputs, inputs, group, type, threads;
};

// Where input j lies among the widened, which come 2 W at a time in two vectors: of codes, even inputs, then odd ones.
template <class M>
long position(const Product& p, long j) {
    int r = j % (2 * W), vector = p.zeros ? r % 2 : r / W, lane = p.zeros ? r / 2 : r % W;
    return j - r + (M::PAIR == 2 ? 2 * lane + vector : vector * W + lane);
}

// n inputs of an output, from j on, as words. int8 without its scale.
template <class M>
inline void unpack(const Product& p, long o, long j, int n, float* to) {
    const int8_t* from = p.values + (o * p.inputs + j) / (p.zeros ? 2 : 1);
    long group = (o * p.inputs + j) / p.group, next = p.group - j % p.group;  // the input where another group begins
    float scale = 1, zero = 0;
    for (int i = 0; i < n; i += 2 * W, to += 2 * W / M::PAIR) {
        vec a, b;
        if (p.zeros) {
            if (i == next) group++, next += p.group;
            if (i == 0 || i == next - p.group) {
                scale = number(p.scales[group]);
                zero = number(p.zeros[group]) - 8 * scale;
            }
            ivec codes = integers(from + i / 2);
            a = __builtin_convertvector(codes >> 4 & 15, vec) * scale + zero;
            b = __builtin_convertvector(codes & 15, vec) * scale + zero;
        } else {
            a = load(from + i), b = load(from + i + W);
        }
        store(to, M::join(a, b));
        if (M::PAIR == 1) store(to + W, b);
    }
}

// Row i of x, in lane i of its vectors (wide), or by itself.
template <class M, class T>
void pack_row(const Product& p, int i, bool is_wide, float* to) {
    int block = i / QUERIES * QUERIES, first = i - block, pitch = 1;
    if (is_wide) place(i - block, std::min<int>(p.rows - block, QUERIES), first, pitch);
    to += (block + first) * p.inputs / M::PAIR + (is_wide ? i - block - first : 0);
    const T* x = (const T*)p.x + std::min<long>(i, p.rows - 1) * p.inputs;  // the last lanes repeat a row
    for (long j = 0; j < p.inputs; j++) M::put(to, pitch, position<M>(p, j), number(x[j]));
}

template <class T>
inline void put_product(const Product& p, long row, long o, float x) {
    put_number((T*)p.y + row * p.outputs + o, p.zeros || !p.scales ? x : x * number(p.scales[o]));
}

// Up to QUERIES rows from `row` on, n outputs from o on.
template <class M, class T>
void multiply_wide(const Product& p, const float* x, long row, long o, int n, Room& room) {
    int rows = std::min<long>(p.rows - row, QUERIES), first, pitch;
    std::fill_n(room.out, n * QUERIES, 0.0f);
    std::fill_n(room.rescale, 2 * W, 1.0f);
    x += row * p.inputs / M::PAIR;
    for (long j = 0; j < p.inputs; j += INPUTS) {
        int m = std::min<long>(INPUTS, p.inputs - j), words = m / M::PAIR;
        for (int i = 0; i < n; i++) unpack<M>(p, o + i, j, m, room.keys + i * words);
        for (first = 0; first < rows; first += 2 * W) {
            const float* from = x + (first * p.inputs + j * (rows - first > W ? 2 * W : W)) / M::PAIR;
            float* to = room.out + first * n;
            if (rows - first > W)
                tiles<M, TILE, 2, true>(room.keys, n, words, 1, from, words, room.rescale, to);
            else
                tiles<M, 2 * TILE, 1, true>(room.keys, n, words, 1, from, words, room.rescale, to);
        }
    }
    for (int i = 0; i < rows; i++) {
        place(i, rows, first, pitch);
        for (int k = 0; k < n; k++) put_product<T>(p, row + i, o + k, room.out[first * n + k * pitch + i - first]);
    }
}

// Q rows from `row` on, n outputs from o on.
template <int Q, class T>
void multiply_narrow(const Product& p, const float* x, long row, long o, int n, Room& room) {
    constexpr int I = W / Q;
    x += row * p.inputs;
    for (int i = 0; i < n; i += I) {
        float sum[W] = {}, part[W];
        int outputs = std::min(I, n - i);
        long at = (o + i) * p.inputs;
        if (!p.scales)
            dots<Q>((const T*)p.values + at, p.inputs, outputs, x, p.inputs, p.inputs, sum, I);
        else if (!p.zeros)
            dots<Q>(p.values + at, p.inputs, outputs, x, p.inputs, p.inputs, sum, I);
        for (long j = 0; p.zeros && j < p.inputs; j += 2 * INPUTS) {
            int m = std::min<long>(2 * INPUTS, p.inputs - j);
            for (int k = 0; k < outputs; k++) unpack<Single>(p, o + i + k, j, m, room.keys + k * m);
            dots<Q>(room.keys, m, outputs, x + j, p.inputs, m, part, I);
            for (int k = 0; k < W; k++) sum[k] += part[k];
        }
        for (int q = 0; q < Q; q++)
            for (int k = 0; k < outputs; k++) put_product<T>(p, row + q, o + i + k, sum[q * I + k]);
    }
}

template <class M, class T>
void multiply(const Product& p) {
    bool is_wide = p.rows > W / 2;
    long packed = is_wide ? (p.rows + W - 1) / W * W : p.rows;
    static thread_local std::vector<float> memory;  // kept: fresh pages would cost more than the product
    memory.resize(std::max<size_t>(memory.size(), packed * p.inputs));
    float* x = memory.data();
    long blocks = (p.outputs + OUTPUTS - 1) / OUTPUTS, row_blocks = is_wide ? (p.rows + QUERIES - 1) / QUERIES : 1;
#pragma omp parallel num_threads(p.threads)
    {
        static thread_local Room room;
#pragma omp for
        for (long i = 0; i < packed; i++)
            is_wide ? pack_row<M, T>(p, i, true, x) : pack_row<Single, T>(p, i, false, x);
#pragma omp for schedule(dynamic, 1)
        for (long block = 0; block < blocks * row_blocks; block++) {
            long o = block % blocks * OUTPUTS, row = block / blocks * QUERIES;
            int n = std::min<long>(OUTPUTS, p.outputs - o);
            if (is_wide)
                multiply_wide<M, T>(p, x, row, o, n, room);
            else
                by_fours(p.rows, [&](auto rows, int i) { multiply_narrow<rows, T>(p, x, i, o, n, room); });
        }
    }
    if (memory.size() > MOST_KEPT) std::vector<float>().swap(memory);
}

// --- Random numbers ---

typedef uint64_t lvec __attribute__((vector_size(4 * W)));  // W / 2 words of 32 bits, each in the lower half of 64

constexpr int CHAINS = 4, COUNTERS = CHAINS * W / 2;  // vectors side by side, since a round waits for its products
constexpr uint64_t WORD = 0xFFFFFFFF;

#if defined(__AVX512F__)
inline lvec product(lvec x, lvec y) { return (lvec)_mm512_mul_epu32((__m512i)x, (__m512i)y); }
#elif defined(__AVX2__) && !defined(EMULATE_AVX512)
inline lvec product(lvec x, lvec y) { return (lvec)_mm256_mul_epu32((__m256i)x, (__m256i)y); }
#else
inline lvec product(lvec x, lvec y) { return x * y; }
#endif

struct Numbers {
    const int64_t *keys, *tokens;  // [N], [N,K]: rows of tokens are `stride` apart
    double* out;                   // [N,K]
    int64_t N, K, stride, threads;
};

// Philox4x32-10 (sampling.philox) of n tokens, of whose four words two are read: fp64 of 53 bits.
void count(uint64_t key, const int64_t* tokens, int n, double* out) {
    lvec a[CHAINS] = {}, b[CHAINS] = {}, c[CHAINS] = {}, d[CHAINS] = {};
    memcpy(a, tokens, n * sizeof *tokens);
    uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
    for (int round = 0; round < 10; round++, low += 0x9E3779B9, high += 0xBB67AE85)
        for (int i = 0; i < CHAINS; i++) {
            lvec x = product(a[i], lvec{} + 0xD2511F53), y = product(c[i], lvec{} + 0xCD9E8D57);
            a[i] = y >> 32 ^ b[i] ^ low, b[i] = y & WORD;
            c[i] = x >> 32 ^ d[i] ^ high, d[i] = x & WORD;
        }
    uint64_t made[COUNTERS];
    for (int i = 0; i < CHAINS; i++) a[i] = a[i] << 21 | b[i] >> 11;
    memcpy(made, a, sizeof made);
    for (int i = 0; i < n; i++) out[i] = made[i] * 0x1p-53;
}

}  // namespace

extern "C" void numbers(const Numbers* call) {
    const Numbers& c = *call;
    long blocks = (c.K + COUNTERS - 1) / COUNTERS;
#pragma omp parallel for num_threads(c.threads)
    for (long i = 0; i < c.N * blocks; i++) {
        long row = i / blocks, first = i % blocks * COUNTERS;
        int n = std::min<long>(COUNTERS, c.K - first);
        count(c.keys[row], c.tokens + row * c.stride + first, n, c.out + row * c.K + first);
    }
}

// Both return one of these.
enum Status : int { DONE, NO_MEMORY, NO_SUCH_ROW };

extern "C" int multiply(const Product* product) try {
    if (product->type == FLOAT)
        multiply<Single, float>(*product);
    else
#ifdef PAIRS
        multiply<Double, bf16>(*product);
#else
        multiply<Single, bf16>(*product);
#endif
    return DONE;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

extern "C" int attend(const Call* call, const Part* parts, float scale, float softcap) try {
    Plan plan{*call, parts, scale, softcap, {}, {}, 0, {}, {}};
    plan.make();
    if (call->type == FLOAT)
        attend<float>(plan);
    else
        attend<bf16>(plan);
    return DONE;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
} catch (const std::out_of_range&) {
    return NO_SUCH_ROW;
}
