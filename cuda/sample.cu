// One token per row: the best one (temperature 0), or by inverse transform of what top-k, top-p and min-p leave.
// raw, logits [rows, vocab] fp32 (raw: the model's own, which must be finite; logits: after penalties and bias; may be the
// same), one parameter of each kind per row, ids [rows]: -1 if raw is not finite or every token is forbidden.
// A block per row; rows beyond counts[5] are a graph's padding. No full sort: candidates are the tokens not worse than the
// 256th best of the threads' own bests; they are sorted, and decide unless the distribution is flat or the filters are
// wide. Then thresholds are sought through histograms, whose masses are fixed-point numbers: sums in any order are equal.
// Tokens are ordered by descending probability, equal ones by id. Results depend on nothing but the row.

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

constexpr int THREADS = 1024;
constexpr int ENOUGH = 256;   // candidates, at least
constexpr int MOST = 2048;    // candidates, at most
constexpr int BINS = 2048;
constexpr float FIXED_ONE = 17592186044416.0f;  // 2^44: a mass of 1
constexpr unsigned NONE = 0xffffffffu;
typedef unsigned long long u64;

struct Row {
    const float* logits;
    int vocab;
    float max, temperature;

    // How far a token is below the best one, in units of log e. Order of tokens: ascending.
    __device__ float distance(float logit) const { return fabsf(__fdiv_rn(__fsub_rn(logit, max), temperature)); }
};

__device__ __forceinline__ u64 fixed_mass(float distance) { return __float2ull_rn(expf(-distance) * FIXED_ONE); }

// f(id, value) for every element of a row, in vectors where rows are aligned; `after` each vector.
template <typename F, typename After>
__device__ __forceinline__ void for_each(const float* values, int vocab, F f, After after) {
    if (vocab % 4 == 0) {
#pragma unroll 4
        for (int i = threadIdx.x * 4; i < vocab; i += THREADS * 4) {
            const float4 v = *reinterpret_cast<const float4*>(values + i);
            f(i, v.x);
            f(i + 1, v.y);
            f(i + 2, v.z);
            f(i + 3, v.w);
            after();
        }
    } else {
        for (int i = threadIdx.x; i < vocab; i += THREADS) {
            f(i, values[i]);
            after();
        }
    }
}

template <typename F>
__device__ __forceinline__ void for_each(const float* values, int vocab, F f) {
    for_each(values, vocab, f, [] {});
}

__device__ u64 smallest(u64 value) {  // of the block
    __shared__ u64 best[THREADS / 32];
    for (int offset = 16; offset > 0; offset /= 2) {
        const u64 other = __shfl_xor_sync(~0u, value, offset);
        value = other < value ? other : value;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = value;
    __syncthreads();
    u64 found = best[0];
    for (int i = 1; i < THREADS / 32; ++i) found = best[i] < found ? best[i] : found;
    return found;
}

template <typename T>
__device__ T block_sum(T value) {
    __shared__ T sums[THREADS / 32];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    T total = 0;
    for (int i = 0; i < THREADS / 32; ++i) total += sums[i];
    return total;
}

// Inclusive prefix sum over the block, one value per thread.
template <typename T>
__device__ T block_scan(T value, T& total) {
    __shared__ T sums[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int offset = 1; offset < 32; offset *= 2) {
        const T other = __shfl_up_sync(~0u, value, offset);
        if (lane >= offset) value += other;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = value;
    __syncthreads();
    T before = 0;
    total = 0;
    for (int i = 0; i < THREADS / 32; ++i) {
        if (i < warp) before += sums[i];
        total += sums[i];
    }
    return before + value;
}

// Ascending, size a power of two.
template <typename T>
__device__ void sort(T* values, int size) {
    for (int run = 2; run <= size; run *= 2) {
        for (int gap = run / 2; gap > 0; gap /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size; i += THREADS) {
                const int j = i ^ gap;
                if (j > i) {
                    const T a = values[i], b = values[j];
                    if ((a > b) == ((i & run) == 0)) {
                        values[i] = b;
                        values[j] = a;
                    }
                }
            }
        }
    }
    __syncthreads();
}

// The n-th smallest of the threads' values, which are below 2^31: the largest that fewer than n are below of.
__device__ unsigned nth(unsigned value, int n) {
    unsigned found = 0;
    for (unsigned bit = 1u << 30; bit > 0; bit /= 2)
        if (__syncthreads_count(value < found + bit) < n) found += bit;
    return found;
}

__device__ __forceinline__ float distance_of(u64 candidate) { return __uint_as_float(candidate >> 32); }

struct Filters {
    int top_k;
    float top_p, min_p, uniform;
};

union Shared {
    struct {
        u64 candidates[MOST];
        double cumulative[MOST];
    };
    struct {
        u64 mass[BINS];
        unsigned count[BINS];
    };
};

// Where a prefix of the order ends: in a group of equal tokens.
struct Place {
    float distance;     // of the group
    u64 count, mass;    // before the group
    u64 size;           // of the group
};

// The group in which the running count (or mass) first exceeds `target`, or the last one.
__device__ Place seek(const Row& row, Shared& shared, float low, float high, bool by_count, u64 target) {
    Place place = {low, 0, 0, 0};
    while (true) {
        const float scale = high > low ? (BINS - 1) / (high - low) : 0.0f;
        const auto bin_of = [&](float d) { return min(static_cast<int>((d - low) * scale), BINS - 1); };
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += THREADS) shared.mass[i] = shared.count[i] = 0;
        __syncthreads();
        for_each(row.logits, row.vocab, [&](int, float logit) {
            const float d = row.distance(logit);
            if (d >= low && d <= high) {
                const int bin = bin_of(d);
                atomicAdd(&shared.count[bin], 1u);
                atomicAdd(&shared.mass[bin], fixed_mass(d));
            }
        });
        __syncthreads();
        __shared__ int chosen;
        __shared__ u64 count_before, mass_before;
        u64 counts[2], masses[2], count_total, mass_total;
        const int first = threadIdx.x * 2;
        for (int i = 0; i < 2; ++i) counts[i] = shared.count[first + i], masses[i] = shared.mass[first + i];
        const u64 count_end = block_scan(counts[0] + counts[1], count_total);
        const u64 mass_end = block_scan(masses[0] + masses[1], mass_total);
        const u64 wanted = min(target - (by_count ? place.count : place.mass), (by_count ? count_total : mass_total) - 1);
        u64 count = count_end - counts[0] - counts[1], mass = mass_end - masses[0] - masses[1];
        for (int i = 0; i < 2; ++i) {
            const u64 start = by_count ? count : mass, width = by_count ? counts[i] : masses[i];
            if (start <= wanted && wanted < start + width) {
                chosen = first + i;
                count_before = count;
                mass_before = mass;
            }
            count += counts[i];
            mass += masses[i];
        }
        __syncthreads();
        place.count += count_before;
        place.mass += mass_before;
        place.size = shared.count[chosen];
        u64 nearest = ~0ull, furthest = ~0ull;
        for_each(row.logits, row.vocab, [&](int, float logit) {
            const float d = row.distance(logit);
            if (d >= low && d <= high && bin_of(d) == chosen) {
                nearest = min(nearest, static_cast<u64>(__float_as_uint(d)));
                furthest = min(furthest, static_cast<u64>(NONE - __float_as_uint(d)));
            }
        });
        low = __uint_as_float(static_cast<unsigned>(smallest(nearest)));
        high = __uint_as_float(NONE - static_cast<unsigned>(smallest(furthest)));
        place.distance = low;
        if (low == high) return place;
    }
}

// Mass of the best `count` tokens.
__device__ u64 prefix_mass(const Row& row, Shared& shared, float furthest, u64 count) {
    const Place place = seek(row, shared, 0.0f, furthest, true, count - 1);
    return place.mass + min(count - place.count, place.size) * fixed_mass(place.distance);
}

// The id of the `index`th token at `distance`.
__device__ int nth_equal(const Row& row, float distance, u64 index) {
    __shared__ int found;
    int before = 0;
    for (int base = 0; base < row.vocab; base += THREADS) {
        const int id = base + threadIdx.x;
        const bool is_equal = id < row.vocab && row.distance(row.logits[id]) == distance;
        int total;
        const int rank = before + block_scan(static_cast<int>(is_equal), total) - 1;
        if (is_equal && rank == static_cast<int>(index)) found = id;
        before += total;
        if (before > static_cast<int>(index)) break;
    }
    __syncthreads();
    return found;
}

__device__ __noinline__ int sample_any(Row row, Shared& shared, const Filters& filters) {
    // Tokens whose fixed-point mass is 0 are left out: they are never chosen.
    float mine = 0.0f;
    u64 my_mass = 0, my_count = 0;
    for_each(row.logits, row.vocab, [&](int, float logit) {
        const float d = row.distance(logit);
        const u64 mass = fixed_mass(d);
        if (mass > 0) {
            mine = fmaxf(mine, d);
            my_mass += mass;
            ++my_count;
        }
    });
    const float furthest = __uint_as_float(NONE - static_cast<unsigned>(smallest(NONE - __float_as_uint(mine))));
    const u64 mass_of_all = block_sum(my_mass), count_of_all = block_sum(my_count);
    const bool has_top_k = filters.top_k > 0 && filters.top_k < row.vocab;
    u64 kept = has_top_k ? min(static_cast<u64>(filters.top_k), count_of_all) : count_of_all;
    u64 mass = has_top_k ? prefix_mass(row, shared, furthest, kept) : mass_of_all;
    const bool is_filtered = has_top_k || filters.top_p < 1.0f || filters.min_p > 0.0f;
    if (filters.top_p < 1.0f) {  // tokens before which less than this mass lies
        const u64 limit = max(static_cast<u64>(ceil(static_cast<double>(filters.top_p) * mass)), u64(1));
        const Place place = seek(row, shared, 0.0f, furthest, false, limit - 1);
        const u64 each = fixed_mass(place.distance);
        kept = min(kept, place.count + min(place.size, (limit - place.mass + each - 1) / each));
    }
    if (filters.min_p > 0.0f) {
        u64 count = 0;
        for_each(row.logits, row.vocab, [&](int, float logit) {
            count += exp(-static_cast<double>(row.distance(logit))) >= filters.min_p;
        });
        kept = min(kept, max(block_sum(count), u64(1)));
    }
    if (is_filtered) mass = prefix_mass(row, shared, furthest, kept);
    const u64 target = min(static_cast<u64>(static_cast<double>(filters.uniform) * mass), mass - 1);
    const Place place = seek(row, shared, 0.0f, furthest, false, target);
    const u64 index = min((target - place.mass) / fixed_mass(place.distance), place.size - 1);
    return nth_equal(row, place.distance, index);
}

// The choice among sorted candidates, which are the row's best `size` tokens; NONE if they do not decide.
__device__ unsigned choose(const Row& row, Shared& shared, int size, double mass_of_all, const Filters& filters) {
    double sum = 0.0;  // prefix sums of the candidates' masses, two per thread
    double masses[2];
    const int first = threadIdx.x * 2;
    for (int i = 0; i < 2; ++i) {
        masses[i] = first + i < size ? exp(-static_cast<double>(distance_of(shared.candidates[first + i]))) : 0.0;
        sum += masses[i];
    }
    double all;
    const double end = block_scan(sum, all);
    const double cumulative[2] = {end - masses[1], end};
    for (int i = 0; i < 2; ++i)
        if (first + i < size) shared.cumulative[first + i] = cumulative[i];
    __syncthreads();
    const int vocab = row.vocab, k = filters.top_k > 0 ? min(filters.top_k, vocab) : vocab;
    const double total = k < vocab ? shared.cumulative[min(k, size) - 1] : size == vocab ? all : mass_of_all;
    int in_prefix = 0;
    for (int i = 0; i < 2; ++i) {
        const bool by_p = filters.top_p >= 1.0f || cumulative[i] - masses[i] < filters.top_p * total;
        in_prefix += first + i < size && by_p && masses[i] >= filters.min_p;
    }
    const int kept = min(max(block_sum(in_prefix), 1), k);
    const bool is_unfiltered = k == vocab && filters.top_p >= 1.0f && filters.min_p <= 0.0f;
    const double mass = is_unfiltered ? total : shared.cumulative[min(kept, size) - 1];
    int before = 0;
    for (int i = 0; i < 2; ++i) before += first + i < size && cumulative[i] <= filters.uniform * mass;
    const int place = block_sum(before);
    const bool decides = size == vocab || (is_unfiltered ? place < size : k <= size || (k == vocab && kept < size));
    if (!decides) return NONE;
    return static_cast<unsigned>(shared.candidates[min(place, (is_unfiltered ? size : kept) - 1)]);
}

// The exact distance of a token, which becomes a candidate if it is within the limit. Out of line: few tokens come here.
__device__ __noinline__ float consider(Row row, int id, float logit, unsigned limit, u64* candidates, int* size) {
    const float distance = row.distance(logit);
    if (__float_as_uint(distance) <= limit) {
        const int i = atomicAdd(size, 1);
        if (i < MOST) candidates[i] = static_cast<u64>(__float_as_uint(distance)) << 32 | static_cast<unsigned>(id);
    }
    return distance;
}

// `best_of_thread`: of the elements that this thread sees.
__device__ int sample_row(const Row& row, Shared& shared, const Filters& filters, float best_of_thread) {
    __shared__ int size;
    const unsigned nearest = __float_as_uint(row.distance(best_of_thread));  // rounding keeps order
    const unsigned limit = row.vocab <= MOST ? NONE : nth(nearest, ENOUGH);
    if (threadIdx.x == 0) size = 0;
    __syncthreads();
    // Few distances need be exact: a product instead of a quotient is off by a few units in the last place. Where that cannot
    // be said, of very low temperatures and without a limit, `rate` or `bound` is NaN.
    const float rate = row.temperature > 1e-6f ? 1.0f / row.temperature : __uint_as_float(NONE);
    const float bound = __uint_as_float(limit) * 1.00001f + 1e-30f;
    double mass = 0.0;
    float piece = 0.0f;
    for_each(row.logits, row.vocab, [&](int id, float logit) {
        float d = (row.max - logit) * rate;
        if (!(d > bound)) d = consider(row, id, logit, limit, shared.candidates, &size);
        piece += expf(-d);
    }, [&] {
        mass += piece;
        piece = 0.0f;
    });
    mass = block_sum(mass);
    if (size <= MOST) {
        int padded = ENOUGH;
        while (padded < size) padded *= 2;
        for (int i = size + threadIdx.x; i < padded; i += THREADS) shared.candidates[i] = ~0ull;
        sort(shared.candidates, padded);
        const unsigned id = choose(row, shared, size, mass, filters);
        if (id != NONE) return static_cast<int>(id);
    }
    return sample_any(row, shared, filters);
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(
    const float* __restrict__ raw, const float* __restrict__ logits, const int* __restrict__ counts,
    const float* __restrict__ temperature, const int* __restrict__ top_k, const float* __restrict__ top_p,
    const float* __restrict__ min_p, const float* __restrict__ uniform, int vocab, int* __restrict__ ids) {
    __shared__ Shared shared;
    const int i = blockIdx.x;
    if (i >= counts[5]) return;
    const size_t at = static_cast<size_t>(i) * vocab;
    bool is_finite = true;
    if (raw != logits) for_each(raw + at, vocab, [&](int, float value) { is_finite &= isfinite(value); });
    float max = -INFINITY;
    int id = -1;
    for_each(logits + at, vocab, [&](int j, float value) {
        if (raw == logits) is_finite &= isfinite(value);
        if (value > max) {
            max = value;
            id = j;
        }
    });
    // ordered by descending value, then by id
    const unsigned bits = __float_as_uint(max), order = bits & 0x80000000u ? bits : ~bits ^ 0x80000000u;
    const u64 best = smallest(static_cast<u64>(order) << 32 | static_cast<unsigned>(id));
    const bool is_valid = __syncthreads_and(is_finite) && static_cast<int>(static_cast<unsigned>(best)) >= 0;
    int chosen = is_valid ? static_cast<int>(static_cast<unsigned>(best)) : -1;
    if (is_valid && temperature[i] > 0.0f) {
        const Row row = {logits + at, vocab, logits[at + chosen], temperature[i]};
        chosen = sample_row(row, shared, {top_k[i], top_p[i], min_p[i], uniform[i]}, max);
    }
    if (threadIdx.x == 0) ids[i] = chosen;
}
