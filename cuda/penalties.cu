// Penalties and bias of sampled rows, and the counts that they need.
// output_counts [max_running, vocab] i32, in_prompt [max_running, vocab] u8: what each running request has seen.
// A block per request; counts are integers, so that atomics on them have no order.

// State rows that start: count what their requests hold so far (prompt, then output).
extern "C" __global__ void reset_counts(
    const int* __restrict__ rows, const int* __restrict__ prompt_lens, const int* __restrict__ indptr,
    const int* __restrict__ tokens, int vocab, int* __restrict__ output_counts, unsigned char* __restrict__ in_prompt) {
    const size_t row = static_cast<size_t>(rows[blockIdx.x]) * vocab;
    for (int v = threadIdx.x; v < vocab; v += blockDim.x) {
        output_counts[row + v] = 0;
        in_prompt[row + v] = 0;
    }
    __syncthreads();
    const int first = indptr[blockIdx.x], end = indptr[blockIdx.x + 1], output = first + prompt_lens[blockIdx.x];
    for (int i = first + threadIdx.x; i < end; i += blockDim.x) {
        if (i < output) in_prompt[row + tokens[i]] = 1;
        else atomicAdd(&output_counts[row + tokens[i]], 1);
    }
}

// logits [num_sampled, vocab] = penalised raw, plus bias. A row's bias holds a token once, or once more with -inf.
extern "C" __global__ void penalise(
    const float* __restrict__ raw, const int* __restrict__ state_rows, const float* __restrict__ repetition,
    const float* __restrict__ presence, const float* __restrict__ frequency, const int* __restrict__ bias_indptr,
    const int* __restrict__ bias_ids, const float* __restrict__ bias_values, const int* __restrict__ output_counts,
    const unsigned char* __restrict__ in_prompt, int has_penalties, int has_bias, int vocab,
    float* __restrict__ logits) {
    const int i = blockIdx.x;
    const size_t at = static_cast<size_t>(i) * vocab;
    const size_t state = has_penalties ? static_cast<size_t>(state_rows[i]) * vocab : 0;
    for (int v = threadIdx.x; v < vocab; v += blockDim.x) {
        float x = raw[at + v];
        if (has_penalties) {
            const int count = output_counts[state + v];
            if (count > 0 || in_prompt[state + v]) x = x > 0.0f ? x / repetition[i] : x * repetition[i];
            x -= __fadd_rn(presence[i] * (count > 0), __fmul_rn(frequency[i], count));
        }
        logits[at + v] = x;
    }
    if (!has_bias) return;
    __syncthreads();
    for (int b = bias_indptr[i] + threadIdx.x; b < bias_indptr[i + 1]; b += blockDim.x)
        atomicAdd(&logits[at + bias_ids[b]], bias_values[b]);
}

// Count the sampled ids; -1 is none.
extern "C" __global__ void count_sampled(
    const int* __restrict__ ids, const int* __restrict__ state_rows, int num_sampled, int vocab,
    int* __restrict__ output_counts) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_sampled && ids[i] >= 0) ++output_counts[static_cast<size_t>(state_rows[i]) * vocab + ids[i]];
}
